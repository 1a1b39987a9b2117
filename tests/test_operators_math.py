"""Arithmetic, linear, loss, shape and reduction operators: what the recorded cases do not show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from blobspace.ops import (
    InvalidInputError,
    Net,
    OperatorDef,
    add_gradient_operators,
    gradient_operators,
)
from blobspace.workspace_actors.workspace import Workspace

pytestmark = pytest.mark.filterwarnings("error")

Array = npt.NDArray[Any]


@pytest.fixture
def ws() -> Workspace:
    return Workspace("t")


def numbers(*shape: int, seed: int = 0, positive: bool = False) -> Array:
    """Return float64 numbers between 0.5 and 1.5 in absolute value, none of them near a kink at 0."""
    generator = np.random.default_rng(seed)
    signs = 1.0 if positive else generator.choice([-1.0, 1.0], shape)
    return np.asarray(signs * generator.uniform(0.5, 1.5, shape))


def probabilities(rows: int, columns: int) -> Array:
    weights = numbers(rows, columns, seed=7, positive=True)
    return weights / weights.sum(axis=1, keepdims=True)


def run(
    type_: str, feeds: Mapping[str, Any], *, outputs: Sequence[str] = ("Y",), is_frozen: bool = False, **args: Any
) -> list[Any]:
    """Run one operator in a fresh workspace, with the feeds as inputs in their order; return its outputs."""
    ws = Workspace("t")
    for name, value in feeds.items():
        ws.feed_blob(name, value)
    if is_frozen:
        ws.freeze()
    ws.run_operator(type_, list(feeds), list(outputs), **args)
    return [ws.fetch_blob(name) for name in outputs]


def refused(type_: str, *inputs: Any, outputs: Sequence[str] = ("Y",), **args: Any) -> str:
    """Return the text of the error with which an operator refuses its inputs."""
    with pytest.raises(InvalidInputError) as caught:
        run(type_, {f"x{index}": value for index, value in enumerate(inputs)}, outputs=outputs, **args)
    return str(caught.value)


# Gradients against finite differences ---------------------------------------------------------------------------


def check_gradient(
    type_: str, feeds: Mapping[str, Any], args: Mapping[str, Any], outputs: Sequence[str], given_for: Sequence[str]
) -> None:
    """Compare an operator's gradient operators with central differences of ``sum(output * weight)``."""
    operator = OperatorDef(type=type_, inputs=tuple(feeds), outputs=tuple(outputs), args=args)
    ws = Workspace("t")
    for name, value in feeds.items():
        ws.feed_blob(name, value)
    ws.run_operator(operator)
    weights = {name: numbers(*ws.fetch_blob(name).shape, seed=99) for name in given_for}
    operators, gradients = gradient_operators(operator, {name: f"{name}_grad" for name in given_for})
    for name, weight in weights.items():
        ws.feed_blob(f"{name}_grad", weight)
    for made in operators:
        assert made.is_gradient_op
        ws.run_operator(made)
    assert gradients

    def loss(changed: Mapping[str, Array]) -> float:
        found = run(type_, {**feeds, **changed}, outputs=outputs, **args)
        results = dict(zip(outputs, found, strict=True))
        return float(sum((results[name] * weight).sum() for name, weight in weights.items()))

    for name, gradient in gradients.items():
        assert isinstance(gradient, str)
        value, step = feeds[name], 1e-6
        expected = np.zeros_like(value)
        for index in np.ndindex(value.shape):
            up, down = value.copy(), value.copy()
            up[index] += step
            down[index] -= step
            expected[index] = (loss({name: up}) - loss({name: down})) / (2 * step)
        found = ws.fetch_blob(gradient)
        assert found.dtype == value.dtype
        assert found.shape == value.shape
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-7, err_msg=name)


