"""The driver: a loop that trains, checkpoints, and gets over losses, as a user would write it.

It remembers nothing. Where training stands is read from the cluster, and what the cluster does not have any more
from the newest checkpoint; so it does not matter which driver goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from typing import Any, Protocol

from ...ops.errors import BlobspaceError, WorkspaceLostError
from ..client import Cluster
from .training import ACCURACY, STEP, WORKSPACES, first_net, load_digits, test_net, train_net

_NEWS_S = 0.05
_SEED = 2026
_STDIN = 0


class Tell(Protocol):
    """Takes the news: what happened, and plain values about it."""

    def __call__(self, event: str, /, **facts: Any) -> None:
        """Take one piece of news."""
        ...


def configuration(name: str, root: str | None = None) -> dict[str, Any]:
    """Return the configuration of a cluster of four workspaces. They share the machine and reserve nothing."""
    return {
        "name": name,
        "seed": _SEED,
        "checkpoint_root": root,
        "collective_deadline_s": 60,
        "workspaces": [{"name": "w{index}", "count": len(WORKSPACES)}],
    }


def prepare(cluster: Cluster) -> None:
    """Feed each workspace its shard, make the nets, and fill the parameters, alike everywhere."""
    digits = load_digits()
    handles = list(cluster.workspaces.values())
    for handle, (images, labels) in zip(handles, digits.shards, strict=True):
        handle.feed_blob("images", images)
        handle.feed_blob("labels", labels)
    handles[0].feed_blob("test_images", digits.test[0])
    handles[0].feed_blob("test_labels", digits.test[1])
    cluster.create_net(first_net())
    cluster.run_net("first")
    cluster.create_net(train_net())
    handles[0].create_net(test_net())


def train(cluster: Cluster, steps: int, tell: Tell) -> None:
    """Run that many steps in one call, and tell meanwhile how far w0 has come."""
    begin = _step_of(cluster) - _writes_of_step(cluster)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(cluster.run_net, "train", steps)
        while not wait([running], timeout=_NEWS_S).done:
            # Looking is a courtesy; if there is nothing to see any more, run_net itself says why.
            with suppress(BlobspaceError):
                tell("progress", step=begin + _writes_of_step(cluster))
        running.result()
    tell("trained", steps=steps)


def evaluate(cluster: Cluster) -> float:
    """Return the share of test images that w0 classifies right."""
    handle = cluster.workspaces[WORKSPACES[0]]
    handle.run_net("test")
    return float(handle.fetch_blob(ACCURACY))


def pids_of(cluster: Cluster) -> dict[str, int]:
    """Return the process of each workspace, as the coordinator knows it."""
    return {member.name: member.pid for member in cluster.view().members}


def drive(name: str, root: str, *, steps: int, checkpoint_every: int, tell: Tell) -> None:
    """Train up to ``steps``, from the newest checkpoint if there is one; survive lost workspaces.

    Args:
        name: The cluster's; it ends with this process.
        root: Folder of the checkpoints.
        steps: Where to stop.
        checkpoint_every: Steps between two checkpoints.
        tell: Takes the news.
    """
    with Cluster.launch(configuration(name, root)) as cluster:
        tell("launched", pids=pids_of(cluster))
        if cluster.checkpoints():
            tell("restored", step=cluster.restore().step)
        else:
            prepare(cluster)
            _checkpoint(cluster, tell)
        is_done = False
        while not is_done:
            try:
                is_done = _advance(cluster, steps, checkpoint_every, tell)
            except WorkspaceLostError as error:
                tell("lost", text=error.message, **error.fields)
                report = cluster.recover()
                tell(
                    "recovered",
                    step=report.step,
                    recreated=list(report.recreated),
                    pids=pids_of(cluster),
                    seconds=report.total_s,
                )
        tell("finished")


def _advance(cluster: Cluster, steps: int, checkpoint_every: int, tell: Tell) -> bool:
    """Train up to the next checkpoint and save it; return whether that was the last one."""
    step = _step_of(cluster)
    if step < steps:
        train(cluster, min(checkpoint_every - step % checkpoint_every, steps - step), tell)
        _checkpoint(cluster, tell)
    return step >= steps


def _checkpoint(cluster: Cluster, tell: Tell) -> None:
    accuracy = evaluate(cluster)
    report = cluster.checkpoint(_step_of(cluster))
    tell(
        "committed",
        step=report.step,
        accuracy=accuracy,
        tensor_bytes=report.tensor_bytes,
        stall_s=report.stall_s,
        seconds=report.total_s,
    )


def _writes_of_step(cluster: Cluster) -> int:
    # A blob's version counts its writes. The catalog has it at once, without a stop of the net that writes.
    (spec,) = cluster.blobs(STEP, workspace=WORKSPACES[0])
    return spec.version


def _step_of(cluster: Cluster) -> int:
    return int(cluster.workspaces[WORKSPACES[0]].fetch_blob(STEP).item())


def main(arguments: Sequence[str]) -> int:
    """Drive in a process of its own, on the Ray that RAY_ADDRESS names; the news are JSON lines on standard output."""
    parser = argparse.ArgumentParser(prog="python -m blobspace.cluster.demo driver")
    parser.add_argument("name")
    parser.add_argument("root")
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--checkpoint-every", type=int, required=True)
    options = parser.parse_args(arguments)

    def tell(event: str, /, **facts: Any) -> None:
        sys.stdout.write(json.dumps({"event": event, **facts}) + "\n")
        sys.stdout.flush()

    threading.Thread(target=_end_with_supervisor, daemon=True).start()
    drive(options.name, options.root, steps=options.steps, checkpoint_every=options.checkpoint_every, tell=tell)
    return 0


def _end_with_supervisor() -> None:
    # Whatever ends the supervisor also closes our standard input, and takes our Ray away: nothing is left to do.
    # Not by way of sys.stdin, whose lock a daemon thread would hold while the interpreter ends.
    while os.read(_STDIN, 1):
        pass
    os._exit(1)
