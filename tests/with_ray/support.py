"""What the tests with Ray share: waiting on conditions, and a cluster whose state is wrong at once if one bit is."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from blobspace.cluster import Cluster
from blobspace.ops import Net

Launch = Callable[..., Cluster]


def wait_until(condition: Callable[[], bool], *, seconds: float = 30.0) -> None:
    """Ask again and again until the condition holds; fail at the deadline."""
    ends_at = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < ends_at, "the condition did not come true in time"


def training_net() -> Net:
    """Every workspace draws its own numbers, and all add them up: wrong at once if anything is not restored."""
    net = Net("train")
    net.UniformFill([], "noise", shape=[4])
    net.Allreduce(["noise"], ["sum"])
    net.WeightedSum(["x", "one", "sum", "one"], "x")
    net.Iter("it", "it")
    return net


def prepare(cluster: Cluster) -> None:
    for rank, workspace in enumerate(cluster.workspaces.values()):
        workspace.feed_blob("x", np.full(4, rank, np.float32))
        workspace.feed_blob("one", np.ones(1, np.float32))
        workspace.feed_blob("it", np.zeros(1, np.int64))
        workspace.feed_blob("names", ["a", b"\xff"])
        workspace.feed_blob("plain", {"rank": rank})
        workspace.create_blob("empty")
    cluster.create_net(training_net())


def content(cluster: Cluster) -> dict[str, bytes]:
    return {
        f"{name}/{blob}": workspace.fetch_blob(blob).tobytes()
        for name, workspace in cluster.workspaces.items()
        for blob in ("x", "noise", "sum", "it")
    }
