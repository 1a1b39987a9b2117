"""A compiled net does what its operators do one by one, bit for bit, whatever happens between its iterations."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from blobspace.ops import (
    BlobspaceError,
    InvalidInputError,
    MemoryLimitError,
    Net,
    NetDef,
    NotFoundError,
    OperatorCall,
    OperatorDef,
    OperatorSchema,
    register_cpu_operator,
)
from blobspace.workspace_actors import Workspace

FIXED = ("a", "b", "c", "d")  # float32 (4,)
FREE = ("u", "v")  # whatever their last writer made of them

fixed, free = st.sampled_from(FIXED), st.sampled_from(FREE)


def op(type_: str, inputs: list[str], outputs: list[str], **args: Any) -> OperatorDef:
    return OperatorDef(type=type_, inputs=tuple(inputs), outputs=tuple(outputs), args=args)


OPERATORS = st.one_of(
    st.builds(lambda t, x, y, z: op(t, [x, y], [z]), st.sampled_from(["Add", "Mul", "Sub"]), fixed, fixed, fixed),
    # Sum may be in place with its first input alone.
    st.builds(
        lambda x, y, z: op("Sum", [x, y], [z if z != y else next(other for other in FIXED if other != y)]),
        fixed,
        fixed,
        fixed,
    ),
    st.builds(lambda x, y: op("Relu", [x], [y]), fixed, fixed),
    st.builds(lambda x: op("Scale", [x], [x], scale=0.5), fixed),
    st.builds(lambda x, y: op("Copy", [x], [y]), fixed, free),
    st.builds(lambda x, shape: op("Reshape", [x], [x, "old"], shape=shape), free, st.sampled_from([[-1], [2, -1]])),
    st.builds(lambda x, y: op("Reshape", [x, "shape"], [y, "old"]), fixed, free),
    st.builds(lambda x, y: op("Slice", [x, "starts", "ends"], [y]), fixed, free),
    st.builds(lambda x, n: op("ConstantFill", [], [x], shape=[n], value=1.5), free, st.integers(1, 5)),
    st.builds(lambda x, y: op("ConstantFill", [x], [y], value=-0.5), free, free),
    st.builds(lambda x: op("UniformFill", [], [x], shape=[4], min=-1.0, max=1.0), fixed),
    st.just(op("Iter", ["iter"], ["iter"])),
    st.just(op("GetAllBlobNames", [], ["names"])),
    st.just(op("Copy", ["names"], ["names2"])),
)
NETS = st.lists(OPERATORS, min_size=1, max_size=8)
BETWEEN = st.lists(
    st.one_of(
        st.tuples(st.just("run"), st.integers(1, 4)),
        st.tuples(st.just("freeze"), st.just(None)),
        st.tuples(st.just("release"), st.just(None)),
        st.tuples(st.just("peek"), fixed),
        st.tuples(st.just("feed"), st.tuples(fixed, st.integers(-3, 3), st.booleans())),
        st.tuples(st.just("feed free"), st.tuples(free, st.integers(1, 6))),
        st.tuples(st.just("ends"), st.integers(1, 4)),
        st.tuples(st.just("shape"), st.sampled_from([[2, 2], [4], [1, 4]])),
        st.tuples(st.just("operator"), OPERATORS),
        st.tuples(st.just("other blob"), st.integers(0, 3)),
    ),
    max_size=10,
)


def prepared(name: str) -> Workspace:
    ws = Workspace(name)
    for position, blob in enumerate(FIXED):
        ws.feed_blob(blob, np.linspace(-1, 1, 4, dtype=np.float32) + np.float32(position / 3))
    for blob in FREE:
        ws.feed_blob(blob, np.linspace(-2, 2, 4, dtype=np.float32))
    ws.feed_blob("starts", np.array([0], np.int64))
    ws.feed_blob("ends", np.array([3], np.int64))
    ws.feed_blob("shape", np.array([2, 2], np.int64))
    ws.feed_blob("old", np.array([4], np.int64))
    ws.feed_blob("iter", np.array([0], np.int64))
    ws.feed_blob("names", ["none"])
    ws.feed_blob("names2", ["none"])
    return ws


def seen(ws: Workspace) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in ws.blobs():
        value = ws.fetch_blob(name)
        found[name] = (value.dtype.name, value.shape, value.tolist() if value.dtype == object else value.tobytes())
    return found


def attempt(work: Callable[[], object]) -> type[BaseException] | None:
    try:
        work()
    except BlobspaceError as error:
        return type(error)
    return None


def one_by_one(ws: Workspace, operators: list[OperatorDef]) -> None:
    for operator in operators:
        ws.run_operator(operator)


class TestEqualToOneByOne:
    @settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(operators=NETS, between=BETWEEN)
    def test_a_compiled_net_equals_its_operators_run_one_by_one(
        self, operators: list[OperatorDef], between: list[tuple[str, Any]]
    ) -> None:
        compiled, interpreted = prepared("w"), prepared("w")
        compiled.create_net(NetDef(name="n", operators=tuple(operators)))
        held: list[tuple[Any, dict[str, bytes]]] = []
        for what, how in [*between, ("run", 3)]:
            match what:
                case "run":
                    for _ in range(how):
                        failed = attempt(lambda: compiled.run_net("n"))
                        assert failed is attempt(lambda: one_by_one(interpreted, operators))
                        if failed is None:
                            assert seen(compiled) == seen(interpreted)
                case "freeze":
                    frozen = compiled.freeze()
                    arrays = {b.name: b.array.tobytes() for b in frozen.snapshot().blobs if b.array is not None}
                    held.append((frozen, arrays))
                case "release" if held:
                    held.pop(0)[0].lease.release()
                case "peek":
                    compiled.peek_blob(how)
                case "feed":
                    name, value, copy = how
                    for ws in (compiled, interpreted):
                        ws.feed_blob(name, np.full(4, value, np.float32), copy=copy)
                case "feed free":
                    name, size = how
                    for ws in (compiled, interpreted):
                        ws.feed_blob(name, np.arange(size, dtype=np.float32))
                case "ends":
                    for ws in (compiled, interpreted):
                        ws.feed_blob("ends", np.array([how], np.int64))
                case "shape":
                    for ws in (compiled, interpreted):
                        ws.feed_blob("shape", np.array(how, np.int64))
                case "operator":
                    failures = [attempt(partial(ws.run_operator, how)) for ws in (compiled, interpreted)]
                    assert failures[0] is failures[1]
                case "other blob":
                    for ws in (compiled, interpreted):
                        ws.feed_blob(f"other{how}", np.zeros(4, np.float32))
                case _:
                    pass
            for frozen, arrays in held:
                now = {b.name: b.array.tobytes() for b in frozen.snapshot().blobs if b.array is not None}
                assert now == arrays
        for frozen, _ in held:
            frozen.lease.release()
        assert compiled.memory().leased_bytes == compiled.memory().retained_bytes == 0
        assert compiled.memory().used_bytes - compiled.memory().external_bytes <= interpreted.memory().used_bytes * 2

    def test_many_iterations_in_one_call_equal_as_many_calls(self) -> None:
        net = NetDef(
            name="n",
            operators=(
                op("UniformFill", [], ["a"], shape=[4]),
                op("Add", ["a", "b"], ["b"]),
                op("Slice", ["b", "starts", "ends"], ["u"]),
                op("Iter", ["iter"], ["iter"]),
            ),
        )
        at_once, call_by_call = prepared("w"), prepared("w")
        for ws in (at_once, call_by_call):
            ws.create_net(net)
        at_once.run_net("n", 20)
        for _ in range(20):
            call_by_call.run_net("n")
        assert seen(at_once) == seen(call_by_call)


class Recorder:
    """An operator that counts how often it is bound and how often it is run."""

    def __init__(self, *, dynamic: bool = False, name: str = "Record") -> None:
        self.bound = self.ran = 0

        @register_cpu_operator(
            OperatorSchema(type=name, doc="Count.", inputs=(1, 1), outputs=(1, 1), in_place=frozenset({(0, 0)})),
            dynamic=dynamic,
        )
        def record(call: OperatorCall) -> Callable[[], object]:
            self.bound += 1
            x = call.input(0)
            y = call.output(0, x.shape, x.dtype)

            def step() -> None:
                self.ran += 1
                np.copyto(y, x)

            return step


@pytest.mark.usefixtures("own_operators")
class TestBinding:
    def record_net(self, ws: Workspace, name: str = "Record") -> None:
        ws.feed_blob("x", np.ones(3, np.float32))
        net = Net("n")
        net.add(name, ["x"], ["y"])
        ws.create_net(net)

    def test_a_net_binds_until_its_buffers_are_settled_and_then_no_more(self) -> None:
        recorder, ws = Recorder(), Workspace("w")
        self.record_net(ws)
        ws.run_net("n", 50)
        assert recorder.ran == 50
        assert recorder.bound <= 2

    def test_a_feed_of_the_same_spec_and_reading_bind_nothing_anew(self) -> None:
        recorder, ws = Recorder(), Workspace("w")
        self.record_net(ws)
        ws.run_net("n", 3)
        bound = recorder.bound
        for value in range(5):
            ws.feed_blob("x", np.full(3, value, np.float32))
            ws.run_net("n")
            assert ws.fetch_blob("y").tolist() == [value] * 3
            ws.blobs(), ws.specs(), ws.memory()
        assert recorder.bound == bound

    @pytest.mark.parametrize(
        "change",
        [
            lambda ws: ws.feed_blob("x", np.zeros(5, np.float32)),
            lambda ws: ws.feed_blob("x", np.zeros(3, np.int8)),
            lambda ws: ws.feed_blob("x", np.zeros(3, np.float32), copy=False),
            lambda ws: ws.feed_blob("y", "text"),
            lambda ws: ws.remove_blob("y"),
            lambda ws: ws.reset_blob("y"),
            lambda ws: ws.freeze(),
            lambda ws: ws.peek_blob("y"),
        ],
        ids="shape dtype view kind remove reset freeze peek".split(),
    )
    def test_it_binds_anew_after(self, change: Callable[[Workspace], object]) -> None:
        recorder, ws = Recorder(), Workspace("w")
        self.record_net(ws)
        ws.run_net("n", 3)
        bound = recorder.bound
        change(ws)
        ws.run_net("n", 5)
        assert bound < recorder.bound <= bound + 2
        np.testing.assert_array_equal(ws.fetch_blob("y"), ws.fetch_blob("x"))

    def test_a_dynamic_operator_is_bound_at_each_run(self) -> None:
        recorder, ws = Recorder(dynamic=True), Workspace("w")
        self.record_net(ws)
        ws.run_net("n", 10)
        assert recorder.bound == recorder.ran == 10

    def test_the_operators_after_a_dynamic_one_that_changes_a_shape_see_the_new_shape_at_once(self) -> None:
        ws = Workspace("w")
        ws.feed_blob("x", np.arange(6, dtype=np.float32))
        ws.feed_blob("starts", np.array([0]))
        ws.feed_blob("ends", np.array([2]))
        net = Net("n")
        net.Scale("x", "x", scale=1.0)
        net.Slice(["x", "starts", "ends"], "part")
        net.Scale("part", "doubled", scale=2.0)
        ws.create_net(net)
        for size in (2, 2, 2, 5, 5, 5, 1, 6, 6):
            ws.feed_blob("ends", np.array([size]))
            ws.run_net("n")
            assert ws.fetch_blob("doubled").tolist() == [2.0 * i for i in range(size)]

    def test_a_failure_in_a_bound_step_is_placed_as_one_in_a_binding(self) -> None:
        calls = iter(range(100))

        @register_cpu_operator(OperatorSchema(type="Fifth", doc="Fail.", inputs=(0, 0), outputs=(0, 0)))
        def fifth(call: OperatorCall) -> Callable[[], object]:
            def step() -> None:
                if next(calls) == 5:
                    raise KeyError("five")

            return step

        ws = prepared("w")
        operators = [
            op("Add", ["a", "b"], ["c"]),
            op("Slice", ["c", "starts", "ends"], ["u"]),
            op("Relu", ["a"], ["d"]),
        ]
        ws.create_net(NetDef(name="n", operators=(*operators, op("Fifth", [], []), op("Relu", ["b"], ["b"]))))
        with pytest.raises(InvalidInputError, match=r"KeyError: 'five'\. In operator 3 of 5 of net 'n', iteration 5"):
            ws.run_net("n", 50)
        ws.run_net("n", 3)

    def test_a_failed_iteration_leaves_a_net_that_runs(self) -> None:
        ws = prepared("w")
        ws.create_net(NetDef(name="n", operators=(op("Add", ["a", "b"], ["c"]), op("Mul", ["c", "d"], ["c"]))))
        ws.run_net("n", 3)
        expected = ws.fetch_blob("c")
        d = ws.fetch_blob("d")
        ws.feed_blob("d", np.zeros((3, 3), np.float32))
        with pytest.raises(InvalidInputError, match="operator 1 of 2"):
            ws.run_net("n")
        ws.remove_blob("d")
        with pytest.raises(NotFoundError):
            ws.run_net("n")
        ws.feed_blob("d", d)
        ws.run_net("n", 3)
        np.testing.assert_array_equal(ws.fetch_blob("c"), expected)

    def test_a_net_that_meets_the_limit_in_a_binding_after_a_freeze_goes_on_after_the_release(self) -> None:
        ws = Workspace("w", memory_limit_bytes=20_000)
        ws.feed_blob("x", np.zeros(1024, np.float32))
        ws.feed_blob("one", np.ones(1024, np.float32))
        ws.feed_blob("pad", np.zeros(2048, np.float32))
        net = Net("n")
        net.Add(["x", "one"], "x")
        ws.create_net(net)
        ws.run_net("n", 3)
        frozen = ws.freeze()
        # The snapshot's own buffers belong to blobs still, so waiting for its release could not make room.
        with pytest.raises(MemoryLimitError, match=r"operator 0 of 1 of net 'n'"):
            ws.run_net("n")
        assert ws.fetch_blob("x").max() == 3
        frozen.lease.release()
        ws.run_net("n")
        assert ws.fetch_blob("x").min() == 4

    def test_an_operator_in_place_that_changes_the_shape_still_reads_its_whole_input(self) -> None:
        @register_cpu_operator(
            OperatorSchema(type="Turn", doc="x[::-1][:3].", inputs=(1, 1), outputs=(1, 1), in_place=frozenset({(0, 0)}))
        )
        def turn(call: OperatorCall) -> Callable[[], object]:
            x = call.input(0)
            y = call.output(0, (3,), x.dtype)

            def step() -> None:
                for position in range(3):
                    y[position] = x[-1 - position]

            return step

        ws = Workspace("w")
        ws.feed_blob("x", np.arange(4, dtype=np.float32))
        ws.run_operator("Turn", ["x"], ["x"])
        assert ws.fetch_blob("x").tolist() == [3, 2, 1]

    def test_wanting_a_tensor_of_an_unusual_shape_is_an_error_of_the_operator(self) -> None:
        ws = Workspace("w")
        with pytest.raises(InvalidInputError):
            ws.run_operator("ConstantFill", [], ["x"], shape=[-1])
        ws.run_operator("ConstantFill", [], ["x"], shape=[0, 3])
        assert ws.fetch_blob("x").shape == (0, 3)
