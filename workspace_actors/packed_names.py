"""Blob names on the wire: one block of bytes per workspace instead of a list of str."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..ops.values import pack_plain, unpack_plain


def pack_names(names: Mapping[str, Sequence[str]]) -> bytes:
    """Pack sorted names by workspace: ``{"w0": ["a", "b"]}``. NUL separates names, and no name has one."""
    return pack_plain({workspace: "\0".join(own) for workspace, own in names.items()})


def unpack_names(packed: bytes) -> dict[str, list[str]]:
    """Return what :func:`pack_names` was given."""
    return {workspace: joined.split("\0") if joined else [] for workspace, joined in unpack_plain(packed).items()}
