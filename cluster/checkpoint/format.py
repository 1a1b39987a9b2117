"""The two records of a checkpoint, **index** and **manifest**, and their exact bytes. No I/O.

FORMAT.md is the specification; this file is its reference. Each entry is validated when it is made, by the same
code whether a writer makes it or a reader decodes it. A writer's mistake is an ``InvalidInputError``; in bytes
that came from storage the same finding is a ``CorruptCheckpointError`` that also names the file.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, TypeVar, cast

import xxhash

from ...ops.dtypes import TENSOR_DTYPES
from ...ops.errors import InvalidInputError
from ...ops.values import Kind, pack_plain, unpack_plain
from .fields import (
    HASH_BYTES,
    MAX_DIMENSIONS,
    as_list,
    as_map,
    check_count,
    check_data_path,
    check_equal,
    check_hash,
    check_integer,
    check_named,
    check_plain_map,
    check_save_id,
    check_shape,
    check_text,
    check_unique,
    corrupt,
    malformed,
)
from .layout import MAX_WORKSPACES, is_step

FORMAT_VERSION = 1
CHUNK_BYTES = 16 * 2**20
MAX_MANIFEST_BYTES = 64 * 2**20
MAX_INDEX_BYTES = 256 * 2**20
MAX_BLOBS = 1_000_000
MAX_PACKS = 1_000_000
MAX_NETS = 100_000
MAX_SCOPE_BYTES = 16_384
MAX_KEY_BYTES = 20_480
MAX_TEXT_BYTES = 1_024
MAX_BLOB_BYTES = 2**46
MAX_PACK_HEADER_BYTES = 100_000_008
"""The 8 bytes of length and what the safetensors library accepts behind them."""

_INDEX_MAGIC = b"\x89BSIDX\r\n"
_MANIFEST_MAGIC = b"\x89BSMAN\r\n"
_RECORD_NAMES = {_INDEX_MAGIC: "index", _MANIFEST_MAGIC: "manifest"}
_HEAD = struct.Struct("<8sIQ")
FRAME_BYTES = _HEAD.size + HASH_BYTES
_INT64 = 2**63

STORED_DTYPES: Mapping[str, str] = MappingProxyType(
    {
        "bool": "BOOL",
        "int8": "I8",
        "int16": "I16",
        "int32": "I32",
        "int64": "I64",
        "uint8": "U8",
        "uint16": "U16",
        "uint32": "U32",
        "uint64": "U64",
        "float16": "F16",
        "float32": "F32",
        "float64": "F64",
        # Complex numbers lie as pairs (real, imaginary) in a trailing dimension of 2: older safetensors libraries
        # know no complex type, and a pack must open everywhere.
        "complex64": "F32",
        "complex128": "F64",
        "bfloat16": "BF16",
        "float8_e4m3fn": "F8_E4M3",
        "float8_e5m2": "F8_E5M2",
        # safetensors has no name for these; their bits lie as bytes.
        "float8_e4m3fnuz": "U8",
        "float8_e5m2fnuz": "U8",
        "float8_e4m3b11fnuz": "U8",
    }
)
"""The safetensors type under which a tensor of each element type lies in a pack."""

_STORED_BYTES: Mapping[str, int] = MappingProxyType(
    {"BOOL": 1, "I8": 1, "U8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2}
    | {"I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8}
)

_T = TypeVar("_T")


def stored_item_bytes(stored_dtype: str) -> int:
    """Return the bytes of one element of a safetensors type that this format uses."""
    return _STORED_BYTES[stored_dtype]


def content_hash(data: bytes | bytearray | memoryview) -> bytes:
    """Return the XXH3-128 of ``data``, seed 0, in its canonical (big-endian) 16 bytes."""
    return xxhash.xxh3_128_digest(data)


@dataclass(frozen=True, slots=True, kw_only=True)
class PackEntry:
    """One pack file.

    Attributes:
        path: Path relative to the root; it may lie in the folder of an earlier save.
        byte_count: Size of the whole file.
        header_bytes: Where the tensors' bytes begin: the safetensors length field and JSON header, padding included.
        header_hash: XXH3-128 of those first ``header_bytes`` bytes.
    """

    KEYS: ClassVar[Mapping[str, str]] = MappingProxyType(
        {"path": "path", "bytes": "byte_count", "header_bytes": "header_bytes", "header_hash": "header_hash"}
    )

    path: str
    byte_count: int
    header_bytes: int
    header_hash: bytes

    def __post_init__(self) -> None:
        check_data_path("path", self.path)
        check_integer("bytes", self.byte_count, 0, _INT64)
        check_integer("header_bytes", self.header_bytes, 10, min(MAX_PACK_HEADER_BYTES, self.byte_count) + 1)
        check_hash("header_hash", self.header_hash)


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """At most 16 MiB of one blob, hashed as one piece.

    Attributes:
        pack: Number of its pack in the index's table.
        offset: Where it begins, in bytes from the start of the pack file.
        byte_count: Its length.
        hash: XXH3-128 of its bytes.
    """

    KEYS: ClassVar[Mapping[str, str]] = MappingProxyType(
        {"pack": "pack", "offset": "offset", "bytes": "byte_count", "hash": "hash"}
    )

    pack: int
    offset: int
    byte_count: int
    hash: bytes

    def __post_init__(self) -> None:
        check_integer("pack", self.pack, 0, MAX_PACKS)
        check_integer("offset", self.offset, 0, _INT64)
        check_integer("bytes", self.byte_count, 1, CHUNK_BYTES + 1)
        check_hash("hash", self.hash)


@dataclass(frozen=True, slots=True, kw_only=True)
class BlobEntry:
    """One blob of a workspace, and where its bytes lie.

    Attributes:
        scope: Path of the child workspace that owns it; ``""`` for the root.
        name: Its name within that workspace.
        kind: What it holds.
        dtype: Element type (a name of ``TENSOR_DTYPES``) of a tensor; None for the other kinds.
        stored_dtype: safetensors type of its bytes; None for an uninitialized blob.
        shape: Shape of a tensor or a string tensor; ``()`` for the other kinds.
        version: The blob's version when it was frozen.
        key: Name of the one tensor in the pack whose bytes are this blob's; ``""`` if there is none (it has no
            bytes, or its chunks do not lie side by side in one pack).
        byte_count: Bytes of the tensor, or of the MessagePack form.
        chunks: Its bytes, in order; empty for a blob without bytes.
    """

    KEYS: ClassVar[Mapping[str, str]] = MappingProxyType(
        {
            "scope": "scope",
            "name": "name",
            "kind": "kind",
            "dtype": "dtype",
            "stored_dtype": "stored_dtype",
            "shape": "shape",
            "version": "version",
            "key": "key",
            "bytes": "byte_count",
            "chunks": "chunks",
        }
    )

    scope: str
    name: str
    kind: Kind
    dtype: str | None
    stored_dtype: str | None
    shape: tuple[int, ...]
    version: int
    key: str
    byte_count: int
    chunks: tuple[Chunk, ...]

    def __post_init__(self) -> None:
        check_text("scope", self.scope, MAX_SCOPE_BYTES)
        check_named("name", self.name, "blob")
        check_integer("version", self.version, 0, _INT64)
        check_text("key", self.key, MAX_KEY_BYTES)
        check_integer("bytes", self.byte_count, 0, MAX_BLOB_BYTES + 1)
        check_shape("shape", self.shape)
        self._check_kind()
        self._check_chunks()

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Shape of the blob's tensor in a pack: what safetensors readers see."""
        if self.kind is not Kind.TENSOR:
            return (self.byte_count,)
        return (*self.shape, 2) if self.dtype in ("complex64", "complex128") else self.shape

    def _check_kind(self) -> None:
        match self.kind:
            case Kind.TENSOR:
                if not isinstance(self.dtype, str) or self.dtype not in TENSOR_DTYPES:
                    raise malformed("dtype", f"one of {', '.join(TENSOR_DTYPES)}", self.dtype)
                check_equal("stored_dtype", self.stored_dtype, STORED_DTYPES[self.dtype])
                item_bytes = TENSOR_DTYPES[self.dtype].itemsize
                check_equal("bytes", self.byte_count, math.prod(self.shape) * item_bytes)
                # NumPy's own rule, which also holds for arrays without elements.
                if math.prod(size for size in self.shape if size) * item_bytes >= _INT64:
                    raise malformed("shape", "a product of the non-zero sizes below 2**63 bytes", self.shape)
            case Kind.STRINGS | Kind.VALUE:
                check_equal("dtype", self.dtype, None)
                check_equal("stored_dtype", self.stored_dtype, "U8")
                check_integer("bytes", self.byte_count, 1, MAX_BLOB_BYTES + 1)
                if self.kind is Kind.VALUE:
                    check_equal("shape", self.shape, ())
            case Kind.UNINITIALIZED:
                check_equal("dtype", self.dtype, None)
                check_equal("stored_dtype", self.stored_dtype, None)
                check_equal("shape", self.shape, ())
                check_equal("bytes", self.byte_count, 0)
            case _:
                raise malformed("kind", f"one of {', '.join(Kind)}", self.kind)

    def _check_chunks(self) -> None:
        stored = sum(chunk.byte_count for chunk in self.chunks)
        if stored != self.byte_count:
            raise malformed("chunks", f"{self.byte_count} bytes in all", stored)
        if not self.key:
            return
        if not self.chunks:
            raise malformed("key", "'' for a blob without bytes", self.key)
        first = self.chunks[0]
        offset = first.offset
        for chunk in self.chunks:
            if chunk.pack != first.pack or chunk.offset != offset:
                raise malformed(
                    "chunks",
                    f"chunks side by side in pack {first.pack}, as the blob has a key, the next at {offset}",
                    f"pack {chunk.pack}, offset {chunk.offset}",
                )
            offset += chunk.byte_count


