"""A workspace behind a real actor: its verbs, its refusals, and that it goes on after each of them."""

from __future__ import annotations

import threading

import ml_dtypes
import numpy as np
import pytest
import ray

from blobspace.cluster import Cluster
from blobspace.ops import (
    BlobspaceError,
    ConflictError,
    DeviceOption,
    InvalidInputError,
    MemoryLimitError,
    Net,
    NotFoundError,
    OperatorDef,
)
from blobspace.workspace_actors import WorkspaceHandle


@pytest.fixture(scope="module")
def cluster(local_ray: None) -> Cluster:
    config = {"name": "handles", "workspaces": [{"name": "w", "memory_limit": "1MiB"}]}
    with Cluster.launch(config) as cluster:
        yield cluster


@pytest.fixture
def w(cluster: Cluster) -> WorkspaceHandle:
    handle = cluster.workspaces["w"]
    handle.reset()
    return handle


@pytest.mark.parametrize(
    "value",
    [
        np.arange(6, dtype=np.float32).reshape(2, 3),
        np.arange(6, dtype=np.float32).reshape(2, 3).T,
        np.float64(2.5),
        np.zeros((0, 3), np.int8),
        np.array(7, np.uint64),
        np.array([1 + 2j], np.complex128),
        np.array([1.5, -2], ml_dtypes.bfloat16),
        np.array([True, False]),
        np.array([1, 2], ">i4"),
    ],
    ids=lambda value: f"{value.dtype}{value.shape}",
)
def test_a_tensor_comes_back_as_it_was_fed(w: WorkspaceHandle, value: np.ndarray) -> None:
    w.feed_blob("x", value)
    fetched = w.fetch_blob("x")
    assert fetched.dtype == value.dtype.newbyteorder("=")
    assert fetched.shape == value.shape
    np.testing.assert_array_equal(fetched, value)


@pytest.mark.parametrize("value", [None, True, 7, 2.5, "text", b"\x00\xff", [1, [None]], {"a": [1, 2.0], 3: b"x"}])
def test_a_plain_value_comes_back_as_it_was_fed(w: WorkspaceHandle, value: object) -> None:
    w.feed_blob("x", value)
    assert w.fetch_blob("x") == value
    assert type(w.fetch_blob("x")) is type(value)


def test_strings_come_back_as_bytes(w: WorkspaceHandle) -> None:
    w.feed_blob("s", ["a", "é"])
    assert w.fetch_blob("s").tolist() == [b"a", "é".encode()]


def test_get_all_blob_names_runs_as_an_actor_method_and_inside_a_net(w: WorkspaceHandle) -> None:
    w.feed_blob("b", 1)
    w.feed_blob("B", 1)
    w.run_operator("GetAllBlobNames", [], ["names"])
    assert w.fetch_blob("names").tolist() == [b"B", b"b", b"names"]
    net = Net("list")
    net.GetAllBlobNames([], "first")
    net.ConstantFill([], "later", shape=[1])
    w.create_net(net)
    w.run_net("list")
    assert w.fetch_blob("first").tolist() == [b"B", b"b", b"first", b"later", b"names"]


def test_names_in_a_child_follow_the_parents(w: WorkspaceHandle) -> None:
    w.feed_blob("shared", 1)
    child = w.child("scratch", create=True)
    child.feed_blob("own", 2)
    child.run_operator("GetAllBlobNames", [], ["all"])
    child.run_operator("GetAllBlobNames", [], ["local"], include_shared=False)
    assert child.fetch_blob("all").tolist() == [b"all", b"own", b"shared"]
    assert child.fetch_blob("local").tolist() == [b"all", b"local", b"own"]
    child.feed_blob("shared", 5)
    assert w.fetch_blob("shared") == 5
    assert w.children() == ["scratch"]
    w.remove_child("scratch")
    assert w.blobs() == ["shared"]


