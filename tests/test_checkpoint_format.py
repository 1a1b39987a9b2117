"""FORMAT.md, sections 2, 3 and 7: the bytes of index and manifest, and what a reader refuses."""

from __future__ import annotations

import copy
import dataclasses
import re
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgpack
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from blobspace.cluster.checkpoint import (
    BlobEntry,
    Chunk,
    Index,
    Manifest,
    PackEntry,
    WorkspaceEntry,
    decode_index,
    decode_manifest,
    encode_index,
    encode_manifest,
)
from blobspace.cluster.checkpoint.format import STORED_DTYPES, stored_item_bytes
from blobspace.cluster.checkpoint.layout import (
    index_path,
    is_data_path,
    manifest_path,
    pack_path,
    save_id_of,
    split_path,
    step_of,
    writer_of,
)
from blobspace.ops.dtypes import TENSOR_DTYPES
from blobspace.ops.errors import CorruptCheckpointError, InvalidInputError
from blobspace.ops.values import Kind

PACK = PackEntry(path="data/s1/w00000-p00000.safetensors", byte_count=640, header_bytes=128, header_hash=b"h" * 16)
OLDER = PackEntry(path="data/s0/w00000-p00000.safetensors", byte_count=256, header_bytes=64, header_hash=b"o" * 16)


def blob(**changes: Any) -> BlobEntry:
    fields: dict[str, Any] = {
        "scope": "",
        "name": "gpu_0/fc_w",
        "kind": Kind.TENSOR,
        "dtype": "float32",
        "stored_dtype": "F32",
        "shape": (2, 3),
        "version": 7,
        "key": "gpu_0/fc_w",
        "byte_count": 24,
        "chunks": (Chunk(pack=0, offset=128, byte_count=24, hash=b"c" * 16),),
    }
    return BlobEntry(**fields | changes)


INDEX = Index(
    workspace="trainer/0",
    save_id="s1",
    packs=(PACK, OLDER),
    blobs=(
        blob(),
        blob(
            scope="scratch",
            name="wörter",
            kind=Kind.STRINGS,
            dtype=None,
            stored_dtype="U8",
            shape=(2,),
            key="",
            byte_count=9,
            chunks=(
                Chunk(pack=0, offset=152, byte_count=4, hash=b"d" * 16),
                Chunk(pack=1, offset=64, byte_count=5, hash=b"e" * 16),
            ),
        ),
        blob(
            name="later",
            kind=Kind.UNINITIALIZED,
            dtype=None,
            stored_dtype=None,
            shape=(),
            byte_count=0,
            key="",
            chunks=(),
        ),
        blob(name="empty", shape=(0, 4), byte_count=0, key="", chunks=()),
    ),
    nets=({"scope": "", "net": {"name": "train", "op": []}},),
    state={"iteration": 12, "rng": b"\x00\xff", "nested": [1.5, None, {"a": True}]},
)
MANIFEST = Manifest(
    step=1200,
    save_id="s1",
    created_unix_ns=1_700_000_000_000_000_000,
    cluster="demo",
    generation=3,
    blobspace_version="0.1.0",
    metadata={"loss": 0.25, "tags": ["a", "b"]},
    workspaces=(
        WorkspaceEntry(
            name="trainer/0",
            node="node-a",
            index_path="data/s1/w00000.index",
            index_bytes=500,
            index_hash=b"i" * 16,
            blob_count=4,
            tensor_bytes=33,
        ),
    ),
    packs=(PACK, OLDER),
)
RECORDS: list[Any] = [
    pytest.param(encode_index(INDEX), decode_index, id="index"),
    pytest.param(encode_manifest(MANIFEST), decode_manifest, id="manifest"),
]
Decode = Callable[..., Any]


def framed(magic: bytes, payload: bytes, *, version: int = 1, length: int | None = None) -> bytes:
    """Frame a payload by the specification alone, so that the checks behind the digest are reached."""
    record = struct.pack("<8sIQ", magic, version, len(payload) if length is None else length) + payload
    return record + xxhash.xxh3_128_digest(record)


def payload_of(record: bytes) -> dict[str, Any]:
    decoded: dict[str, Any] = msgpack.unpackb(record[20:-16], strict_map_key=False)
    return decoded


def reframed(record: bytes, payload: object) -> bytes:
    return framed(record[:8], msgpack.packb(payload))


