"""The protocols of a checkpoint and of a restore, as machines without Ray, clock or disk.

A machine is told what happened and answers with actions; the coordinator (``coordinator.py``) carries them out and
reports back. Both protocols are a row of *phases*: the same call goes to every workspace, and when all have
answered the next phase begins. The first failure, loss or missed deadline turns the machine to its last phase, in
which every workspace lets go of whatever it holds.

Checkpoint (design: the barrier is phases 1 to 3; compute stands still only between *hold* and *resume*)::

    hold -> freeze -> resume -> write -> [publish: the commit] -> release

Restore (reading comes first, while compute goes on; nothing has changed before *apply*)::

    prepare -> hold -> stop -> apply -> release
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from ..ops.errors import BlobspaceError, DeadlineError, WorkspaceLostError

RELEASE_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """Call ``method(*arguments)`` on a workspace, and report the answer with ``phase``."""

    workspace: str
    phase: str
    method: str
    arguments: tuple[Any, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Publish:
    """Commit the checkpoint with these receipts, and report what became of it."""

    receipts: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finish:
    """The operation has ended; exactly one of ``result`` and ``error`` is set."""

    result: Any = None
    error: BlobspaceError | None = None


Action: TypeAlias = Call | Publish | Finish


@dataclass(slots=True, kw_only=True)
class Operation(ABC):
    """What checkpoint and restore have in common.

    Attributes:
        barrier: Names the operation towards the workspaces.
        generation: The coordinator's.
        members: The workspaces that take part, in the order of their ranks.
        deadline_s: How long the whole may take.
        now: Monotonic seconds at the start.
        last_committed: The step to go back to, for error texts.
    """

    barrier: str
    generation: int
    members: tuple[str, ...]
    deadline_s: float
    now: float
    last_committed: int | None = None
    phase: str = field(default="", init=False)
    phase_began: dict[str, float] = field(default_factory=dict[str, float], init=False)
    _answers: dict[str, Any] = field(default_factory=dict[str, Any], init=False)
    _waiting: set[str] = field(default_factory=set[str], init=False)
    _gone: set[str] = field(default_factory=set[str], init=False)
    _ends_at: float = field(default=0.0, init=False)
    _finish: Finish | None = field(default=None, init=False)

    WHAT = "operation"

    def start(self) -> list[Action]:
        """Begin."""
        self._ends_at = self.now + self.deadline_s
        return self._first()

    @property
    def is_over(self) -> bool:
        """Whether the operation has finished; it takes no more events."""
        return self.phase == "over"

    @property
    def waiting_for(self) -> list[str]:
        """The workspaces that have not answered in the present phase."""
        return sorted(self._waiting)

    def answered(self, workspace: str, phase: str, value: Any, now: float) -> list[Action]:
        """A workspace has answered a call. An answer to an earlier phase is passed over."""
        self.now = now
        if phase != self.phase or workspace not in self._waiting:
            return []
        self._waiting.discard(workspace)
        self._answers[workspace] = value
        return [] if self._waiting else self._complete()

    def failed(self, workspace: str, phase: str, error: BlobspaceError, now: float) -> list[Action]:
        """A call to a workspace has failed."""
        if phase == "release":
            return self.answered(workspace, phase, None, now)
        self.now = now
        if phase != self.phase or self.is_over:
            return []
        if isinstance(error, WorkspaceLostError):
            return self.lost(workspace, error, now)
        error.add_context(
            f"Workspace {workspace!r}, while the {self.WHAT} was to {phase}. {self._state_after_failure()}"
        )
        return self._give_up(error)

    def lost(self, workspace: str, error: BlobspaceError, now: float) -> list[Action]:
        """A workspace's process or node is gone."""
        self.now = now
        if workspace not in self.members or self.is_over:
            return []
        self._gone.add(workspace)
        if self.phase == "release":
            return self.answered(workspace, "release", None, now)
        return self._give_up(
            WorkspaceLostError(
                f"The {self.WHAT} ended because workspace {workspace!r} was lost while it was to {self.phase}. "
                f"{self._state_after_failure()} Cause: {error}",
                **{**error.fields, "workspace": workspace, "last_committed_step": self.last_committed},
            )
        )

    def tick(self, now: float) -> list[Action]:
        """Time has passed."""
        self.now = now
        if self.is_over or now < self._ends_at:
            return []
        if self.phase == "release":
            return self._over()
        return self._give_up(
            DeadlineError(
                f"The {self.WHAT} did not end within {self.deadline_s:g} s: in the phase '{self.phase}' no answer came "
                f"from {', '.join(self.waiting_for) or 'the storage'}. {self._state_after_failure()} Look at what they "
                f"run (blobspace status), or give a longer deadline.",
                workspaces=self.waiting_for,
                phase=self.phase,
                waited_s=self.deadline_s,
            )
        )

    @abstractmethod
    def _first(self) -> list[Action]:
        """Begin the first phase."""

    @abstractmethod
    def _complete(self) -> list[Action]:
        """All have answered: begin the next phase, or end."""

    @abstractmethod
    def _state_after_failure(self) -> str:
        """Say what is true now that the operation has failed; a sentence or two for the error's text."""

    def _begin(self, phase: str, *shared: Any, each: Mapping[str, Any] | None = None) -> list[Action]:
        """Call the method that is named like the phase on every member that is left."""
        self.phase = phase
        self.phase_began[phase] = self.now
        self._answers = {}
        self._waiting = set(self.members) - self._gone
        return [
            Call(
                workspace=name,
                phase=phase,
                method=phase,
                arguments=(self.generation, self.barrier, *shared, *(() if each is None else (each[name],))),
            )
            for name in self.members
            if name in self._waiting
        ]

    def _give_up(self, error: BlobspaceError) -> list[Action]:
        self._finish = Finish(error=error)
        return self._release()

    def _release(self) -> list[Action]:
        # Letting go is a courtesy to workspaces that live; one that hangs must not keep the caller waiting.
        self._ends_at = self.now + RELEASE_S
        actions = self._begin("release")
        return actions if self._waiting else self._over()

    def _over(self) -> list[Action]:
        self.phase = "over"
        self.phase_began["over"] = self.now
        assert self._finish is not None
        return [self._finish]


