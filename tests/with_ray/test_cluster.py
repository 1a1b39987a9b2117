"""Launching, attaching, listing, placing."""

from __future__ import annotations

import os

import numpy as np
import pytest
import ray
from support import Launch

from blobspace.cluster import Cluster, clusters
from blobspace.ops import ConflictError, DeadlineError, InvalidInputError, Net, NotFoundError
from blobspace.workspace_actors import BlobSpec


def test_blob_names_are_those_of_every_workspace_and_child(launch: Launch) -> None:
    cluster = launch(2)
    assert cluster.blob_names() == {"w0": [], "w1": []}
    cluster.workspaces["w0"].feed_blob("b", 1)
    cluster.workspaces["w0"].feed_blob("a", 1)
    cluster.workspaces["w1"].child("inner", create=True).feed_blob("c", 1)
    expected = {"w0": ["a", "b"], "w1": [], "w1:inner": ["c"]}
    assert cluster.blob_names() == expected
    assert cluster.blob_names() == expected
    assert Cluster.attach(cluster.name).blob_names() == expected
    cluster.workspaces["w0"].remove_blob("a")
    assert cluster.blob_names() == {"w0": ["b"], "w1": [], "w1:inner": ["c"]}


def test_what_a_caller_does_to_the_names_does_not_change_the_catalog(launch: Launch) -> None:
    cluster = launch(1)
    cluster.workspaces["w0"].feed_blob("a", 1)
    with pytest.raises(TypeError, match=r"list\(names\)"):
        cluster.blob_names()["w0"].clear()
    cluster.blob_names().clear()
    assert cluster.blob_names() == {"w0": ["a"]}


def test_specs_say_what_each_blob_is(launch: Launch) -> None:
    cluster = launch(2)
    cluster.workspaces["w0"].feed_blob("fc_w", np.zeros((2, 3), np.float32))
    cluster.workspaces["w1"].feed_blob("fc_w", np.zeros((2, 3), np.float32))
    cluster.workspaces["w1"].feed_blob("note", "text")
    specs = cluster.blobs("fc_*")
    assert [(spec.workspace, spec.name, spec.dtype, spec.shape, spec.nbytes) for spec in specs] == [
        ("w0", "fc_w", "float32", (2, 3), 24),
        ("w1", "fc_w", "float32", (2, 3), 24),
    ]
    (note,) = cluster.blobs("note", workspace="w1")
    assert isinstance(note, BlobSpec)
    assert (note.kind.value, note.nbytes) == ("value", 0)


def test_a_second_cluster_of_the_same_name_is_refused(launch: Launch) -> None:
    cluster = launch(1)
    with pytest.raises(ConflictError, match="exists already"):
        Cluster.launch({"name": cluster.name, "workspaces": [{"name": "other"}]})
    assert cluster.name in clusters()


def test_attaching_to_what_is_not_there_says_what_is(launch: Launch) -> None:
    cluster = launch(1)
    with pytest.raises(NotFoundError, match=cluster.name):
        Cluster.attach("nobody")


def test_two_clusters_do_not_see_each_other(launch: Launch) -> None:
    one, other = launch(1), launch(1)
    one.workspaces["w0"].feed_blob("x", 1)
    assert other.blob_names() == {"w0": []}


def test_the_end_of_a_cluster_leaves_no_actor_behind(local_ray: None) -> None:
    with Cluster.launch({"name": "brief", "workspaces": [{"name": "w"}]}) as cluster:
        actor = cluster.view().members[0].actor
    assert "brief" not in clusters()
    with pytest.raises(ray.exceptions.RayActorError):
        ray.get(actor.memory.remote(), timeout=30)


def test_an_unknown_workspace_is_named_with_those_there_are(launch: Launch) -> None:
    cluster = launch(2)
    with pytest.raises(NotFoundError, match=r"no workspace 'x'.*w0, w1"):
        _ = cluster.workspaces["x"]


def test_a_gpu_request_where_there_is_none_is_refused_with_what_the_nodes_have(local_ray: None) -> None:
    with pytest.raises(InvalidInputError, match=r"No node can hold 'w' \(1 GPU\)(.|\n)*4 CPU"):
        Cluster.launch({"name": "no-gpu", "workspaces": [{"name": "w", "num_gpus": 1}]})
    assert "no-gpu" not in clusters()


