"""Reading a checkpoint: every byte that leaves here has been checked against the manifest.

The chain of trust goes down: the manifest carries its own digest, names each index by size and hash, and each
index names each chunk by place and hash. Sizes are compared with the real files before anything is allocated.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

import numpy as np

from ...ops.dtypes import TENSOR_DTYPES, DType
from ...ops.errors import (
    BlobspaceError,
    CorruptCheckpointError,
    InternalError,
    InvalidInputError,
    MemoryLimitError,
    NotFoundError,
)
from ...ops.values import Array, Kind
from ...workspace_actors.snapshot import BlobSnapshot, WorkspaceSnapshot
from .fields import corrupt
from .format import (
    FRAME_BYTES,
    MAX_MANIFEST_BYTES,
    BlobEntry,
    Chunk,
    Index,
    Manifest,
    PackEntry,
    WorkspaceEntry,
    content_hash,
    decode_index,
    decode_manifest,
)
from .layout import MANIFEST_FOLDER, manifest_path, save_id_of, step_of
from .pack import StoredTensor, parse_header
from .store import Store
from .writer import strings_shape

Allocate: TypeAlias = Callable[[tuple[int, ...], DType], Array]
"""Gives the array that a tensor is read into: C-contiguous, writable, of this shape and dtype, contents free."""

_MAX_READERS = 8
_BATCH_BYTES = 64 * 2**20
_BATCH_READS = 4096
_T = TypeVar("_T")
_R = TypeVar("_R")


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointSummary:
    """One line of a listing.

    Attributes:
        step: The step, from the file name.
        path: Path of the manifest.
        byte_count: Bytes of its packs; 0 if the manifest cannot be read.
        blob_count: Number of its blobs; 0 if the manifest cannot be read.
        workspace_count: Number of its workspaces; 0 if the manifest cannot be read.
        save_id: The save that made it; ``""`` if the manifest cannot be read.
        created_unix_ns: When; 0 if the manifest cannot be read.
        cluster: The cluster's name; ``""`` if the manifest cannot be read.
        problem: Why the manifest cannot be read; None if it can. (Only ``verify`` looks at the data.)
    """

    step: int
    path: str
    byte_count: int
    blob_count: int
    workspace_count: int
    save_id: str
    created_unix_ns: int
    cluster: str
    problem: str | None

    @property
    def is_readable(self) -> bool:
        """Whether the manifest is whole and of a known format."""
        return self.problem is None


@dataclass(frozen=True, slots=True, kw_only=True)
class Damage:
    """One finding of :func:`verify`.

    Attributes:
        file: The damaged file.
        offset: Where in it, in bytes; 0 for the file as a whole.
        workspace: The workspace it hits; None for a pack's header.
        scope: The blob's scope; None if more than one blob is hit.
        blob: The blob; None if more than one blob is hit.
        problem: What was expected and what was found.
    """

    file: str
    offset: int
    workspace: str | None
    scope: str | None
    blob: str | None
    problem: str


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyReport:
    """What :func:`verify` found.

    Attributes:
        step: The checkpoint's step.
        blob_count: Blobs that were checked.
        checked_bytes: Bytes that were read and hashed; bytes that several blobs share count once.
        damages: Every finding; empty for a sound checkpoint.
    """

    step: int
    blob_count: int
    checked_bytes: int
    damages: tuple[Damage, ...]

    @property
    def is_sound(self) -> bool:
        """Whether every byte is what was written."""
        return not self.damages


def list_checkpoints(store: Store) -> list[CheckpointSummary]:
    """Return the committed checkpoints, steps ascending; those whose manifest is damaged too, with the problem.

    Temporary files and files with foreign names are passed over.

    Raises:
        StorageError: The folder cannot be listed.
    """
    summaries: list[CheckpointSummary] = []
    for step in _steps(store):
        try:
            summaries.append(_summary(step, read_manifest(store, step)))
        except NotFoundError:
            continue  # removed since the listing
        except BlobspaceError as error:
            summaries.append(_summary(step, None, problem=str(error)))
    return summaries


def read_manifest(store: Store, step: int | None = None) -> Manifest:
    """Return the manifest of a step, or of the newest step (None).

    A damaged newest manifest is an error, not a reason to go back silently; ``list_checkpoints`` shows the others.

    Raises:
        NotFoundError: There is none; the text says which steps there are.
        CorruptCheckpointError: It is damaged.
        InvalidInputError: A newer blobspace wrote it.
    """
    if step is None:
        steps = _steps(store)
        if not steps:
            raise NotFoundError(f"There is no checkpoint in {store.location}.", root=store.location)
        step = steps[-1]
    path = manifest_path(step)
    try:
        manifest = decode_manifest(_read_record(store, path, MAX_MANIFEST_BYTES), file=path)
    except NotFoundError:
        raise _no_such_step(store, step) from None
    if manifest.step != step:
        raise corrupt(path, field="manifest field step", expected=step, found=manifest.step)
    return manifest


def read_index(store: Store, manifest: Manifest, workspace: str) -> Index:
    """Return one workspace's index, checked against the manifest by size, hash, counts and packs.

    Raises:
        NotFoundError: The checkpoint has no such workspace; the text says which it has.
        CorruptCheckpointError: The index is missing, damaged, or not the one the manifest means.
        InvalidInputError: A newer blobspace wrote it.
    """
    entry = next((entry for entry in manifest.workspaces if entry.name == workspace), None)
    if entry is None:
        names = [entry.name for entry in manifest.workspaces]
        shown = ", ".join(repr(name) for name in names[:20]) + (f" and {len(names) - 20} more" if names[20:] else "")
        raise NotFoundError(
            f"The checkpoint of step {manifest.step} has no workspace {workspace!r}. It has {shown or 'none'}.",
            step=manifest.step,
            workspace=workspace,
        )
    return _index_of(store, manifest, entry, {pack.path: pack for pack in manifest.packs})


def load_workspace(
    store: Store,
    index: Index,
    *,
    select: Callable[[BlobEntry], bool] | None = None,
    allocate: Allocate | None = None,
) -> WorkspaceSnapshot:
    """Read a workspace back, bit by bit what was saved.

    Every chunk is verified as it is read, straight into its final array. Damage to blobs that ``select`` leaves
    out does no harm.

    Args:
        store: Where from.
        index: From :func:`read_index`.
        select: Which blobs to load (None: all); listing order is kept. Nets and state always come along.
        allocate: Where tensors go (None: ``numpy.empty``). The caller owns the arrays.

    Raises:
        CorruptCheckpointError: A pack is missing or damaged; arrays given out so far hold undefined contents.
        MemoryLimitError: There is no memory for a tensor.
        StorageError: The storage refused.
    """
    entries = [entry for entry in index.blobs if select is None or select(entry)]
    used = {chunk.pack for entry in entries for chunk in entry.chunks}
    for number in sorted(used):
        _check_pack_size(store, index.packs[number])
    targets = [_target(entry, allocate or _allocate) for entry in entries]
    reads = (
        _Read(file=index.packs[chunk.pack].path, chunk=chunk, entry=entry, target=target[begin:end])
        for entry, (target, _) in zip(entries, targets, strict=True)
        for chunk, begin, end in _extents(entry)
    )
    with _Readers() as readers:
        for _ in readers.map(lambda read: _read_chunk(store, read), reads, size=lambda read: len(read.target)):
            pass
    return WorkspaceSnapshot(
        workspace=index.workspace,
        blobs=tuple(
            _loaded(index, entry, target, array) for entry, (target, array) in zip(entries, targets, strict=True)
        ),
        nets=index.nets,
        state=index.state,
    )


def verify(store: Store, manifest: Manifest, progress: Callable[[int, int], None] | None = None) -> VerifyReport:
    """Read everything that a manifest refers to and list all damage.

    Checks each index, each chunk, and each pack's safetensors header, by its hash and by what it says of every
    blob. Reads all bytes; needs a few chunks of memory.

    Args:
        store: Where from.
        manifest: From :func:`read_manifest`.
        progress: Called with the bytes checked so far, and the bytes of all workspaces.

    Raises:
        StorageError: The storage refused; that says nothing about the checkpoint.
    """
    verification = _Verification(store, manifest, progress)
    with _Readers() as readers:
        verification.run(readers)
    return VerifyReport(
        step=manifest.step,
        blob_count=verification.blob_count,
        checked_bytes=verification.checked_bytes,
        damages=tuple(verification.damages),
    )


# --- parallel reading ------------------------------------------------------------------------------------------


class _Readers:
    """A few threads that read and hash; both release the GIL. They start with the first batch worth it."""

    def __init__(self) -> None:
        self._pool: ThreadPoolExecutor | None = None

    def __enter__(self) -> _Readers:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def map(self, work: Callable[[_T], _R], items: Iterable[_T], *, size: Callable[[_T], int]) -> Iterator[_R]:
        """Yield ``work(item)`` in order, one bounded batch at a time."""
        for batch, byte_count in _batches(items, size):
            if byte_count < _BATCH_BYTES // 16:
                # Thread hand-over would cost more than it saves.
                yield from (work(item) for item in batch)
                continue
            if self._pool is None:
                self._pool = ThreadPoolExecutor(min(_MAX_READERS, os.cpu_count() or 1), "blobspace-reader")
            yield from self._pool.map(work, batch)


def _batches(items: Iterable[_T], size: Callable[[_T], int]) -> Iterator[tuple[list[_T], int]]:
    batch: list[_T] = []
    byte_count = 0
    for item in items:
        batch.append(item)
        byte_count += size(item)
        if byte_count >= _BATCH_BYTES or len(batch) >= _BATCH_READS:
            yield batch, byte_count
            batch, byte_count = [], 0
    if batch:
        yield batch, byte_count


# --- loading ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _Read:
    file: str
    chunk: Chunk
    entry: BlobEntry
    target: memoryview


def _read_chunk(store: Store, read: _Read) -> None:
    found = _chunk_problem(store, read.file, read.chunk, read.target)
    if found is not None:
        raise corrupt(
            read.file, blob=read.entry.name, offset=read.chunk.offset, expected=_described(read.chunk), found=found
        )


def _described(chunk: Chunk) -> str:
    return f"{chunk.byte_count} bytes with hash {chunk.hash.hex()}"


def _chunk_problem(store: Store, file: str, chunk: Chunk, target: memoryview) -> str | None:
    """Read a chunk into ``target``; None if it is what was written, else what was found instead."""
    try:
        count = store.readinto(file, chunk.offset, target)
    except NotFoundError:
        return "no such file"
    if count != chunk.byte_count:
        return f"the end of the file after {count} bytes"
    digest = content_hash(target)
    return None if digest == chunk.hash else f"hash {digest.hex()}"


def _extents(entry: BlobEntry) -> Iterator[tuple[Chunk, int, int]]:
    begin = 0
    for chunk in entry.chunks:
        yield chunk, begin, begin + chunk.byte_count
        begin += chunk.byte_count


def _target(entry: BlobEntry, allocate: Allocate) -> tuple[memoryview, Array | None]:
    """Return where a blob's bytes go, and the array they make up, if it is a tensor."""
    try:
        if entry.kind is not Kind.TENSOR or entry.dtype is None:
            return memoryview(bytearray(entry.byte_count)), None
        dtype = TENSOR_DTYPES[entry.dtype]
        array: Any = allocate(entry.shape, dtype)
    except MemoryError as error:
        if isinstance(error, BlobspaceError):
            raise
        raise MemoryLimitError(
            f"Loading blob {entry.name!r} needs {entry.byte_count} bytes of memory, which this process cannot get. "
            f"Load fewer blobs at once (select=), or on a larger node.",
            blob=entry.name,
            wanted_bytes=entry.byte_count,
        ) from error
    if (
        tuple(array.shape) != entry.shape
        or array.dtype != dtype
        or not array.flags.c_contiguous
        or not array.flags.writeable
    ):
        raise InvalidInputError(
            f"allocate() gave an array of shape {array.shape} and dtype {array.dtype} for blob {entry.name!r}. "
            f"Expected a writable C-contiguous array of shape {entry.shape} and dtype {entry.dtype}.",
            blob=entry.name,
        )
    flat: Any = array.reshape(-1).view(np.uint8)
    return memoryview(flat), array


