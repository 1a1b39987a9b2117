"""Operators that make tensors from nothing: constants, given values, random numbers.

Random ones draw from the workspace's generator at each run (or anew from ``DeviceOption.random_seed``), so a
checkpoint of the generator's state makes them repeat. They draw on the host, so both devices get equal numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np

from ..definitions import OperatorDef
from ..dtypes import DType
from ..execution import OperatorCall, shown
from ..registry import Step, no_gradient, register_operator
from ..schema import ArgType, Argument, OperatorSchema
from ..values import Array, string_tensor

_FLOAT32 = np.dtype("float32")

_SHAPE_ARGUMENTS = (
    Argument(name="shape", type=ArgType.INTS, doc="Shape of the output; only without an input. Default: 0-d."),
    Argument(name="extra_shape", type=ArgType.INTS, doc="Dimensions appended to the input's shape."),
    Argument(
        name="input_as_shape", type=ArgType.BOOL, default=False, doc="The input's values, not its shape, are the shape."
    ),
)
_SHAPE_INPUT = "X: tensor of any shape, which the output gets; or, with input_as_shape, (n_dims,) integers."


def _reads_shape(operator: OperatorDef) -> bool:
    """Whether the shape is an input's values, which may change from run to run."""
    return bool(operator.args.get("input_as_shape"))


def _schema(
    type: str,  # noqa: A002  (Caffe2's word)
    doc: str,
    output: str,
    arguments: Sequence[Argument],
    *,
    inputs: tuple[str, ...] = (_SHAPE_INPUT,),
) -> OperatorSchema:
    return OperatorSchema(
        type=type,
        doc=f"{doc} The shape is an argument, an input's shape, or an input's values.",
        inputs=(0, len(inputs)),
        outputs=(1, 1),
        input_names=inputs,
        output_names=(output,),
        arguments=(*arguments, *_SHAPE_ARGUMENTS),
        in_place=frozenset({(0, 0)}),
    )


def _output_shape(call: OperatorCall) -> tuple[int, ...]:
    """Return the shape that a fill's arguments and first input ask for."""
    given: tuple[int, ...] | None = call.arguments["shape"]
    extra: tuple[int, ...] | None = call.arguments["extra_shape"]
    if not call.input_count:
        if extra:
            raise call.reject(f"extra_shape is expected only with an input; found extra_shape {list(extra)}, no input")
        if call.arguments["input_as_shape"]:
            raise call.reject("input_as_shape=1 expects an input that holds the shape; found no input")
        shape = given or ()
    else:
        if given:
            raise call.reject(f"expected the argument shape or an input, not both; found shape {list(given)}")
        if call.arguments["input_as_shape"]:
            array = call.input(0)
            if array.ndim != 1:
                raise call.reject(f"with input_as_shape=1 input 0 is expected to be 1-D integers, found {shown(array)}")
            shape = call.integers(0)
        else:
            shape = tuple(call.input(0).shape)
        shape += extra or ()
    if any(size < 0 for size in shape):
        raise call.reject(f"expected a shape without negative sizes, found {list(shape)}")
    return shape


@register_operator(
    _schema(
        "ConstantFill",
        "Fill a tensor with one value.",
        "Y: the filled tensor, of `dtype`.",
        (
            Argument(name="value", type=ArgType.FLOAT, default=0.0, doc="Number or bool; fractions only for floats."),
            Argument(
                name="dtype",
                type=ArgType.DTYPE,
                doc="Element type. Default, as in Caffe2: int64 for an integer or bool `value`, else float32.",
            ),
        ),
        inputs=(_SHAPE_INPUT, "value: one element of the output's dtype, used instead of the argument."),
    ),
    dynamic=_reads_shape,
)
def constant_fill(call: OperatorCall) -> Step:
    """Source: Caffe2's ConstantFill."""
    shape = _output_shape(call)
    # The schema makes `value` a float; what was given tells integers apart and keeps all their bits.
    given = call.definition.args.get("value", 0.0)
    dtype: DType | None = call.arguments["dtype"]
    if dtype is None:
        dtype = np.dtype("int64" if isinstance(given, int) else "float32")
    if call.input_count == 2:
        source = call.input(1)
        if source.size != 1 or source.dtype != dtype:
            raise call.reject(f"input 1, the value, is expected to be one element of {dtype}, found {shown(source)}")
        output = call.output(0, shape, dtype)
        scalar = call.xp.reshape(source, ())
        return lambda: call.xp.copyto(output, scalar)
    value = _constant(call, given, dtype)
    output = call.output(0, shape, dtype)
    return lambda: output.fill(value)


