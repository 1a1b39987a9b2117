"""Operators that work element by element: arithmetic with broadcasting, sums, activations, comparisons.

The other families build on four things defined here: :func:`checked_input` (dtype rules), :func:`quiet`
(arithmetic as in C, without warnings), :func:`copying` and :func:`in_sequence` (the two commonest steps).

Source: Caffe2's operators of the same names.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextvars import Context
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import numpy as np

from ..definitions import OperatorDef
from ..dtypes import DType
from ..execution import OperatorCall, shown
from ..registry import (
    GradientCall,
    GradientResult,
    Step,
    no_gradient,
    register_gradient,
    register_operator,
    should_not_do_gradient,
)
from ..schema import UNBOUNDED, ArgType, Argument, OperatorSchema
from ..values import Array, Kind

FLOATS = ("float16", "bfloat16", "float32", "float64")
SIGNED_INTEGERS = ("int8", "int16", "int32", "int64")
INTEGERS = (*SIGNED_INTEGERS, "uint8", "uint16", "uint32", "uint64")
NUMBERS = (*INTEGERS, *FLOATS)
BOOLEANS = ("bool",)

IN_PLACE = frozenset({(0, 0)})


def checked_input(call: OperatorCall, index: int, dtypes: Collection[str], *, like: Array | None = None) -> Array:
    """Return input ``index`` after checking its dtype.

    Args:
        call: The operator's call.
        index: Which input.
        dtypes: Names of the dtypes that the operator computes with.
        like: An array whose dtype it must share; None for any of ``dtypes``.

    Raises:
        InvalidInputError: Another dtype, or no tensor at all.
    """
    array = call.input(index)
    if array.dtype.name not in dtypes:
        raise call.reject(f"input {index} must have one of the dtypes {', '.join(dtypes)}; it is {shown(array)}")
    if like is not None and array.dtype != like.dtype:
        raise call.reject(f"input {index} must be {like.dtype} as the other operand is; it is {shown(array)}")
    return array


@cache
def _quiet_context() -> Context | None:
    # NumPy 2 keeps its floating-point error state in a context variable, so entering a context in which it is
    # set costs 15 ns where `errstate` costs 400 ns: more than the addition of two small arrays.
    if int(np.__version__.partition(".")[0]) < 2:
        return None
    context = Context()
    context.run(np.seterr, all="ignore")
    return context


def quiet(xp: Any, function: Callable[..., object], *args: Any) -> Step:
    """Return a step that calls ``function(*args)`` as C would compute it: overflow, x/0 and NaN raise no warning.

    The step must not be run by two threads at once, which holds for every step of a workspace.
    """
    if xp is not np:
        return partial(function, *args)
    context = _quiet_context()
    if context is None:
        return np.errstate(all="ignore")(partial(function, *args))
    return partial(context.copy().run, function, *args)


def _nothing() -> None:
    pass


def _run_all(functions: Sequence[Callable[[], object]]) -> None:
    for function in functions:
        function()


def in_sequence(call: OperatorCall, *functions: Callable[[], object]) -> Step:
    """Return a step that calls functions without arguments one after the other, without warnings."""
    return quiet(call.xp, _run_all, functions)


def copying(target: Array, source: Array) -> Step:
    """Return a step that copies ``source`` into ``target``, which has its shape and dtype or *is* it."""
    return _nothing if target is source else partial(target.__setitem__, ..., source)


def summing(target: Array, source: Array, axes: tuple[int, ...]) -> Step:
    """Return a step that sums ``source`` over ``axes`` into ``target``, which keeps them with size 1."""
    return partial(source.sum, axis=axes, dtype=target.dtype, out=target, keepdims=True)


def constant(call: OperatorCall, value: float, dtype: DType) -> Array:
    """Return a 0-d array, so that a step does not convert a Python number at each run."""
    return call.xp.asarray(value, dtype=dtype)


def gradient_operator(
    type: str,  # noqa: A002  (Caffe2's word)
    inputs: Sequence[str],
    outputs: Sequence[str],
    args: Mapping[str, Any] | None = None,
) -> OperatorDef:
    """Build an operator for a gradient maker. Without ``args`` it inherits those of the forward operator."""
    return OperatorDef(type=type, inputs=tuple(inputs), outputs=tuple(outputs), args=args or {})


# Broadcasting ---------------------------------------------------------------------------------------------------

_BROADCAST_ARGUMENTS = (
    Argument(
        name="broadcast",
        type=ArgType.BOOL,
        default=False,
        doc="1: B's shape is a contiguous run of A's, starting at `axis`. 0: NumPy's broadcasting.",
    ),
    Argument(name="axis", type=ArgType.INT, default=-1, doc="Where B starts in A; -1: B is aligned with A's end."),
    Argument(name="axis_str", type=ArgType.STRING, default="", doc="The axis by its letter in `order`."),
    Argument(name="order", type=ArgType.STRING, default="NCHW", doc="Letters of A's axes, for `axis_str`."),
)


@dataclass(frozen=True, slots=True)
class _Broadcast:
    """How two operands meet: the shapes that they are seen as, which have the result's number of dimensions."""

    a: tuple[int, ...]
    b: tuple[int, ...]
    shape: tuple[int, ...]


