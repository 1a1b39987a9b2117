"""Cluster-wide checkpoints: what comes back, what is refused, and that a refusal changes nothing."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import ray
import xxhash
from safetensors import safe_open
from support import Launch, content, prepare, wait_until

from blobspace.ops import (
    ConflictError,
    CorruptCheckpointError,
    DeadlineError,
    InvalidInputError,
    Net,
    NotFoundError,
    StorageError,
)


def test_a_restored_cluster_goes_on_bit_by_bit(launch: Launch, tmp_path: Path) -> None:
    cluster = launch(3)
    prepare(cluster)
    cluster.run_net("train", 5)
    report = cluster.checkpoint(5, metadata={"note": "five"})
    assert (report.step, report.workspace_count, report.blob_count) == (5, 3, 3 * 8)
    names = cluster.blob_names()
    cluster.run_net("train", 7)
    quiet = content(cluster)

    cluster.workspaces["w1"].remove_blob("x")
    cluster.workspaces["w2"].feed_blob("stray", 1)
    cluster.workspaces["w2"].delete_net("train")
    assert cluster.restore(5).step == 5
    assert cluster.blob_names() == names
    assert cluster.workspaces["w0"].fetch_blob("plain") == {"rank": 0}
    assert cluster.workspaces["w1"].fetch_blob("names").tolist() == [b"a", b"\xff"]
    with pytest.raises(NotFoundError, match="uninitialized"):
        cluster.workspaces["w1"].fetch_blob("empty")
    cluster.run_net("train", 7)
    assert content(cluster) == quiet

    fresh = launch(3, config={"checkpoint_root": cluster.view().checkpoint_root})
    fresh.restore()
    fresh.run_net("train", 7)
    assert content(fresh) == quiet
    assert [summary.step for summary in fresh.checkpoints()] == [5]


def test_a_checkpoint_in_the_middle_of_a_net_stops_all_after_the_same_iteration(launch: Launch) -> None:
    cluster = launch(3)
    prepare(cluster)
    references = [workspace.submit("run_net", "train", 400) for workspace in cluster.workspaces.values()]
    cluster.checkpoint(1)
    ray.get(references)
    end = content(cluster)
    cluster.restore(1)
    iterations = {int(workspace.fetch_blob("it")[0]) for workspace in cluster.workspaces.values()}
    assert len(iterations) == 1
    (done,) = iterations
    assert 0 <= done <= 400
    cluster.run_net("train", 400 - done)
    assert content(cluster) == end


def test_every_pack_opens_with_the_safetensors_library(launch: Launch) -> None:
    cluster = launch(2)
    prepare(cluster)
    root = Path(cluster.checkpoint(1).root)
    packs = sorted(root.glob("data/*/*.safetensors"))
    assert len(packs) == 2
    for rank, pack in enumerate(packs):
        with safe_open(pack, framework="numpy") as tensors:
            np.testing.assert_array_equal(tensors.get_tensor("x"), np.full(4, rank, np.float32))


def test_a_step_is_not_saved_twice_unless_it_is_to_be_replaced(launch: Launch) -> None:
    cluster = launch(1)
    cluster.workspaces["w0"].feed_blob("x", 1)
    cluster.checkpoint(3)
    cluster.workspaces["w0"].feed_blob("x", 2)
    with pytest.raises(ConflictError, match="Step 3 has a checkpoint already"):
        cluster.checkpoint(3)
    cluster.restore(3)
    assert cluster.workspaces["w0"].fetch_blob("x") == 1
    cluster.workspaces["w0"].feed_blob("x", 2)
    cluster.checkpoint(3, replace=True)
    cluster.workspaces["w0"].feed_blob("x", 3)
    cluster.restore(3)
    assert cluster.workspaces["w0"].fetch_blob("x") == 2


def test_writes_after_the_checkpoint_do_not_leak_into_it(launch: Launch) -> None:
    cluster = launch(1)
    w = cluster.workspaces["w0"]
    w.feed_blob("x", np.zeros(2**20, np.float32))
    w.feed_blob("one", np.ones(2**20, np.float32))
    net = Net("count")
    net.Add(["x", "one"], "x")
    w.create_net(net)
    running = w.submit("run_net", "count", 300)
    cluster.checkpoint(1)
    ray.get(running)
    cluster.restore(1)
    x = w.fetch_blob("x")
    assert (x == x[0]).all()


@pytest.mark.parametrize("bad_step", [-1, 2**63, 1.5, True, "1"])
def test_a_step_that_cannot_be_is_refused(launch: Launch, bad_step: object) -> None:
    cluster = launch(1)
    with pytest.raises(InvalidInputError, match="A step is an integer"):
        cluster.checkpoint(bad_step)  # type: ignore[arg-type]


def test_an_absent_checkpoint_is_refused_with_the_steps_there_are(launch: Launch) -> None:
    cluster = launch(1)
    with pytest.raises(NotFoundError, match="no checkpoint"):
        cluster.restore()
    cluster.checkpoint(4)
    with pytest.raises(NotFoundError, match="4"):
        cluster.restore(5)


def damaged(path: Path, how: str) -> None:
    data = bytearray(path.read_bytes())
    if how == "bit":
        data[-3] ^= 4
    elif how == "cut":
        del data[len(data) // 2 :]
    path.write_bytes(data)


@pytest.mark.parametrize("how", ["bit", "cut"])
@pytest.mark.parametrize("what", ["checkpoints/*.manifest", "data/*/w00001.index", "data/*/w00001-*.safetensors"])
def test_damage_is_found_and_no_workspace_changes(launch: Launch, what: str, how: str) -> None:
    cluster = launch(2)
    for workspace in cluster.workspaces.values():
        workspace.feed_blob("x", np.zeros(100, np.float32))
    root = Path(cluster.checkpoint(1).root)
    for workspace in cluster.workspaces.values():
        workspace.feed_blob("x", np.ones(100, np.float32))
    (path,) = root.glob(what)
    damaged(path, how)
    with pytest.raises(CorruptCheckpointError, match=path.name):
        cluster.restore(1)
    for workspace in cluster.workspaces.values():
        assert workspace.fetch_blob("x").sum() == 100


def test_a_checkpoint_of_a_newer_format_is_refused_and_no_workspace_changes(launch: Launch) -> None:
    cluster = launch(1)
    cluster.workspaces["w0"].feed_blob("x", 1)
    root = Path(cluster.checkpoint(1).root)
    cluster.workspaces["w0"].feed_blob("x", 2)
    (manifest,) = root.glob("checkpoints/*.manifest")
    data = bytearray(manifest.read_bytes())
    data[8:12] = (99).to_bytes(4, "little")
    data[-16:] = xxhash.xxh3_128_digest(data[:-16])
    manifest.write_bytes(data)
    with pytest.raises(InvalidInputError, match="newer"):
        cluster.restore(1)
    assert cluster.workspaces["w0"].fetch_blob("x") == 2


def test_a_checkpoint_of_other_workspaces_is_refused(launch: Launch) -> None:
    two = launch(2)
    root = two.checkpoint(1).root
    three = launch(3)
    with pytest.raises(InvalidInputError, match="of another shape"):
        three.restore(1, root=root)


def test_a_root_that_cannot_be_written_is_refused_and_compute_goes_on(launch: Launch, tmp_path: Path) -> None:
    cluster = launch(1)
    cluster.workspaces["w0"].feed_blob("x", np.ones(3, np.float32))
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(StorageError):
        cluster.checkpoint(1, root=tmp_path / "file" / "root")
    cluster.workspaces["w0"].run_operator("Relu", ["x"], ["y"])
    cluster.checkpoint(1)


def test_a_root_that_is_a_url_is_refused(launch: Launch) -> None:
    with pytest.raises(InvalidInputError, match="URL"):
        launch(1).checkpoint(1, root="s3://bucket/path")


def test_a_workspace_that_does_not_stop_in_time_is_named(launch: Launch) -> None:
    cluster = launch(2)
    w = cluster.workspaces["w1"]
    w.feed_blob("a", np.ones((1500, 1500), np.float32))
    net = Net("long")
    for _ in range(200):
        net.MatMul(["a", "a"], "b")
    w.create_net(net)
    running = w.submit("run_net", "long")
    with pytest.raises(DeadlineError, match=r"'freeze'.*w1|Workspace 'w1' did not stop"):
        cluster.checkpoint(1, deadline_s=1.0)
    assert cluster.checkpoints() == []
    ray.get(running)
    cluster.checkpoint(1)


def test_two_checkpoints_at_once_are_not_mixed(launch: Launch) -> None:
    cluster = launch(1)
    w = cluster.workspaces["w0"]
    w.feed_blob("a", np.ones((1000, 1000), np.float32))
    net = Net("long")
    for _ in range(60):
        net.MatMul(["a", "a"], "b")
    w.create_net(net)
    running = w.submit("run_net", "long")
    first = cluster._coordinator.checkpoint.remote(1, cluster.view().checkpoint_root, {}, False, None)
    wait_until(lambda: cluster.view().operation is not None)
    with pytest.raises(ConflictError, match="busy with a checkpoint of step 1"):
        cluster.checkpoint(2)
    ray.get([first, running])
    assert [summary.step for summary in cluster.checkpoints()] == [1]


def test_a_survivor_with_no_room_for_a_second_copy_is_restored_all_the_same(launch: Launch) -> None:
    cluster = launch(1, memory_limit="5MiB")
    w = cluster.workspaces["w0"]
    w.feed_blob("x", np.arange(2**20, dtype=np.float32))
    cluster.checkpoint(1)
    w.feed_blob("x", np.zeros(2**20, np.float32))
    cluster.restore(1)
    np.testing.assert_array_equal(w.fetch_blob("x"), np.arange(2**20, dtype=np.float32))


def test_the_plain_reader_reads_what_a_cluster_wrote(launch: Launch) -> None:
    cluster = launch(2)
    prepare(cluster)
    root = cluster.checkpoint(1).root
    script = Path(__file__).parents[2] / "examples" / "read_checkpoint.py"
    done = subprocess.run([sys.executable, str(script), root], capture_output=True, text=True, check=True, cwd="/")
    assert "w1" in done.stdout
    assert "float32" in done.stdout


def test_a_full_disk_fails_the_checkpoint_and_nothing_else(launch: Launch) -> None:
    cluster = launch(1)
    w = cluster.workspaces["w0"]
    w.feed_blob("x", np.ones(2**20, np.float32))
    pid = cluster.view().members[0].pid
    before = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    # A limit on file size is how a disk can be "full" for one process alone: a write past it fails midway.
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (2**20, before[1]))
    try:
        with pytest.raises(StorageError):
            cluster.checkpoint(1)
    finally:
        resource.prlimit(pid, resource.RLIMIT_FSIZE, before)
    root = Path(cluster.view().checkpoint_root or "")
    assert not list(root.glob("data/*"))
    assert w.fetch_blob("x").sum() == 2**20
    cluster.checkpoint(1)
    assert os.listdir(root / "checkpoints") == ["00000000000000000001.manifest"]
