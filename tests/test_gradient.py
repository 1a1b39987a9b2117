"""The backward pass: Caffe2's names, its summing, its refusals (caffe2.md 6 is cited)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from blobspace.ops import (
    GradientCall,
    GradientResult,
    GradientSlice,
    InvalidInputError,
    Net,
    OperatorDef,
    OperatorSchema,
    add_gradient_operators,
    gradient_not_implemented_yet,
    gradient_operators,
    operator_def,
    register_gradient,
    register_schema,
)
from blobspace.workspace_actors import Workspace


def lines(net: Net, start: int = 0) -> list[str]:
    return [str(operator) for operator in net.operators[start:]]


def net_of(*operators: tuple[str, list[str], list[str]], **args: Any) -> Net:
    net = Net("n")
    for type_, inputs, outputs in operators:
        net.add(type_, inputs, outputs, **args)
    return net


@pytest.fixture
def sparse(own_operators: None) -> None:
    """``Rows(x, i) -> y`` whose gradient of x is sparse, with operators; ``Pick`` likewise, without any."""
    for type_ in ("Rows", "RowsGradient", "Pick"):
        register_schema(OperatorSchema(type=type_, doc="Rows.", inputs=(2, 2), outputs=(1, 2)))

    @register_gradient("Rows")
    def rows(call: GradientCall) -> GradientResult:
        name = call.slice_name(0)
        made = operator_def("RowsGradient", [call.input(1), call.given(0)], [*name])
        return GradientResult((made,), (name, None))

    @register_gradient("Pick")
    def pick(call: GradientCall) -> GradientResult:
        # Source: Caffe2's Gather passes (indices, y's gradient) with no operator at all.
        return GradientResult((), (GradientSlice(indices=call.input(1), values=call.given(0)), None))


class TestNames:
    def test_a_loss_starts_at_one_and_an_input_gets_its_name_and_grad(self) -> None:
        """caffe2.md 6: 'ConstantFill(value 1.0) named Y_autogen_grad'; 'input X -> X_grad'."""
        net = net_of(("Relu", ["x"], ["y"]))
        gradients = add_gradient_operators(net, ["y"])
        assert gradients == {"y": "y_autogen_grad", "x": "x_grad"}
        fill, relu = net.operators[1:]
        assert (str(fill), fill.args, fill.is_gradient_op) == (
            "ConstantFill(y) -> y_autogen_grad",
            {"value": 1.0},
            False,
        )
        assert str(relu) == "ReluGradient(y, y_autogen_grad) -> x_grad"
        assert relu.is_gradient_op

    def test_a_mapping_starts_at_a_blob_or_at_one(self) -> None:
        """caffe2.md 6: 'dict y->grad name or None'."""
        net = net_of(("Relu", ["x"], ["y"]), ("Relu", ["v"], ["z"]))
        gradients = add_gradient_operators(net, {"y": "dy", "z": None})
        assert gradients == {"y": "dy", "z": "z_autogen_grad", "v": "v_grad", "x": "x_grad"}
        assert "ConstantFill(y) -> y_autogen_grad" not in lines(net)

    @pytest.mark.parametrize("ys", ["y", 3, None, {"y"}])
    def test_anything_else_is_refused(self, ys: Any) -> None:
        """caffe2.md 6: 'ys should either be a list or a dict.'."""
        net = net_of(("Relu", ["x"], ["y"]))
        with pytest.raises(InvalidInputError, match="ys should be a list or a dict"):
            add_gradient_operators(net, ys)
        assert len(net.operators) == 1

    def test_an_unknown_y_gives_just_its_fill(self) -> None:
        """caffe2.md 6: 'unknown y gives just its autogen fill'."""
        net = net_of(("Relu", ["x"], ["y"]))
        assert add_gradient_operators(net, ["nowhere"]) == {"nowhere": "nowhere_autogen_grad"}
        assert lines(net, 1) == ["ConstantFill(nowhere) -> nowhere_autogen_grad"]

    def test_a_second_call_appends_a_second_copy(self) -> None:
        """caffe2.md 6: 'Calling twice appends a second copy'."""
        net = net_of(("Relu", ["x"], ["y"]))
        first = add_gradient_operators(net, ["y"])
        assert add_gradient_operators(net, ["y"]) == first
        assert lines(net, 1) == lines(net, 1)[:2] * 2

    def test_device_and_arguments_are_the_forward_operators(self) -> None:
        """caffe2.md 6: 'Gradient ops copy device_option ... and (if they set none) args of the forward op'."""
        from blobspace.ops import DeviceOption

        device = DeviceOption(random_seed=3)
        net = Net("n")
        net.add("Softmax", ["x"], ["y"], axis=0, device_option=device)
        add_gradient_operators(net, ["y"])
        fill, softmax = net.operators[1:]
        assert fill.device_option is None
        assert (softmax.device_option, softmax.args) == (device, {"axis": 0})

    def test_skip_leaves_operators_at_the_end_out(self) -> None:
        net = net_of(("Relu", ["x"], ["h"]), ("Relu", ["h"], ["y"]), ("Copy", ["y"], ["report"]))
        assert set(add_gradient_operators(net, {"h": "dh"}, skip=2)) == {"h", "x"}
        assert add_gradient_operators(net_of(("Relu", ["x"], ["y"])), {"y": "dy"}, skip=5) == {"y": "dy"}

    def test_a_negative_skip_is_refused(self) -> None:
        net = net_of(("Relu", ["x"], ["y"]))
        with pytest.raises(InvalidInputError, match="skip"):
            add_gradient_operators(net, ["y"], skip=-1)
        assert len(net.operators) == 1

    def test_only_operators_on_the_path_are_differentiated(self) -> None:
        """caffe2.md 6: 'an op is differentiated only if some output has a gradient'."""
        net = net_of(("Relu", ["x"], ["y"]), ("GetAllBlobNames", [], ["names"]), ("And", ["p", "q"], ["r"]))
        assert set(add_gradient_operators(net, ["y"])) == {"x", "y"}


class TestFanOut:
    def test_the_gradients_of_two_uses_are_summed_in_place(self) -> None:
        """caffe2.md 6: 'others become _X_grad_autosplit_0..; then Sum -> X_grad (in place)'."""
        net = net_of(("Relu", ["x"], ["a"]), ("Tanh", ["x"], ["b"]), ("Sigmoid", ["x"], ["c"]))
        gradients = add_gradient_operators(net, {"a": "da", "b": "db", "c": "dc"})
        assert gradients["x"] == "x_grad"
        assert lines(net, 3) == [
            "SigmoidGradient(c, dc) -> x_grad",
            "TanhGradient(b, db) -> _x_grad_autosplit_0",
            "ReluGradient(a, da) -> _x_grad_autosplit_1",
            "Sum(x_grad, _x_grad_autosplit_0, _x_grad_autosplit_1) -> x_grad",
        ]

    def test_one_operator_that_uses_a_blob_twice_is_a_fan_out(self) -> None:
        """caffe2.md 6: 'Same for one op using X twice (Mul(x,x))'."""
        net = net_of(("Mul", ["x", "x"], ["y"]))
        assert add_gradient_operators(net, {"y": "dy"})["x"] == "x_grad"
        assert lines(net)[-1] == "Sum(x_grad, _x_grad_autosplit_0) -> x_grad"

    def test_the_sum_of_a_fan_out_is_the_gradient(self) -> None:
        ws = Workspace("w")
        x = np.linspace(-1, 1, 5, dtype=np.float32)
        ws.feed_blob("x", x)
        net = net_of(
            ("Sqr", ["x"], ["a"]),
            ("Exp", ["x"], ["b"]),
            ("Mul", ["a", "x"], ["c"]),
            ("Sum", ["a", "b", "c", "x"], ["y"]),
        )
        gradients = add_gradient_operators(net, ["y"])
        ws.run_net_once(net)
        np.testing.assert_allclose(ws.fetch_blob(str(gradients["x"])), 2 * x + np.exp(x) + 3 * x * x + 1, rtol=1e-6)

    def test_sum_passes_its_gradient_on_without_an_operator(self) -> None:
        """caffe2.md 6: "Sum's own gradient is pass-through; Add has an AddGradient op"."""
        net = net_of(("Sum", ["a", "b"], ["y"]))
        assert add_gradient_operators(net, {"y": "dy"}) == {"y": "dy", "a": "dy", "b": "dy"}
        assert len(net.operators) == 1
        net = net_of(("Add", ["a", "b"], ["y"]))
        add_gradient_operators(net, {"y": "dy"})
        assert [operator.type for operator in net.operators[1:]] == ["AddGradient"]

    def test_a_passed_gradient_that_others_need_is_not_summed_over(self) -> None:
        ws = Workspace("w")
        ws.feed_blob("x", np.array([1.0, 2.0]))
        ws.feed_blob("z", np.array([5.0, 5.0]))
        net = net_of(("Sum", ["x", "x", "z"], ["y"]))
        gradients = add_gradient_operators(net, ["y"])
        ws.run_net_once(net)
        assert ws.fetch_blob(str(gradients["x"])).tolist() == [2, 2]
        assert ws.fetch_blob(str(gradients["z"])).tolist() == [1, 1]
        assert ws.fetch_blob(str(gradients["y"])).tolist() == [1, 1]


class TestOverwriting:
    def test_an_overwritten_blob_that_the_gradient_needs_is_refused_with_both_versions(self) -> None:
        """caffe2.md 6: 'Gradient operator needs output "y" at version 0, but currently we have version 1.'"""
        net = net_of(("Sigmoid", ["x"], ["y"]), ("Exp", ["y"], ["z"]), ("Relu", ["w"], ["y"]))
        text = r'needs output "y" at version 0, but currently we have version 1'
        with pytest.raises(InvalidInputError, match=text):
            add_gradient_operators(net, {"z": "dz"})
        assert len(net.operators) == 3

    def test_an_overwritten_input_is_refused_too(self) -> None:
        net = net_of(("Mul", ["x", "w"], ["y"]), ("Relu", ["v"], ["w"]))
        with pytest.raises(InvalidInputError, match=r'needs input "w" at version 0, but currently we have version 1'):
            add_gradient_operators(net, ["y"])

    def test_a_chain_in_place_is_differentiated_where_only_outputs_are_needed(self) -> None:
        ws = Workspace("w")
        ws.feed_blob("x", np.array([-1.0, 2.0], np.float32))
        net = Net("n")
        net.Scale("x", "h", scale=3.0)
        net.Relu("h", "h")
        gradients = add_gradient_operators(net, ["h"])
        ws.run_net_once(net)
        assert ws.fetch_blob(str(gradients["x"])).tolist() == [0, 3]

    def test_an_output_overwritten_in_place_by_an_operator_that_needs_it_is_refused(self) -> None:
        net = net_of(("Sigmoid", ["x"], ["h"]), ("Relu", ["h"], ["h"]))
        with pytest.raises(InvalidInputError, match=r'output "h" at version 0, but currently we have version 1'):
            add_gradient_operators(net, ["h"])


class TestPolicies:
    def test_no_gradient_stops_silently(self) -> None:
        """caffe2.md 6: 'NO_GRADIENT -> silently stops'."""
        net = net_of(("StopGradient", ["x"], ["s"]), ("Relu", ["s"], ["y"]))
        assert set(add_gradient_operators(net, ["y"])) == {"y", "s"}

    @pytest.mark.parametrize("type_", ["GetAllBlobNames", "And"])
    def test_should_not_is_refused_in_caffe2s_words(self, type_: str) -> None:
        inputs = [] if type_ == "GetAllBlobNames" else ["a", "b"]
        net = net_of((type_, inputs, ["y"]))
        with pytest.raises(InvalidInputError, match=f"One should not call gradient for operator {type_}"):
            add_gradient_operators(net, ["y"])
        assert len(net.operators) == 1

    def test_not_implemented_yet_and_unregistered_are_refused(self, own_operators: None) -> None:
        """caffe2.md 6: 'should have a gradient but is not implemented yet'; unregistered is another refusal."""
        for type_ in ("Later", "Never"):
            register_schema(OperatorSchema(type=type_, doc="Own.", inputs=(1, 1), outputs=(1, 1)))
        gradient_not_implemented_yet("Later")
        with pytest.raises(InvalidInputError, match="Operator Later should have a gradient but is not implemented yet"):
            add_gradient_operators(net_of(("Later", ["x"], ["y"])), ["y"])
        with pytest.raises(InvalidInputError, match=r"Never has no gradient registered.*register_gradient\('Never'\)"):
            add_gradient_operators(net_of(("Never", ["x"], ["y"])), ["y"])

    def test_one_operators_gradient_by_itself(self) -> None:
        made, gradients = gradient_operators(OperatorDef(type="Mul", inputs=("a", "b"), outputs=("c",)), {"c": "dc"})
        assert gradients == {"a": "a_grad", "b": "b_grad"}
        assert [operator.type for operator in made] == ["MulGradient"]

    def test_a_maker_that_reads_what_nobody_makes_is_refused(self, own_operators: None) -> None:
        for type_ in ("Odd", "OddGradient"):
            register_schema(OperatorSchema(type=type_, doc="Own.", inputs=(1, 1), outputs=(1, 1)))

        @register_gradient("Odd")
        def odd(call: GradientCall) -> GradientResult:
            return GradientResult((operator_def("OddGradient", ["elsewhere"], [call.name(0)]),), (call.name(0),))

        with pytest.raises(InvalidInputError, match='reads "elsewhere", which is neither'):
            add_gradient_operators(net_of(("Odd", ["x"], ["y"])), ["y"])


@pytest.mark.usefixtures("sparse")
class TestSparse:
    def test_a_sparse_gradient_is_a_pair_of_names(self) -> None:
        net = net_of(("Rows", ["x", "i"], ["y"]))
        gradients = add_gradient_operators(net, {"y": "dy"})
        assert gradients["x"] == GradientSlice(indices="x_grad_indices", values="x_grad_values")
        assert "i" not in gradients

    def test_one_that_is_passed_on_needs_no_operator(self) -> None:
        net = net_of(("Pick", ["x", "i"], ["y"]))
        assert add_gradient_operators(net, {"y": "dy"})["x"] == GradientSlice(indices="i", values="dy")
        assert len(net.operators) == 1

    def test_two_are_concatenated(self) -> None:
        """caffe2.md 6: 'Sparse fan-out: Concat of indices and of values to X_grad_indices_concat/..values_concat'."""
        net = net_of(("Rows", ["x", "i"], ["y"]), ("Rows", ["x", "j"], ["z"]), ("Pick", ["x", "k"], ["w"]))
        gradients = add_gradient_operators(net, {"y": "dy", "z": "dz", "w": "dw"})
        assert gradients["x"] == GradientSlice(indices="x_grad_indices_concat", values="x_grad_values_concat")
        indices, values = net.operators[-2:]
        assert indices.inputs == ("k", "_x_grad_indices_autosplit_0", "_x_grad_indices_autosplit_1")
        assert values.inputs == ("dw", "_x_grad_values_autosplit_0", "_x_grad_values_autosplit_1")
        assert indices.args == values.args == {"axis": 0}

    def test_a_mix_of_sparse_and_dense_is_refused(self) -> None:
        """caffe2.md 6: 'Automatic aggregation of a mix of sparse and dense gradients is not supported yet'."""
        net = net_of(("Rows", ["x", "i"], ["y"]), ("Relu", ["x"], ["z"]))
        with pytest.raises(InvalidInputError, match="'x' failed to verify: a mix of sparse and dense"):
            add_gradient_operators(net, ["y", "z"])
        assert len(net.operators) == 2

    def test_a_dense_maker_refuses_a_sparse_gradient(self) -> None:
        net = net_of(("Relu", ["v"], ["x"]), ("Rows", ["x", "i"], ["y"]))
        with pytest.raises(InvalidInputError, match="found a sparse gradient"):
            add_gradient_operators(net, ["y"])