def _broadcast(call: OperatorCall, a: tuple[int, ...], b: tuple[int, ...]) -> _Broadcast:
    if call.arguments["broadcast"]:
        return _Broadcast(a, _legacy_view(call, a, b), a)
    _check_axis_is_not_ignored(call, a, b)
    try:
        shape = np.broadcast_shapes(a, b)
    except ValueError:
        raise call.reject(
            f"A and B must have shapes that broadcast as NumPy's do (equal, or 1, from the last dimension on); "
            f"found A {a} and B {b}. With broadcast=1 and axis=k, B may match a run of A's dimensions"
        ) from None
    return _Broadcast((1,) * (len(shape) - len(a)) + a, (1,) * (len(shape) - len(b)) + b, shape)


def _check_axis_is_not_ignored(call: OperatorCall, a: tuple[int, ...], b: tuple[int, ...]) -> None:
    # Caffe2 ignores an axis without broadcast=1. That is harmless where it names what NumPy's rule does anyway.
    axis = call.arguments["axis"]
    if call.arguments["axis_str"] or axis not in (-1, len(a) - len(b)):
        raise call.reject("an axis is given without broadcast=1, which it needs. Add broadcast=1 or leave it out")


def _legacy_view(call: OperatorCall, a: tuple[int, ...], b: tuple[int, ...]) -> tuple[int, ...]:
    if call.output_count == 1 and call.definition.outputs[0] == call.definition.inputs[1]:
        raise call.reject("with broadcast=1 only input 0 may be overwritten; the output is input 1")
    axis = _legacy_axis(call)
    if all(size == 1 for size in b):
        return (1,) * len(a)
    if len(b) > len(a):
        raise call.reject(f"with broadcast=1, B must not have more dimensions than A; found A {a} and B {b}")
    axis = len(a) - len(b) if axis == -1 else axis
    if not 0 <= axis <= len(a) - len(b):
        raise call.reject(
            f"axis must be in [0, {len(a) - len(b)}] (A's dimensions minus B's); found axis {axis}, A {a}, B {b}"
        )
    ones = [index for index, size in enumerate(b) if size != 1]
    for index in range(ones[0], ones[-1] + 1):
        if b[index] != a[axis + index]:
            raise call.reject(
                f"with broadcast=1 and axis {axis}, B must match A from dimension {axis} on; found {b[index]} against "
                f"{a[axis + index]} in dimension {axis + index}, A {a}, B {b}"
            )
    return (1,) * axis + b + (1,) * (len(a) - axis - len(b))


def _legacy_axis(call: OperatorCall) -> int:
    axis, letter, order = (call.arguments[name] for name in ("axis", "axis_str", "order"))
    if not letter:
        return axis
    if axis != -1:
        raise call.reject(f"axis and axis_str cannot be used together; found axis {axis} and axis_str {letter!r}")
    if len(letter) != 1 or letter not in order:
        raise call.reject(f"axis_str must be one letter of the order {order!r}; found {letter!r}")
    return order.index(letter)


# Add, Sub, Mul, Div and the comparisons -------------------------------------------------------------------------


def _binary_schema(type_: str, doc: str, in_place: frozenset[tuple[int, int]] = frozenset()) -> OperatorSchema:
    return OperatorSchema(
        type=type_,
        doc=f"{doc} Broadcasts as NumPy does, or with broadcast=1 matches B to a run of A's dimensions.",
        inputs=(2, 2),
        outputs=(1, 1),
        input_names=("A: first operand, any shape.", "B: second operand, A's dtype."),
        output_names=("C: result, the broadcast shape.",),
        arguments=_BROADCAST_ARGUMENTS,
        in_place=in_place,
    )


