"""Operators that move elements without computing with them: shapes, slices, concatenation, element types.

Source: Caffe2's operators of the same names.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import numpy as np

from ..dtypes import DType, parse_dtype
from ..errors import InvalidInputError
from ..execution import OperatorCall, shown
from ..registry import (
    GradientCall,
    GradientResult,
    Step,
    register_gradient,
    register_operator,
    should_not_do_gradient,
)
from ..schema import UNBOUNDED, ArgType, Argument, OperatorSchema
from ..values import Array
from .elementwise import IN_PLACE, copying, gradient_operator, in_sequence, quiet

_INT32: DType = np.dtype(np.int32)
_INT64: DType = np.dtype(np.int64)


def canonical_axis(call: OperatorCall, name: str, dimensions: int, index: int = 0) -> int:
    """Return the axis given as argument ``name``, counted from the front.

    Args:
        call: The operator's call.
        name: The argument.
        dimensions: How many dimensions the axis may point into.
        index: The input that it belongs to, for the error text.

    Raises:
        InvalidInputError: It points outside.
    """
    axis = call.arguments[name]
    if not -dimensions <= axis < dimensions:
        raise call.reject(
            f"{name} must be in [{-dimensions}, {dimensions - 1}] for input {index}, which has the shape "
            f"{tuple(call.input(index).shape)}; found {axis}"
        )
    return axis % dimensions


def flattened(shape: Sequence[int], axis: int) -> tuple[int, int]:
    """Return the number of rows and columns of a shape flattened to a matrix before ``axis``."""
    return math.prod(shape[:axis]), math.prod(shape[axis:])


def _gradient(call: GradientCall, *operators: tuple[str, tuple[str, ...]]) -> GradientResult:
    name = call.name(0)
    return GradientResult(tuple(gradient_operator(type_, inputs, (name,)) for type_, inputs in operators), (name,))


# Reshape and its kin --------------------------------------------------------------------------------------------


@register_operator(
    OperatorSchema(
        type="Reshape",
        doc="Y = X's elements in another shape. A dimension of 0 copies X's, one of -1 is inferred.",
        inputs=(1, 2),
        outputs=(2, 2),
        input_names=("X: any shape and dtype.", "new_shape: `(n,)`, int32 or int64, instead of the argument."),
        output_names=("Y: the new shape.", "old_shape: `(X's dimensions,)`, int64 (int32 if new_shape is)."),
        arguments=(Argument(name="shape", type=ArgType.INTS, doc="The new shape."),),
        in_place=IN_PLACE,
    ),
    dynamic=lambda operator: len(operator.inputs) == 2,
)
def reshape(call: OperatorCall) -> Step:
    """Copy the elements into the new shape, and remember the old one for the gradient."""
    x, wanted, dtype = call.input(0), call.arguments["shape"], _INT64
    if call.input_count == 2:
        if wanted:
            raise call.reject(f"the new shape must be given once; found input 1 and shape {wanted}")
        wanted = call.integers(1)
        dtype = _INT32 if call.input(1).dtype == _INT32 else _INT64
    elif wanted is None:
        raise call.reject("the new shape must be given, as the argument shape or as input 1; found neither")
    y = call.output(0, _new_shape(call, tuple(x.shape), wanted), x.dtype)
    old_shape = call.output(1, (x.ndim,), dtype)
    dimensions = call.xp.asarray(x.shape, dtype=dtype)
    return in_sequence(call, _copying_elements(y, x), copying(old_shape, dimensions))


def _copying_elements(target: Array, source: Array) -> Step:
    return copying(target, source if target is source else source.reshape(target.shape))


def _new_shape(call: OperatorCall, old: tuple[int, ...], wanted: Sequence[int]) -> tuple[int, ...]:
    if any(size < -1 for size in wanted) or list(wanted).count(-1) > 1:
        raise call.reject(f"the new shape must have dimensions of 0 or more and at most one -1; found {tuple(wanted)}")
    if any(size == 0 and index >= len(old) for index, size in enumerate(wanted)):
        raise call.reject(f"a 0 in the new shape {tuple(wanted)} must have a dimension to copy in input 0's {old}")
    new = [old[index] if size == 0 else size for index, size in enumerate(wanted)]
    total, known = math.prod(old), math.prod(size for size in new if size != -1)
    if -1 in new:
        if known == 0 or total % known:
            raise call.reject(f"the -1 in the new shape {tuple(wanted)} cannot be inferred for input 0's shape {old}")
        new[new.index(-1)] = total // known
    elif total != known:
        raise call.reject(f"the new shape {tuple(wanted)} must hold input 0's {total} elements; it holds {known}")
    return tuple(new)


@register_gradient("Reshape")
def _reshape_gradient(call: GradientCall) -> GradientResult:
    name = call.name(0)
    # An empty shape stands for "not given"; without it the operator would inherit the forward operator's.
    operator = gradient_operator("Reshape", (call.given(0), call.output(1)), (name, f"_{name}_dims"), {"shape": ()})
    return GradientResult((operator,), (name,))


@register_operator(
    OperatorSchema(
        type="ResizeLike",
        doc="Y = X's elements in the shape of another tensor.",
        inputs=(2, 2),
        outputs=(1, 1),
        input_names=("X: any shape and dtype.", "like: any shape with as many elements."),
        output_names=("Y: the shape of `like`, X's dtype.",),
        accepts_any_arguments=True,
    )
)
def resize_like(call: OperatorCall) -> Step:
    """Copy the elements into the other tensor's shape."""
    x, like = call.input(0), call.input(1)
    if x.size != like.size:
        raise call.reject(f"inputs 0 and 1 must have equally many elements; they are {shown(x)} and {shown(like)}")
    return _copying_elements(call.output(0, like.shape, x.dtype), x)


