"""Whether names can be asked for while a long net runs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial

import numpy as np
import ray

from blobspace.cluster import Cluster
from blobspace.ops import Net
from blobspace.workspace_actors.handle import WorkspaceHandle

from .clusters import launched, local_ray
from .measuring import Row, Section, Settings, timed

_TARGET_MS = 50.0
_PAUSE_S = 0.02
_TINY = 1000


def _big_net() -> Net:
    net = Net("big")
    for index in range(4):
        net.add("MatMul", ["m", "m"], [f"big{index}"])
    return net


def _tiny_net() -> Net:
    net = Net("tiny")
    for index in range(_TINY):
        net.add("Add", ["v", "v"], [f"tiny{index}"])
    return net


def _iterations(handle: WorkspaceHandle, net: str, seconds: float) -> int:
    """Return how many iterations last that long."""
    handle.run_net(net)
    count = 1
    while True:
        took = timed(partial(handle.run_net, net, count))
        if took > seconds / 20:
            return max(1, round(count * seconds / took))
        count *= 4


def _ask(question: Callable[[], object], while_waiting: Callable[[], bool]) -> list[float]:
    times: list[float] = []
    while while_waiting():
        times.append(timed(question) * 1e3)
        time.sleep(_PAUSE_S)
    return times


def _row(what: str, times: list[float], idle: list[float], target: float | None) -> Row:
    return Row(
        what=what,
        value=statistics.median(times),
        unit="ms",
        target=target,
        absolute=f"max {max(times):.1f} ms, {len(times)} calls; idle {statistics.median(idle):.1f}/{max(idle):.1f} ms",
    )


def _idle(question: Callable[[], object], count: int) -> list[float]:
    left = iter(range(count))
    return _ask(question, lambda: next(left, None) is not None)


def _busy(question: Callable[[], object], handle: WorkspaceHandle, net: str, iterations: int) -> list[float]:
    running = handle.submit("run_net", net, iterations=iterations)
    time.sleep(0.1)
    times = _ask(question, lambda: not ray.wait([running], timeout=0)[0])
    ray.get(running)
    return times


def run(settings: Settings) -> list[Row]:
    seconds = 2.0 if settings.is_quick else 10.0
    with local_ray(), launched("latency") as cluster:
        handle = cluster.workspaces["w0"]
        size = 1024
        handle.feed_blob("m", np.full((size, size), 1e-3, np.float32))
        handle.feed_blob("v", np.ones(4, np.float32))
        handle.create_net(_big_net())
        handle.create_net(_tiny_net())
        return [row for net in ("big", "tiny") for row in _net_rows(cluster, net, seconds)]


def _net_rows(cluster: Cluster, net: str, seconds: float) -> list[Row]:
    handle = cluster.workspaces["w0"]
    described = {"big": "4 MatMuls of 1024 x 1024", "tiny": f"{_TINY} tiny operators"}[net]
    iterations = _iterations(handle, net, seconds)
    questions: dict[str, Callable[[], object]] = {
        "handle.blobs()": handle.blobs,
        "cluster.blob_names()": cluster.blob_names,
    }
    rows: list[Row] = []
    for name, question in questions.items():
        idle = _idle(question, 50)
        busy = _busy(question, handle, net, iterations)
        rows.append(_row(f"{name} while {described} run for {seconds:g} s, median", busy, idle, _TARGET_MS))
    return rows


SECTION = Section(
    name="latency",
    title="Inspection while a long net runs",
    bound="An actor call; beside a net of tiny operators also Python's GIL, which changes hands every 5 ms, and does "
    "so a few times a call.",
    run=run,
)
