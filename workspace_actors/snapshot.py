"""The frozen content of one workspace at one moment, as the checkpoint writer takes it and restore gives it back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..ops.values import Array, Kind


@dataclass(frozen=True, slots=True, kw_only=True)
class BlobSnapshot:
    """One blob, frozen.

    Attributes:
        scope: Path of the child workspace that owns it (``"scratch"``, ``"a/b"``); ``""`` for the root.
        name: The blob's name within that workspace.
        kind: What it holds.
        array: The tensor (C-contiguous, not to be written to), for ``Kind.TENSOR`` alone.
        payload: The MessagePack form (``pack_strings`` or ``pack_plain``), for ``Kind.STRINGS`` and ``Kind.VALUE``.
        version: The blob's version when it was frozen.
    """

    scope: str
    name: str
    kind: Kind
    array: Array | None
    payload: bytes | None
    version: int


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkspaceSnapshot:
    """Everything that a workspace needs to come back exactly: blobs, nets, and the state of its generators.

    Attributes:
        workspace: The workspace's name.
        blobs: Every blob of the workspace and of its children, in listing order.
        nets: Plain form of each created net, with its scope: ``{"scope": str, "net": dict}``.
        state: Plain form of the rest (generator state by scope, iteration counters, the list of children).
    """

    workspace: str
    blobs: tuple[BlobSnapshot, ...]
    nets: tuple[dict[str, Any], ...]
    state: dict[str, Any]
