"""What a folder of checkpoints says, as plain values; no Ray is loaded for it."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from ...ops.errors import NotFoundError
from ..checkpoint import BlobEntry, CheckpointSummary, LocalStore, Manifest
from .output import utc_text


def open_store(root: str) -> LocalStore:
    """Return the store in a folder.

    Raises:
        NotFoundError: There is no such folder.
    """
    try:
        is_folder = Path(root).is_dir()
    except OSError:
        is_folder = True  # no permission to look; the store says so
    if not is_folder:
        raise NotFoundError(f"There is no folder {root!r}.", root=root)
    return LocalStore(root)


def manifest_facts(root: str, manifest: Manifest) -> dict[str, Any]:
    """Return what a manifest says of its checkpoint."""
    return {
        "root": root,
        "step": manifest.step,
        "created": utc_text(manifest.created_unix_ns),
        "cluster": manifest.cluster,
        "generation": manifest.generation,
        "save_id": manifest.save_id,
        "blobspace_version": manifest.blobspace_version,
        "metadata": manifest.metadata,
        "workspaces": [
            {
                "name": entry.name,
                "node_id": entry.node,
                "index": entry.index_path,
                "blob_count": entry.blob_count,
                "tensor_bytes": entry.tensor_bytes,
            }
            for entry in manifest.workspaces
        ],
        "packs": [{"path": pack.path, "byte_count": pack.byte_count} for pack in manifest.packs],
    }


def entry_facts(workspace: str, entry: BlobEntry) -> dict[str, Any]:
    """Return what a listing says of a stored blob."""
    return {
        "workspace": f"{workspace}:{entry.scope}" if entry.scope else workspace,
        "name": entry.name,
        "type": entry.dtype or entry.kind.value,
        "shape": None if entry.dtype is None and entry.kind.value != "strings" else list(entry.shape),
        "tensor_bytes": entry.byte_count,
        "version": entry.version,
    }


def summary_facts(summary: CheckpointSummary) -> dict[str, Any]:
    """Return what a listing says of a checkpoint."""
    return asdict(summary) | {"created": utc_text(summary.created_unix_ns) if summary.is_readable else None}
