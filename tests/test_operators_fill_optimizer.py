"""Fills, optimizers, collectives, Save and Load: what the recorded cases do not show."""

from __future__ import annotations

import errno
import struct
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from blobspace.ops import (
    BlobspaceError,
    CorruptCheckpointError,
    DeviceOption,
    InvalidInputError,
    Net,
    NotFoundError,
    OperatorDef,
    StorageError,
    gradient_operators,
)
from blobspace.ops.minidb import encode_blobs
from blobspace.workspace_actors.files import LocalFiles
from blobspace.workspace_actors.solo import SoloCollectives
from blobspace.workspace_actors.workspace import Workspace

GOLDEN = Path(__file__).parent / "caffe2_golden" / "minidb"
RANDOM_FILLS = ["UniformFill", "GaussianFill", "XavierFill", "MSRAFill"]
FILLS = [*RANDOM_FILLS, "ConstantFill"]


@pytest.fixture
def ws() -> Workspace:
    return Workspace("t")


def filled(ws: Workspace, type_: str, inputs: Sequence[str] = (), **arguments: Any) -> Any:
    ws.run_operator(type_, list(inputs), ["Y"], **arguments)
    return ws.fetch_blob("Y")


def f32(*values: float) -> np.ndarray:
    return np.array(values, dtype=np.float32)


# --- fills -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("type_", RANDOM_FILLS)
class TestRandomFill:
    def test_a_seed_on_the_device_option_repeats_at_every_run(self, ws: Workspace, type_: str) -> None:
        seeded = DeviceOption(random_seed=7)
        first = filled(ws, type_, shape=[5, 4], device_option=seeded)
        np.testing.assert_array_equal(filled(ws, type_, shape=[5, 4], device_option=seeded), first)
        other = filled(ws, type_, shape=[5, 4], device_option=DeviceOption(random_seed=8))
        assert not np.array_equal(other, first)

    def test_without_a_seed_each_run_goes_on_and_equal_workspaces_agree(self, type_: str) -> None:
        one, two, other = Workspace("t", seed=3), Workspace("t", seed=3), Workspace("t", seed=4)
        first, second = filled(one, type_, shape=[5, 4]), filled(one, type_, shape=[5, 4])
        assert not np.array_equal(first, second)
        np.testing.assert_array_equal(filled(two, type_, shape=[5, 4]), first)
        assert not np.array_equal(filled(other, type_, shape=[5, 4]), first)

    def test_each_iteration_of_a_bound_net_draws_anew(self, ws: Workspace, type_: str) -> None:
        net = Net("draw")
        net.add(type_, [], ["Y"], shape=[3, 2])
        ws.create_net(net)
        drawn: list[bytes] = []
        for _ in range(4):
            ws.run_net("draw", iterations=1)
            drawn.append(ws.fetch_blob("Y").tobytes())
        assert len(set(drawn)) == 4

    @pytest.mark.parametrize("shape", [[0, 3], [3, 0], [1, 1]])
    def test_empty_and_tiny_shapes_are_filled(self, ws: Workspace, type_: str, shape: list[int]) -> None:
        found = filled(ws, type_, shape=shape)
        assert (found.dtype, found.shape) == (np.float32, tuple(shape))
        assert np.isfinite(found).all()


def test_uniform_numbers_cover_the_interval_and_stay_within_it(ws: Workspace) -> None:
    found = filled(ws, "UniformFill", shape=[100, 1000], min=-2.0, max=3.0)
    assert (found >= -2.0).all()
    assert (found <= 3.0).all()
    assert abs(found.mean() - 0.5) < 0.02
    assert found.min() < -1.99
    assert found.max() > 2.99


def test_normal_numbers_have_the_mean_and_the_deviation_asked_for(ws: Workspace) -> None:
    found = filled(ws, "GaussianFill", shape=[100, 1000], mean=2.0, std=0.5)
    assert abs(found.mean() - 2.0) < 0.01
    assert abs(found.std() - 0.5) < 0.01


def test_xavier_numbers_fill_the_bound_of_their_fan_in(ws: Workspace) -> None:
    found = filled(ws, "XavierFill", shape=[500, 12, 25])
    bound = np.sqrt(3 / 300)
    assert np.abs(found).max() <= np.float32(bound)
    assert np.abs(found).max() > 0.99 * bound


def test_msra_numbers_have_the_deviation_of_their_fan_out(ws: Workspace) -> None:
    found = filled(ws, "MSRAFill", shape=[500, 100, 2])
    assert abs(found.std() - np.sqrt(2 / 1000)) < 1e-3


def test_uniform_bounds_may_come_as_inputs(ws: Workspace) -> None:
    for name, value in (("S", np.zeros((50, 2), np.float32)), ("low", f32(5.0)), ("high", f32(6.0))):
        ws.feed_blob(name, value)
    found = filled(ws, "UniformFill", ["S", "low", "high"])
    assert found.shape == (50, 2)
    assert (found >= 5.0).all()
    assert (found <= 6.0).all()
    with pytest.raises(InvalidInputError, match="not both"):
        filled(ws, "UniformFill", ["S", "low", "high"], min=1.0)
    with pytest.raises(InvalidInputError, match="0, 1 or 3 inputs"):
        filled(ws, "UniformFill", ["S", "low"])


@pytest.mark.parametrize(
    ("value", "dtype"), [(1.5, "float32"), (7, "int64"), (True, "int64"), (2**62 + 1, "int64"), (-0.0, "float32")]
)
def test_a_constant_gets_its_dtype_from_its_value(ws: Workspace, value: float, dtype: str) -> None:
    np.testing.assert_array_equal(
        filled(ws, "ConstantFill", shape=[2], value=value), np.full(2, value, dtype), strict=True
    )


