"""Every operator case recorded from the real Caffe2 (``caffe2_golden/README.md``), replayed.

Nothing is skipped: the types that blobspace does not have are listed below, and the list is asserted.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from blobspace.ops import BlobspaceError, InvalidInputError, Net, OperatorDef, gradient_operators, operator_types
from blobspace.workspace_actors.devices import array_module
from blobspace.workspace_actors.workspace import Workspace

GOLDEN = Path(__file__).parent / "caffe2_golden"

with np.load(GOLDEN / "operators.npz") as recorded:
    ARRAYS = {key: recorded[key] for key in recorded.files}
ALL_CASES: list[dict[str, Any]] = json.loads(ARRAYS.pop("cases").tobytes())["cases"]
CASES = [case for case in ALL_CASES if case["type"] in operator_types()]

NOT_IMPLEMENTED = """
    Adadelta ArgMax ArgMin AveragePool BatchGather BatchMatMul Cbrt Ceil Clip ColwiseMax Conv CopyFromCPUInput
    Cos CosineSimilarity Cube DiagonalFill DotProduct Dropout Elu EnsureCPUOutput EnsureDense Expand
    FCTransposed Floor Ftrl Gather Gelu HasElements IsEmpty IsNaN L1Distance LRN LayerNorm LeakyRelu LengthsMax
    LengthsMean LengthsRangeFill LengthsSum LengthsToRanges LengthsToSegmentIds Logit MakeTwoClass Max MaxPool
    Min NanCheck OneHot PRelu PadImage Pow Range Reciprocal ReduceL1 ReduceL2 ReduceMax ReduceMin ReplaceNaN
    RmsProp RowWiseSparseAdagrad RowwiseMax Rsqrt ScatterAssign ScatterWeightedSum SegmentIdsToLengths Selu
    Shape SigmoidCrossEntropyWithLogits Sin Size Softplus Softsign SortedSegmentSum SparseAdagrad SparseAdam
    SparseLengthsMean SparseLengthsSum SparseLengthsWeightedSum SparseMomentumSGDUpdate SparseToDense SpatialBN
    SumSqrElements Summarize Swish Tile TopK UniformIntFill Unique UnsortedSegmentSum Where
