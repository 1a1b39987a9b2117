"""The registry: operator type and device → implementation, with its schema and its gradient.

An implementation is a **binder**. It is called with an :class:`~blobspace.ops.execution.OperatorCall`, checks
shapes and dtypes, asks for its outputs, and returns a **step**: a function without arguments that computes.
A net binds its operators once and runs the steps again and again; binding happens anew only when a buffer
that the net is bound to has changed. So checks are paid once, and a step costs what NumPy costs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from enum import Enum
from typing import TYPE_CHECKING, Any, TypeAlias

from .definitions import CPU, CUDA, GradientSlice, OperatorDef
from .errors import ConflictError, InvalidInputError
from .schema import OperatorSchema

if TYPE_CHECKING:
    from .execution import OperatorCall

Step: TypeAlias = Callable[[], object]
Binder: TypeAlias = "Callable[[OperatorCall], Step]"
Gradient: TypeAlias = "str | GradientSlice"
Dynamic: TypeAlias = bool | Callable[[OperatorDef], bool]


@dataclass(frozen=True, slots=True)
class Implementation:
    """One operator on one device.

    Attributes:
        bind: The binder.
        dynamic: The step depends on the *values* of inputs (a shape given as a tensor, say), on the time of the
            run, or on names in the workspace; it is bound anew at each run. A function of the definition where
            only some uses of the operator are so.
        is_collective: The step waits for other workspaces.
    """

    bind: Binder
    dynamic: Dynamic = False
    is_collective: bool = False

    def is_dynamic(self, operator: OperatorDef) -> bool:
        """Whether this use of the operator is to be bound at each run."""
        return self.dynamic(operator) if callable(self.dynamic) else self.dynamic


class GradientPolicy(str, Enum):
    """What happens when a gradient flows into an operator. Source: Caffe2's gradient registrations."""

    MAKER = "maker"
    NO_GRADIENT = "no_gradient"
    SHOULD_NOT = "should_not"
    NOT_IMPLEMENTED_YET = "not_implemented_yet"


@dataclass(frozen=True, slots=True, kw_only=True)
class GradientCall:
    """What a gradient maker is given.

    Attributes:
        operator: The forward operator.
        output_gradients: For each output the name of its gradient, or None where no gradient flows.
    """

    operator: OperatorDef
    output_gradients: tuple[Gradient | None, ...]

    def input(self, index: int) -> str:
        """Name of a forward input."""
        return self.operator.inputs[index]

    def output(self, index: int) -> str:
        """Name of a forward output."""
        return self.operator.outputs[index]

    def given(self, index: int) -> str:
        """Name of the gradient of output ``index``, which must be there and dense.

        Raises:
            InvalidInputError: It is not.
        """
        gradient = self.output_gradients[index]
        if not isinstance(gradient, str):
            found = "no gradient" if gradient is None else "a sparse gradient"
            raise InvalidInputError(
                f"The gradient of {self.operator} needs a dense gradient of output {index} "
                f"({self.output(index)!r}); found {found}.",
                operator=self.operator.type,
            )
        return gradient

    def name(self, index: int) -> str:
        """Name that the gradient of input ``index`` gets: ``X_grad``."""
        return f"{self.operator.inputs[index]}_grad"

    def slice_name(self, index: int) -> GradientSlice:
        """Names that a sparse gradient of input ``index`` gets."""
        base = self.operator.inputs[index]
        return GradientSlice(indices=f"{base}_grad_indices", values=f"{base}_grad_values")


@dataclass(frozen=True, slots=True)
class GradientResult:
    """What a gradient maker returns: operators to append, and each input's gradient (None: none)."""

    operators: tuple[OperatorDef, ...]
    input_gradients: tuple[Gradient | None, ...]


GradientMaker: TypeAlias = Callable[[GradientCall], GradientResult]


@dataclass(slots=True)
class Registry:
    """Schemas, implementations and gradients by operator type. One instance serves a process."""

    schemas: dict[str, OperatorSchema] = field(default_factory=dict[str, OperatorSchema])
    implementations: dict[tuple[str, str], Implementation] = field(
        default_factory=dict[tuple[str, str], Implementation]
    )
    gradients: dict[str, GradientPolicy] = field(default_factory=dict[str, GradientPolicy])
    makers: dict[str, GradientMaker] = field(default_factory=dict[str, GradientMaker])

    def schema(self, type: str) -> OperatorSchema:  # noqa: A002  (Caffe2's word)
        """Return the schema of an operator type.

        Raises:
            InvalidInputError: The type is unknown; the nearest known types are named.
        """
        schema = self.schemas.get(type)
        if schema is None:
            near = get_close_matches(type, self.schemas, n=3)
            hint = f" Did you mean {' or '.join(near)}?" if near else ""
            raise InvalidInputError(
                f"Unknown operator {type!r}.{hint} blobspace has {len(self.schemas)} operators; "
                f"blobspace.ops.operator_types() lists them.",
                operator=type,
            )
        return schema

    def implementation(self, operator: OperatorDef, device_type: str) -> Implementation:
        """Return the implementation of an operator on a device.

        Raises:
            InvalidInputError: There is none on that device.
        """
        found = self.implementations.get((operator.type, device_type))
        if found is None:
            devices = [device for type_, device in self.implementations if type_ == operator.type]
            raise InvalidInputError(
                f"Operator {operator} cannot be created on the device {device_type!r}; it is registered for "
                f"{', '.join(devices) or 'no device'}.",
                operator=operator.type,
                device=device_type,
            )
        return found