def _bind_operands(
    call: OperatorCall, dtypes: Collection[str], result: DType | None = None
) -> tuple[Array, Array, Array]:
    """Check both operands; return them in shapes that NumPy broadcasts, and the output."""
    a = checked_input(call, 0, dtypes)
    b = checked_input(call, 1, dtypes, like=a)
    plan = _broadcast(call, tuple(a.shape), tuple(b.shape))
    for index, array in enumerate((a, b)):
        if call.definition.outputs[0] == call.definition.inputs[index] and plan.shape != tuple(array.shape):
            raise call.reject(
                f"the output overwrites input {index}, so it must have its shape {tuple(array.shape)}; the result has "
                f"the shape {plan.shape}. Write to another blob"
            )
    c = call.output(0, plan.shape, a.dtype if result is None else result)
    return a.reshape(plan.a), b.reshape(plan.b), c


def _bind_binary(call: OperatorCall, *, function: str, dtypes: Collection[str], result: DType | None = None) -> Step:
    a, b, c = _bind_operands(call, dtypes, result)
    return quiet(call.xp, getattr(call.xp, function), a, b, c)


_EITHER_IN_PLACE = frozenset({(0, 0), (1, 0)})
_BOOL: DType = np.dtype(np.bool_)

for _type, _function, _doc in (
    ("Add", "add", "C = A + B."),
    ("Sub", "subtract", "C = A - B."),
    ("Mul", "multiply", "C = A * B."),
):
    register_operator(_binary_schema(_type, _doc, _EITHER_IN_PLACE))(
        partial(_bind_binary, function=_function, dtypes=NUMBERS)
    )

for _type, _function, _dtypes, _doc in (
    ("EQ", "equal", (*NUMBERS, *BOOLEANS), "C = A == B, as bool."),
    ("NE", "not_equal", (*NUMBERS, *BOOLEANS), "C = A != B, as bool."),
    ("LT", "less", NUMBERS, "C = A < B, as bool."),
    ("LE", "less_equal", NUMBERS, "C = A <= B, as bool."),
    ("GT", "greater", NUMBERS, "C = A > B, as bool."),
    ("GE", "greater_equal", NUMBERS, "C = A >= B, as bool."),
    ("And", "logical_and", BOOLEANS, "C = A and B."),
    ("Or", "logical_or", BOOLEANS, "C = A or B."),
    ("Xor", "logical_xor", BOOLEANS, "C = A xor B."),
):
    register_operator(_binary_schema(_type, _doc, _EITHER_IN_PLACE if _dtypes == BOOLEANS else frozenset()))(
        partial(_bind_binary, function=_function, dtypes=_dtypes, result=_BOOL)
    )
    should_not_do_gradient(_type)


@register_operator(
    _binary_schema("Div", "C = A / B; integers are divided as in C (towards zero), and refused where B is 0.", IN_PLACE)
)
def div(call: OperatorCall) -> Step:
    """Divide. NumPy's integer division rounds down, so the quotients that it rounded away from zero get 1 back."""
    xp = call.xp
    a, b, c = _bind_operands(call, NUMBERS)
    if a.dtype.name not in INTEGERS:
        return quiet(xp, xp.divide, a, b, c)
    floor, rest = xp.empty_like(c), xp.empty_like(c)
    is_negative, is_inexact = xp.empty(c.shape, _BOOL), xp.empty(c.shape, _BOOL)
    zero = constant(call, 0, a.dtype)

    def step() -> None:
        if not bool(b.all()):
            raise call.reject("B (input 1) must not contain 0 in an integer division")
        xp.floor_divide(a, b, floor)
        xp.multiply(floor, b, rest)
        xp.not_equal(rest, a, is_inexact)
        xp.less(floor, zero, is_negative)
        xp.logical_and(is_inexact, is_negative, is_inexact)
        xp.add(floor, is_inexact, c)

    return quiet(xp, step)


def _binary_gradient_schema(
    type_: str, doc: str, inputs: tuple[int, int], input_names: tuple[str, ...], in_place: frozenset[tuple[int, int]]
) -> OperatorSchema:
    return OperatorSchema(
        type=type_,
        doc=doc,
        inputs=inputs,
        outputs=(2, 2),
        input_names=input_names,
        output_names=("dA: A's shape, summed where A was broadcast.", "dB: B's shape, likewise."),
        arguments=_BROADCAST_ARGUMENTS,
        in_place=in_place,
        accepts_any_arguments=True,
    )


