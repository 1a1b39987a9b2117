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

    NUL separates names, and no name has one. Sizes stand beside the text, which is compressed as a whole.
    """
    texts = ["\0".join(own).encode("utf-8") for own in names.values()]
    plain = b"".join(texts)
    deflate = zlib.compressobj(1, zlib.DEFLATED, _RAW_DEFLATE)
    sizes = [[path, len(text)] for path, text in zip(names, texts, strict=True)]
    return pack_plain([sizes, deflate.compress(plain) + deflate.flush()])


def unpack_names(packed: bytes) -> dict[str, NameList]:
    """Return what :func:`pack_names` was given."""
    sizes, deflated = unpack_plain(packed)
    plain = zlib.decompress(deflated, _RAW_DEFLATE, sum(size for _, size in sizes) or 1)
    names: dict[str, NameList] = {}
    begin = 0
    for path, size in sizes:
        text = plain[begin : begin + size].decode("utf-8")
        names[path] = NameList(text.split("\0") if text else ())
        begin += size
    return names
