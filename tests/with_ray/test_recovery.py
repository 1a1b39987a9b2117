"""Workspaces, coordinators and drivers that are killed with SIGKILL, and what is true afterwards."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import ray
from support import Launch, content, prepare, wait_until

from blobspace.cluster import Cluster, clusters
from blobspace.ops import Net, NotFoundError, WorkspaceLostError
from blobspace.workspace_actors import WorkspaceHandle
from blobspace.workspace_actors.ray_errors import unwrapped


def kill(cluster: Cluster, name: str) -> int:
    member = next(member for member in cluster.view().members if member.name == name)
    os.kill(member.pid, signal.SIGKILL)
    return member.pid


def meeting_points() -> set[int]:
    """Return the processes of all meeting points of this session's Ray, which shows an actor's class as its title."""
    (raylet,) = ray._private.worker._global_node.all_processes["raylet"]
    found: set[int] = set()
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            is_ours = f"PPid:\t{raylet.process.pid}\n" in (process / "status").read_text()
            if is_ours and b"ray::MeetingPoint" in (process / "cmdline").read_bytes():
                found.add(int(process.name))
    return found


def long_net(workspace: WorkspaceHandle) -> None:
    """Create a net whose one iteration lasts some seconds."""
    workspace.feed_blob("a", np.ones((1500, 1500), np.float32))
    net = Net("long")
    for _ in range(60):
        net.MatMul(["a", "a"], "b")
    workspace.create_net(net)


def test_a_killed_workspace_is_named_and_recovery_is_bit_identical(launch: Launch) -> None:
    cluster = launch(3)
    prepare(cluster)
    cluster.run_net("train", 5)
    cluster.checkpoint(5)
    cluster.run_net("train", 20)
    quiet = content(cluster)

    cluster.restore(5)
    handle = cluster.workspaces["w1"]
    running = {name: w.submit("run_net", "train", 10**7) for name, w in cluster.workspaces.items()}
    wait_until(lambda: int(cluster.workspaces["w0"].peek_blob("it")[0]) > 5)
    pid = kill(cluster, "w1")
    for name, reference in running.items():
        with pytest.raises(ray.exceptions.RayError) as caught:
            ray.get(reference, timeout=30)
        error = unwrapped(caught.value, name)
        assert isinstance(error, WorkspaceLostError)
        assert "w1" in str(error) or name == "w1"
    with pytest.raises(WorkspaceLostError, match=r"'w1' on node \w+ is lost(.|\n)*last committed step is 5"):
        handle.fetch_blob("x")
    with pytest.raises(WorkspaceLostError, match="'w1'"):
        cluster.blob_names()
    with pytest.raises(WorkspaceLostError, match="'w1'"):
        cluster.checkpoint(6)

    report = cluster.recover()
    assert report.recreated == ("w1",)
    assert report.step == 5
    members = {member.name: member for member in cluster.view().members}
    assert members["w1"].pid != pid
    assert handle.fetch_blob("it").tolist() == [5]
    cluster.run_net("train", 20)
    assert content(cluster) == quiet
    cluster.checkpoint(25)


def test_recovery_without_a_checkpoint_says_so_and_changes_nothing(launch: Launch) -> None:
    cluster = launch(2)
    cluster.workspaces["w0"].feed_blob("x", 7)
    kill(cluster, "w1")
    with pytest.raises(NotFoundError, match="no checkpoint"):
        cluster.recover()
    assert cluster.workspaces["w0"].fetch_blob("x") == 7


def test_recovery_with_nobody_lost_takes_all_back(launch: Launch) -> None:
    cluster = launch(2)
    cluster.workspaces["w0"].feed_blob("x", 1)
    cluster.checkpoint(1)
    cluster.workspaces["w0"].feed_blob("x", 2)
    assert cluster.recover().recreated == ()
    assert cluster.workspaces["w0"].fetch_blob("x") == 1


def test_work_queued_behind_a_loss_does_not_hold_up_recovery(launch: Launch) -> None:
    cluster = launch(3)
    prepare(cluster)
    cluster.checkpoint(0)
    queued = [w.submit("run_net", "train", 50) for _ in range(40) for w in cluster.workspaces.values()]
    kill(cluster, "w2")
    report = cluster.recover(deadline_s=60)
    assert report.recreated == ("w2",)
    ray.wait(queued, num_returns=len(queued), timeout=60)
    # Whatever of it ran afterwards ran on the restored content, on those alone that had it queued.
    cluster.recover()
    cluster.run_net("train", 2)
    assert [int(w.fetch_blob("it")[0]) for w in cluster.workspaces.values()] == [2, 2, 2]


def test_a_lost_meeting_point_is_named_and_made_anew(launch: Launch) -> None:
    others = meeting_points()
    cluster = launch(2)
    prepare(cluster)
    cluster.run_net("train", 2)
    cluster.checkpoint(2)
    (pid,) = meeting_points() - others
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(WorkspaceLostError, match="meeting point"):
        cluster.run_net("train", 1)
    assert cluster.recover().step == 2
    cluster.run_net("train", 1)
    assert cluster.workspaces["w1"].fetch_blob("it").tolist() == [3]


def test_a_workspace_killed_while_it_is_to_freeze_fails_the_checkpoint_by_name(launch: Launch) -> None:
    cluster = launch(2)
    long_net(cluster.workspaces["w1"])
    cluster.workspaces["w1"].submit("run_net", "long")
    saving = cluster._coordinator.checkpoint.remote(1, cluster.view().checkpoint_root, {}, False, 60.0)
    held = cluster.workspaces["w0"].submit("feed_blob", "x", 1)
    assert ray.wait([held], timeout=1.0)[0] == [], "w0 should be held by the barrier"
    kill(cluster, "w1")
    with pytest.raises(WorkspaceLostError, match=r"checkpoint ended because workspace 'w1' was lost"):
        ray.get(saving, timeout=30)
    ray.get(held, timeout=30)
    assert cluster.checkpoints() == []


def test_a_restarted_coordinator_takes_over_the_workspaces_that_live(launch: Launch) -> None:
    cluster = launch(2, detached=True)
    prepare(cluster)
    cluster.run_net("train", 3)
    cluster.checkpoint(3)
    before = cluster.view()
    ray.kill(cluster._coordinator, no_restart=False)

    def answers() -> bool:
        try:
            return Cluster.attach(cluster.name).view().generation > before.generation
        except (ray.exceptions.RayError, WorkspaceLostError):
            return False

    wait_until(answers, seconds=60)
    after = Cluster.attach(cluster.name)
    assert [member.pid for member in after.view().members] == [member.pid for member in before.members]
    assert after.view().last_committed_step == 3
    after.run_net("train", 2)
    assert after.workspaces["w1"].fetch_blob("it").tolist() == [5]
    after.checkpoint(5)
    after.restore(3)
    assert after.workspaces["w0"].fetch_blob("it").tolist() == [3]


def test_a_coordinator_killed_in_a_barrier_does_not_leave_workspaces_standing_still(launch: Launch) -> None:
    cluster = launch(2, detached=True)
    long_net(cluster.workspaces["w1"])
    running = cluster.workspaces["w1"].submit("run_net", "long")
    saving = cluster._coordinator.checkpoint.remote(1, cluster.view().checkpoint_root, {}, False, 600.0)
    held = cluster.workspaces["w0"].submit("feed_blob", "x", 1)
    assert ray.wait([held], timeout=1.0)[0] == [], "w0 should be held by the barrier"
    ray.kill(cluster._coordinator, no_restart=False)
    with pytest.raises(ray.exceptions.RayError):
        ray.get(saving, timeout=30)
    ray.get(held, timeout=60)
    ray.get(running, timeout=60)
    assert cluster.checkpoints() == []
    Cluster.attach(cluster.name).checkpoint(2)


def test_a_detached_cluster_outlives_its_killed_driver_and_an_attached_one_does_not(
    local_ray: None, tmp_path: object
) -> None:
    script = textwrap.dedent(
        """
        import sys
        from blobspace.cluster import Cluster
        keep = Cluster.launch({"name": "outlives", "workspaces": [{"name": "w"}]}, detached=True)
        keep.workspaces["w"].feed_blob("x", 42)
        ends = Cluster.launch({"name": "ends", "workspaces": [{"name": "w"}]})
        print("ready", flush=True)
        sys.stdin.read()
        """
    )
    address = ray.get_runtime_context().gcs_address
    driver = subprocess.Popen(
        [sys.executable, "-c", script],
        env={**os.environ, "RAY_ADDRESS": address, "RAY_AUTH_MODE": "disabled"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert driver.stdout is not None
        assert any("ready" in line for line in driver.stdout)
        assert {"outlives", "ends"} <= set(clusters())
        driver.kill()
        driver.wait()
        wait_until(lambda: "ends" not in clusters())
        with_it = Cluster.attach("outlives")
        assert with_it.workspaces["w"].fetch_blob("x") == 42
        with_it.shut_down()
    finally:
        driver.kill()
        driver.wait()
        for stream in (driver.stdin, driver.stdout):
            if stream is not None:
                stream.close()