def replaced(payload: Any, path: tuple[str | int, ...], value: object) -> Any:
    changed = copy.deepcopy(payload)
    target = changed
    for part in path[:-1]:
        target = target[part]
    target[path[-1]] = value
    return changed


def test_an_index_comes_back_as_it_was() -> None:
    assert decode_index(encode_index(INDEX), file="f") == INDEX


def test_a_manifest_comes_back_as_it_was() -> None:
    assert decode_manifest(encode_manifest(MANIFEST), file="f") == MANIFEST


def test_the_bytes_of_version_1_never_change() -> None:
    # If this fails, checkpoints of released versions are at stake: raise the format version instead.
    assert xxhash.xxh3_128_hexdigest(encode_index(INDEX)) == "b0ddbf91f95d8d80ec06ef38e5665609"
    assert xxhash.xxh3_128_hexdigest(encode_manifest(MANIFEST)) == "945fb184fe19b38a9c66637ba86d5058"


def test_equal_records_have_equal_bytes() -> None:
    assert encode_index(copy.deepcopy(INDEX)) == encode_index(INDEX)
    assert encode_manifest(copy.deepcopy(MANIFEST)) == encode_manifest(MANIFEST)


def test_the_frame_is_the_one_of_the_specification() -> None:
    record = encode_manifest(MANIFEST)
    magic, version, length = struct.unpack_from("<8sIQ", record)
    assert (magic, version, length) == (b"\x89BSMAN\r\n", 1, len(record) - 36)
    assert record[-16:] == xxhash.xxh3_128(record[:-16]).digest()
    assert encode_index(INDEX)[:8] == b"\x89BSIDX\r\n"


def test_every_element_type_has_a_stored_type_of_a_fitting_size() -> None:
    assert set(STORED_DTYPES) == set(TENSOR_DTYPES)
    for name, stored in STORED_DTYPES.items():
        parts = 2 if name.startswith("complex") else 1
        assert stored_item_bytes(stored) * parts == TENSOR_DTYPES[name].itemsize


@pytest.mark.parametrize(("record", "decode"), RECORDS)
def test_a_flipped_bit_anywhere_is_found_and_the_file_is_named(record: bytes, decode: Decode) -> None:
    for position in range(len(record)):
        for bit in range(8):
            damaged = bytearray(record)
            damaged[position] ^= 1 << bit
            with pytest.raises(CorruptCheckpointError, match=r"some/file\.x"):
                decode(bytes(damaged), file="some/file.x")


@pytest.mark.parametrize(("record", "decode"), RECORDS)
def test_every_truncation_and_any_excess_is_found(record: bytes, decode: Decode) -> None:
    for length in range(len(record)):
        with pytest.raises(CorruptCheckpointError, match="f"):
            decode(record[:length], file="f")
    with pytest.raises(CorruptCheckpointError, match="payload length"):
        decode(record + b"\0", file="f")


@pytest.mark.parametrize(("record", "decode"), RECORDS)
def test_zeroed_ranges_are_found(record: bytes, decode: Decode) -> None:
    for begin in range(0, len(record) - 8, 7):
        damaged = record[:begin] + bytes(8) + record[begin + 8 :]
        if damaged != record:
            with pytest.raises(CorruptCheckpointError):
                decode(damaged, file="f")


def test_an_index_in_the_place_of_a_manifest_is_told_by_name() -> None:
    with pytest.raises(CorruptCheckpointError, match="of a blobspace index"):
        decode_manifest(encode_index(INDEX), file="f")


@pytest.mark.parametrize(("record", "decode"), RECORDS)
def test_a_newer_format_is_told_apart_from_damage(record: bytes, decode: Decode) -> None:
    with pytest.raises(InvalidInputError, match=r"newer format 2; this blobspace reads up to 1\. Upgrade"):
        decode(framed(record[:8], b"whatever comes", version=2), file="f")
    with pytest.raises(CorruptCheckpointError, match="version"):
        decode(framed(record[:8], b"", version=0), file="f")


@pytest.mark.parametrize(("record", "decode"), RECORDS)
def test_keys_of_a_later_writer_are_ignored(record: bytes, decode: Decode) -> None:
    extended = reframed(record, payload_of(record) | {"added_later": [1, 2, 3]})
    assert decode(extended, file="f") == decode(record, file="f")


