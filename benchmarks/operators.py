"""Operators for the benchmarks: a net that notes the time at each iteration.

A workspace's process knows them once it has imported this module. :class:`Introduce` brings that about without any
runtime environment: Ray unpickles it there, which imports the module, as the driver's folder is on its path.
"""

from __future__ import annotations

import time
from array import array
from typing import Any

import numpy as np

from blobspace.ops.execution import OperatorCall
from blobspace.ops.registry import Step, register_cpu_operator
from blobspace.ops.schema import OperatorSchema

_TICKS = array("q")


@register_cpu_operator(OperatorSchema(type="BenchmarkTick", doc="Note the time.", inputs=(0, 0), outputs=(0, 0)))
def tick(call: OperatorCall) -> Step:  # noqa: ARG001  (it has no blobs)
    note, now = _TICKS.append, time.perf_counter_ns
    return lambda: note(now())


@register_cpu_operator(
    OperatorSchema(type="BenchmarkTicks", doc="Output the noted times and forget them.", inputs=(0, 0), outputs=(1, 1)),
    dynamic=True,
)
def ticks(call: OperatorCall) -> Step:
    noted = np.array(_TICKS, dtype=np.int64)
    output = call.output(0, noted.shape, noted.dtype)

    def step() -> None:
        output[...] = noted
        del _TICKS[:]

    return step


def _introduced() -> int:
    return 1


class Introduce:
    """A value that is the number 1 once it has arrived in a workspace's process."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _introduced, ()
