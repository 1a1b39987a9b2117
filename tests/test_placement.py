"""Whether requests fit nodes, and that a refusal says what was asked and what there is."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from blobspace.cluster.placement import NODE_ID_LABEL, NodeView, PlacementRequest, check_feasible, describe_nodes
from blobspace.ops.errors import InvalidInputError


def node(name: str, labels: Mapping[str, str] | None = None, **resources: float) -> NodeView:
    return NodeView(node_id=name, resources=resources, labels={NODE_ID_LABEL: name, **(labels or {})})


def request(name: str, labels: Mapping[str, str] | None = None, **resources: float) -> PlacementRequest:
    return PlacementRequest(workspace=name, resources=resources, labels=labels or {})


NODES = [node("n0", CPU=4, GPU=1), node("n1", {"zone": "b"}, CPU=2, disk=1)]


@pytest.mark.parametrize(
    "requests",
    [
        [],
        [request("w")],
        [request("w", CPU=0, GPU=0)],
        [request("w", GPU=0, missing=0)],
        [request("w", CPU=4)],
        [request("w", CPU=1, GPU=1)],
        [request("w", {"zone": "b"}, CPU=2)],
        [request("w", {NODE_ID_LABEL: "n0"})],
        [request("a", CPU=4), request("b", CPU=2)],
        [request(f"w{i}", GPU=0.1) for i in range(10)],
    ],
)
def test_what_fits_passes(requests: list[PlacementRequest]) -> None:
    check_feasible(requests, NODES)


@pytest.mark.parametrize(
    ("requests", "text"),
    [
        ([request("w", CPU=5)], r"No node can hold 'w' \(5 CPU\)"),
        ([request("w", GPU=1, disk=1)], r"'w' \(1 GPU, 1 disk\)"),
        ([request("w", TPU=1)], r"'w' \(1 TPU\)"),
        ([request("w", {"zone": "c"})], r"'w' \(label zone=c\)"),
        ([request("w", {"zone": "b"}, GPU=1)], r"'w' \(1 GPU, label zone=b\)"),
        ([request("w", {NODE_ID_LABEL: "n9"})], r"label ray.io/node-id=n9"),
        ([request("ok"), request("v", CPU=9), request("w", CPU=8)], r"'v' \(9 CPU\), 'w' \(8 CPU\)"),
        ([request(f"w{i}", CPU=1) for i in range(7)], r"7 workspaces ask for 7 CPU together"),
        ([request(f"w{i}", GPU=0.5) for i in range(3)], r"3 workspaces ask for 1.5 GPU together"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_each_node_has(requests: list[PlacementRequest], text: str) -> None:
    with pytest.raises(InvalidInputError, match=text) as caught:
        check_feasible(requests, NODES)
    assert "node n0: 4 CPU, 1 GPU\n" in str(caught.value)
    assert "node n1: 2 CPU, 1 disk; labels zone=b\n" in str(caught.value)
    assert caught.value.fields["nodes"] == ["n0", "n1"]


def test_without_a_node_nothing_fits() -> None:
    with pytest.raises(InvalidInputError, match="no live node"):
        check_feasible([request("w")], [])
    check_feasible([], [])


def test_nodes_are_described_without_what_nobody_asks_for() -> None:
    resources = {"CPU": 0.5, "memory": 1e9, "object_store_memory": 1e9, "node:10.0.0.1": 1.0}
    assert describe_nodes([NodeView(node_id="a" * 56, resources=resources, labels={})]) == (
        "  - node aaaaaaaaaaaa: 0.5 CPU"
    )
    assert describe_nodes([node("n")]) == "  - node n: no CPU and no GPU"