BROADCASTS: list[tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = [
    ((2, 3), (2, 3), {}),
    ((), (), {}),
    ((2, 3), (), {}),
    ((), (2, 3), {}),
    ((2, 1, 4), (3, 1), {}),
    ((1,), (3, 2), {}),
    ((0, 3), (3,), {}),
    ((1, 3), (0, 3), {}),
    ((2, 3, 4), (3,), {"broadcast": 1, "axis": 1}),
    ((2, 3, 4), (2, 3), {"broadcast": 1, "axis": 0}),
    ((2, 3, 4), (3, 4), {"broadcast": 1}),
    ((2, 3, 4), (1, 3, 1), {"broadcast": 1, "axis": 0}),
    ((2, 3), (1, 1, 1), {"broadcast": 1}),
    ((2, 3, 4), (3,), {"broadcast": 1, "axis_str": "C"}),
]


@pytest.mark.parametrize("type_", ["Add", "Sub", "Mul", "Div"])
@pytest.mark.parametrize(("a", "b", "args"), BROADCASTS)
def test_the_gradient_of_arithmetic_is_summed_over_whatever_was_broadcast(
    type_: str, a: tuple[int, ...], b: tuple[int, ...], args: dict[str, Any]
) -> None:
    check_gradient(type_, {"A": numbers(*a, seed=1), "B": numbers(*b, seed=2)}, args, ["C"], ["C"])


@pytest.mark.parametrize("type_", ["Add", "Sub"])
@pytest.mark.parametrize("output", ["A", "B"])
def test_the_gradient_is_right_where_the_forward_operator_ran_in_place(type_: str, output: str) -> None:
    check_gradient(type_, {"A": numbers(2, 3), "B": numbers(2, 3, seed=1)}, {}, [output], [output])


UNARY = ["Negative", "Abs", "Sqr", "Sqrt", "Exp", "Log", "Relu", "Tanh", "Sigmoid"]


@pytest.mark.parametrize("type_", [*UNARY, "Copy"])
@pytest.mark.parametrize("shape", [(2, 3), (), (0, 2)])
def test_the_gradient_of_a_function_of_one_number_is_its_slope(type_: str, shape: tuple[int, ...]) -> None:
    check_gradient(type_, {"X": numbers(*shape, positive=type_ in ("Sqrt", "Log"))}, {}, ["Y"], ["Y"])


@pytest.mark.parametrize("type_", ["Negative", "Sqrt", "Exp", "Relu", "Tanh", "Sigmoid"])
def test_operators_that_need_only_their_output_for_the_gradient_may_run_in_place(type_: str) -> None:
    check_gradient(type_, {"X": numbers(3, 2, positive=type_ == "Sqrt")}, {}, ["X"], ["X"])


A, B, C = numbers(2, 3, 4, seed=1), numbers(4, 3, seed=2), numbers(3, seed=3)
OTHERS: list[tuple[str, dict[str, Array], dict[str, Any], list[str], list[str]]] = [
    ("Scale", {"X": A}, {"scale": -2.5}, ["Y"], ["Y"]),
    ("Scale", {"X": A}, {}, ["X"], ["X"]),
    ("WeightedSum", {"A": A, "a": numbers(1), "B": A + 1, "b": numbers(1, seed=5)}, {"grad_on_w": 1}, ["Y"], ["Y"]),
    ("FC", {"X": numbers(2, 3), "W": B, "b": numbers(4)}, {}, ["Y"], ["Y"]),
    ("FC", {"X": numbers(2, 2, 3), "W": numbers(5, 3, 1), "b": numbers(5)}, {"axis": 2}, ["Y"], ["Y"]),
    ("FC", {"X": numbers(2, 2, 3), "W": numbers(2, 2, 3), "b": numbers(4)}, {"axis": -1, "axis_w": 2}, ["Y"], ["Y"]),
    ("FC", {"X": numbers(0, 3), "W": B, "b": numbers(4)}, {}, ["Y"], ["Y"]),
    ("MatMul", {"A": A, "B": numbers(2, 3, 4, 2)}, {"axis_a": 2, "axis_b": 3, "trans_b": 1, "trans_a": 0}, [], []),
    ("Softmax", {"X": A}, {}, ["Y"], ["Y"]),
    ("Softmax", {"X": A}, {"axis": 2}, ["Y"], ["Y"]),
    ("Softmax", {"X": A}, {"axis": -1}, ["Y"], ["Y"]),
    ("Softmax", {"X": numbers(0, 3)}, {}, ["Y"], ["Y"]),
    ("AveragedLoss", {"X": A}, {}, ["Y"], ["Y"]),
    ("AveragedLoss", {"X": numbers()}, {}, ["Y"], ["Y"]),
    ("AveragedLoss", {"X": numbers(0)}, {}, ["Y"], ["Y"]),
    ("SquaredL2Distance", {"X": A, "Y": A[::-1].copy()}, {}, ["Z"], ["Z"]),
    ("SquaredL2Distance", {"X": C, "Y": C + 1}, {}, ["Z"], ["Z"]),
    ("SquaredL2Distance", {"X": numbers(), "Y": numbers(seed=1)}, {}, ["Z"], ["Z"]),
    ("Reshape", {"X": A}, {"shape": [0, -1]}, ["Y", "old"], ["Y"]),
    ("Reshape", {"X": A}, {"shape": [-1]}, ["X", "old"], ["X"]),
    ("Cast", {"X": A}, {"to": "double", "from_type": 13}, ["Y"], ["Y"]),
    ("Slice", {"X": A}, {"starts": [0, 1], "ends": [-2, 3]}, ["Y"], ["Y"]),
    ("Concat", {"A": A, "B": A + 1}, {}, ["Y", "split"], ["Y"]),
    ("Concat", {"A": A, "B": A + 1}, {"axis": -1, "add_axis": 1}, ["Y", "split"], ["Y"]),
    ("Concat", {"A": A, "B": numbers(0, 3, 4)}, {"axis": 0}, ["Y", "split"], ["Y"]),
    ("Split", {"X": A}, {"axis": 2}, ["P", "Q"], ["P", "Q"]),
    ("Split", {"X": A}, {"split": [1, 0, 2]}, ["P", "Q", "R"], ["P", "Q", "R"]),
    ("Split", {"X": A}, {"axis": 1, "add_axis": 1}, ["P", "Q", "R"], ["P", "Q", "R"]),
    ("Flatten", {"X": A}, {"axis": 0}, ["Y"], ["Y"]),
    ("Flatten", {"X": A}, {"axis": 3}, ["Y"], ["Y"]),
    ("FlattenToVec", {"X": A}, {}, ["Y"], ["Y"]),
    ("ExpandDims", {"X": A}, {"dims": [3, 0, 0]}, ["Y"], ["Y"]),
    ("Squeeze", {"X": numbers(1, 3, 1)}, {"dims": [2]}, ["Y"], ["Y"]),
    ("Transpose", {"X": A}, {"axes": [1, 2, 0]}, ["Y"], ["Y"]),
    ("Transpose", {"X": A}, {}, ["Y"], ["Y"]),
    ("SumElements", {"X": A}, {}, ["Y"], ["Y"]),
    ("SumElements", {"X": A}, {"average": True}, ["Y"], ["Y"]),
    ("ReduceSum", {"X": A}, {"axes": [-1, 0], "keepdims": 0}, ["Y"], ["Y"]),
    ("ReduceMean", {"X": A}, {"axes": [1]}, ["Y"], ["Y"]),
    ("ReduceMean", {"X": numbers()}, {}, ["Y"], ["Y"]),
    ("ReduceFrontSum", {"X": A}, {"num_reduce_dim": 2}, ["Y"], ["Y"]),
    ("ReduceBackSum", {"X": A}, {"num_reduce_dim": 3}, ["Y"], ["Y"]),
    ("ReduceBackSum", {"X": A}, {"num_reduce_dim": 0}, ["Y"], ["Y"]),
    ("ReduceFrontMean", {"X": A}, {}, ["Y"], ["Y"]),
    ("ReduceBackMean", {"X": A}, {}, ["Y"], ["Y"]),
]


@pytest.mark.parametrize(("type_", "feeds", "args", "outputs", "given_for"), [case for case in OTHERS if case[3]])
def test_every_other_gradient_agrees_with_finite_differences(
    type_: str, feeds: dict[str, Array], args: dict[str, Any], outputs: list[str], given_for: list[str]
) -> None:
    check_gradient(type_, feeds, args, outputs, given_for)


@pytest.mark.parametrize("trans_a", [0, 1])
@pytest.mark.parametrize("trans_b", [0, 1])
def test_the_gradient_of_a_matrix_product_knows_its_flattening_and_transposing(trans_a: int, trans_b: int) -> None:
    a = numbers(*((2, 2, 3) if trans_a else (3, 2, 2)))
    b = numbers(*((5, 2, 2) if trans_b else (2, 2, 5)), seed=1)
    args = {"trans_a": trans_a, "trans_b": trans_b, "axis_a": 2 if trans_a else 1, "axis_b": 1 if trans_b else 2}
    check_gradient("MatMul", {"A": a, "B": b}, args, ["Y"], ["Y"])


@pytest.mark.parametrize("is_weighted", [False, True])
@pytest.mark.parametrize("label_prob", [0, 1])
@pytest.mark.parametrize("axis", [1, 2])
def test_the_gradient_of_softmax_with_loss_agrees_with_finite_differences(
    is_weighted: bool, label_prob: int, axis: int
) -> None:
    logits = numbers(2, 3, 4)
    rows = 2 if axis == 1 else 6
    classes = 24 // rows
    labels = np.arange(rows, dtype=np.int32).reshape(logits.shape[:axis]) % classes
    feeds: dict[str, Array] = {"X": logits, "L": labels}
    if label_prob:
        feeds["L"] = probabilities(rows, classes).reshape(logits.shape)
    if is_weighted:
        feeds["w"] = numbers(rows, positive=True)
    check_gradient(
        "SoftmaxWithLoss", feeds, {"axis": axis, "label_prob": label_prob, "scale": 0.7}, ["P", "loss"], ["loss"]
    )


@pytest.mark.parametrize("shape", [(3, 4), (3, 2, 2), (4,)])
def test_the_gradient_of_cross_entropy_agrees_with_finite_differences(shape: tuple[int, ...]) -> None:
    x = numbers(*shape, positive=True) / 2
    rows = shape[0] if len(shape) > 1 else 1
    check_gradient("LabelCrossEntropy", {"X": x, "L": np.arange(rows, dtype=np.int32)}, {}, ["Y"], ["Y"])
    check_gradient("CrossEntropy", {"X": x, "L": probabilities(rows, x.size // rows)}, {}, ["Y"], ["Y"])


@pytest.mark.parametrize("type_", ["ReduceFrontSum", "ReduceFrontMean", "ReduceBackSum", "ReduceBackMean"])
def test_lengths_limit_a_reduction_and_its_gradient(type_: str) -> None:
    feeds: dict[str, Array] = {"X": numbers(3, 3), "lengths": np.array([3, 0, 2], np.int32)}
    check_gradient(type_, feeds, {}, ["Y"], ["Y"])


def test_a_slice_given_by_tensors_has_the_same_gradient() -> None:
    feeds: dict[str, Array] = {"X": numbers(3, 4), "s": np.array([1, 0], np.int32), "e": np.array([-1, -3], np.int64)}
    check_gradient("Slice", feeds, {}, ["Y"], ["Y"])


def test_all_terms_of_a_sum_share_its_gradient() -> None:
    operator = OperatorDef(type="Sum", inputs=("A", "B", "C"), outputs=("D",))
    assert gradient_operators(operator, {"D": "D_grad"}) == ([], dict.fromkeys("ABC", "D_grad"))


def test_a_gradient_that_flows_through_two_uses_of_a_blob_is_summed(ws: Workspace) -> None:
    ws.feed_blob("x", np.array([0.5, 2.0], np.float32))
    net = Net("n")
    net.Sqrt("x", "root")
    net.Sqr("x", "square")
    net.Mul(["root", "x"], "product")
    net.Add(["square", "product"], "y")
    gradients = add_gradient_operators(net, ["y"])
    ws.run_net_once(net)
    x = ws.fetch_blob("x")
    np.testing.assert_allclose(ws.fetch_blob(str(gradients["x"])), 2 * x + 1.5 * np.sqrt(x), rtol=1e-6)


def test_gradients_stop_or_are_refused_as_in_caffe2() -> None:
    stop = OperatorDef(type="StopGradient", inputs=("x",), outputs=("y",))
    assert gradient_operators(stop, {"y": "y_grad"}) == ([], {})
    for type_ in ("Accuracy", "EQ", "LT", "And", "Not", "Sign", "Mod"):
        count = 1 if type_ in ("Not", "Sign", "Mod") else 2
        operator = OperatorDef(type=type_, inputs=("a", "b")[:count], outputs=("y",))
        with pytest.raises(InvalidInputError, match="should not call gradient"):
            gradient_operators(operator, {"y": "y_grad"})
    cast = OperatorDef(type="Cast", inputs=("x",), outputs=("y",), args={"to": 1})
    with pytest.raises(InvalidInputError, match="needs its argument from_type"):
        gradient_operators(cast, {"y": "y_grad"})


# In place, copy-on-write, bound nets ----------------------------------------------------------------------------


@pytest.mark.parametrize("is_frozen", [False, True])
@pytest.mark.parametrize(("a", "b"), [((2, 3), (2, 3)), ((2, 3), (3,)), ((3,), (2, 3)), ((2, 1), (1, 3))])
@pytest.mark.parametrize(
    ("type_", "target"),
    [(f"{name}Gradient", target) for name in ("Add", "Sub", "Mul") for target in (0, 1)] + [("DivGradient", 0)],
)
def test_gradients_of_arithmetic_may_overwrite_the_gradient_they_read(
    type_: str, a: tuple[int, ...], b: tuple[int, ...], target: int, is_frozen: bool
) -> None:
    feeds = {"g": numbers(2, 3), "A": numbers(*a, seed=1), "B": numbers(*b, seed=2)}
    if type_ == "DivGradient":
        feeds["C"] = feeds["A"] / feeds["B"]
    outputs = ["dA", "dB"]
    expected = run(type_, feeds, outputs=outputs)
    outputs[target] = "g"
    found = run(type_, feeds, outputs=outputs, is_frozen=is_frozen)
    for want, got in zip(expected, found, strict=True):
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("is_frozen", [False, True])
@pytest.mark.parametrize("type_", ["ReluGradient", "TanhGradient", "SigmoidGradient", "AbsGradient"])
def test_gradients_of_activations_may_overwrite_the_gradient_they_read(type_: str, is_frozen: bool) -> None:
    feeds = {"known": numbers(2, 3), "g": numbers(2, 3, seed=1)}
    (expected,) = run(type_, feeds)
    (found,) = run(type_, feeds, outputs=["g"], is_frozen=is_frozen)
    np.testing.assert_array_equal(found, expected)


def test_the_three_input_form_of_the_quotient_gradient_is_understood() -> None:
    a, b, g = numbers(2, 3), numbers(3, seed=1), numbers(2, 3, seed=2)
    expected = run("DivGradient", {"g": g, "A": a, "B": b, "C": a / b}, outputs=["dA", "dB"])
    found = run("DivGradient", {"B": b, "C": a / b, "g": g}, outputs=["dA", "dB"])
    np.testing.assert_array_equal(found[0], expected[0])
    np.testing.assert_array_equal(found[1], expected[1])


IN_PLACE: list[tuple[str, tuple[Array, ...], dict[str, Any]]] = [
    *((type_, (numbers(2, 3), numbers(2, 3, seed=1)), {}) for type_ in ("Add", "Sub", "Mul", "Div")),
    ("Div", (np.array([7, -7, 6]), np.array([2, 2, -3])), {}),
    ("Sum", (numbers(2, 3), numbers(2, 3, seed=1), numbers(2, 3, seed=2)), {}),
    ("Sum", (numbers(2, 3),), {}),
    ("WeightedSum", (numbers(2, 3), numbers(1), numbers(2, 3, seed=1), numbers(1, seed=3)), {}),
    ("WeightedSum", (numbers(2, 3), numbers(1)), {}),
    *((type_, (numbers(2, 3, positive=True),), {}) for type_ in (*UNARY, "StopGradient", "Sign")),
    ("Scale", (numbers(2, 3),), {"scale": 3.0}),
    ("Mod", (np.array([-8, 6, 2, -5]),), {"divisor": 4}),
    ("Not", (np.array([True, False]),), {}),
    ("ExpandDims", (numbers(2, 3),), {"dims": [0]}),
    ("Squeeze", (numbers(2, 1),), {"dims": [1]}),
]


@pytest.mark.parametrize("is_frozen", [False, True])
@pytest.mark.parametrize(("type_", "inputs", "args"), IN_PLACE)
def test_operators_may_overwrite_their_first_input(
    type_: str, inputs: tuple[Array, ...], args: dict[str, Any], is_frozen: bool
) -> None:
    feeds = {f"x{index}": array for index, array in enumerate(inputs)}
    (expected,) = run(type_, feeds, **args)
    (found,) = run(type_, feeds, outputs=["x0"], is_frozen=is_frozen, **args)
    np.testing.assert_array_equal(found, expected)
    assert found.shape == expected.shape


@pytest.mark.parametrize("shape", [[2, 3], [3, 2]])
def test_reshape_in_place_keeps_the_elements(ws: Workspace, shape: list[int]) -> None:
    x = numbers(2, 3)
    ws.feed_blob("x", x)
    for _ in range(2):
        ws.run_operator("Reshape", ["x"], ["x", "old"], shape=shape)
    np.testing.assert_array_equal(ws.fetch_blob("x"), x.reshape(shape))
    assert ws.fetch_blob("old").tolist() == shape


def test_a_bound_net_computes_from_the_values_of_each_iteration(ws: Workspace) -> None:
    net = Net("n")
    net.FC(["x", "w", "b"], "h")
    net.Relu("h", "h")
    net.Softmax("h", "p")
    net.Slice(["p"], "part", starts=[0, 1], ends=[-1, 3])
    net.Div(["i", "j"], "k")
    net.SoftmaxWithLoss(["h", "label"], ["prob", "loss"])
    ws.feed_blob("w", numbers(4, 3, seed=5))
    ws.feed_blob("b", numbers(4, seed=6))
    for batch in range(4):
        feeds = {
            "x": numbers(2, 3, seed=batch),
            "i": np.array([batch * 7, -batch * 9]),
            "j": np.array([2, 4]),
            "label": np.array([batch, 3 - batch], np.int32),
        }
        for name, value in feeds.items():
            ws.feed_blob(name, value)
        if batch == 0:
            ws.create_net(net)
        ws.run_net("n", iterations=2)
        h = np.maximum(feeds["x"] @ ws.fetch_blob("w").T + ws.fetch_blob("b"), 0)
        p = np.exp(h) / np.exp(h).sum(axis=1, keepdims=True)
        np.testing.assert_allclose(ws.fetch_blob("part"), p[:, 1:3])
        assert ws.fetch_blob("k").tolist() == [batch * 7 // 2, -(batch * 9 // 4)]
        np.testing.assert_allclose(ws.fetch_blob("loss"), -np.log(p[[0, 1], feeds["label"]]).mean())


def test_an_operator_in_place_leaves_a_snapshot_as_it_was(ws: Workspace) -> None:
    ws.feed_blob("x", np.array([1.0, 2.0]))
    frozen = ws.freeze()
    ws.run_operator("Scale", ["x"], ["x"], scale=10.0)
    (kept,) = frozen.snapshot().blobs
    assert kept.array is not None
    assert (kept.array.tolist(), ws.fetch_blob("x").tolist()) == ([1.0, 2.0], [10.0, 20.0])
    frozen.lease.release()


def test_a_refused_step_leaves_its_output_as_it_was(ws: Workspace) -> None:
    ws.feed_blob("a", np.array([4, 4]))
    ws.feed_blob("b", np.array([2, 1]))
    ws.run_operator("Div", ["a", "b"], ["c"])
    ws.feed_blob("b", np.array([2, 0]))
    with pytest.raises(InvalidInputError, match=r"B \(input 1\) must not contain 0"):
        ws.run_operator("Div", ["a", "b"], ["c"])
    assert ws.fetch_blob("c").tolist() == [2, 4]


# Edges: empty, 0-d, strides, NaN, overflow ----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("shape", [(), (0,), (0, 5), (3, 0), (2, 3)])
@pytest.mark.parametrize("type_", [*UNARY, "Copy", "StopGradient", "Scale", "Sum", "Sign"])
def test_operators_of_one_operand_keep_shape_and_dtype(type_: str, shape: tuple[int, ...], dtype: str) -> None:
    (y,) = run(type_, {"X": numbers(*shape, positive=True).astype(dtype)})
    assert y.shape == shape
    assert y.dtype == dtype


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int32", "int64", "float16", "float32", "float64"])
@pytest.mark.parametrize("type_", ["Add", "Sub", "Mul", "Div"])
def test_arithmetic_keeps_the_dtype(type_: str, dtype: str) -> None:
    a, b = np.array([[7, 9]], dtype), np.array([[2], [3]], dtype)
    (y,) = run(type_, {"A": a, "B": b})
    expected = {"Add": a + b, "Sub": a - b, "Mul": a * b}.get(type_)
    if expected is None:
        expected = a / b if a.dtype.kind == "f" else a // b
    np.testing.assert_allclose(y, expected, rtol=1e-3)
    assert y.dtype == dtype


def test_fed_views_are_taken_by_value() -> None:
    whole = numbers(6, 4)
    for view in (whole[::2], whole[:, ::-1], whole.T[:3], np.asfortranarray(whole)):
        (y,) = run("Negative", {"X": view})
        np.testing.assert_array_equal(y, -view)


@pytest.mark.parametrize("type_", ["Sqrt", "Exp", "Log", "Tanh", "Sigmoid", "Relu", "Abs", "Sqr", "Negative"])
def test_nan_and_infinity_pass_through_without_a_warning(type_: str) -> None:
    x = np.array([np.nan, np.inf, -np.inf, -1.0, 0.0, 1e30, -1e30], np.float32)
    functions = {
        "Sqrt": np.sqrt, "Exp": np.exp, "Log": np.log, "Tanh": np.tanh, "Abs": np.abs, "Sqr": np.square,
        "Negative": np.negative, "Relu": lambda x: np.maximum(x, 0), "Sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    }  # fmt: skip
    with np.errstate(all="ignore"):
        expected = functions[type_](x)
    np.testing.assert_array_equal(run(type_, {"X": x})[0], expected)


def test_division_by_zero_and_overflow_follow_ieee_and_integers_wrap() -> None:
    a, b = np.array([1, -1, 0, 3e38], np.float32), np.array([0, 0, 0, 1e-3], np.float32)
    np.testing.assert_array_equal(run("Div", {"A": a, "B": b})[0], np.array([np.inf, -np.inf, np.nan, np.inf]))
    big = np.array([2**31 - 1], np.int32)
    assert run("Add", {"A": big, "B": np.ones(1, np.int32)})[0].tolist() == [-(2**31)]
    assert run("Mul", {"A": big, "B": big})[0].tolist() == [1]
    lowest = np.array([-(2**31)], np.int32)
    assert run("Div", {"A": lowest, "B": np.array([-1], np.int32)})[0].tolist() == [-(2**31)]


@given(
    st.lists(
        st.tuples(st.integers(-(2**31), 2**31 - 1), st.integers(-50, 50).filter(bool)), min_size=1, max_size=8
    ).filter(lambda pairs: (-(2**31), -1) not in pairs)
)
def test_integer_division_rounds_towards_zero(pairs: list[tuple[int, int]]) -> None:
    a, b = (np.array(column, np.int32) for column in zip(*pairs, strict=True))
    found = run("Div", {"A": a, "B": b})[0].tolist()
    assert found == [abs(x) // abs(y) * (1 if (x < 0) == (y < 0) else -1) for x, y in pairs]


@given(st.lists(st.integers(-100, 100), max_size=8), st.integers(-20, 20).filter(bool))
def test_the_remainder_has_the_sign_of_the_dividend_or_of_the_divisor(values: list[int], divisor: int) -> None:
    x = np.array(values, np.int64)
    by_dividend = [abs(value) % abs(divisor) * (-1 if value < 0 else 1) for value in values]
    assert run("Mod", {"X": x}, divisor=divisor)[0].tolist() == by_dividend
    by_divisor = [value % divisor for value in values]
    assert run("Mod", {"X": x}, divisor=divisor, sign_follow_divisor=True)[0].tolist() == by_divisor


def test_a_closed_relu_gate_lets_no_infinite_gradient_through() -> None:
    (dx,) = run("ReluGradient", {"known": np.array([0.0, 2.0, np.nan]), "dY": np.array([np.inf, np.inf, 1.0])})
    assert dx.tolist() == [0.0, np.inf, 0.0]


def test_softmax_of_large_logits_is_finite() -> None:
    x = np.array([[1e4, 1e4 - 1, -1e4]], np.float32)
    (y,) = run("Softmax", {"X": x})
    np.testing.assert_allclose(y, [[1 / (1 + np.exp(-1)), 1 / (1 + np.e), 0]], rtol=1e-6)
    _, loss = run("SoftmaxWithLoss", {"X": x, "L": np.array([2])}, outputs=["P", "loss"])
    np.testing.assert_allclose(loss, 2e4, rtol=1e-4)


def test_probabilities_of_zero_are_clamped_in_cross_entropies() -> None:
    x = np.array([[0.0, 1.0]], np.float32)
    (y,) = run("LabelCrossEntropy", {"X": x, "L": np.zeros(1, np.int32)})
    np.testing.assert_allclose(y, [-np.log(1e-20)], rtol=1e-6)
    (y,) = run("CrossEntropy", {"X": x, "L": np.array([[1.0, 0.0]], np.float32)})
    np.testing.assert_allclose(y, [-np.log(1e-20)], rtol=1e-6)
    (y,) = run("LabelCrossEntropy", {"X": x.astype(np.float16), "L": np.zeros((1, 1), np.int64)})
    assert np.isfinite(y).all()


def test_empty_batches_have_a_loss_of_zero_and_no_accuracy() -> None:
    x, labels = np.zeros((0, 3), np.float32), np.zeros(0, np.int32)
    p, loss = run("SoftmaxWithLoss", {"X": x, "L": labels}, outputs=["P", "loss"])
    assert (p.shape, float(loss)) == ((0, 3), 0.0)
    assert run("LabelCrossEntropy", {"X": x, "L": labels})[0].shape == (0,)
    assert run("SquaredL2Distance", {"A": x, "B": x})[0].shape == (0,)
    assert np.isnan(run("Accuracy", {"X": x, "L": labels})[0])
    assert run("AveragedLoss", {"X": x})[0] == 0


def test_weights_that_sum_to_zero_give_a_loss_of_zero() -> None:
    x, labels, weights = numbers(2, 3), np.array([0, 1]), np.zeros(2)
    _, loss = run("SoftmaxWithLoss", {"X": x, "L": labels, "w": weights}, outputs=["P", "loss"])
    assert loss == 0


def test_of_equal_predictions_the_first_class_is_ranked_first() -> None:
    x = np.array([[1.0, 1.0, 0.0]] * 3)
    labels = np.array([0, 1, 2], np.int32)
    assert [float(run("Accuracy", {"X": x, "L": labels}, top_k=k)[0]) for k in (1, 2, 3)] == pytest.approx(
        [1 / 3, 2 / 3, 1]
    )


def test_long_float32_sums_keep_their_precision() -> None:
    x = np.full((1, 2_000_000), 0.1, np.float32)
    exact = float(np.float32(0.1)) * x.size
    for type_ in ("ReduceBackSum", "SumElements", "ReduceSum"):
        # Added one after the other they would be 1 % off; older NumPy's pairwise sums are 2e-6 off.
        assert float(run(type_, {"X": x})[0].reshape(())) == pytest.approx(exact, rel=1e-5)


def test_reductions_of_nothing_are_zero() -> None:
    x = np.zeros((0, 3), np.float32)
    assert run("ReduceFrontSum", {"X": x})[0].tolist() == [0, 0, 0]
    assert run("ReduceMean", {"X": x}, axes=[0], keepdims=0)[0].tolist() == [0, 0, 0]
    assert run("ReduceBackSum", {"X": x})[0].shape == (0,)


def test_weighted_sums_need_only_equal_sizes() -> None:
    one = np.ones(1, np.float32)
    x, y = np.arange(6, dtype=np.float32).reshape(2, 3), np.ones(6, np.float32)
    (found,) = run("WeightedSum", {"x": x, "a": one * 2, "y": y, "b": one * 10})
    np.testing.assert_array_equal(found, x * 2 + 10)


def test_comparisons_give_bool_and_broadcast() -> None:
    a, b = np.array([[1, 2, 3]]), np.array([[2], [3]])
    expected = {"EQ": a == b, "NE": a != b, "LT": a < b, "LE": a <= b, "GT": a > b, "GE": a >= b}
    for type_, want in expected.items():
        (found,) = run(type_, {"A": a, "B": b})
        assert found.dtype == np.bool_
        np.testing.assert_array_equal(found, want)
    t, f = np.array([True, True, False]), np.array([True, False, False])
    assert [run(type_, {"A": t, "B": f})[0].tolist() for type_ in ("And", "Or", "Xor")] == [
        [True, False, False],
        [True, True, False],
        [False, True, False],
    ]


def test_copy_takes_any_dtype_and_string_tensors(ws: Workspace) -> None:
    for value in (np.array([True, False]), np.arange(3, dtype=np.uint64), np.array([1 + 2j])):
        (y,) = run("Copy", {"X": value})
        np.testing.assert_array_equal(y, value)
        assert y.dtype == value.dtype
    ws.feed_blob("s", ["a", "b"])
    ws.run_operator("Copy", ["s"], ["t"])
    ws.feed_blob("s", ["c"])
    assert ws.fetch_blob("t").tolist() == [b"a", b"b"]


# Shapes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("starts", "ends", "expected"),
    [
        ([1], [3], np.s_[1:3]),
        ([0, 1], [-1, -1], np.s_[:, 1:]),
        ([0, 0], [-1, -2], np.s_[:, :-1]),
        ([-3], [-1], np.s_[-2:]),
        ([2], [99], np.s_[2:]),
        ([99], [-1], np.s_[4:]),
        ([1, 2], [-1, 5], np.s_[1:, 2:5]),
        ([], [], np.s_[:]),
    ],
)
def test_slices_count_from_the_end_as_caffe2_does(starts: list[int], ends: list[int], expected: Any) -> None:
    x = np.arange(24).reshape(4, 6)
    np.testing.assert_array_equal(run("Slice", {"X": x}, starts=starts, ends=ends)[0], x[expected])
    if starts:
        feeds = {"X": x, "s": np.array(starts, np.int32), "e": np.array(ends, np.int32)}
        np.testing.assert_array_equal(run("Slice", feeds)[0], x[expected])


@pytest.mark.parametrize(
    ("shape", "expected"),
    [([6, 4], (6, 4)), ([0, -1], (2, 12)), ([-1, 0, 0], (2, 3, 4)), ([4, 0, 2], (4, 3, 2)), ([1, 24, 1], (1, 24, 1))],
)
def test_reshape_copies_and_infers_dimensions(shape: list[int], expected: tuple[int, ...]) -> None:
    x = numbers(2, 3, 4)
    for feeds, args, dtype in (
        ({"X": x}, {"shape": shape}, np.int64),
        ({"X": x, "S": np.array(shape, np.int64)}, {}, np.int64),
        ({"X": x, "S": np.array(shape, np.int32)}, {}, np.int32),
    ):
        y, old = run("Reshape", feeds, outputs=["Y", "old"], **args)
        np.testing.assert_array_equal(y, x.reshape(expected))
        assert (old.tolist(), old.dtype) == ([2, 3, 4], dtype)


def test_reshape_makes_scalars_and_empty_tensors() -> None:
    assert run("Reshape", {"X": numbers(1, 1)}, outputs=["Y", "old"], shape=[])[0].shape == ()
    assert run("Reshape", {"X": numbers(0, 4)}, outputs=["Y", "old"], shape=[0, 7])[0].shape == (0, 7)
    assert run("Reshape", {"X": numbers(0, 4)}, outputs=["Y", "old"], shape=[-1, 2])[0].shape == (0, 2)


@pytest.mark.parametrize("dtype", [1, "float", "int32", np.int64, np.bool_, "double", 12])
def test_casts_truncate_and_take_caffe2_numbers_and_numpy_names(dtype: Any) -> None:
    x = np.array([-1.7, 0.0, 2.9])
    (y,) = run("Cast", {"X": x}, to=dtype)
    names = {1: "float32", "float": "float32", 12: "float16", "double": "float64"}
    wanted = np.dtype(names.get(dtype, dtype))
    assert y.dtype == wanted
    np.testing.assert_array_equal(y, x.astype(wanted))
    run("Cast", {"X": np.array([np.nan, np.inf, 1e300])}, to=dtype)


def test_split_and_concat_are_inverse() -> None:
    x = numbers(2, 6, 3)
    parts = run("Split", {"X": x, "sizes": np.array([1, 0, 5], np.int32)}, outputs=["a", "b", "c"], axis=1)
    assert [part.shape for part in parts] == [(2, 1, 3), (2, 0, 3), (2, 5, 3)]
    joined, sizes = run("Concat", dict(zip("abc", parts, strict=True)), outputs=["Y", "info"], axis=-2)
    np.testing.assert_array_equal(joined, x)
    assert (sizes.tolist(), sizes.dtype) == ([1, 0, 5], np.int32)


# Refusals -------------------------------------------------------------------------------------------------------

FLOATS, WHOLE = np.ones((2, 3), np.float32), np.ones((2, 3), np.int32)


@pytest.mark.parametrize(
    ("type_", "inputs", "args", "text"),
    [
        ("Add", (FLOATS, WHOLE), {}, r"input 1 must be float32 .* int32 \(2, 3\)"),
        ("Add", (FLOATS > 0, FLOATS > 0), {}, r"input 0 must have one of the dtypes .* bool \(2, 3\)"),
        ("Add", (FLOATS, np.ones((4, 5), np.float32)), {}, r"found A \(2, 3\) and B \(4, 5\)"),
        ("Add", (FLOATS, FLOATS[0]), {"broadcast": 1, "axis": 0}, r"found 3 against 2 in dimension 0"),
        ("Add", (FLOATS, FLOATS[0]), {"broadcast": 1, "axis": 2}, r"axis must be in \[0, 1\].*found axis 2"),
        ("Add", (FLOATS[0], FLOATS), {"broadcast": 1}, r"must not have more dimensions than A"),
        ("Add", (FLOATS, FLOATS[:, 0]), {"axis": 0}, r"without broadcast=1"),
        ("Add", (FLOATS, FLOATS[0]), {"broadcast": 1, "axis_str": "Z"}, r"one letter of the order 'NCHW'; found 'Z'"),
        ("Add", (FLOATS, FLOATS[0]), {"broadcast": 1, "axis_str": "C", "axis": 1}, r"cannot be used together"),
        ("And", (FLOATS, FLOATS), {}, r"input 0 must have one of the dtypes bool"),
        ("Exp", (WHOLE,), {}, r"input 0 must have one of the dtypes float16, bfloat16, float32, float64; it is int32"),
        ("Sum", (FLOATS, FLOATS[0]), {}, r"input 1 must have the shape of input 0, \(2, 3\); it is float32 \(3,\)"),
        ("WeightedSum", (FLOATS, FLOATS), {}, r"input 1, a weight, must have one element"),
        ("WeightedSum", (FLOATS, FLOATS[0, :1], FLOATS), {}, r"expected pairs of a tensor and its weight; found 3"),
        ("Mod", (WHOLE,), {"divisor": 0}, r"divisor must be a number other than 0"),
        ("Mod", (WHOLE,), {"divisor": 2**40}, r"int32 can hold; found 1099511627776"),
        ("Mod", (FLOATS,), {"divisor": 2}, r"input 0 must have one of the dtypes int8"),
        ("FC", (FLOATS, np.ones((4, 2), np.float32), FLOATS[0]), {}, r"rows of 3 elements .* found rows of 2"),
        ("FC", (FLOATS, np.ones((4, 3), np.float32), FLOATS[0]), {}, r"b \(input 2\) must have the shape \(4,\)"),
        ("FC", (FLOATS[0], FLOATS, FLOATS[0, :2]), {}, r"axis must be in \[-1, 0\] for input 0"),
        ("MatMul", (FLOATS, FLOATS), {}, r"found A \(2, 3\) and B \(2, 3\)"),
        ("LabelCrossEntropy", (FLOATS, np.array([0, 3])), {}, r"labels \(input 1\) must be in \[0, 2\].*found 3"),
        ("LabelCrossEntropy", (FLOATS, np.array([-1, 0])), {}, r"found -1"),
        ("LabelCrossEntropy", (FLOATS, np.array([0])), {}, r"must have the shape \(2,\) or \(2, 1\)"),
        ("CrossEntropy", (FLOATS, FLOATS * 2), {}, r"probabilities between 0 and 1"),
        ("Accuracy", (FLOATS, np.array([0, 5])), {}, r"labels \(input 1\) must be in \[0, 2\].*found 5"),
        ("SquaredL2Distance", (FLOATS, FLOATS[:, :2]), {}, r"input 1 must have the shape of input 0"),
        ("Softmax", (FLOATS,), {"axis": 2}, r"axis must be in \[-2, 1\].*found 2"),
        ("Slice", (FLOATS,), {"starts": [2], "ends": [1]}, r"start 2 and end 1"),
        ("Slice", (FLOATS,), {"starts": [0]}, r"found starts \(0,\) and ends None"),
        ("Flatten", (FLOATS,), {"axis": 3}, r"axis must be in \[0, 2\]"),
        ("FlattenToVec", (FLOATS[0, 0],), {}, r"at least one dimension"),
        ("ExpandDims", (FLOATS,), {"dims": [4]}, r"must leave no gap"),
        ("Squeeze", (FLOATS,), {"dims": [0]}, r"must be dimensions of size 1"),
        ("Transpose", (FLOATS,), {"axes": [0, 0]}, r"must be a permutation of 0 to 1"),
        ("ReduceSum", (FLOATS,), {"axes": [2]}, r"must be different dimensions"),
        ("ReduceBackSum", (FLOATS,), {"num_reduce_dim": 3}, r"num_reduce_dim must be in \[0, 2\]"),
        ("ReduceBackSum", (FLOATS, np.ones(3, np.int32)), {}, r"one length for each of the 2 sums"),
        ("Split", (FLOATS,), {"axis": 1}, r"must add up|divisible"),
    ],
)
def test_refusals_say_what_was_expected_and_what_was_found(
    type_: str, inputs: tuple[Array, ...], args: dict[str, Any], text: str
) -> None:
    outputs = ("Y", "Z") if type_ == "Split" else ("Y",)
    with pytest.raises(InvalidInputError, match=text):
        raise InvalidInputError(refused(type_, *inputs, outputs=outputs, **args))


@pytest.mark.parametrize(
    ("inputs", "args", "text"),
    [
        ((FLOATS, np.array([0, 3])), {}, r"must be in \[0, 2\].*found 3"),
        ((FLOATS, np.array([[0, 1]])), {}, r"one for each row of logits"),
        ((FLOATS, np.array([0.0, 1.0], np.float32)), {}, r"dtypes int8"),
        ((FLOATS, FLOATS), {"label_prob": 1}, r"must sum to 1 .* off by 2"),
        ((FLOATS, np.array([[-1, 1, 1], [1, 0, 0]], np.float32)), {"label_prob": 1}, r"0 or more; found -1"),
        ((FLOATS, FLOATS[:1]), {"label_prob": 1}, r"must have the logits' shape \(2, 3\)"),
        ((FLOATS, np.array([0, 1]), FLOATS[0]), {}, r"one weight for each of 2 rows"),
        ((FLOATS, np.array([0, 1])), {"scale": -1.0}, r"scale must be 0 or more; found -1.0"),
    ],
)
def test_softmax_with_loss_refuses_what_are_no_labels(
    inputs: tuple[Array, ...], args: dict[str, Any], text: str
) -> None:
    with pytest.raises(InvalidInputError, match=text):
        raise InvalidInputError(refused("SoftmaxWithLoss", *inputs, outputs=("P", "loss"), **args))


@pytest.mark.parametrize(
    ("type_", "inputs", "args", "text"),
    [
        ("Reshape", (FLOATS,), {}, r"as the argument shape or as input 1; found neither"),
        ("Reshape", (FLOATS, np.array([6])), {"shape": [6]}, r"given once"),
        ("Reshape", (FLOATS,), {"shape": [-1, -1]}, r"at most one -1"),
        ("Reshape", (FLOATS,), {"shape": [6, 1, 0]}, r"must have a dimension to copy"),
        ("Reshape", (FLOATS,), {"shape": [4, -1]}, r"cannot be inferred"),
        ("Reshape", (FLOATS[:0],), {"shape": [0, -1]}, r"cannot be inferred"),
        ("Reshape", (FLOATS,), {"shape": [5]}, r"must hold input 0's 6 elements; it holds 5"),
        ("Concat", (FLOATS, WHOLE), {}, r"input 1 must agree with input 0, float32 \(2, 3\) in every dimension but 1"),
        ("Concat", (FLOATS, FLOATS[:1]), {}, r"it is float32 \(1, 3\)"),
        ("Concat", (FLOATS, FLOATS[:, :1]), {"axis": 0, "add_axis": 1}, r"input 1 must agree with input 0"),
        ("Concat", (FLOATS,), {"axis": 2}, r"axis must be in \[-2, 1\]"),
        ("Concat", (FLOATS,), {"axis": 1, "order": "NCHW"}, r"found both"),
        ("Split", (FLOATS,), {"axis": 1, "split": [1, 1]}, r"must add up to 3, dimension 1 of input 0"),
        ("Split", (FLOATS, np.array([1, 2])), {"axis": 1, "split": [1, 2]}, r"given once"),
    ],
)
def test_operators_of_two_outputs_refuse_what_does_not_fit(
    type_: str, inputs: tuple[Array, ...], args: dict[str, Any], text: str
) -> None:
    with pytest.raises(InvalidInputError, match=text):
        raise InvalidInputError(refused(type_, *inputs, outputs=("Y", "Z"), **args))


def test_an_output_may_not_overwrite_an_input_of_another_shape() -> None:
    with pytest.raises(InvalidInputError, match=r"the output overwrites input 0, so it must have its shape \(1, 3\)"):
        run("Add", {"A": FLOATS[:1], "B": FLOATS}, outputs=["A"])
    with pytest.raises(InvalidInputError, match="only input 0 may be overwritten"):
        run("Add", {"A": FLOATS, "B": FLOATS}, outputs=["B"], broadcast=1)


def test_string_tensors_are_no_numbers() -> None:
    assert "should hold a tensor; it is a string tensor" in refused("Add", ["a"], FLOATS)
