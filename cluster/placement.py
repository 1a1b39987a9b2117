"""Whether a set of workspaces can be placed on a set of nodes, and what to say if not. Pure.

Ray lets an actor that can never be placed wait for ever without a word. So requests are checked against the
nodes first; what passes here may still have to wait for resources that others use, and gets a deadline.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..ops.errors import InvalidInputError

NODE_ID_LABEL = "ray.io/node-id"


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeView:
    """A live node: its id, all its resources (used ones too), and its labels."""

    node_id: str
    resources: Mapping[str, float]
    labels: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacementRequest:
    """What one workspace asks for: resources by Ray's names, and labels that its node must have."""

    workspace: str
    resources: Mapping[str, float]
    labels: Mapping[str, str]

    def __str__(self) -> str:
        wants = [f"{amount:g} {name}" for name, amount in self.resources.items() if amount]
        wants += [f"label {name}={value}" for name, value in self.labels.items()]
        return f"{self.workspace!r} ({', '.join(wants) or 'nothing in particular'})"


def check_feasible(requests: Sequence[PlacementRequest], nodes: Sequence[NodeView]) -> None:
    """Raise if some request fits no node at all, or all together are more than the nodes have.

    Raises:
        InvalidInputError: What cannot be granted, and what each node has.
    """
    hopeless = [request for request in requests if not any(_fits(request, node) for node in nodes)]
    if hopeless:
        raise _refusal(f"No node can hold {', '.join(map(str, hopeless))}", nodes)
    for resource in sorted({name for request in requests for name in request.resources}):
        wanted = sum(request.resources.get(resource, 0.0) for request in requests)
        there = sum(node.resources.get(resource, 0.0) for node in nodes)
        if wanted > there + 1e-9:
            raise _refusal(f"{len(requests)} workspaces ask for {wanted:g} {resource} together", nodes)


def _fits(request: PlacementRequest, node: NodeView) -> bool:
    return all(node.resources.get(name, 0.0) + 1e-9 >= amount for name, amount in request.resources.items()) and all(
        node.labels.get(name) == value for name, value in request.labels.items()
    )


def describe_nodes(nodes: Sequence[NodeView]) -> str:
    """Return what each node has, one line a node."""
    lines: list[str] = []
    for node in nodes:
        shown = {
            name: amount
            for name, amount in node.resources.items()
            if not name.startswith("node:") and name not in ("memory", "object_store_memory")
        }
        has = ", ".join(f"{amount:g} {name}" for name, amount in sorted(shown.items())) or "no CPU and no GPU"
        labels = ", ".join(f"{key}={value}" for key, value in node.labels.items() if not key.startswith("ray.io/"))
        lines.append(f"  - node {node.node_id[:12]}: {has}" + (f"; labels {labels}" if labels else ""))
    return "\n".join(lines) or "  - no live node"


def _refusal(problem: str, nodes: Sequence[NodeView]) -> InvalidInputError:
    return InvalidInputError(
        f"{problem}. The live nodes have:\n{describe_nodes(nodes)}\nAsk for less, or add nodes.",
        nodes=[node.node_id for node in nodes],
    )
