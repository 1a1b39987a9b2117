"""Snapshots: free, unchanging whatever goes on, given back completely, and restored bit for bit or not at all."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from blobspace.ops import (
    BlobspaceError,
    DeadlineError,
    InvalidInputError,
    Kind,
    MemoryLimitError,
    Net,
    NotFoundError,
    OperatorCall,
    OperatorSchema,
    register_cpu_operator,
)
from blobspace.workspace_actors import BlobSnapshot, Workspace, WorkspaceSnapshot

WAIT_S = 10.0


def f32(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


def training_net() -> Net:
    net = Net("train")
    net.Iter("iter", "iter")
    net.Add(["x", "one"], "x")
    net.Relu("r", "r")
    net.Scale("r", "r", scale=-1.5)
    net.WeightedSum(["w", "one1", "x", "half"], "w")
    net.add("MomentumSGDUpdate", ["g", "m", "lr", "p"], ["g", "m", "p"], momentum=0.9)
    net.UniformFill([], "random", shape=[7])
    net.Sum(["x", "w"], "sum")
    net.GetAllBlobNames([], "names")
    net.Copy("names", "names2")
    return net


def trained(name: str = "w", iterations: int = 3, **options: Any) -> Workspace:
    ws = Workspace(name, **options)
    ws.feed_blob("iter", np.array([0]))
    for blob in ("x", "r", "w", "g", "m", "p"):
        ws.feed_blob(blob, np.linspace(-1, 1, 50, dtype=np.float32))
    ws.feed_blob("one", np.ones(50, np.float32))
    ws.feed_blob("one1", f32(1))
    ws.feed_blob("half", f32(0.5))
    ws.feed_blob("lr", f32(0.01))
    ws.create_net(training_net())
    ws.run_net("train", iterations)
    return ws


def full() -> Workspace:
    """Every kind of blob, children, nets in both."""
    ws = trained(seed=5)
    ws.create_blob("nothing")
    ws.feed_blob("plain", {"a": [1, 2.5, None, b"x"], "b": {"c": "é"}})
    ws.feed_blob("strings", np.array([["a", b"\0\xff"], ["", "日本"]], dtype=object))
    ws.feed_blob("empty", np.zeros((0, 3), np.int8))
    ws.feed_blob("0-d", np.array(7, np.uint16))
    ws.feed_blob("external", np.arange(5.0), copy=False)
    child = ws.child("a", create=True)
    child.feed_blob("x1", f32(4))
    child.run_operator("UniformFill", [], ["u"], shape=[3])
    grandchild = ws.child("a/b", create=True)
    grandchild.feed_blob("deep", "text")
    net = Net("inner")
    net.UniformFill([], "drawn", shape=[2])
    net.Add(["x1", "drawn"], "y1")
    child.feed_blob("x1", f32(4, 5))
    child.create_net(net)
    child.run_net("inner", 2)
    ws.child("empty", create=True)
    return ws


def content(snapshot: WorkspaceSnapshot) -> list[tuple[Any, ...]]:
    return [
        (
            b.scope,
            b.name,
            b.kind,
            b.version,
            b.payload,
            None if b.array is None else (b.array.dtype, b.array.shape, b.array.tobytes()),
        )
        for b in snapshot.blobs
    ]


def values(ws: Workspace) -> list[tuple[Any, ...]]:
    """Content without versions: they rise by each write, by how much depends on how often a net had to bind."""
    return [(scope, name, kind, *rest) for scope, name, kind, _, *rest in content(detached(ws))]


def staged(ws: Workspace, snapshot: WorkspaceSnapshot) -> tuple[WorkspaceSnapshot, Any]:
    """Do what a checkpoint's reader does: put every array into memory of the workspace."""
    stage = ws.stage()
    blobs: list[BlobSnapshot] = []
    try:
        for blob in snapshot.blobs:
            array = blob.array
            if array is not None:
                array = stage.allocate(array.shape, array.dtype)
                array[...] = blob.array
            blobs.append(dataclasses.replace(blob, array=array))
    except BaseException:
        stage.discard()
        raise
    return dataclasses.replace(snapshot, blobs=tuple(blobs)), stage


def restored(ws: Workspace, snapshot: WorkspaceSnapshot, *, is_held: bool = False) -> None:
    read, stage = staged(ws, snapshot)
    ws.restore(read, stage, is_held=is_held)


