"""Operators that multiply matrices. Tensors of more dimensions are seen as matrices, flattened at an axis.

Source: Caffe2's operators of the same names.
"""

from __future__ import annotations

from functools import partial

from ..definitions import OperatorDef
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
from .elementwise import FLOATS, checked_input, gradient_operator, in_sequence, quiet
from .shape import canonical_axis, flattened

_FC_ARGUMENTS = (
    Argument(name="axis", type=ArgType.INT, default=1, doc="Where X is flattened: M rows before, K columns from it."),
    Argument(name="axis_w", type=ArgType.INT, default=1, doc="Where W is flattened: N rows before, K columns from it."),
)


def _fc_operands(call: OperatorCall) -> tuple[Array, Array, int]:
    """Return X as ``(M, K)``, W as ``(N, K)``, and the axis of X."""
    x = checked_input(call, 0, FLOATS)
    w = checked_input(call, 1, FLOATS, like=x)
    axis = canonical_axis(call, "axis", x.ndim, 0)
    axis_w = canonical_axis(call, "axis_w", w.ndim, 1)
    (m, k), (n, k_w) = flattened(x.shape, axis), flattened(w.shape, axis_w)
    if k != k_w:
        raise call.reject(
            f"W (input 1) must have rows of {k} elements as X (input 0) has, {shown(x)} flattened at axis {axis}; "
            f"found rows of {k_w}, {shown(w)} flattened at axis {axis_w}"
        )
    return x.reshape(m, k), w.reshape(n, k), axis


@register_operator(
    OperatorSchema(
        type="FC",
        doc="Y = X W' + b, a fully connected layer.",
        inputs=(3, 3),
        outputs=(1, 1),
        input_names=("X: `(M, K)` after flattening at axis.", "W: `(N, K)` after flattening at axis_w.", "b: `(N,)`."),
        output_names=("Y: X's shape before axis, then N.",),
        arguments=_FC_ARGUMENTS,
    )
)
def fc(call: OperatorCall) -> Step:
    """Multiply by the weights and add the bias."""
    xp = call.xp
    x, w, axis = _fc_operands(call)
    b = checked_input(call, 2, FLOATS, like=x)
    if tuple(b.shape) != (w.shape[0],):
        raise call.reject(f"b (input 2) must have the shape ({w.shape[0]},), W's number of rows; it is {shown(b)}")
    y = call.output(0, (*call.input(0).shape[:axis], w.shape[0]), x.dtype).reshape(x.shape[0], w.shape[0])
    return in_sequence(call, partial(xp.matmul, x, w.T, y), partial(xp.add, y, b, y))


@register_operator(
    OperatorSchema(
        type="FCGradient",
        doc="dW = dY' X, db = dY summed over rows, dX = dY W.",
        inputs=(3, 3),
        outputs=(2, 3),
        input_names=("X: as in FC.", "W: as in FC.", "dY: gradient of the output."),
        output_names=("dW: W's shape.", "db: `(N,)`.", "dX: X's shape."),
        arguments=_FC_ARGUMENTS,
    )
)
def fc_gradient(call: OperatorCall) -> Step:
    """Compute the gradients of weights, bias and, if it is asked for, input."""
    xp = call.xp
    x, w, _ = _fc_operands(call)
    rows, columns = x.shape[0], w.shape[0]
    given = checked_input(call, 2, FLOATS, like=x)
    if given.size != rows * columns:
        raise call.reject(f"input 2, the gradient, must have {rows} x {columns} elements; it is {shown(given)}")
    dy = given.reshape(rows, columns)
    dw = call.output(0, call.input(1).shape, x.dtype).reshape(w.shape)
    db = call.output(1, (columns,), x.dtype)
    steps: list[Step] = [partial(xp.matmul, dy.T, x, dw), partial(dy.sum, 0, db.dtype, db)]
    if call.output_count == 3:
        dx = call.output(2, call.input(0).shape, x.dtype).reshape(x.shape)
        steps.append(partial(xp.matmul, dy, w, dx))
    return in_sequence(call, *steps)


