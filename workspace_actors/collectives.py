"""Collectives over Ray: members send their arrays to one meeting point, which adds them up in rank order.

The result does not depend on who arrives first, so training is repeatable bit by bit. A collective ends for all
members or for none: when one is lost, or does not come in time, everybody's call ends with an error that names it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import ray
from ray.exceptions import RayError

from ..ops.errors import BlobspaceError, ConflictError, DeadlineError, InvalidInputError, WorkspaceLostError
from ..ops.values import Array
from .devices import to_host
from .ray_errors import unwrapped


@dataclass(slots=True)
class _Meeting:
    """One collective under way: who has come, and what the others wait for."""

    what: str
    arrays: dict[int, Sequence[Array] | None] = field(default_factory=dict[int, "Sequence[Array] | None"])
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    result: list[Array] | None = None
    error: BlobspaceError | None = None


class MeetingPoint:
    """The actor at which the members of one cluster meet. Asynchronous: each caller waits without a thread."""

    def __init__(self) -> None:
        self._generation = 0
        self._members: tuple[str, ...] = ()
        self._meetings: dict[str, _Meeting] = {}
        self._broken: BlobspaceError | None = None

    async def open(self, generation: int, members: Sequence[str]) -> None:
        """Let these members meet, in this order of ranks; whoever still waits in an older meeting is sent away."""
        if generation < self._generation:
            return
        await self.close(generation, "the cluster's members have changed", ())
        self._members = tuple(members)
        self._broken = None

    async def close(self, generation: int, reason: str, lost: Sequence[str]) -> None:
        """End every meeting with an error, and refuse new ones until :meth:`open`."""
        if generation < self._generation:
            return
        self._generation = generation
        error = WorkspaceLostError(
            f"The collective cannot end: {reason}. Recover the cluster (cluster.recover()), then resume.",
            workspaces=list(lost),
        )
        self._broken = error
        for meeting in self._meetings.values():
            meeting.error = error
            meeting.ended.set()
        self._meetings.clear()

    async def meet(
        self, generation: int, rank: int, key: str, what: str, arrays: Sequence[Array] | None, seconds: float
    ) -> list[Array]:
        """Bring one member's arrays; return the result when all have come.

        Raises:
            ConflictError: The member belongs to an older generation of the cluster.
            DeadlineError: Somebody did not come in time.
            InvalidInputError: The members do not bring the same thing.
            WorkspaceLostError: A member is gone.
        """
        if generation != self._generation:
            raise ConflictError(
                f"A collective of generation {generation} cannot meet one of generation {self._generation}: the "
                f"cluster has been recovered in between. Restore this workspace's content first.",
                generation=generation,
            )
        if self._broken is not None:
            raise self._broken
        meeting = self._meetings.setdefault(key, _Meeting(what))
        meeting.arrays[rank] = arrays
        if what != meeting.what:
            self._end(
                key,
                InvalidInputError(
                    f"The members of a collective do not agree: {self._members[rank]!r} brings {what}, others "
                    f"{meeting.what}. All workspaces must run the same net.",
                    workspace=self._members[rank],
                ),
            )
        elif len(meeting.arrays) == len(self._members):
            self._finish(key, meeting)
        try:
            await asyncio.wait_for(meeting.ended.wait(), seconds)
        except asyncio.TimeoutError:
            missing = [name for other, name in enumerate(self._members) if other not in meeting.arrays]
            self._end(
                key,
                DeadlineError(
                    f"The collective {what} waited {seconds:g} s in vain for {', '.join(missing)}. Run the net on "
                    f"every workspace of the cluster.",
                    workspaces=missing,
                    waited_s=seconds,
                ),
            )
        if meeting.error is not None:
            raise meeting.error
        assert meeting.result is not None
        return meeting.result

    def _end(self, key: str, error: BlobspaceError) -> None:
        meeting = self._meetings.pop(key, None)
        if meeting is not None:
            meeting.error = error
            meeting.ended.set()

    def _finish(self, key: str, meeting: _Meeting) -> None:
        del self._meetings[key]
        givers = [arrays for _, arrays in sorted(meeting.arrays.items()) if arrays is not None]
        totals = [np.array(array) for array in givers[0]]
        # Overflow is the operands' business: it gives infinity here as it does in every other operator.
        with np.errstate(all="ignore"):
            for arrays in givers[1:]:
                for total, array in zip(totals, arrays, strict=True):
                    np.add(total, array, out=total)
        meeting.result = totals
        meeting.ended.set()


class RayCollectives:
    """One member's side of the meeting point.

    Args:
        meeting_point: Actor handle.
        rank: This workspace's place among the members.
        size: How many members there are.
        generation: The cluster's generation, which fences off members of an older one.
        deadline_s: How long a collective waits for the last member.
    """

    def __init__(self, meeting_point: Any, *, rank: int, size: int, generation: int, deadline_s: float) -> None:
        self._meeting_point = meeting_point
        self._rank = rank
        self._size = size
        self._generation = generation
        self._deadline_s = deadline_s
        self._iteration: int | None = None
        self._completed = 0

    @property
    def rank(self) -> int:
        """This workspace's place among the members, from 0."""
        return self._rank

    @property
    def size(self) -> int:
        """How many workspaces meet."""
        return self._size

    @property
    def completed(self) -> int:
        """How many collectives have ended since the iteration began."""
        return self._completed

    def begin_iteration(self, iteration: int) -> None:
        """Say that the collectives to come belong to this iteration, counted alike by all members."""
        self._iteration = iteration
        self._completed = 0

    def allreduce(self, arrays: Sequence[Array]) -> list[Array]:
        """Return, for each array, the sum over all members, added in the order of their ranks."""
        return self._meet(f"Allreduce of {_shapes(arrays)}", arrays)

    def broadcast(self, arrays: Sequence[Array], *, root: int) -> list[Array]:
        """Return the arrays of the member with rank ``root``.

        Raises:
            InvalidInputError: There is no such rank.
        """
        if not 0 <= root < self._size:
            raise InvalidInputError(f"Broadcast from rank {root} in a group of {self._size}; expected 0 to one less.")
        return self._meet(f"Broadcast of {_shapes(arrays)} from rank {root}", arrays if root == self._rank else None)

    def _meet(self, what: str, arrays: Sequence[Array] | None) -> list[Array]:
        if self._iteration is None:
            raise ConflictError("The cluster was recovered while this iteration was running; it cannot go on.")
        key = f"{self._iteration}.{self._completed}"
        brought = None if arrays is None else [to_host(array) for array in arrays]
        reference = self._meeting_point.meet.remote(self._generation, self._rank, key, what, brought, self._deadline_s)
        began = time.monotonic()
        try:
            # The meeting point itself keeps the deadline and names who is missing; the margin is for its death.
            result = ray.get(reference, timeout=self._deadline_s + 30.0)
        except RayError as error:
            raise unwrapped(error, f"the meeting point, after {time.monotonic() - began:.1f} s") from None
        self._completed += 1
        return result


def _shapes(arrays: Sequence[Array]) -> str:
    return ", ".join(f"{array.dtype} {tuple(array.shape)}" for array in arrays)
