"""What a net costs per operator beyond NumPy's own time."""

from __future__ import annotations

import timeit

import numpy as np

from blobspace.ops import Net
from blobspace.workspace_actors import Workspace

from .clusters import launched, local_ray
from .measuring import Row, Section, Settings, interleave, timed

OPERATORS = 100
_ITERATIONS = 1000
_ROUNDS = 21
# 2 µs an operator where a bare call takes 0.5 µs.
_TARGET = 4.0


def _net() -> Net:
    net = Net("tiny")
    for index in range(OPERATORS):
        net.add("Add", ["a", "b"], [f"c{index}"])
    return net


def run(settings: Settings) -> list[Row]:
    four = np.ones(4, np.float32)
    calls = OPERATORS * _ITERATIONS
    workspace = Workspace("local")
    for name in ("a", "b"):
        workspace.feed_blob(name, four)
    workspace.create_net(_net())
    with local_ray(), launched("net") as cluster:
        handle = cluster.workspaces["w0"]
        for name in ("a", "b"):
            handle.feed_blob(name, four)
        handle.create_net(_net())
        scope = {"add": np.add, "a": four.copy(), "b": four.copy(), "c": four.copy()}
        bare = timeit.Timer("add(a, b, out=c)", globals=scope)
        found = interleave(
            {
                "bare np.add": lambda: bare.timeit(calls) / calls,
                "Workspace": lambda: timed(lambda: workspace.run_net("tiny", _ITERATIONS)) / calls,
                "actor": lambda: timed(lambda: handle.run_net("tiny", _ITERATIONS)) / calls,
            },
            rounds=settings.rounds(_ROUNDS),
            settings=settings,
        )
    base = found.median("bare np.add")
    return [
        Row(
            what=f"{OPERATORS} x Add of 4 floats, {where}: (net - bare np.add) / bare, per operator",
            value=found.ratio(contender, "bare np.add") - 1,
            unit="x",
            target=_TARGET,
            absolute=f"{(found.median(contender) - base) * 1e6:.2f} µs beyond {base * 1e6:.2f} µs",
        )
        for contender, where in (
            ("Workspace", "plain Workspace"),
            ("actor", f"through the actor, run_net(iterations={_ITERATIONS})"),
        )
    ]


SECTION = Section(
    name="net",
    title="Nets: time per operator beyond NumPy's own",
    bound="One Python call per operator (the bound step, which also silences NumPy's warnings), and per iteration "
    "one pass through the gate.",
    run=run,
)
