"""Operators between a network's output and its loss: softmax, cross entropies, distances, accuracy.

Labels are checked at each run, not at binding: they are new in every batch.

Source: Caffe2's operators of the same names.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import numpy as np

from ..dtypes import DType
from ..execution import OperatorCall, shown
from ..registry import (
    GradientCall,
    GradientResult,
    Step,
    register_gradient,
    register_operator,
    should_not_do_gradient,
)
from ..schema import ArgType, Argument, OperatorSchema
from ..values import Array
from .elementwise import (
    FLOATS,
    INTEGERS,
    checked_input,
    constant,
    gradient_operator,
    in_sequence,
    quiet,
    summing,
)
from .shape import canonical_axis, flattened

_BOOL: DType = np.dtype(np.bool_)
_FLOAT32: DType = np.dtype(np.float32)
_INT64: DType = np.dtype(np.int64)

_LOG_THRESHOLD = 1e-20
"""Caffe2 takes the logarithm of no probability below this one."""

_AXIS = Argument(
    name="axis", type=ArgType.INT, default=1, doc="Where X is flattened: N rows before, D classes from it."
)


def _threshold(call: OperatorCall, dtype: DType) -> Array:
    # float16 has no 1e-20; its smallest normal number does the same.
    smallest = 2.0**-14 if dtype.name == "float16" else 0.0
    return constant(call, max(_LOG_THRESHOLD, smallest), dtype)


class _Labels:
    """Class labels as positions in a flat ``(N, D)`` tensor, checked anew at each run.

    Args:
        call: The operator's call.
        index: The input that holds them: ``(N,)`` or ``(N, 1)``, integers.
        rows: N.
        classes: D.
    """

    __slots__ = ("_call", "_classes", "_index", "_labels", "_offsets", "_positions")

    def __init__(self, call: OperatorCall, index: int, rows: int, classes: int) -> None:
        labels = checked_input(call, index, INTEGERS)
        if labels.size != rows:
            raise call.reject(
                f"input {index}, the labels, must have one label for each of {rows} rows; it is {shown(labels)}"
            )
        self._call, self._index, self._classes = call, index, classes
        self._labels = labels.reshape(rows)
        self._offsets = call.xp.arange(rows, dtype=_INT64) * classes
        self._positions = call.xp.empty(rows, _INT64)

    def positions(self) -> Array:
        """Return the flat position of each row's label, ``(N,)``, in an array that the next call overwrites.

        Raises:
            InvalidInputError: A label is below 0 or not below D.
        """
        if self._labels.size:
            least, greatest = int(self._labels.min()), int(self._labels.max())
            if least < 0 or greatest >= self._classes:
                raise self._call.reject(
                    f"labels (input {self._index}) must be in [0, {self._classes - 1}] as there are {self._classes} "
                    f"classes; found {least if least < 0 else greatest}"
                )
        self._positions[...] = self._labels
        self._positions += self._offsets
        return self._positions


# Softmax --------------------------------------------------------------------------------------------------------


def _rows(call: OperatorCall, x: Array, index: int = 0) -> tuple[int, int]:
    return flattened(x.shape, canonical_axis(call, "axis", x.ndim, index))


def _softmax(xp: Any, x: Array, y: Array, row: Array) -> tuple[Step, ...]:
    """Return steps after which ``y`` holds each row's softmax and ``row`` its sum of exponentials.

    The row's maximum is subtracted first, so that the greatest exponential is 1 and none overflows.
    """
    if x.size == 0:
        return ()
    return (
        partial(x.max, axis=1, out=row, keepdims=True),
        partial(xp.subtract, x, row, y),
        partial(xp.exp, y, y),
        summing(row, y, (1,)),
        partial(xp.divide, y, row, y),
    )


@register_operator(
    OperatorSchema(
        type="Softmax",
        doc="Y = exp(X) / sum(exp(X)), in each row.",
        inputs=(1, 1),
        outputs=(1, 1),
        input_names=("X: `(N, D)` after flattening at axis.",),
        output_names=("Y: X's shape; rows sum to 1.",),
        arguments=(_AXIS,),
    )
)
def softmax(call: OperatorCall) -> Step:
    """Turn each row into probabilities."""
    x = checked_input(call, 0, FLOATS)
    matrix = _rows(call, x)
    y = call.output(0, x.shape, x.dtype)
    row = call.xp.empty((matrix[0], 1), x.dtype)
    return in_sequence(call, *_softmax(call.xp, x.reshape(matrix), y.reshape(matrix), row))


@register_operator(
    OperatorSchema(
        type="SoftmaxGradient",
        doc="dX = (dY - sum(dY * Y)) * Y, in each row.",
        inputs=(2, 2),
        outputs=(1, 1),
        input_names=("Y: the forward output.", "dY: its gradient, the same shape."),
        output_names=("dX: the same shape.",),
        arguments=(_AXIS,),
    )
)
def softmax_gradient(call: OperatorCall) -> Step:
    """Compute the gradient from the probabilities."""
    xp, y = call.xp, checked_input(call, 0, FLOATS)
    given = checked_input(call, 1, FLOATS, like=y)
    if given.shape != y.shape:
        raise call.reject(f"input 1 must have the shape of input 0, {tuple(y.shape)}; it is {shown(given)}")
    matrix = _rows(call, y)
    dx = call.output(0, y.shape, y.dtype).reshape(matrix)
    y, given = y.reshape(matrix), given.reshape(matrix)
    row = xp.empty((matrix[0], 1), y.dtype)
    return in_sequence(
        call,
        partial(xp.multiply, given, y, dx),
        summing(row, dx, (1,)),
        partial(xp.subtract, given, row, dx),
        partial(xp.multiply, dx, y, dx),
    )


@register_gradient("Softmax")
def _softmax_gradient(call: GradientCall) -> GradientResult:
    operator = gradient_operator("SoftmaxGradient", (call.output(0), call.given(0)), (call.name(0),))
    return GradientResult((operator,), (call.name(0),))


# SoftmaxWithLoss ------------------------------------------------------------------------------------------------

_LOSS_ARGUMENTS = (
    _AXIS,
    Argument(name="label_prob", type=ArgType.BOOL, default=False, doc="1: labels are rows of probabilities."),
    Argument(name="scale", type=ArgType.FLOAT, default=1.0, doc="Factor of the loss, 0 or more."),
    Argument(name="order", type=ArgType.STRING, default="NCHW", doc="Only NCHW is supported."),
)


def _loss_matrix(call: OperatorCall, x: Array) -> tuple[int, int]:
    if call.arguments["scale"] < 0:
        raise call.reject(f"scale must be 0 or more; found {call.arguments['scale']}")
    if call.arguments["order"] != "NCHW":
        raise call.reject(f"order must be NCHW; found {call.arguments['order']!r}")
    return _rows(call, x)


def _class_labels(call: OperatorCall, x: Array, matrix: tuple[int, int]) -> _Labels:
    labels, axis = call.input(1), canonical_axis(call, "axis", x.ndim)
    if labels.ndim < axis or math.prod(labels.shape[:axis]) != matrix[0]:
        raise call.reject(
            f"labels (input 1) must have the shape {tuple(x.shape[:axis])} (or that with a 1 behind), one for each "
            f"row of logits; they are {shown(labels)}"
        )
    return _Labels(call, 1, *matrix)


def _label_probabilities(call: OperatorCall, x: Array, matrix: tuple[int, int]) -> Array:
    labels, axis = checked_input(call, 1, FLOATS, like=x), canonical_axis(call, "axis", x.ndim)
    if labels.ndim < 2 or flattened(labels.shape, axis) != matrix:
        raise call.reject(
            f"with label_prob=1, labels (input 1) must have the logits' shape {tuple(x.shape)}; they are "
            f"{shown(labels)}"
        )
    return labels.reshape(matrix)


def _check_probabilities(call: OperatorCall, labels: Array) -> None:
    if not labels.size:
        return
    if not bool((labels >= 0).all()):
        raise call.reject(f"label probabilities (input 1) must be 0 or more; found {float(labels.min())}")
    totals = labels.sum(1)
    error = float(abs(totals - 1).max())
    allowed = 1e-2 if labels.dtype.itemsize < 4 else 1e-5
    if not error < allowed:
        raise call.reject(
            f"label probabilities (input 1) must sum to 1 (within {allowed}) in each row; found a row that is "
            f"off by {error}"
        )


def _sample_weights(call: OperatorCall, x: Array, rows: int) -> Array:
    weights = checked_input(call, 2, FLOATS, like=x)
    if weights.size != rows:
        raise call.reject(f"input 2, the weights, must have one weight for each of {rows} rows; it is {shown(weights)}")
    return weights.reshape(rows)


def _bind_gains_by_class(call: OperatorCall, logits: Array, matrix: tuple[int, int], p: Array, gains: Array) -> Step:
    """Return what computes ``p`` and each row's gain, the logarithm of its label's probability.

    It is the label's logit minus the logarithm of the sum of exponentials, so it is exact where ``p`` is 0.
    """
    xp, labels = call.xp, _class_labels(call, logits, matrix)
    row = xp.empty((matrix[0], 1), logits.dtype)
    parts = _softmax(xp, logits.reshape(matrix), p, row)

    def compute() -> None:
        positions = labels.positions()
        for part in parts[:2]:
            part()
        gains[...] = p.reshape(-1)[positions]
        for part in parts[2:]:
            part()
        xp.log(row, row)
        xp.subtract(gains, row.reshape(-1), gains)

    return compute if parts else labels.positions


def _bind_gains_by_probability(
    call: OperatorCall, logits: Array, matrix: tuple[int, int], p: Array, gains: Array
) -> Step:
    """Return what computes ``p`` and each row's gain, the mean logarithm over its label's probabilities."""
    xp, targets = call.xp, _label_probabilities(call, logits, matrix)
    logarithms = xp.empty_like(p)
    parts = (
        partial(_check_probabilities, call, targets),
        *_softmax(xp, logits.reshape(matrix), p, xp.empty((matrix[0], 1), logits.dtype)),
        partial(xp.maximum, p, _threshold(call, p.dtype), out=logarithms),
        partial(xp.log, logarithms, logarithms),
        partial(xp.multiply, logarithms, targets, logarithms),
        partial(logarithms.sum, axis=1, dtype=gains.dtype, out=gains),
    )

    def compute() -> None:
        for part in parts:
            part()

    return compute


@register_operator(
    OperatorSchema(
        type="SoftmaxWithLoss",
        doc="P = softmax of the logits; loss = scale * the (weighted) mean over rows of -log P of the label.",
        inputs=(2, 3),
        outputs=(2, 2),
        input_names=(
            "logits: `(N, D)` after flattening at axis.",
            "labels: `(N,)` or `(N, 1)`, integers in [0, D); with label_prob=1 probabilities, the logits' shape.",
            "weights: `(N,)`, one for each row.",
        ),
        output_names=("P: the logits' shape.", "loss: 0-d; 0 if the weights sum to 0."),
        arguments=_LOSS_ARGUMENTS,
    )
)
def softmax_with_loss(call: OperatorCall) -> Step:
    """Compute probabilities and loss."""
    xp, logits = call.xp, checked_input(call, 0, FLOATS)
    matrix = _loss_matrix(call, logits)
    weights = _sample_weights(call, logits, matrix[0]) if call.input_count == 3 else None
    p = call.output(0, logits.shape, logits.dtype).reshape(matrix)
    loss = call.output(1, (), logits.dtype)
    gains = xp.empty(matrix[0], logits.dtype)
    bind = _bind_gains_by_probability if call.arguments["label_prob"] else _bind_gains_by_class
    compute_gains = bind(call, logits, matrix, p, gains)
    scale = call.arguments["scale"]

    def step() -> None:
        compute_gains()
        total_weight = float(gains.size)
        if weights is not None:
            xp.multiply(gains, weights, gains)
            total_weight = float(weights.sum())
        gains.sum(None, loss.dtype, loss)
        if total_weight == 0:
            loss.fill(0)
        else:
            xp.multiply(loss, -scale / total_weight, loss)

    return quiet(xp, step)


@register_operator(
    OperatorSchema(
        type="SoftmaxWithLossGradient",
        doc="dX = (P - labels) * weights * scale * dloss / the sum of weights.",
        inputs=(4, 5),
        outputs=(1, 1),
        input_names=(
            "logits.",
            "labels.",
            "With five inputs: weights.",
            "P: the softmax.",
            "dloss, last: one element.",
        ),
        output_names=("dX: the logits' shape.",),
        arguments=_LOSS_ARGUMENTS,
    )
)
def softmax_with_loss_gradient(call: OperatorCall) -> Step:
    """Compute the gradient of the logits. Weights that sum to 0 or less are, as in Caffe2, not divided by."""
    xp, logits = call.xp, checked_input(call, 0, FLOATS)
    matrix = _loss_matrix(call, logits)
    rows = matrix[0]
    p = checked_input(call, call.input_count - 2, FLOATS, like=logits)
    given = checked_input(call, call.input_count - 1, FLOATS, like=logits)
    if p.shape != logits.shape or given.size != 1:
        raise call.reject(
            f"the probabilities must have the logits' shape {tuple(logits.shape)} and the gradient one element; they "
            f"are {shown(p)} and {shown(given)}"
        )
    weights = _sample_weights(call, logits, rows) if call.input_count == 5 else None
    is_by_class = not call.arguments["label_prob"]
    labels = _class_labels(call, logits, matrix) if is_by_class else None
    targets = None if is_by_class else _label_probabilities(call, logits, matrix)
    dx = call.output(0, logits.shape, logits.dtype).reshape(matrix)
    probabilities, gradient = p.reshape(matrix), given.reshape(())
    factor, scale = xp.empty((), logits.dtype), call.arguments["scale"]

    def step() -> None:
        if labels is not None:
            positions = labels.positions()
            dx[...] = probabilities
            dx.reshape(-1)[positions] -= 1
        else:
            xp.subtract(probabilities, targets, dx)
        total_weight = float(rows)
        if weights is not None:
            xp.multiply(dx, weights.reshape(rows, 1), dx)
            total_weight = float(weights.sum())
        if total_weight > 0:
            xp.multiply(gradient, scale / total_weight, factor)
            xp.multiply(dx, factor, dx)

    return quiet(xp, step)


@register_gradient("SoftmaxWithLoss")
def _softmax_with_loss_gradient(call: GradientCall) -> GradientResult:
    inputs = (*call.operator.inputs, call.output(0), call.given(1))
    operator = gradient_operator("SoftmaxWithLossGradient", inputs, (call.name(0),))
    return GradientResult((operator,), (call.name(0),))


# Cross entropies of probabilities -------------------------------------------------------------------------------


def _batch(call: OperatorCall, x: Array) -> tuple[int, int]:
    """Return N and D: the first dimension and all others; a vector is one row."""
    if x.ndim == 0:
        raise call.reject(f"input 0, the probabilities, must have at least one dimension; it is {shown(x)}")
    return flattened(x.shape, 1 if x.ndim > 1 else 0)


def _entropy_schema(type_: str, doc: str, labels: str) -> OperatorSchema:
    return OperatorSchema(
        type=type_,
        doc=doc,
        inputs=(2, 2),
        outputs=(1, 1),
        input_names=("X: probabilities, `(N, D)`.", labels),
        output_names=("Y: `(N,)`.",),
    )


def _entropy_gradient_schema(type_: str, doc: str) -> OperatorSchema:
    return OperatorSchema(
        type=type_,
        doc=doc,
        inputs=(3, 3),
        outputs=(1, 1),
        input_names=("X: as in the forward operator.", "labels: likewise.", "dY: `(N,)`."),
        output_names=("dX: X's shape.",),
    )


def _one_dimensional_labels(call: OperatorCall, rows: int, classes: int) -> _Labels:
    labels = call.input(1)
    if tuple(labels.shape) not in ((rows,), (rows, 1)):
        raise call.reject(f"input 1, the labels, must have the shape ({rows},) or ({rows}, 1); it is {shown(labels)}")
    return _Labels(call, 1, rows, classes)


def _row_gradient(call: OperatorCall, x: Array, rows: int) -> Array:
    given = checked_input(call, 2, FLOATS, like=x)
    if tuple(given.shape) != (rows,):
        raise call.reject(f"input 2, the gradient, must have the shape ({rows},); it is {shown(given)}")
    return given


@register_operator(
    _entropy_schema(
        "LabelCrossEntropy",
        "Y = -log(X of the label), in each row, with X at least 1e-20.",
        "labels: `(N,)` or `(N, 1)`, integers in [0, D).",
    )
)
def label_cross_entropy(call: OperatorCall) -> Step:
    """Take the logarithm of each label's probability."""
    xp, x = call.xp, checked_input(call, 0, FLOATS)
    rows, classes = _batch(call, x)
    labels = _one_dimensional_labels(call, rows, classes)
    y, flat, threshold = call.output(0, (rows,), x.dtype), x.reshape(-1), _threshold(call, x.dtype)

    def step() -> None:
        positions = labels.positions()
        y[...] = flat[positions]
        xp.maximum(y, threshold, out=y)
        xp.log(y, y)
        xp.negative(y, y)

    return quiet(xp, step)