@pytest.mark.parametrize(("record", "decode"), RECORDS)
def test_claimed_lengths_are_not_allocated(record: bytes, decode: Decode) -> None:
    hostile = [
        framed(record[:8], b"\x80", length=2**60),
        framed(record[:8], b"\xc6\xff\xff\xff\xff"),  # bin of 4 GiB
        framed(record[:8], b"\xdd\xff\xff\xff\xff"),  # array of 4 Gi items
        framed(record[:8], b"\xdf\xff\xff\xff\xff"),  # map of 4 Gi items
        framed(record[:8], b"\x91" * 100_000 + b"\x90"),  # nested 100,000 deep
    ]
    tracemalloc.start()
    try:
        for data in hostile:
            with pytest.raises(CorruptCheckpointError):
                decode(data, file="f")
        assert tracemalloc.get_traced_memory()[1] < 2**22
    finally:
        tracemalloc.stop()


TRAVERSALS = [
    "../../etc/passwd",
    "/etc/passwd",
    "data/../../x",
    "data/s1/../../x",
    "data/s1/..",
    "data//x",
    "data/s1/a/b",
    "data/s1/",
    "data/s1/x\0",
    "data/s1/x\n",
    "data\\s1\\x",
    "checkpoints/00000000000000000001.manifest",
    "",
]


@pytest.mark.parametrize("path", TRAVERSALS)
def test_a_path_that_is_no_data_path_is_refused_in_every_record(path: str) -> None:
    manifest, index = encode_manifest(MANIFEST), encode_index(INDEX)
    for record, decode, where in [
        (manifest, decode_manifest, ("packs", 0, "path")),
        (manifest, decode_manifest, ("workspaces", 0, "index_path")),
        (index, decode_index, ("packs", 0, "path")),
    ]:
        with pytest.raises(CorruptCheckpointError, match=str(where[-1])):
            decode(reframed(record, replaced(payload_of(record), where, path)), file="f")
    assert not is_data_path(path)


HASH = b"x" * 16
WRONG_IN_INDEX: list[tuple[tuple[str | int, ...], object]] = [
    (("workspace",), ""),
    (("workspace",), 5),
    (("save_id",), "a/b"),
    (("packs",), {}),
    (("packs", 0), []),
    (("packs", 0, "bytes"), 100),
    (("packs", 0, "bytes"), 2**63),
    (("packs", 0, "bytes"), True),
    (("packs", 0, "header_bytes"), 9),
    (("packs", 0, "header_bytes"), 100_000_009),
    (("packs", 0, "header_hash"), b"short"),
    (("packs", 1, "path"), PACK.path),
    (("blobs", 0, "scope"), "a\0b"),
    (("blobs", 0, "name"), ""),
    (("blobs", 0, "name"), "x" * 1025),
    (("blobs", 0, "name"), "empty"),
    (("blobs", 0, "kind"), "pickle"),
    (("blobs", 0, "kind"), []),
    (("blobs", 0, "dtype"), "object"),
    (("blobs", 0, "dtype"), ["float32"]),
    (("blobs", 0, "dtype"), None),
    (("blobs", 0, "stored_dtype"), "F64"),
    (("blobs", 0, "shape"), [2, 4]),
    (("blobs", 0, "shape"), [-2, -3]),
    (("blobs", 0, "shape"), [2.0, 3]),
    (("blobs", 0, "shape"), [1] * 65),
    (("blobs", 3, "shape"), [0, 2**62, 2**62]),
    (("blobs", 0, "version"), -1),
    (("blobs", 0, "key"), None),
    (("blobs", 3, "key"), "empty"),
    (("blobs", 1, "key"), "apart"),
    (("blobs", 0, "bytes"), 2**60),
    (("blobs", 0, "chunks"), []),
    (("blobs", 0, "chunks", 0, "pack"), 2),
    (("blobs", 0, "chunks", 0, "pack"), -1),
    (("blobs", 0, "chunks", 0, "offset"), 127),
    (("blobs", 0, "chunks", 0, "offset"), 617),
    (("blobs", 0, "chunks", 0, "bytes"), 16 * 2**20 + 1),
    (("blobs", 0, "chunks", 0, "hash"), "x" * 16),
    (("blobs", 2, "chunks"), [{"pack": 0, "offset": 128, "bytes": 1, "hash": HASH}]),
    (("nets",), [1]),
    (("state",), []),
    (("state",), {"t": msgpack.ExtType(5, b"")}),
    (("state",), {"t": msgpack.Timestamp(1, 2)}),
]
WRONG_IN_MANIFEST: list[tuple[tuple[str | int, ...], object]] = [
    (("step",), -1),
    (("step",), 2**63),
    (("step",), True),
    (("save_id",), ".."),
    (("created_unix_ns",), 1.5),
    (("cluster",), ""),
    (("generation",), -1),
    (("blobspace_version",), "x" * 2000),
    (("metadata",), None),
    (("workspaces",), None),
    (("workspaces", 0, "name"), None),
    (("workspaces", 0, "node"), None),
    (("workspaces", 0, "index_bytes"), 2**40),
    (("workspaces", 0, "index_bytes"), 0),
    (("workspaces", 0, "index_hash"), b""),
    (("workspaces", 0, "blob_count"), 5),
    (("workspaces", 0, "tensor_bytes"), 2**60),
    (("packs", 1, "bytes"), 2**50),
    (("totals",), 3),
    (("totals", "pack_bytes"), 897),
    (("totals", "workspace_count"), True),
]


