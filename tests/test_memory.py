"""The buffer pool against a model of numbers: what is used, pooled, leased, retained, external, and the limit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from blobspace.workspace_actors.memory import Buffer, BufferPool, size_class


class TestSizeClasses:
    @given(st.integers(0, 1 << 50))
    def test_a_request_gets_at_most_a_quarter_more_or_one_alignment(self, size: int) -> None:
        capacity = size_class(size)
        assert capacity >= size
        assert capacity <= max(64, size + 63, size * 1.25)
        assert capacity % 64 == 0

    @given(st.integers(0, 1 << 40), st.integers(0, 1 << 20))
    def test_classes_rise_with_the_size_and_are_their_own_class(self, size: int, more: int) -> None:
        assert size_class(size) <= size_class(size + more)
        assert size_class(size_class(size)) == size_class(size)

    def test_there_are_few_classes(self) -> None:
        assert len({size_class(size) for size in range(4096, 1 << 20, 64)}) < 40


class TestBuffers:
    @pytest.mark.parametrize("size", [0, 1, 63, 64, 65, 4096, 4097, 100_000, (1 << 20) - 1, 1 << 20, 5 << 20])
    def test_buffers_are_aligned(self, size: int) -> None:
        pool = BufferPool(np)
        buffers = [pool.take(size) for _ in range(3)]
        for buffer in buffers:
            assert buffer is not None
            assert buffer.raw is not None
            assert buffer.raw.ctypes.data % (4096 if buffer.capacity >= 1 << 20 else 64) == 0
            assert buffer.raw.nbytes == buffer.capacity >= size

    def test_a_view_is_writable_and_of_the_asked_shape(self) -> None:
        pool = BufferPool(np)
        for shape, dtype in [((3, 5), "float32"), ((), "int64"), ((0, 4), "complex128"), ((7,), "bool")]:
            buffer = pool.take(int(np.prod(shape)) * np.dtype(dtype).itemsize)
            assert buffer is not None
            array = pool.view(buffer, shape, np.dtype(dtype))
            array[...] = 1
            assert (array.shape, array.dtype, array.flags.c_contiguous) == (shape, np.dtype(dtype), True)

    def test_a_freed_buffer_is_used_again(self) -> None:
        pool = BufferPool(np)
        first = pool.take(5000)
        assert first is not None
        pool.disown(first)
        second = pool.take(4800)
        assert second is not None
        assert second.raw is first.raw
        assert pool.statistics().allocations == 1

    def test_what_is_kept_free_is_bounded_by_what_is_used_and_64_mib(self) -> None:
        pool = BufferPool(np)
        buffers = [pool.take(8 << 20) for _ in range(20)]
        for buffer in buffers:
            assert buffer is not None
            pool.disown(buffer)
        assert pool.statistics().used_bytes == 0
        assert 0 < pool.statistics().pooled_bytes <= 64 << 20

    def test_with_a_limit_used_and_kept_together_stay_below_it(self) -> None:
        pool = BufferPool(np, limit_bytes=10_000)
        first = pool.take(6000)
        assert first is not None
        pool.disown(first)
        assert pool.take(8000) is not None
        assert pool.statistics().pooled_bytes == 0
        assert pool.take(3000) is None

    def test_a_request_waits_for_leases_and_only_for_them(self, in_thread: Callable[..., Any]) -> None:
        pool = BufferPool(np, limit_bytes=8192)
        buffer = pool.take(8192)
        assert buffer is not None
        assert pool.take(64, wait_s=60) is None
        pool.lease(buffer)
        pool.disown(buffer)
        assert pool.take(64, wait_s=0) is None
        assert pool.take(8193, wait_s=60) is None
        waiting = in_thread(lambda: pool.take(64, wait_s=60))
        pool.release(buffer)
        assert isinstance(waiting.finish(), Buffer)


@dataclass
class Held:
    buffer: Buffer
    capacity: int
    is_external: bool
    has_owner: bool = True
    leases: int = 0


class PoolModel(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.held: list[Held] = []
        self.high_water = 0

    @initialize(limit=st.none() | st.integers(1, 60_000))
    def begin(self, limit: int | None) -> None:
        self.limit = limit
        self.pool = BufferPool(np, limit_bytes=limit)

    def used(self) -> int:
        return sum(held.capacity for held in self.held)

    def fits(self, size: int) -> bool:
        return self.limit is None or self.used() + size <= self.limit

    def keep(self, buffer: Buffer | None, size: int, *, is_external: bool) -> None:
        assert (buffer is not None) == self.fits(size)
        if buffer is not None:
            assert buffer.capacity == size
            self.held.append(Held(buffer, size, is_external))
            self.high_water = max(self.high_water, self.used())

    @rule(size=st.integers(0, 20_000))
    def take(self, size: int) -> None:
        free = self.pool.statistics()
        buffer = self.pool.take(size)
        self.keep(buffer, size_class(size), is_external=False)
        if buffer is not None:
            array = self.pool.view(buffer, (size,), np.dtype("uint8"))
            buffer.array = array
            array[:] = len(self.held) % 251
            now = self.pool.statistics()
            assert now.allocations - free.allocations == (0 if now.pooled_bytes < free.pooled_bytes else 1) or (
                self.limit is not None
            )

    @rule(size=st.integers(0, 20_000))
    def wrap(self, size: int) -> None:
        array = np.zeros(size, np.uint8)
        array.flags.writeable = False
        self.keep(self.pool.wrap(array), size, is_external=True)

    @precondition(lambda self: any(held.has_owner for held in self.held))
    @rule(data=st.data())
    def disown(self, data: st.DataObject) -> None:
        held = data.draw(st.sampled_from([held for held in self.held if held.has_owner]))
        self.pool.disown(held.buffer)
        held.has_owner = False
        self.forget()

    @precondition(lambda self: any(held.has_owner for held in self.held))
    @rule(data=st.data())
    def lease(self, data: st.DataObject) -> None:
        held = data.draw(st.sampled_from([held for held in self.held if held.has_owner]))
        self.pool.lease(held.buffer)
        held.leases += 1

    @precondition(lambda self: any(held.leases for held in self.held))
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        held = data.draw(st.sampled_from([held for held in self.held if held.leases]))
        self.pool.release(held.buffer)
        held.leases -= 1
        self.forget()

    def forget(self) -> None:
        self.held = [held for held in self.held if held.has_owner or held.leases]

    @precondition(lambda self: hasattr(self, "pool"))
    @invariant()
    def the_figures_are_the_models(self) -> None:
        found = self.pool.statistics()
        assert found.used_bytes == self.used()
        assert found.high_water_bytes == self.high_water
        assert found.leased_bytes == sum(held.capacity for held in self.held if held.leases)
        assert found.retained_bytes == sum(held.capacity for held in self.held if not held.has_owner)
        assert found.external_bytes == sum(held.capacity for held in self.held if held.is_external)
        assert found.limit_bytes == self.limit
        assert found.pooled_bytes == sum(raw.nbytes for kept in self.pool._free.values() for raw in kept)
        assert found.pooled_bytes <= max(64 << 20, found.used_bytes)
        if self.limit is not None:
            assert found.used_bytes + found.pooled_bytes <= self.limit

    @precondition(lambda self: hasattr(self, "pool"))
    @invariant()
    def no_two_buffers_share_memory_and_free_ones_are_nobodys(self) -> None:
        raws = [held.buffer.raw for held in self.held if held.buffer.raw is not None]
        raws += [raw for kept in self.pool._free.values() for raw in kept]
        starts = sorted((raw.ctypes.data, raw.nbytes) for raw in raws)
        assert all(start + size <= after for (start, size), (after, _) in pairwise(starts))

    @precondition(lambda self: hasattr(self, "pool"))
    @invariant()
    def leased_and_external_arrays_are_read_only_and_others_not(self) -> None:
        for held in self.held:
            assert held.buffer.is_writable == (not held.leases and not held.is_external)
            if held.has_owner:
                assert held.buffer.array is not None
                assert held.buffer.array.flags.writeable == held.buffer.is_writable


TestPoolAgainstItsModel = PoolModel.TestCase
TestPoolAgainstItsModel.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