def _allocate(shape: tuple[int, ...], dtype: DType) -> Array:
    return np.empty(shape, dtype=dtype)


def _loaded(index: Index, entry: BlobEntry, target: memoryview, array: Array | None) -> BlobSnapshot:
    payload = bytes(target) if entry.kind in (Kind.STRINGS, Kind.VALUE) else None
    if entry.kind is Kind.STRINGS and payload is not None:
        try:
            shape = strings_shape(payload)
        except InternalError:
            shape = None
        if shape != entry.shape:
            file = index.packs[entry.chunks[0].pack].path
            raise corrupt(file, blob=entry.name, expected=f"string tensor of shape {entry.shape}", found=shape)
    return BlobSnapshot(
        scope=entry.scope, name=entry.name, kind=entry.kind, array=array, payload=payload, version=entry.version
    )


# --- records ---------------------------------------------------------------------------------------------------


def _steps(store: Store) -> list[int]:
    return sorted(step for step in map(step_of, store.list_files(MANIFEST_FOLDER)) if step is not None)


def _summary(step: int, manifest: Manifest | None, *, problem: str | None = None) -> CheckpointSummary:
    return CheckpointSummary(
        step=step,
        path=manifest_path(step),
        byte_count=manifest.pack_bytes if manifest else 0,
        blob_count=manifest.blob_count if manifest else 0,
        workspace_count=len(manifest.workspaces) if manifest else 0,
        save_id=manifest.save_id if manifest else "",
        created_unix_ns=manifest.created_unix_ns if manifest else 0,
        cluster=manifest.cluster if manifest else "",
        problem=problem,
    )