def _constant(call: OperatorCall, given: Any, dtype: DType) -> Any:
    """Return the Python scalar that ``given`` is in ``dtype``; refuse to lose more than digits of it."""
    if dtype.kind not in "biu":
        with np.errstate(over="ignore"):
            # By way of complex, as not every extended dtype knows isfinite.
            is_finite = np.isfinite(np.asarray(given).astype(dtype).astype(np.complex128))
        if math.isfinite(given) and not is_finite:
            raise call.reject(f"expected a value within the range of {dtype}, found {given!r}")
        return given
    low, high = (0, 1) if dtype.kind == "b" else (int(np.iinfo(dtype).min), int(np.iinfo(dtype).max))
    if (isinstance(given, float) and not given.is_integer()) or not low <= given <= high:
        raise call.reject(f"expected an integer from {low} to {high} for {dtype}, found {given!r}")
    return int(given)


def _given_tensor_fill(type_: str, kind: ArgType, dtype: DType) -> None:
    @register_operator(
        _schema(
            type_,
            f"Fill a tensor with given values, as {dtype}.",
            f"Y: {dtype} tensor.",
            (
                Argument(
                    name="values",
                    type=kind,
                    required=True,
                    doc="As many as the shape has elements, in row-major order.",
                ),
            ),
        ),
        dynamic=_reads_shape,
    )
    def given_tensor_fill(call: OperatorCall) -> Step:
        shape = _output_shape(call)
        values = _given_values(call, shape)
        # The values of one list are all integers or all floats, so its extremes stand for the rest.
        finite = [value for value in values if math.isfinite(value)]
        for value in (min(finite), max(finite)) if finite else ():
            _constant(call, value, dtype)
        constant = call.xp.asarray(np.array(values, dtype=dtype)).reshape(shape)
        output = call.output(0, shape, dtype)
        return lambda: call.xp.copyto(output, constant)

    no_gradient(type_)


def _given_values(call: OperatorCall, shape: tuple[int, ...]) -> tuple[Any, ...]:
    values: tuple[Any, ...] = call.arguments["values"]
    if len(values) != math.prod(shape):
        raise call.reject(f"expected {math.prod(shape)} values for the shape {list(shape)}, found {len(values)}")
    return values


_given_tensor_fill("GivenTensorFill", ArgType.FLOATS, _FLOAT32)
_given_tensor_fill("GivenTensorDoubleFill", ArgType.FLOATS, np.dtype("float64"))
_given_tensor_fill("GivenTensorInt64Fill", ArgType.INTS, np.dtype("int64"))
_given_tensor_fill("GivenTensorIntFill", ArgType.INTS, np.dtype("int32"))
_given_tensor_fill("GivenTensorBoolFill", ArgType.INTS, np.dtype("bool"))


@register_operator(
    _schema(
        "GivenTensorStringFill",
        "Fill a string tensor with given strings.",
        "Y: string tensor.",
        (Argument(name="values", type=ArgType.ANY, required=True, doc="A list of str (stored as UTF-8) and bytes."),),
    ),
    dynamic=_reads_shape,
)
def given_tensor_string_fill(call: OperatorCall) -> Step:
    """Source: Caffe2's GivenTensorStringFill."""
    shape = _output_shape(call)
    values: Any = call.arguments["values"]
    if type(values) is not list or {type(value) for value in cast("list[Any]", values)} - {str, bytes}:
        raise call.reject(f"values is expected to be a list of str and bytes, found {values!r:.80}")
    items = _given_values(call, shape)
    return lambda: call.set_strings(0, np.reshape(string_tensor(items), shape))


Draw = Callable[[np.random.Generator, Array], object]
"""Fill a C-contiguous float32 array on the host."""


def _random_fill(call: OperatorCall, shape: tuple[int, ...], draw: Draw) -> Step:
    output = call.output(0, shape, _FLOAT32)
    if call.xp is np:
        return lambda: draw(call.generator(), output)
    host = np.empty(shape, dtype=_FLOAT32)

    def step() -> None:
        draw(call.generator(), host)
        call.xp.copyto(output, call.xp.asarray(host))

    return step


def _uniform(low: float, high: float) -> Draw:
    def draw(generator: np.random.Generator, out: Array) -> None:
        generator.random(dtype=np.float32, out=out)
        np.multiply(out, high - low, out=out)
        np.add(out, low, out=out)
        # Rounding may carry the largest numbers over the bound.
        np.minimum(out, high, out=out)

    return draw


