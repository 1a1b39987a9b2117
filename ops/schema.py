"""Schemas: how many blobs an operator takes, which arguments, which outputs may overwrite which inputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from .definitions import OperatorDef
from .dtypes import parse_dtype
from .errors import InvalidInputError

UNBOUNDED = 2**31


class ArgType(str, Enum):
    """What an argument may be. Caffe2 reads bool arguments as integers and back, and so does blobspace."""

    INT = "int"
    FLOAT = "float"
    BOOL = "bool"
    STRING = "string"
    INTS = "ints"
    FLOATS = "floats"
    STRINGS = "strings"
    DTYPE = "dtype"
    ANY = "any"


@dataclass(frozen=True, slots=True, kw_only=True)
class Argument:
    """One argument of an operator.

    Attributes:
        name: As Caffe2 has it.
        type: What it may be.
        default: Used when it is not given; None means "not given" to the implementation.
        required: Refuse the operator without it.
        doc: One line.
    """

    name: str
    type: ArgType
    default: Any = None
    required: bool = False
    doc: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class OperatorSchema:
    """The contract of one operator type.

    Attributes:
        type: The operator type.
        doc: One or more sentences, the first one says what it computes.
        inputs: Least and greatest number of inputs.
        outputs: Least and greatest number of outputs.
        input_names: What each input is, with its shape; the last one repeats if there are more inputs.
        output_names: Likewise for outputs.
        arguments: Accepted arguments; any other is refused.
        in_place: Pairs ``(input, output)`` that may be the same blob.
        enforced_in_place: Pairs that must be the same blob.
        in_place_any: Any output may be any input.
        accepts_any_arguments: Do not refuse unknown arguments (gradient operators inherit their forward
            operator's arguments, and not all are theirs).
        accepts_uninitialized: The operator does not read its inputs' values before writing them.
    """

    type: str
    doc: str
    inputs: tuple[int, int]
    outputs: tuple[int, int]
    input_names: tuple[str, ...] = ()
    output_names: tuple[str, ...] = ()
    arguments: tuple[Argument, ...] = ()
    in_place: frozenset[tuple[int, int]] = frozenset()
    enforced_in_place: frozenset[tuple[int, int]] = frozenset()
    in_place_any: bool = False
    accepts_any_arguments: bool = False
    accepts_uninitialized: bool = False

    def check(self, operator: OperatorDef) -> Mapping[str, Any]:
        """Check an operator against this schema.

        Returns:
            Its arguments with types converted and defaults filled in.

        Raises:
            InvalidInputError: It does not fit; every fault is listed.
        """
        faults = [*self._count_faults(operator), *self._in_place_faults(operator)]
        arguments: dict[str, Any] = {argument.name: argument.default for argument in self.arguments}
        known = {argument.name: argument for argument in self.arguments}
        for name, value in operator.args.items():
            if name not in known:
                if not self.accepts_any_arguments:
                    faults.append(f"unknown argument {name!r} (expected: {', '.join(sorted(known)) or 'none'})")
                continue
            try:
                arguments[name] = _convert(known[name].type, value)
            except (ValueError, TypeError) as error:
                faults.append(f"argument {name!r}: {error}")
        faults.extend(
            f"missing argument {argument.name!r}"
            for argument in self.arguments
            if argument.required and argument.name not in operator.args
        )
        if faults:
            raise InvalidInputError(
                f"Operator {operator} does not fit its schema: {'; '.join(faults)}.",
                operator=operator.type,
                faults=faults,
            )
        return arguments

    def _count_faults(self, operator: OperatorDef) -> list[str]:
        faults: list[str] = []
        for what, (least, most), found in (
            ("input", self.inputs, len(operator.inputs)),
            ("output", self.outputs, len(operator.outputs)),
        ):
            if not least <= found <= most:
                if most == UNBOUNDED:
                    expected = f"at least {least}"
                elif least == most:
                    expected = str(least)
                else:
                    expected = f"{least} to {most}"
                faults.append(f"expected {expected} {what}(s), found {found}")
        return faults

    def _in_place_faults(self, operator: OperatorDef) -> list[str]:
        faults: list[str] = []
        for position, output in enumerate(operator.outputs):
            if output in operator.outputs[:position]:
                faults.append(f"output {output!r} is given twice")
            for source, name in enumerate(operator.inputs):
                pair = (source, position)
                allowed = self.in_place_any or pair in self.in_place or pair in self.enforced_in_place
                if name == output and not allowed:
                    faults.append(f"output {position} ({output!r}) may not overwrite input {source}")
        for source, position in self.enforced_in_place:
            if source < len(operator.inputs) and position < len(operator.outputs):
                name, output = operator.inputs[source], operator.outputs[position]
                if name != output:
                    faults.append(f"output {position} must be input {source}: expected {name!r}, found {output!r}")
        return faults


def _convert(kind: ArgType, value: Any) -> Any:
    match kind:
        case ArgType.ANY:
            return value
        case ArgType.DTYPE:
            return parse_dtype(value)
        case ArgType.INT:
            return _integer(value)
        case ArgType.BOOL:
            return bool(_integer(value))
        case ArgType.FLOAT:
            return _float(value)
        case ArgType.STRING:
            return _string(value)
        case ArgType.INTS:
            return tuple(_integer(item) for item in _list(value))
        case ArgType.FLOATS:
            return tuple(_float(item) for item in _list(value))
        case ArgType.STRINGS:
            return tuple(_string(item) for item in _list(value))


def _integer(value: Any) -> int:
    if not isinstance(value, int):
        raise TypeError(f"expected an integer, found {type(value).__name__} {value!r:.80}")
    return int(value)


def _float(value: Any) -> float:
    if not isinstance(value, (int, float)):
        raise TypeError(f"expected a number, found {type(value).__name__} {value!r:.80}")
    return float(value)


def _string(value: Any) -> str:
    if isinstance(value, bytes):
        return value.decode("utf-8")
    if not isinstance(value, str):
        raise TypeError(f"expected text, found {type(value).__name__} {value!r:.80}")
    return value


def _list(value: Any) -> list[Any]:
    if not isinstance(value, (list, tuple)):
        raise TypeError(f"expected a list, found {type(value).__name__} {value!r:.80}")
    return list(value)
