"""Every training program recorded from the real Caffe2 (``caffe2_golden/README.md``), trained again for 20 steps.

Nothing is skipped: programs with operators that blobspace does not have are listed below, and the list is asserted.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from blobspace.ops import Net, OperatorDef, add_gradient_operators, operator_types
from blobspace.workspace_actors.workspace import Workspace

GOLDEN = Path(__file__).parent / "caffe2_golden"

with np.load(GOLDEN / "programs.npz") as recorded:
    ARRAYS = {key: recorded[key] for key in recorded.files}
PROGRAMS: list[dict[str, Any]] = json.loads(ARRAYS.pop("programs").tobytes())["programs"]

MISSING_OPERATORS: dict[str, list[str]] = {
    "convnet-sgd": ["Conv", "ConvGradient", "MaxPool", "MaxPoolGradient"],
    "convnet-momentum": ["Conv", "ConvGradient", "MaxPool", "MaxPoolGradient"],
    "convnet-adagrad": ["Conv", "ConvGradient", "MaxPool", "MaxPoolGradient"],
    "convnet-adam": ["Conv", "ConvGradient", "MaxPool", "MaxPoolGradient"],
    "embedding-sgd": [
        "ScatterWeightedSum",
        "SigmoidCrossEntropyWithLogits",
        "SigmoidCrossEntropyWithLogitsGradient",
        "SparseLengthsIndicesInGradientSumGradient",
        "SparseLengthsSum",
    ],
    "embedding-adagrad": [
        "SigmoidCrossEntropyWithLogits",
        "SigmoidCrossEntropyWithLogitsGradient",
        "SparseAdagrad",
        "SparseLengthsIndicesInGradientSumGradient",
        "SparseLengthsSum",
    ],
    "embedding-adam": [
        "SigmoidCrossEntropyWithLogits",
        "SigmoidCrossEntropyWithLogitsGradient",
        "SparseAdam",
        "SparseLengthsIndicesInGradientSumGradient",
        "SparseLengthsSum",
    ],
}


def missing_operators(program: dict[str, Any]) -> list[str]:
    needed = {operator["type"] for operator in [*program["forward"], *program["update"]]}
    return sorted((needed | set(program["backward_types"])) - set(operator_types()))


TRAINABLE = [pytest.param(program, id=program["id"]) for program in PROGRAMS if not missing_operators(program)]


def operators(plain: Sequence[dict[str, Any]]) -> list[OperatorDef]:
    return [
        OperatorDef(type=item["type"], inputs=tuple(item["inputs"]), outputs=tuple(item["outputs"]), args=item["args"])
        for item in plain
    ]


def training_net(program: dict[str, Any]) -> tuple[Net, dict[str, Any]]:
    net = Net(program["id"], operators(program["forward"]))
    gradients = add_gradient_operators(net, [program["loss"]])
    return net, gradients


def test_the_programs_that_cannot_be_trained_lack_exactly_these_operators() -> None:
    missing = {program["id"]: missing_operators(program) for program in PROGRAMS}
    assert {name: types for name, types in missing.items() if types} == MISSING_OPERATORS


@pytest.mark.parametrize("program", TRAINABLE)
def test_the_backward_pass_has_the_operators_and_the_names_of_caffe2(program: dict[str, Any]) -> None:
    net, gradients = training_net(program)
    assert [operator.type for operator in net.operators[len(program["forward"]) :]] == program["backward_types"]
    assert gradients == {
        name: (gradient["indices"], gradient["values"]) if isinstance(gradient, dict) else gradient
        for name, gradient in program["gradient_map"].items()
    }


@pytest.mark.parametrize("program", TRAINABLE)
def test_training_gives_the_losses_and_the_parameters_of_caffe2(program: dict[str, Any]) -> None:
    net, _ = training_net(program)
    net.extend(operators(program["update"]))
    workspace = Workspace("oracle")
    # The net is created with the inputs that it has before its first step.
    for name, key in {**program["feeds"], **program["batches"][0]}.items():
        workspace.feed_blob(name, ARRAYS[key])
    workspace.create_net(net)
    losses: list[float] = []
    for batch in program["batches"]:
        for name, key in batch.items():
            workspace.feed_blob(name, ARRAYS[key])
        workspace.run_net(net.name, iterations=1)
        losses.append(float(workspace.fetch_blob(program["loss"])))
    np.testing.assert_allclose(losses, program["losses"], rtol=1e-4)
    for name, key in program["expects"].items():
        found, expected = workspace.fetch_blob(name), ARRAYS[key]
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape), name
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6, err_msg=name)