@register_operator(
    _entropy_gradient_schema("LabelCrossEntropyGradient", "dX = -dY / X at the labels, with X at least 1e-20, else 0.")
)
def label_cross_entropy_gradient(call: OperatorCall) -> Step:
    """Put the gradient where the labels point."""
    xp, x = call.xp, checked_input(call, 0, FLOATS)
    rows, classes = _batch(call, x)
    labels, given = _one_dimensional_labels(call, rows, classes), _row_gradient(call, x, rows)
    dx, flat, threshold = call.output(0, x.shape, x.dtype).reshape(-1), x.reshape(-1), _threshold(call, x.dtype)

    def step() -> None:
        positions = labels.positions()
        picked = xp.maximum(flat[positions], threshold)
        xp.divide(given, picked, picked)
        dx.fill(0)
        dx[positions] = xp.negative(picked, picked)

    return quiet(xp, step)


def _soft_labels(call: OperatorCall, x: Array, rows: int, classes: int) -> Array:
    labels = checked_input(call, 1, FLOATS, like=x)
    if labels.size != x.size or tuple(labels.shape) not in ((rows, classes), tuple(x.shape)):
        raise call.reject(f"input 1, the labels, must have the shape ({rows}, {classes}); it is {shown(labels)}")
    return labels.reshape(rows, classes)


