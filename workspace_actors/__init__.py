"""One process that owns blobs: the workspace, its memory, its gate, and the Ray actor around it.

``Workspace`` needs no Ray. ``WorkspaceActor`` and ``WorkspaceHandle`` load it when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from .blob import BlobSpec
from .memory import MemoryStatistics
from .names import check_workspace_name
from .snapshot import BlobSnapshot, WorkspaceSnapshot
from .workspace import Workspace

if TYPE_CHECKING:
    from .actor import WorkspaceActor
    from .handle import WorkspaceHandle

__all__ = [
    "BlobSnapshot",
    "BlobSpec",
    "MemoryStatistics",
    "Workspace",
    "WorkspaceActor",
    "WorkspaceHandle",
    "WorkspaceSnapshot",
    "check_workspace_name",
]

_LOADED_LATER = {"WorkspaceActor": ".actor", "WorkspaceHandle": ".handle"}


def __getattr__(name: str) -> object:
    if name in _LOADED_LATER:
        return getattr(importlib.import_module(_LOADED_LATER[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
