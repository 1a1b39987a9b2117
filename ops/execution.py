"""How operators run: the call that a binder sees, and nets that are compiled once and run many times.

A net runs in one of two ways, iteration by iteration:

* **Binding**: for each operator in turn, call its binder, run the step, then let the output blobs adopt their
  new buffers. A binder or step that fails leaves every blob as it was before that operator.
* **Bound**: run the steps of the last binding iteration, and nothing else. This is valid as long as no buffer
  that a step holds has been replaced. The environment counts replacements in its *binding epoch*; a net
  compares one integer per iteration.

Operators registered as *dynamic* are bound at each run also when the rest of the net is bound. If one of them
replaces a buffer, the remaining operators of that iteration run in binding mode.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from operator import length_hint
from typing import Any, Protocol

import numpy as np

from .definitions import NetDef, OperatorDef
from .dtypes import DType
from .errors import BlobspaceError, InternalError, InvalidInputError, NotFoundError
from .registry import REGISTRY, Implementation, Step
from .values import Array, Kind, check_plain


class Slot(Protocol):
    """A blob as execution sees it: a name and, at the moment, a value."""

    @property
    def name(self) -> str: ...
    @property
    def kind(self) -> Kind: ...
    @property
    def array(self) -> Array | None:
        """The tensor, for ``Kind.TENSOR``."""
        ...

    @property
    def value(self) -> Any:
        """The string tensor or the plain value, for ``Kind.STRINGS`` and ``Kind.VALUE``."""
        ...


class Allocation(Protocol):
    """A buffer that an output will adopt when its operator has succeeded."""

    @property
    def array(self) -> Array: ...


class Collectives(Protocol):
    """What operators that meet other workspaces need. Results do not depend on the order of arrival."""

    @property
    def size(self) -> int:
        """How many workspaces meet."""
        ...

    @property
    def rank(self) -> int:
        """This workspace's place among them, from 0."""
        ...

    @property
    def completed(self) -> int:
        """How many collectives have ended since :meth:`begin_iteration`."""
        ...

    def begin_iteration(self, iteration: int) -> None:
        """Say that the collectives to come belong to this iteration, counted alike by all members."""
        ...

    def allreduce(self, arrays: Sequence[Array]) -> list[Array]:
        """Return, for each array, the sum over all workspaces, added in the order of their ranks."""
        ...

    def broadcast(self, arrays: Sequence[Array], *, root: int) -> list[Array]:
        """Return the arrays of the workspace with rank ``root``."""
        ...


class Files(Protocol):
    """What operators that read and write files need."""

    def read(self, path: str) -> bytes: ...

    def write_atomically(self, path: str, parts: Iterator[bytes]) -> None:
        """Write a whole file or nothing: the old content of ``path`` stays until the new one is durable."""
        ...


class Environment(Protocol):
    """A workspace as execution sees it."""

    @property
    def name(self) -> str: ...
    @property
    def device_type(self) -> str: ...
    @property
    def xp(self) -> Any:
        """NumPy or CuPy."""
        ...

    @property
    def binding_epoch(self) -> int:
        """Raised whenever a blob's buffer is replaced, removed or may no longer be written."""
        ...

    @property
    def generator(self) -> np.random.Generator: ...
    @property
    def collectives(self) -> Collectives: ...
    @property
    def files(self) -> Files: ...
    def find(self, name: str) -> Slot | None: ...
    def create(self, name: str) -> Slot: ...
    def names(self, *, include_shared: bool) -> list[str]: ...
    def allocate(
        self, slot: Slot, shape: tuple[int, ...], dtype: DType, *, is_input: bool, operator: str
    ) -> Allocation: ...
    def adopt(self, slot: Slot, allocation: Any) -> None: ...
    def discard(self, allocation: Any) -> None: ...
    def store(self, slot: Slot, kind: Kind, value: Any) -> None: ...
    def touch(self, slots: Sequence[Slot]) -> None:
        """Raise the versions of blobs that bound steps have written."""
        ...