@pytest.mark.parametrize("dtype", ["float16", "float64", "int8", "uint8", "int32", "bool", "bfloat16", "complex64"])
def test_a_constant_has_any_dtype_asked_for(ws: Workspace, dtype: str) -> None:
    found = filled(ws, "ConstantFill", shape=[2, 2], value=1, dtype=dtype)
    assert found.dtype.name == dtype
    assert (found.astype(np.float32) == 1).all() if dtype != "complex64" else (found == 1).all()


def test_a_constant_without_shape_or_input_is_a_zero_of_no_dimensions(ws: Workspace) -> None:
    np.testing.assert_array_equal(filled(ws, "ConstantFill"), np.float32(0.0).reshape(()), strict=True)


def test_a_constant_may_come_as_an_input(ws: Workspace) -> None:
    ws.feed_blob("X", np.zeros((2, 3), np.float32))
    ws.feed_blob("v", np.array([9], dtype=np.int64))
    found = filled(ws, "ConstantFill", ["X", "v"], dtype="int64")
    np.testing.assert_array_equal(found, np.full((2, 3), 9), strict=True)
    with pytest.raises(InvalidInputError, match=r"one element of float32, found int64 \(1,\)"):
        filled(ws, "ConstantFill", ["X", "v"])


def test_extra_dimensions_follow_the_inputs_shape_or_values(ws: Workspace) -> None:
    ws.feed_blob("X", np.zeros((2, 3), np.float32))
    assert filled(ws, "ConstantFill", ["X"], extra_shape=[4, 1]).shape == (2, 3, 4, 1)
    ws.feed_blob("S", np.array([2, 5], dtype=np.int64))
    assert filled(ws, "XavierFill", ["S"], input_as_shape=1, extra_shape=[1]).shape == (2, 5, 1)


def test_a_bound_net_follows_a_shape_whose_values_change(ws: Workspace) -> None:
    ws.feed_blob("S", np.array([2, 5], dtype=np.int64))
    net = Net("shape")
    net.add("ConstantFill", ["S"], ["Y"], value=1.0, input_as_shape=1)
    ws.create_net(net)
    ws.run_net("shape", iterations=3)
    ws.feed_blob("S", np.array([4, 1], dtype=np.int64))
    ws.run_net("shape", iterations=2)
    assert ws.fetch_blob("Y").shape == (4, 1)


def test_a_fill_may_overwrite_the_input_that_gives_its_shape(ws: Workspace) -> None:
    ws.feed_blob("Y", np.array([3, 2], dtype=np.int64))
    np.testing.assert_array_equal(
        filled(ws, "ConstantFill", ["Y"], value=1.0, input_as_shape=1), np.ones((3, 2), np.float32)
    )


@pytest.mark.parametrize("type_", FILLS)
@pytest.mark.parametrize(
    ("inputs", "arguments", "text"),
    [
        (["X"], {"shape": [2]}, "argument shape or an input, not both"),
        ([], {"shape": [2, 2], "extra_shape": [2]}, "extra_shape is expected only with an input"),
        ([], {"input_as_shape": 1}, "expects an input that holds the shape"),
        ([], {"shape": [-1, 2]}, "without negative sizes"),
        ([], {"shape": 3}, "expected a list"),
        (["X"], {"input_as_shape": 1}, r"1-D integers, found float32 \(2, 3\)"),
        (["F"], {"input_as_shape": 1}, r"1-D integer tensor; it is float32 \(2,\)"),
        ([], {"shape": [2, 2], "sahpe": [2]}, "unknown argument 'sahpe'"),
    ],
)
def test_a_fill_refuses_a_shape_that_is_none(
    ws: Workspace, type_: str, inputs: list[str], arguments: dict[str, Any], text: str
) -> None:
    ws.feed_blob("X", np.zeros((2, 3), np.float32))
    ws.feed_blob("F", f32(2.0, 3.0))
    with pytest.raises(InvalidInputError, match=text):
        filled(ws, type_, inputs, **arguments)