def detached(ws: Workspace) -> WorkspaceSnapshot:
    """A snapshot that owns its arrays, as if it had been written and read."""
    frozen = ws.freeze()
    snapshot = frozen.snapshot()
    copied = tuple(
        dataclasses.replace(blob, array=None if blob.array is None else blob.array.copy()) for blob in snapshot.blobs
    )
    frozen.lease.release()
    return dataclasses.replace(snapshot, blobs=copied)


def leases(ws: Workspace) -> tuple[int, int, int]:
    memory = ws.memory()
    return memory.leased_bytes, memory.retained_bytes, memory.used_bytes


class TestFreeze:
    def test_nothing_is_copied(self) -> None:
        ws = trained()
        before = ws.memory()
        frozen = ws.freeze()
        after = ws.memory()
        assert (after.used_bytes, after.allocations) == (before.used_bytes, before.allocations)
        assert after.leased_bytes == after.used_bytes
        assert after.retained_bytes == 0
        frozen.lease.release()

    @pytest.mark.parametrize(
        "go_on",
        [
            lambda ws: ws.run_net("train", 5),
            lambda ws: ws.run_net_once(training_net()),
            lambda ws: [ws.run_operator("Relu", [name], [name]) for name in "xrwgmp"],
            lambda ws: [ws.run_operator("ConstantFill", [], [name], shape=[50], value=3.0) for name in "xrwgmp"],
            lambda ws: [ws.feed_blob(spec.name, f32(*range(50))) for spec in ws.specs()],
            lambda ws: [ws.feed_blob(spec.name, np.zeros(3)) for spec in ws.specs()],
            lambda ws: [ws.feed_blob(spec.name, "text") for spec in ws.specs()],
            lambda ws: [ws.feed_blob(spec.name, f32(*range(50)), copy=False) for spec in ws.specs()],
            lambda ws: [ws.remove_blob(name) for name in ws.blobs()],
            lambda ws: [ws.reset_blob(name) for name in ws.blobs()],
            lambda ws: ws.reset(),
            lambda ws: restored(ws, detached(trained(iterations=9))),
        ],
        ids="net net_once operators fills feeds resized kinds views remove reset_blob reset restore".split(),
    )
    def test_the_snapshot_never_changes_whatever_goes_on(self, go_on: Callable[[Workspace], object]) -> None:
        ws = trained()
        frozen = ws.freeze()
        before = content(frozen.snapshot())
        go_on(ws)
        # What is freed must not be handed out again while the snapshot holds it.
        for number in range(20):
            ws.feed_blob(f"new{number}", np.full(50, number, np.float32))
        assert content(frozen.snapshot()) == before
        frozen.lease.release()
        assert leases(ws)[:2] == (0, 0)

    def test_the_workspace_goes_on_exactly_as_one_that_was_never_frozen(self) -> None:
        frozen_often, never = trained(), trained()
        held = []
        for number in range(12):
            held.append(frozen_often.freeze().lease)
            frozen_often.run_net("train", number % 3)
            never.run_net("train", number % 3)
            if number % 2:
                held.pop(0).release()
        assert values(frozen_often) == values(never)

    def test_release_gives_everything_back_and_twice_is_once(self) -> None:
        ws = trained()
        before = leases(ws)
        lease = ws.freeze().lease
        ws.run_net("train", 2)
        during = ws.memory()
        assert during.retained_bytes > 0
        assert during.used_bytes == before[2] + during.retained_bytes
        lease.release()
        lease.release()
        assert leases(ws) == before
        ws.run_net("train", 2)
        assert leases(ws) == before

    def test_a_steady_rhythm_of_snapshots_allocates_nothing_new(self) -> None:
        ws = trained()
        for _ in range(2):
            lease = ws.freeze().lease
            ws.run_net("train", 2)
            lease.release()
        steady = ws.memory()
        for number in range(100):
            lease = ws.freeze().lease
            ws.run_net("train", 1 + number % 3)
            lease.release()
        assert ws.memory() == steady

    def test_overlapping_snapshots_each_keep_their_moment(self) -> None:
        ws = trained()
        before = leases(ws)
        taken = []
        for _ in range(4):
            frozen = ws.freeze()
            taken.append((frozen, content(frozen.snapshot())))
            ws.run_net("train", 2)
        for index in (2, 0, 1, 0):
            taken.pop(index)[0].lease.release()
            ws.run_net("train", 1)
            for frozen, expected in taken:
                assert content(frozen.snapshot()) == expected
        assert leases(ws) == before

    def test_two_snapshots_of_an_unchanged_workspace_cost_nothing(self) -> None:
        ws = trained()
        before = leases(ws)
        first, second = ws.freeze(), ws.freeze()
        first.lease.release()
        assert leases(ws)[0] == before[2]
        ws.run_net("train", 1)
        assert content(second.snapshot())
        second.lease.release()
        assert leases(ws) == before

    def test_an_operator_that_cheats_on_a_leased_buffer_fails_loudly(self, own_operators: None) -> None:
        @register_cpu_operator(OperatorSchema(type="Cheat", doc="Write to an input.", inputs=(1, 1), outputs=(0, 0)))
        def cheat(call: OperatorCall) -> Callable[[], object]:
            array = call.input(0)
            return lambda: array.fill(9)

        ws = Workspace("w")
        ws.feed_blob("x", f32(1, 2))
        net = Net("n")
        net.add("Cheat", ["x"], [])
        ws.create_net(net)
        frozen = ws.freeze()
        for run in (lambda: ws.run_operator("Cheat", ["x"], []), lambda: ws.run_net("n")):
            with pytest.raises(InvalidInputError, match="read-only"):
                run()
        assert frozen.snapshot().blobs[0].array.tolist() == [1, 2]  # type: ignore[union-attr]
        with pytest.raises(ValueError, match="read-only"):
            frozen.snapshot().blobs[0].array[0] = 3  # type: ignore[index]
        frozen.lease.release()

    def test_a_view_of_the_callers_memory_stays_read_only_after_a_release(self, own_operators: None) -> None:
        ws = Workspace("w")
        array = f32(1, 2)
        ws.feed_blob("x", array, copy=False)
        frozen = ws.freeze()
        assert ws.memory().leased_bytes == 8
        ws.feed_blob("x", f32(3, 4))
        frozen.lease.release()
        assert ws.memory().external_bytes == 0
        ws.feed_blob("x", array, copy=False)
        ws.freeze().lease.release()
        ws.run_operator("Scale", ["x"], ["x"], scale=2.0)
        assert array.tolist() == [1, 2]
        assert ws.fetch_blob("x").tolist() == [2, 4]

    def test_a_limit_that_only_snapshots_fill_is_waited_out(self, in_thread: Callable[..., Any]) -> None:
        ws = Workspace("w", memory_limit_bytes=10240)
        ws.feed_blob("x", np.ones(2048, np.float32))
        frozen = ws.freeze()
        expected = content(frozen.snapshot())
        ws.remove_blob("x")
        feeding = in_thread(lambda: ws.feed_blob("y", np.zeros(2048, np.float32)))
        assert content(frozen.snapshot()) == expected
        frozen.lease.release()
        feeding.finish()
        assert ws.fetch_blob("y").sum() == 0

    def test_everything_in_a_snapshot_travels_as_plain_values(self) -> None:
        from blobspace.ops.values import pack_plain, unpack_plain

        snapshot = full().freeze().snapshot()
        for plain in (*snapshot.nets, snapshot.state):
            assert unpack_plain(pack_plain(plain)) == plain
        scopes = [blob.scope for blob in snapshot.blobs]
        assert scopes == sorted(scopes)
        assert all((blob.array is not None) == (blob.kind is Kind.TENSOR) for blob in snapshot.blobs)