@dataclass(frozen=True, slots=True, kw_only=True)
class Index:
    """One workspace's list of blobs and where their bytes lie.

    Attributes:
        workspace: The workspace's name.
        save_id: The save that wrote this index.
        packs: The packs that its chunks refer to by number, of this or of earlier saves.
        blobs: Every blob of the workspace and of its children, in listing order.
        nets: Plain form of each net, as in ``WorkspaceSnapshot``.
        state: Plain form of the rest, as in ``WorkspaceSnapshot``.
    """

    KEYS: ClassVar[Mapping[str, str]] = MappingProxyType(
        {name: name for name in ("workspace", "save_id", "packs", "blobs", "nets", "state")}
    )

    workspace: str
    save_id: str
    packs: tuple[PackEntry, ...]
    blobs: tuple[BlobEntry, ...]
    nets: tuple[dict[str, Any], ...]
    state: dict[str, Any]

    def __post_init__(self) -> None:
        check_named("workspace", self.workspace, "workspace")
        check_save_id("save_id", self.save_id)
        check_count("packs", self.packs, MAX_PACKS)
        check_count("blobs", self.blobs, MAX_BLOBS)
        check_count("nets", self.nets, MAX_NETS)
        check_unique("packs", (pack.path for pack in self.packs))
        check_unique("blobs", ((blob.scope, blob.name) for blob in self.blobs))
        for position, net in enumerate(self.nets):
            check_plain_map(f"nets[{position}]", net)
        check_plain_map("state", self.state)
        self._check_extents()

    @property
    def tensor_bytes(self) -> int:
        """Bytes of all blobs, in every kind's stored form."""
        return sum(blob.byte_count for blob in self.blobs)

    def _check_extents(self) -> None:
        for position, blob in enumerate(self.blobs):
            for number, chunk in enumerate(blob.chunks):
                field = f"blobs[{position}].chunks[{number}]"
                if chunk.pack >= len(self.packs):
                    raise malformed(f"{field}.pack", f"a number below {len(self.packs)}", chunk.pack)
                pack = self.packs[chunk.pack]
                if not pack.header_bytes <= chunk.offset <= pack.byte_count - chunk.byte_count:
                    raise malformed(
                        f"{field}.offset",
                        f"{pack.header_bytes} to {pack.byte_count - chunk.byte_count}, inside {pack.path}",
                        chunk.offset,
                    )


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkspaceEntry:
    """One workspace of a checkpoint.

    Attributes:
        name: The workspace's name.
        node: The node it was saved from (for people and placement; never a path).
        index_path: Path of its index, relative to the root.
        index_bytes: Size of that file.
        index_hash: XXH3-128 of that whole file.
        blob_count: Number of its blobs, uninitialized ones included.
        tensor_bytes: Bytes of all its blobs.
    """

    KEYS: ClassVar[Mapping[str, str]] = MappingProxyType(
        {
            name: name
            for name in ("name", "node", "index_path", "index_bytes", "index_hash", "blob_count", "tensor_bytes")
        }
    )

    name: str
    node: str
    index_path: str
    index_bytes: int
    index_hash: bytes
    blob_count: int
    tensor_bytes: int

    def __post_init__(self) -> None:
        check_named("name", self.name, "workspace")
        check_text("node", self.node, MAX_TEXT_BYTES)
        check_data_path("index_path", self.index_path)
        check_integer("index_bytes", self.index_bytes, FRAME_BYTES, MAX_INDEX_BYTES + 1)
        check_hash("index_hash", self.index_hash)
        check_integer("blob_count", self.blob_count, 0, MAX_BLOBS + 1)
        check_integer("tensor_bytes", self.tensor_bytes, 0, _INT64)


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """The record whose appearance is the commit of a checkpoint.

    Attributes:
        step: The step it was made at; also in its file name.
        save_id: The save that made it.
        created_unix_ns: When, in nanoseconds since 1970 (UTC).
        cluster: The cluster's name.
        generation: The coordinator's generation.
        blobspace_version: Version of the library that wrote it; for people.
        metadata: The user's own plain values.
        workspaces: Each workspace and its index.
        packs: Every pack that any of the indexes refers to, once. Together with the indexes this is all that
            must be kept for the checkpoint to load.
    """

    KEYS: ClassVar[Mapping[str, str]] = MappingProxyType(
        {
            name: name
            for name in (
                "step",
                "save_id",
                "created_unix_ns",
                "cluster",
                "generation",
                "blobspace_version",
                "metadata",
                "workspaces",
                "packs",
            )
        }
    )

    step: int
    save_id: str
    created_unix_ns: int
    cluster: str
    generation: int
    blobspace_version: str
    metadata: dict[str, Any]
    workspaces: tuple[WorkspaceEntry, ...]
    packs: tuple[PackEntry, ...]

    def __post_init__(self) -> None:
        if not is_step(self.step):
            raise malformed("step", "an integer from 0 to 2**63 - 1", self.step)
        check_save_id("save_id", self.save_id)
        check_integer("created_unix_ns", self.created_unix_ns, 0, _INT64)
        check_named("cluster", self.cluster, "cluster")
        check_integer("generation", self.generation, 0, _INT64)
        check_text("blobspace_version", self.blobspace_version, MAX_TEXT_BYTES)
        check_plain_map("metadata", self.metadata)
        check_count("workspaces", self.workspaces, MAX_WORKSPACES)
        check_count("packs", self.packs, MAX_PACKS)
        check_unique("workspaces", (workspace.name for workspace in self.workspaces))
        check_unique("packs", (pack.path for pack in self.packs))

    @property
    def blob_count(self) -> int:
        """Number of blobs in all workspaces."""
        return sum(workspace.blob_count for workspace in self.workspaces)

    @property
    def tensor_bytes(self) -> int:
        """Bytes of all blobs in all workspaces."""
        return sum(workspace.tensor_bytes for workspace in self.workspaces)

    @property
    def pack_bytes(self) -> int:
        """Bytes of all packs, headers included: what the checkpoint takes on storage, its records aside."""
        return sum(pack.byte_count for pack in self.packs)


