"""The workspace: named blobs, operators and nets, children, snapshots. Knows nothing of Ray.

Thread safety: mutating calls run one at a time, in the order in which they get hold of the compute lock.
Listing, specs and statistics take only the table lock, for a moment, and so answer while a long net runs.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import xxhash

from ..ops.definitions import CPU, NetDef, OperatorDef, operator_def
from ..ops.dtypes import DType
from ..ops.errors import ConflictError, InvalidInputError, MemoryLimitError, NotFoundError
from ..ops.execution import Collectives, CompiledNet, Files, Slot, compile_operator, operator_errors
from ..ops.net import Net
from ..ops.values import Array, Kind, check_name, normalize_value
from .blob import Blob, BlobSpec, copied_plain, own_blob
from .devices import array_module, to_host
from .files import LocalFiles
from .freezing import FrozenWorkspace, Lease, Stage, generator_state, packed_payload, restorable
from .gate import Gate
from .memory import BlobAllocation, BufferPool, MemoryStatistics
from .names import check_workspace_name
from .snapshot import BlobSnapshot, WorkspaceSnapshot
from .solo import SoloCollectives

_LEASE_WAIT_S = 60.0
_LARGEST_SHOWN = 5


class _Process:
    """What a workspace shares with its children: memory, locks, the gate, the counters that others compare."""

    def __init__(
        self,
        name: str,
        *,
        device_type: str,
        memory_limit_bytes: int | None,
        collectives: Collectives | None,
        files: Files | None,
        clock: Callable[[], float],
    ) -> None:
        self.device_type = device_type
        self.xp = array_module(device_type)
        self.pool = BufferPool(self.xp, limit_bytes=memory_limit_bytes)
        self.collectives = collectives or SoloCollectives()
        self.files = files or LocalFiles()
        self.gate = Gate(name, clock)
        self.compute = threading.RLock()
        self.nesting = 0
        self.table = threading.RLock()
        self.binding_epoch = 0
        self.names_version = 1


class Workspace:
    """Named blobs, and the operators and nets that run on them; Caffe2's workspace.

    Args:
        name: Letters, digits, ``.``, ``_``, ``-``.
        device_type: ``"cpu"`` (NumPy) or ``"cuda"`` (CuPy).
        memory_limit_bytes: Greatest sum of all buffers held by blobs and snapshots, children included; None
            means no limit.
        seed: Start of the workspace's generator, together with its name.
        collectives: How operators meet other workspaces; None means that this one is alone.
        files: Where Save and Load go; None means local files.
        clock: Monotonic seconds.

    Raises:
        InvalidInputError: A name, device or limit that cannot be.

    Example:
        >>> ws = Workspace("doc")
        >>> ws.feed_blob("x", np.ones(2, np.float32))
        >>> ws.run_operator("Scale", ["x"], ["y"], scale=3.0)
        >>> ws.fetch_blob("y").tolist()
        [3.0, 3.0]
    """

    def __init__(
        self,
        name: str,
        *,
        device_type: str = CPU,
        memory_limit_bytes: int | None = None,
        seed: int = 0,
        collectives: Collectives | None = None,
        files: Files | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        check_workspace_name(name)
        if memory_limit_bytes is not None and memory_limit_bytes <= 0:
            raise InvalidInputError(f"A memory limit is a positive number of bytes; found {memory_limit_bytes}.")
        process = _Process(
            name,
            device_type=device_type,
            memory_limit_bytes=memory_limit_bytes,
            collectives=collectives,
            files=files,
            clock=clock,
        )
        self._set_up(name, path="", parent=None, process=process, seed=seed)

    def _set_up(self, name: str, *, path: str, parent: Workspace | None, process: _Process, seed: int) -> None:
        self._name = name
        self._path = path
        self._parent = parent
        self._process = process
        self._seed = seed
        self._blobs: dict[str, Blob] = {}
        self._listing: list[str] = []  # the same names, sorted when they are next listed
        self._nets: dict[str, CompiledNet] = {}
        self._children: dict[str, Workspace] = {}
        self._generator = np.random.default_rng([seed, xxhash.xxh3_64_intdigest(f"{name}:{path}".encode())])

    # --- what execution sees of a workspace (ops.execution.Environment) ------------------------------------

    @property
    def name(self) -> str:
        """The workspace's name, followed by ``:`` and the child's path in a child workspace."""
        return f"{self._name}:{self._path}" if self._path else self._name

    @property
    def device_type(self) -> str:
        """``"cpu"`` or ``"cuda"``."""
        return self._process.device_type

    @property
    def xp(self) -> Any:
        """NumPy or CuPy."""
        return self._process.xp

    @property
    def binding_epoch(self) -> int:
        """Raised whenever a buffer that a compiled net may hold has been replaced."""
        return self._process.binding_epoch

    @property
    def generator(self) -> np.random.Generator:
        """The workspace's source of random numbers; its state is part of every checkpoint."""
        return self._generator

    @property
    def collectives(self) -> Collectives:
        """How operators meet other workspaces."""
        return self._process.collectives

    @property
    def files(self) -> Files:
        """Where Save and Load go."""
        return self._process.files

    def find(self, name: str) -> Blob | None:
        """Return the blob of that name here or in the nearest ancestor, or None."""
        workspace: Workspace | None = self
        while workspace is not None:
            blob = workspace._blobs.get(name)
            if blob is not None:
                return blob
            workspace = workspace._parent
        return None

    def create(self, name: str) -> Blob:
        """Return the blob of that name, made here and uninitialised if neither this nor an ancestor has it."""
        blob = self.find(name)
        if blob is None:
            blob = Blob(check_name(name))
            self._add(blob)
        return blob

    def names(self, *, include_shared: bool) -> list[str]:
        """Return blob names in Caffe2's order: own names bytewise sorted, then the parent's, duplicates kept."""
        with self._process.table:
            # Python compares str by code point, which is the order of the UTF-8 bytes too; and it sorts what is sorted
            # but for a few names at the end in next to no time.
            self._listing.sort()
            own = self._listing.copy()
        if include_shared and self._parent is not None:
            own += self._parent.names(include_shared=True)
        return own

    def allocate(
        self, slot: Slot, shape: tuple[int, ...], dtype: DType, *, is_input: bool, operator: str
    ) -> BlobAllocation:
        """Return memory for a blob's next value: its own buffer where that may be written, else a fresh one.

        Raises:
            MemoryLimitError: The workspace's limit would be passed.
        """
        blob = own_blob(slot)
        buffer, array = blob.buffer, blob.array
        if buffer is not None and array is not None and buffer.is_writable:
            if array.shape == shape and array.dtype == dtype:
                return BlobAllocation(array, buffer, is_fresh=False)
            size_bytes = _size_bytes(shape, dtype)
            # The operator may still read its input's old shape from this buffer, so only a pure output moves in.
            if not is_input and size_bytes <= buffer.capacity <= max(4096, 2 * size_bytes):
                return BlobAllocation(self._process.pool.view(buffer, shape, dtype), buffer, is_fresh=False)
        return self._fresh(shape, dtype, wanted_by=f"operator {operator}", blob=blob.name)

    def adopt(self, slot: Slot, allocation: BlobAllocation) -> None:
        """Let a blob show an allocation; its old buffer goes back to the pool. Raises the blob's version."""
        blob = own_blob(slot)
        with self._process.table:
            if blob.array is not allocation.array:
                self._replace(blob, allocation)
            blob.version += 1

    def discard(self, allocation: BlobAllocation) -> None:
        """Give an allocation back that no blob has adopted."""
        if allocation.is_fresh:
            self._process.pool.disown(allocation.buffer)

    def store(self, slot: Slot, kind: Kind, value: Any) -> None:
        """Let a blob hold a string tensor or a plain value. Raises the blob's version."""
        blob = own_blob(slot)
        with self._process.table:
            changes_spec = blob.kind is not kind or (kind is Kind.STRINGS and blob.value.shape != value.shape)
            self._drop_buffer(blob)
            if blob.kind is not kind:
                self._process.binding_epoch += 1  # bound steps may know the kind
            blob.kind = kind
            blob.value = value
            blob.version += 1
            if changes_spec:
                self._names_changed()

    def touch(self, slots: Sequence[Slot]) -> None:
        """Raise the versions of blobs that bound steps have written."""
        for slot in slots:
            slot.version += 1  # type: ignore[attr-defined]

    # --- blobs ---------------------------------------------------------------------------------------------

    def create_blob(self, name: str) -> None:
        """Make a blob, uninitialised; one that is there already (here or in an ancestor) stays as it is."""
        with self._mutating(f"create_blob({name!r})"):
            self.create(check_name(name))

    def feed_blob(self, name: str, value: object, *, copy: bool = True) -> None:
        """Give a blob a value, whatever it held before. In a child, a parent's blob of that name changes.

        Args:
            name: Blob name.
            value: See :func:`blobspace.ops.values.normalize_value`. A tensor's element order becomes C.
            copy: Copy a tensor into memory that the workspace owns. False keeps a view of the caller's array,
                which the caller must not write to any more, until the blob is next written; it is counted as
                external memory. Ray's arrays pin its object store as long as they are kept.

        Raises:
            InvalidInputError: The name or the value cannot be; the blob is as it was.
            MemoryLimitError: No room; the blob is as it was.
        """
        check_name(name)
        kind, normal = normalize_value(name, value)
        with self._mutating(f"feed_blob({name!r})"):
            existing = self.find(name)
            blob = existing or Blob(name)
            if kind is Kind.TENSOR:
                self._feed_tensor(blob, normal, copy=copy)
            else:
                self.store(blob, kind, copied_plain(normal) if kind is Kind.VALUE else normal)
            if existing is None:
                self._add(blob)

    def _feed_tensor(self, blob: Blob, value: Array, *, copy: bool) -> None:
        xp = self._process.xp
        if xp is not np and value.dtype.kind == "V":
            raise InvalidInputError(
                f"Blob {blob.name!r} cannot hold {value.dtype.name} on CUDA: CuPy has no such element type. Feed it "
                f"to a CPU workspace, or cast it to float16 or float32 first.",
                blob=blob.name,
                found=value.dtype.name,
            )
        if not copy and isinstance(value, xp.ndarray) and value.flags.c_contiguous:
            view = value.view()
            if xp is np:
                view.flags.writeable = False
            buffer = self._process.pool.wrap(view)
            if buffer is None:
                raise self._no_room(int(value.nbytes), wanted_by="feed_blob", blob=blob.name)
            self.adopt(blob, BlobAllocation(view, buffer, is_fresh=True))
            return
        allocation = self.allocate(blob, tuple(value.shape), value.dtype, is_input=False, operator="feed_blob")
        if xp is np:
            np.copyto(allocation.array, value if isinstance(value, np.ndarray) else to_host(value))
        else:
            allocation.array[...] = xp.asarray(value)
        self.adopt(blob, allocation)

    def fetch_blob(self, name: str) -> Any:
        """Return a copy of a blob's value, as a NumPy array where it is a tensor (of host memory, also on a GPU).

        Raises:
            NotFoundError: There is no such blob, or it is uninitialised.
        """
        process = self._process
        with process.compute:
            # A restore may replace the blob meanwhile: it runs under a barrier, not under the compute lock. No step
            # can run meanwhile, so bound nets need not know of this lease.
            with process.table:
                finish = self._begin_copy(name)
            return finish()

    def peek_blob(self, name: str, *, seconds: float = 5.0) -> Any:
        """Return a copy of a blob's value while a net may be running, as of the next iteration boundary.

        Raises:
            NotFoundError: There is no such blob, or it is uninitialised.
            DeadlineError: The net did not come to the end of an iteration within ``seconds``.
        """
        with self._process.gate.between_work(seconds=seconds), self._process.table:
            finish = self._begin_copy(name)
            self._process.binding_epoch += 1
        return finish()

    def _begin_copy(self, name: str) -> Callable[[], Any]:
        """Take hold of a blob's value under the table lock; what is returned copies it, outside of that lock."""
        blob = self._initialized(name)
        array, buffer, pool = blob.array, blob.buffer, self._process.pool
        if buffer is None:
            value = blob.copied_value()
            return lambda: value
        pool.lease(buffer)

        def finish() -> Any:
            try:
                return to_host(array)
            finally:
                pool.release(buffer)

        return finish

    def has_blob(self, name: str) -> bool:
        """Whether this workspace or an ancestor has a blob of that name."""
        return self.find(name) is not None

    def remove_blob(self, name: str) -> None:
        """Remove a blob of this workspace; a parent's blobs are not touched.

        Raises:
            NotFoundError: This workspace has no such blob of its own.
        """
        with self._mutating(f"remove_blob({name!r})"), self._process.table:
            blob = self._blobs.pop(name, None)
            if blob is None:
                raise self._missing(name)
            self._listing.remove(name)
            self._drop_buffer(blob)
            self._names_changed()
            self._process.binding_epoch += 1

    def reset_blob(self, name: str) -> None:
        """Keep a blob's name and drop its value.

        Raises:
            NotFoundError: There is no such blob.
        """
        with self._mutating(f"reset_blob({name!r})"), self._process.table:
            blob = self._existing(name)
            self._drop_buffer(blob)
            self._process.binding_epoch += 1
            blob.kind = Kind.UNINITIALIZED
            blob.value = None
            blob.version += 1
            self._names_changed()

    def blobs(self) -> list[str]:
        """Return all names in Caffe2's order: own ones sorted bytewise, then the parent's, duplicates kept."""
        return self.names(include_shared=True)

    def local_blobs(self) -> list[str]:
        """Return the workspace's own names, sorted bytewise."""
        return self.names(include_shared=False)

    def reset(self) -> None:
        """Drop all blobs, nets and children of this workspace; its generator starts anew. The parent stays."""
        with self._mutating("reset"):
            self._clear()
            self._set_up(self._name, path=self._path, parent=self._parent, process=self._process, seed=self._seed)

    # --- operators and nets --------------------------------------------------------------------------------

    def run_operator(
        self,
        type: str | OperatorDef,  # noqa: A002  (Caffe2's word)
        inputs: Sequence[str] = (),
        outputs: Sequence[str] = (),
        **args: Any,
    ) -> None:
        """Run one operator once.

        Args:
            type: An operator type, or a finished :class:`OperatorDef`.
            inputs: Blob names.
            outputs: Blob names; made if they are not there.
            **args: The operator's arguments; also ``device_option`` and ``name``.

        Raises:
            BlobspaceError: It does not fit, or failed. The workspace goes on, and the inputs are intact, except that
                a step which fails midway may have begun to overwrite what it writes in place.
        """
        operator = operator_def(type, inputs, outputs, **args)
        compiled = compile_operator(operator, self.device_type)
        is_collective = compiled.implementation.is_collective
        with (
            self._process.compute,
            self._iteration(f"operator {operator}", collective_count=int(is_collective)),
            operator_errors(compiled, f"workspace {self.name!r}"),
        ):
            compiled.run(self)

    def create_net(self, net: Net | NetDef, *, overwrite: bool = False) -> None:
        """Compile a net and keep it under its name; its output blobs are created.

        Raises:
            ConflictError: There is a net of that name and ``overwrite`` is False.
            InvalidInputError: The net cannot run here; all faults are listed, and nothing has changed.
        """
        definition = net.definition() if isinstance(net, Net) else net
        with self._mutating(f"create_net({definition.name!r})"):
            if definition.name in self._nets and not overwrite:
                raise ConflictError(
                    f"Workspace {self.name!r} has a net {definition.name!r} already; overwrite=True replaces it.",
                    net=definition.name,
                    workspace=self.name,
                )
            self._nets[definition.name] = CompiledNet(definition, self)

    def run_net(self, name: str, iterations: int = 1) -> None:
        """Run a net that has been created, ``iterations`` times. A checkpoint may stop it between two iterations.

        Raises:
            NotFoundError: There is no such net.
            BlobspaceError: An operator failed; the text says which, where and in which iteration.
        """
        if isinstance(iterations, bool) or not isinstance(iterations, int) or iterations < 0:
            raise InvalidInputError(f"iterations must be an integer of at least 0; found {iterations!r}.")
        with self._process.compute:
            net = self._nets.get(name)
            if net is None:
                raise NotFoundError(
                    f"Workspace {self.name!r} has no net {name!r}. It has: {', '.join(sorted(self._nets)) or 'none'}.",
                    net=name,
                    workspace=self.name,
                )
            self._iterate(net, iterations)

    def run_net_once(self, net: Net | NetDef) -> None:
        """Compile a net, run it once, and forget it; its blobs stay."""
        definition = net.definition() if isinstance(net, Net) else net
        with self._process.compute:
            with self._process.gate.work(f"create net {definition.name!r}"):
                compiled = CompiledNet(definition, self)
            self._iterate(compiled, 1)

    def _iterate(self, net: CompiledNet, iterations: int) -> None:
        label = f"net {net.net.name!r}"
        for iteration in range(iterations):
            with self._iteration(label, collective_count=net.collective_count):
                net.run_iteration(iteration)

    @contextmanager
    def _iteration(self, label: str, *, collective_count: int) -> Generator[None]:
        gate, collectives = self._process.gate, self._process.collectives
        with gate.work(label, collective=collective_count > 0):
            if not collective_count:
                yield
                return
            started = gate.collective_iterations
            collectives.begin_iteration(started)
            try:
                yield
            except BaseException:
                if collectives.completed < collective_count:
                    gate.give_up_iteration(started)
                raise

    def delete_net(self, name: str) -> None:
        """Forget a net; its blobs stay.

        Raises:
            NotFoundError: There is no such net.
        """
        with self._mutating(f"delete_net({name!r})"):
            if self._nets.pop(name, None) is None:
                raise NotFoundError(f"Workspace {self.name!r} has no net {name!r}.", net=name, workspace=self.name)

    def nets(self) -> list[str]:
        """Return the names of the created nets, sorted."""
        return sorted(self._nets)

    # --- children ------------------------------------------------------------------------------------------

    def child(self, path: str, *, create: bool = False) -> Workspace:
        """Return a child workspace, which reads and writes this one's blobs and adds its own.

        Args:
            path: The child's name; ``"a/b"`` is the child ``b`` of the child ``a``. ``""`` is this workspace.
            create: Make what is missing.

        Raises:
            NotFoundError: There is no such child and ``create`` is False.
        """
        if create:
            with self._mutating(f"child({path!r})"):
                return self._made_child(path)
        workspace = self
        for part in path.split("/") if path else ():
            found = workspace._children.get(part)
            if found is None:
                raise NotFoundError(
                    f"Workspace {workspace.name!r} has no child {part!r}. It has: "
                    f"{', '.join(sorted(workspace._children)) or 'none'}.",
                    workspace=workspace.name,
                    child=part,
                )
            workspace = found
        return workspace

    def _made_child(self, path: str, known: Mapping[str, Workspace] | None = None) -> Workspace:
        parts = [check_workspace_name(part) for part in path.split("/")] if path else []
        workspace = self
        for part in parts:
            child = workspace._children.get(part)
            if child is None:
                inner = f"{workspace._path}/{part}" if workspace._path else part
                child = (known or {}).get(inner) or Workspace.__new__(Workspace)
                child._set_up(self._name, path=inner, parent=workspace, process=self._process, seed=self._seed)
                with self._process.table:
                    workspace._children[part] = child
                    self._names_changed()
            workspace = child
        return workspace

    def children(self) -> list[str]:
        """Return the names of the child workspaces, sorted."""
        return sorted(self._children)

    def remove_child(self, name: str) -> None:
        """Remove a child workspace with its blobs, nets and children; this workspace's blobs stay.

        Args:
            name: The child's name, or the path of a child's child.

        Raises:
            NotFoundError: There is no such child.
        """
        with self._mutating(f"remove_child({name!r})"):
            child = self.child(name)
            parent = child._parent
            if child is self or parent is None:
                raise NotFoundError(f"Workspace {self.name!r} is no child of itself.", workspace=self.name, child=name)
            with self._process.table:
                child._clear()
                del parent._children[name.rpartition("/")[2]]

    def _family(self) -> Iterator[Workspace]:
        yield self
        for name in sorted(self._children):
            yield from self._children[name]._family()

    # --- inspection ----------------------------------------------------------------------------------------

    @property
    def names_version(self) -> int:
        """Raised when the set of names or a spec changes, here, in a child or in an ancestor."""
        return self._process.names_version

    def family_names(self) -> dict[str, list[str]]:
        """Return the own names, sorted, of this workspace (path ``""``) and of each child, by its path."""
        with self._process.table:
            return {workspace._path: workspace.local_blobs() for workspace in self._family()}

    def specs(self) -> list[BlobSpec]:
        """Return the specs of the blobs of this workspace and its children, sorted by workspace and name."""
        with self._process.table:
            return sorted(
                (blob.spec(workspace.name) for workspace in self._family() for blob in workspace._blobs.values()),
                key=lambda spec: (spec.workspace, spec.name),
            )

    def memory(self) -> MemoryStatistics:
        """Return the bytes of this workspace and everything that shares its process."""
        return self._process.pool.statistics()

    @property
    def gate(self) -> Gate:
        """Where the workspace stops for a checkpoint."""
        return self._process.gate

    def set_collectives(self, collectives: Collectives) -> None:
        """Meet others from now on through ``collectives``; collective iterations count from 0 again.

        Call it while nothing runs, or while what runs has been ended by the old collectives.
        """
        self._process.collectives = collectives
        self._process.gate.reset_iterations()

    # --- snapshots -----------------------------------------------------------------------------------------

    def freeze(self) -> FrozenWorkspace:
        """Take a lease on everything this workspace and its children hold; nothing is copied.

        Call it between two pieces of work: at the gate, or where nothing runs. Afterwards the workspace goes on;
        a blob that is written while the lease lasts moves to a fresh buffer first.
        """
        with self._process.table:
            frozen = [
                (workspace._path, blob.name, blob.kind, blob.array, blob.value, blob.version)
                for workspace in self._family()
                for blob in sorted(workspace._blobs.values(), key=lambda blob: blob.name)
            ]
            buffers = [
                blob.buffer
                for workspace in self._family()
                for blob in workspace._blobs.values()
                if blob.buffer is not None
            ]
            for buffer in buffers:
                self._process.pool.lease(buffer)
            self._process.binding_epoch += 1
            nets = tuple(
                (workspace._path, compiled.net) for workspace in self._family() for compiled in workspace._nets.values()
            )
            state = {
                "generators": {workspace._path: generator_state(workspace._generator) for workspace in self._family()},
                "seed": self._seed,
            }

        def snapshot() -> WorkspaceSnapshot:
            return WorkspaceSnapshot(
                workspace=self._name,
                blobs=tuple(
                    BlobSnapshot(
                        scope=scope,
                        name=name,
                        kind=kind,
                        array=array,
                        payload=packed_payload(kind, value),
                        version=version,
                    )
                    for scope, name, kind, array, value, version in frozen
                ),
                nets=tuple({"scope": scope, "net": net.to_plain()} for scope, net in nets),
                state=state,
            )

        return FrozenWorkspace(Lease(self._process.pool, buffers), snapshot)

    def stage(self) -> Stage:
        """Return a place to read a snapshot's arrays into before they replace what the workspace holds."""
        return Stage(self.xp, self._process.pool, self._fresh)

    def restore(self, snapshot: WorkspaceSnapshot, stage: Stage, *, is_held: bool = False) -> None:
        """Become what a snapshot says: blobs, nets, children, generators. What was there before is dropped.

        Args:
            snapshot: Its arrays must come from ``stage.allocate``.
            stage: Used up afterwards.
            is_held: A barrier has stopped the workspace, so nothing runs; work that waits at the gate runs
                afterwards, on the restored content.

        Raises:
            InvalidInputError: The snapshot's nets or values do not fit this workspace; nothing has changed.
        """
        content = restorable(snapshot, stage)
        for _, net in content.nets:
            for operator in net.operators:
                compile_operator(operator, self.device_type)
        with nullcontext() if is_held else self._mutating("restore"), self._process.table:
            # A child that comes back is the same object, so that work which waits at the gate finds its new content.
            known = {workspace._path: workspace for workspace in self._family()}
            self._clear()
            for path, generator in content.generators.items():
                self._made_child(path, known)._generator = generator
            for blob, value in content.blobs:
                self._made_child(blob.scope, known)._put(blob, value, stage)
            for path, net in content.nets:
                workspace = self._made_child(path, known)
                workspace._nets[net.name] = CompiledNet(net, workspace, is_restored=True)
        stage.discard()

    def _put(self, blob: BlobSnapshot, value: Any, stage: Stage) -> None:
        restored = Blob(blob.name)
        self._add(restored)
        if blob.array is not None:
            self.adopt(restored, stage.take(blob.array))
        elif blob.kind is not Kind.UNINITIALIZED:
            self.store(restored, blob.kind, value)
        restored.version = blob.version

    def clear(self, *, is_held: bool = False) -> None:
        """Drop all blobs, nets and children, so that their memory can be used to restore into."""
        with nullcontext() if is_held else self._mutating("clear"):
            self._clear()

    # --- inside --------------------------------------------------------------------------------------------

    @contextmanager
    def _mutating(self, label: str) -> Generator[None]:
        process = self._process
        with process.compute:
            process.nesting += 1
            try:
                # A mutating call inside another one (a child made during restore) belongs to the same piece of
                # work, and must not go through the gate a second time.
                if process.nesting > 1:
                    yield
                else:
                    with process.gate.work(label):
                        yield
            finally:
                process.nesting -= 1

    def _fresh(self, shape: tuple[int, ...], dtype: DType, *, wanted_by: str, blob: str) -> BlobAllocation:
        size_bytes = _size_bytes(shape, dtype)
        buffer = self._process.pool.take(size_bytes, wait_s=_LEASE_WAIT_S)
        if buffer is None:
            raise self._no_room(size_bytes, wanted_by=wanted_by, blob=blob)
        return BlobAllocation(self._process.pool.view(buffer, shape, dtype), buffer, is_fresh=True)

    def _no_room(self, size_bytes: int, *, wanted_by: str, blob: str) -> MemoryLimitError:
        memory = self.memory()
        specs = sorted(self.specs(), key=lambda spec: -spec.nbytes)[:_LARGEST_SHOWN]
        largest = ", ".join(f"{spec.name!r} {spec.nbytes:,}" for spec in specs if spec.nbytes) or "none"
        return MemoryLimitError(
            f"Workspace {self.name!r} has no room: {wanted_by} wanted {size_bytes:,} bytes for blob {blob!r}; "
            f"{memory.used_bytes:,} of {memory.limit_bytes or 0:,} bytes are in use ({memory.retained_bytes:,} of them "
            f"by snapshots alone). The largest blobs: {largest}. Remove blobs, or raise the workspace's memory limit.",
            workspace=self.name,
            blob=blob,
            wanted_bytes=size_bytes,
            used_bytes=memory.used_bytes,
            limit_bytes=memory.limit_bytes,
            largest={spec.name: spec.nbytes for spec in specs},
        )

    def _replace(self, blob: Blob, allocation: BlobAllocation) -> None:
        old = blob.array
        if blob.buffer is not None and blob.buffer is not allocation.buffer:
            self._process.pool.disown(blob.buffer)
        changes_spec = old is None or old.shape != allocation.array.shape or old.dtype != allocation.array.dtype
        blob.kind = Kind.TENSOR
        blob.value = None
        blob.array = allocation.array
        blob.buffer = allocation.buffer
        allocation.buffer.array = allocation.array
        self._process.binding_epoch += 1
        if changes_spec:
            self._names_changed()

    def _drop_buffer(self, blob: Blob) -> None:
        if blob.buffer is not None:
            self._process.pool.disown(blob.buffer)
            blob.buffer = None
            blob.array = None
            self._process.binding_epoch += 1

    def _clear(self) -> None:
        with self._process.table:
            for workspace in list(self._family()):
                for blob in workspace._blobs.values():
                    self._drop_buffer(blob)
                workspace._blobs = {}
                workspace._listing = []
                workspace._nets = {}
                workspace._children = {}
            self._names_changed()
            self._process.binding_epoch += 1

    def _add(self, blob: Blob) -> None:
        with self._process.table:
            self._blobs[blob.name] = blob
            self._listing.append(blob.name)
            self._names_changed()

    def _names_changed(self) -> None:
        self._process.names_version += 1

    def _existing(self, name: str) -> Blob:
        blob = self.find(name)
        if blob is None:
            raise self._missing(name)
        return blob

    def _initialized(self, name: str) -> Blob:
        blob = self._existing(name)
        if blob.kind is Kind.UNINITIALIZED:
            raise NotFoundError(
                f"Blob {name!r} of workspace {self.name!r} is uninitialized: it was created and never written.",
                blob=name,
                workspace=self.name,
            )
        return blob

    def _missing(self, name: str) -> NotFoundError:
        with self._process.table:
            near = [known for known in sorted(self._blobs) if str(name).lower() in known.lower()][:3]
        hint = f" Names like it: {', '.join(map(repr, near))}." if near else ""
        return NotFoundError(
            f"Workspace {self.name!r} has no blob {name!r:.120}.{hint}", blob=str(name)[:120], workspace=self.name
        )

    def __repr__(self) -> str:
        return f"Workspace({self.name!r}, {self.device_type}, {len(self._blobs)} blobs)"


def _size_bytes(shape: tuple[int, ...], dtype: DType) -> int:
    count = 1
    for size in shape:
        count *= size
    return count * dtype.itemsize