class TestRestore:
    def test_everything_comes_back_bit_for_bit(self) -> None:
        ws = full()
        snapshot = detached(ws)
        for other in (Workspace("w"), ws, full()):
            restored(other, snapshot)
            assert content(detached(other)) == content(snapshot)
            assert other.family_names() == ws.family_names()
            assert other.child("a").children() == ["b"]
            assert other.children() == ["a", "empty"]
            assert (other.nets(), other.child("a").nets()) == (["train"], ["inner"])
            assert detached(other).state["generators"] == snapshot.state["generators"]
            assert leases(other)[:2] == (0, 0)

    def test_a_restored_workspace_goes_on_bit_for_bit(self) -> None:
        ws = full()
        other = Workspace("w", seed=77)
        other.feed_blob("left over", f32(1))
        restored(other, detached(ws))
        for each in (ws, other):
            each.run_net("train", 3)
            each.child("a").run_net("inner", 3)
            each.child("a/b").run_operator("GaussianFill", [], ["g"], shape=[3])
        assert values(other) == values(ws)
        assert not other.has_blob("left over")

    def test_a_net_whose_blobs_were_removed_comes_back_and_creates_nothing(self) -> None:
        ws = trained()
        ws.remove_blob("sum")
        ws.remove_blob("one")
        other = Workspace("w")
        restored(other, detached(ws))
        assert other.blobs() == ws.blobs()
        with pytest.raises(NotFoundError, match="'one'"):
            other.run_net("train")
        other.feed_blob("one", np.ones(50, np.float32))
        other.run_net("train")

    def test_a_snapshot_that_is_leased_while_it_is_replaced_stays(self) -> None:
        ws = trained()
        older = detached(ws)
        ws.run_net("train", 2)
        frozen = ws.freeze()
        expected = content(frozen.snapshot())
        restored(ws, older)
        ws.run_net("train", 2)
        assert content(frozen.snapshot()) == expected
        frozen.lease.release()

    def test_a_limit_without_room_for_a_second_copy_changes_nothing(self) -> None:
        snapshot = detached(trained())
        size = trained().memory().used_bytes
        ws = trained(memory_limit_bytes=size + 256)
        before = (content(detached(ws)), leases(ws))
        with pytest.raises(MemoryLimitError, match="restore wanted"):
            staged(ws, snapshot)
        assert (content(detached(ws)), leases(ws)) == before
        ws.clear()
        restored(ws, snapshot)
        assert content(detached(ws)) == content(snapshot)
        ws.run_net("train", 2)

    def test_a_stage_that_is_discarded_leaves_no_trace(self) -> None:
        ws = trained()
        before = leases(ws)
        _, stage = staged(ws, detached(ws))
        assert leases(ws)[2] > before[2]
        stage.discard()
        stage.discard()
        assert leases(ws) == before

    @pytest.mark.parametrize(
        "spoil",
        [
            lambda s: _spoiled(s, "plain", payload=b"\xc1"),
            lambda s: _spoiled(s, "plain", payload=b""),
            lambda s: _spoiled(s, "plain", payload=None),
            lambda s: _spoiled(s, "strings", payload=b"\x01"),
            lambda s: _spoiled(s, "strings", payload=None),
            lambda s: _spoiled(s, "x", array=None),
            lambda s: _spoiled(s, "x", array=f32(1, 2)),
            lambda s: _spoiled(s, "x", name=""),
            lambda s: _spoiled(s, "x", name="a\0b"),
            lambda s: _spoiled(s, "x", scope="no good"),
            lambda s: _spoiled(s, "x", scope="a//b"),
            lambda s: _spoiled(s, "x", name="w"),
            lambda s: _twice(s, "x", "w"),
            lambda s: dataclasses.replace(s, nets=({"scope": "", "net": {"name": "n"}},)),
            lambda s: dataclasses.replace(s, nets=({"scope": "no good", "net": Net("n").definition().to_plain()},)),
            lambda s: dataclasses.replace(s, nets=(*s.nets, {"net": Net("n").definition().to_plain()})),
            lambda s: dataclasses.replace(s, nets=({"scope": "", "net": _unknown_operator()},)),
            lambda s: dataclasses.replace(s, state={"generators": {"": {"algorithm": "MT19937"}}}),
            lambda s: dataclasses.replace(s, state={"generators": {"": {"algorithm": "PCG64"}}}),
            lambda s: dataclasses.replace(s, state={"generators": {"": None}}),
            lambda s: dataclasses.replace(s, state={"generators": {"no good": s.state["generators"][""]}}),
            lambda s: dataclasses.replace(
                s, state={"generators": {"": {**s.state["generators"][""], "state": "not hexadecimal"}}}
            ),
            lambda s: dataclasses.replace(s, state={"generators": {"": {**s.state["generators"][""], "uinteger": -1}}}),
        ],
    )
    def test_a_bad_snapshot_is_refused_and_nothing_changes(
        self, spoil: Callable[[WorkspaceSnapshot], WorkspaceSnapshot]
    ) -> None:
        ws = full()
        before = (content(detached(ws)), ws.nets(), ws.children(), leases(ws))
        other = full()
        other.run_net("train", 3)
        read, stage = staged(ws, detached(other))
        with pytest.raises(BlobspaceError):
            ws.restore(spoil(read), stage)
        stage.discard()
        assert (content(detached(ws)), ws.nets(), ws.children(), leases(ws)) == before
        ws.run_net("train", 2)

    def test_work_that_waits_at_the_gate_of_a_child_runs_on_the_restored_child(
        self, in_thread: Callable[..., Any]
    ) -> None:
        ws = full()
        child = ws.child("a")
        snapshot = detached(ws)
        ws.gate.hold("b", seconds=WAIT_S)
        ws.gate.wait_stopped("b", target=0)
        feeding = in_thread(lambda: child.feed_blob("late", f32(9)))
        restored(ws, snapshot, is_held=True)
        ws.gate.resume("b")
        feeding.finish()
        assert ws.child("a").fetch_blob("late") == 9