@dataclass(frozen=True, slots=True)
class _BinaryGradient:
    """Inputs and outputs of the gradient of a binary operator, seen in shapes that broadcast."""

    call: OperatorCall
    shape: tuple[int, ...]
    given: Array
    a: Array
    b: Array
    da: Array
    db: Array

    def term(self, out: Array, function: Callable[..., object] | None, *operands: Array) -> Step:
        """Return what computes ``function(*operands)``, summed to the shape of ``out``. No function: the identity."""
        axes = tuple(i for i, (size, kept) in enumerate(zip(self.shape, out.shape, strict=True)) if size != kept)
        if function is None:
            (operand,) = operands
            return summing(out, operand, axes) if axes else copying(out, operand)
        if not axes:
            return partial(function, *operands, out)
        whole = self.call.xp.empty(self.shape, out.dtype)
        return partial(_run_all, (partial(function, *operands, whole), summing(out, whole, axes)))

    def step(self, da: Step, db: Step) -> Step:
        """Run both terms, the one last whose output overwrites an input."""
        is_overwriting = self.call.definition.outputs[0] in self.call.definition.inputs
        return in_sequence(self.call, db, da) if is_overwriting else in_sequence(self.call, da, db)


def _bind_gradient(call: OperatorCall, given: int, a: int, b: int, dtypes: Collection[str]) -> _BinaryGradient:
    left = checked_input(call, a, dtypes)
    right = checked_input(call, b, dtypes, like=left)
    gradient = checked_input(call, given, dtypes, like=left)
    plan = _broadcast(call, tuple(left.shape), tuple(right.shape))
    if tuple(gradient.shape) != plan.shape:
        raise call.reject(
            f"input {given}, the gradient, must have the result's shape {plan.shape}; it is {shown(gradient)}"
        )
    return _BinaryGradient(
        call,
        plan.shape,
        gradient,
        left.reshape(plan.a),
        right.reshape(plan.b),
        call.output(0, left.shape, left.dtype).reshape(plan.a),
        call.output(1, right.shape, right.dtype).reshape(plan.b),
    )


_GRADIENT_INPUTS = ("dC: gradient of the result.", "A: first operand.", "B: second operand.")
_GRADIENT_IN_PLACE = frozenset({(0, 0), (0, 1)})


@register_operator(
    _binary_gradient_schema("AddGradient", "dA = dC, dB = dC.", (3, 3), _GRADIENT_INPUTS, _GRADIENT_IN_PLACE)
)
def add_gradient(call: OperatorCall) -> Step:
    """Pass the gradient on to both operands."""
    bound = _bind_gradient(call, 0, 1, 2, NUMBERS)
    return bound.step(bound.term(bound.da, None, bound.given), bound.term(bound.db, None, bound.given))


@register_operator(
    _binary_gradient_schema("SubGradient", "dA = dC, dB = -dC.", (3, 3), _GRADIENT_INPUTS, _GRADIENT_IN_PLACE)
)
def sub_gradient(call: OperatorCall) -> Step:
    """Pass the gradient on, negated to the second operand."""
    bound = _bind_gradient(call, 0, 1, 2, NUMBERS)
    return bound.step(bound.term(bound.da, None, bound.given), bound.term(bound.db, call.xp.negative, bound.given))


@register_operator(
    _binary_gradient_schema("MulGradient", "dA = dC * B, dB = dC * A.", (3, 3), _GRADIENT_INPUTS, _GRADIENT_IN_PLACE)
)
def mul_gradient(call: OperatorCall) -> Step:
    """Multiply the gradient by the other operand."""
    bound, multiply = _bind_gradient(call, 0, 1, 2, NUMBERS), call.xp.multiply
    return bound.step(
        bound.term(bound.da, multiply, bound.given, bound.b), bound.term(bound.db, multiply, bound.given, bound.a)
    )


@register_operator(
    _binary_gradient_schema(
        "DivGradient",
        "dA = dC / B, dB = -dC * C / B. With three inputs they are B, C, dC, and A has C's shape (old models).",
        (3, 4),
        (*_GRADIENT_INPUTS, "C: the result."),
        IN_PLACE,
    )
)
def div_gradient(call: OperatorCall) -> Step:
    """Divide the gradient by the second operand."""
    xp = call.xp
    given, a, b, c = (2, 1, 0, 1) if call.input_count == 3 else (0, 1, 2, 3)
    bound = _bind_gradient(call, given, a, b, FLOATS)
    result = checked_input(call, c, FLOATS, like=bound.a)
    if tuple(result.shape) != bound.shape:
        raise call.reject(f"input {c}, the result, must have the shape {bound.shape}; it is {shown(result)}")

    def negated_ratio(gradient: Array, quotient: Array, divisor: Array, out: Array) -> None:
        xp.multiply(gradient, quotient, out)
        xp.divide(out, divisor, out)
        xp.negative(out, out)

    return bound.step(
        bound.term(bound.da, xp.divide, bound.given, bound.b),
        bound.term(bound.db, negated_ratio, bound.given, result, bound.b),
    )


