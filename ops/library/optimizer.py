"""Operators that train: the iteration counter, the learning rate, and the updates of dense parameters.

Caffe2's convention for Adagrad and Adam is a *negative* learning rate, ``param += lr * …``; the momentum
operators subtract, ``param -= …``, and take a positive one.

The updates compute on flat views, so only element counts need to agree, as in Caffe2. A step writes to its
outputs and to scratch arrays that were made when it was bound; it allocates nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import numpy as np

from ..dtypes import DType
from ..execution import OperatorCall, shown
from ..registry import Step, no_gradient, register_operator, should_not_do_gradient
from ..schema import ArgType, Argument, OperatorSchema
from ..values import Array, Kind
from .elementwise import quiet

_INT64 = np.dtype("int64")
_FLOAT32 = np.dtype("float32")
_FLOAT64 = np.dtype("float64")
_LEARNING_RATE_INPUT = "lr: one element, the learning rate."


@register_operator(
    OperatorSchema(
        type="Iter",
        doc="Count runs: add 1 to an int64 counter in place. Without an input, the output starts at 0.",
        inputs=(0, 1),
        outputs=(1, 1),
        input_names=("iter: (1,) int64 counter, not negative.",),
        output_names=("iter: the same blob, 1 more.",),
        enforced_in_place=frozenset({(0, 0)}),
    )
)
def iterate(call: OperatorCall) -> Step:
    """Source: Caffe2's Iter."""
    if call.input_count:
        previous = call.input(0)
    else:
        slot = call.environment.create(call.definition.outputs[0])
        if slot.kind is Kind.UNINITIALIZED:
            counter = call.output(0, (1,), _INT64)
            counter.fill(0)
            return lambda: call.xp.add(counter, 1, out=counter)
        if slot.array is None:
            raise call.reject(f"output {slot.name!r} is expected to be a counter, one int64; found no tensor")
        previous = slot.array
    _check_counter(call, "the counter", previous)
    if not 0 <= int(previous.item()) < np.iinfo(np.int64).max:
        raise call.reject(f"the counter is expected to be from 0 to 2**63 - 2, found {int(previous.item())}")
    counter = call.output(0, previous.shape, _INT64)
    return lambda: call.xp.add(previous, 1, out=counter)


def _check_counter(call: OperatorCall, what: str, array: Array) -> None:
    if array.size != 1 or array.dtype != _INT64:
        raise call.reject(f"{what} is expected to be one int64, found {shown(array)}")


Multiplier: TypeAlias = Callable[[int], float]
"""From an iteration to the factor of the base learning rate."""


def _rounded(value: float) -> float:
    """Return what Caffe2 has after reading an argument as float32."""
    return float(np.float32(value))


def _power(base: float, exponent: float) -> float:
    """C's ``pow``: not a number or infinity where Python raises."""
    try:
        return math.pow(base, exponent)
    except ValueError:
        return math.nan
    except OverflowError:
        return math.inf