def encode_index(index: Index) -> bytes:
    """Return the bytes of an index file; equal indexes give equal bytes.

    Raises:
        InvalidInputError: It would be larger than 256 MiB.
    """
    payload = _to_map(index)
    payload["packs"] = [_to_map(pack) for pack in index.packs]
    payload["blobs"] = [_blob_to_map(blob) for blob in index.blobs]
    payload["nets"] = list(index.nets)
    return _frame(_INDEX_MAGIC, payload, MAX_INDEX_BYTES, "nets and state")


def encode_manifest(manifest: Manifest) -> bytes:
    """Return the bytes of a manifest file; equal manifests give equal bytes.

    Raises:
        InvalidInputError: It would be larger than 64 MiB.
    """
    payload = _to_map(manifest)
    payload["workspaces"] = [_to_map(workspace) for workspace in manifest.workspaces]
    payload["packs"] = [_to_map(pack) for pack in manifest.packs]
    payload["totals"] = _totals(manifest)
    return _frame(_MANIFEST_MAGIC, payload, MAX_MANIFEST_BYTES, "metadata")


def decode_index(data: bytes, *, file: str) -> Index:
    """Return the index in ``data``.

    Args:
        data: The whole file.
        file: Its path, for the error text.

    Raises:
        CorruptCheckpointError: The bytes are not what a writer wrote.
        InvalidInputError: A newer format wrote them.
    """
    payload = _unframe(_INDEX_MAGIC, data, MAX_INDEX_BYTES, file)
    return _as_corrupt(file, "index", lambda: _index_from(payload))