def _binary_gradient(call: GradientCall) -> GradientResult:
    results = (call.output(0),) if call.operator.type == "Div" else ()
    names = call.name(0), call.name(1)
    inputs = (call.given(0), call.input(0), call.input(1), *results)
    return GradientResult((gradient_operator(f"{call.operator.type}Gradient", inputs, names),), names)


for _type in ("Add", "Sub", "Mul", "Div"):
    register_gradient(_type)(_binary_gradient)


# Sums of several tensors ----------------------------------------------------------------------------------------


@register_operator(
    OperatorSchema(
        type="Sum",
        doc="Y = X_0 + X_1 + …, added in this order.",
        inputs=(1, UNBOUNDED),
        outputs=(1, 1),
        input_names=("X_0: any shape.", "X_i: X_0's shape and dtype."),
        output_names=("Y: X_0's shape.",),
        in_place=IN_PLACE,
    )
)
def sum_inputs(call: OperatorCall) -> Step:
    """Add the inputs up."""
    first = checked_input(call, 0, NUMBERS)
    inputs = [checked_input(call, index, NUMBERS, like=first) for index in range(call.input_count)]
    for index, array in enumerate(inputs):
        if array.shape != first.shape:
            raise call.reject(
                f"input {index} must have the shape of input 0, {tuple(first.shape)}; it is {shown(array)}"
            )
    y, add = call.output(0, first.shape, first.dtype), call.xp.add
    if len(inputs) == 1:
        return copying(y, first)
    if len(inputs) == 2:
        return quiet(call.xp, add, first, inputs[1], y)
    return in_sequence(call, partial(add, first, inputs[1], y), *(partial(add, y, array, y) for array in inputs[2:]))


@register_gradient("Sum")
def _sum_gradient(call: GradientCall) -> GradientResult:
    return GradientResult((), (call.given(0),) * len(call.operator.inputs))


_GRAD_ON_W = Argument(name="grad_on_w", type=ArgType.BOOL, default=False, doc="Whether weights get a gradient too.")


def _weight(call: OperatorCall, index: int) -> Array:
    weight = checked_input(call, index, FLOATS)
    if weight.size != 1:
        raise call.reject(f"input {index}, a weight, must have one element; it is {shown(weight)}")
    return weight.reshape(())


@register_operator(
    OperatorSchema(
        type="WeightedSum",
        doc="Y = X_0 * w_0 + X_1 * w_1 + …, added in this order.",
        inputs=(2, UNBOUNDED),
        outputs=(1, 1),
        input_names=("X_0: any shape.", "w_0: one element.", "X_i, w_i in turn: X_0's size and dtype; one element."),
        output_names=("Y: X_0's shape.",),
        arguments=(_GRAD_ON_W,),
        in_place=IN_PLACE,
    )
)
def weighted_sum(call: OperatorCall) -> Step:
    """Add weighted inputs up. Only sizes must agree, as in Caffe2: a row may be added to a column."""
    xp = call.xp
    if call.input_count % 2:
        raise call.reject(f"expected pairs of a tensor and its weight; found {call.input_count} inputs")
    first = checked_input(call, 0, FLOATS)
    y = call.output(0, first.shape, first.dtype)
    steps: list[Step] = [partial(xp.multiply, first, _weight(call, 1), y)]
    product = xp.empty_like(y) if call.input_count > 2 else y
    for index in range(2, call.input_count, 2):
        array = checked_input(call, index, FLOATS, like=first)
        if array.size != first.size:
            raise call.reject(f"input {index} must have {first.size} elements as input 0 has; it is {shown(array)}")
        steps.append(partial(xp.multiply, array.reshape(first.shape), _weight(call, index + 1), product))
        steps.append(partial(xp.add, y, product, y))
    return in_sequence(call, *steps)


