"""A blob: a name and, at the moment, a value; and what can be said of it without looking at the value."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

from ..ops.errors import InternalError
from ..ops.execution import Slot
from ..ops.values import Array, Kind
from .devices import to_host
from .memory import Buffer


@dataclass(frozen=True, slots=True, kw_only=True)
class BlobSpec:
    """What can be said of a blob without looking at its values.

    Attributes:
        workspace: The workspace that owns it; a child is ``parent:path``.
        name: The blob's name.
        kind: What it holds.
        dtype: Element type of a tensor, else None.
        shape: Shape of a tensor or a string tensor, else None.
        nbytes: Bytes of a tensor's elements; 0 for the rest.
        version: Raised by each write.
    """

    workspace: str
    name: str
    kind: Kind
    dtype: str | None
    shape: tuple[int, ...] | None
    nbytes: int
    version: int


class Blob:
    """A name and, at the moment, a value. Lives in one workspace's table, which alone changes it."""

    __slots__ = ("array", "buffer", "kind", "name", "value", "version")

    def __init__(self, name: str) -> None:
        self.name = name
        self.kind = Kind.UNINITIALIZED
        self.array: Array | None = None
        self.value: Any = None
        self.buffer: Buffer | None = None
        self.version = 0

    def copied_value(self) -> Any:
        """Return a copy of the value; a tensor as an array of host memory."""
        if self.kind is Kind.TENSOR:
            return to_host(self.array)
        if self.kind is Kind.STRINGS:
            return self.value.copy()
        return copied_plain(self.value)

    def spec(self, workspace: str) -> BlobSpec:
        """Describe the blob, which ``workspace`` owns."""
        array = self.array
        strings = self.value if self.kind is Kind.STRINGS else None
        return BlobSpec(
            workspace=workspace,
            name=self.name,
            kind=self.kind,
            dtype=None if array is None else array.dtype.name,
            shape=tuple(array.shape) if array is not None else None if strings is None else strings.shape,
            nbytes=0 if array is None else int(array.nbytes),
            version=self.version,
        )


def own_blob(slot: Slot) -> Blob:
    """Return what execution calls a slot as the blob that it is."""
    if not isinstance(slot, Blob):
        raise InternalError(f"Expected a Blob of a workspace, found {type(slot).__name__}.")
    return slot


def copied_plain(value: object) -> object:
    """Return a copy of a plain value, which its owner may change."""
    return copy.deepcopy(value) if isinstance(value, (list, dict)) else value