should_not_do_gradient("ResizeLike")


@register_operator(
    OperatorSchema(
        type="Flatten",
        doc="Y = X as a matrix: dimensions before `axis` become rows, the others columns.",
        inputs=(1, 1),
        outputs=(1, 1),
        input_names=("X: at least `axis` dimensions, any dtype.",),
        output_names=("Y: `(rows, columns)`.",),
        arguments=(Argument(name="axis", type=ArgType.INT, default=1, doc="First dimension of the columns."),),
    )
)
def flatten(call: OperatorCall) -> Step:
    """Copy the elements into a matrix."""
    x, axis = call.input(0), call.arguments["axis"]
    if not 0 <= axis <= x.ndim:
        raise call.reject(f"axis must be in [0, {x.ndim}], the dimensions of input 0, {shown(x)}; found {axis}")
    return _copying_elements(call.output(0, flattened(x.shape, axis), x.dtype), x)


@register_operator(
    OperatorSchema(
        type="FlattenToVec",
        doc="Y = X as a vector.",
        inputs=(1, 1),
        outputs=(1, 1),
        input_names=("X: at least one dimension, any dtype.",),
        output_names=("Y: `(size of X,)`.",),
    )
)
def flatten_to_vec(call: OperatorCall) -> Step:
    """Copy the elements into a vector."""
    x = call.input(0)
    if x.ndim == 0:
        raise call.reject(f"input 0 must have at least one dimension; it is {shown(x)}")
    return _copying_elements(call.output(0, (x.size,), x.dtype), x)


@register_gradient("Flatten")
@register_gradient("FlattenToVec")
def _flatten_gradient(call: GradientCall) -> GradientResult:
    return _gradient(call, ("ResizeLike", (call.given(0), call.input(0))))


_DIMS = Argument(name="dims", type=ArgType.INTS, required=True, doc="Positions of the dimensions of size 1.")


def _dims(call: OperatorCall) -> tuple[int, ...]:
    dims = call.arguments["dims"]
    if not dims or min(dims) < 0:
        raise call.reject(f"dims must name at least one dimension, and none below 0; found {dims}")
    return tuple(sorted(set(dims)))


def _dims_schema(type_: str, doc: str) -> OperatorSchema:
    return OperatorSchema(
        type=type_,
        doc=doc,
        inputs=(1, 1),
        outputs=(1, 1),
        input_names=("X: any shape and dtype.",),
        output_names=("Y: X's elements in the new shape.",),
        arguments=(_DIMS,),
        in_place=IN_PLACE,
    )


@register_operator(_dims_schema("ExpandDims", "Y = X with dimensions of size 1 inserted, at their places in Y."))
def expand_dims(call: OperatorCall) -> Step:
    """Insert dimensions of size 1."""
    x, dims = call.input(0), _dims(call)
    shape = list(x.shape)
    for dim in dims:
        if dim > len(shape):
            raise call.reject(f"dims {dims} must leave no gap in the result; input 0 is {shown(x)}")
        shape.insert(dim, 1)
    return _copying_elements(call.output(0, shape, x.dtype), x)


@register_operator(_dims_schema("Squeeze", "Y = X without these dimensions, which have size 1."))
def squeeze(call: OperatorCall) -> Step:
    """Remove dimensions of size 1."""
    x, dims = call.input(0), _dims(call)
    if dims[-1] >= x.ndim or any(x.shape[dim] != 1 for dim in dims):
        raise call.reject(f"dims {dims} must be dimensions of size 1 of input 0; it is {shown(x)}")
    shape = [size for dim, size in enumerate(x.shape) if dim not in dims]
    return _copying_elements(call.output(0, shape, x.dtype), x)