def decode_manifest(data: bytes, *, file: str) -> Manifest:
    """Return the manifest in ``data``.

    Args:
        data: The whole file.
        file: Its path, for the error text.

    Raises:
        CorruptCheckpointError: The bytes are not what a writer wrote.
        InvalidInputError: A newer format wrote them.
    """
    payload = _unframe(_MANIFEST_MAGIC, data, MAX_MANIFEST_BYTES, file)
    return _as_corrupt(file, "manifest", lambda: _manifest_from(payload))


# --- framing ---------------------------------------------------------------------------------------------------


def _frame(magic: bytes, payload: dict[str, Any], limit: int, largest_part: str) -> bytes:
    body = pack_plain(payload)
    if FRAME_BYTES + len(body) > limit:
        raise InvalidInputError(
            f"The {_RECORD_NAMES[magic]} would have {FRAME_BYTES + len(body)} bytes; at most {limit} are allowed. "
            f"Make its {largest_part} smaller, for instance by putting large values into blobs.",
            found_bytes=FRAME_BYTES + len(body),
            limit_bytes=limit,
        )
    record = _HEAD.pack(magic, FORMAT_VERSION, len(body)) + body
    return record + content_hash(record)


def _unframe(magic: bytes, data: bytes, limit: int, file: str) -> object:
    name = _RECORD_NAMES[magic]
    if not FRAME_BYTES <= len(data) <= limit:
        raise corrupt(
            file, expected=f"{FRAME_BYTES} to {limit} bytes of a blobspace {name}", found=f"{len(data)} bytes"
        )
    found_magic, version, length = _HEAD.unpack_from(data)
    if found_magic != magic:
        raise corrupt(
            file,
            field="magic",
            expected=f"{magic!r} of a blobspace {name}",
            found=f"{found_magic!r} of a blobspace {_RECORD_NAMES[found_magic]}"
            if found_magic in _RECORD_NAMES
            else repr(found_magic),
        )
    if length != len(data) - FRAME_BYTES:
        raise corrupt(file, field="payload length", expected=f"{len(data) - FRAME_BYTES} bytes", found=length)
    view = memoryview(data)
    digest = content_hash(view[:-HASH_BYTES])
    if digest != data[-HASH_BYTES:]:
        raise corrupt(file, field="digest", expected=data[-HASH_BYTES:].hex(), found=digest.hex())
    # After the digest, so that a flipped bit in the version is told apart from a newer writer. Every version of
    # the format keeps this frame (FORMAT.md, "Versions").
    if version > FORMAT_VERSION:
        raise InvalidInputError(
            f"{file} was written by a newer format {version}; this blobspace reads up to {FORMAT_VERSION}. "
            f"Upgrade blobspace.",
            file=file,
            found=version,
            limit=FORMAT_VERSION,
        )
    if version < 1:
        raise corrupt(file, field="format version", expected=f"1 to {FORMAT_VERSION}", found=version)
    try:
        return unpack_plain(data[_HEAD.size : -HASH_BYTES])
    except ValueError as error:
        raise corrupt(file, field="payload", expected="one MessagePack map", found=error) from error


