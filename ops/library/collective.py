"""Operators that meet the other workspaces of a cluster: every workspace runs the same one at the same place."""

from __future__ import annotations

from collections.abc import Sequence

from ..execution import OperatorCall, shown
from ..registry import Step, register_operator, should_not_do_gradient
from ..schema import UNBOUNDED, ArgType, Argument, OperatorSchema
from ..values import Array


def _bound_pairs(call: OperatorCall) -> tuple[list[Array], list[Array]]:
    """Return the inputs and the outputs, one shaped like the other, once they pair up."""
    definition = call.definition
    if call.input_count != call.output_count:
        raise call.reject(f"expected as many outputs as inputs, found {call.input_count} and {call.output_count}")
    for position, name in enumerate(definition.outputs):
        if name in definition.inputs and definition.inputs[position] != name:
            raise call.reject(
                f"output {position} may overwrite input {position} only; found {name!r}, which is input "
                f"{definition.inputs.index(name)}"
            )
    inputs = [call.input(position) for position in range(call.input_count)]
    for position, array in enumerate(inputs):
        if array.dtype.kind == "b":
            raise call.reject(f"input {position} is expected to hold numbers, found {shown(array)}")
    outputs = [call.output(position, array.shape, array.dtype) for position, array in enumerate(inputs)]
    return inputs, outputs


def _check_results(call: OperatorCall, outputs: Sequence[Array], results: Sequence[Array]) -> None:
    for position, (output, result) in enumerate(zip(outputs, results, strict=True)):
        if result.shape != output.shape or result.dtype != output.dtype:
            raise call.reject(
                f"every workspace is expected to hold the same dtype and shape for input {position}; found "
                f"{shown(output)} here and {shown(result)} from the others"
            )


@register_operator(
    OperatorSchema(
        type="Allreduce",
        doc="Combine each tensor with those of the same position in all workspaces of the cluster; all of them get "
        "the result, bit for bit the same whatever the order of arrival.",
        inputs=(1, UNBOUNDED),
        outputs=(1, UNBOUNDED),
        input_names=("X: tensor of numbers; the same shape and dtype in every workspace.",),
        output_names=("Y: the combined tensor, shaped like X; may be X.",),
        arguments=(
            Argument(
                name="reduce",
                type=ArgType.STRING,
                default="sum",
                doc='"sum", or "mean" (floating point only): the sum divided by the number of workspaces.',
            ),
        ),
        in_place_any=True,
    ),
    is_collective=True,
)
def allreduce(call: OperatorCall) -> Step:
    """Sum or average over the workspaces."""
    reduce = call.arguments["reduce"]
    if reduce not in ("sum", "mean"):
        raise call.reject(f"the argument reduce is expected to be 'sum' or 'mean', found {reduce!r}")
    inputs, outputs = _bound_pairs(call)
    xp = call.xp
    if reduce == "mean":
        for position, array in enumerate(inputs):
            # kind "V" is bfloat16 and the 8-bit floats.
            if array.dtype.kind not in "fcV":
                raise call.reject(f"reduce='mean' expects floating point, found {shown(array)} as input {position}")

    def step() -> None:
        collectives = call.environment.collectives
        results = collectives.allreduce(inputs)
        _check_results(call, outputs, results)
        for output, result in zip(outputs, results, strict=True):
            if reduce == "mean" and collectives.size > 1:
                xp.divide(result, output.dtype.type(collectives.size), out=output)
            elif result is not output:
                xp.copyto(output, result)

    return step


@register_operator(
    OperatorSchema(
        type="Broadcast",
        doc="Give every workspace of the cluster the tensors that one of them has.",
        inputs=(1, UNBOUNDED),
        outputs=(1, UNBOUNDED),
        input_names=("X: tensor of numbers; the same shape and dtype in every workspace.",),
        output_names=("Y: the root's X; may be X.",),
        arguments=(
            Argument(name="root", type=ArgType.INT, default=0, doc="Rank of the workspace that gives, from 0."),
        ),
        in_place_any=True,
    ),
    is_collective=True,
)
def broadcast(call: OperatorCall) -> Step:
    """Copy from one workspace to all."""
    root, size = call.arguments["root"], call.environment.collectives.size
    if not 0 <= root < size:
        raise call.reject(f"root is expected to be a rank from 0 to {size - 1}, found {root}")
    inputs, outputs = _bound_pairs(call)
    xp = call.xp

    def step() -> None:
        results = call.environment.collectives.broadcast(inputs, root=root)
        _check_results(call, outputs, results)
        for output, result in zip(outputs, results, strict=True):
            if result is not output:
                xp.copyto(output, result)

    return step


should_not_do_gradient("Allreduce", "Broadcast")
