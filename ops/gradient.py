"""The backward pass: one operator's gradient, and a whole net's, with Caffe2's blob names.

Source: the behaviour of Caffe2's ``AddGradientOperators``. Blob names are not enough to tell what a gradient
belongs to, because operators overwrite blobs; so the forward net is numbered in static single assignment form
(each write of a blob gives it a new version), and every blob that a gradient operator reads is checked to be
still at the version which it was differentiated at.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from .definitions import GradientSlice, OperatorDef
from .errors import InvalidInputError
from .net import Net
from .registry import REGISTRY, Gradient, GradientCall, GradientPolicy, GradientResult


def gradient_operators(
    operator: OperatorDef, output_gradients: Mapping[str, Gradient]
) -> tuple[list[OperatorDef], dict[str, Gradient]]:
    """Return the operators that compute one operator's gradient.

    Args:
        operator: The forward operator.
        output_gradients: The gradient's blob name for each output that has one.

    Returns:
        The operators, and for each input that gets a gradient its name (a pair of names if it is sparse).

    Raises:
        InvalidInputError: The operator has no gradient, or asking for it is a mistake.
    """
    result = _differentiate(operator, tuple(output_gradients.get(name) for name in operator.outputs))
    gradients = {
        name: gradient
        for name, gradient in zip(operator.inputs, result.input_gradients, strict=True)
        if gradient is not None
    }
    return list(result.operators), gradients


def _differentiate(operator: OperatorDef, output_gradients: tuple[Gradient | None, ...]) -> GradientResult:
    REGISTRY.schema(operator.type)
    policy = REGISTRY.gradients.get(operator.type)
    if policy is GradientPolicy.SHOULD_NOT:
        raise InvalidInputError(f"One should not call gradient for operator {operator.type}. In: {operator}.")
    if policy is GradientPolicy.NOT_IMPLEMENTED_YET:
        raise InvalidInputError(
            f"Operator {operator.type} should have a gradient but is not implemented yet. In: {operator}."
        )
    if policy is None:
        raise InvalidInputError(
            f"Operator {operator.type} has no gradient registered, and a gradient flows into it: {operator}. Register "
            f"one with register_gradient({operator.type!r}), or cut the path with StopGradient."
        )
    if policy is GradientPolicy.NO_GRADIENT:
        return GradientResult((), (None,) * len(operator.inputs))
    result = REGISTRY.makers[operator.type](GradientCall(operator=operator, output_gradients=output_gradients))
    made = tuple(
        replace(
            made,
            device_option=made.device_option or operator.device_option,
            args=made.args or operator.args,
            is_gradient_op=True,
        )
        for made in result.operators
    )
    missing = len(operator.inputs) - len(result.input_gradients)
    return GradientResult(made, result.input_gradients + (None,) * missing)


def add_gradient_operators(
    net: Net, ys: Sequence[str] | Mapping[str, str | None], skip: int = 0
) -> dict[str, Gradient]:
    """Append a net's backward pass to it.

    Args:
        net: The forward net; it grows.
        ys: Blobs to differentiate. As a list, each one's own gradient starts at 1 (a ``ConstantFill`` named
            ``Y_autogen_grad``); as a mapping, it starts at the blob named, or at 1 for None.
        skip: How many operators at the end of the net to leave out.

    Returns:
        The gradient's blob name for every blob on the path: a str, or a :class:`GradientSlice` if it is sparse.

    Raises:
        InvalidInputError: The net cannot be differentiated; it is unchanged.
    """
    if isinstance(ys, str) or not isinstance(ys, (Sequence, Mapping)):
        raise InvalidInputError(f"ys should be a list or a dict of blob names; found {ys!r:.80}.")
    if skip < 0:
        raise InvalidInputError(f"skip is a count of operators, at least 0; found {skip}.")
    starts = dict(ys) if isinstance(ys, Mapping) else dict.fromkeys(ys)
    backward = _BackwardPass(net.operators)
    gradients = backward.run(starts, skip)
    net.extend(backward.operators)
    return gradients


@dataclass(frozen=True, slots=True)
class _Numbered:
    """A forward operator with the versions of what it reads and writes."""

    operator: OperatorDef
    read: Mapping[str, int]
    written: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class _Writer:
    """Where a dense gradient, or one half of a sparse one, is written: an output of a gradient operator."""

    position: int
    output: int


@dataclass(frozen=True, slots=True)
class _Source:
    """One contribution to the gradient of one version of a blob.

    ``writers`` has one entry for a dense gradient and two (indices, values) for a sparse one; None stands for a
    gradient that is passed on from an output without an operator of its own.
    """

    gradient: Gradient
    writers: tuple[_Writer | None, ...]
    forward: OperatorDef


class _BackwardPass:
    def __init__(self, forward: Sequence[OperatorDef]) -> None:
        self.operators: list[OperatorDef] = []
        self._frontier: dict[str, int] = defaultdict(int)
        self._gradient_frontier: dict[str, int] = {}
        self._users: dict[tuple[str, int], list[int]] = defaultdict(list)
        self._sources: dict[tuple[str, int], list[_Source]] = defaultdict(list)
        self._forward = [self._number(position, operator) for position, operator in enumerate(forward)]

    def _number(self, position: int, operator: OperatorDef) -> _Numbered:
        read = {name: self._frontier[name] for name in operator.inputs}
        for name in operator.inputs:
            self._users[name, read[name]].append(position)
        written: dict[str, int] = {}
        for name in operator.outputs:
            # A blob's first write counts from 0 unless it was read before (then version 0 came from outside).
            seen = name in self._frontier
            self._frontier[name] = self._frontier[name] + 1 if seen else 0
            written[name] = self._frontier[name]
        return _Numbered(operator, read, written)

    def run(self, starts: Mapping[str, str | None], skip: int) -> dict[str, Gradient]:
        gradients: dict[str, Gradient | None] = {}
        for name, given in starts.items():
            version = self._frontier[name]
            gradients[name] = given if given is not None else self._start_at_one(name, version)
            self._gradient_frontier[name] = version
            self._users[name, version].append(len(self._forward))
        for position in reversed(range(len(self._forward) - skip)):
            gradients.update(self._visit(position, gradients))
            gradients.update(self._accumulate(position))
        return {name: gradient for name, gradient in gradients.items() if gradient is not None}

    def _start_at_one(self, name: str, version: int) -> str:
        fill = OperatorDef(type="ConstantFill", inputs=(name,), outputs=(f"{name}_autogen_grad",), args={"value": 1.0})
        self.operators.append(fill)
        writer = _Writer(len(self.operators) - 1, 0)
        self._sources[name, version].append(_Source(fill.outputs[0], (writer,), fill))
        return fill.outputs[0]

    def _visit(self, position: int, gradients: Mapping[str, Gradient | None]) -> dict[str, Gradient | None]:
        numbered = self._forward[position]
        operator = numbered.operator
        given = tuple(gradients.get(name) for name in operator.outputs)
        if all(gradient is None for gradient in given):
            return {}
        result = _differentiate(operator, given)
        self._record(numbered, given, result)
        found: dict[str, Gradient | None] = {}
        for name, gradient in zip(operator.inputs, result.input_gradients, strict=True):
            # No gradient does not hide an earlier one, unless the operator overwrites the blob.
            if gradient is not None or name not in gradients or name in operator.outputs:
                found[name] = gradient
        return found

    def _record(self, numbered: _Numbered, given: tuple[Gradient | None, ...], result: GradientResult) -> None:
        forward = numbered.operator
        made: set[str] = set()
        dense: list[tuple[str, _Source]] = []
        halves: dict[str, dict[str, _Writer]] = defaultdict(dict)
        for operator in result.operators:
            position = len(self.operators)
            for name in operator.inputs:
                self._check_readable(name, numbered, given, made)
            self.operators.append(operator)
            made.update(operator.outputs)
            for output, name in enumerate(operator.outputs):
                for source, gradient in zip(forward.inputs, result.input_gradients, strict=True):
                    if isinstance(gradient, GradientSlice):
                        if name in gradient:
                            half = "indices" if name == gradient.indices else "values"
                            halves[source][half] = _Writer(position, output)
                            break
                    elif gradient == name:
                        dense.append((source, _Source(name, (_Writer(position, output),), forward)))
                        break
        for source, record in dense:
            self._sources[source, numbered.read[source]].append(record)
        passed: set[str] = set()
        for source, gradient in zip(forward.inputs, result.input_gradients, strict=True):
            if gradient is None:
                continue
            key = (source, numbered.read[source])
            self._gradient_frontier[source] = numbered.read[source]
            if isinstance(gradient, GradientSlice):
                if source not in passed:
                    passed.add(source)
                    pair = halves[source]
                    writers = (pair.get("indices"), pair.get("values"))
                    self._sources[key].append(_Source(gradient, writers, forward))
            elif gradient not in made:
                self._sources[key].append(_Source(gradient, (None,), forward))

    def _check_readable(
        self, name: str, numbered: _Numbered, given: tuple[Gradient | None, ...], made: set[str]
    ) -> None:
        forward = numbered.operator
        for output, gradient in zip(forward.outputs, given, strict=True):
            if name == gradient or (isinstance(gradient, GradientSlice) and name in gradient):
                self._check_version(
                    f'Gradient "{name}" belongs to "{output}"',
                    numbered.written[output],
                    self._gradient_frontier[output],
                    forward,
                )
                return
        for role, versions in (("output", numbered.written), ("input", numbered.read)):
            if name in versions:
                self._check_version(
                    f'Gradient operator needs {role} "{name}"', versions[name], self._frontier[name], forward
                )
                return
        if name not in made:
            raise InvalidInputError(
                f'The gradient of {forward} reads "{name}", which is neither an input or output of the operator, nor '
                f"a gradient of an output, nor made by the gradient itself.",
                operator=forward.type,
                blob=name,
            )

    def _check_version(self, text: str, needed: int, current: int, forward: OperatorDef) -> None:
        if needed != current:
            raise InvalidInputError(
                f"{text} at version {needed}, but currently we have version {current}: a later operator overwrites "
                f"it. Forward operator: {forward}. Let the later operator write to another blob.",
                operator=forward.type,
            )

    def _accumulate(self, position: int) -> dict[str, Gradient]:
        """Sum a blob's gradients once the first of its users, the last to be visited, has been visited."""
        numbered = self._forward[position]
        summed: dict[str, Gradient] = {}
        for name in dict.fromkeys(numbered.operator.inputs):
            key = (name, numbered.read[name])
            sources = self._sources[key]
            users = self._users[key]
            if len(users) <= 1 or position != users[0] or len(sources) < 2:
                continue
            self._check_summable(name, sources)
            if isinstance(sources[0].gradient, GradientSlice):
                summed[name] = self._concatenate(name, sources)
            else:
                summed[name] = self._sum(name, sources)
        return summed

    def _check_summable(self, name: str, sources: list[_Source]) -> None:
        if len({isinstance(source.gradient, GradientSlice) for source in sources}) > 1:
            raise InvalidInputError(
                f"Gradients for {name!r} failed to verify: a mix of sparse and dense gradients is not supported. "
                f"They come from {'; '.join(str(source.forward) for source in sources)}. Make the sparse one dense "
                f"(dense_gradient=1 on Gather).",
                blob=name,
            )
        devices = {source.forward.device_option for source in sources} - {None}
        if len(devices) > 1:
            raise InvalidInputError(
                f"Gradients for {name!r} failed to verify: its users are on different devices: "
                f"{'; '.join(str(source.forward) for source in sources)}.",
                blob=name,
            )

    def _output(self, writer: _Writer) -> str:
        return self.operators[writer.position].outputs[writer.output]

    def _set_apart(self, writer: _Writer, count: int) -> str:
        """Rename one contribution, so that several can stand beside each other until they are summed."""
        operator = self.operators[writer.position]
        outputs = list(operator.outputs)
        outputs[writer.output] = f"_{outputs[writer.output]}_autosplit_{count}"
        self.operators[writer.position] = replace(operator, outputs=tuple(outputs))
        return outputs[writer.output]

    def _sum(self, name: str, sources: list[_Source]) -> str:
        written = [source.writers[0] for source in sources if source.writers[0] is not None]
        total = self._output(written[0]) if written else f"{name}_grad"
        terms: list[str] = []
        renamed = 0
        for source in sources:
            writer = source.writers[0]
            if writer is None:
                gradient = str(source.gradient)
                if gradient == total:
                    # The sum would be written over a gradient that is passed through and may be needed by others.
                    total = f"{name}_grad_autosum"
                terms.append(gradient)
            elif writer == written[0]:
                terms.append(self._output(writer))
            else:
                terms.append(self._set_apart(writer, renamed))
                renamed += 1
        if total in terms:
            first = terms.index(total)
            terms[0], terms[first] = terms[first], terms[0]
        self._append("Sum", terms, [total], sources)
        return total

    def _concatenate(self, name: str, sources: list[_Source]) -> GradientSlice:
        base = f"{name}_grad"
        parts: list[list[str]] = [[], []]
        counts = [0, 0]
        for source in sources:
            for half, writer in enumerate(source.writers):
                if writer is None:
                    parts[half].append(source.gradient[half])
                else:
                    parts[half].append(self._set_apart(writer, counts[half]))
                    counts[half] += 1
        for half, word in enumerate(("indices", "values")):
            outputs = [f"{base}_{word}_concat", f"{base}_{word}_concat_split"]
            self._append("Concat", parts[half], outputs, sources, axis=0)
        return GradientSlice(indices=f"{base}_indices_concat", values=f"{base}_values_concat")

    def _append(
        self, type_: str, inputs: Sequence[str], outputs: Sequence[str], sources: list[_Source], **args: int
    ) -> None:
        device = next((source.forward.device_option for source in sources if source.forward.device_option), None)
        self.operators.append(
            OperatorDef(
                type=type_,
                inputs=tuple(inputs),
                outputs=tuple(outputs),
                args=args,
                device_option=device,
                is_gradient_op=True,
            )
        )