def _no_such_step(store: Store, step: int) -> NotFoundError:
    steps = _steps(store)
    shown = "…, " * (len(steps) > 20) + ", ".join(str(known) for known in steps[-20:])
    return NotFoundError(
        f"There is no checkpoint of step {step} in {store.location}. "
        + (f"There are steps {shown}." if steps else "There is none at all."),
        step=step,
        root=store.location,
        steps=steps[-20:],
    )


def _read_record(store: Store, path: str, limit: int) -> bytes:
    size = store.size(path)
    if not FRAME_BYTES <= size <= limit:
        raise corrupt(path, expected=f"a record of {FRAME_BYTES} to {limit} bytes", found=f"{size} bytes")
    return store.read(path, 0, size)


def _index_of(store: Store, manifest: Manifest, entry: WorkspaceEntry, packs: dict[str, PackEntry]) -> Index:
    path = entry.index_path
    try:
        size = store.size(path)
        if size != entry.index_bytes:
            raise corrupt(path, workspace=entry.name, expected=f"{entry.index_bytes} bytes", found=f"{size} bytes")
        data = store.read(path, 0, size)
    except NotFoundError:
        raise corrupt(
            path, workspace=entry.name, expected=f"an index of {entry.index_bytes} bytes", found="no such file"
        ) from None
    digest = content_hash(data)
    if digest != entry.index_hash:
        raise corrupt(
            path, workspace=entry.name, expected=f"hash {entry.index_hash.hex()}", found=f"hash {digest.hex()}"
        )
    index = decode_index(data, file=path)
    agreements: list[tuple[str, object, object]] = [
        ("workspace", entry.name, index.workspace),
        ("save_id", save_id_of(path), index.save_id),
        ("number of blobs", entry.blob_count, len(index.blobs)),
        ("sum of bytes", entry.tensor_bytes, index.tensor_bytes),
        *((f"pack {pack.path}", packs.get(pack.path), pack) for pack in index.packs),
    ]
    for field, expected, found in agreements:
        if expected != found:
            raise corrupt(
                path, field=field, expected=f"{expected}, as the manifest of step {manifest.step} says", found=found
            )
    return index


