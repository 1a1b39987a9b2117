"""FORMAT.md, section 4: packs are valid safetensors files, and every value comes back bit by bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors
import xxhash

from blobspace.cluster.checkpoint import (
    LocalStore,
    commit,
    load_workspace,
    make_manifest,
    read_index,
    read_manifest,
    write_workspace,
)
from blobspace.cluster.checkpoint.pack import parse_header, plan_packs
from blobspace.ops.dtypes import TENSOR_DTYPES
from blobspace.ops.errors import ConflictError, CorruptCheckpointError, InternalError, InvalidInputError
from blobspace.ops.values import Kind, pack_plain, pack_strings, string_tensor
from blobspace.workspace_actors.snapshot import BlobSnapshot, WorkspaceSnapshot

MIB = 2**20


def tensor(name: str, array: Any, *, scope: str = "", version: int = 1) -> BlobSnapshot:
    return BlobSnapshot(scope=scope, name=name, kind=Kind.TENSOR, array=array, payload=None, version=version)


def payload(name: str, kind: Kind, data: bytes, *, scope: str = "") -> BlobSnapshot:
    return BlobSnapshot(scope=scope, name=name, kind=kind, array=None, payload=data, version=2)


def snapshot(*blobs: BlobSnapshot) -> WorkspaceSnapshot:
    return WorkspaceSnapshot(
        workspace="w", blobs=blobs, nets=({"scope": "", "net": {"op": [1, "x"]}},), state={"rng": b"\0\xff", "n": 2**63}
    )


def round_trip(root: Path, content: WorkspaceSnapshot, **options: Any) -> WorkspaceSnapshot:
    store = LocalStore(root)
    receipt = write_workspace(store, save_id="s1", ordinal=0, snapshot=content, **options)
    manifest = make_manifest(
        step=1,
        save_id="s1",
        created_unix_ns=5,
        cluster="c",
        generation=1,
        blobspace_version="0",
        metadata={},
        receipts=[receipt],
        nodes={"w": "n"},
    )
    commit(store, manifest)
    return load_workspace(store, read_index(store, manifest, "w"))


def packs_of(root: Path) -> list[Path]:
    return sorted(root.glob("data/s1/*.safetensors"))


def bits(array: Any) -> bytes:
    return bytes(np.ascontiguousarray(array).reshape(-1).view(np.uint8))


def assert_equal(found: WorkspaceSnapshot, expected: WorkspaceSnapshot) -> None:
    assert (found.workspace, found.nets, found.state) == (expected.workspace, expected.nets, expected.state)
    assert len(found.blobs) == len(expected.blobs)
    for one, other in zip(found.blobs, expected.blobs, strict=True):
        assert (one.scope, one.name, one.kind, one.version) == (other.scope, other.name, other.kind, other.version)
        assert one.payload == other.payload
        assert (one.array is None) == (other.array is None)
        if one.array is not None and other.array is not None:
            assert (one.array.dtype, one.array.shape) == (other.array.dtype, other.array.shape)
            assert bits(one.array) == bits(other.array)


@pytest.mark.parametrize("dtype", TENSOR_DTYPES)
def test_every_element_type_comes_back_bit_by_bit(tmp_path: Path, dtype: str) -> None:
    element = TENSOR_DTYPES[dtype]
    random = np.random.default_rng(0)
    raw = random.integers(0, 2 if dtype == "bool" else 256, 24 * element.itemsize, dtype=np.uint8)
    content = snapshot(
        tensor("matrix", raw.view(element).reshape(2, 3, 4)),
        tensor("scalar", raw[: element.itemsize].view(element).reshape(())),
        tensor("empty", np.empty((0, 3), element)),
        tensor("one", raw[: element.itemsize].view(element).reshape(1, 1), scope="child"),
    )
    assert_equal(round_trip(tmp_path, content), content)
    (path,) = packs_of(tmp_path)
    stored = dict(safetensors.deserialize(path.read_bytes()))
    assert set(stored) == {"matrix", "scalar", "child:one"}
    assert bytes(stored["matrix"]["data"]) == raw.tobytes()


def test_nan_payloads_and_negative_zero_survive(tmp_path: Path) -> None:
    array = np.array([0x7FF8000000000001, 0xFFF0000000000123, 0x8000000000000000], np.uint64).view(np.float64)
    content = snapshot(tensor("odd", array))
    assert_equal(round_trip(tmp_path, content), content)


def test_strings_values_and_uninitialized_blobs_come_back(tmp_path: Path) -> None:
    strings = np.empty((2, 2), dtype=object)
    strings[:] = [[b"", b"\0"], [b"\xff\xfe", "wörter".encode()]]
    content = snapshot(
        payload("strings", Kind.STRINGS, pack_strings(strings)),
        payload("no strings", Kind.STRINGS, pack_strings(string_tensor([]))),
        payload("none", Kind.VALUE, pack_plain(None)),
        payload("nested", Kind.VALUE, pack_plain({"a": [1, 2.5, b"\0", {1: None}]}), scope="a/b"),
        BlobSnapshot(scope="a", name="later", kind=Kind.UNINITIALIZED, array=None, payload=None, version=0),
    )
    found = round_trip(tmp_path, content)
    assert_equal(found, content)
    (path,) = packs_of(tmp_path)
    stored = dict(safetensors.deserialize(path.read_bytes()))
    assert stored["strings"]["dtype"] == "U8"
    assert bytes(stored["a/b:nested"]["data"]) == content.blobs[3].payload


def test_an_index_shows_the_shape_of_a_string_tensor(tmp_path: Path) -> None:
    round_trip(tmp_path, snapshot(payload("s", Kind.STRINGS, pack_strings(string_tensor([b"a"] * 6).reshape(2, 3)))))
    store = LocalStore(tmp_path)
    assert read_index(store, read_manifest(store), "w").blobs[0].shape == (2, 3)


def test_a_workspace_without_blobs_comes_back(tmp_path: Path) -> None:
    assert_equal(round_trip(tmp_path, snapshot()), snapshot())
    assert packs_of(tmp_path) == []


def test_the_safetensors_library_opens_a_pack_with_equal_arrays(tmp_path: Path) -> None:
    content = snapshot(
        tensor("w", np.arange(6, dtype=np.float32).reshape(2, 3)),
        tensor("c", np.array([1 + 2j], np.complex128)),
        tensor("i", np.arange(5, dtype=np.int64)),
    )
    round_trip(tmp_path, content)
    with safetensors.safe_open(packs_of(tmp_path)[0], framework="np") as file:
        assert set(file.keys()) == {"w", "c", "i"}
        assert file.metadata() == {"blobspace_format": "1"}
        np.testing.assert_array_equal(file.get_tensor("w"), content.blobs[0].array)
        np.testing.assert_array_equal(file.get_tensor("c"), [[1.0, 2.0]])


def test_names_that_meet_in_a_pack_get_a_numbered_suffix(tmp_path: Path) -> None:
    content = snapshot(
        tensor("n", np.array([1]), scope="s"),
        tensor("s:n", np.array([2])),
        tensor("s:n#2", np.array([3])),
        tensor("__metadata__", np.array([4])),
        tensor('"quoted"\n\x01é', np.array([5])),
        tensor("b:n", np.array([6]), scope="a"),
        tensor("n", np.array([7]), scope="a:b"),
    )
    assert_equal(round_trip(tmp_path, content), content)
    stored = dict(safetensors.deserialize(packs_of(tmp_path)[0].read_bytes()))
    assert set(stored) == {
        "s:n", "s:n#2", "s:n#2#2", "__metadata__#2", '"quoted"\n\x01é', "a:b:n", "a:b:n#2",
    }  # fmt: skip


def test_data_begin_at_64_bytes_and_every_tensor_is_aligned_to_its_items(tmp_path: Path) -> None:
    arrays = [np.ones(3, np.uint8), np.ones(3, np.float64), np.ones(1, np.float16), np.ones(5, np.float32)]
    arrays += [np.ones(3, np.complex64), np.ones(7, ml_dtypes.bfloat16), np.ones(1, bool), np.ones(1, np.int64)]
    round_trip(tmp_path, snapshot(*(tensor(f"t{number}", array) for number, array in enumerate(arrays))))
    data = packs_of(tmp_path)[0].read_bytes()
    begin = 8 + int.from_bytes(data[:8], "little")
    assert begin % 64 == 0
    header = json.loads(data[8:begin])
    for number, array in enumerate(arrays):
        alignment = array.dtype.itemsize // (2 if array.dtype.kind == "c" else 1)
        assert (begin + header[f"t{number}"]["data_offsets"][0]) % alignment == 0


def test_a_blob_of_several_chunks_comes_back_with_each_chunk_hashed(tmp_path: Path) -> None:
    array = np.random.default_rng(1).integers(0, 256, 33 * MIB + 5, dtype=np.uint8)
    store = LocalStore(tmp_path)
    seen: list[tuple[int, int]] = []
    content = snapshot(tensor("small", np.arange(4)), tensor("big", array))
    assert_equal(round_trip(tmp_path, content, progress=lambda done, total: seen.append((done, total))), content)
    blob = read_index(store, read_manifest(store), "w").blobs[1]
    assert [chunk.byte_count for chunk in blob.chunks] == [16 * MIB, 16 * MIB, MIB + 5]
    data = packs_of(tmp_path)[0].read_bytes()
    for chunk in blob.chunks:
        part = data[chunk.offset : chunk.offset + chunk.byte_count]
        assert xxhash.xxh3_128_digest(part) == chunk.hash
    total = array.nbytes + 32
    assert seen == [(32, total), (32 + 16 * MIB, total), (32 + 32 * MIB, total), (total, total)]


def test_packs_are_closed_at_the_target_and_a_blob_is_never_split(tmp_path: Path) -> None:
    sizes = [60, 30, 20, 500, 1, 1]
    content = snapshot(*(tensor(f"t{number}", np.full(size, number, np.uint8)) for number, size in enumerate(sizes)))
    assert_equal(round_trip(tmp_path, content, pack_target_bytes=100), content)
    inside = [sorted(dict(safetensors.deserialize(path.read_bytes()))) for path in packs_of(tmp_path)]
    assert inside == [["t0", "t1"], ["t2"], ["t3"], ["t4", "t5"]]


def test_a_pack_target_below_one_byte_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="at least 1 byte"):
        plan_packs((), target_bytes=0)


def test_headers_stay_far_below_the_limit_of_safetensors() -> None:
    one = np.zeros(1, np.uint8)
    plans = plan_packs([tensor(f"{number:04d}" + "\x01" * 1020, one) for number in range(3000)])
    assert len(plans) == 2
    assert all(len(plan.header) < 17 * MIB for plan in plans)


class DeviceArray:
    """Looks like a CuPy array: no buffer, no NumPy interface, ``get()`` copies to the host."""

    copied: list[int] = []  # noqa: RUF012

    def __init__(self, host: Any) -> None:
        self._host = host
        self.dtype, self.shape, self.nbytes, self.size = host.dtype, host.shape, host.nbytes, host.size

    def reshape(self, *shape: int) -> DeviceArray:
        return DeviceArray(self._host.reshape(*shape))

    def __getitem__(self, part: slice) -> DeviceArray:
        return DeviceArray(self._host[part])

    def get(self) -> Any:
        self.copied.append(self.nbytes)
        return self._host.copy()


def test_an_array_on_a_device_is_copied_to_the_host_chunk_by_chunk(tmp_path: Path) -> None:
    array = np.random.default_rng(2).random((5, MIB))
    found = round_trip(tmp_path, snapshot(tensor("gpu", DeviceArray(array)), tensor("0-d", DeviceArray(np.array(2.5)))))
    assert bits(found.blobs[0].array) == bits(array)
    assert bits(found.blobs[1].array) == bits(np.array(2.5))
    assert max(DeviceArray.copied) == 16 * MIB


def test_equal_snapshots_give_equal_bytes(tmp_path: Path) -> None:
    content = snapshot(tensor("a", np.arange(9)), tensor("b", np.ones(3, np.float16), scope="s"))
    for root in ("one", "two"):
        round_trip(tmp_path / root, content)
    files = [sorted(path for path in (tmp_path / root).rglob("*") if path.is_file()) for root in ("one", "two")]
    assert [path.read_bytes() for path in files[0]] == [path.read_bytes() for path in files[1]]
    assert len(files[0]) == 3


def test_a_cancelled_save_stops_between_chunks_and_leaves_no_partial_file(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    content = snapshot(tensor("a", np.zeros(40 * MIB, np.uint8)))
    seen: list[int] = []
    with pytest.raises(ConflictError, match="cancelled"):
        write_workspace(
            store,
            save_id="s1",
            ordinal=0,
            snapshot=content,
            progress=lambda done, _: seen.append(done),
            cancelled=lambda: bool(seen),
        )
    assert seen == [16 * MIB]
    assert store.list_files("data") == []


def test_a_save_id_is_not_used_twice(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    write_workspace(store, save_id="s1", ordinal=0, snapshot=snapshot(tensor("a", np.ones(1))))
    before = packs_of(tmp_path)[0].read_bytes()
    with pytest.raises(ConflictError, match="exists already"):
        write_workspace(store, save_id="s1", ordinal=0, snapshot=snapshot(tensor("a", np.zeros(1))))
    assert packs_of(tmp_path)[0].read_bytes() == before


def test_a_snapshot_that_contradicts_itself_is_our_bug(tmp_path: Path) -> None:
    for blob in [
        BlobSnapshot(scope="", name="a", kind=Kind.TENSOR, array=None, payload=None, version=1),
        BlobSnapshot(scope="", name="a", kind=Kind.VALUE, array=None, payload=None, version=1),
        payload("a", Kind.STRINGS, pack_plain(5)),
        payload("a", Kind.STRINGS, pack_plain([["x"], []])),
    ]:
        with pytest.raises(InternalError):
            write_workspace(LocalStore(tmp_path), save_id="s1", ordinal=0, snapshot=snapshot(blob))
        LocalStore(tmp_path).delete_tree("data")


def header_of(text: bytes) -> bytes:
    return len(text).to_bytes(8, "little") + text


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"\xff" * 8,
        header_of(b"{}")[:-1],
        header_of(b"\xff\xfe"),
        header_of(b"[]"),
        header_of(b"[" * 100_000),
        header_of(b'{"a": 5}'),
        header_of(b'{"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 2000]}}'),
        header_of(b'{"a": {"dtype": "U8", "shape": [1], "data_offsets": [2, 1]}}'),
        header_of(b'{"a": {"dtype": "U8", "shape": [-1], "data_offsets": [0, 1]}}'),
        header_of(b'{"a": {"dtype": 5, "shape": [1], "data_offsets": [0, 1]}}'),
        header_of(b'{"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1, 2]}}'),
        header_of(b'{"a": {"dtype": "U8", "shape": [' + b"9" * 5000 + b'], "data_offsets": [0, 1]}}'),
    ],
)
def test_a_hostile_safetensors_header_is_refused(header: bytes) -> None:
    with pytest.raises(CorruptCheckpointError, match="pack"):
        parse_header(header, byte_count=1000, file="pack")
