"""Owned, counted and bounded memory: buffers, the pool they come from and go back to, and leases on them.

A buffer is held by at most one blob and by any number of leases. While a lease is on it nobody writes to it:
a blob that must change takes a fresh buffer instead (copy-on-write), and the old one goes back to the pool when
its last lease is released. So a snapshot costs a lease per blob and no copy, and a buffer is reused rather than
given back to the operating system, whose fresh pages are several times slower than reused ones.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..ops.dtypes import DType
from ..ops.values import Array

_ALIGNMENT = 64
_PAGE_ALIGNMENT = 4096
_PAGE_ALIGNED_FROM = 1 << 20
_LEAST_KEPT_FREE_BYTES = 64 << 20


def size_class(size_bytes: int) -> int:
    """Return the capacity that a request gets: at most a quarter more, so that freed buffers fit later requests."""
    if size_bytes <= 4096:
        return max(_ALIGNMENT, -(-size_bytes // _ALIGNMENT) * _ALIGNMENT)
    step = 1 << (size_bytes.bit_length() - 3)
    return -(-size_bytes // step) * step


class Buffer:
    """A piece of device memory with a capacity. ``array`` is the view that its blob shows at the moment."""

    __slots__ = ("array", "capacity", "has_owner", "is_external", "leases", "raw")

    def __init__(self, raw: Array | None, capacity: int, *, is_external: bool = False) -> None:
        self.raw = raw
        self.capacity = capacity
        self.array: Array | None = None
        self.has_owner = True
        self.leases = 0
        self.is_external = is_external

    @property
    def is_writable(self) -> bool:
        """Whether its blob may write to it."""
        return self.leases == 0 and not self.is_external


@dataclass(frozen=True, slots=True)
class BlobAllocation:
    """A buffer, shown as an array, on its way to a blob.

    Attributes:
        array: The view, C-contiguous.
        buffer: What it views.
        is_fresh: The buffer was taken from the pool for this; otherwise it is the blob's own.
    """

    array: Array
    buffer: Buffer
    is_fresh: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryStatistics:
    """Bytes of one workspace process (children included).

    Attributes:
        used_bytes: Capacity of all buffers held by blobs or leases, external views included.
        high_water_bytes: The greatest ``used_bytes`` so far.
        pooled_bytes: Capacity of free buffers kept for reuse; given up before a limit is enforced.
        leased_bytes: The part of ``used_bytes`` that a snapshot has a lease on.
        retained_bytes: The part of ``leased_bytes`` that no blob shows any more (copies made on write).
        external_bytes: The part of ``used_bytes`` that is a view of somebody else's memory.
        limit_bytes: The workspace's limit; None means none.
        allocations: How many buffers have been newly taken from the operating system, ever.
    """

    used_bytes: int
    high_water_bytes: int
    pooled_bytes: int
    leased_bytes: int
    retained_bytes: int
    external_bytes: int
    limit_bytes: int | None
    allocations: int


class BufferPool:
    """Hands out aligned buffers of one device and takes them back.

    Args:
        xp: NumPy or CuPy.
        limit_bytes: Greatest ``used_bytes``; None means no limit.
    """

    def __init__(self, xp: Any, *, limit_bytes: int | None = None) -> None:
        self._xp = xp
        self.limit_bytes = limit_bytes
        self._free: dict[int, list[Array]] = defaultdict(list)
        self._changed = threading.Condition()
        self._used = 0
        self._high_water = 0
        self._pooled = 0
        self._leased = 0
        self._retained = 0
        self._external = 0
        self._allocations = 0

    def take(self, size_bytes: int, *, wait_s: float = 0.0) -> Buffer | None:
        """Return a buffer of at least ``size_bytes``, or None if the limit does not allow it.

        If memory that only leases hold would make room, wait for it up to ``wait_s`` seconds.
        """
        capacity = size_class(size_bytes)
        with self._changed:
            if not self._fits(capacity):
                could_fit = capacity <= (self.limit_bytes or 0)
                self._changed.wait_for(
                    lambda: self._fits(capacity) or self._retained == 0, timeout=wait_s if could_fit else 0.0
                )
                if not self._fits(capacity):
                    return None
            self._count(capacity)
            kept = self._free[capacity]
            if kept:
                self._pooled -= capacity
                return Buffer(kept.pop(), capacity)
            self._allocations += 1
            self._trim((self.limit_bytes or self._used + self._pooled) - self._used)
        try:
            return Buffer(self._fresh(capacity), capacity)
        except MemoryError:
            with self._changed:
                self._count(-capacity)
            raise

    def wrap(self, array: Array) -> Buffer | None:
        """Return a buffer that shows somebody else's memory, or None if the limit does not allow it."""
        with self._changed:
            if not self._fits(array.nbytes):
                return None
            self._count(array.nbytes)
            self._external += array.nbytes
            self._trim((self.limit_bytes or self._used + self._pooled) - self._used)
        buffer = Buffer(None, array.nbytes, is_external=True)
        buffer.array = array
        return buffer

    def view(self, buffer: Buffer, shape: tuple[int, ...], dtype: DType) -> Array:
        """Return the front of a buffer as an array."""
        assert buffer.raw is not None  # an external buffer is never viewed anew
        count = 1
        for size in shape:
            count *= size
        return buffer.raw[: count * dtype.itemsize].view(dtype).reshape(shape)

    def disown(self, buffer: Buffer) -> None:
        """The blob gives the buffer up; it goes back to the pool unless a lease still holds it."""
        with self._changed:
            buffer.has_owner = False
            if buffer.leases:
                self._retained += buffer.capacity
            else:
                self._put_back(buffer)
            self._changed.notify_all()

    def lease(self, buffer: Buffer) -> None:
        """Put a lease on a buffer; its array becomes read-only."""
        with self._changed:
            if buffer.leases == 0:
                self._leased += buffer.capacity
            buffer.leases += 1
        _set_writable(buffer, writable=False)

    def release(self, buffer: Buffer) -> None:
        """Take one lease off; the last one gives the buffer back to its blob, or to the pool."""
        with self._changed:
            buffer.leases -= 1
            if buffer.leases:
                return
            self._leased -= buffer.capacity
            if buffer.has_owner:
                _set_writable(buffer, writable=True)
            else:
                self._retained -= buffer.capacity
                self._put_back(buffer)
            self._changed.notify_all()

    def statistics(self) -> MemoryStatistics:
        """Return the present figures, consistent with each other."""
        with self._changed:
            return MemoryStatistics(
                used_bytes=self._used,
                high_water_bytes=self._high_water,
                pooled_bytes=self._pooled,
                leased_bytes=self._leased,
                retained_bytes=self._retained,
                external_bytes=self._external,
                limit_bytes=self.limit_bytes,
                allocations=self._allocations,
            )

    def _fits(self, capacity: int) -> bool:
        return self.limit_bytes is None or self._used + capacity <= self.limit_bytes

    def _count(self, capacity: int) -> None:
        self._used += capacity
        self._high_water = max(self._high_water, self._used)

    def _put_back(self, buffer: Buffer) -> None:
        self._used -= buffer.capacity
        if buffer.raw is None:
            self._external -= buffer.capacity
            return
        self._free[buffer.capacity].append(buffer.raw)
        self._pooled += buffer.capacity
        # Keep as much as has lately been of use: what the blobs hold now, once more (a snapshot's copies).
        keep = max(_LEAST_KEPT_FREE_BYTES, self._used)
        if self.limit_bytes is not None:
            keep = min(keep, self.limit_bytes - self._used)
        self._trim(keep)

    def _trim(self, keep_bytes: int) -> None:
        for capacity in sorted(self._free, reverse=True):
            kept = self._free[capacity]
            while kept and self._pooled > keep_bytes:
                kept.pop()
                self._pooled -= capacity
            if not kept:
                del self._free[capacity]

    def _fresh(self, capacity: int) -> Array:
        if self._xp is not np:
            return self._xp.empty(capacity, dtype=np.uint8)
        alignment = _PAGE_ALIGNMENT if capacity >= _PAGE_ALIGNED_FROM else _ALIGNMENT
        raw = np.empty(capacity + alignment, dtype=np.uint8)
        start = -raw.ctypes.data % alignment
        return raw[start : start + capacity]


def _set_writable(buffer: Buffer, *, writable: bool) -> None:
    array = buffer.array
    if isinstance(array, np.ndarray) and not buffer.is_external:
        array.flags.writeable = writable