REGISTRY = Registry()


def register_schema(schema: OperatorSchema) -> OperatorSchema:
    """Make an operator type known.

    Raises:
        ConflictError: The type is known already, with another schema.
    """
    known = REGISTRY.schemas.get(schema.type)
    if known is not None and known != schema:
        raise ConflictError(
            f"Operator {schema.type!r} is registered already, with another schema. Give your operator another name.",
            operator=schema.type,
        )
    REGISTRY.schemas[schema.type] = schema
    return schema


def _register(
    schema: OperatorSchema | str, devices: Mapping[str, None], *, dynamic: Dynamic, is_collective: bool
) -> Callable[[Binder], Binder]:
    if isinstance(schema, OperatorSchema):
        register_schema(schema)
        type_ = schema.type
    else:
        type_ = REGISTRY.schema(schema).type

    def register(bind: Binder) -> Binder:
        for device in devices:
            REGISTRY.implementations[type_, device] = Implementation(bind, dynamic, is_collective)
        return bind

    return register


def register_operator(
    schema: OperatorSchema | str, *, dynamic: Dynamic = False, is_collective: bool = False
) -> Callable[[Binder], Binder]:
    """Decorate a binder that serves both devices through ``call.xp`` (NumPy or CuPy)."""
    return _register(schema, {CPU: None, CUDA: None}, dynamic=dynamic, is_collective=is_collective)


def register_cpu_operator(
    schema: OperatorSchema | str, *, dynamic: Dynamic = False, is_collective: bool = False
) -> Callable[[Binder], Binder]:
    """Decorate a binder that serves the CPU. ``schema`` is a schema, or the type of one registered before."""
    return _register(schema, {CPU: None}, dynamic=dynamic, is_collective=is_collective)


def register_cuda_operator(
    schema: OperatorSchema | str, *, dynamic: Dynamic = False, is_collective: bool = False
) -> Callable[[Binder], Binder]:
    """Decorate a binder that serves CUDA. ``schema`` is a schema, or the type of one registered before."""
    return _register(schema, {CUDA: None}, dynamic=dynamic, is_collective=is_collective)


def register_gradient(type: str) -> Callable[[GradientMaker], GradientMaker]:  # noqa: A002  (Caffe2's word)
    """Decorate the gradient maker of an operator type."""

    def register(maker: GradientMaker) -> GradientMaker:
        REGISTRY.gradients[type] = GradientPolicy.MAKER
        REGISTRY.makers[type] = maker
        return maker

    return register


def no_gradient(*types: str) -> None:
    """Declare that a gradient stops silently at these operators (fills, Iter, Load)."""
    REGISTRY.gradients.update((type_, GradientPolicy.NO_GRADIENT) for type_ in types)


def should_not_do_gradient(*types: str) -> None:
    """Declare that asking for a gradient through these operators is a mistake, and is refused."""
    REGISTRY.gradients.update((type_, GradientPolicy.SHOULD_NOT) for type_ in types)


def gradient_not_implemented_yet(*types: str) -> None:
    """Declare that these operators have a gradient which nobody has written yet; asking for it is refused."""
    REGISTRY.gradients.update((type_, GradientPolicy.NOT_IMPLEMENTED_YET) for type_ in types)


def operator_types() -> list[str]:
    """Return every known operator type, sorted."""
    return sorted(REGISTRY.schemas)


def documentation(type: str) -> dict[str, Any]:  # noqa: A002  (Caffe2's word)
    """Return an operator's schema as a plain value: inputs, outputs, arguments, devices, gradient."""
    schema = REGISTRY.schema(type)
    return {
        "type": schema.type,
        "doc": schema.doc,
        "inputs": list(schema.input_names),
        "outputs": list(schema.output_names),
        "arguments": {
            argument.name: {"type": argument.type.value, "required": argument.required, "doc": argument.doc}
            for argument in schema.arguments
        },
        "devices": [device for type_, device in REGISTRY.implementations if type_ == type],
        "gradient": REGISTRY.gradients[type].value if type in REGISTRY.gradients else None,
    }
