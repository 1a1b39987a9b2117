"""Many workspaces: the coordinator, the catalog, cluster-wide checkpoints, the command line.

Importing this package loads no Ray; ``Cluster`` does when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from .config import ClusterConfig, WorkspaceGroup, load_config
from .messages import CheckpointReport, ClusterView, MemberView, RestoreReport

if TYPE_CHECKING:
    from .client import Cluster, clusters

__all__ = [
    "CheckpointReport",
    "Cluster",
    "ClusterConfig",
    "ClusterView",
    "MemberView",
    "RestoreReport",
    "WorkspaceGroup",
    "clusters",
    "load_config",
]

_LOADED_LATER = ("Cluster", "clusters")


def __getattr__(name: str) -> object:
    if name in _LOADED_LATER:
        return getattr(importlib.import_module(".client", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
