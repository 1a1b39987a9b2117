"""Operators that sum dimensions away, and spread a gradient back over them.

Long float32 sums keep NumPy's pairwise order, whose error grows with the logarithm of their length.

Source: Caffe2's operators of the same names.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from functools import partial

import numpy as np

from ..dtypes import DType
from ..execution import OperatorCall, shown
from ..registry import (
    GradientCall,
    GradientResult,
    Step,
    register_gradient,
    register_operator,
)
from ..schema import ArgType, Argument, OperatorSchema
from ..values import Array
from .elementwise import (
    FLOATS,
    INTEGERS,
    NUMBERS,
    checked_input,
    constant,
    copying,
    gradient_operator,
    in_sequence,
    quiet,
    summing,
)

_BOOL: DType = np.dtype(np.bool_)


def _summing(call: OperatorCall, x: Array, axes: tuple[int, ...], out: Array, factor: float | None) -> Step:
    """Return a step that sums ``x`` over ``axes`` into ``out``, whose shape keeps them as 1, and scales the sum."""
    total = summing(out, x, axes) if axes else copying(out, x)
    if factor is None:
        return quiet(call.xp, total)
    return in_sequence(call, total, partial(call.xp.multiply, out, constant(call, factor, out.dtype), out))


def _spreading(call: OperatorCall, given: Array, out: Array, factor: float | None) -> Step:
    """Return a step that broadcasts ``given`` over ``out`` and scales it."""
    if factor is None:
        return partial(out.__setitem__, ..., given)
    return quiet(call.xp, call.xp.multiply, given, constant(call, factor, out.dtype), out)


def _mean_factor(is_mean: bool, count: int) -> float | None:
    """Return what a sum of ``count`` elements is multiplied by; the mean of nothing is 0."""
    if not is_mean:
        return None
    return 1.0 / count if count else 0.0


# ReduceSum, ReduceMean ------------------------------------------------------------------------------------------

_AXES_ARGUMENTS = (
    Argument(name="axes", type=ArgType.INTS, doc="The dimensions; all of them if not given."),
    Argument(name="keepdims", type=ArgType.BOOL, default=True, doc="Whether they stay, with size 1."),
)


def _axes(call: OperatorCall, x: Array) -> tuple[int, ...]:
    given = call.arguments["axes"]
    if not given:
        return tuple(range(x.ndim))
    axes = tuple(sorted(axis + x.ndim if axis < 0 else axis for axis in given))
    if axes[0] < 0 or axes[-1] >= x.ndim or len(set(axes)) < len(axes):
        raise call.reject(f"axes must be different dimensions of {shown(x)}; found {given}")
    return axes


def _kept(x: Array, axes: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(1 if dim in axes else size for dim, size in enumerate(x.shape))


def _reduce(call: OperatorCall, *, is_mean: bool, dtypes: Collection[str]) -> Step:
    x = checked_input(call, 0, dtypes)
    axes = _axes(call, x)
    kept = _kept(x, axes)
    shape = kept if call.arguments["keepdims"] else [size for dim, size in enumerate(kept) if dim not in axes]
    y = call.output(0, shape, x.dtype).reshape(kept)
    return _summing(call, x, axes, y, _mean_factor(is_mean, math.prod(x.shape[axis] for axis in axes)))


def _reduce_gradient(call: OperatorCall, *, is_mean: bool, dtypes: Collection[str]) -> Step:
    x = checked_input(call, 1, dtypes)
    given = checked_input(call, 0, dtypes, like=x)
    axes = _axes(call, x)
    kept = _kept(x, axes)
    if given.size != math.prod(kept):
        raise call.reject(f"input 0, the gradient, must have {math.prod(kept)} elements; it is {shown(given)}")
    dx = call.output(0, x.shape, x.dtype)
    factor = _mean_factor(is_mean, math.prod(x.shape[axis] for axis in axes))
    return _spreading(call, given.reshape(kept), dx, factor)


def _register_reduction(type_: str, doc: str, gradient_doc: str, *, is_mean: bool, dtypes: Collection[str]) -> None:
    register_operator(
        OperatorSchema(
            type=type_,
            doc=doc,
            inputs=(1, 1),
            outputs=(1, 1),
            input_names=("X: any shape.",),
            output_names=("Y: X's shape with 1 for each of the axes, or without them.",),
            arguments=_AXES_ARGUMENTS,
        )
    )(partial(_reduce, is_mean=is_mean, dtypes=dtypes))
    register_operator(
        OperatorSchema(
            type=f"{type_}Gradient",
            doc=gradient_doc,
            inputs=(3, 3),
            outputs=(1, 1),
            input_names=("dY: Y's shape.", "X: the forward input.", "Y: the forward output."),
            output_names=("dX: X's shape.",),
            arguments=_AXES_ARGUMENTS,
        )
    )(partial(_reduce_gradient, is_mean=is_mean, dtypes=dtypes))

    @register_gradient(type_)
    def make(call: GradientCall) -> GradientResult:  # pyright: ignore[reportUnusedFunction]
        inputs = (call.given(0), call.input(0), call.output(0))
        return GradientResult((gradient_operator(f"{type_}Gradient", inputs, (call.name(0),)),), (call.name(0),))


_register_reduction("ReduceSum", "Y = X summed over axes.", "dX = dY, broadcast.", is_mean=False, dtypes=NUMBERS)
_register_reduction(
    "ReduceMean", "Y = X averaged over axes.", "dX = dY / count, broadcast.", is_mean=True, dtypes=FLOATS
)

# ReduceFrontSum, ReduceBackSum and their means ------------------------------------------------------------------

_NUM_REDUCE_DIM = Argument(name="num_reduce_dim", type=ArgType.INT, default=1, doc="How many dimensions go.")


def _end_axes(call: OperatorCall, x: Array, *, is_front: bool) -> tuple[int, ...]:
    count = call.arguments["num_reduce_dim"]
    if not 0 <= count <= x.ndim:
        raise call.reject(f"num_reduce_dim must be in [0, {x.ndim}], the dimensions of {shown(x)}; found {count}")
    return tuple(range(count) if is_front else range(x.ndim - count, x.ndim))


def _lengths(call: OperatorCall, index: int, x: Array, axes: tuple[int, ...]) -> Array:
    """Return the lengths input, int32 or int64, in a shape that broadcasts over ``x``."""
    lengths = checked_input(call, index, INTEGERS)
    kept = _kept(x, axes)
    if len(axes) != 1 or lengths.size != math.prod(kept):
        raise call.reject(
            f"input {index}, the lengths, needs num_reduce_dim=1 and one length for each of the {math.prod(kept)} "
            f"sums; found num_reduce_dim {len(axes)} and lengths {shown(lengths)}"
        )
    return lengths.reshape(kept)


def _positions(call: OperatorCall, x: Array, axis: int) -> Array:
    return call.xp.arange(x.shape[axis]).reshape([-1 if dim == axis else 1 for dim in range(x.ndim)])


def _reduce_end(call: OperatorCall, *, is_front: bool, is_mean: bool) -> Step:
    xp, x = call.xp, checked_input(call, 0, FLOATS if is_mean else NUMBERS)
    axes = _end_axes(call, x, is_front=is_front)
    y = call.output(0, [size for dim, size in enumerate(x.shape) if dim not in axes], x.dtype).reshape(_kept(x, axes))
    if call.input_count == 1:
        return _summing(call, x, axes, y, _mean_factor(is_mean, math.prod(x.shape[axis] for axis in axes)))
    lengths = _lengths(call, 1, x, axes)
    positions, zero = _positions(call, x, axes[0]), constant(call, 0, x.dtype)

    def step() -> None:
        xp.where(positions < lengths, x, zero).sum(axes, y.dtype, y, True)
        if is_mean:
            xp.divide(y, xp.maximum(lengths, 1).astype(y.dtype), y)

    return quiet(xp, step)


def _reduce_end_gradient(call: OperatorCall, *, is_front: bool, is_mean: bool) -> Step:
    xp, x = call.xp, call.input(1)
    given = checked_input(call, 0, FLOATS if is_mean else NUMBERS)
    axes = _end_axes(call, x, is_front=is_front)
    kept = _kept(x, axes)
    if given.size != math.prod(kept):
        raise call.reject(f"input 0, the gradient, must have {math.prod(kept)} elements; it is {shown(given)}")
    dx = call.output(0, x.shape, given.dtype)
    spread = given.reshape(kept)
    if call.input_count == 2:
        return _spreading(call, spread, dx, _mean_factor(is_mean, math.prod(x.shape[axis] for axis in axes)))
    lengths = _lengths(call, 2, x, axes)
    positions, zero = _positions(call, x, axes[0]), constant(call, 0, given.dtype)

    def step() -> None:
        share = xp.divide(spread, xp.maximum(lengths, 1).astype(dx.dtype)) if is_mean else spread
        dx[...] = xp.where(positions < lengths, share, zero)

    return quiet(xp, step)


def _register_end_reduction(type_: str, *, is_front: bool, is_mean: bool) -> None:
    where, what = "first" if is_front else "last", "averaged" if is_mean else "summed"
    register_operator(
        OperatorSchema(
            type=type_,
            doc=f"Y = X {what} over its {where} dimensions; with lengths, over only so many elements in each column.",
            inputs=(1, 2),
            outputs=(1, 1),
            input_names=("X: any shape.", "lengths: one integer for each element of Y."),
            output_names=(f"Y: X's shape without the {where} `num_reduce_dim` dimensions.",),
            arguments=(_NUM_REDUCE_DIM,),
        )
    )(partial(_reduce_end, is_front=is_front, is_mean=is_mean))
    register_operator(
        OperatorSchema(
            type=f"{type_}Gradient",
            doc="dX = dY, broadcast and for a mean divided; 0 beyond the lengths.",
            inputs=(2, 3),
            outputs=(1, 1),
            input_names=("dY: Y's shape.", "X: the forward input.", "lengths: one integer for each element of Y."),
            output_names=("dX: X's shape.",),
            arguments=(_NUM_REDUCE_DIM,),
        )
    )(partial(_reduce_end_gradient, is_front=is_front, is_mean=is_mean))

    @register_gradient(type_)
    def make(call: GradientCall) -> GradientResult:  # pyright: ignore[reportUnusedFunction]
        inputs = (call.given(0), *call.operator.inputs)
        return GradientResult((gradient_operator(f"{type_}Gradient", inputs, (call.name(0),)),), (call.name(0),))


_register_end_reduction("ReduceFrontSum", is_front=True, is_mean=False)
_register_end_reduction("ReduceBackSum", is_front=False, is_mean=False)
_register_end_reduction("ReduceFrontMean", is_front=True, is_mean=True)
_register_end_reduction("ReduceBackMean", is_front=False, is_mean=True)

# SumElements, AveragedLoss --------------------------------------------------------------------------------------

_AVERAGE = Argument(name="average", type=ArgType.BOOL, default=False, doc="Whether to divide by their number.")


def _is_average(call: OperatorCall) -> bool:
    # AveragedLoss is SumElements with average=1, and has no argument to say so.
    return call.arguments.get("average", True)


def _sum_elements(call: OperatorCall) -> Step:
    is_average = _is_average(call)
    x = checked_input(call, 0, FLOATS if is_average else NUMBERS)
    total = call.output(0, (), x.dtype)
    sum_up = partial(x.sum, None, x.dtype, total)
    factor = _mean_factor(is_average, x.size)
    if factor is None:
        return quiet(call.xp, sum_up)
    return in_sequence(call, sum_up, partial(call.xp.multiply, total, constant(call, factor, x.dtype), total))


def _sum_elements_gradient(call: OperatorCall) -> Step:
    is_average = _is_average(call)
    x = checked_input(call, 0, FLOATS if is_average else NUMBERS)
    given = checked_input(call, 1, NUMBERS, like=x)
    if given.size != 1:
        raise call.reject(f"input 1, the gradient, must have one element; it is {shown(given)}")
    return _spreading(call, given.reshape(()), call.output(0, x.shape, x.dtype), _mean_factor(is_average, x.size))


def _register_total(type_: str, doc: str, gradient_doc: str, arguments: tuple[Argument, ...]) -> None:
    register_operator(
        OperatorSchema(
            type=type_,
            doc=doc,
            inputs=(1, 1),
            outputs=(1, 1),
            input_names=("X: any shape.",),
            output_names=("Y: 0-d, X's dtype.",),
            arguments=arguments,
        )
    )(_sum_elements)
    register_operator(
        OperatorSchema(
            type=f"{type_}Gradient",
            doc=gradient_doc,
            inputs=(2, 2),
            outputs=(1, 1),
            input_names=("X: the forward input.", "dY: one element."),
            output_names=("dX: X's shape.",),
            arguments=arguments,
        )
    )(_sum_elements_gradient)

    @register_gradient(type_)
    def make(call: GradientCall) -> GradientResult:  # pyright: ignore[reportUnusedFunction]
        inputs = (call.input(0), call.given(0))
        return GradientResult((gradient_operator(f"{type_}Gradient", inputs, (call.name(0),)),), (call.name(0),))


_register_total("SumElements", "Y = the sum of X's elements.", "dX = dY everywhere.", (_AVERAGE,))
_register_total("AveragedLoss", "Y = the mean of X's elements, 0 if there are none.", "dX = dY / size everywhere.", ())
