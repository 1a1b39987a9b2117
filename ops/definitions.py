"""What a user asks for, as frozen values: device options, operators, nets. Nothing here can run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from .dtypes import parse_dtype
from .errors import InvalidInputError
from .values import check_name, check_plain

CPU = "cpu"
CUDA = "cuda"
DEVICE_TYPES = (CPU, CUDA)


class GradientSlice(NamedTuple):
    """The gradient of a tensor of which only some rows were used: blob names of row indices and row values."""

    indices: str
    values: str


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceOption:
    """A request for a device. What was granted to a workspace is its placement.

    Attributes:
        device_type: ``"cpu"`` or ``"cuda"``.
        random_seed: If given, operators that draw random numbers start from this seed at every run instead of
            using the workspace's generator (Caffe2's ``DeviceOption.random_seed``).
    """

    device_type: str = CPU
    random_seed: int | None = None

    def __post_init__(self) -> None:
        if self.device_type not in DEVICE_TYPES:
            raise InvalidInputError(
                f"Unknown device type {self.device_type!r}. Expected one of {', '.join(DEVICE_TYPES)}.",
                found=self.device_type,
            )
        seed = self.random_seed
        if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**64):
            raise InvalidInputError(f"A random seed is an integer from 0 to 2**64 - 1, or None; found {seed!r:.80}.")


@dataclass(frozen=True, slots=True, kw_only=True)
class OperatorDef:
    """One operator to run: its type, the blobs it reads and writes, and its arguments.

    Attributes:
        type: Registered operator type, such as ``"FC"``.
        inputs: Blob names, in the order of the operator's schema.
        outputs: Blob names, likewise.
        args: Arguments by name; plain values, NumPy scalars and dtypes are converted.
        device_option: Where to run; None means where the workspace is.
        name: Free text for people; shown in error messages.
        is_gradient_op: Made by a gradient maker.
    """

    type: str
    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    args: Mapping[str, Any] = field(default_factory=dict[str, Any])
    device_option: DeviceOption | None = None
    name: str = ""
    is_gradient_op: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.type, str) or not self.type:
            raise InvalidInputError(f"An operator type is a non-empty str; found {self.type!r:.80}.")
        for what, names in (("input", self.inputs), ("output", self.outputs)):
            if isinstance(names, str):
                raise InvalidInputError(
                    f"Operator {self.type}: the {what}s must be a list of blob names; found the str {names!r:.80}. "
                    f"Write [{names!r:.80}]."
                )
        if not isinstance(self.name, str):
            raise InvalidInputError(f"Operator {self.type}: its name is text for people; found {self.name!r:.80}.")
        check_plain([self.type, self.name], where=f"Operator {self.type!r}")
        object.__setattr__(self, "inputs", tuple(check_name(name) for name in self.inputs))
        object.__setattr__(self, "outputs", tuple(check_name(name) for name in self.outputs))
        object.__setattr__(self, "args", {key: _plain_argument(self.type, key, self.args[key]) for key in self.args})

    def to_plain(self) -> dict[str, Any]:
        """Return the definition as a plain value, for a checkpoint; :meth:`from_plain` reads it back."""
        return {
            "type": self.type,
            "inputs": list(self.inputs),
            "outputs": list(self.outputs),
            "args": deepcopy(dict(self.args)),
            "device": None if self.device_option is None else self.device_option.device_type,
            "random_seed": None if self.device_option is None else self.device_option.random_seed,
            "name": self.name,
            "is_gradient_op": self.is_gradient_op,
        }

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> OperatorDef:
        """Rebuild a definition from :meth:`to_plain`.

        Raises:
            InvalidInputError: A field is missing or wrong.
        """
        try:
            device = plain["device"]
            return cls(
                type=plain["type"],
                inputs=tuple(plain["inputs"]),
                outputs=tuple(plain["outputs"]),
                args=dict(plain["args"]),
                device_option=None
                if device is None
                else DeviceOption(device_type=device, random_seed=plain["random_seed"]),
                name=plain["name"],
                is_gradient_op=bool(plain["is_gradient_op"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise InvalidInputError(f"Not an operator definition: {error!r}.") from error

    def __str__(self) -> str:
        label = f"{self.type} ({self.name})" if self.name else self.type
        return f"{label}({', '.join(self.inputs)}) -> {', '.join(self.outputs) or 'nothing'}"


def _plain_argument(operator: str, key: object, value: Any) -> Any:
    if not isinstance(key, str) or not key:
        raise InvalidInputError(f"Operator {operator}: an argument name is a non-empty str; found {key!r:.80}.")
    if isinstance(value, np.generic):
        value = value.item()
    elif isinstance(value, np.ndarray):
        value = value.tolist()
    elif isinstance(value, (tuple, range)):
        value = list(value)
    elif isinstance(value, (np.dtype, type)):
        try:
            value = parse_dtype(value).name
        except InvalidInputError:
            raise InvalidInputError(
                f"Operator {operator}: argument {key!r} is the type {value!r}; the only types that an argument can "
                f"name are element types such as numpy.float32.",
                operator=operator,
                argument=key,
            ) from None
    if isinstance(value, list):
        value = [item.item() if isinstance(item, np.generic) else item for item in value]
    check_plain(value, where=f"Operator {operator}: argument {key!r}")
    return deepcopy(value)  # the caller may go on to change a list or dict of its own


@dataclass(frozen=True, slots=True, kw_only=True)
class NetDef:
    """A list of operators that run in order, under a name.

    Attributes:
        name: The net's name within a workspace.
        operators: In order of execution.
    """

    name: str
    operators: tuple[OperatorDef, ...] = ()

    def __post_init__(self) -> None:
        check_name(self.name, "net")
        object.__setattr__(self, "operators", tuple(self.operators))
        for operator in self.operators:
            if not isinstance(operator, OperatorDef):
                raise InvalidInputError(
                    f"Net {self.name!r}: expected OperatorDef values, found {type(operator).__name__}."
                )

    @property
    def external_inputs(self) -> tuple[str, ...]:
        """Blobs that the net reads before any of its operators writes them, in order of first use."""
        written: set[str] = set()
        external: dict[str, None] = {}
        for operator in self.operators:
            external.update((name, None) for name in operator.inputs if name not in written)
            written.update(operator.outputs)
        return tuple(external)

    @property
    def outputs(self) -> tuple[str, ...]:
        """Every blob that the net writes, in order of first write."""
        return tuple(dict.fromkeys(name for operator in self.operators for name in operator.outputs))

    def to_plain(self) -> dict[str, Any]:
        """Return the net as a plain value, for a checkpoint; :meth:`from_plain` reads it back."""
        return {"name": self.name, "operators": [operator.to_plain() for operator in self.operators]}

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> NetDef:
        """Rebuild a net from :meth:`to_plain`.

        Raises:
            InvalidInputError: A field is missing or wrong.
        """
        try:
            return cls(
                name=plain["name"],
                operators=tuple(OperatorDef.from_plain(operator) for operator in plain["operators"]),
            )
        except (KeyError, TypeError) as error:
            raise InvalidInputError(f"Not a net definition: {error!r}.") from error


def operator_def(
    type: str | OperatorDef,  # noqa: A002  (Caffe2's word)
    inputs: Sequence[str] = (),
    outputs: Sequence[str] = (),
    *,
    device_option: DeviceOption | None = None,
    name: str = "",
    **args: Any,
) -> OperatorDef:
    """Build an :class:`OperatorDef` as Caffe2's ``CreateOperator`` does: arguments by keyword.

    Passing a finished :class:`OperatorDef` returns it, so that every call that runs an operator takes both forms.
    """
    if isinstance(type, OperatorDef):
        if inputs or outputs or args or device_option or name:
            raise InvalidInputError(
                f"Operator {type.type}: given as a finished OperatorDef and again in parts. Pass one of the two."
            )
        return type
    return OperatorDef(
        type=type,
        inputs=_names(type, "input", inputs),
        outputs=_names(type, "output", outputs),
        args=args,
        device_option=device_option,
        name=name,
    )


def _names(operator: str, what: str, names: Sequence[str] | str) -> tuple[str, ...]:
    # One blob may be given by its bare name, as in Caffe2's net.Relu("x", "y").
    if isinstance(names, str):
        return (names,)
    try:
        return tuple(names)
    except TypeError:
        raise InvalidInputError(
            f"Operator {operator}: the {what}s must be a list of blob names; found {names!r:.80}."
        ) from None
