"""Collectives of a workspace that is alone: it is a group of one."""

from __future__ import annotations

from collections.abc import Sequence

from ..ops.errors import InvalidInputError
from ..ops.values import Array


class SoloCollectives:
    """Meets nobody, so that a net with collectives runs unchanged in a single workspace."""

    size = 1
    rank = 0

    def __init__(self) -> None:
        self.completed = 0

    def begin_iteration(self, iteration: int) -> None:  # noqa: ARG002  (a group of one need not tell them apart)
        """Start counting the collectives of an iteration."""
        self.completed = 0

    def allreduce(self, arrays: Sequence[Array]) -> list[Array]:
        """Return the arrays: the sum over one workspace."""
        self.completed += 1
        return list(arrays)

    def broadcast(self, arrays: Sequence[Array], *, root: int) -> list[Array]:
        """Return the arrays; the only possible root is this workspace.

        Raises:
            InvalidInputError: ``root`` is another rank.
        """
        if root != 0:
            raise InvalidInputError(f"Broadcast from rank {root} in a group of 1 workspace; expected root=0.")
        self.completed += 1
        return list(arrays)