@register_gradient("ExpandDims")
def _expand_dims_gradient(call: GradientCall) -> GradientResult:
    return _gradient(call, ("Squeeze", (call.given(0),)))


@register_gradient("Squeeze")
def _squeeze_gradient(call: GradientCall) -> GradientResult:
    return _gradient(call, ("ExpandDims", (call.given(0),)))


@register_operator(
    OperatorSchema(
        type="Transpose",
        doc="Y = X with its dimensions in another order.",
        inputs=(1, 1),
        outputs=(1, 1),
        input_names=("X: any shape and dtype.",),
        output_names=("Y: dimension i is X's dimension `axes[i]`.",),
        arguments=(Argument(name="axes", type=ArgType.INTS, doc="A permutation; reversed order if not given."),),
    )
)
def transpose(call: OperatorCall) -> Step:
    """Copy the elements in the new order."""
    x = call.input(0)
    axes = call.arguments["axes"] or tuple(reversed(range(x.ndim)))
    if sorted(axes) != list(range(x.ndim)):
        raise call.reject(f"axes must be a permutation of 0 to {x.ndim - 1}, as input 0 is {shown(x)}; found {axes}")
    view = x.transpose(axes)
    return copying(call.output(0, view.shape, x.dtype), view)


@register_gradient("Transpose")
def _transpose_gradient(call: GradientCall) -> GradientResult:
    axes: list[int] = list(call.operator.args.get("axes") or ())
    inverse = {"axes": [axes.index(axis) for axis in range(len(axes))]} if axes else None
    operator = gradient_operator("Transpose", (call.given(0),), (call.name(0),), inverse)
    return GradientResult((operator,), (call.name(0),))


# Cast -----------------------------------------------------------------------------------------------------------


@register_operator(
    OperatorSchema(
        type="Cast",
        doc="Y = X converted to another dtype, as C converts: towards zero, wrapping, anything but 0 is true.",
        inputs=(1, 1),
        outputs=(1, 1),
        input_names=("X: any shape.",),
        output_names=("Y: X's shape, the dtype `to`.",),
        arguments=(
            Argument(name="to", type=ArgType.DTYPE, required=True, doc="Caffe2 number or NumPy name."),
            Argument(name="from_type", type=ArgType.DTYPE, doc="X's dtype; only the gradient needs it."),
        ),
    )
)
def cast(call: OperatorCall) -> Step:
    """Convert the elements."""
    x = call.input(0)
    return quiet(call.xp, partial(call.xp.copyto, casting="unsafe"), call.output(0, x.shape, call.arguments["to"]), x)


@register_gradient("Cast")
def _cast_gradient(call: GradientCall) -> GradientResult:
    if "from_type" not in call.operator.args:
        raise InvalidInputError(
            f"The gradient of {call.operator} needs its argument from_type, the dtype to cast back to; it is not "
            f"given.",
            operator=call.operator.type,
            argument="from_type",
        )
    back = {
        "to": parse_dtype(call.operator.args["from_type"]).name,
        "from_type": parse_dtype(call.operator.args["to"]).name,
    }
    operator = gradient_operator("Cast", (call.given(0),), (call.name(0),), back)
    return GradientResult((operator,), (call.name(0),))


# Slice ----------------------------------------------------------------------------------------------------------

_SLICE_ARGUMENTS = (
    Argument(name="starts", type=ArgType.INTS, doc="First index in each dimension from the first one on."),
    Argument(name="ends", type=ArgType.INTS, doc="Index after the last; -1: to the end, -2: all but the last, …"),
)


def _slices(call: OperatorCall, x: Array, *, has_inputs: bool) -> tuple[slice, ...]:
    """Return the slice of each dimension of ``x``. Caffe2 counts negative starts from the end, too: -1 is the end."""
    starts, ends = call.arguments["starts"], call.arguments["ends"]
    if has_inputs:
        starts, ends = call.integers(1), call.integers(2)
    if starts is None or ends is None or len(starts) != len(ends) or len(starts) > x.ndim:
        raise call.reject(
            f"starts and ends must be given for the same dimensions of input 0, {shown(x)}; found starts {starts} and "
            f"ends {ends}"
        )
    slices: list[slice] = []
    for dim, (start, end) in enumerate(zip(starts, ends, strict=True)):
        size = x.shape[dim]
        first, last = (min(size + 1 + index if index < 0 else index, size) for index in (start, end))
        if size == 0:
            first = last = 0
        if not 0 <= first <= last:
            raise call.reject(
                f"dimension {dim} of input 0, {shown(x)}, must be sliced from a start to an end not before it; found "
                f"start {start} and end {end}, which mean {first} and {last}"
            )
        slices.append(slice(first, last))
    return (*slices, ...) if slices else (...,)  # type: ignore[return-value]  (an Ellipsis ends the tuple)