@register_operator(
    _entropy_schema(
        "CrossEntropy",
        "Y = -sum(labels * log(X)), in each row, with X at least 1e-20.",
        "labels: probabilities, `(N, D)`, each in [0, 1].",
    )
)
def cross_entropy(call: OperatorCall) -> Step:
    """Compare two rows of probabilities."""
    xp, x = call.xp, checked_input(call, 0, FLOATS)
    rows, classes = _batch(call, x)
    labels = _soft_labels(call, x, rows, classes)
    y, terms, threshold = (
        call.output(0, (rows,), x.dtype),
        xp.empty((rows, classes), x.dtype),
        _threshold(call, x.dtype),
    )
    probabilities = x.reshape(rows, classes)

    def step() -> None:
        if not bool(((labels >= 0) & (labels <= 1)).all()):
            raise call.reject(
                "labels (input 1) must be probabilities between 0 and 1. For labels that are class numbers use "
                "LabelCrossEntropy"
            )
        xp.maximum(probabilities, threshold, out=terms)
        xp.log(terms, terms)
        xp.multiply(terms, labels, terms)
        terms.sum(1, y.dtype, y)
        xp.negative(y, y)

    return quiet(xp, step)


@register_operator(_entropy_gradient_schema("CrossEntropyGradient", "dX = -dY * labels / X, with X at least 1e-20."))
def cross_entropy_gradient(call: OperatorCall) -> Step:
    """Spread each row's gradient over its labels."""
    xp, x = call.xp, checked_input(call, 0, FLOATS)
    rows, classes = _batch(call, x)
    labels, given = _soft_labels(call, x, rows, classes), _row_gradient(call, x, rows).reshape(rows, 1)
    dx = call.output(0, x.shape, x.dtype).reshape(rows, classes)
    return in_sequence(
        call,
        partial(xp.maximum, x.reshape(rows, classes), _threshold(call, x.dtype), out=dx),
        partial(xp.divide, labels, dx, dx),
        partial(xp.multiply, dx, given, dx),
        partial(xp.negative, dx, dx),
    )


