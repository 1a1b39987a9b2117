"""Checkpoints: a format that any tool can read, and a commit that is all or nothing. No Ray, no clock.

FORMAT.md at the repository's root is the specification. From bytes to promises: ``layout`` (names), ``fields``
and ``format`` (index and manifest), ``pack`` (safetensors files), ``store`` (where files live), ``writer`` and
``reader``.
"""

from __future__ import annotations

from .format import (
    FORMAT_VERSION,
    BlobEntry,
    Chunk,
    Index,
    Manifest,
    PackEntry,
    WorkspaceEntry,
    decode_index,
    decode_manifest,
    encode_index,
    encode_manifest,
)
from .reader import (
    CheckpointSummary,
    Damage,
    VerifyReport,
    list_checkpoints,
    load_workspace,
    read_index,
    read_manifest,
    verify,
)
from .store import LocalStore, Store
from .writer import WorkspaceReceipt, commit, make_manifest, refuse_existing, write_workspace

__all__ = [
    "FORMAT_VERSION",
    "BlobEntry",
    "CheckpointSummary",
    "Chunk",
    "Damage",
    "Index",
    "LocalStore",
    "Manifest",
    "PackEntry",
    "Store",
    "VerifyReport",
    "WorkspaceEntry",
    "WorkspaceReceipt",
    "commit",
    "decode_index",
    "decode_manifest",
    "encode_index",
    "encode_manifest",
    "list_checkpoints",
    "load_workspace",
    "make_manifest",
    "read_index",
    "read_manifest",
    "refuse_existing",
    "verify",
    "write_workspace",
]
