"""Packs: the files of tensor bytes, which are valid safetensors files that any tool can open.

A pack is planned first, from sizes alone, so that its header can be written before its data; then it is streamed
in 16 MiB chunks, each hashed in the pass that writes it. Nothing is ever copied as a whole.

Source: the safetensors format, https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard, cast

import numpy as np

from ...ops.errors import ConflictError, InternalError, InvalidInputError
from ...ops.values import Kind
from ...workspace_actors.snapshot import BlobSnapshot
from .fields import corrupt
from .format import CHUNK_BYTES, FORMAT_VERSION, STORED_DTYPES, Chunk, content_hash, stored_item_bytes

PACK_TARGET_BYTES = 2**30
DATA_ALIGNMENT_BYTES = 64
_METADATA_KEY = "__metadata__"
_LENGTH = struct.Struct("<Q")

# Far below what the safetensors library accepts (100 MB), and little enough to parse quickly.
_HEADER_TARGET_BYTES = 16 * 2**20
_HEADER_ENTRY_BYTES = 120


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """One tensor of a pack, as its safetensors header has it.

    Attributes:
        dtype: safetensors type name.
        shape: Shape in elements of that type.
        begin: Where its bytes begin, from the start of the file.
        end: Where they end.
    """

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedBlob:
    """A blob with its place in a pack.

    Attributes:
        position: Its position in the snapshot.
        blob: The blob.
        key: Its tensor's name in the pack.
        tensor: Type, shape and place.
    """

    position: int
    blob: BlobSnapshot
    key: str
    tensor: StoredTensor


@dataclass(frozen=True, slots=True, kw_only=True)
class PackPlan:
    """A pack before it is written.

    Attributes:
        blobs: What lies in it, in file order.
        header: The file's first bytes: length field, JSON, padding.
        byte_count: Size of the whole file.
    """

    blobs: tuple[PlannedBlob, ...]
    header: bytes
    byte_count: int


def plan_packs(blobs: Sequence[BlobSnapshot], *, target_bytes: int = PACK_TARGET_BYTES) -> list[PackPlan]:
    """Distribute a snapshot's blobs over packs. Blobs without bytes get no place.

    Listing order decides which blobs share a pack; within a pack, larger items come first, so that every tensor is
    aligned to its item size without holes, which safetensors forbids.

    Args:
        blobs: The snapshot's blobs.
        target_bytes: A pack is closed before it would grow past this; one larger blob is a pack of its own.

    Raises:
        InvalidInputError: The target is not positive.
    """
    if target_bytes < 1:
        raise InvalidInputError(f"A pack target is at least 1 byte; found {target_bytes}.", found=target_bytes)
    # The name of the header's own entry can be no tensor's.
    taken = {_METADATA_KEY}
    groups: list[list[tuple[int, BlobSnapshot, str]]] = []
    data_bytes = header_bytes = 0
    for position, blob in enumerate(blobs):
        size = stored_bytes(blob)
        if size == 0:
            continue
        key = _free_key(blob, taken)
        entry_bytes = _HEADER_ENTRY_BYTES + len(json.dumps(key)) + 20 * len(stored_shape(blob))
        if not groups or data_bytes + size > target_bytes or header_bytes + entry_bytes > _HEADER_TARGET_BYTES:
            groups.append([])
            data_bytes = header_bytes = 0
        groups[-1].append((position, blob, key))
        data_bytes += size
        header_bytes += entry_bytes
    return [_plan(group) for group in groups]


def stored_dtype(blob: BlobSnapshot) -> str:
    """Return the safetensors type of a tensor, string tensor or plain value."""
    if blob.kind is not Kind.TENSOR:
        return "U8"
    return STORED_DTYPES[_array(blob).dtype.name]


def stored_shape(blob: BlobSnapshot) -> tuple[int, ...]:
    """Return the shape of a blob in a pack, in elements of its stored type."""
    if blob.kind is not Kind.TENSOR:
        return (stored_bytes(blob),)
    array = _array(blob)
    shape = tuple(int(size) for size in array.shape)
    return (*shape, 2) if array.dtype.kind == "c" else shape


def stored_bytes(blob: BlobSnapshot) -> int:
    """Return the bytes that a blob takes in a pack."""
    if blob.kind is Kind.UNINITIALIZED:
        return 0
    if blob.kind is Kind.TENSOR:
        return int(_array(blob).nbytes)
    return len(_payload(blob))


def pack_buffers(
    plan: PackPlan,
    *,
    pack: int,
    chunks: dict[int, list[Chunk]],
    advance: Callable[[int], None],
    cancelled: Callable[[], bool],
) -> Generator[bytes | memoryview]:
    """Yield a pack's bytes, file order, and note each chunk's place and hash.

    Args:
        plan: The pack.
        pack: Its number in the index's table.
        chunks: Filled as the bytes are taken: position in the snapshot to chunks.
        advance: Called with the size of each chunk once it has been taken and the next is asked for.
        cancelled: Asked before each chunk.

    Raises:
        ConflictError: ``cancelled`` said so.
    """
    yield plan.header
    for placed in plan.blobs:
        noted = chunks.setdefault(placed.position, [])
        offset = placed.tensor.begin
        for buffer in _chunk_buffers(placed.blob):
            check_cancelled(cancelled)
            noted.append(Chunk(pack=pack, offset=offset, byte_count=len(buffer), hash=content_hash(buffer)))
            yield buffer
            offset += len(buffer)
            advance(len(buffer))
        if offset != placed.tensor.end:
            raise InternalError(
                f"Blob {placed.blob.name!r} gave {offset - placed.tensor.begin} bytes; its shape needs "
                f"{placed.tensor.end - placed.tensor.begin}.",
                blob=placed.blob.name,
            )


def check_cancelled(cancelled: Callable[[], bool]) -> None:
    """Raise ``ConflictError`` if the save was cancelled."""
    if cancelled():
        raise ConflictError("The save was cancelled before it was complete; nothing of it was committed. Save again.")


def parse_header(header: bytes, *, byte_count: int, file: str) -> dict[str, StoredTensor]:
    """Return the tensors of a safetensors header.

    Args:
        header: The file's bytes up to where its data begin.
        byte_count: Size of the whole file.
        file: Its path, for the error text.

    Raises:
        CorruptCheckpointError: It is no safetensors header, or a tensor lies outside the file.
    """
    if len(header) < _LENGTH.size or _LENGTH.unpack_from(header)[0] != len(header) - _LENGTH.size:
        raise corrupt(file, offset=0, expected=f"the header length {len(header) - 8}", found=header[:8].hex())
    try:
        entries: object = json.loads(header[_LENGTH.size :].decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise corrupt(file, offset=8, expected="a JSON header", found=error) from error
    if not isinstance(entries, dict):
        raise corrupt(file, offset=8, expected="a JSON object as header", found=type(entries).__name__)
    tensors: dict[str, StoredTensor] = {}
    for key, entry in cast("dict[str, Any]", entries).items():
        if key != _METADATA_KEY:
            tensors[key] = _parse_entry(key, entry, data_begin=len(header), byte_count=byte_count, file=file)
    return tensors


def _parse_entry(key: str, entry: Any, *, data_begin: int, byte_count: int, file: str) -> StoredTensor:
    fields: dict[str, Any] = cast("dict[str, Any]", entry) if isinstance(entry, dict) else {}
    dtype, shape, offsets = fields.get("dtype"), fields.get("shape"), fields.get("data_offsets")
    if type(dtype) is str and _are_sizes(shape) and _are_sizes(offsets) and len(offsets) == 2:
        begin, end = data_begin + offsets[0], data_begin + offsets[1]
        if begin <= end <= byte_count:
            return StoredTensor(dtype=dtype, shape=tuple(shape), begin=begin, end=end)
    raise corrupt(
        file, offset=8, expected=f"type, shape and place inside the file of tensor {key!r:.80}", found=f"{entry!r:.200}"
    )


def _are_sizes(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(size) is int and size >= 0 for size in cast("list[Any]", value))


def _plan(group: Sequence[tuple[int, BlobSnapshot, str]]) -> PackPlan:
    # sorted() is stable: equal item sizes stay in listing order.
    ordered = sorted(group, key=lambda placed: -stored_item_bytes(stored_dtype(placed[1])))
    entries: dict[str, object] = {_METADATA_KEY: {"blobspace_format": str(FORMAT_VERSION)}}
    offset = 0
    for _, blob, key in ordered:
        end = offset + stored_bytes(blob)
        entries[key] = {"dtype": stored_dtype(blob), "shape": stored_shape(blob), "data_offsets": [offset, end]}
        offset = end
    header = _encode_header(entries)
    begin = len(header)
    planned: list[PlannedBlob] = []
    for position, blob, key in ordered:
        end = begin + stored_bytes(blob)
        tensor = StoredTensor(dtype=stored_dtype(blob), shape=stored_shape(blob), begin=begin, end=end)
        planned.append(PlannedBlob(position=position, blob=blob, key=key, tensor=tensor))
        begin = end
    return PackPlan(blobs=tuple(planned), header=header, byte_count=begin)


def _encode_header(entries: Mapping[str, object]) -> bytes:
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    text += b" " * (-(_LENGTH.size + len(text)) % DATA_ALIGNMENT_BYTES)
    return _LENGTH.pack(len(text)) + text


def _free_key(blob: BlobSnapshot, taken: set[str]) -> str:
    wanted = f"{blob.scope}:{blob.name}" if blob.scope else blob.name
    key, number = wanted, 2
    while key in taken:
        key, number = f"{wanted}#{number}", number + 1
    taken.add(key)
    return key


def _chunk_buffers(blob: BlobSnapshot) -> Generator[memoryview]:
    if blob.kind is not Kind.TENSOR:
        payload = memoryview(_payload(blob))
        for begin in range(0, len(payload), CHUNK_BYTES):
            yield payload[begin : begin + CHUNK_BYTES]
        return
    flat: Any = _array(blob).reshape(-1)
    step = CHUNK_BYTES // flat.dtype.itemsize
    for begin in range(0, flat.size, step):
        part: Any = flat[begin : begin + step]
        # A CuPy array is copied to the host one chunk at a time; .get() is how it is told apart without CuPy.
        host: Any = part.get() if hasattr(part, "get") else part
        yield memoryview(host.view(np.uint8)).toreadonly()


def _array(blob: BlobSnapshot) -> Any:
    if blob.array is None:
        raise InternalError(f"The snapshot of tensor blob {blob.name!r} has no array.", blob=blob.name)
    return blob.array


def _payload(blob: BlobSnapshot) -> bytes:
    if not blob.payload:
        raise InternalError(f"The snapshot of blob {blob.name!r} ({blob.kind.value}) has no payload.", blob=blob.name)
    return blob.payload