def _gradient_by_inputs(call: GradientCall) -> GradientResult:
    inputs = (call.input(0), call.input(1), call.given(0))
    operator = gradient_operator(f"{call.operator.type}Gradient", inputs, (call.name(0),))
    return GradientResult((operator,), (call.name(0),))


for _type in ("LabelCrossEntropy", "CrossEntropy"):
    register_gradient(_type)(_gradient_by_inputs)


# Distance and accuracy ------------------------------------------------------------------------------------------


def _distance_operands(call: OperatorCall) -> tuple[Array, Array, int]:
    x = checked_input(call, 0, FLOATS)
    y = checked_input(call, 1, FLOATS, like=x)
    if x.shape != y.shape:
        raise call.reject(f"input 1 must have the shape of input 0, {tuple(x.shape)}; it is {shown(y)}")
    rows = x.shape[0] if x.ndim else 1
    matrix = (rows, math.prod(x.shape[1:]))
    return x.reshape(matrix), y.reshape(matrix), rows


@register_operator(
    OperatorSchema(
        type="SquaredL2Distance",
        doc="Z = sum((X - Y) ** 2) / 2, in each row.",
        inputs=(2, 2),
        outputs=(1, 1),
        input_names=("X: `(N, …)`.", "Y: X's shape and dtype."),
        output_names=("Z: `(N,)`.",),
    )
)
def squared_l2_distance(call: OperatorCall) -> Step:
    """Sum up squared differences."""
    xp = call.xp
    x, y, rows = _distance_operands(call)
    z, difference = call.output(0, (rows,), x.dtype), xp.empty_like(x)
    return in_sequence(
        call,
        partial(xp.subtract, x, y, difference),
        partial(xp.multiply, difference, difference, difference),
        partial(difference.sum, 1, z.dtype, z),
        partial(xp.multiply, z, constant(call, 0.5, z.dtype), z),
    )


