"""Building nets: a list of operators that grows call by call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from .definitions import NetDef, OperatorDef, operator_def
from .registry import REGISTRY


class Net:
    """A net under construction.

    Operators are added by :meth:`add`, or by a method of their own name as in Caffe2:
    ``net.FC(["x", "w", "b"], "y")``.

    Args:
        name: The net's name within a workspace.

    Example:
        >>> net = Net("double")
        >>> net.Add(["x", "x"], "y")
        'y'
        >>> net.definition().external_inputs
        ('x',)
    """

    def __init__(self, name: str, operators: Sequence[OperatorDef] = ()) -> None:
        self._name = NetDef(name=name).name
        self._operators = list(operators)

    @property
    def name(self) -> str:
        """The net's name."""
        return self._name

    @property
    def operators(self) -> tuple[OperatorDef, ...]:
        """The operators added so far."""
        return tuple(self._operators)

    def add(
        self,
        type: str | OperatorDef,  # noqa: A002  (Caffe2's word)
        inputs: Sequence[str] = (),
        outputs: Sequence[str] = (),
        **args: Any,
    ) -> OperatorDef:
        """Append an operator and return it.

        Args:
            type: An operator type, or a finished :class:`OperatorDef`.
            inputs: Blob names.
            outputs: Blob names.
            **args: The operator's arguments; also ``device_option`` and ``name``.

        Raises:
            InvalidInputError: The operator does not fit its schema; the net is unchanged.
        """
        operator = operator_def(type, inputs, outputs, **args)
        REGISTRY.schema(operator.type).check(operator)
        self._operators.append(operator)
        return operator

    def extend(self, operators: Sequence[OperatorDef]) -> None:
        """Append finished operators, all of them or, if one does not fit its schema, none."""
        for operator in operators:
            REGISTRY.schema(operator.type).check(operator)
        self._operators.extend(operators)

    def definition(self) -> NetDef:
        """Return the net as it stands, frozen."""
        return NetDef(name=self._name, operators=tuple(self._operators))

    def __getattr__(self, type: str) -> Callable[..., Any]:  # noqa: A002  (Caffe2's word)
        if type.startswith("_") or type not in REGISTRY.schemas:
            if type[:1].isupper():
                REGISTRY.schema(type)  # raises, and names the operators that are near
            raise AttributeError(f"{self.__class__.__name__!r} object has no attribute {type!r}")

        def add(inputs: Sequence[str] | str = (), outputs: Sequence[str] | str = (), **args: Any) -> Any:
            operator = self.add(type, inputs, outputs, **args)
            return operator.outputs[0] if len(operator.outputs) == 1 else operator.outputs

        return add

    def __repr__(self) -> str:
        return f"Net({self._name!r}, {len(self._operators)} operators)"
