"""Blob names on the wire: one small block of bytes per workspace instead of a list of str.

Names repeat each other's beginnings, so the fastest compression makes them several times smaller for a fraction of
what moving them costs. What counts is not the bytes but where they go: Ray sends a small answer along with its
reply, and a large one (from 100 kB) by way of its object store. Workspaces that hold the same names pack the same
bytes, so a receiver unpacks the names of replicas once.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from ..ops.values import pack_plain, unpack_plain

_RAW_DEFLATE = -15  # no checksum: an actor's answer is not a file


class NameList(list[str]):
    """A list of names that cannot be changed, so that a catalog can hand it out without copying it."""

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise TypeError("these names belong to the catalog and cannot be changed; change a copy: list(names)")

    append = clear = extend = insert = pop = remove = reverse = _refuse
    sort: Any = _refuse  # overloaded in list, which a type checker cannot match
    __setitem__ = __delitem__ = __iadd__ = __imul__ = _refuse

    def __reduce__(self) -> tuple[type[list[str]], tuple[tuple[str, ...]]]:
        return list, (tuple(self),)


def pack_names(names: Mapping[str, Sequence[str]]) -> bytes:
    """Pack sorted names by the path of the child that owns them (``""`` for the workspace itself).

    NUL separates names, and no name has one.
    """
    plain = pack_plain({path: "\0".join(own) for path, own in names.items()})
    deflate = zlib.compressobj(1, zlib.DEFLATED, _RAW_DEFLATE)
    return b"".join([len(plain).to_bytes(8, "little"), deflate.compress(plain), deflate.flush()])


def unpack_names(packed: bytes) -> dict[str, NameList]:
    """Return what :func:`pack_names` was given."""
    plain = zlib.decompress(packed[8:], _RAW_DEFLATE, int.from_bytes(packed[:8], "little"))
    return {path: NameList(joined.split("\0") if joined else ()) for path, joined in unpack_plain(plain).items()}