@register_operator(
    OperatorSchema(
        type="SquaredL2DistanceGradient",
        doc="dX = (X - Y) * dZ, dY = -dX.",
        inputs=(3, 3),
        outputs=(2, 2),
        input_names=("X: `(N, …)`.", "Y: X's shape.", "dZ: `(N,)`."),
        output_names=("dX: X's shape.", "dY: X's shape."),
    )
)
def squared_l2_distance_gradient(call: OperatorCall) -> Step:
    """Scale each row's difference by its gradient."""
    xp = call.xp
    x, y, rows = _distance_operands(call)
    given = _row_gradient(call, x, rows).reshape(rows, 1)
    shape = call.input(0).shape
    dx = call.output(0, shape, x.dtype).reshape(x.shape)
    dy = call.output(1, shape, x.dtype).reshape(x.shape)
    return in_sequence(
        call,
        partial(xp.subtract, x, y, dx),
        partial(xp.multiply, dx, given, dx),
        partial(xp.negative, dx, dy),
    )


@register_gradient("SquaredL2Distance")
def _squared_l2_distance_gradient(call: GradientCall) -> GradientResult:
    names = call.name(0), call.name(1)
    inputs = (call.input(0), call.input(1), call.given(0))
    return GradientResult((gradient_operator("SquaredL2DistanceGradient", inputs, names),), names)


