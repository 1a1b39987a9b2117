"""One local Ray for the whole session: starting it costs seconds, a cluster of workspaces on it does not."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support import Launch

from blobspace.cluster import Cluster


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    ray = pytest.importorskip("ray")
    # Ray switches token authentication on for local clusters, and asks for it nowhere else.
    os.environ["RAY_AUTH_MODE"] = "disabled"
    ray.init(
        num_cpus=4,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=400 * 2**20,
        namespace="tests",
    )
    yield
    ray.shutdown()


@pytest.fixture
def launch(local_ray: None, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Launch]:
    """Launch clusters that end with the test: ``launch(count=2, memory_limit="1MiB")``."""
    numbers = itertools.count()
    clusters: list[Cluster] = []

    def launch(
        count: int = 2, *, detached: bool = False, config: dict[str, Any] | None = None, **group: Any
    ) -> Cluster:
        name = f"t{os.getpid()}-{abs(hash(request.node.nodeid)) % 10**8}-{next(numbers)}"
        whole = {
            "name": name,
            "checkpoint_root": str(tmp_path / "checkpoints"),
            "workspaces": [{"name": "w{index}", "count": count, **group}],
            **(config or {}),
        }
        clusters.append(Cluster.launch(whole, detached=detached))
        return clusters[-1]

    yield launch
    for cluster in clusters:
        cluster.shut_down()
