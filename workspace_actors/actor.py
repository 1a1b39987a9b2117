"""The workspace as a Ray actor: a thin shell around :class:`Workspace`, with a concurrency group per kind of work.

Groups (each call of a group runs in its own threads, so one group never waits for another):

* ``compute`` (the default, 1 thread): whatever changes or reads blobs, in the order of the calls.
* ``inspect`` (2): names, specs, statistics; answers while a long net runs.
* ``control`` (2): the moves of a barrier, so that a freeze is not stuck behind queued compute, nor its end
  behind a freeze that waits.
* ``checkpoint`` (2): reading and writing packs.
* ``watch`` (1): one call that never returns; it fails when the process dies, which is how a loss is noticed.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import threading
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import ray

from .. import __version__
from ..ops.definitions import CUDA, NetDef, OperatorDef
from ..ops.errors import ConflictError, InvalidInputError, NotFoundError
from .blob import BlobSpec
from .collectives import RayCollectives
from .freezing import FrozenWorkspace, Stage
from .memory import MemoryStatistics
from .packed_names import pack_names
from .snapshot import WorkspaceSnapshot
from .workspace import Workspace

CONCURRENCY_GROUPS = {"inspect": 2, "control": 2, "checkpoint": 2, "watch": 1}
_WATCH_S = 10.0 * 365 * 86400

NamesToken: TypeAlias = tuple[int, int]
"""The cluster's generation and a names-version; equal tokens of one workspace mean equal names."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ActorOptions:
    """What a workspace actor is made with.

    Attributes:
        name: The workspace's name.
        device_type: ``"cpu"`` or ``"cuda"``.
        memory_limit_bytes: See :class:`Workspace`.
        seed: See :class:`Workspace`.
        generation: The cluster's generation; calls of an older coordinator are refused.
        meeting_point: Where collectives meet, or None.
        rank: The workspace's place among the members.
        size: How many members there are.
        collective_deadline_s: How long a collective waits for the last member.
        modules: Python modules to import first; they register a user's own operators.
    """

    name: str
    device_type: str
    memory_limit_bytes: int | None
    seed: int
    generation: int
    meeting_point: Any
    rank: int
    size: int
    collective_deadline_s: float
    modules: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ActorIdentity:
    """Where a workspace actor runs: its placement."""

    name: str
    node_id: str
    pid: int
    device_type: str
    generation: int
    code_version: str


@dataclass(slots=True)
class _Frozen:
    content: FrozenWorkspace
    is_cancelled: bool = False


class SnapshotLoader(Protocol):
    """Where a restored workspace's content comes from."""

    def load(self, allocate: Callable[..., Any]) -> WorkspaceSnapshot:
        """Read and verify everything into arrays from ``allocate(shape, dtype)``."""
        ...

    def verify(self) -> None:
        """Read and verify everything, keeping nothing."""
        ...