@register_operator(
    OperatorSchema(
        type="Accuracy",
        doc="Y = the share of rows whose label is among the top_k predictions; of equal ones the first class wins.",
        inputs=(2, 2),
        outputs=(1, 1),
        input_names=("predictions: `(N, D)`.", "labels: `(N,)`, integers in [0, D)."),
        output_names=("Y: 0-d, float32; NaN if there are no rows.",),
        arguments=(Argument(name="top_k", type=ArgType.INT, default=1, doc="How many predictions count, 1 or more."),),
    )
)
def accuracy(call: OperatorCall) -> Step:
    """Count, in each row, the classes that are ranked before the label."""
    xp, x = call.xp, checked_input(call, 0, FLOATS)
    top_k = call.arguments["top_k"]
    if x.ndim != 2 or call.input(1).ndim != 1 or top_k < 1:
        raise call.reject(
            f"predictions must be (N, D), labels (N,) and top_k 1 or more; found {shown(x)}, "
            f"{shown(call.input(1))} and {top_k}"
        )
    rows, classes = x.shape
    labels = _Labels(call, 1, rows, classes)
    flat, y = x.reshape(-1), call.output(0, (), _FLOAT32)
    everywhere = xp.arange(rows * classes, dtype=_INT64).reshape(rows, classes)
    is_before, is_equal, is_first = (xp.empty(x.shape, _BOOL) for _ in range(3))

    def step() -> None:
        positions = labels.positions()
        predicted = flat[positions].reshape(rows, 1)
        xp.greater(x, predicted, is_before)
        xp.equal(x, predicted, is_equal)
        xp.less(everywhere, positions.reshape(rows, 1), is_first)
        xp.logical_and(is_equal, is_first, is_equal)
        xp.logical_or(is_before, is_equal, is_before)
        ranks = is_before.sum(1)
        (ranks < top_k).sum(None, _FLOAT32, y)
        xp.divide(y, rows, y)

    return quiet(xp, step)


should_not_do_gradient("Accuracy")
