"""What the coordinator sends to a workspace so that it writes, or reads, its own part of a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from ..ops.errors import ConflictError
from ..workspace_actors.snapshot import WorkspaceSnapshot
from .checkpoint import (
    BlobEntry,
    Index,
    LocalStore,
    WorkspaceReceipt,
    load_workspace,
    read_index,
    read_manifest,
    write_workspace,
)

_VERIFIED_AT_ONCE_BYTES = 64 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointWriter:
    """Writes one workspace's snapshot. A small value; it travels to the workspace."""

    root: str
    save_id: str
    ordinal: int

    def __call__(self, snapshot: WorkspaceSnapshot, *, cancelled: Callable[[], bool]) -> WorkspaceReceipt:
        """Write the packs and the index; nothing is visible until the coordinator commits."""
        return write_workspace(
            LocalStore(self.root),
            save_id=self.save_id,
            ordinal=self.ordinal,
            snapshot=snapshot,
            cancelled=cancelled,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointLoader:
    """Reads one workspace's part. All workspaces read the same save, also if its step is replaced meanwhile."""

    root: str
    step: int
    save_id: str
    workspace: str

    def load(self, allocate: Callable[..., Any]) -> WorkspaceSnapshot:
        """Read and verify everything into arrays from ``allocate(shape, dtype)``."""
        store = LocalStore(self.root)
        return load_workspace(store, self._index(store), allocate=allocate)

    def verify(self) -> None:
        """Read and verify everything, a few blobs at a time, keeping nothing."""
        store = LocalStore(self.root)
        index = self._index(store)
        for batch in _batches(index):
            load_workspace(store, index, select=lambda entry, batch=batch: id(entry) in batch)

    def _index(self, store: LocalStore) -> Index:
        manifest = read_manifest(store, self.step)
        if manifest.save_id != self.save_id:
            raise ConflictError(
                f"The checkpoint of step {self.step} in {self.root} was replaced while it was being restored. "
                f"Restore again.",
                step=self.step,
            )
        return read_index(store, manifest, self.workspace)


def _batches(index: Index) -> Iterator[set[int]]:
    batch: set[int] = set()
    size_bytes = 0
    for entry in index.blobs:
        batch.add(id(entry))
        size_bytes += _stored_bytes(entry)
        if size_bytes >= _VERIFIED_AT_ONCE_BYTES:
            yield batch
            batch, size_bytes = set(), 0
    if batch:
        yield batch


def _stored_bytes(entry: BlobEntry) -> int:
    return sum(chunk.byte_count for chunk in entry.chunks)