def _spoiled(snapshot: WorkspaceSnapshot, blob: str, **changes: Any) -> WorkspaceSnapshot:
    changed = tuple(dataclasses.replace(b, **changes) if b.name == blob else b for b in snapshot.blobs)
    return dataclasses.replace(snapshot, blobs=changed)


def _twice(snapshot: WorkspaceSnapshot, source: str, target: str) -> WorkspaceSnapshot:
    array = next(blob.array for blob in snapshot.blobs if blob.name == source)
    return _spoiled(snapshot, target, array=array)


def _unknown_operator() -> dict[str, Any]:
    from blobspace.ops import NetDef, OperatorDef

    return NetDef(name="n", operators=(OperatorDef(type="Unknown", outputs=("y",)),)).to_plain()


class Steps:
    """An operator whose every run waits until it is allowed to end."""

    def __init__(self, runs: int) -> None:
        self.entered = [threading.Event() for _ in range(runs)]
        self.may_end = [threading.Event() for _ in range(runs)]
        runs_so_far = iter(range(runs))

        @register_cpu_operator(OperatorSchema(type="Wait", doc="Wait.", inputs=(0, 0), outputs=(0, 0)))
        def wait(call: OperatorCall) -> Callable[[], object]:
            def step() -> None:
                run = next(runs_so_far)
                self.entered[run].set()
                assert self.may_end[run].wait(WAIT_S)

            return step


