"""FORMAT.md, section 6: what a reader finds, what it refuses, and what it still reads when a part is damaged."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
import shutil
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash

from blobspace.cluster.checkpoint import (
    BlobEntry,
    Index,
    LocalStore,
    Manifest,
    commit,
    decode_index,
    encode_index,
    encode_manifest,
    list_checkpoints,
    load_workspace,
    make_manifest,
    read_index,
    read_manifest,
    verify,
    write_workspace,
)
from blobspace.ops.dtypes import TENSOR_DTYPES
from blobspace.ops.errors import (
    CorruptCheckpointError,
    InvalidInputError,
    MemoryLimitError,
    NotFoundError,
)
from blobspace.ops.values import Kind, pack_plain, pack_strings, string_tensor
from blobspace.workspace_actors.snapshot import BlobSnapshot, WorkspaceSnapshot

EXAMPLE = Path(__file__).parent.parent / "examples" / "read_checkpoint.py"
INDEX_FILE = "data/s1/w00000.index"
PACK_FILE = "data/s1/w00000-p00000.safetensors"


def tensor(name: str, array: Any, *, scope: str = "") -> BlobSnapshot:
    return BlobSnapshot(scope=scope, name=name, kind=Kind.TENSOR, array=array, payload=None, version=1)


def content(workspace: str = "w0", seed: int = 0) -> WorkspaceSnapshot:
    numbers = np.random.default_rng(seed)
    return WorkspaceSnapshot(
        workspace=workspace,
        blobs=(
            tensor("a", numbers.random(20)),
            tensor("b", numbers.integers(0, 9, (3, 4), dtype=np.int32), scope="child"),
            BlobSnapshot(
                scope="",
                name="s",
                kind=Kind.STRINGS,
                array=None,
                payload=pack_strings(string_tensor([b"x\0", b"\xff"])),
                version=1,
            ),
            BlobSnapshot(scope="", name="v", kind=Kind.VALUE, array=None, payload=pack_plain({"k": [1]}), version=1),
            BlobSnapshot(scope="", name="u", kind=Kind.UNINITIALIZED, array=None, payload=None, version=0),
        ),
        nets=({"scope": "", "net": {"name": "n"}},),
        state={"n": seed},
    )


def save(store: LocalStore, *, step: int = 1, save_id: str = "s1", snapshots: Any = None) -> Manifest:
    snapshots = snapshots or [content("w0", step), content("w1", step + 100)]
    receipts = [
        write_workspace(store, save_id=save_id, ordinal=ordinal, snapshot=snapshot, pack_target_bytes=200)
        for ordinal, snapshot in enumerate(snapshots)
    ]
    manifest = make_manifest(
        step=step,
        save_id=save_id,
        created_unix_ns=step,
        cluster="c",
        generation=1,
        blobspace_version="0",
        metadata={},
        receipts=receipts,
        nodes={},
    )
    commit(store, manifest)
    return manifest


def load(store: LocalStore, workspace: str = "w0", **options: Any) -> WorkspaceSnapshot:
    return load_workspace(store, read_index(store, read_manifest(store), workspace), **options)


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    made = LocalStore(tmp_path)
    save(made)
    return made


def recommit(store: LocalStore, index: Index, *, check: Callable[[Index], Index] = lambda index: index) -> Index:
    """Put a consistent manifest around a hand-made index of w0, as a hostile writer could."""
    manifest = read_manifest(store, 1)
    data = encode_index(check(index))
    store.replace(INDEX_FILE, data)
    first = dataclasses.replace(
        manifest.workspaces[0],
        index_bytes=len(data),
        index_hash=xxhash.xxh3_128_digest(data),
        blob_count=len(index.blobs),
        tensor_bytes=index.tensor_bytes,
    )
    packs = {pack.path: pack for pack in (*manifest.packs, *index.packs)}
    manifest = dataclasses.replace(manifest, workspaces=(first, *manifest.workspaces[1:]), packs=tuple(packs.values()))
    store.replace("checkpoints/00000000000000000001.manifest", encode_manifest(manifest))
    return read_index(store, read_manifest(store, 1), "w0")


# --- finding -----------------------------------------------------------------------------------------------------


def test_checkpoints_are_listed_by_step_and_foreign_files_are_passed_over(store: LocalStore) -> None:
    for step in (300, 20):
        save(store, step=step, save_id=f"s{step}")
    for name in ("notes.txt", ".00000000000000000999.manifest.0.tmp", "00000000000000000999.manifest.old"):
        store.write(f"checkpoints/{name}", (b"x",))
    summaries = list_checkpoints(store)
    assert [summary.step for summary in summaries] == [1, 20, 300]
    assert all(summary.is_readable for summary in summaries)
    assert (summaries[2].save_id, summaries[2].workspace_count, summaries[2].blob_count) == ("s300", 2, 10)


def test_a_damaged_manifest_is_listed_with_its_problem(store: LocalStore) -> None:
    save(store, step=2, save_id="s2")
    store.replace("checkpoints/00000000000000000002.manifest", b"")
    newer = bytearray(encode_manifest(read_manifest(store, 1)))
    newer[8] = 2
    newer[-16:] = xxhash.xxh3_128_digest(bytes(newer[:-16]))
    store.replace("checkpoints/00000000000000000003.manifest", bytes(newer))
    one, two, three = list_checkpoints(store)
    assert one.is_readable
    assert "found 0 bytes" in str(two.problem)
    assert "newer format 2" in str(three.problem)


def test_the_newest_manifest_is_read_when_no_step_is_given(store: LocalStore) -> None:
    newest = save(store, step=30, save_id="s30")
    assert read_manifest(store) == newest
    assert read_manifest(store, 1).step == 1


def test_a_step_that_is_not_there_says_which_are(store: LocalStore) -> None:
    save(store, step=30, save_id="s30")
    with pytest.raises(NotFoundError, match=r"no checkpoint of step 7 in .*There are steps 1, 30\."):
        read_manifest(store, 7)


def test_an_empty_root_says_so(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"no checkpoint in .*nothing"):
        read_manifest(LocalStore(tmp_path / "nothing"))
    with pytest.raises(NotFoundError, match="none at all"):
        read_manifest(LocalStore(tmp_path / "nothing"), 3)


def test_a_damaged_newest_manifest_is_an_error_and_not_skipped(store: LocalStore) -> None:
    store.replace("checkpoints/00000000000000000002.manifest", b"x" * 100)
    with pytest.raises(CorruptCheckpointError, match=r"00000000000000000002\.manifest"):
        read_manifest(store)


def test_a_manifest_under_another_steps_name_is_refused(store: LocalStore, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    shutil.copy(folder / "00000000000000000001.manifest", folder / "00000000000000000005.manifest")
    with pytest.raises(CorruptCheckpointError, match=r"expected 5.*found 1"):
        read_manifest(store)


def test_an_unknown_workspace_says_which_there_are(store: LocalStore) -> None:
    with pytest.raises(NotFoundError, match=r"no workspace 'w7'. It has 'w0', 'w1'"):
        read_index(store, read_manifest(store), "w7")


# --- loading -----------------------------------------------------------------------------------------------------


def test_a_selection_is_loaded_in_listing_order_with_nets_and_state(store: LocalStore) -> None:
    found = load(store, select=lambda entry: entry.name in ("s", "b"))
    assert [blob.name for blob in found.blobs] == ["b", "s"]
    assert found.nets == content().nets
    assert found.state == {"n": 1}


def test_tensors_are_read_straight_into_the_given_arrays(store: LocalStore) -> None:
    given: list[Any] = []

    def allocate(shape: tuple[int, ...], dtype: Any) -> Any:
        given.append(np.full(shape, 7, dtype))
        return given[-1]

    found = load(store, allocate=allocate)
    assert [blob.array is array for blob, array in zip(found.blobs[:2], given, strict=True)] == [True, True]
    np.testing.assert_array_equal(given[0], content(seed=1).blobs[0].array)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda shape, dtype: np.empty((*shape, 1), dtype),
        lambda shape, dtype: np.empty(shape, np.float16),
        lambda shape, dtype: np.empty(shape[::-1], dtype).T if len(shape) > 1 else np.empty(shape[0] * 2, dtype)[::2],
        lambda shape, dtype: np.broadcast_to(np.zeros((), dtype), shape),
    ],
)
def test_an_array_that_does_not_fit_is_refused(store: LocalStore, wrong: Any) -> None:
    with pytest.raises(InvalidInputError, match=r"allocate\(\) gave"):
        load(store, allocate=wrong)


def test_too_little_memory_names_the_blob_and_the_bytes(store: LocalStore) -> None:
    def allocate(shape: tuple[int, ...], dtype: Any) -> Any:
        raise MemoryError

    with pytest.raises(MemoryLimitError, match="blob 'a' needs 160 bytes"):
        load(store, allocate=allocate)


def test_a_large_workspace_is_read_by_several_threads(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    array = np.random.default_rng(0).integers(0, 256, 50 * 2**20, dtype=np.uint8)
    save(store, snapshots=[dataclasses.replace(content(), blobs=(tensor("big", array), tensor("c", np.ones(3))))])
    assert np.array_equal(load(store).blobs[0].array, array)
    assert verify(store, read_manifest(store)).checked_bytes == array.nbytes + 24
    with (tmp_path / PACK_FILE).open("r+b") as file:
        file.seek(40 * 2**20)
        file.write(b"damage")
    with pytest.raises(CorruptCheckpointError, match="'big'"):
        load(store)


def test_data_of_an_earlier_save_are_referred_to_and_chunks_may_lie_apart(store: LocalStore) -> None:
    # What the next release writes: one blob unchanged (its pack is the old save's), one made up of two packs' chunks.
    save(store, step=2, save_id="s2")
    old, new = (read_index(store, read_manifest(store, step), "w0") for step in (1, 2))
    old_entry, new_entry = old.blobs[0], new.blobs[0]
    packs = (old.packs[old_entry.chunks[0].pack], new.packs[new_entry.chunks[0].pack])
    unchanged = dataclasses.replace(old_entry, chunks=(dataclasses.replace(old_entry.chunks[0], pack=0),))
    joined = dataclasses.replace(
        old_entry,
        name="joined",
        shape=(40,),
        byte_count=320,
        key="",
        chunks=(unchanged.chunks[0], dataclasses.replace(new_entry.chunks[0], pack=1)),
    )
    index = recommit(store, dataclasses.replace(old, packs=packs, blobs=(unchanged, joined)))
    found = load_workspace(store, index)
    arrays = [content(seed=seed).blobs[0].array for seed in (1, 2)]
    np.testing.assert_array_equal(found.blobs[0].array, arrays[0])
    np.testing.assert_array_equal(found.blobs[1].array, np.concatenate(arrays))
    report = verify(store, read_manifest(store, 1))
    assert report.is_sound
    # The first chunk is shared by two blobs and counts once.
    other = read_index(store, read_manifest(store, 1), "w1")
    assert report.checked_bytes == 320 + other.tensor_bytes


# --- damage ------------------------------------------------------------------------------------------------------


def data_files(root: Path) -> list[Path]:
    return sorted(path for path in (root / "data").rglob("*") if path.is_file())


def everything(store: LocalStore) -> None:
    for workspace in ("w0", "w1"):
        load(store, workspace)


def test_a_flipped_bit_anywhere_is_found_by_verify_and_by_loading_what_it_hits(
    store: LocalStore, tmp_path: Path
) -> None:
    choose = random.Random(0)
    for path in data_files(tmp_path):
        name = path.relative_to(tmp_path).as_posix()
        whole = path.read_bytes()
        data_begin = 8 + int.from_bytes(whole[:8], "little") if name.endswith("safetensors") else 0
        positions = {0, 7, 8, len(whole) - 1, data_begin, *choose.sample(range(len(whole)), 25)}
        for position in positions:
            damaged = bytearray(whole)
            damaged[position] ^= 1 << choose.randrange(8)
            path.write_bytes(damaged)
            report = verify(store, read_manifest(store))
            assert report.damages, (name, position)
            assert {damage.file for damage in report.damages} == {name}
            if position >= data_begin:
                with pytest.raises(CorruptCheckpointError, match=name.replace(".", r"\.")):
                    everything(store)
            else:
                everything(store)  # a pack's header is for other tools; blobs are found without it
        path.write_bytes(whole)


@pytest.mark.parametrize("change", ["truncate", "extend", "zero", "empty", "remove"])
def test_a_file_that_is_not_what_was_written_is_named(store: LocalStore, tmp_path: Path, change: str) -> None:
    for path in data_files(tmp_path):
        whole = path.read_bytes()
        if change == "remove":
            path.unlink()
        else:
            half = len(whole) // 2
            zeroed = whole[:half] + bytes(len(whole) - half)
            path.write_bytes({"truncate": whole[:-1], "extend": whole + b"\0", "zero": zeroed, "empty": b""}[change])
        name = path.relative_to(tmp_path).as_posix()
        with pytest.raises(CorruptCheckpointError, match=name.replace(".", r"\.")) as caught:
            everything(store)
        assert caught.value.fields["file"] == name
        assert {damage.file for damage in verify(store, read_manifest(store)).damages} == {name}
        path.write_bytes(whole)
    everything(store)


@pytest.mark.parametrize("suffix", [".index", "-p00000.safetensors"])
def test_swapped_files_are_found(store: LocalStore, tmp_path: Path, suffix: str) -> None:
    one, two = (tmp_path / f"data/s1/w0000{ordinal}{suffix}" for ordinal in range(2))
    first, second = one.read_bytes(), two.read_bytes()
    one.write_bytes(second)
    two.write_bytes(first)
    for workspace in ("w0", "w1"):
        with pytest.raises(CorruptCheckpointError, match=f"{workspace.replace('w', 'w0000')}{suffix}"):
            load(store, workspace)
    assert len({damage.file for damage in verify(store, read_manifest(store)).damages}) == 2


def test_a_sound_index_that_is_not_the_one_the_manifest_means_is_refused(store: LocalStore) -> None:
    # Same size, its own digest right: only the hash in the manifest tells.
    index = read_index(store, read_manifest(store), "w0")
    store.replace(INDEX_FILE, encode_index(dataclasses.replace(index, state={"n": 2})))
    with pytest.raises(CorruptCheckpointError, match=r"w00000\.index, workspace 'w0': expected hash .*, found hash"):
        load(store)
    (damage,) = verify(store, read_manifest(store)).damages
    assert (damage.file, damage.workspace, damage.blob) == (INDEX_FILE, "w0", None)


def test_blobs_beside_a_damaged_one_still_load(store: LocalStore, tmp_path: Path) -> None:
    index = read_index(store, read_manifest(store), "w0")
    chunk = index.blobs[0].chunks[0]
    with (tmp_path / index.packs[chunk.pack].path).open("r+b") as file:
        file.seek(chunk.offset + 5)
        file.write(b"\xaa\xbb\xcc")
    with pytest.raises(CorruptCheckpointError, match=rf"blob 'a', offset {chunk.offset}: expected .*hash .*found hash"):
        load(store)
    found = load(store, select=lambda entry: entry.name != "a")
    assert [blob.name for blob in found.blobs] == ["b", "s", "v", "u"]
    everything_else = load(store, "w1")
    assert len(everything_else.blobs) == 5


def test_verify_lists_every_damaged_blob_with_file_and_offset(store: LocalStore, tmp_path: Path) -> None:
    hit: set[tuple[str, str, str, str, int]] = set()
    for workspace in ("w0", "w1"):
        index = read_index(store, read_manifest(store), workspace)
        for blob in (index.blobs[0], index.blobs[1], index.blobs[3]):
            chunk = blob.chunks[0]
            path = index.packs[chunk.pack].path
            with (tmp_path / path).open("r+b") as file:
                file.seek(chunk.offset)
                before = file.read(1)[0]
                file.seek(chunk.offset)
                file.write(bytes([before ^ 255]))
            hit.add((workspace, blob.scope, blob.name, path, chunk.offset))
    seen: list[tuple[int, int]] = []
    report = verify(store, read_manifest(store), progress=lambda done, total: seen.append((done, total)))
    assert {(d.workspace, d.scope, d.blob, d.file, d.offset) for d in report.damages} == hit
    assert len(report.damages) == 6
    assert not report.is_sound
    assert report.blob_count == 10
    total = read_manifest(store).tensor_bytes
    assert seen[-1] == (total, total)


def test_a_header_that_disagrees_with_the_index_is_found(store: LocalStore) -> None:
    index = read_index(store, read_manifest(store), "w0")
    changes: list[Callable[[BlobEntry], BlobEntry]] = [
        lambda blob: dataclasses.replace(blob, key="other"),
        lambda blob: dataclasses.replace(blob, shape=(4, 5)),
        lambda blob: dataclasses.replace(blob, dtype="int64", stored_dtype="I64"),
    ]
    for change in changes:
        recommit(store, dataclasses.replace(index, blobs=(change(index.blobs[0]), *index.blobs[1:])))
        (damage,) = verify(store, read_manifest(store)).damages
        assert (damage.blob, damage.file) == ("a", index.packs[index.blobs[0].chunks[0].pack].path)
        assert "header" in damage.problem


def test_an_index_that_contradicts_the_manifest_is_refused(store: LocalStore) -> None:
    manifest = read_manifest(store)
    index = read_index(store, manifest, "w0")
    with pytest.raises(CorruptCheckpointError, match="save_id"):
        recommit(store, dataclasses.replace(index, save_id="other"))
    with pytest.raises(CorruptCheckpointError, match="workspace"):
        recommit(store, dataclasses.replace(index, workspace="other"))
    with pytest.raises(CorruptCheckpointError, match="number of blobs"):
        recommit(store, index, check=lambda index: dataclasses.replace(index, blobs=index.blobs[:-1]))
    foreign = dataclasses.replace(index.packs[0], path="data/s9/w00000-p00000.safetensors")
    with pytest.raises(CorruptCheckpointError, match="pack data/s9"):
        recommit(store, index, check=lambda index: dataclasses.replace(index, packs=(*index.packs, foreign)))


def test_claimed_sizes_are_compared_with_real_files_before_anything_is_allocated(store: LocalStore) -> None:
    index = read_index(store, read_manifest(store), "w0")
    chunk = dataclasses.replace(index.blobs[0].chunks[0], byte_count=16 * 2**20)
    count = 2**16
    huge = dataclasses.replace(
        index.blobs[0],
        shape=(count * 2**21,),
        byte_count=count * 2**24,
        key="",
        chunks=tuple([chunk] * count),
    )
    pack = dataclasses.replace(index.packs[0], byte_count=2**60)
    hostile = dataclasses.replace(index, packs=(pack, *index.packs[1:]), blobs=(huge,))
    hostile = decode_index(encode_index(hostile), file=INDEX_FILE)

    def allocate(shape: tuple[int, ...], dtype: Any) -> Any:
        raise AssertionError("allocated before the sizes were checked")

    tracemalloc.start()
    try:
        with pytest.raises(CorruptCheckpointError, match=rf"expected a pack of {2**60} bytes"):
            load_workspace(store, hostile, allocate=allocate)
        assert tracemalloc.get_traced_memory()[1] < 2**22
    finally:
        tracemalloc.stop()


def test_a_string_tensor_whose_payload_has_another_shape_is_refused(store: LocalStore) -> None:
    index = read_index(store, read_manifest(store), "w0")
    blobs = tuple(dataclasses.replace(b, shape=(3,)) if b.name == "s" else b for b in index.blobs)
    with pytest.raises(CorruptCheckpointError, match="string tensor of shape"):
        load_workspace(store, dataclasses.replace(index, blobs=blobs))


# --- the reader in 50 lines --------------------------------------------------------------------------------------

RUN_EXAMPLE = """
import hashlib, json, runpy, sys
for name in sys.argv[3].split(","):
    sys.modules[name] = None  # importing it fails
