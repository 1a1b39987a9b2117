"""What travels between the coordinator and its clients: frozen values, no behaviour."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class MemberView:
    """One workspace as the coordinator knows it.

    Attributes:
        name: The workspace's name.
        rank: Its place among the members; collectives add up in this order.
        actor: Ray actor handle; None while the workspace is lost.
        node_id: Where it runs, or ran.
        pid: Its process there.
        device_type: ``"cpu"`` or ``"cuda"``.
        is_alive: Whether its process lives, as far as is known.
        lost_because: Why it is gone; ``""`` while it is alive.
    """

    name: str
    rank: int
    actor: Any
    node_id: str
    pid: int
    device_type: str
    is_alive: bool
    lost_because: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterView:
    """A cluster as the coordinator knows it.

    Attributes:
        name: The cluster's name.
        generation: Raised by each recovery; fences off whatever belongs to an older one.
        members: By rank.
        checkpoint_root: The configured root, or None.
        last_committed_step: The newest checkpoint that this coordinator knows of, or None.
        code_version: The blobspace that the coordinator runs.
        operation: What keeps the cluster busy (a checkpoint, a restore, a recovery), or None.
    """

    name: str
    generation: int
    members: tuple[MemberView, ...]
    checkpoint_root: str | None
    last_committed_step: int | None
    code_version: str
    operation: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointReport:
    """What a checkpoint did.

    Attributes:
        step: The step.
        root: The folder it is in.
        save_id: The save that made it.
        workspace_count: Workspaces in it.
        blob_count: Blobs in it, uninitialized ones included.
        tensor_bytes: Bytes of all blobs.
        stall_s: How long compute stood still at most, from the first hold to the last resume.
        write_s: How long writing took, while compute went on.
        commit_s: How long checking and publishing took.
        total_s: From the request to the commit.
    """

    step: int
    root: str
    save_id: str
    workspace_count: int
    blob_count: int
    tensor_bytes: int
    stall_s: float
    write_s: float
    commit_s: float
    total_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RestoreReport:
    """What a restore, or a recovery, did.

    Attributes:
        step: The step that the cluster is back at.
        root: The folder it came from.
        recreated: Workspaces that had been lost and were made anew.
        workspace_count: Workspaces restored.
        tensor_bytes: Bytes of all blobs.
        read_s: How long reading and verifying took.
        stall_s: How long compute stood still at most.
        total_s: From the request to the end.
    """

    step: int
    root: str
    recreated: tuple[str, ...]
    workspace_count: int
    tensor_bytes: int
    read_s: float
    stall_s: float
    total_s: float