def _as_corrupt(file: str, record: str, decode: Callable[[], _T]) -> _T:
    try:
        return decode()
    except InvalidInputError as error:
        field, expected, found = (error.fields.get(name) for name in ("field", "expected", "found"))
        raise corrupt(file, field=f"{record} field {field}", expected=expected, found=found) from error


# --- maps to entries and back ----------------------------------------------------------------------------------


def _to_map(entry: Any) -> dict[str, Any]:
    return {key: getattr(entry, attribute) for key, attribute in entry.KEYS.items()}


def _blob_to_map(blob: BlobEntry) -> dict[str, Any]:
    entry = _to_map(blob)
    entry["kind"] = blob.kind.value
    entry["shape"] = list(blob.shape)
    entry["chunks"] = [_to_map(chunk) for chunk in blob.chunks]
    return entry


def _totals(manifest: Manifest) -> dict[str, int]:
    return {
        "workspace_count": len(manifest.workspaces),
        "blob_count": manifest.blob_count,
        "tensor_bytes": manifest.tensor_bytes,
        "pack_bytes": manifest.pack_bytes,
    }


def _index_from(payload: object) -> Index:
    fields = _fields(Index, payload, "")
    fields["packs"] = _entries(PackEntry, fields["packs"], "packs", MAX_PACKS)
    blobs = as_list("blobs", fields["blobs"], MAX_BLOBS)
    fields["blobs"] = tuple(_blob_from(blob, f"blobs[{position}]") for position, blob in enumerate(blobs))
    fields["nets"] = tuple(as_list("nets", fields["nets"], MAX_NETS))
    return Index(**fields)


