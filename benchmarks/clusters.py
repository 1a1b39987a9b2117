"""A Ray of our own for the run, and clusters on it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import ray

from blobspace.cluster import Cluster


@contextmanager
def local_ray() -> Iterator[None]:
    """Start a local Ray, and end it whatever happens."""
    # Ray switches token authentication on for local clusters, and asks for it nowhere else.
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    ray.init(
        num_cpus=4,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=400 * 2**20,
        namespace="benchmarks",
    )
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def launched(name: str, count: int = 1) -> Iterator[Cluster]:
    """Launch a cluster of workspaces ``w0``, ``w1``, … that ends with the block."""
    whole = f"benchmark-{name}-{os.getpid()}"
    with Cluster.launch({"name": whole, "workspaces": [{"name": "w{index}", "count": count}]}) as cluster:
        yield cluster