@register_operator(
    OperatorSchema(
        type="Slice",
        doc="Y = X[starts:ends], in any number of dimensions. Negative indices count from the end: -1 *is* the end.",
        inputs=(1, 3),
        outputs=(1, 1),
        input_names=(
            "X: any shape and dtype.",
            "starts: `(n,)`, integers, instead of the argument.",
            "ends: `(n,)`, integers, instead of the argument.",
        ),
        output_names=("Y: `ends - starts` in the first n dimensions, X's shape in the others.",),
        arguments=_SLICE_ARGUMENTS,
    ),
    dynamic=lambda operator: len(operator.inputs) == 3,
)
def slice_(call: OperatorCall) -> Step:
    """Copy a part of the tensor."""
    if call.input_count == 2:
        raise call.reject("expected the inputs X, or X, starts and ends; found two inputs")
    x = call.input(0)
    view = x[_slices(call, x, has_inputs=call.input_count == 3)]
    return copying(call.output(0, view.shape, x.dtype), view)


@register_operator(
    OperatorSchema(
        type="SliceGradient",
        doc="dX = 0, and dX[starts:ends] = dY.",
        inputs=(2, 4),
        outputs=(1, 1),
        input_names=("X: the forward input.", "With four inputs: starts.", "ends.", "dY, last: the slice's shape."),
        output_names=("dX: X's shape.",),
        arguments=_SLICE_ARGUMENTS,
    ),
    dynamic=lambda operator: len(operator.inputs) == 4,
)
def slice_gradient(call: OperatorCall) -> Step:
    """Put the gradient where the slice was taken from."""
    if call.input_count == 3:
        raise call.reject("expected the inputs X and dY, or X, starts, ends and dY; found three inputs")
    x, given = call.input(0), call.input(call.input_count - 1)
    slices = _slices(call, x, has_inputs=call.input_count == 4)
    shape = x[slices].shape
    if given.shape != shape:
        raise call.reject(
            f"input {call.input_count - 1}, the gradient, must have the slice's shape {tuple(shape)}; it is "
            f"{shown(given)}"
        )
    dx = call.output(0, x.shape, given.dtype)
    return in_sequence(call, partial(dx.fill, 0), copying(dx[slices], given))


@register_gradient("Slice")
def _slice_gradient(call: GradientCall) -> GradientResult:
    return _gradient(call, ("SliceGradient", (*call.operator.inputs, call.given(0))))


# Concat and Split -----------------------------------------------------------------------------------------------

_JOIN_ARGUMENTS = (
    Argument(name="axis", type=ArgType.INT, doc="The dimension; the channels of `order` if not given."),
    Argument(name="order", type=ArgType.STRING, default="NCHW", doc="NCHW (axis 1) or NHWC (axis 3)."),
    Argument(name="add_axis", type=ArgType.BOOL, default=False, doc="The dimension is not in the single tensors."),
)


def _channel_axis(order: str) -> int:
    return 3 if order == "NHWC" else 1


def _join_axis(call: OperatorCall, dimensions: int) -> tuple[int, bool]:
    """Return the axis and whether it is an added one, in a joined tensor of so many dimensions."""
    if call.arguments["order"] not in ("NCHW", "NHWC"):
        raise call.reject(f"order must be NCHW or NHWC; found {call.arguments['order']!r}")
    is_added = call.arguments["add_axis"] and call.arguments["axis"] is not None
    if call.arguments["axis"] is not None and "order" in call.definition.args:
        raise call.reject("the dimension must be given once, as axis or by order; found both")
    axis = call.arguments["axis"]
    axis = _channel_axis(call.arguments["order"]) if axis is None else axis
    dimensions += is_added and call.definition.type == "Concat"
    if not -dimensions <= axis < dimensions:
        raise call.reject(
            f"axis must be in [{-dimensions}, {dimensions - 1}], as input 0 is {shown(call.input(0))}; found {axis}"
        )
    return axis % dimensions, is_added