@pytest.mark.parametrize(
    ("type_", "arguments", "text"),
    [
        (
            "ConstantFill",
            {"value": 1.5, "dtype": "int32"},
            "integer from -2147483648 to 2147483647 for int32, found 1.5",
        ),
        ("ConstantFill", {"value": 300, "dtype": "uint8"}, "from 0 to 255 for uint8, found 300"),
        ("ConstantFill", {"value": 2, "dtype": "bool"}, "from 0 to 1 for bool"),
        ("ConstantFill", {"value": float("nan"), "dtype": "int64"}, "found nan"),
        ("ConstantFill", {"value": "x"}, "expected a number"),
        ("ConstantFill", {"value": 1e39}, "within the range of float32"),
        ("ConstantFill", {"value": 70000.0, "dtype": "float16"}, "within the range of float16"),
        ("GivenTensorFill", {"values": [1.0, -1e39]}, "within the range of float32"),
        ("ConstantFill", {"dtype": 99}, "no element type"),
        ("UniformFill", {"min": 1.0, "max": 1.0}, "bigger than min"),
        ("UniformFill", {"min": 1.0, "max": float("inf")}, "finite"),
        ("GaussianFill", {"std": -1.0}, "0 or more"),
        ("XavierFill", {"shape": []}, "1 dimensions or more"),
        ("MSRAFill", {"shape": [3]}, "2 dimensions or more"),
        ("GivenTensorFill", {"values": [1.0]}, "expected 2 values .* found 1"),
        ("GivenTensorFill", {}, "missing argument 'values'"),
        ("GivenTensorIntFill", {"values": [1, 2**31]}, "for int32, found 2147483648"),
        ("GivenTensorInt64Fill", {"values": [1, 2**63]}, "for int64"),
        ("GivenTensorBoolFill", {"values": [1, 2]}, "for bool, found 2"),
        ("GivenTensorStringFill", {"values": ["a", 1]}, "list of str and bytes"),
        ("GivenTensorStringFill", {"values": ["a"]}, "expected 2 values"),
    ],
)
def test_a_fill_refuses_values_that_do_not_fit(ws: Workspace, type_: str, arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(InvalidInputError, match=text):
        filled(ws, type_, **{"shape": [2], **arguments})


def test_given_strings_are_stored_as_bytes_in_any_shape(ws: Workspace) -> None:
    found = filled(ws, "GivenTensorStringFill", shape=[2, 1], values=["é", b"\xff\0"])
    assert found.tolist() == [["é".encode()], [b"\xff\0"]]


@pytest.mark.parametrize("type_", [*FILLS, "Iter", "LearningRate", "GivenTensorFill", "GivenTensorStringFill", "Load"])
def test_a_gradient_stops_silently_at_these(type_: str) -> None:
    operator = OperatorDef(type=type_, inputs=("X",), outputs=("Y",))
    assert gradient_operators(operator, {"Y": "Y_grad"}) == ([], {})


@pytest.mark.parametrize(
    "type_", ["MomentumSGD", "MomentumSGDUpdate", "Adagrad", "Adam", "Allreduce", "Broadcast", "Save"]
)
def test_a_gradient_through_these_is_refused(type_: str) -> None:
    operator = OperatorDef(type=type_, inputs=("X",), outputs=("Y",))
    with pytest.raises(InvalidInputError, match=f"One should not call gradient for operator {type_}"):
        gradient_operators(operator, {"Y": "Y_grad"})


# --- the counter and the learning rate -----------------------------------------------------------------------


def test_a_counter_without_input_starts_at_zero_and_counts_its_runs(ws: Workspace) -> None:
    ws.run_operator("Iter", [], ["it"])
    np.testing.assert_array_equal(ws.fetch_blob("it"), np.array([1]), strict=True)
    net = Net("count")
    net.add("Iter", [], ["it"])
    net.add("Iter", [], ["other"])
    ws.create_net(net)
    ws.run_net("count", iterations=5)
    assert (ws.fetch_blob("it").item(), ws.fetch_blob("other").item()) == (6, 5)


def test_a_counter_goes_on_while_a_snapshot_holds_its_buffer(ws: Workspace) -> None:
    ws.feed_blob("it", np.array([4]))
    for inputs in (["it"], []):
        before = ws.fetch_blob("it").item()
        frozen = ws.freeze()
        for _ in range(2):
            ws.run_operator("Iter", inputs, ["it"])
        held = {blob.name: blob.array for blob in frozen.snapshot().blobs}["it"]
        assert held is not None
        assert (int(held.item()), ws.fetch_blob("it").item()) == (before, before + 2)
        frozen.lease.release()


@pytest.mark.parametrize("value", [np.array([-1]), np.array([2**63 - 1]), f32(1.0), np.array([1, 2]), "text"])
@pytest.mark.parametrize("has_input", [True, False])
def test_a_counter_that_is_none_is_refused(ws: Workspace, value: Any, has_input: bool) -> None:
    ws.feed_blob("it", value)
    with pytest.raises(InvalidInputError, match=r"it is a plain str|is expected to be"):
        ws.run_operator("Iter", ["it"] if has_input else [], ["it"])
    np.testing.assert_array_equal(ws.fetch_blob("it"), value)


def test_a_counter_with_an_input_counts_in_place_only(ws: Workspace) -> None:
    ws.feed_blob("it", np.array([0]))
    with pytest.raises(InvalidInputError, match="output 0 must be input 0"):
        ws.run_operator("Iter", ["it"], ["other"])


def rate(ws: Workspace, iteration: int, **arguments: Any) -> float:
    ws.feed_blob("it", np.array([iteration]))
    ws.run_operator("LearningRate", ["it"], ["lr"], **{"base_lr": 1.0, **arguments})
    return float(ws.fetch_blob("lr"))


def test_an_alternation_may_start_inactive(ws: Workspace) -> None:
    found = [rate(ws, it, policy="alter", active_period=1, inactive_period=2, active_first=0) for it in range(6)]
    assert found == [0.0, 0.0, 1.0, 0.0, 0.0, 1.0]


def test_a_polynomial_rate_past_its_end_is_not_a_number_as_in_caffe2(ws: Workspace) -> None:
    assert np.isnan(rate(ws, 11, policy="poly", max_iter=10, power=0.5))


def test_a_bound_rate_follows_the_counter(ws: Workspace) -> None:
    ws.feed_blob("it", np.array([0]))
    net = Net("rate")
    net.add("Iter", ["it"], ["it"])
    net.add("LearningRate", ["it"], ["lr"], policy="exp", base_lr=1.0, gamma=0.5)
    ws.create_net(net)
    ws.run_net("rate", iterations=6)
    assert float(ws.fetch_blob("lr")) == 0.5**6


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"policy": "nope"}, "Unknown learning rate policy: expected one of fixed, .*found 'nope'"),
        ({"policy": "hill"}, "Unknown learning rate policy"),
        ({}, "missing argument 'policy'"),
        ({"policy": "step", "gamma": 0.5}, "expects the argument 'stepsize', more than 0; found nothing"),
        ({"policy": "step", "gamma": 0.5, "stepsize": 0}, "'stepsize', more than 0; found 0"),
        ({"policy": "exp"}, "'gamma'"),
        ({"policy": "inv", "gamma": 1.0}, "'power'"),
        ({"policy": "poly", "power": 1.0, "max_iter": -1}, "'max_iter'"),
        ({"policy": "linearWarmup", "num_iter": 3}, "'start_multiplier'"),
        ({"policy": "constantWarmup"}, "'num_iter'"),
        ({"policy": "alter", "active_period": 2}, "'inactive_period'"),
    ],
)
def test_a_rate_refuses_a_policy_that_is_not_complete(ws: Workspace, arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(InvalidInputError, match=text):
        rate(ws, 0, **arguments)


def test_a_rate_needs_a_base_and_an_int64_iteration(ws: Workspace) -> None:
    ws.feed_blob("it", np.array([0], dtype=np.int32))
    with pytest.raises(InvalidInputError, match="missing argument 'base_lr'"):
        ws.run_operator("LearningRate", ["it"], ["lr"], policy="fixed")
    with pytest.raises(InvalidInputError, match=r"one int64, found int32 \(1,\)"):
        ws.run_operator("LearningRate", ["it"], ["lr"], policy="fixed", base_lr=1.0)


# --- updates -------------------------------------------------------------------------------------------------


def feed_update(ws: Workspace, dtype: str = "float32") -> dict[str, np.ndarray]:
    rng = np.random.default_rng(5)
    values = {name: rng.uniform(0.1, 1.0, (2, 3)).astype(dtype) for name in ("p", "m", "v", "g")}
    values |= {"lr": np.array(-0.1, dtype), "it": np.array([2])}
    for name, value in values.items():
        ws.feed_blob(name, value)
    return values


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_adam_gives_its_step_as_a_fourth_output(ws: Workspace, dtype: str) -> None:
    x = feed_update(ws, dtype)
    inputs = ["p", "m", "v", "g", "lr", "it"]
    ws.run_operator("Adam", inputs, ["P", "M", "V", "G"], beta1=0.8, beta2=0.9, epsilon=1e-3)
    m, v = 0.8 * x["m"] + 0.2 * x["g"], 0.9 * x["v"] + 0.1 * x["g"] ** 2
    step = np.sqrt(1 - 0.9**3) / (1 - 0.8**3) * m / (np.sqrt(v) + 1e-3)
    for name, expected in (("P", x["p"] - 0.1 * step), ("M", m), ("V", v), ("G", step)):
        found = ws.fetch_blob(name)
        assert found.dtype == dtype
        np.testing.assert_allclose(found, expected, rtol=1e-5)
    for name, value in x.items():
        np.testing.assert_array_equal(ws.fetch_blob(name), value)


@pytest.mark.parametrize("outputs", [2, 3, 4])
@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_adagrad_gives_its_rate_and_its_step_as_further_outputs(
    ws: Workspace, outputs: int, weight_decay: float
) -> None:
    x = feed_update(ws)
    names = ["P", "V", "R", "U"][:outputs]
    ws.run_operator("Adagrad", ["p", "v", "g", "lr"], names, epsilon=1e-3, decay=0.7, weight_decay=weight_decay)
    slope = x["g"] + weight_decay * x["p"]
    v = 0.7 * x["v"] + slope**2
    effective_rate = -0.1 / (np.sqrt(v) + 1e-3)
    expected = {"P": x["p"] + effective_rate * slope, "V": v, "R": effective_rate, "U": effective_rate * slope}
    for name in names:
        np.testing.assert_allclose(ws.fetch_blob(name), expected[name], rtol=1e-5)


@pytest.mark.parametrize("nesterov", [0, 1])
def test_momentum_writes_to_other_blobs_and_leaves_its_inputs(ws: Workspace, nesterov: int) -> None:
    x = feed_update(ws)
    arguments = {"momentum": 0.9, "nesterov": nesterov}
    ws.run_operator("MomentumSGDUpdate", ["g", "m", "lr", "p"], ["G", "M", "P"], **arguments)
    ws.run_operator("MomentumSGD", ["g", "m", "lr"], ["G2", "M2"], **arguments)
    m = 0.9 * x["m"] - 0.1 * x["g"]
    step = 1.9 * m - 0.9 * x["m"] if nesterov else m
    for name, expected in (("G", step), ("M", m), ("P", x["p"] - step), ("G2", step), ("M2", m)):
        np.testing.assert_allclose(ws.fetch_blob(name), expected, rtol=1e-5, atol=1e-6)
    for name, value in x.items():
        np.testing.assert_array_equal(ws.fetch_blob(name), value)


UPDATES = [
    ("MomentumSGDUpdate", ["g", "m", "lr", "p"], ["g", "m", "p"]),
    ("Adagrad", ["p", "v", "g", "lr"], ["p", "v"]),
    ("Adam", ["p", "m", "v", "g", "lr", "it"], ["p", "m", "v"]),
]


@pytest.mark.parametrize(("type_", "inputs", "outputs"), UPDATES)
def test_an_update_under_a_snapshots_lease_is_the_same_and_keeps_the_snapshot(
    type_: str, inputs: list[str], outputs: list[str]
) -> None:
    leased, free = Workspace("t"), Workspace("t")
    before = feed_update(leased)
    feed_update(free)
    net = Net("update")
    net.add(type_, inputs, outputs)
    for ws in (leased, free):
        ws.create_net(net)
    frozen = leased.freeze()
    for ws in (leased, free):
        ws.run_net("update", iterations=3)
    for name in before:
        np.testing.assert_array_equal(leased.fetch_blob(name), free.fetch_blob(name))
    for blob in frozen.snapshot().blobs:
        np.testing.assert_array_equal(blob.array, before[blob.name])
    frozen.lease.release()


@pytest.mark.parametrize(("type_", "inputs", "outputs"), UPDATES)
@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("g", np.ones((2, 2), np.float32), r"found float32 \(2, 2\)|6 elements of input 0|4 elements of input 0"),
        ("g", np.ones((2, 3), np.float64), "float64"),
        ("p", np.ones((2, 3), np.int32), r"found int32 \(2, 3\)"),
        ("lr", f32(0.1, 0.2), r"lr, is expected to be one float32, found float32 \(2,\)"),
        ("lr", np.array([1]), "lr, is expected to be one float32, found int64"),
    ],
)
def test_an_update_refuses_inputs_that_do_not_fit_and_changes_nothing(
    ws: Workspace, type_: str, inputs: list[str], outputs: list[str], name: str, value: np.ndarray, text: str
) -> None:
    before = feed_update(ws) | {name: value}
    ws.feed_blob(name, value)
    with pytest.raises(InvalidInputError, match=text):
        ws.run_operator(type_, inputs, outputs)
    for blob, kept in before.items():
        np.testing.assert_array_equal(ws.fetch_blob(blob), kept)