@register_operator(
    OperatorSchema(
        type="WeightedSumGradient",
        doc="dX_i = dY * w_i, and with grad_on_w dw_i = sum(dY * X_i).",
        inputs=(3, UNBOUNDED),
        outputs=(1, UNBOUNDED),
        input_names=("dY: gradient of the result.", "X_i, w_i in turn: the forward operator's inputs."),
        output_names=("dX_i: dY's shape; then, with grad_on_w, dw_i: `(1,)`.",),
        arguments=(_GRAD_ON_W,),
    )
)
def weighted_sum_gradient(call: OperatorCall) -> Step:
    """Scale the gradient by each weight."""
    xp = call.xp
    count = call.input_count // 2
    expected = 2 * count if call.arguments["grad_on_w"] else count
    if call.input_count % 2 == 0 or call.output_count != expected:
        raise call.reject(
            f"expected a gradient and {count} pairs of inputs, and {expected} outputs; found {call.input_count} inputs "
            f"and {call.output_count} outputs"
        )
    given = checked_input(call, 0, FLOATS)
    steps: list[Step] = []
    for pair in range(count):
        weight = _weight(call, 2 * pair + 2)
        steps.append(partial(xp.multiply, given, weight, call.output(pair, given.shape, given.dtype)))
        if call.arguments["grad_on_w"]:
            array = checked_input(call, 2 * pair + 1, FLOATS, like=given)
            if array.size != given.size:
                raise call.reject(f"input {2 * pair + 1} must have {given.size} elements; it is {shown(array)}")
            product = xp.empty_like(given)
            steps.append(partial(xp.multiply, given, array.reshape(given.shape), product))
            total = call.output(count + pair, (1,), weight.dtype).reshape(())
            steps.append(partial(product.sum, None, weight.dtype, total))
    return in_sequence(call, *steps)


@register_gradient("WeightedSum")
def _weighted_sum_gradient(call: GradientCall) -> GradientResult:
    indices = range(len(call.operator.inputs))
    is_on_weights = bool(call.operator.args.get("grad_on_w", False))
    gradients = tuple(call.name(index) if index % 2 == 0 or is_on_weights else None for index in indices)
    outputs = [call.name(index) for index in indices[::2]]
    if is_on_weights:
        outputs += [call.name(index) for index in indices[1::2]]
    operator = gradient_operator("WeightedSumGradient", (call.given(0), *call.operator.inputs), outputs)
    return GradientResult((operator,), gradients)


# Operators with one operand -------------------------------------------------------------------------------------


def _unary_schema(
    type_: str,
    doc: str,
    *,
    in_place: frozenset[tuple[int, int]] = IN_PLACE,
    arguments: tuple[Argument, ...] = (),
) -> OperatorSchema:
    return OperatorSchema(
        type=type_,
        doc=doc,
        inputs=(1, 1),
        outputs=(1, 1),
        input_names=("X: any shape.",),
        output_names=("Y: X's shape.",),
        arguments=arguments,
        in_place=in_place,
    )


def _bind_unary(call: OperatorCall, *, function: str, dtypes: Collection[str]) -> Step:
    x = checked_input(call, 0, dtypes)
    return quiet(call.xp, getattr(call.xp, function), x, call.output(0, x.shape, x.dtype))


for _type, _function, _dtypes, _doc in (
    ("Negative", "negative", NUMBERS, "Y = -X."),
    ("Abs", "absolute", NUMBERS, "Y = |X|."),
    ("Sign", "sign", NUMBERS, "Y = -1, 0 or 1, X's sign."),
    ("Sqr", "square", NUMBERS, "Y = X * X."),
    ("Sqrt", "sqrt", FLOATS, "Y = the square root of X."),
    ("Exp", "exp", FLOATS, "Y = e to the power of X."),
    ("Log", "log", FLOATS, "Y = the natural logarithm of X."),
    ("Tanh", "tanh", FLOATS, "Y = the hyperbolic tangent of X."),
    ("Not", "logical_not", BOOLEANS, "Y = not X."),
):
    register_operator(_unary_schema(_type, _doc))(partial(_bind_unary, function=_function, dtypes=_dtypes))

should_not_do_gradient("Sign", "Not")


@register_operator(_unary_schema("Relu", "Y = max(X, 0); NaN stays NaN."))
def relu(call: OperatorCall) -> Step:
    """Cut off what is below zero."""
    x = checked_input(call, 0, FLOATS)
    y = call.output(0, x.shape, x.dtype)
    return quiet(call.xp, partial(call.xp.maximum, x, constant(call, 0, x.dtype), out=y))