def test_a_cpu_workspace_sees_no_gpu(launch: Launch) -> None:
    member = launch(1).view().members[0]
    assert member.device_type == "cpu"
    seen = member.actor.__ray_call__.remote(lambda _: os.environ.get("CUDA_VISIBLE_DEVICES"))
    assert ray.get(seen) == ""


def test_more_than_all_nodes_have_is_refused_at_once(local_ray: None) -> None:
    with pytest.raises(InvalidInputError, match="ask for 6 CPU together"):
        Cluster.launch({"name": "greedy", "workspaces": [{"name": "w{index}", "count": 3, "num_cpus": 2}]})


def test_what_others_use_is_waited_for_until_the_deadline_and_then_named(launch: Launch) -> None:
    launch(1, num_cpus=3)
    with pytest.raises(
        DeadlineError, match=r"1 workspaces were not started within 2 s: 'late0'(.|\n)*Free at the moment"
    ):
        Cluster.launch(
            {"name": "late", "placement_deadline_s": 2, "workspaces": [{"name": "late{index}", "num_cpus": 3}]}
        )
    assert "late" not in clusters()


def test_a_label_that_no_node_has_is_refused(local_ray: None) -> None:
    with pytest.raises(InvalidInputError, match="label zone=moon"):
        Cluster.launch({"name": "moon", "workspaces": [{"name": "w", "labels": {"zone": "moon"}}]})


def test_an_unknown_key_in_the_configuration_is_refused_with_the_legal_ones(local_ray: None) -> None:
    with pytest.raises(InvalidInputError, match=r"num_cpu: unknown key; expected one of name, count, num_cpus"):
        Cluster.launch({"workspaces": [{"name": "w", "num_cpu": 1}]})


def test_allreduce_adds_up_in_rank_order_and_broadcast_shares(launch: Launch) -> None:
    cluster = launch(3)
    values = [np.float32(1e8), np.float32(1.0), np.float32(-1e8)]
    for workspace, value in zip(cluster.workspaces.values(), values, strict=True):
        workspace.feed_blob("x", np.array([value]))
    net = Net("meet")
    net.Allreduce(["x"], ["sum"])
    net.Allreduce(["x"], ["mean"], reduce="mean")
    net.Broadcast(["x"], ["shared"], root=1)
    cluster.create_net(net)
    cluster.run_net("meet", iterations=2)
    expected = (values[0] + values[1]) + values[2]
    for workspace in cluster.workspaces.values():
        np.testing.assert_array_equal(workspace.fetch_blob("sum"), [expected])
        np.testing.assert_array_equal(workspace.fetch_blob("mean"), [expected / np.float32(3)])
        np.testing.assert_array_equal(workspace.fetch_blob("shared"), [1.0])


def test_a_collective_that_others_do_not_join_ends_with_their_names(launch: Launch) -> None:
    cluster = launch(3, config={"collective_deadline_s": 1.0})
    for workspace in cluster.workspaces.values():
        workspace.feed_blob("x", np.ones(1, np.float32))
    with pytest.raises(DeadlineError, match="in vain for w1, w2"):
        cluster.workspaces["w0"].run_operator("Allreduce", ["x"], ["y"])
    # The one that waited has taken its iteration back, so all still agree on how far they are.
    net = Net("meet")
    net.Allreduce(["x"], ["y"])
    cluster.create_net(net)
    cluster.run_net("meet")
    assert cluster.workspaces["w2"].fetch_blob("y")[0] == 3


def test_members_that_bring_different_things_to_a_collective_are_told(launch: Launch) -> None:
    cluster = launch(2, config={"collective_deadline_s": 20.0})
    cluster.workspaces["w0"].feed_blob("x", np.ones(1, np.float32))
    cluster.workspaces["w1"].feed_blob("x", np.ones(2, np.float32))
    net = Net("meet")
    net.Allreduce(["x"], ["y"])
    cluster.create_net(net)
    with pytest.raises(InvalidInputError, match="do not agree"):
        cluster.run_net("meet")