def _blob_from(value: object, where: str) -> BlobEntry:
    fields = _fields(BlobEntry, value, where)
    try:
        fields["kind"] = Kind(fields["kind"])
    except ValueError:
        raise malformed(f"{where}.kind", f"one of {', '.join(Kind)}", fields["kind"]) from None
    fields["shape"] = tuple(as_list(f"{where}.shape", fields["shape"], MAX_DIMENSIONS))
    fields["chunks"] = _entries(Chunk, fields["chunks"], f"{where}.chunks", MAX_BLOB_BYTES)
    return _made(BlobEntry, fields, where)


def _manifest_from(payload: object) -> Manifest:
    fields = _fields(Manifest, payload, "")
    fields["workspaces"] = _entries(WorkspaceEntry, fields["workspaces"], "workspaces", MAX_WORKSPACES)
    fields["packs"] = _entries(PackEntry, fields["packs"], "packs", MAX_PACKS)
    manifest = Manifest(**fields)
    totals = as_map("totals", cast("dict[Any, Any]", payload).get("totals"))
    for name, expected in _totals(manifest).items():
        check_equal(f"totals.{name}", totals.get(name), expected)
    return manifest


def _fields(cls: Any, value: object, where: str) -> dict[str, Any]:
    """Return the constructor's arguments from a decoded map. Keys that this version does not know are ignored."""
    entry = as_map(where or "payload", value)
    fields: dict[str, Any] = {}
    for key, attribute in cls.KEYS.items():
        if key not in entry:
            raise malformed(f"{where}.{key}" if where else key, "the field to be there", "nothing")
        fields[attribute] = entry[key]
    return fields


def _entries(cls: type[_T], value: object, where: str, limit: int) -> tuple[_T, ...]:
    made: list[_T] = []
    for position, item in enumerate(as_list(where, value, limit)):
        made.append(_made(cls, _fields(cls, item, f"{where}[{position}]"), f"{where}[{position}]"))
    return tuple(made)


def _made(cls: type[_T], fields: dict[str, Any], where: str) -> _T:
    try:
        return cls(**fields)
    except InvalidInputError as error:
        raise malformed(f"{where}.{error.fields['field']}", error.fields["expected"], error.fields["found"]) from None