def test_adam_refuses_betas_and_iterations_that_it_cannot_correct_for(ws: Workspace) -> None:
    feed_update(ws)
    inputs, outputs = ["p", "m", "v", "g", "lr", "it"], ["p", "m", "v"]
    with pytest.raises(InvalidInputError, match="beta1 and beta2 are expected to be from 0 and less than 1"):
        ws.run_operator("Adam", inputs, outputs, beta1=1.0)
    ws.feed_blob("it", np.array([-1]))
    with pytest.raises(InvalidInputError, match="iter, is expected to be 0 or more, found -1"):
        ws.run_operator("Adam", inputs, outputs)


def test_an_update_may_not_write_over_another_input(ws: Workspace) -> None:
    feed_update(ws)
    with pytest.raises(InvalidInputError, match="may not overwrite input"):
        ws.run_operator("Adagrad", ["p", "v", "g", "lr"], ["v", "p"])


# --- collectives ---------------------------------------------------------------------------------------------


class ThreeAlike(SoloCollectives):
    """Three workspaces that hold the same, of which one is seen."""

    size = 3
    rank = 1

    def allreduce(self, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        return [array + array + array for array in super().allreduce(arrays)]

    def broadcast(self, arrays: Sequence[np.ndarray], *, root: int) -> list[np.ndarray]:
        return [array + array.dtype.type(root) for array in super().broadcast(arrays, root=0)]


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16", "int32"])
def test_allreduce_sums_over_the_workspaces(dtype: str) -> None:
    ws = Workspace("t", collectives=ThreeAlike())
    ws.run_operator("ConstantFill", [], ["a"], shape=[2], value=2, dtype=dtype)
    ws.feed_blob("b", np.arange(3.0))
    ws.run_operator("Allreduce", ["a", "b"], ["a", "B"])
    assert ws.fetch_blob("a").dtype.name == dtype
    assert ws.fetch_blob("a").astype(float).tolist() == [6.0, 6.0]
    assert ws.fetch_blob("B").tolist() == [0.0, 3.0, 6.0]
    assert ws.fetch_blob("b").tolist() == [0.0, 1.0, 2.0]


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16", "complex64"])
def test_allreduce_averages_over_the_workspaces(dtype: str) -> None:
    ws = Workspace("t", collectives=ThreeAlike())
    ws.run_operator("ConstantFill", [], ["a"], shape=[2], value=2, dtype=dtype)
    ws.run_operator("Allreduce", ["a"], ["a"], reduce="mean")
    assert ws.fetch_blob("a").dtype.name == dtype
    assert ws.fetch_blob("a").astype(complex).tolist() == [2.0, 2.0]


def test_a_bound_net_reduces_at_each_iteration() -> None:
    ws = Workspace("t", collectives=ThreeAlike())
    ws.feed_blob("a", f32(1.0))
    net = Net("reduce")
    net.add("Allreduce", ["a"], ["a"])
    ws.create_net(net)
    ws.run_net("reduce", iterations=4)
    assert ws.fetch_blob("a").item() == 81.0


def test_broadcast_takes_what_the_root_has() -> None:
    ws = Workspace("t", collectives=ThreeAlike())
    ws.feed_blob("a", f32(1.0))
    ws.run_operator("Broadcast", ["a"], ["a"], root=2)
    assert ws.fetch_blob("a").item() == 3.0
    with pytest.raises(InvalidInputError, match="rank from 0 to 2, found 3"):
        ws.run_operator("Broadcast", ["a"], ["a"], root=3)


@pytest.mark.parametrize("type_", ["Allreduce", "Broadcast"])
def test_a_workspace_alone_keeps_its_values(ws: Workspace, type_: str) -> None:
    ws.feed_blob("a", f32(1.0, 2.0))
    ws.run_operator(type_, ["a"], ["a"])
    ws.run_operator(type_, ["a"], ["b"])
    assert ws.fetch_blob("a").tolist() == ws.fetch_blob("b").tolist() == [1.0, 2.0]


@pytest.mark.parametrize(
    ("inputs", "outputs", "arguments", "text"),
    [
        (["a"], ["b", "c"], {}, "as many outputs as inputs, found 1 and 2"),
        (["a", "i"], ["i", "a"], {}, "output 0 may overwrite input 0 only"),
        (["a"], ["a"], {"reduce": "max"}, "'sum' or 'mean', found 'max'"),
        (["i"], ["i"], {"reduce": "mean"}, r"floating point, found int64 \(2,\)"),
        (["t"], ["t"], {}, "expected to hold numbers, found bool"),
    ],
)
def test_allreduce_refuses_what_it_cannot_combine(
    ws: Workspace, inputs: list[str], outputs: list[str], arguments: dict[str, Any], text: str
) -> None:
    for name, value in (("a", f32(1.0)), ("i", np.array([1, 2])), ("t", np.array([True]))):
        ws.feed_blob(name, value)
    with pytest.raises(InvalidInputError, match=text):
        ws.run_operator("Allreduce", inputs, outputs, **arguments)


def test_workspaces_that_hold_different_shapes_are_refused() -> None:
    class OtherShape(ThreeAlike):
        def allreduce(self, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
            return [np.zeros(7, np.float32) for _ in arrays]

    ws = Workspace("t", collectives=OtherShape())
    ws.feed_blob("a", f32(1.0))
    with pytest.raises(InvalidInputError, match=r"found float32 \(1,\) here and float32 \(7,\) from the others"):
        ws.run_operator("Allreduce", ["a"], ["a"])


# --- Save and Load -------------------------------------------------------------------------------------------

SAVABLE = {
    **{
        dtype: np.array([[0, 1], [2, 3]]).astype(dtype)
        for dtype in "float16 float32 float64 int8 int16 int32 int64 uint8 uint16 bool".split()
    },
    "scope/0-d": np.array(2.5, np.float32),
    "empty": np.zeros((0, 3), np.float32),
    "strings": np.array([b"a", b"b\0c", "é".encode(), b""], dtype=object),
    "text": b"std::string \xff",
}


def save(ws: Workspace, path: Path, *names: str, **arguments: Any) -> None:
    ws.run_operator("Save", list(names), [], **{"db": str(path), "db_type": "minidb", "absolute_path": 1, **arguments})


def load(ws: Workspace, path: Path, *names: str, **arguments: Any) -> None:
    ws.run_operator("Load", [], list(names), **{"db": str(path), "db_type": "minidb", "absolute_path": 1, **arguments})


def assert_same(found: Any, expected: Any) -> None:
    assert type(found) is type(expected)
    if isinstance(expected, bytes):
        assert found == expected
    else:
        np.testing.assert_array_equal(found, expected, strict=True)


def records(path: Path) -> list[bytes]:
    data, found = path.read_bytes(), list[bytes]()
    while data:
        stop = 8 + sum(struct.unpack_from("<ii", data))
        found.append(data[:stop])
        data = data[stop:]
    return found


@pytest.fixture
def db(tmp_path: Path) -> Path:
    return tmp_path / "blobs.minidb"


@pytest.fixture
def source(ws: Workspace) -> Workspace:
    for name, value in SAVABLE.items():
        ws.feed_blob(name, value)
    return ws


@pytest.mark.parametrize("chunk_size", [0, -1, 1, 3])
def test_every_kind_and_dtype_comes_back_as_it_was(source: Workspace, db: Path, chunk_size: int) -> None:
    save(source, db, *SAVABLE, chunk_size=chunk_size)
    target = Workspace("target")
    load(target, db, *SAVABLE)
    for name, expected in SAVABLE.items():
        assert_same(target.fetch_blob(name), expected)


def test_load_all_makes_the_blobs_by_their_names(source: Workspace, db: Path) -> None:
    save(source, db, *SAVABLE)
    target = Workspace("target")
    load(target, db, "int8", load_all=1)
    assert target.blobs() == sorted(SAVABLE)
    for name, expected in SAVABLE.items():
        assert_same(target.fetch_blob(name), expected)


def test_load_replaces_kind_dtype_and_shape(source: Workspace, db: Path) -> None:
    save(source, db, "float32", "strings", "text")
    target = Workspace("target")
    for name, value in (("float32", b"x"), ("strings", f32(1.0)), ("text", {"a": 1})):
        target.feed_blob(name, value)
    load(target, db, "float32", "strings", "text")
    for name in ("float32", "strings", "text"):
        assert_same(target.fetch_blob(name), SAVABLE[name])


def test_load_reads_the_file_anew_in_a_bound_net(ws: Workspace, db: Path) -> None:
    net = Net("load")
    net.add("Load", [], ["x"], db=str(db), db_type="minidb", absolute_path=1)
    ws.create_net(net)
    other = Workspace("other")
    for value in (f32(1.0), f32(2.0), f32(3.0, 4.0)):
        other.feed_blob("x", value)
        save(other, db, "x")
        ws.run_net("load", iterations=2)
        assert_same(ws.fetch_blob("x"), value)


def test_the_file_that_caffe2_wrote_is_read(ws: Workspace) -> None:
    load(ws, GOLDEN / "all_types.minidb", load_all=1, keep_device=1)
    with np.load(GOLDEN / "all_types.npz") as expected:
        for name in expected.files:
            np.testing.assert_array_equal(ws.fetch_blob(name), expected[name], strict=True)
        (strings,) = set(ws.blobs()) - set(expected.files)
    assert ws.fetch_blob(strings).tolist() == [b"a", b"b\0c", "é".encode(), b""]


def test_the_file_that_caffe2_wrote_is_written_again_bit_for_bit(ws: Workspace, db: Path) -> None:
    load(ws, GOLDEN / "all_types.minidb", load_all=1)
    save(ws, db, *ws.blobs(), chunk_size=700)
    # Caffe2 wrote the blobs in another order.
    assert sorted(records(db)) == sorted(records(GOLDEN / "all_types.minidb"))


def test_text_is_saved_as_its_bytes(ws: Workspace, db: Path) -> None:
    ws.feed_blob("s", "é")
    save(ws, db, "s")
    load(ws, db, "s")
    assert ws.fetch_blob("s") == "é".encode()


def test_names_in_the_file_can_be_stripped_overridden_prefixed_and_chosen(ws: Workspace, db: Path) -> None:
    ws.feed_blob("gpu_0/w", f32(1.0))
    ws.feed_blob("b", f32(2.0))
    save(ws, db, "gpu_0/w", "b", strip_prefix="gpu_0/")
    load(ws, db, "new/w", "new/b", add_prefix="new/")
    load(ws, db, "z", "y", source_blob_names=["b", "w"])
    load(ws, db, "q/b", strip_prefix="nothing", add_prefix="q/")
    save(ws, db, "gpu_0/w", "b", blob_name_overrides=["one/w", "one/b"])
    load(ws, db, "w", strip_prefix="one/")
    found = {name: ws.fetch_blob(name).item() for name in ("new/w", "new/b", "z", "y", "q/b", "w")}
    assert found == {"new/w": 1.0, "new/b": 2.0, "z": 2.0, "y": 1.0, "q/b": 2.0, "w": 1.0}


def test_several_files_are_read_as_one_unless_they_share_a_name(ws: Workspace, tmp_path: Path) -> None:
    paths = [tmp_path / "one", tmp_path / "two"]
    ws.feed_blob("a", f32(1.0))
    ws.feed_blob("b", f32(2.0))
    ws.feed_blob("c", f32(3.0))
    save(ws, paths[0], "a", "c")
    save(ws, paths[1], "b", "c")
    dbs = [str(path) for path in paths]
    target = Workspace("target")
    load(target, Path(), "a", "b", db="", dbs=dbs)
    assert (target.fetch_blob("a").item(), target.fetch_blob("b").item()) == (1.0, 2.0)
    for arguments, names in (({"load_all": 1}, ()), ({}, ("a", "c"))):
        fresh = Workspace("fresh")
        with pytest.raises(InvalidInputError, match="Duplicate Key 'c' is found"):
            load(fresh, Path(), *names, db="", dbs=dbs, **arguments)
        assert all(spec.kind == "uninitialized" for spec in fresh.specs())


def test_a_relative_path_is_taken_from_the_root_folder(
    ws: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ws.feed_blob("a", f32(1.0))
    ws.run_operator("Save", ["a"], [], db="here.minidb", db_type="minidb")
    assert (tmp_path / "here.minidb").is_file()
    ws.run_operator("Load", [], ["a"], db="here.minidb", db_type="minidb")
    with pytest.raises(InvalidInputError, match="relative to the root folder, or absolute_path=1"):
        ws.run_operator("Save", ["a"], [], db="/elsewhere", db_type="minidb")


@pytest.mark.parametrize(
    ("names", "arguments", "text"),
    [
        (["a"], {"db_type": "lmdb"}, "Cannot find db implementation: expected db_type 'minidb', found 'lmdb'"),
        (["a"], {"db": ""}, "Must specify a db name"),
        (["a", "a"], {}, "Duplicated input: .*'a'"),
        (["x/a", "a"], {"strip_prefix": "x/"}, "Duplicated input after strip_prefix"),
        (["a"], {"blob_name_overrides": ["b", "c"]}, "blob_name_overrides mismatch: expected 1, found 2"),
        (["a", "x/a"], {"blob_name_overrides": ["b", "b"]}, "Duplicated name in blob_name_overrides"),
        (["a"], {"blob_name_overrides": ["b"], "strip_prefix": "x"}, "mutually exclusive"),
        (["a"], {"chunk_size": -2}, "found -2"),
        (["a", "none"], {}, "uninitialized"),
        (["a", "list"], {}, "found a plain list"),
        (["a", "wide"], {}, "no dtype uint64"),
        (["a"], {"strip_prefix": "a"}, "must not be empty"),
        ([], {}, "at least 1 input"),
    ],
)
def test_a_save_that_is_refused_writes_nothing(
    ws: Workspace, db: Path, names: list[str], arguments: dict[str, Any], text: str
) -> None:
    for name, value in (("a", f32(1.0)), ("x/a", f32(2.0)), ("list", [1]), ("wide", np.zeros(1, np.uint64))):
        ws.feed_blob(name, value)
    ws.create_blob("none")
    save(ws, db, "a")
    before = db.read_bytes()
    with pytest.raises(InvalidInputError, match=text):
        save(ws, db, *names, **arguments)
    assert db.read_bytes() == before
    assert [path.name for path in db.parent.iterdir()] == [db.name]


@pytest.mark.parametrize("missing", ["db", "db_type"])
@pytest.mark.parametrize("type_", ["Save", "Load"])
def test_the_file_and_its_type_must_be_given(ws: Workspace, type_: str, missing: str) -> None:
    ws.feed_blob("a", f32(1.0))
    arguments = {"db": "x", "db_type": "minidb"}
    del arguments[missing]
    with pytest.raises(InvalidInputError, match=f"missing argument '{missing}'|Must specify a db name"):
        ws.run_operator(type_, ["a"] if type_ == "Save" else [], ["a"] if type_ == "Load" else [], **arguments)


class FailingDisk(LocalFiles):
    """Has room for one part of a file."""

    def write_atomically(self, path: str, parts: Iterator[bytes]) -> None:
        def one_part() -> Iterator[bytes]:
            yield next(parts)
            raise OSError(errno.ENOSPC, "No space left on device")

        super().write_atomically(path, one_part())


def test_a_save_that_fails_halfway_keeps_the_old_file(ws: Workspace, db: Path) -> None:
    ws.feed_blob("a", f32(1.0))
    save(ws, db, "a")
    failing = Workspace("failing", files=FailingDisk())
    failing.feed_blob("a", f32(8.0, 9.0))
    with pytest.raises(StorageError, match="No space left"):
        save(failing, db, "a", chunk_size=1)
    load(ws, db, "a")
    assert_same(ws.fetch_blob("a"), f32(1.0))
    assert [path.name for path in db.parent.iterdir()] == [db.name]


KILLED_WHILE_SAVING = """
import os, sys
import numpy as np
from blobspace.workspace_actors.files import LocalFiles
from blobspace.workspace_actors.workspace import Workspace

class Killed(LocalFiles):
    def write_atomically(self, path, parts):
        def one_part():
            yield next(parts)
            os._exit(9)
        super().write_atomically(path, one_part())

workspace = Workspace("killed", files=Killed())
workspace.feed_blob("a", np.ones(5, np.float32))
workspace.run_operator("Save", ["a"], [], db=sys.argv[1], db_type="minidb", absolute_path=1, chunk_size=1)
"""


def test_a_process_killed_while_saving_leaves_the_old_file(ws: Workspace, db: Path) -> None:
    ws.feed_blob("a", f32(1.0))
    save(ws, db, "a")
    finished = subprocess.run([sys.executable, "-c", KILLED_WHILE_SAVING, str(db)], capture_output=True, check=False)
    assert finished.returncode == 9, finished.stderr.decode()
    load(ws, db, "a")
    assert_same(ws.fetch_blob("a"), f32(1.0))


@pytest.mark.parametrize(
    ("names", "arguments", "text"),
    [
        (["a", "nope"], {}, "Expected to load 2 blobs, got 1 only. Missing: 'nope'"),
        (["a"], {"db_type": "leveldb"}, "expected db_type 'minidb', found 'leveldb'"),
        (["a"], {"db": ""}, "one of db and dbs, found neither"),
        (["a"], {"dbs": ["x"]}, "one of db and dbs, found both"),
        (["a"], {"db": "", "dbs": ["x", "x"]}, "Duplicated db name"),
        (["a", "b"], {"source_blob_names": ["a"]}, "source_blob_names mismatch: expected 2, found 1"),
        (["a", "b"], {"source_blob_names": ["a", "a"]}, "Duplicated source blob name"),
        (["a"], {"source_blob_names": ["a"], "load_all": 1}, "load_all and source_blob_names"),
        (["a"], {"source_blob_names": ["a"], "strip_prefix": "x"}, "strip_prefix and source_blob_names"),
        (["nope"], {"load_all": 1}, "does not exist in the db"),
        (["nope"], {"load_all": 1, "allow_incomplete": 1}, "does not exist in the db"),
        (["a"], {"strip_prefix": "x/"}, "Duplicate Key 'a'"),
        ([], {"load_all": 1, "add_prefix": "\0"}, "NUL"),
    ],
)
def test_a_load_that_is_refused_changes_nothing(
    ws: Workspace, db: Path, names: list[str], arguments: dict[str, Any], text: str
) -> None:
    other = Workspace("other")
    for name in ("a", "b", "x/a"):
        other.feed_blob(name, f32(1.0))
    save(other, db, "a", "b", "x/a")
    ws.feed_blob("a", f32(7.0))
    ws.feed_blob("b", f32(8.0))
    with pytest.raises(InvalidInputError, match=text):
        load(ws, db, *names, **arguments)
    assert (ws.fetch_blob("a").item(), ws.fetch_blob("b").item()) == (7.0, 8.0)
    assert not ws.has_blob("x/a")


def test_an_incomplete_load_leaves_the_rest_as_it_was(ws: Workspace, db: Path) -> None:
    ws.feed_blob("a", f32(1.0))
    save(ws, db, "a")
    target = Workspace("target")
    target.feed_blob("b", f32(5.0))
    load(target, db, "a", "b", "c", allow_incomplete=1)
    assert (target.fetch_blob("a").item(), target.fetch_blob("b").item()) == (1.0, 5.0)
    assert {spec.name: spec.kind.value for spec in target.specs()}["c"] == "uninitialized"


def test_a_missing_file_and_a_damaged_one_are_told_apart_and_change_nothing(ws: Workspace, db: Path) -> None:
    ws.feed_blob("a", f32(7.0))
    with pytest.raises(NotFoundError, match=db.name):
        load(ws, db, "a")
    db.write_bytes(b"".join(encode_blobs({"a": f32(1.0)}))[:-1])
    with pytest.raises(CorruptCheckpointError, match=db.name):
        load(ws, db, "a")
    assert ws.fetch_blob("a").item() == 7.0


def test_a_load_without_room_changes_nothing(db: Path) -> None:
    big = Workspace("big")
    for name in ("a", "b", "c"):
        big.feed_blob(name, np.ones(20_000, np.float32))
    save(big, db, "a", "b", "c")
    for names, arguments in ((("a", "b", "c"), {}), ((), {"load_all": 1}), (("c",), {"load_all": 1})):
        small = Workspace("small", memory_limit_bytes=200_000)
        small.feed_blob("a", np.zeros(20_000, np.float32))
        used = small.memory().used_bytes
        with pytest.raises(BlobspaceError, match="no room"):
            load(small, db, *names, **arguments)
        assert not small.fetch_blob("a").any()
        assert small.memory().used_bytes == used