@register_operator(_unary_schema("Sigmoid", "Y = 1 / (1 + exp(-X))."))
def sigmoid(call: OperatorCall) -> Step:
    """Squash to (0, 1). Where exp(-X) overflows, 1 / inf is the right 0."""
    xp, x = call.xp, checked_input(call, 0, FLOATS)
    y, one = call.output(0, x.shape, x.dtype), constant(call, 1, x.dtype)
    return in_sequence(
        call,
        partial(xp.negative, x, y),
        partial(xp.exp, y, y),
        partial(xp.add, y, one, y),
        partial(xp.divide, one, y, y),
    )


@register_operator(
    _unary_schema(
        "Scale",
        "Y = X * scale.",
        arguments=(Argument(name="scale", type=ArgType.FLOAT, default=1.0, doc="The factor."),),
    )
)
def scale(call: OperatorCall) -> Step:
    """Multiply by a number."""
    x = checked_input(call, 0, FLOATS)
    factor = constant(call, call.arguments["scale"], x.dtype)
    return quiet(call.xp, call.xp.multiply, x, factor, call.output(0, x.shape, x.dtype))


def _bind_copy(call: OperatorCall) -> Step:
    if call.input_kind(0) is Kind.STRINGS:
        return lambda: call.set_strings(0, call.value(0).copy())
    x = call.input(0)
    return copying(call.output(0, x.shape, x.dtype), x)


register_operator(_unary_schema("Copy", "Y = X, of any dtype; string tensors too.", in_place=frozenset()))(_bind_copy)
register_operator(_unary_schema("StopGradient", "Y = X, and no gradient flows back to X."))(_bind_copy)
no_gradient("StopGradient")


@register_operator(
    _unary_schema(
        "Mod",
        "Y = X modulo `divisor`, for integers.",
        arguments=(
            Argument(name="divisor", type=ArgType.INT, required=True, doc="Not 0."),
            Argument(
                name="sign_follow_divisor",
                type=ArgType.BOOL,
                default=False,
                doc="True: the result has the divisor's sign. False: X's sign, as in C.",
            ),
        ),
    )
)
def mod(call: OperatorCall) -> Step:
    """Take remainders. NumPy's have the divisor's sign; for C's, those that are on the wrong side of 0 move over."""
    xp, x = call.xp, checked_input(call, 0, INTEGERS)
    divisor = call.arguments["divisor"]
    limits = np.iinfo(x.dtype)
    if divisor == 0 or not limits.min <= divisor <= limits.max:
        raise call.reject(
            f"divisor must be a number other than 0 that input 0's dtype {x.dtype} can hold; found {divisor}"
        )
    y = call.output(0, x.shape, x.dtype)
    by, zero = constant(call, divisor, x.dtype), constant(call, 0, x.dtype)
    if call.arguments["sign_follow_divisor"]:
        return quiet(xp, xp.remainder, x, by, y)
    opposes, moves = (xp.empty(x.shape, _BOOL) for _ in range(2))
    shift = xp.empty_like(y)
    return in_sequence(
        call,
        partial(xp.less if divisor > 0 else xp.greater, x, zero, opposes),
        partial(xp.remainder, x, by, y),
        partial(xp.not_equal, y, zero, moves),
        partial(xp.logical_and, moves, opposes, moves),
        partial(xp.multiply, moves, by, shift),
        partial(xp.subtract, y, shift, y),
    )


should_not_do_gradient("Mod")


# Gradients of operators with one operand ------------------------------------------------------------------------


def _activation_gradient_schema(type_: str, doc: str, known: str) -> OperatorSchema:
    return OperatorSchema(
        type=type_,
        doc=doc,
        inputs=(2, 2),
        outputs=(1, 1),
        input_names=(known, "dY: gradient of the output, the same shape."),
        output_names=("dX: the same shape.",),
        in_place=frozenset({(1, 0)}),
        accepts_any_arguments=True,
    )


def _bind_activation_gradient(call: OperatorCall) -> tuple[Array, Array, Array, Array]:
    """Return the known tensor, the given gradient, the output, and a scratch array that is not the gradient."""
    known = checked_input(call, 0, FLOATS)
    given = checked_input(call, 1, FLOATS, like=known)
    if given.shape != known.shape:
        raise call.reject(f"input 1 must have the shape of input 0, {tuple(known.shape)}; it is {shown(given)}")
    out = call.output(0, known.shape, known.dtype)
    is_in_place = call.definition.outputs[0] in call.definition.inputs
    return known, given, out, call.xp.empty_like(out) if is_in_place else out