@register_gradient("FC")
def _fc_gradient(call: GradientCall) -> GradientResult:
    x, w, b = call.name(0), call.name(1), call.name(2)
    operator = gradient_operator("FCGradient", (call.input(0), call.input(1), call.given(0)), (w, b, x))
    return GradientResult((operator,), (x, w, b))


# MatMul ---------------------------------------------------------------------------------------------------------


@register_operator(
    OperatorSchema(
        type="MatMul",
        doc="Y = A B, after flattening and transposing each as asked.",
        inputs=(2, 3),
        outputs=(1, 1),
        input_names=(
            "A: `(M, K)` after flattening at axis_a; `(K, M)` with trans_a.",
            "B: `(K, N)` after flattening at axis_b; `(N, K)` with trans_b.",
            "like: any tensor with M x N elements, whose shape Y gets.",
        ),
        output_names=("Y: `(M, N)`, or the shape of `like`.",),
        arguments=(
            Argument(name="axis_a", type=ArgType.INT, default=1, doc="Where A is flattened."),
            Argument(name="axis_b", type=ArgType.INT, default=1, doc="Where B is flattened."),
            Argument(name="trans_a", type=ArgType.BOOL, default=False, doc="Whether A is transposed then."),
            Argument(name="trans_b", type=ArgType.BOOL, default=False, doc="Whether B is transposed then."),
        ),
    )
)
def matmul(call: OperatorCall) -> Step:
    """Multiply two matrices."""
    first = checked_input(call, 0, FLOATS)
    second = checked_input(call, 1, FLOATS, like=first)
    a = first.reshape(flattened(first.shape, canonical_axis(call, "axis_a", first.ndim, 0)))
    b = second.reshape(flattened(second.shape, canonical_axis(call, "axis_b", second.ndim, 1)))
    a, b = (a.T if call.arguments["trans_a"] else a), (b.T if call.arguments["trans_b"] else b)
    if a.shape[1] != b.shape[0]:
        raise call.reject(
            f"A must have as many columns as B has rows; found A {tuple(a.shape)} and B {tuple(b.shape)} after "
            f"flattening and transposing inputs {shown(first)} and {shown(second)}"
        )
    shape = (a.shape[0], b.shape[1])
    wanted = tuple(call.input(2).shape) if call.input_count == 3 else shape
    if call.input_count == 3 and call.input(2).size != shape[0] * shape[1]:
        raise call.reject(f"input 2 must have {shape[0]} x {shape[1]} elements; it is {shown(call.input(2))}")
    return quiet(call.xp, call.xp.matmul, a, b, call.output(0, wanted, a.dtype).reshape(shape))


@register_gradient("MatMul")
def _matmul_gradient(call: GradientCall) -> GradientResult:
    """With op(A) and op(B) as multiplied: d op(A) = dY op(B)', d op(B) = op(A)' dY, transposed back as needed."""
    args = call.operator.args
    trans_a, trans_b = int(args.get("trans_a", 0)), int(args.get("trans_b", 0))
    axis_a, axis_b = args.get("axis_a", 1), args.get("axis_b", 1)
    a, b, given = call.input(0), call.input(1), call.given(0)

    def product(left: tuple[str, int, int], right: tuple[str, int, int], like: int) -> OperatorDef:
        names = {"axis_a": left[1], "trans_a": left[2], "axis_b": right[1], "trans_b": right[2]}
        return gradient_operator("MatMul", (left[0], right[0], call.input(like)), (call.name(like),), names)

    if trans_a:
        for_a = product((b, axis_b, trans_b), (given, 1, 1), 0)
    else:
        for_a = product((given, 1, 0), (b, axis_b, 1 - trans_b), 0)
    if trans_b:
        for_b = product((given, 1, 1), (a, axis_a, trans_a), 1)
    else:
        for_b = product((a, axis_a, 1 - trans_a), (given, 1, 0), 1)
    return GradientResult((for_a, for_b), (call.name(0), call.name(1)))