@register_operator(
    OperatorSchema(
        type="Concat",
        doc="Y = the inputs side by side along an axis, or with add_axis stacked along a new one.",
        inputs=(1, UNBOUNDED),
        outputs=(2, 2),
        input_names=("X_i: equal shapes, but for the axis; equal dtypes.",),
        output_names=("Y: the joined tensor.", "split_info: `(number of inputs,)`, int32, each one's size."),
        arguments=_JOIN_ARGUMENTS,
    )
)
def concat(call: OperatorCall) -> Step:
    """Copy the inputs side by side."""
    arrays = [call.input(index) for index in range(call.input_count)]
    first = arrays[0]
    axis, is_added = _join_axis(call, first.ndim)
    if is_added:
        _check_joinable(call, arrays, None)
        arrays = [array.reshape((*array.shape[:axis], 1, *array.shape[axis:])) for array in arrays]
    else:
        _check_joinable(call, arrays, axis)
    sizes = [array.shape[axis] for array in arrays]
    shape = arrays[0].shape
    y = call.output(0, (*shape[:axis], sum(sizes), *shape[axis + 1 :]), first.dtype)
    split_info = call.output(1, (len(arrays),), _INT32)
    return in_sequence(
        call,
        partial(call.xp.concatenate, arrays, axis, y),
        copying(split_info, call.xp.asarray(sizes, dtype=_INT32)),
    )


def _check_joinable(call: OperatorCall, arrays: list[Array], axis: int | None) -> None:
    """Check that shapes agree in every dimension other than ``axis`` (None: in all)."""
    first = arrays[0]
    for index, array in enumerate(arrays):
        is_fitting = array.dtype == first.dtype and array.ndim == first.ndim
        if not is_fitting or any(size != array.shape[dim] for dim, size in enumerate(first.shape) if dim != axis):
            where = "" if axis is None else f" in every dimension but {axis}"
            raise call.reject(f"input {index} must agree with input 0, {shown(first)}{where}; it is {shown(array)}")


@register_gradient("Concat")
def _concat_gradient(call: GradientCall) -> GradientResult:
    if call.output_gradients[0] is None:
        return GradientResult((), ())
    names = tuple(call.name(index) for index in range(len(call.operator.inputs)))
    return GradientResult((gradient_operator("Split", (call.given(0), call.output(1)), names),), names)


@register_operator(
    OperatorSchema(
        type="Split",
        doc="Y_i = consecutive parts of X along an axis; equal ones if their sizes are not given.",
        inputs=(1, 2),
        outputs=(1, UNBOUNDED),
        input_names=("X: any shape and dtype.", "split: `(number of outputs,)`, integers, instead of the argument."),
        output_names=("Y_i: X's shape but for the axis, which is gone with add_axis.",),
        arguments=(*_JOIN_ARGUMENTS, Argument(name="split", type=ArgType.INTS, doc="Size of each part.")),
    ),
    dynamic=lambda operator: len(operator.inputs) == 2,
)
def split(call: OperatorCall) -> Step:
    """Copy the parts."""
    x = call.input(0)
    axis, is_added = _join_axis(call, x.ndim)
    sizes = _split_sizes(call, x, axis)
    if is_added:
        sizes = (1,) * call.output_count
    if len(sizes) != call.output_count or min(sizes) < 0 or sum(sizes) != x.shape[axis]:
        raise call.reject(
            f"the sizes of the {call.output_count} parts must add up to {x.shape[axis]}, dimension {axis} of input 0, "
            f"{shown(x)}; found {sizes}"
        )
    steps: list[Step] = []
    start = 0
    for index, size in enumerate(sizes):
        part = x[(slice(None),) * axis + ((start if is_added else slice(start, start + size)), ...)]
        steps.append(copying(call.output(index, part.shape, x.dtype), part))
        start += size
    return in_sequence(call, *steps)


def _split_sizes(call: OperatorCall, x: Array, axis: int) -> tuple[int, ...]:
    given = call.arguments["split"]
    if call.input_count == 2:
        if given:
            raise call.reject(f"the sizes of the parts must be given once; found input 1 and split {given}")
        return call.integers(1)
    if given:
        return given
    size, rest = divmod(x.shape[axis], call.output_count)
    if rest:
        raise call.reject(
            f"without split, dimension {axis} of input 0, {shown(x)}, must be divisible by the "
            f"{call.output_count} outputs"
        )
    return (size,) * call.output_count


@register_gradient("Split")
def _split_gradient(call: GradientCall) -> GradientResult:
    given = [call.given(index) for index, gradient in enumerate(call.output_gradients) if gradient is not None]
    args = call.operator.args
    axis = args.get("axis", _channel_axis(args.get("order", "NCHW")))
    joined = {"axis": axis, "add_axis": args.get("add_axis", 0)}
    name = call.name(0)
    return GradientResult((gradient_operator("Concat", given, (name, f"_{name}_dims"), joined),), (name,))