class OperatorCall:
    """What a binder is given: one operator, its arguments, its blobs in one workspace.

    Attributes:
        definition: The operator.
        arguments: Its arguments, converted, with defaults filled in.
        environment: The workspace.
        xp: NumPy or CuPy, for arithmetic on the workspace's device.
    """

    __slots__ = ("_inputs", "_outputs", "_pending", "arguments", "definition", "environment", "xp")

    def __init__(self, definition: OperatorDef, arguments: Mapping[str, Any], environment: Environment) -> None:
        self.definition = definition
        self.arguments = arguments
        self.environment = environment
        self.xp = environment.xp
        self._inputs = [self._existing(name) for name in definition.inputs]
        self._outputs = [environment.create(name) for name in definition.outputs]
        self._pending: dict[int, Allocation] = {}

    def _existing(self, name: str) -> Slot:
        slot = self.environment.find(name)
        if slot is None:
            raise NotFoundError(
                f"Operator {self.definition}: input blob {name!r} is not in workspace {self.environment.name!r}.",
                blob=name,
                workspace=self.environment.name,
                operator=self.definition.type,
            )
        return slot

    @property
    def input_count(self) -> int:
        """How many inputs the operator was given."""
        return len(self._inputs)

    @property
    def output_count(self) -> int:
        """How many outputs the operator was given."""
        return len(self._outputs)

    def input(self, index: int) -> Array:
        """Return input ``index`` as an array, which the step may keep and must not write to.

        Raises:
            InvalidInputError: The blob is uninitialised, or holds something other than a tensor.
        """
        slot = self._inputs[index]
        array = slot.array
        if array is None:
            raise InvalidInputError(
                f"Operator {self.definition}: input {index} (blob {slot.name!r}) should hold a tensor; "
                f"it is {_describe(slot)}.",
                blob=slot.name,
                operator=self.definition.type,
            )
        return array

    def value(self, index: int) -> Any:
        """Return whatever input ``index`` holds: an array, a string tensor, or a plain value.

        Raises:
            InvalidInputError: The blob is uninitialised.
        """
        slot = self._inputs[index]
        if slot.kind is Kind.UNINITIALIZED:
            raise InvalidInputError(
                f"Operator {self.definition}: input {index} (blob {slot.name!r}) is uninitialized.", blob=slot.name
            )
        return slot.array if slot.kind is Kind.TENSOR else slot.value

    def input_kind(self, index: int) -> Kind:
        """Return what input ``index`` holds."""
        return self._inputs[index].kind

    def integers(self, index: int) -> tuple[int, ...]:
        """Return input ``index``, a 0-d or 1-D integer tensor, as Python integers. For dynamic operators only."""
        array = self.input(index)
        if array.dtype.kind not in "iu" or array.ndim > 1:
            raise self.reject(f"input {index} must be a 1-D integer tensor; it is {shown(array)}")
        return tuple(int(item) for item in array.reshape(-1).tolist())

    def output(self, index: int, shape: Sequence[int], dtype: DType) -> Array:
        """Return an array for output ``index``, its content undefined.

        It is the blob's present buffer where that has the same shape and dtype and may be written; so it *is*
        the input array where the operator runs in place, unless a snapshot holds a lease on that buffer.
        """
        allocation = self.environment.allocate(
            self._outputs[index],
            tuple(int(size) for size in shape),
            np.dtype(dtype),
            is_input=self.definition.outputs[index] in self.definition.inputs,
            operator=str(self.definition),
        )
        self._pending[index] = allocation
        return allocation.array

    def set_strings(self, index: int, value: Array) -> None:
        """Store a string tensor (an object array of ``bytes``) in output ``index``. Call it from the step."""
        self.environment.store(self._outputs[index], Kind.STRINGS, value)

    def set_value(self, index: int, value: Any) -> None:
        """Store a plain value in output ``index``. Call it from the step."""
        check_plain(value, where=f"Operator {self.definition}: output {index} (blob {self._outputs[index].name!r})")
        self.environment.store(self._outputs[index], Kind.VALUE, value)

    def generator(self) -> np.random.Generator:
        """Return the source of random numbers. Call it from the step, at each run."""
        device = self.definition.device_option
        if device is not None and device.random_seed is not None:
            return np.random.default_rng(device.random_seed)
        return self.environment.generator

    def reject(self, reason: str, **fields: object) -> InvalidInputError:
        """Return the error to raise for unfitting inputs; ``reason`` says what was expected and what was found."""
        return InvalidInputError(
            f"Operator {self.definition}: {reason}.",
            operator=self.definition.type,
            workspace=self.environment.name,
            **fields,
        )

    def commit(self) -> None:
        """Let the output blobs adopt what the step has computed."""
        while self._pending:
            index, allocation = self._pending.popitem()
            self.environment.adopt(self._outputs[index], allocation)

    def abandon(self) -> None:
        """Give back what was allocated for outputs; the blobs stay as they were.

        A step that failed half-way may have written to a buffer that its blob still shows, so versions are raised.
        """
        self.environment.touch([self._outputs[index] for index in self._pending])
        while self._pending:
            self.environment.discard(self._pending.popitem()[1])