def test_a_gradient_through_get_all_blob_names_is_refused() -> None:
    from blobspace.ops import add_gradient_operators

    net = Net("n")
    net.GetAllBlobNames([], "names")
    net.Copy("names", "y")
    with pytest.raises(InvalidInputError, match="One should not call gradient for operator GetAllBlobNames"):
        add_gradient_operators(net, ["y"])


REFUSALS = {
    "an unknown operator": (lambda w: w.run_operator("Reluu", ["x"], ["y"]), InvalidInputError, "Did you mean Relu"),
    "an unknown argument": (
        lambda w: w.run_operator("Relu", ["x"], ["y"], slope=1),
        InvalidInputError,
        "unknown argument 'slope'",
    ),
    "an argument of the wrong kind": (
        lambda w: w.run_operator("Scale", ["x"], ["y"], scale="much"),
        InvalidInputError,
        "expected a number",
    ),
    "an unknown device": (
        lambda w: w.run_operator("Relu", ["x"], ["y"], device_option=DeviceOption(device_type="tpu")),
        InvalidInputError,
        "Unknown device type 'tpu'",
    ),
    "a device that the workspace is not on": (
        lambda w: w.run_operator("Relu", ["x"], ["y"], device_option=DeviceOption(device_type="cuda")),
        InvalidInputError,
        "asks for the device 'cuda'",
    ),
    "too few inputs": (lambda w: w.run_operator("Add", ["x"], ["y"]), InvalidInputError, "expected 2 input"),
    "too many outputs": (lambda w: w.run_operator("Relu", ["x"], ["y", "z"]), InvalidInputError, "expected 1 output"),
    "shapes that do not fit": (lambda w: w.run_operator("Add", ["x", "bad"], ["y"]), InvalidInputError, "Add"),
    "a dtype that does not fit": (lambda w: w.run_operator("Add", ["x", "int"], ["y"]), InvalidInputError, "int64"),
    "a missing blob": (lambda w: w.run_operator("Relu", ["nope"], ["y"]), NotFoundError, "'nope'"),
    "an uninitialized blob": (lambda w: w.run_operator("Relu", ["empty"], ["y"]), InvalidInputError, "uninitialized"),
    "a fetch of a missing blob": (lambda w: w.fetch_blob("nope"), NotFoundError, "no blob 'nope'"),
    "a fetch of an uninitialized blob": (lambda w: w.fetch_blob("empty"), NotFoundError, "uninitialized"),
    "an empty name": (lambda w: w.feed_blob("", 1), InvalidInputError, "empty"),
    "a name that is too long": (lambda w: w.feed_blob("é" * 600, 1), InvalidInputError, "1200 bytes"),
    "a name that is not UTF-8": (lambda w: w.feed_blob("\udcff", 1), InvalidInputError, "not UTF-8"),
    "a name with NUL": (lambda w: w.feed_blob("a\0b", 1), InvalidInputError, "NUL"),
    "a name that is no text": (lambda w: w.feed_blob(3, 1), InvalidInputError, "str"),
    "a value that cannot be stored": (lambda w: w.feed_blob("x", {1, 2}), InvalidInputError, "builtins.set"),
    "a value that cannot even travel": (
        lambda w: w.feed_blob("x", threading.Lock()),
        InvalidInputError,
        "_thread.lock",
    ),
    "a value that cannot be stored, submitted": (
        lambda w: w.submit("feed_blob", "x", object()),
        InvalidInputError,
        "builtins.object",
    ),
    "an array that cannot be stored": (
        lambda w: w.feed_blob("x", np.zeros(2, "M8[s]")),
        InvalidInputError,
        "datetime64",
    ),
    "a masked array": (lambda w: w.feed_blob("x", np.ma.masked_array([1], [True])), InvalidInputError, "mask"),
    "a feed past the memory limit": (
        lambda w: w.feed_blob("x", np.zeros(2**20, np.float32)),
        MemoryLimitError,
        "wanted 4,194,304 bytes for blob 'x'",
    ),
    "an operator past the memory limit": (
        lambda w: w.run_operator("ConstantFill", [], ["big"], shape=[2**20]),
        MemoryLimitError,
        "ConstantFill",
    ),
    "a net that is not there": (lambda w: w.run_net("nope"), NotFoundError, "no net 'nope'"),
    "a net that is there already": (lambda w: w.create_net(Net("n")), ConflictError, "'n'"),
    "a child that is not there": (lambda w: w.child("nope").blobs(), NotFoundError, "no child 'nope'"),
    "a removal of what is not there": (lambda w: w.remove_blob("nope"), NotFoundError, "'nope'"),
    "arguments that do not fit a verb": (
        lambda w: w.submit("run_net"),
        InvalidInputError,
        "The arguments of run_net do not fit",
    ),
    "a verb that is not there": (lambda w: w.submit("explode"), InvalidInputError, "no verb 'explode'"),
}


