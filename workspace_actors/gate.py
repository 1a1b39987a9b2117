"""The gate at which a workspace stops for a checkpoint: between calls, and between the iterations of a net.

All workspaces must stop at one consistent moment. A barrier goes in three moves, each a call of the coordinator:

1. ``hold``: the workspace starts nothing new, and answers how many *collective iterations* it has started. An
   iteration is collective when its net meets other workspaces (``Allreduce``).
2. ``wait_stopped(target)``: the coordinator has taken the greatest answer. A workspace behind it must go on up
   to it, because the others are waiting for it inside the collective; then it stops.
3. ``resume``: everybody has stopped and frozen; compute goes on.

A coordinator that dies in between must not stop the workspace for ever, so a hold ends by itself at its deadline.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass

from ..ops.errors import ConflictError, DeadlineError


@dataclass(slots=True)
class _Hold:
    barrier: str
    ends_at: float
    target: int | None = None
    given_up: int = 0


class Gate:
    """Lets work through, one piece at a time, and holds it while a barrier is up.

    Args:
        workspace: Its name, for error texts.
        clock: Monotonic seconds.
    """

    def __init__(self, workspace: str, clock: Callable[[], float]) -> None:
        self._workspace = workspace
        self._clock = clock
        self._changed = threading.Condition()
        self._hold: _Hold | None = None
        self._running: str | None = None
        self._collective_iterations = 0
        self._looking = 0

    @property
    def collective_iterations(self) -> int:
        """How many collective iterations have been started and not given up."""
        return self._collective_iterations

    @contextmanager
    def work(self, label: str, *, collective: bool = False) -> Generator[None]:
        """Do one piece of work between two possible stops. Blocks while a barrier holds the workspace."""
        with self._changed:
            # Who waits for a moment between two pieces of work gets the next one; iterations that follow each other
            # at once would never leave it open long enough.
            while self._is_held() or self._looking:
                self._changed.wait(None if self._hold is None else self._hold.ends_at - self._clock())
            self._running = label
            self._collective_iterations += collective
        try:
            yield
        finally:
            with self._changed:
                self._running = None
                self._changed.notify_all()

    def give_up_iteration(self, started: int) -> None:
        """Take back the start of a collective iteration that failed before its last collective had ended.

        A collective ends for all or for none, so every member takes it back, and the counts stay equal.

        Args:
            started: What the count was when the iteration had started; if it has been reset since, it stays.
        """
        with self._changed:
            if self._collective_iterations == started:
                self._collective_iterations -= 1
                if self._hold is not None:
                    # The barrier's target counts it still; nobody will run it again to get there.
                    self._hold.given_up += 1

    def reset_iterations(self) -> None:
        """Count collective iterations from 0 again, as all members do when their group is made anew."""
        with self._changed:
            self._collective_iterations = 0

    def hold(self, barrier: str, *, seconds: float) -> int:
        """Start nothing new from now on; return how many collective iterations have been started.

        Raises:
            ConflictError: Another barrier holds the workspace.
        """
        with self._changed:
            if self._hold is not None and self._hold.barrier != barrier and self._clock() < self._hold.ends_at:
                raise ConflictError(
                    f"Workspace {self._workspace!r} is held by barrier {self._hold.barrier!r}; barrier {barrier!r} "
                    f"must wait for it to end.",
                    workspace=self._workspace,
                )
            self._hold = _Hold(barrier, self._clock() + seconds)
            return self._collective_iterations

    def wait_stopped(self, barrier: str, *, target: int) -> None:
        """Let collective iterations through up to ``target``, then wait until nothing runs.

        Raises:
            ConflictError: The hold has ended, or is another barrier's.
            DeadlineError: The workspace did not stop before the hold's deadline; the hold is taken off.
        """
        with self._changed:
            hold = self._check(barrier)
            hold.target = target
            self._changed.notify_all()
            stopped = self._changed.wait_for(
                lambda: self._hold is not hold or (self._running is None and self._is_held()),
                timeout=hold.ends_at - self._clock(),
            )
            if stopped and self._hold is hold:
                return
            if self._hold is not hold and self._clock() < hold.ends_at:
                raise self._lost(barrier)
            if self._hold is hold:
                self._hold = None
                self._changed.notify_all()
            if self._running is None:
                found = (
                    f"it has started {self._collective_iterations} collective iteration(s), others {target}, and "
                    f"nobody has asked it to run the next one"
                )
            else:
                found = f"it is still in {self._running}"
            raise DeadlineError(
                f"Workspace {self._workspace!r} did not stop for barrier {barrier!r} in time: {found}. Give the "
                f"checkpoint a longer deadline, or run the net on all workspaces that meet in its collectives.",
                workspace=self._workspace,
            )

    def resume(self, barrier: str) -> bool:
        """End a hold; return whether there was one of that name."""
        with self._changed:
            if self._hold is None or self._hold.barrier != barrier:
                return False
            self._hold = None
            self._changed.notify_all()
            return True

    def lift(self) -> None:
        """End whatever hold there is; its coordinator has been replaced."""
        with self._changed:
            self._hold = None
            self._changed.notify_all()

    def holds(self, barrier: str) -> bool:
        """Whether that barrier holds the workspace still."""
        with self._changed:
            self._is_held()  # lets a hold end whose deadline has passed
            return self._hold is not None and self._hold.barrier == barrier

    @contextmanager
    def between_work(self, *, seconds: float) -> Generator[None]:
        """Keep the workspace between two pieces of work for a moment, without a barrier.

        Raises:
            DeadlineError: The piece of work that runs did not end in time.
        """
        with self._changed:
            self._looking += 1
            try:
                if not self._changed.wait_for(lambda: self._running is None, timeout=seconds):
                    raise DeadlineError(
                        f"Workspace {self._workspace!r} did not come to an iteration boundary within {seconds:g} s: it "
                        f"is in {self._running}.",
                        workspace=self._workspace,
                    )
                yield
            finally:
                self._looking -= 1
                self._changed.notify_all()

    def _is_held(self) -> bool:
        hold = self._hold
        if hold is None:
            return False
        if self._clock() >= hold.ends_at:
            self._hold = None
            return False
        return hold.target is None or self._collective_iterations + hold.given_up >= hold.target

    def _check(self, barrier: str) -> _Hold:
        if self._hold is None or self._hold.barrier != barrier:
            raise self._lost(barrier)
        return self._hold

    def _lost(self, barrier: str) -> ConflictError:
        return ConflictError(
            f"Barrier {barrier!r} holds workspace {self._workspace!r} no longer: its deadline passed, or another "
            f"coordinator ended it.",
            workspace=self._workspace,
        )