def shown(array: Array) -> str:
    """Return an array's dtype and shape for an error text: ``float32 (3, 4)``."""
    return f"{array.dtype} {tuple(array.shape)}"


def _describe(slot: Slot) -> str:
    if slot.kind is Kind.UNINITIALIZED:
        return "uninitialized (created, and never written)"
    if slot.kind is Kind.STRINGS:
        return "a string tensor"
    return f"a plain {type(slot.value).__name__}"


@dataclass(frozen=True, slots=True)
class CompiledOperator:
    """An operator whose schema, arguments and implementation have been looked up."""

    definition: OperatorDef
    arguments: Mapping[str, Any]
    implementation: Implementation

    def run(self, environment: Environment) -> Step:
        """Bind and run; return the step, which may be run again while the binding epoch stays the same."""
        call = OperatorCall(self.definition, self.arguments, environment)
        try:
            step = self.implementation.bind(call)
            step()
        except BaseException:
            call.abandon()
            raise
        call.commit()
        return step


def compile_operator(operator: OperatorDef, device_type: str) -> CompiledOperator:
    """Look an operator up and check it, for a workspace on ``device_type``.

    Raises:
        InvalidInputError: Unknown type or argument, wrong counts, or no implementation on the device.
    """
    arguments = REGISTRY.schema(operator.type).check(operator)
    requested = device_type if operator.device_option is None else operator.device_option.device_type
    if requested != device_type:
        raise InvalidInputError(
            f"Operator {operator} asks for the device {requested!r}, and its workspace is on {device_type!r}. "
            f"Run it in a workspace that is placed on {requested!r}.",
            operator=operator.type,
            device=requested,
        )
    return CompiledOperator(operator, arguments, REGISTRY.implementation(operator, requested))


@contextmanager
def operator_errors(compiled: CompiledOperator, where: str) -> Generator[None]:
    """Turn whatever an operator raises into a typed error that says where it happened."""
    try:
        yield
    except BlobspaceError as error:
        error.add_context(f"In {where}.")
        raise
    except MemoryError as error:
        raise InternalError(
            f"Operator {compiled.definition} ran out of the machine's memory: {error}. In {where}."
        ) from error
    except Exception as error:
        # An implementation, ours or a user's, failed on these inputs. What it raised must not cross the
        # process border as it is (it may not survive pickling), so its text travels instead.
        raise InvalidInputError(
            f"Operator {compiled.definition} failed: {type(error).__name__}: {error}. In {where}.",
            operator=compiled.definition.type,
            cause=type(error).__name__,
        ) from error


@dataclass(frozen=True, slots=True)
class _Segment:
    """A run of bound steps, then perhaps one dynamic operator."""

    first: int
    steps: tuple[Step, ...]
    dynamic: CompiledOperator | None