@register_operator(
    _activation_gradient_schema("ReluGradient", "dX = dY where Y > 0, else 0.", "Y: the forward operator's output.")
)
def relu_gradient(call: OperatorCall) -> Step:
    """Pass the gradient where the output was positive; elsewhere it is 0 even if dY is infinite or NaN."""
    xp = call.xp
    y, given, out, _ = _bind_activation_gradient(call)
    is_cut, zero = xp.empty(y.shape, _BOOL), constant(call, 0, y.dtype)
    return in_sequence(
        call,
        partial(xp.greater, y, zero, is_cut),
        partial(xp.logical_not, is_cut, is_cut),
        copying(out, given),
        partial(xp.copyto, out, zero, where=is_cut),
    )


@register_operator(
    _activation_gradient_schema("TanhGradient", "dX = dY * (1 - Y * Y).", "Y: the forward operator's output.")
)
def tanh_gradient(call: OperatorCall) -> Step:
    """Multiply by the slope of the hyperbolic tangent."""
    xp = call.xp
    y, given, out, slope = _bind_activation_gradient(call)
    return in_sequence(
        call,
        partial(xp.multiply, y, y, slope),
        partial(xp.subtract, constant(call, 1, y.dtype), slope, slope),
        partial(xp.multiply, slope, given, out),
    )


@register_operator(
    _activation_gradient_schema("SigmoidGradient", "dX = dY * Y * (1 - Y).", "Y: the forward operator's output.")
)
def sigmoid_gradient(call: OperatorCall) -> Step:
    """Multiply by the slope of the sigmoid."""
    xp = call.xp
    y, given, out, slope = _bind_activation_gradient(call)
    return in_sequence(
        call,
        partial(xp.subtract, constant(call, 1, y.dtype), y, slope),
        partial(xp.multiply, slope, y, slope),
        partial(xp.multiply, slope, given, out),
    )


@register_operator(_activation_gradient_schema("AbsGradient", "dX = dY * sign(X).", "X: the forward operator's input."))
def abs_gradient(call: OperatorCall) -> Step:
    """Give the gradient the input's sign."""
    xp = call.xp
    x, given, out, sign = _bind_activation_gradient(call)
    return in_sequence(call, partial(xp.sign, x, sign), partial(xp.multiply, sign, given, out))


def _gradient_by_output(call: GradientCall) -> GradientResult:
    operator = gradient_operator(f"{call.operator.type}Gradient", (call.output(0), call.given(0)), (call.name(0),))
    return GradientResult((operator,), (call.name(0),))


def _gradient_by_itself(call: GradientCall) -> GradientResult:
    """The gradient of a linear operator is the operator, with the same arguments, applied to the gradient."""
    return GradientResult((gradient_operator(call.operator.type, (call.given(0),), (call.name(0),)),), (call.name(0),))


for _type in ("Relu", "Tanh", "Sigmoid"):
    register_gradient(_type)(_gradient_by_output)
for _type in ("Negative", "Scale", "Copy"):
    register_gradient(_type)(_gradient_by_itself)


@register_gradient("Abs")
def _abs_gradient(call: GradientCall) -> GradientResult:
    operator = gradient_operator("AbsGradient", (call.input(0), call.given(0)), (call.name(0),))
    return GradientResult((operator,), (call.name(0),))


@register_gradient("Exp")
def _exp_gradient(call: GradientCall) -> GradientResult:
    operator = gradient_operator("Mul", (call.output(0), call.given(0)), (call.name(0),))
    return GradientResult((operator,), (call.name(0),))


@register_gradient("Log")
def _log_gradient(call: GradientCall) -> GradientResult:
    operator = gradient_operator("Div", (call.given(0), call.input(0)), (call.name(0),))
    return GradientResult((operator,), (call.name(0),))


def _gradient_of_scaled(call: GradientCall, factor: float, operator: str, operand: str) -> GradientResult:
    # Caffe2 scales the given gradient in place, or writes the result twice; both spoil gradients that others
    # share, so the scaled gradient has a blob of its own here.
    scaled = f"_{call.name(0)}_scaled"
    return GradientResult(
        (
            gradient_operator("Scale", (call.given(0),), (scaled,), {"scale": factor}),
            gradient_operator(operator, (scaled, operand), (call.name(0),)),
        ),
        (call.name(0),),
    )


@register_gradient("Sqr")
def _sqr_gradient(call: GradientCall) -> GradientResult:
    return _gradient_of_scaled(call, 2.0, "Mul", call.input(0))


@register_gradient("Sqrt")
def _sqrt_gradient(call: GradientCall) -> GradientResult:
    return _gradient_of_scaled(call, 0.5, "Div", call.output(0))