@pytest.fixture
def counting(own_operators: None) -> tuple[Workspace, Steps]:
    """``a`` and ``b`` are equal at every iteration boundary, and not in between."""
    steps = Steps(6)
    ws = Workspace("w")
    ws.feed_blob("a", f32(0))
    ws.feed_blob("b", f32(0))
    ws.feed_blob("one", f32(1))
    net = Net("n")
    net.Add(["a", "one"], "a")
    net.add("Wait", [], [])
    net.Add(["b", "one"], "b")
    ws.create_net(net)
    return ws, steps


class TestPeek:
    def test_a_peek_into_an_iteration_that_does_not_end_times_out_and_leaves_no_lease(
        self, counting: tuple[Workspace, Steps], in_thread: Callable[..., Any]
    ) -> None:
        ws, steps = counting
        running = in_thread(lambda: ws.run_net("n", 1))
        assert steps.entered[0].wait(WAIT_S)
        with pytest.raises(DeadlineError, match="it is in net 'n'"):
            ws.peek_blob("a", seconds=0.01)
        assert ws.blobs() == ["a", "b", "one"]
        assert ws.memory().leased_bytes == 0
        steps.may_end[0].set()
        running.finish()
        assert ws.peek_blob("a") == 1

    def test_a_peek_sees_the_next_iteration_boundary(
        self, counting: tuple[Workspace, Steps], in_thread: Callable[..., Any]
    ) -> None:
        ws, steps = counting
        running = in_thread(lambda: ws.run_net("n", 6))
        for run in range(5):
            assert steps.entered[run].wait(WAIT_S)
            peeking = [in_thread(lambda name=name: ws.peek_blob(name, seconds=WAIT_S)) for name in "ab"]
            wait_until_looking(ws, 2)
            steps.may_end[run].set()
            assert [peek.finish().item() for peek in peeking] == [run + 1, run + 1]
        steps.may_end[5].set()
        running.finish()
        assert leases(ws)[:2] == (0, 0)

    def test_what_was_peeked_is_the_callers_own(self, counting: tuple[Workspace, Steps]) -> None:
        ws, _ = counting
        peeked = ws.peek_blob("a")
        peeked[:] = 7
        assert ws.fetch_blob("a") == 0


def wait_until_looking(ws: Workspace, count: int) -> None:
    moment = threading.Event()
    for _ in range(2000):
        if ws.gate._looking >= count:
            return
        moment.wait(0.005)
    raise AssertionError("nobody looks")