class CompiledNet:
    """A net that is ready to run in one workspace.

    Args:
        net: The definition.
        environment: The workspace.
        is_restored: The net comes from a checkpoint: blobs that were removed after it was created are no fault
            until it runs, and none is created.

    Raises:
        InvalidInputError: The net cannot run there; every fault of every operator is listed, and no blob has
            been created.
    """

    def __init__(self, net: NetDef, environment: Environment, *, is_restored: bool = False) -> None:
        self.net = net
        self._environment = environment
        self._operators = _compile_operators(net, environment, check_inputs=not is_restored)
        self.collective_count = sum(operator.implementation.is_collective for operator in self._operators)
        if not is_restored:
            for name in net.outputs:
                environment.create(name)
        self._segments: list[_Segment] = []
        self._written: list[Slot] = []
        self._bound_epoch = -1

    def run_iteration(self, iteration: int = 0) -> None:
        """Run every operator once, in order.

        Raises:
            BlobspaceError: An operator failed. Operators before it have run; its own blobs are as they were,
                except where a bound step had begun to write its outputs.
        """
        if self._bound_epoch == self._environment.binding_epoch:
            self._run_bound(iteration)
        else:
            self._run_binding(iteration)

    def _where(self, position: int, iteration: int) -> str:
        return (
            f"operator {position} of {len(self._operators)} of net {self.net.name!r}, iteration {iteration}, "
            f"workspace {self._environment.name!r}"
        )

    def _run_operator(self, position: int, iteration: int) -> Step:
        compiled = self._operators[position]
        with operator_errors(compiled, self._where(position, iteration)):
            return compiled.run(self._environment)

    def _run_binding(self, iteration: int) -> None:
        epoch = self._environment.binding_epoch
        self._bound_epoch = -1
        steps = [self._run_operator(position, iteration) for position in range(len(self._operators))]
        if self._environment.binding_epoch == epoch:
            self._bind(steps)
            self._bound_epoch = epoch

    def _bind(self, steps: list[Step]) -> None:
        self._segments = []
        written: dict[str, Slot] = {}
        first = 0
        for position, compiled in enumerate(self._operators):
            if compiled.implementation.is_dynamic(compiled.definition):
                self._segments.append(_Segment(first, tuple(steps[first:position]), compiled))
                first = position + 1
            else:
                for name in compiled.definition.outputs:
                    written[name] = self._environment.create(name)
        self._segments.append(_Segment(first, tuple(steps[first:]), None))
        self._written = list(written.values())

    def _run_bound(self, iteration: int) -> None:
        environment = self._environment
        try:
            for segment in self._segments:
                pending = iter(segment.steps)
                try:
                    for step in pending:
                        step()
                except BaseException:
                    # The iterator knows how far it came, so the loop above needs no counter.
                    position = segment.first + len(segment.steps) - length_hint(pending) - 1
                    with operator_errors(self._operators[position], self._where(position, iteration)):
                        raise
                if segment.dynamic is not None:
                    position = segment.first + len(segment.steps)
                    self._run_operator(position, iteration)
                    if environment.binding_epoch != self._bound_epoch:
                        self._bound_epoch = -1
                        for rest in range(position + 1, len(self._operators)):
                            self._run_operator(rest, iteration)
                        break
        finally:
            environment.touch(self._written)


def _compile_operators(net: NetDef, environment: Environment, *, check_inputs: bool) -> list[CompiledOperator]:
    operators: list[CompiledOperator] = []
    faults: list[str] = []
    written: set[str] = set()
    for position, definition in enumerate(net.operators):
        try:
            operators.append(compile_operator(definition, environment.device_type))
        except InvalidInputError as error:
            faults.append(f"operator {position}: {error}")
        faults.extend(
            f"operator {position}: {definition} reads blob {name!r}, which is neither in the workspace nor written "
            f"by an operator before it"
            for name in definition.inputs
            if check_inputs and name not in written and environment.find(name) is None
        )
        written.update(definition.outputs)
    if faults:
        lines = "\n".join(f"  - {fault}" for fault in faults)
        raise InvalidInputError(
            f"Net {net.name!r} cannot be created in workspace {environment.name!r}:\n{lines}",
            net=net.name,
            workspace=environment.name,
            faults=faults,
        )
    return operators