@pytest.mark.parametrize(("where", "value"), WRONG_IN_INDEX)
def test_a_wrong_field_of_an_index_is_refused_by_name(where: tuple[str | int, ...], value: object) -> None:
    record = encode_index(INDEX)
    with pytest.raises(CorruptCheckpointError, match=r"f\.index, index field .*: expected .*, found") as caught:
        decode_index(reframed(record, replaced(payload_of(record), where, value)), file="f.index")
    assert str(where[0]) in str(caught.value.fields["field"])


@pytest.mark.parametrize(("where", "value"), WRONG_IN_MANIFEST)
def test_a_wrong_field_of_a_manifest_is_refused_by_name(where: tuple[str | int, ...], value: object) -> None:
    record = encode_manifest(MANIFEST)
    with pytest.raises(CorruptCheckpointError, match=r"f, manifest field .*: expected .*, found"):
        decode_manifest(reframed(record, replaced(payload_of(record), where, value)), file="f")


@pytest.mark.parametrize(("record", "decode"), RECORDS)
def test_each_missing_field_is_named(record: bytes, decode: Decode) -> None:
    payload = payload_of(record)
    for key in payload:
        rest = {other: value for other, value in payload.items() if other != key}
        with pytest.raises(CorruptCheckpointError, match=key):
            decode(reframed(record, rest), file="f")


def test_a_writers_mistake_is_invalid_input_not_corruption() -> None:
    with pytest.raises(InvalidInputError, match=r"shape|bytes"):
        blob(shape=(5,))
    with pytest.raises(InvalidInputError, match="metadata"):
        dataclasses.replace(MANIFEST, metadata={"x": object()})
    with pytest.raises(InvalidInputError, match=r"at most 67108864 are allowed.*metadata smaller"):
        encode_manifest(dataclasses.replace(MANIFEST, metadata={"x": bytes(2**26)}))


# --- fuzzing: nothing but the two promised errors ever comes out -------------------------------------------------

PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=8)
    | st.binary(max_size=20)
    | st.sampled_from(["tensor", "strings", "float32", "U8", HASH, 16 * 2**20, 2**63 - 1]),
    lambda children: (
        st.lists(children, max_size=4)
        | st.dictionaries(st.text(max_size=6) | st.integers(0, 9) | st.binary(max_size=3), children, max_size=4)
    ),
    max_leaves=12,
)


def _refused_or_read(decode: Decode, data: bytes) -> None:
    try:
        decode(data, file="f")
    except (CorruptCheckpointError, InvalidInputError):
        return


@pytest.mark.parametrize(("record", "decode"), RECORDS)
@settings(max_examples=60, deadline=None)
@given(data=st.binary(max_size=300), version=st.integers(0, 3))
def test_random_bytes_are_refused(record: bytes, decode: Decode, data: bytes, version: int) -> None:
    _refused_or_read(decode, data)
    _refused_or_read(decode, record[:8] + data)
    _refused_or_read(decode, framed(record[:8], data, version=version))


