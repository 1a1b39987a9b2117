"""Blob names on the wire: one small block of bytes per workspace instead of a list of str.

Names repeat each other's beginnings, so the fastest compression makes them several times smaller for a fraction of
what moving them costs. What counts is not the bytes but where they go: Ray sends a small answer along with its
reply, and a large one (from 100 kB) by way of its object store.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence

from ..ops.values import pack_plain, unpack_plain


def pack_names(names: Mapping[str, Sequence[str]]) -> bytes:
    """Pack sorted names by workspace: ``{"w0": ["a", "b"]}``. NUL separates names, and no name has one."""
    return zlib.compress(pack_plain({workspace: "\0".join(own) for workspace, own in names.items()}), level=1)


def unpack_names(packed: bytes) -> dict[str, list[str]]:
    """Return what :func:`pack_names` was given."""
    joined_names = unpack_plain(zlib.decompress(packed))
    return {workspace: joined.split("\0") if joined else [] for workspace, joined in joined_names.items()}