""".split()

# Sums of many terms, which Caffe2 adds up in another order.
LOOSE_TYPES = {"Conv", "LRN", "SpatialBN"}

# Caffe2 slices in one dimension only; blobspace does more, on purpose.
MULTIDIMENSIONAL_SLICES = {"Slice/0", "Slice/1"}


def has_gpu() -> bool:
    try:
        array_module("cuda")
    except InvalidInputError:
        return False
    return True


HAS_GPU = has_gpu()


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)] if HAS_GPU else ["cpu"])
def device(request: pytest.FixtureRequest) -> str:
    """The same cases on each device."""
    return request.param


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="needs CuPy and a CUDA device; where there is one, every case here runs on it")
def test_the_cases_run_on_cuda_too() -> None:
    workspace = Workspace("oracle", device_type="cuda")
    workspace.feed_blob("x", np.ones(3, np.float32))
    assert workspace.xp.__name__ == "cupy"
    np.testing.assert_array_equal(workspace.fetch_blob("x"), np.ones(3))


def cases(*keys: str, without: str = "") -> list[Any]:
    return [
        pytest.param(case, id=case["id"])
        for case in CASES
        if all(key in case for key in keys) and without not in case and case["id"] not in MULTIDIMENSIONAL_SLICES
    ]


def operator_of(case: dict[str, Any]) -> OperatorDef:
    return OperatorDef(
        type=case["type"], inputs=tuple(case["inputs"]), outputs=tuple(case["outputs"]), args=case["args"]
    )


def value_of(spec: dict[str, Any]) -> np.ndarray:
    if "array" in spec:
        return ARRAYS[spec["array"]]
    strings = np.empty(len(spec["strings"]), dtype=object)
    strings[:] = [item.encode() for item in spec["strings"]]
    return strings.reshape(spec["shape"])


def feed(workspace: Workspace, feeds: dict[str, Any]) -> None:
    for name, spec in feeds.items():
        workspace.feed_blob(name, value_of(spec))


def assert_recorded(workspace: Workspace, expects: dict[str, Any], case: dict[str, Any]) -> None:
    tolerance = 1e-4 if case["type"] in LOOSE_TYPES else 1e-5
    for name, spec in expects.items():
        found = workspace.fetch_blob(name)
        if "dtype" in spec:
            assert (found.dtype.name, list(found.shape)) == (spec["dtype"], spec["shape"]), name
            continue
        expected = value_of(spec)
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape), name
        if expected.dtype.kind in "fc":
            atol = tolerance if case["type"] in LOOSE_TYPES else 1e-6
            np.testing.assert_allclose(found, expected, rtol=tolerance, atol=atol, err_msg=name)
        else:
            np.testing.assert_array_equal(found, expected, err_msg=name)


def run(case: dict[str, Any], device: str) -> Workspace:
    workspace = Workspace("oracle", device_type=device)
    feed(workspace, case["feeds"])
    workspace.run_operator(operator_of(case))
    return workspace


def test_the_types_that_are_recorded_and_not_implemented_are_exactly_these() -> None:
    missing = sorted({case["type"] for case in ALL_CASES} - set(operator_types()))
    print(f"Recorded types that blobspace does not have: {', '.join(missing) or 'none'}")
    assert missing == NOT_IMPLEMENTED


@pytest.mark.parametrize("case", cases("expects", without="error"))
def test_the_operator_computes_what_caffe2_computed(case: dict[str, Any], device: str) -> None:
    assert_recorded(run(case, device), case["expects"], case)


@pytest.mark.parametrize("case", cases("expects", without="error"))
def test_the_operator_computes_the_same_in_a_net_that_is_already_bound(case: dict[str, Any], device: str) -> None:
    workspace = Workspace("oracle", device_type=device)
    feed(workspace, case["feeds"])
    net = Net("case")
    net.add(operator_of(case))
    workspace.create_net(net)
    # The first iteration makes the outputs, the second binds to them, the third runs the bound steps.
    for _ in range(3):
        feed(workspace, case["feeds"])
        workspace.run_net("case", iterations=1)
    assert_recorded(workspace, case["expects"], case)


@pytest.mark.parametrize("case", cases("grad"))
def test_the_gradient_is_what_caffe2_computed(case: dict[str, Any], device: str) -> None:
    workspace, recorded_gradient = run(case, device), case["grad"]
    operators, gradients = gradient_operators(operator_of(case), recorded_gradient["given"])
    assert gradients == {
        name: (gradient["indices"], gradient["values"]) if isinstance(gradient, dict) else gradient
        for name, gradient in recorded_gradient["of"].items()
    }
    feed(workspace, recorded_gradient["feeds"])
    for operator in operators:
        workspace.run_operator(operator)
    assert_recorded(workspace, recorded_gradient["expects"], case)


@pytest.mark.parametrize("case", cases("grad"))
def test_the_gradient_is_the_same_in_a_net_that_is_already_bound(case: dict[str, Any], device: str) -> None:
    workspace, recorded_gradient = Workspace("oracle", device_type=device), case["grad"]
    operators, _ = gradient_operators(operator_of(case), recorded_gradient["given"])
    net = Net("case", [operator_of(case), *operators])
    feeds = {**case["feeds"], **recorded_gradient["feeds"]}
    feed(workspace, feeds)
    workspace.create_net(net)
    for _ in range(3):
        feed(workspace, feeds)
        workspace.run_net("case", iterations=1)
    assert_recorded(workspace, recorded_gradient["expects"], case)


@pytest.mark.parametrize("case", cases("error"))
def test_what_caffe2_refuses_is_refused_and_leaves_the_inputs_as_they_were(case: dict[str, Any], device: str) -> None:
    workspace = Workspace("oracle", device_type=device)
    feed(workspace, case["feeds"])
    with pytest.raises(BlobspaceError) as caught:
        workspace.run_operator(operator_of(case))
    assert case["type"] in str(caught.value)
    for name, spec in case["feeds"].items():
        np.testing.assert_array_equal(workspace.fetch_blob(name), value_of(spec))


@pytest.mark.parametrize("case", [pytest.param(c, id=c["id"]) for c in CASES if c["id"] in MULTIDIMENSIONAL_SLICES])
def test_slicing_in_several_dimensions_at_once_works_where_caffe2_refuses_it(case: dict[str, Any], device: str) -> None:
    def bounds(argument: str, position: int) -> list[int]:
        if argument in case["args"]:
            return case["args"][argument]
        return value_of(case["feeds"][case["inputs"][position]]).tolist()

    source = value_of(case["feeds"]["X"])
    # A negative end counts from behind the last element: -1 is all of it.
    ends = [end + size + 1 if end < 0 else end for end, size in zip(bounds("ends", 2), source.shape, strict=True)]
    expected = source[tuple(map(slice, bounds("starts", 1), ends))]
    np.testing.assert_array_equal(run(case, device).fetch_blob("Y"), expected, strict=True)