@pytest.mark.parametrize(("record", "decode"), RECORDS)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_value_in_the_place_of_any_other_is_read_or_refused(record: bytes, decode: Decode, data: Any) -> None:
    payload = payload_of(record)
    path: list[str | int] = []
    target: Any = payload
    while isinstance(target, (dict, list)) and target and (not path or data.draw(st.booleans())):
        part = data.draw(st.sampled_from(sorted(target, key=repr) if isinstance(target, dict) else range(len(target))))
        path.append(part)
        target = target[part]
    _refused_or_read(decode, reframed(record, replaced(payload, tuple(path), data.draw(PLAIN))))


@pytest.mark.parametrize(("record", "decode"), RECORDS)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_spliced_payload_bytes_are_read_or_refused(record: bytes, decode: Decode, data: Any) -> None:
    body = record[20:-16]
    begin = data.draw(st.integers(0, len(body)))
    end = data.draw(st.integers(begin, min(len(body), begin + 4)))
    _refused_or_read(decode, framed(record[:8], body[:begin] + data.draw(st.binary(max_size=4)) + body[end:]))


# --- the specification -------------------------------------------------------------------------------------------


def test_the_specification_lists_the_fields_in_the_order_in_which_they_are_written() -> None:
    sections = re.split(r"^### ", (Path(__file__).parent.parent / "FORMAT.md").read_text("utf-8"), flags=re.MULTILINE)
    listed = {section[:3]: re.findall(r"^\| `(\w+)` \|", section, flags=re.MULTILINE) for section in sections}
    index, manifest = payload_of(encode_index(INDEX)), payload_of(encode_manifest(MANIFEST))
    written = {
        "3.1": manifest,
        "3.2": manifest["workspaces"][0],
        "3.3": manifest["packs"][0],
        "3.4": index,
        "3.5": index["blobs"][0],
        "3.6": index["blobs"][0]["chunks"][0],
    }
    assert {number: list(fields) for number, fields in written.items()} == {
        number: listed[number] for number in written
    }
    assert index["packs"][0] == manifest["packs"][0]


# --- names -------------------------------------------------------------------------------------------------------


def test_paths_are_the_ones_of_the_specification() -> None:
    assert manifest_path(1200) == "checkpoints/00000000000000001200.manifest"
    assert manifest_path(2**63 - 1) == "checkpoints/09223372036854775807.manifest"
    assert index_path("s1", 3) == "data/s1/w00003.index"
    assert pack_path("s1", 3, 12) == "data/s1/w00003-p00012.safetensors"
    assert save_id_of("data/s1/w00003.index") == "s1"
    assert writer_of(pack_path("s1", 3, 12)) == writer_of(index_path("s1", 3)) == "data/s1/w00003"


def test_only_manifests_have_a_step() -> None:
    assert step_of(manifest_path(7)) == 7
    for path in [
        "checkpoints/7.manifest",
        "checkpoints/.00000000000000000007.manifest.0.tmp",
        "checkpoints/00000000000000000007.manifest.bak",
        "checkpoints/99999999999999999999.manifest",
        "checkpoints/sub/00000000000000000007.manifest",
        "checkpoints/0000000000000000000\u0667.manifest",
        "data/s1/w00000.index",
    ]:
        assert step_of(path) is None


@pytest.mark.parametrize("step", [-1, 2**63, 1.0, True, "7", None])
def test_a_step_out_of_bounds_is_refused(step: Any) -> None:
    with pytest.raises(InvalidInputError, match="step"):
        manifest_path(step)


@pytest.mark.parametrize("save_id", ["", "a/b", "..", "-a", "x" * 65, "ä"])
def test_a_save_id_that_could_be_a_path_is_refused(save_id: str) -> None:
    with pytest.raises(InvalidInputError, match="save id"):
        index_path(save_id, 0)


@pytest.mark.parametrize("path", ["", "/", "/a", "a/", "a//b", "..", "a/..", "./a", "a\0", "a b", "ä"])
def test_a_path_that_could_leave_the_root_is_refused(path: str) -> None:
    with pytest.raises(InvalidInputError, match="no path below"):
        split_path(path)


@pytest.mark.parametrize("ordinal", [-1, 100_000])
def test_an_ordinal_out_of_bounds_is_refused(ordinal: int) -> None:
    with pytest.raises(InvalidInputError, match="ordinal"):
        index_path("s1", ordinal)
    with pytest.raises(InvalidInputError, match="packs"):
        pack_path("s1", 0, ordinal)