def _step_policy(arguments: Mapping[str, Any]) -> Multiplier:
    step_size, gamma = arguments["stepsize"], _rounded(arguments["gamma"])
    return lambda iteration: _power(gamma, iteration // step_size)


def _exp_policy(arguments: Mapping[str, Any]) -> Multiplier:
    gamma = _rounded(arguments["gamma"])
    return lambda iteration: _power(gamma, iteration)


def _inv_policy(arguments: Mapping[str, Any]) -> Multiplier:
    gamma, power = _rounded(arguments["gamma"]), _rounded(arguments["power"])
    return lambda iteration: _power(1.0 + gamma * iteration, -power)


def _poly_policy(arguments: Mapping[str, Any]) -> Multiplier:
    most, power = arguments["max_iter"], _rounded(arguments["power"])
    return lambda iteration: _power(1.0 - iteration / most, power)


def _linear_warmup_policy(arguments: Mapping[str, Any]) -> Multiplier:
    start, count = _rounded(arguments["start_multiplier"]), arguments["num_iter"]
    return lambda iteration: 1.0 if iteration >= count else start + (1.0 - start) * iteration / count


def _constant_warmup_policy(arguments: Mapping[str, Any]) -> Multiplier:
    factor, count = _rounded(arguments["multiplier"]), arguments["num_iter"]
    return lambda iteration: 1.0 if iteration >= count else factor


def _alter_policy(arguments: Mapping[str, Any]) -> Multiplier:
    active, inactive = arguments["active_period"], arguments["inactive_period"]
    if arguments["active_first"]:
        return lambda iteration: float(iteration % (active + inactive) < active)
    return lambda iteration: float(iteration % (active + inactive) >= inactive)


_POLICIES: Mapping[str, tuple[tuple[str, ...], Callable[[Mapping[str, Any]], Multiplier]]] = {
    "fixed": ((), lambda _arguments: lambda _iteration: 1.0),
    "step": (("stepsize", "gamma"), _step_policy),
    "exp": (("gamma",), _exp_policy),
    "inv": (("gamma", "power"), _inv_policy),
    "poly": (("power", "max_iter"), _poly_policy),
    "linearWarmup": (("start_multiplier", "num_iter"), _linear_warmup_policy),
    "constantWarmup": (("multiplier", "num_iter"), _constant_warmup_policy),
    "alter": (("active_period", "inactive_period"), _alter_policy),
}
"""For each policy the arguments that it needs, all of them more than 0, and how it is made."""


@register_operator(
    OperatorSchema(
        type="LearningRate",
        doc="Compute the learning rate of an iteration: `base_lr` times a factor that follows a policy.",
        inputs=(1, 1),
        outputs=(1, 1),
        input_names=("iter: (1,) int64, the iteration.",),
        output_names=("lr: 0-d float32.",),
        arguments=(
            Argument(
                name="policy",
                type=ArgType.STRING,
                required=True,
                doc="fixed: 1 · step: gamma^(iter // stepsize) · exp: gamma^iter · inv: (1 + gamma * iter)^-power · "
                "poly: (1 - iter / max_iter)^power · linearWarmup: from start_multiplier to 1 in num_iter · "
                "constantWarmup: multiplier until num_iter, then 1 · alter: active_period of 1, inactive_period of 0.",
            ),
            Argument(name="base_lr", type=ArgType.FLOAT, required=True, doc="Base learning rate."),
            Argument(name="gamma", type=ArgType.FLOAT, doc="For step, exp and inv; more than 0."),
            Argument(name="power", type=ArgType.FLOAT, doc="For inv and poly; more than 0."),
            Argument(name="stepsize", type=ArgType.INT, doc="For step: iterations; more than 0."),
            Argument(name="max_iter", type=ArgType.INT, doc="For poly: iterations; more than 0."),
            Argument(name="num_iter", type=ArgType.INT, doc="For the warm-ups: iterations; more than 0."),
            Argument(name="start_multiplier", type=ArgType.FLOAT, doc="For linearWarmup; more than 0."),
            Argument(name="multiplier", type=ArgType.FLOAT, default=0.5, doc="For constantWarmup; more than 0."),
            Argument(name="active_period", type=ArgType.INT, doc="For alter: iterations; more than 0."),
            Argument(name="inactive_period", type=ArgType.INT, doc="For alter: iterations; more than 0."),
            Argument(name="active_first", type=ArgType.BOOL, default=True, doc="For alter: start with active_period."),
        ),
    )
)
def learning_rate(call: OperatorCall) -> Step:
    """Source: Caffe2's LearningRate and its functors."""
    iteration = call.input(0)
    _check_counter(call, "input 0, the iteration,", iteration)
    policy: str = call.arguments["policy"]
    if policy not in _POLICIES:
        raise call.reject(f"Unknown learning rate policy: expected one of {', '.join(_POLICIES)}; found {policy!r}")
    needed, make = _POLICIES[policy]
    for name in needed:
        value = call.arguments[name]
        if value is None or not value > 0:
            found = "nothing" if value is None else repr(value)
            raise call.reject(f"the policy {policy!r} expects the argument {name!r}, more than 0; found {found}")
    multiplier = make(call.arguments)
    base = _rounded(call.arguments["base_lr"])
    output = call.output(0, (), _FLOAT32)
    return quiet(call.xp, lambda: output.fill(base * multiplier(int(iteration.item()))))


def _flat_inputs(call: OperatorCall, names: tuple[str, ...]) -> tuple[tuple[Array, ...], DType]:
    """Return the first inputs as flat views, all of one floating-point dtype and one size.

    ``"lr"`` and ``"iter"`` among the names are one element, and a 0-d view.
    """
    arrays = [call.input(position) for position in range(len(names))]
    dtype: DType = arrays[0].dtype
    size = arrays[0].size
    if dtype not in (_FLOAT32, _FLOAT64):
        raise call.reject(f"input 0, {names[0]}, is expected to be float32 or float64, found {shown(arrays[0])}")
    flat: list[Array] = []
    for position, (name, array) in enumerate(zip(names, arrays, strict=True)):
        if name == "iter":
            _check_counter(call, f"input {position}, {name},", array)
        elif name == "lr":
            if array.size != 1 or array.dtype not in (_FLOAT32, dtype):
                raise call.reject(f"input {position}, lr, is expected to be one {dtype}, found {shown(array)}")
        elif array.size != size or array.dtype != dtype:
            raise call.reject(
                f"input {position}, {name}, is expected to have the dtype and the {size} elements of input 0, "
                f"{names[0]} ({shown(arrays[0])}), found {shown(array)}"
            )
        flat.append(call.xp.reshape(array, () if name in ("lr", "iter") else (-1,)))
    return tuple(flat), dtype


def _flat_output(call: OperatorCall, index: int, source: int) -> Array:
    """Return output ``index``, shaped like input ``source``, as a flat view."""
    like = call.input(source)
    return call.xp.reshape(call.output(index, like.shape, like.dtype), (-1,))


def _constant(call: OperatorCall, name: str, dtype: DType) -> float:
    """Return an argument as the arithmetic of ``dtype`` has it."""
    value: float = call.arguments[name]
    return _rounded(value) if dtype == _FLOAT32 else value


_MOMENTUM_ARGUMENTS = (
    Argument(name="momentum", type=ArgType.FLOAT, default=0.0, doc="Part of the momentum that is kept."),
    Argument(name="nesterov", type=ArgType.BOOL, default=False, doc="Use Nesterov's momentum."),
)
_MOMENTUM_INPUTS = (
    "grad: float32 or float64, any shape.",
    "momentum: as many elements as grad.",
    _LEARNING_RATE_INPUT,
)
_MOMENTUM_OUTPUTS = ("grad: the adjusted gradient, shaped like grad.", "momentum: shaped like momentum.")


@register_operator(
    OperatorSchema(
        type="MomentumSGD",
        doc="Compute a momentum step without applying it: m' = momentum * m + lr * grad. The adjusted gradient is m', "
        "or with nesterov (1 + momentum) * m' - momentum * m.",
        inputs=(3, 3),
        outputs=(2, 2),
        input_names=_MOMENTUM_INPUTS,
        output_names=_MOMENTUM_OUTPUTS,
        arguments=_MOMENTUM_ARGUMENTS,
        in_place=frozenset({(0, 0), (1, 1)}),
    )
)
def momentum_sgd(call: OperatorCall) -> Step:
    """Source: Caffe2's MomentumSGD."""
    return quiet(call.xp, _momentum_step(call, _flat_inputs(call, ("grad", "momentum", "lr")))[0])


@register_operator(
    OperatorSchema(
        type="MomentumSGDUpdate",
        doc="Apply a momentum step: MomentumSGD, then param' = param - the adjusted gradient.",
        inputs=(4, 4),
        outputs=(3, 3),
        input_names=(*_MOMENTUM_INPUTS, "param: as many elements as grad."),
        output_names=(*_MOMENTUM_OUTPUTS, "param: shaped like param."),
        arguments=_MOMENTUM_ARGUMENTS,
        in_place=frozenset({(0, 0), (1, 1), (3, 2)}),
    )
)
def momentum_sgd_update(call: OperatorCall) -> Step:
    """Source: Caffe2's MomentumSGDUpdate."""
    inputs, dtype = _flat_inputs(call, ("grad", "momentum", "lr", "param"))
    momentum_step, adjusted = _momentum_step(call, (inputs, dtype))
    param, new_param = inputs[3], _flat_output(call, 2, 3)
    subtract = call.xp.subtract

    def step() -> None:
        momentum_step()
        subtract(param, adjusted, out=new_param)

    return quiet(call.xp, step)


def _momentum_step(call: OperatorCall, checked: tuple[tuple[Array, ...], DType]) -> tuple[Step, Array]:
    """Return the step of the two outputs that both operators have, and the adjusted gradient it writes."""
    (grad, momentum, rate, *_), dtype = checked
    new_grad, new_momentum = _flat_output(call, 0, 0), _flat_output(call, 1, 1)
    factor = _constant(call, "momentum", dtype)
    xp = call.xp

    def step() -> None:
        xp.multiply(grad, rate, out=new_grad)
        xp.multiply(momentum, factor, out=new_momentum)
        xp.add(new_momentum, new_grad, out=new_momentum)
        xp.copyto(new_grad, new_momentum)

    if not call.arguments["nesterov"]:
        return step, new_grad
    kept = xp.empty_like(momentum)

    def nesterov_step() -> None:
        xp.multiply(grad, rate, out=new_grad)
        xp.multiply(momentum, factor, out=kept)
        xp.add(kept, new_grad, out=new_momentum)
        xp.multiply(new_momentum, 1 + factor, out=new_grad)
        xp.subtract(new_grad, kept, out=new_grad)

    return nesterov_step, new_grad


@register_operator(
    OperatorSchema(
        type="Adagrad",
        doc="Apply an Adagrad step: h' = decay * h + grad^2; param' = param + lr * grad / (sqrt(h') + epsilon).",
        inputs=(4, 4),
        outputs=(2, 4),
        input_names=(
            "param: float32 or float64, any shape.",
            "moment: h, as many elements as param.",
            "grad: as many elements as param.",
            _LEARNING_RATE_INPUT,
        ),
        output_names=(
            "param: shaped like param.",
            "moment: shaped like moment.",
            "effective_lr: lr / (sqrt(h') + epsilon), shaped like grad.",
            "update: what was added to param, shaped like grad.",
        ),
        arguments=(
            Argument(name="epsilon", type=ArgType.FLOAT, default=1e-5, doc="Added to the root."),
            Argument(name="decay", type=ArgType.FLOAT, default=1.0, doc="Part of the moment that is kept."),
            Argument(name="weight_decay", type=ArgType.FLOAT, default=0.0, doc="Part of param added to grad."),
        ),
        in_place=frozenset({(0, 0), (1, 1)}),
    )
)
def adagrad(call: OperatorCall) -> Step:
    """Source: Caffe2's Adagrad; Duchi et al. 2011."""
    (param, moment, grad, rate), dtype = _flat_inputs(call, ("param", "moment", "grad", "lr"))
    epsilon, decay, weight_decay = (_constant(call, name, dtype) for name in ("epsilon", "decay", "weight_decay"))
    new_param, new_moment = _flat_output(call, 0, 0), _flat_output(call, 1, 1)
    effective_rate = _flat_output(call, 2, 2) if call.output_count > 2 else None
    xp = call.xp
    scratch = xp.empty_like(grad)
    update = _flat_output(call, 3, 2) if call.output_count > 3 else scratch
    slope = xp.empty_like(grad) if weight_decay else grad

    def step() -> None:
        if weight_decay:
            xp.multiply(param, weight_decay, out=slope)
            xp.add(slope, grad, out=slope)
        xp.multiply(slope, slope, out=scratch)
        xp.multiply(moment, decay, out=new_moment)
        xp.add(new_moment, scratch, out=new_moment)
        xp.sqrt(new_moment, out=scratch)
        xp.add(scratch, epsilon, out=scratch)
        if effective_rate is None:
            xp.divide(slope, scratch, out=update)
            xp.multiply(update, rate, out=update)
        else:
            xp.divide(rate, scratch, out=effective_rate)
            xp.multiply(effective_rate, slope, out=update)
        xp.add(param, update, out=new_param)

    return quiet(xp, step)


@register_operator(
    OperatorSchema(
        type="Adam",
        doc="Apply an Adam step, with t = iter + 1 and c = sqrt(1 - beta2^t) / (1 - beta1^t): "
        "m1' = beta1 * m1 + (1 - beta1) * grad; m2' = beta2 * m2 + (1 - beta2) * grad^2; "
        "param' = param + lr * c * m1' / (sqrt(m2') + epsilon).",
        inputs=(6, 6),
        outputs=(3, 4),
        input_names=(
            "param: float32 or float64, any shape.",
            "moment_1: m1, as many elements as param.",
            "moment_2: m2, as many elements as param.",
            "grad: as many elements as param.",
            _LEARNING_RATE_INPUT,
            "iter: (1,) int64, the iteration, from 0.",
        ),
        output_names=(
            "param: shaped like param.",
            "moment_1: shaped like moment_1.",
            "moment_2: shaped like moment_2.",
            "grad: c * m1' / (sqrt(m2') + epsilon), shaped like grad.",
        ),
        arguments=(
            Argument(name="beta1", type=ArgType.FLOAT, default=0.9, doc="From 0, less than 1."),
            Argument(name="beta2", type=ArgType.FLOAT, default=0.999, doc="From 0, less than 1."),
            Argument(name="epsilon", type=ArgType.FLOAT, default=1e-5, doc="Added to the root."),
        ),
        in_place=frozenset({(0, 0), (1, 1), (2, 2)}),
    )
)
def adam(call: OperatorCall) -> Step:
    """Source: Caffe2's Adam; Kingma and Ba 2015."""
    names = ("param", "moment_1", "moment_2", "grad", "lr", "iter")
    (param, moment_1, moment_2, grad, rate, iteration), dtype = _flat_inputs(call, names)
    beta1, beta2, epsilon = (_constant(call, name, dtype) for name in ("beta1", "beta2", "epsilon"))
    if not (0 <= beta1 < 1 and 0 <= beta2 < 1):
        raise call.reject(f"beta1 and beta2 are expected to be from 0 and less than 1, found {beta1!r} and {beta2!r}")
    new_param, new_1, new_2 = (_flat_output(call, index, index) for index in range(3))
    xp = call.xp
    scratch = xp.empty_like(grad)
    corrected_rate = xp.empty((), dtype=dtype)
    new_grad = _flat_output(call, 3, 3) if call.output_count > 3 else None

    def step() -> None:
        t = int(iteration.item()) + 1
        if t < 1:
            raise call.reject(f"input 5, iter, is expected to be 0 or more, found {t - 1}")
        correction = math.sqrt(1.0 - beta2**t) / (1.0 - beta1**t)
        xp.multiply(grad, 1.0 - beta1, out=scratch)
        xp.multiply(moment_1, beta1, out=new_1)
        xp.add(new_1, scratch, out=new_1)
        xp.multiply(grad, grad, out=scratch)
        xp.multiply(scratch, 1.0 - beta2, out=scratch)
        xp.multiply(moment_2, beta2, out=new_2)
        xp.add(new_2, scratch, out=new_2)
        xp.sqrt(new_2, out=scratch)
        xp.add(scratch, epsilon, out=scratch)
        if new_grad is None:
            xp.multiply(rate, correction, out=corrected_rate)
            xp.divide(new_1, scratch, out=scratch)
            xp.multiply(scratch, corrected_rate, out=scratch)
        else:
            xp.divide(new_1, scratch, out=new_grad)
            xp.multiply(new_grad, correction, out=new_grad)
            xp.multiply(new_grad, rate, out=scratch)
        xp.add(param, scratch, out=new_param)

    return quiet(xp, step)


no_gradient("Iter", "LearningRate")
should_not_do_gradient("MomentumSGD", "MomentumSGDUpdate", "Adagrad", "Adam")