read = runpy.run_path(sys.argv[1])["read"]
def described(value):
    if hasattr(value, "tobytes"):
        return [str(value.dtype), list(value.shape), hashlib.sha256(value.tobytes()).hexdigest()]
    return repr(value)
print(json.dumps([[list(key), described(value)] for key, value in read(sys.argv[2]).items()]))
"""


@pytest.mark.parametrize("has_ml_dtypes", [True, False])
def test_the_example_reads_every_kind_without_blobspace(tmp_path: Path, has_ml_dtypes: bool) -> None:
    numbers = np.random.default_rng(0)
    blobs: list[BlobSnapshot] = [*content().blobs, tensor("0-d", np.array(2.5)), tensor("empty", np.empty((0, 3)))]
    for name, dtype in TENSOR_DTYPES.items():
        blobs.append(tensor(name, numbers.integers(0, 2, 6 * dtype.itemsize, np.uint8).view(dtype).reshape(2, 3)))
    store = LocalStore(tmp_path)
    save(store, snapshots=[content("older")], save_id="s0", step=0)
    save(store, snapshots=[dataclasses.replace(content(), blobs=tuple(blobs))])
    hidden = "blobspace,safetensors" + ("" if has_ml_dtypes else ",ml_dtypes")
    done = subprocess.run(
        [sys.executable, "-c", RUN_EXAMPLE, str(EXAMPLE), str(tmp_path), hidden],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = {tuple(key): value for key, value in json.loads(done.stdout)}
    expected: dict[tuple[str, str, str], Any] = {}
    for blob in blobs:
        key = ("w0", blob.scope, blob.name)
        if blob.array is not None:
            dtype = blob.array.dtype.name
            if not has_ml_dtypes and ("float8" in dtype or dtype == "bfloat16"):
                dtype = f"|V{blob.array.itemsize}"
            expected[key] = [dtype, list(blob.array.shape), hashlib.sha256(blob.array.tobytes()).hexdigest()]
    expected["w0", "", "s"] = repr([[2], [b"x\0", b"\xff"]])
    expected["w0", "", "v"] = repr({"k": [1]})
    expected["w0", "", "u"] = repr(None)
    assert found == expected


def test_the_example_prints_the_newest_checkpoint_and_notices_damage(store: LocalStore, tmp_path: Path) -> None:
    def run() -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(EXAMPLE), str(tmp_path)]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)

    assert "'w0' '' 'a' float64 (20,)" in run().stdout
    chunk = read_index(store, read_manifest(store), "w0").blobs[0].chunks[0]
    with (tmp_path / PACK_FILE).open("r+b") as file:
        file.seek(chunk.offset)
        file.write(b"\1\2\3\4")
    assert "is damaged at" in run().stderr


def test_the_example_has_at_most_50_lines() -> None:
    assert len(EXAMPLE.read_text().splitlines()) <= 50