@pytest.mark.parametrize("what", REFUSALS)
def test_bad_input_gets_a_clear_error_and_loses_nothing(w: WorkspaceHandle, what: str) -> None:
    call, error, text = REFUSALS[what]
    w.feed_blob("x", np.arange(3, dtype=np.float32))
    w.feed_blob("bad", np.zeros((2, 2), np.float32))
    w.feed_blob("int", np.zeros(3, np.int64))
    w.create_blob("empty")
    w.create_net(Net("n"))
    before = set(w.blobs())
    with pytest.raises(error, match=None) as caught:
        call(w)
    assert type(caught.value) is error
    assert text in str(caught.value)
    assert set(w.blobs()) - before <= {"y", "big"}
    np.testing.assert_array_equal(w.fetch_blob("x"), [0, 1, 2])
    w.run_operator("Relu", ["x"], ["after"])
    np.testing.assert_array_equal(w.fetch_blob("after"), [0, 1, 2])


def test_a_net_with_faults_lists_them_all_and_creates_nothing(w: WorkspaceHandle) -> None:
    net = [
        OperatorDef(type="Relu", inputs=("missing",), outputs=("a",)),
        OperatorDef(type="Nonsense", outputs=("b",)),
        OperatorDef(type="Relu", inputs=("a",), outputs=("c",), args={"slope": 1}),
    ]
    with pytest.raises(InvalidInputError) as caught:
        w.create_net(Net("broken", net).definition())
    for text in ("operator 0", "'missing'", "operator 1", "'Nonsense'", "operator 2", "'slope'"):
        assert text in str(caught.value)
    assert w.blobs() == []


def test_an_error_in_a_net_says_where_it_happened(w: WorkspaceHandle) -> None:
    w.feed_blob("x", np.zeros(3, np.float32))
    w.feed_blob("y", np.zeros(4, np.float32))
    net = Net("n")
    net.Relu("x", "z")
    net.Add(["x", "y"], "sum")
    w.create_net(net)
    with pytest.raises(BlobspaceError) as caught:
        w.run_net("n", 3)
    for text in ("operator 1 of 2", "net 'n'", "iteration 0", "workspace 'w'", "Add(x, y) -> sum"):
        assert text in str(caught.value)


def test_a_submitted_call_returns_a_reference(w: WorkspaceHandle) -> None:
    w.feed_blob("x", np.ones(2, np.float32))
    reference = w.submit("run_operator", "Scale", ["x"], ["y"], scale=2.0)
    assert ray.get(reference) is None
    np.testing.assert_array_equal(w.fetch_blob("y"), [2, 2])


def test_fed_arrays_do_not_stay_in_the_object_store(w: WorkspaceHandle) -> None:
    w.feed_blob("x", np.ones(2**16, np.float32))
    assert w.memory().external_bytes == 0
    w.feed_blob("view", np.ones(2**16, np.float32), copy=False)
    assert w.memory().external_bytes == 2**18
    w.run_operator("Scale", ["view"], ["view"], scale=3.0)
    assert w.memory().external_bytes == 0
    assert w.fetch_blob("view")[0] == 3
