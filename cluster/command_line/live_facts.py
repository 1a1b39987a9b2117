"""What is asked of a running cluster, as plain values. The only file of the command line that knows Ray."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import numpy as np

if TYPE_CHECKING:
    from types import ModuleType

    from ...workspace_actors import BlobSpec
    from ..client import Cluster
    from ..messages import ClusterView, MemberView

_ANSWER_S = 10.0
_FIRST_VALUES = 8


def connected_client() -> ModuleType:
    """Load Ray, connect to one that runs, and return the module that needs it."""
    from .. import client  # noqa: PLC0415  (loads Ray, which the commands that only read do without)

    with _silent_stderr():
        client.connect(may_start=False, log_level=logging.ERROR)
    return client


@contextmanager
def _silent_stderr() -> Generator[None]:
    """Drop what native code writes: Ray repeats each failed try there, and the error that follows says it once."""
    sys.stderr.flush()
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def attach(name: str) -> Cluster:
    """Return the running cluster of that name."""
    return connected_client().Cluster.attach(name)


def cluster_facts(view: ClusterView) -> dict[str, Any]:
    """Return what the coordinator and every living workspace say of a cluster."""
    return {
        "name": view.name,
        "generation": view.generation,
        "code_version": view.code_version,
        "checkpoint_root": view.checkpoint_root,
        "last_committed_step": view.last_committed_step,
        "workspaces": _member_facts(view.members),
    }


def _member_facts(members: Sequence[MemberView]) -> list[dict[str, Any]]:
    """Ask every living workspace at once; one that is gone or silent does not hide the others."""
    import ray  # noqa: PLC0415  (loaded by now)
    from ray.exceptions import GetTimeoutError, RayActorError  # noqa: PLC0415

    from ...workspace_actors.ray_errors import first_line  # noqa: PLC0415  (likewise)

    asked = {
        member.name: [member.actor.specs.remote(), member.actor.memory.remote()]
        for member in members
        if member.is_alive
    }
    ends = time.monotonic() + _ANSWER_S
    facts: list[dict[str, Any]] = []
    for member in members:
        fact: dict[str, Any] = {
            "name": member.name,
            "rank": member.rank,
            "node_id": member.node_id,
            "pid": member.pid,
            "device": member.device_type,
            "state": "alive" if member.is_alive else "lost",
            "reason": member.lost_because,
            "blob_count": None,
            "tensor_bytes": None,
            "used_bytes": None,
            "limit_bytes": None,
        }
        facts.append(fact)
        if not member.is_alive:
            continue
        try:
            specs, memory = ray.get(asked[member.name], timeout=max(0.0, ends - time.monotonic()))
        except RayActorError as error:
            fact |= {"state": "lost", "reason": first_line(error)}
        except GetTimeoutError:
            fact |= {"state": "silent", "reason": f"It did not answer within {_ANSWER_S:g} s."}
        else:
            fact |= {
                "blob_count": len(specs),
                "tensor_bytes": sum(spec.nbytes for spec in specs),
                "used_bytes": memory.used_bytes,
                "limit_bytes": memory.limit_bytes,
            }
    return facts


def value_facts(cluster: Cluster, owner: str, name: str) -> dict[str, Any]:
    """Return a blob's value as it is now: type, shape, statistics, the first elements."""
    value = cluster.workspaces[owner].peek_blob(name)
    if not isinstance(value, np.ndarray):
        return {"type": "value", "value": value}
    array = cast("np.ndarray[Any, Any]", value)
    facts: dict[str, Any] = {
        "type": "strings" if array.dtype == object else array.dtype.name,
        "shape": list(array.shape),
        "tensor_bytes": 0 if array.dtype == object else int(array.nbytes),
    }
    first = array.reshape(-1)[:_FIRST_VALUES]
    if array.dtype == object:
        return facts | {"first": first.tolist()}
    return facts | _statistics(array) | {"first": _plain_numbers(first)}


def _statistics(array: np.ndarray[Any, Any]) -> dict[str, Any]:
    """Return min, max and mean of the finite elements, and how many are not finite."""
    if array.size == 0 or array.dtype.kind == "c":
        return {}
    # bfloat16 and float8 (kind V) have no ufuncs for all of it; integers keep their exact bounds.
    numbers = array if array.dtype.kind in "biuf" else array.astype(np.float64)
    is_finite = np.isfinite(numbers)
    not_finite = int(array.size - np.count_nonzero(is_finite))
    finite = numbers[is_finite] if not_finite else numbers
    facts: dict[str, Any] = {}
    if finite.size:
        facts = {
            "min": finite.min().item(),
            "max": finite.max().item(),
            "mean": finite.mean(dtype=np.float64).item(),
        }
    if not_finite:
        facts["not_finite"] = not_finite
    return facts


def _plain_numbers(array: np.ndarray[Any, Any]) -> list[Any]:
    return (array if array.dtype.kind in "biufc" else array.astype(np.float64)).tolist()


def spec_facts(spec: BlobSpec) -> dict[str, Any]:
    """Return what a listing says of a live blob."""
    return {
        "workspace": spec.workspace,
        "name": spec.name,
        "type": spec.dtype or spec.kind.value,
        "shape": None if spec.shape is None else list(spec.shape),
        "tensor_bytes": spec.nbytes,
        "version": spec.version,
    }