class WorkspaceActor:
    """One process that owns a workspace. Made by the coordinator; users hold a :class:`WorkspaceHandle`."""

    def __init__(self, options: ActorOptions) -> None:
        self._options = options  # first, since Ray asks for the repr also where the rest of this fails
        if options.device_type != CUDA:
            # Ray shows an actor that asked for no GPU all of its node's; libraries would take hold of them.
            os.environ["CUDA_VISIBLE_DEVICES"] = ""
        for module in options.modules:
            _import(module)
        self._generation = options.generation
        self._workspace = Workspace(
            options.name,
            device_type=options.device_type,
            memory_limit_bytes=options.memory_limit_bytes,
            seed=options.seed,
            collectives=_collectives(options),
        )
        self._lock = threading.Lock()
        self._frozen: dict[str, _Frozen] = {}
        self._staged: dict[str, _Staged] = {}
        self._packed: tuple[NamesToken, bytes] = ((0, 0), b"")

    def __repr__(self) -> str:
        return f"Workspace({self._options.name}, {self._options.device_type})"

    # --- compute -------------------------------------------------------------------------------------------

    def create_blob(self, child: str, name: str) -> None:
        with self._device():
            self._workspace.child(child).create_blob(name)

    def feed_blob(self, child: str, name: str, value: object, copy: bool) -> None:
        with self._device():
            self._workspace.child(child).feed_blob(name, value, copy=copy)

    def fetch_blob(self, child: str, name: str) -> Any:
        with self._device():
            return self._workspace.child(child).fetch_blob(name)

    def has_blob(self, child: str, name: str) -> bool:
        return self._workspace.child(child).has_blob(name)

    def remove_blob(self, child: str, name: str) -> None:
        with self._device():
            self._workspace.child(child).remove_blob(name)

    def reset_blob(self, child: str, name: str) -> None:
        with self._device():
            self._workspace.child(child).reset_blob(name)

    def reset(self, child: str) -> None:
        with self._device():
            self._workspace.child(child).reset()

    def run_operator(self, child: str, operator: OperatorDef) -> None:
        with self._device():
            self._workspace.child(child).run_operator(operator)

    def create_net(self, child: str, net: NetDef, overwrite: bool) -> None:
        with self._device():
            self._workspace.child(child).create_net(net, overwrite=overwrite)

    def run_net(self, child: str, name: str, iterations: int) -> None:
        with self._device():
            self._workspace.child(child).run_net(name, iterations)

    def run_net_once(self, child: str, net: NetDef) -> None:
        with self._device():
            self._workspace.child(child).run_net_once(net)

    def delete_net(self, child: str, name: str) -> None:
        self._workspace.child(child).delete_net(name)

    def create_child(self, child: str) -> None:
        self._workspace.child(child, create=True)

    def remove_child(self, child: str, name: str) -> None:
        with self._device():
            self._workspace.child(child).remove_child(name)

    def children(self, child: str) -> list[str]:
        return self._workspace.child(child).children()

    # --- inspection ----------------------------------------------------------------------------------------

    @ray.method(concurrency_group="inspect")
    def blobs(self, child: str) -> list[str]:
        return self._workspace.child(child).blobs()

    @ray.method(concurrency_group="inspect")
    def local_blobs(self, child: str) -> list[str]:
        return self._workspace.child(child).local_blobs()

    @ray.method(concurrency_group="inspect")
    def nets(self, child: str) -> list[str]:
        return self._workspace.child(child).nets()

    @ray.method(concurrency_group="inspect")
    def names_since(self, known: NamesToken | None) -> tuple[NamesToken, bytes] | None:
        """Return a token of the present names and the packed names of the workspace and its children.

        Returns:
            None if ``known`` is the present token: the caller has these names already.
        """
        # Read before the names: a change in between is then reported again, never missed.
        token = (self._generation, self._workspace.names_version)
        if token == known:
            return None
        with self._lock:
            packed_at, packed = self._packed
        if packed_at != token:
            packed = pack_names(self._workspace.family_names())
            with self._lock:
                self._packed = (token, packed)
        return token, packed

    @ray.method(concurrency_group="inspect")
    def specs(self) -> list[BlobSpec]:
        return self._workspace.specs()

    @ray.method(concurrency_group="inspect")
    def memory(self) -> MemoryStatistics:
        return self._workspace.memory()

    @ray.method(concurrency_group="inspect")
    def peek_blob(self, child: str, name: str, seconds: float) -> Any:
        with self._device():
            return self._workspace.child(child).peek_blob(name, seconds=seconds)

    @ray.method(concurrency_group="inspect")
    def identity(self) -> ActorIdentity:
        """Say where the actor runs and which code it runs."""
        return ActorIdentity(
            name=self._options.name,
            node_id=ray.get_runtime_context().get_node_id(),
            pid=os.getpid(),
            device_type=self._options.device_type,
            generation=self._generation,
            code_version=__version__,
        )

    @ray.method(concurrency_group="watch")
    def watch(self) -> None:
        """Never return. Whoever waits for it learns of the process's end at once."""
        threading.Event().wait(_WATCH_S)

    # --- control: the moves of a barrier (gate.py) ---------------------------------------------------------

    @ray.method(concurrency_group="control")
    def join(
        self, generation: int, meeting_point: Any, rank: int, size: int, barrier: str | None, seconds: float
    ) -> None:
        """Become a member of a new generation of the cluster; collectives count from 0 again.

        With a ``barrier`` the workspace is held from this moment on: work that is queued must not meet members that
        have yet to be restored.
        """
        self._fence(generation)
        self._generation = generation
        # What an older coordinator left behind: nobody will write or apply it any more.
        for old in [*self._frozen, *self._staged]:
            self._let_go(old)
        self._workspace.gate.lift()
        if barrier is not None:
            self._workspace.gate.hold(barrier, seconds=seconds)
        self._workspace.set_collectives(
            RayCollectives(
                meeting_point,
                rank=rank,
                size=size,
                generation=generation,
                deadline_s=self._options.collective_deadline_s,
            )
        )

    @ray.method(concurrency_group="control")
    def hold(self, generation: int, barrier: str, seconds: float) -> int:
        """Start nothing new; return how many collective iterations have been started."""
        self._fence(generation)
        return self._workspace.gate.hold(barrier, seconds=seconds)

    @ray.method(concurrency_group="control")
    def stop(self, generation: int, barrier: str, target: int) -> None:
        """Go on to the collective iteration ``target``, then stop."""
        self._fence(generation)
        self._workspace.gate.wait_stopped(barrier, target=target)

    @ray.method(concurrency_group="control")
    def freeze(self, generation: int, barrier: str, target: int) -> None:
        """Stop, and take a lease on everything."""
        self._fence(generation)
        self._workspace.gate.wait_stopped(barrier, target=target)
        frozen = _Frozen(self._workspace.freeze())
        with self._lock:
            self._frozen[barrier] = frozen
        if not self._workspace.gate.holds(barrier):
            # The barrier was called off meanwhile; nobody will come to release this snapshot.
            self._let_go(barrier)
            raise ConflictError(f"Barrier {barrier!r} was called off.", workspace=self._options.name)

    @ray.method(concurrency_group="control")
    def resume(self, generation: int, barrier: str) -> None:
        """Go on."""
        self._fence(generation)
        if not self._workspace.gate.resume(barrier):
            raise ConflictError(
                f"Barrier {barrier!r} held workspace {self._options.name!r} no longer: its deadline had passed.",
                workspace=self._options.name,
            )

    @ray.method(concurrency_group="control")
    def release(self, generation: int, barrier: str) -> None:
        """Let a barrier's hold, snapshot and restored content go, whatever of them there is."""
        self._fence(generation)
        self._let_go(barrier)

    def _let_go(self, barrier: str) -> None:
        self._workspace.gate.resume(barrier)
        with self._lock:
            frozen = self._frozen.pop(barrier, None)
            staged = self._staged.pop(barrier, None)
        if frozen is not None:
            frozen.is_cancelled = True
            frozen.content.lease.release()
        if staged is not None and staged.stage is not None:
            staged.stage.discard()

    # --- checkpoint input and output -----------------------------------------------------------------------

    @ray.method(concurrency_group="checkpoint")
    def write(self, generation: int, barrier: str, writer: Callable[..., Any]) -> Any:
        """Hand the frozen content to ``writer(snapshot, cancelled=…)`` and return what it returns."""
        self._fence(generation)
        with self._device():
            frozen = self._frozen_by(barrier)
            return writer(frozen.content.snapshot(), cancelled=lambda: frozen.is_cancelled)

    @ray.method(concurrency_group="checkpoint")
    def prepare(self, generation: int, barrier: str, loader: SnapshotLoader) -> bool:
        """Read and verify a checkpoint's content, without touching the workspace.

        Returns:
            Whether it is in memory. It is not where the memory limit leaves no room beside the present blobs;
            then it has been verified only, and :meth:`apply` reads it again, after dropping the present blobs.
        """
        self._fence(generation)
        with self._device():
            stage = self._workspace.stage()
            try:
                snapshot = loader.load(stage.allocate)
            except MemoryError:
                stage.discard()
                loader.verify()
                staged = _Staged(None, None, loader)
            except BaseException:
                stage.discard()
                raise
            else:
                staged = _Staged(stage, snapshot, loader)
            with self._lock:
                self._staged[barrier] = staged
            return staged.stage is not None

    @ray.method(concurrency_group="checkpoint")
    def apply(self, generation: int, barrier: str) -> None:
        """Become what :meth:`prepare` has read. The workspace is held by the barrier."""
        self._fence(generation)
        with self._lock:
            staged = self._staged.pop(barrier, None)
        if staged is None:
            raise NotFoundError(f"Workspace {self._options.name!r} has prepared nothing for barrier {barrier!r}.")
        with self._device():
            stage, snapshot = staged.stage, staged.snapshot
            if stage is None or snapshot is None:
                self._workspace.clear(is_held=True)
                stage = self._workspace.stage()
                snapshot = staged.loader.load(stage.allocate)
            self._workspace.restore(snapshot, stage, is_held=True)
            self._workspace.gate.reset_iterations()

    def _frozen_by(self, barrier: str) -> _Frozen:
        with self._lock:
            frozen = self._frozen.get(barrier)
        if frozen is None:
            raise NotFoundError(
                f"Workspace {self._options.name!r} holds no snapshot of barrier {barrier!r}.",
                workspace=self._options.name,
            )
        return frozen

    def _fence(self, generation: int) -> None:
        if generation < self._generation:
            raise ConflictError(
                f"Workspace {self._options.name!r} belongs to generation {self._generation} of its cluster; a call of "
                f"generation {generation} came from a coordinator that has been replaced.",
                workspace=self._options.name,
                generation=generation,
            )

    @contextlib.contextmanager
    def _device(self) -> Generator[None]:
        # CuPy's current device belongs to a thread, and each concurrency group has threads of its own.
        if self._options.device_type != CUDA:
            yield
            return
        with self._workspace.xp.cuda.Device(0):
            yield


@dataclass(frozen=True, slots=True)
class _Staged:
    stage: Stage | None
    snapshot: WorkspaceSnapshot | None
    loader: SnapshotLoader


def _import(module: str) -> None:
    try:
        importlib.import_module(module)
    except ImportError as error:
        raise InvalidInputError(
            f"The configured module {module!r} cannot be imported where the workspace runs: {error}. Ship it with the "
            f"job (ray job submit --working-dir .), or install it on every node.",
            module=module,
        ) from error


def _collectives(options: ActorOptions) -> RayCollectives | None:
    if options.meeting_point is None:
        return None
    return RayCollectives(
        options.meeting_point,
        rank=options.rank,
        size=options.size,
        generation=options.generation,
        deadline_s=options.collective_deadline_s,
    )