def _check_pack_size(store: Store, pack: PackEntry) -> None:
    try:
        size = store.size(pack.path)
    except NotFoundError:
        raise corrupt(pack.path, expected=f"a pack of {pack.byte_count} bytes", found="no such file") from None
    if size != pack.byte_count:
        raise corrupt(pack.path, expected=f"a pack of {pack.byte_count} bytes", found=f"{size} bytes")


# --- verifying -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _Check:
    workspace: str
    entry: BlobEntry
    file: str
    chunk: Chunk


class _Verification:
    """The state of one :func:`verify`: what was found, what was read already."""

    def __init__(self, store: Store, manifest: Manifest, progress: Callable[[int, int], None] | None) -> None:
        self._store = store
        self._manifest = manifest
        self._progress = progress
        self._packs = {pack.path: pack for pack in manifest.packs}
        self._headers: dict[str, dict[str, StoredTensor]] = {}
        # What is known of bytes that several blobs share (replicas, unchanged data), by file, place and hash.
        self._known: dict[tuple[str, Chunk], str | None] = {}
        self._passed_bytes = 0
        self.damages: list[Damage] = []
        self.blob_count = 0
        self.checked_bytes = 0

    def run(self, readers: _Readers) -> None:
        for pack in self._manifest.packs:
            self._check_header(pack)
        for entry in self._manifest.workspaces:
            try:
                index = _index_of(self._store, self._manifest, entry, self._packs)
            except (CorruptCheckpointError, InvalidInputError) as error:
                self.damages.append(_damage(entry.index_path, 0, str(error), workspace=entry.name))
                continue
            self._check_index(index, readers)

    def _check_header(self, pack: PackEntry) -> None:
        """Check a pack's size and header. The blobs in it are checked on their own, whatever comes out."""
        try:
            _check_pack_size(self._store, pack)
            header = self._store.read(pack.path, 0, pack.header_bytes)
            digest = content_hash(header)
            if digest != pack.header_hash:
                raise corrupt(pack.path, offset=0, expected=f"header hash {pack.header_hash.hex()}", found=digest.hex())
            self._headers[pack.path] = parse_header(header, byte_count=pack.byte_count, file=pack.path)
        except (CorruptCheckpointError, NotFoundError) as error:
            self.damages.append(_damage(pack.path, 0, str(error)))

    def _check_index(self, index: Index, readers: _Readers) -> None:
        for entry in index.blobs:
            self.blob_count += 1
            self._check_key(index, entry)
        checks = (
            _Check(workspace=index.workspace, entry=entry, file=index.packs[chunk.pack].path, chunk=chunk)
            for entry in index.blobs
            for chunk in entry.chunks
        )
        for check, is_new, problem in readers.map(self._check_chunk, checks, size=lambda check: check.chunk.byte_count):
            size = check.chunk.byte_count
            self.checked_bytes += size if is_new else 0
            self._passed_bytes += size
            if problem is not None:
                self._report(
                    check.workspace,
                    check.entry,
                    check.file,
                    check.chunk.offset,
                    f"expected {_described(check.chunk)}, found {problem}",
                )
            if self._progress is not None:
                self._progress(self._passed_bytes, self._manifest.tensor_bytes)

    def _check_chunk(self, check: _Check) -> tuple[_Check, bool, str | None]:
        known = (check.file, check.chunk)
        # Two threads that meet here read the same bytes twice: harmless.
        if known in self._known:
            return check, False, self._known[known]
        buffer = memoryview(bytearray(check.chunk.byte_count))
        self._known[known] = _chunk_problem(self._store, check.file, check.chunk, buffer)
        return check, True, self._known[known]

    def _check_key(self, index: Index, entry: BlobEntry) -> None:
        if not entry.key:
            return
        file = index.packs[entry.chunks[0].pack].path
        header = self._headers.get(file)
        if header is None:
            return  # reported for the pack as a whole
        begin = entry.chunks[0].offset
        expected = StoredTensor(
            dtype=str(entry.stored_dtype), shape=entry.stored_shape, begin=begin, end=begin + entry.byte_count
        )
        if header.get(entry.key) != expected:
            problem = f"the header's tensor {entry.key!r}: expected {expected}, found {header.get(entry.key)}"
            self._report(index.workspace, entry, file, begin, problem)

    def _report(self, workspace: str, entry: BlobEntry, file: str, offset: int, problem: str) -> None:
        self.damages.append(
            Damage(file=file, offset=offset, workspace=workspace, scope=entry.scope, blob=entry.name, problem=problem)
        )


def _damage(file: str, offset: int, problem: str, *, workspace: str | None = None) -> Damage:
    return Damage(file=file, offset=offset, workspace=workspace, scope=None, blob=None, problem=problem)
