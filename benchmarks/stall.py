"""How long compute stands still for a checkpoint, and what copy-on-write costs afterwards.

The stall is what compute itself sees: the net notes the time at each iteration (``operators.py``), and the stall is
the longest time between two iterations while the barrier is up, less an ordinary iteration. (The coordinator's own
figure, ``CheckpointReport.stall_s``, stands beside it: it knows nothing of how soon a thread runs again that may.)
"""

from __future__ import annotations

import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import ray

from blobspace.cluster import Cluster
from blobspace.ops import Net
from blobspace.workspace_actors import Workspace

from . import operators
from .clusters import launched, local_ray
from .measuring import Row, Section, Settings, interleave, timed
from .page_cache import MIB, prewarm

_BLOB_BYTES = 16 * MIB
_ROUNDS = 9
_COPY_ROUNDS = 5
_RUN_S = 4.0
_BEFORE_S = 0.5
_SLACK_S = 0.02


def fill_net(count: int) -> Net:
    """Return a net that makes that many blobs of 16 MiB of float32 in a workspace."""
    net = Net("fill")
    for index in range(count):
        net.add("UniformFill", [], [f"blob_{index:04d}"], shape=[_BLOB_BYTES // 4], min=-1.0, max=1.0)
    return net


def _compute_net() -> Net:
    net = Net("compute")
    net.add("BenchmarkTick")
    net.add("MatMul", ["small", "small"], ["product"])
    net.add("Add", ["counter", "one"], ["counter"])
    return net


@dataclass(frozen=True, slots=True)
class _Measured:
    stall_s: float
    reported_s: float
    longest_while_writing_s: float
    iteration_s: float


def _prepare(cluster: Cluster, blob_count: int) -> int:
    """Fill the workspace; return how many iterations of the compute net last long enough."""
    handle = cluster.workspaces["w0"]
    handle.feed_blob("introduced", operators.Introduce())
    handle.run_net_once(fill_net(blob_count))
    handle.feed_blob("small", np.full((128, 128), 1e-3, np.float32))
    handle.feed_blob("counter", np.zeros(4, np.float32))
    handle.feed_blob("one", np.ones(4, np.float32))
    handle.create_net(_compute_net())
    handle.run_net("compute", 100)
    return round(1000 * _RUN_S / timed(lambda: handle.run_net("compute", 1000)))


def _stall(cluster: Cluster, iterations: int, folder: Path) -> _Measured:
    handle = cluster.workspaces["w0"]
    handle.run_operator("BenchmarkTicks", [], ["ticks"])
    running = handle.submit("run_net", "compute", iterations=iterations)
    time.sleep(_BEFORE_S)
    root = Path(tempfile.mkdtemp(dir=folder))
    try:
        asked = time.perf_counter()
        report = cluster.checkpoint(step=1, root=root)
        answered = time.perf_counter()
        ray.get(running)
    finally:
        shutil.rmtree(root)
    handle.run_operator("BenchmarkTicks", [], ["ticks"])
    # perf_counter is one clock for all processes of a machine.
    at = handle.fetch_blob("ticks") * 1e-9
    gaps = np.diff(at)
    ordinary = float(np.median(gaps))
    resumed = answered - report.write_s - report.commit_s + _SLACK_S
    assert at[0] < asked, "compute ran before the checkpoint"
    assert at[-1] > resumed, "compute ran after the barrier"
    in_barrier = (at[1:] > asked) & (at[:-1] < resumed)
    in_write = (at[:-1] >= resumed) & (at[1:] <= answered)
    return _Measured(
        stall_s=float(gaps[in_barrier].max()) - ordinary,
        reported_s=report.stall_s,
        longest_while_writing_s=float(gaps[in_write].max()) if in_write.any() else 0.0,
        iteration_s=ordinary,
    )


def _stall_rows(settings: Settings, folder: Path) -> list[Row]:
    small, large = (4, 16) if settings.is_quick else (4, 64)
    with local_ray(), launched("small") as little, launched("large") as much:
        measured: dict[str, list[_Measured]] = {"small": [], "large": []}
        clusters = {"small": (little, _prepare(little, small)), "large": (much, _prepare(much, large))}

        def contender(name: str) -> Callable[[], float]:
            def measure() -> float:
                cluster, iterations = clusters[name]
                measured[name].append(_stall(cluster, iterations, folder))
                return measured[name][-1].stall_s

            return measure

        found = interleave(
            {name: contender(name) for name in clusters}, rounds=settings.rounds(_ROUNDS), settings=settings
        )
    sizes = {"small": small * _BLOB_BYTES // MIB, "large": large * _BLOB_BYTES // MIB}
    longest = statistics.median(one.longest_while_writing_s for one in measured["large"])
    ordinary = statistics.median(one.iteration_s for one in measured["large"])
    reported = {name: statistics.median(one.reported_s for one in measured[name]) for name in sizes}
    return [
        Row(
            what=f"stall of compute, {sizes['large']:,} MiB / {sizes['small']} MiB of 16 MiB blobs",
            value=found.ratio("large", "small"),
            unit="x",
            target=2.0,
            absolute=f"{found.median('large') * 1e3:.1f} ms, {found.median('small') * 1e3:.1f} ms",
        ),
        Row(
            what="stall as the coordinator reports it, same sizes",
            value=reported["large"] / reported["small"],
            unit="x",
            absolute=f"{reported['large'] * 1e3:.1f} ms, {reported['small'] * 1e3:.1f} ms",
        ),
        Row(
            what=f"longest pause of compute while {sizes['large']:,} MiB are written in the background, median",
            value=longest * 1e3,
            unit="ms",
            absolute=f"an iteration takes {ordinary * 1e3:.2f} ms",
        ),
    ]


def _rewriting_workspace(count: int) -> Workspace:
    workspace = Workspace("copies")
    workspace.run_net_once(fill_net(count))
    net = Net("rewrite")
    for index in range(count):
        net.add("Scale", [f"blob_{index:04d}"], [f"blob_{index:04d}"], scale=1.0)
    workspace.create_net(net)
    workspace.run_net("rewrite", 2)
    return workspace


def _copy_rows(settings: Settings, folder: Path) -> list[Row]:
    """Let a net rewrite every blob right after a freeze: the first time into fresh memory, then into reused."""
    count = 8 if settings.is_quick else 64
    gib = count * _BLOB_BYTES / 2**30
    plain: list[float] = []
    cold: list[float] = []
    reused: list[float] = []
    extra_bytes: list[float] = []
    for _ in range(settings.rounds(_COPY_ROUNDS)):
        workspace = _rewriting_workspace(count)
        before = workspace.memory().used_bytes
        prewarm(2 * count * _BLOB_BYTES, folder)
        rewrite = partial(workspace.run_net, "rewrite")
        for times in (cold, reused):
            plain.append(timed(rewrite))
            frozen = workspace.freeze()
            times.append(timed(rewrite) - plain[-1])
            frozen.lease.release()
        extra_bytes.append(workspace.memory().high_water_bytes - before)
    usual = statistics.median(plain)
    base = f"a rewrite without a snapshot takes {usual / gib * 1e3:.0f} ms/GiB"
    return [
        Row(
            what=f"extra time of rewriting {gib:g} GiB right after the freeze, {what}, / rewriting it without one",
            value=statistics.median(times) / usual,
            unit="x",
            absolute=f"{statistics.median(times) / gib * 1e3:+.0f} ms/GiB; {base}",
        )
        for what, times in (("first time (fresh memory)", cold), ("reused buffers", reused))
    ] + [
        Row(
            what="greatest extra memory of that, / the blobs' bytes",
            value=max(extra_bytes) / (count * _BLOB_BYTES),
            unit="x",
            target=1.0,
            absolute=f"{max(extra_bytes) / MIB:,.0f} MiB",
        )
    ]


def run(settings: Settings) -> list[Row]:
    with tempfile.TemporaryDirectory(prefix="blobspace-benchmark-") as name:
        folder = Path(name)
        return _stall_rows(settings, folder) + _copy_rows(settings, folder)


SECTION = Section(
    name="stall",
    title="A checkpoint as compute sees it",
    bound="The barrier: three rounds of actor calls between the coordinator and the workspaces, whatever the bytes; "
    "afterwards, for blobs that are rewritten: fresh memory the first time, one more memory access later.",
    run=run,
)