@dataclass(slots=True, kw_only=True)
class CheckpointOperation(Operation):
    """Barrier, write, commit.

    Attributes:
        make_writer: Given a rank, returns what the workspace writes its snapshot with.
    """

    make_writer: Callable[[int], Any]
    receipts: dict[str, Any] = field(default_factory=dict[str, Any], init=False)

    WHAT = "checkpoint"

    def _first(self) -> list[Action]:
        return self._begin("hold", self.deadline_s)

    def _complete(self) -> list[Action]:
        answers = self._answers
        match self.phase:
            case "hold":
                # Members of a collective wait for each other inside an iteration; all stop after the greatest.
                target = max(answers.values())
                return self._begin("freeze", target)
            case "freeze":
                return self._begin("resume")
            case "resume":
                return self._begin(
                    "write", each={name: self.make_writer(rank) for rank, name in enumerate(self.members)}
                )
            case "write":
                self.receipts = {name: answers[name] for name in self.members}
                self.phase = "publish"
                self.phase_began["publish"] = self.now
                return [Publish(receipts=self.receipts)]
            case _:
                return self._over()

    def published(self, result: Any, now: float) -> list[Action]:
        """The commit has succeeded. Whatever was lost meanwhile, the checkpoint is complete."""
        self.now = now
        self._finish = Finish(result=result)
        return [] if self.is_over else self._release()

    def publish_failed(self, error: BlobspaceError, now: float) -> list[Action]:
        """The commit has failed."""
        self.now = now
        return [] if self.is_over else self._give_up(error)

    def lost(self, workspace: str, error: BlobspaceError, now: float) -> list[Action]:
        """A workspace is gone; once the commit is under way that changes nothing for this checkpoint."""
        if self.phase == "publish":
            self.now = now
            self._gone.add(workspace)
            return []
        return Operation.lost(self, workspace, error, now)

    def tick(self, now: float) -> list[Action]:
        """Time has passed; a commit that is under way is waited for, since only its end says what is true."""
        if self.phase == "publish":
            self.now = now
            return []
        return Operation.tick(self, now)

    def _state_after_failure(self) -> str:
        last = "there is no earlier one" if self.last_committed is None else f"step {self.last_committed} is the newest"
        return f"Nothing of it is visible; {last}."


@dataclass(slots=True, kw_only=True)
class RestoreOperation(Operation):
    """Read everywhere, then change everywhere.

    Attributes:
        make_loader: Given a workspace's name, returns what it reads its content with.
    """

    make_loader: Callable[[str], Any]

    WHAT = "restore"

    def _first(self) -> list[Action]:
        return self._begin("prepare", each={name: self.make_loader(name) for name in self.members})

    def _complete(self) -> list[Action]:
        answers = self._answers
        match self.phase:
            case "prepare":
                return self._begin("hold", self.deadline_s)
            case "hold":
                target = max(answers.values())
                return self._begin("stop", target)
            case "stop":
                return self._begin("apply")
            case "apply":
                self._finish = Finish(result=None)
                return self._release()
            case _:
                return self._over()

    def _state_after_failure(self) -> str:
        if self.phase == "apply":
            done = sorted(set(self.members) - self._waiting)
            return f"These workspaces have been restored, the others not: {', '.join(done) or 'none'}; restore again."
        return "No workspace has been changed."