def _normal(mean: float, deviation: float) -> Draw:
    def draw(generator: np.random.Generator, out: Array) -> None:
        generator.standard_normal(dtype=np.float32, out=out)
        np.multiply(out, deviation, out=out)
        np.add(out, mean, out=out)

    return draw


@register_operator(
    _schema(
        "UniformFill",
        "Fill a tensor with random numbers, uniform from `min` to `max`.",
        "Y: float32 tensor.",
        (
            Argument(name="min", type=ArgType.FLOAT, default=0.0, doc="Least number."),
            Argument(name="max", type=ArgType.FLOAT, default=1.0, doc="Greatest number; more than `min`."),
        ),
        inputs=(
            _SHAPE_INPUT,
            "min: one float32, used instead of the argument; with it comes max.",
            "max: one float32, used instead of the argument.",
        ),
    ),
    dynamic=_reads_shape,
)
def uniform_fill(call: OperatorCall) -> Step:
    """Source: Caffe2's UniformFill."""
    if call.input_count == 2:
        raise call.reject("expected 0, 1 or 3 inputs (shape, min, max), found 2")
    shape = _output_shape(call)
    low, high = (_bound(call, position, name) for position, name in ((1, "min"), (2, "max")))
    if not low < high or not math.isfinite(high - low):
        raise call.reject(f"max is expected to be finite and bigger than min, found min {low!r} and max {high!r}")
    return _random_fill(call, shape, _uniform(low, high))


def _bound(call: OperatorCall, position: int, name: str) -> float:
    if call.input_count < 3:
        return call.arguments[name]
    if name in call.definition.args:
        raise call.reject(f"expected {name} as an argument or as an input, not both; found both")
    array = call.input(position)
    if array.size != 1 or array.dtype != _FLOAT32:
        raise call.reject(f"input {position}, {name}, is expected to be one float32, found {shown(array)}")
    return float(array.item())


@register_operator(
    _schema(
        "GaussianFill",
        "Fill a tensor with random numbers, normal with mean `mean` and standard deviation `std`.",
        "Y: float32 tensor.",
        (
            Argument(name="mean", type=ArgType.FLOAT, default=0.0, doc="Mean."),
            Argument(name="std", type=ArgType.FLOAT, default=1.0, doc="Standard deviation, not negative."),
        ),
    ),
    dynamic=_reads_shape,
)
def gaussian_fill(call: OperatorCall) -> Step:
    """Source: Caffe2's GaussianFill."""
    mean, deviation = call.arguments["mean"], call.arguments["std"]
    if not deviation >= 0 or not math.isfinite(mean + deviation):
        raise call.reject(f"expected a finite mean and a finite std of 0 or more, found {mean!r} and {deviation!r}")
    return _random_fill(call, _output_shape(call), _normal(mean, deviation))


def _fan(call: OperatorCall, shape: tuple[int, ...], dimension: int) -> int:
    """Return how many elements there are for each index of ``dimension``."""
    if len(shape) <= dimension:
        raise call.reject(f"expected a shape of {dimension + 1} dimensions or more, found {list(shape)}")
    # An empty tensor has no fan, and nothing to fill.
    return max(1, math.prod(shape) // max(1, shape[dimension]))


@register_operator(
    _schema(
        "XavierFill",
        "Fill weights with random numbers, uniform within ±sqrt(3 / fan_in), where fan_in is size / shape[0].",
        "Y: (fan_out, ...) float32 weights.",
        (),
    ),
    dynamic=_reads_shape,
)
def xavier_fill(call: OperatorCall) -> Step:
    """Source: Caffe2's XavierFill; Glorot and Bengio 2010."""
    shape = _output_shape(call)
    bound = math.sqrt(3.0 / _fan(call, shape, 0))
    return _random_fill(call, shape, _uniform(-bound, bound))


@register_operator(
    _schema(
        "MSRAFill",
        "Fill weights with random numbers, normal with deviation sqrt(2 / fan_out), where fan_out is size / shape[1].",
        "Y: (fan_out, fan_in, ...) float32 weights.",
        (),
    ),
    dynamic=_reads_shape,
)
def msra_fill(call: OperatorCall) -> Step:
    """Source: Caffe2's MSRAFill; He et al. 2015."""
    shape = _output_shape(call)
    return _random_fill(call, shape, _normal(0.0, math.sqrt(2.0 / _fan(call, shape, 1))))


no_gradient("ConstantFill", "GivenTensorStringFill", "UniformFill", "GaussianFill", "XavierFill", "MSRAFill")
