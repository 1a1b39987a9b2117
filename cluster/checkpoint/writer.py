"""Writing a checkpoint: each workspace writes its packs and index, then one manifest commits them all.

The order is the promise (FORMAT.md, "Write order"): packs, then index, then, when every workspace has reported,
the manifest. Each is durable before the next begins. **The manifest's appearance is the commit**: before it, no
reader sees anything of the save; from it on, everything that it refers to is there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, cast

import msgpack  # pyright: ignore[reportMissingTypeStubs]

from ...ops.errors import BlobspaceError, ConflictError, InternalError, NotFoundError, StorageError
from ...ops.values import Kind
from ...workspace_actors.snapshot import BlobSnapshot, WorkspaceSnapshot
from .fields import MAX_DIMENSIONS
from .format import (
    BlobEntry,
    Chunk,
    Index,
    Manifest,
    PackEntry,
    WorkspaceEntry,
    content_hash,
    encode_index,
    encode_manifest,
)
from .layout import index_path, manifest_path, pack_path, writer_of
from .pack import (
    PACK_TARGET_BYTES,
    PackPlan,
    check_cancelled,
    pack_buffers,
    plan_packs,
    stored_bytes,
    stored_dtype,
)
from .store import Store


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkspaceReceipt:
    """What a workspace reports when all its files are durable: all that the manifest needs of it.

    Attributes:
        workspace: Its name.
        index_path: Path of its index.
        index_bytes: Size of that file.
        index_hash: XXH3-128 of that file.
        packs: The packs that its index refers to.
        blob_count: Number of its blobs, uninitialized ones included.
        tensor_bytes: Bytes of all its blobs.
    """

    workspace: str
    index_path: str
    index_bytes: int
    index_hash: bytes
    packs: tuple[PackEntry, ...]
    blob_count: int
    tensor_bytes: int


def write_workspace(
    store: Store,
    *,
    save_id: str,
    ordinal: int,
    snapshot: WorkspaceSnapshot,
    pack_target_bytes: int = PACK_TARGET_BYTES,
    progress: Callable[[int, int], None] | None = None,
    cancelled: Callable[[], bool] | None = None,
) -> WorkspaceReceipt:
    """Write one workspace's packs and index. Nothing is visible to readers until :func:`commit`.

    After success all files are durable. After an error, packs that were complete may remain below
    ``data/<save id>``; no manifest refers to them.

    Args:
        store: Where to.
        save_id: The save's id, one that no save of this root has had.
        ordinal: The workspace's number in this save; file names come from it.
        snapshot: What to write; its arrays are only read.
        pack_target_bytes: A pack is closed before it grows past this (default 1 GiB); a larger blob is a pack of
            its own.
        progress: Called after each chunk with the bytes handed to the store so far, and the bytes in all.
        cancelled: Asked before each chunk and before the index.

    Raises:
        ConflictError: The save was cancelled, or this save id and ordinal were used before.
        InvalidInputError: A bound of the format is passed.
        StorageError: The storage refused.
    """
    is_cancelled = cancelled or _never
    plans = plan_packs(snapshot.blobs, target_bytes=pack_target_bytes)
    done, total = 0, sum(stored_bytes(blob) for blob in snapshot.blobs)

    def advance(byte_count: int) -> None:
        nonlocal done
        done += byte_count
        if progress is not None:
            progress(done, total)

    chunks: dict[int, list[Chunk]] = {}
    packs: list[PackEntry] = []
    for number, plan in enumerate(plans):
        check_cancelled(is_cancelled)
        path = pack_path(save_id, ordinal, number)
        buffers = pack_buffers(plan, pack=number, chunks=chunks, advance=advance, cancelled=is_cancelled)
        packs.append(_written_pack(path, plan, store.write(path, buffers)))
    check_cancelled(is_cancelled)

    keys = {placed.position: placed.key for plan in plans for placed in plan.blobs}
    index = Index(
        workspace=snapshot.workspace,
        save_id=save_id,
        packs=tuple(packs),
        blobs=tuple(
            _entry(blob, keys.get(position, ""), chunks.get(position, ()))
            for position, blob in enumerate(snapshot.blobs)
        ),
        nets=snapshot.nets,
        state=snapshot.state,
    )
    data = encode_index(index)
    path = index_path(save_id, ordinal)
    store.write(path, (data,))
    return WorkspaceReceipt(
        workspace=index.workspace,
        index_path=path,
        index_bytes=len(data),
        index_hash=content_hash(data),
        packs=index.packs,
        blob_count=len(index.blobs),
        tensor_bytes=index.tensor_bytes,
    )


def make_manifest(
    *,
    step: int,
    save_id: str,
    created_unix_ns: int,
    cluster: str,
    generation: int,
    blobspace_version: str,
    metadata: Mapping[str, Any],
    receipts: Iterable[WorkspaceReceipt],
    nodes: Mapping[str, str],
) -> Manifest:
    """Assemble the manifest of a save from its writers' receipts.

    Args:
        step: The step.
        save_id: The save's id.
        created_unix_ns: The time, in nanoseconds since 1970 (UTC).
        cluster: The cluster's name.
        generation: The coordinator's generation.
        blobspace_version: The library's version.
        metadata: The user's plain values.
        receipts: One of each workspace, in the order in which the checkpoint lists them.
        nodes: The node of each workspace, by the workspace's name.

    Raises:
        InvalidInputError: A value is out of its bounds, or a workspace is there twice.
    """
    receipts = tuple(receipts)
    packs: dict[str, PackEntry] = {}
    for receipt in receipts:
        for pack in receipt.packs:
            if packs.setdefault(pack.path, pack) != pack:
                raise InternalError(
                    f"Two workspaces disagree on the pack {pack.path}: {packs[pack.path]} and {pack}.", path=pack.path
                )
    return Manifest(
        step=step,
        save_id=save_id,
        created_unix_ns=created_unix_ns,
        cluster=cluster,
        generation=generation,
        blobspace_version=blobspace_version,
        metadata=dict(metadata),
        workspaces=tuple(
            WorkspaceEntry(
                name=receipt.workspace,
                node=nodes.get(receipt.workspace, ""),
                index_path=receipt.index_path,
                index_bytes=receipt.index_bytes,
                index_hash=receipt.index_hash,
                blob_count=receipt.blob_count,
                tensor_bytes=receipt.tensor_bytes,
            )
            for receipt in receipts
        ),
        packs=tuple(packs.values()),
    )


def commit(store: Store, manifest: Manifest, *, replace: bool = False) -> str:
    """Publish a manifest: this is the commit. Returns its path.

    After success the checkpoint is complete and durable. After an error, the checkpoint that was at this step, if
    any, is untouched, with one exception: after a ``StorageError`` from the publishing itself the new manifest may
    be there, complete. Calling again with the same manifest is safe in every case.

    Args:
        store: The store that the writers wrote to, as this process sees it.
        manifest: What to commit.
        replace: Whether a checkpoint that exists at this step may be replaced. It stays valid until then; its
            data are not removed.

    Raises:
        ConflictError: The step has a checkpoint and ``replace`` is False, or another saver was first.
        StorageError: An index or a pack is not there as reported, or the storage refused.
    """
    path = manifest_path(manifest.step)
    data = encode_manifest(manifest)
    _check_complete(store, manifest)
    # ---- commit point: before the next call readers see the old state, after it the new one --------------------
    if replace:
        store.replace(path, data)
        return path
    try:
        store.put_if_absent(path, data)
    except ConflictError as error:
        if _holds(store, path, data):
            return path
        raise _taken(store, manifest.step, f" ({error.message})") from error
    return path


def refuse_existing(store: Store, step: int) -> None:
    """Raise if a step has a checkpoint; asked before a save, so that a save which must fail does not begin.

    Only :func:`commit` decides: another saver may come in between.

    Raises:
        ConflictError: The step has a checkpoint, whole or damaged.
    """
    with suppress(NotFoundError):
        store.size(manifest_path(step))
        raise _taken(store, step)


def _taken(store: Store, step: int, cause: str = "") -> ConflictError:
    path = manifest_path(step)
    return ConflictError(
        f"Step {step} has a checkpoint already in {store.location} ({path}); it is untouched. Save under another "
        f"step, or pass replace=True to replace it.{cause}",
        step=step,
        path=path,
    )


def _check_complete(store: Store, manifest: Manifest) -> None:
    by_writer = {writer_of(workspace.index_path): workspace for workspace in manifest.workspaces}
    for workspace in manifest.workspaces:
        _check_there(store, workspace.index_path, workspace.index_bytes, workspace)
    for pack in manifest.packs:
        _check_there(store, pack.path, pack.byte_count, by_writer.get(writer_of(pack.path)))


def _check_there(store: Store, path: str, byte_count: int, owner: WorkspaceEntry | None) -> None:
    whose = f"workspace {owner.name!r} on node {owner.node!r}" if owner else "an earlier save"
    try:
        found = store.size(path)
    except NotFoundError:
        found = None
    if found == byte_count:
        return
    seen = "is not there" if found is None else f"has {found} bytes there"
    raise StorageError(
        f"{path} of {whose}, {byte_count} bytes when it was written, {seen} as seen from the coordinator in "
        f"{store.location}: the root is probably not shared between the nodes. Choose a root that every node mounts. "
        f"Nothing was committed.",
        path=path,
        workspace=owner.name if owner else None,
        node=owner.node if owner else None,
        expected_bytes=byte_count,
        found_bytes=found,
    )


def _holds(store: Store, path: str, data: bytes) -> bool:
    """Whether the manifest there is this very one: a try of ours succeeded and its answer was lost."""
    try:
        return store.size(path) == len(data) and store.read(path) == data
    except BlobspaceError:
        return False


def _written_pack(path: str, plan: PackPlan, byte_count: int) -> PackEntry:
    if byte_count != plan.byte_count:
        raise InternalError(f"{path} has {byte_count} bytes; {plan.byte_count} were planned.", path=path)
    return PackEntry(
        path=path, byte_count=byte_count, header_bytes=len(plan.header), header_hash=content_hash(plan.header)
    )


def _entry(blob: BlobSnapshot, key: str, chunks: Sequence[Chunk]) -> BlobEntry:
    dtype: str | None = None
    shape: tuple[int, ...] = ()
    if blob.kind is Kind.TENSOR and blob.array is not None:
        array: Any = blob.array
        dtype = str(array.dtype.name)
        shape = tuple(int(size) for size in array.shape)
    elif blob.kind is Kind.STRINGS and blob.payload is not None:
        shape = strings_shape(blob.payload)
    return BlobEntry(
        scope=blob.scope,
        name=blob.name,
        kind=blob.kind,
        dtype=dtype,
        stored_dtype=None if blob.kind is Kind.UNINITIALIZED else stored_dtype(blob),
        shape=shape,
        version=blob.version,
        key=key,
        byte_count=stored_bytes(blob),
        chunks=tuple(chunks),
    )


def strings_shape(payload: bytes) -> tuple[int, ...]:
    """Return a packed string tensor's shape from its first bytes, without decoding the strings."""
    head = cast("Any", msgpack.Unpacker(strict_map_key=False))  # pyright: ignore[reportUnknownMemberType]
    # 64 sizes of at most 9 bytes, and two array headers.
    head.feed(payload[: MAX_DIMENSIONS * 9 + 16])
    try:
        if head.read_array_header() == 2:
            sizes: list[object] = [head.unpack() for _ in range(head.read_array_header())]
            if all(type(size) is int for size in sizes):
                return tuple(sizes)  # type: ignore[reportReturnType]
    except (ValueError, msgpack.exceptions.UnpackException):
        pass
    raise InternalError("A string tensor's payload does not begin with its shape.")


def _never() -> bool:
    return False
