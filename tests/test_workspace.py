"""The workspace: Caffe2's semantics where blobspace follows them (caffe2.md is cited), and where it differs."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from blobspace.ops import (
    ArgType,
    Argument,
    BlobspaceError,
    ConflictError,
    InvalidInputError,
    Kind,
    MemoryLimitError,
    Net,
    NotFoundError,
    OperatorCall,
    OperatorDef,
    OperatorSchema,
    register_cpu_operator,
)
from blobspace.workspace_actors import Workspace, check_workspace_name


@pytest.fixture
def ws() -> Workspace:
    return Workspace("w")


@pytest.fixture
def chain(ws: Workspace) -> tuple[Workspace, Workspace, Workspace]:
    return ws, ws.child("c", create=True), ws.child("c/d", create=True)


def f32(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


def names_of(ws: Workspace, blob: str) -> list[str]:
    return [name.decode() for name in ws.fetch_blob(blob).tolist()]


def kind_of(ws: Workspace, name: str) -> Kind:
    return next(spec.kind for spec in ws.specs() if spec.name == name)


def version_of(ws: Workspace, name: str) -> int:
    return next(spec.version for spec in ws.specs() if spec.name == name)


class TestNames:
    def test_own_names_are_listed_bytewise(self, ws: Workspace) -> None:
        """caffe2.md 1: 'local blobs sorted bytewise (UTF-8)'."""
        names = ["日本", "é", "a/b", "a", "_x", "Beta", "9", "10", "\U0001f600", "\uffee"]
        for name in names:
            ws.create_blob(name)
        assert ws.blobs() == ["10", "9", "Beta", "_x", "a", "a/b", "é", "日本", "\uffee", "\U0001f600"]
        assert ws.blobs() == sorted(names, key=lambda name: name.encode())

    def test_a_childs_names_come_first_then_its_ancestors_and_duplicates_stay(
        self, chain: tuple[Workspace, Workspace, Workspace]
    ) -> None:
        """caffe2.md 1: 'Not globally sorted, and duplicates stay'; 'a parent never sees child names'."""
        root, child, grandchild = chain
        grandchild.create_blob("z")
        child.create_blob("m")
        grandchild.create_blob("b")
        root.create_blob("z")
        root.create_blob("a")
        child.create_blob("y")
        assert grandchild.blobs() == ["b", "z", "m", "y", "a", "z"]
        assert grandchild.local_blobs() == ["b", "z"]
        assert child.blobs() == ["m", "y", "a", "z"]
        assert root.blobs() == root.local_blobs() == ["a", "z"]

    def test_an_uninitialized_blob_is_listed_and_cannot_be_fetched(self, ws: Workspace) -> None:
        """caffe2.md 1: 'uninitialised blobs are listed'; fetching one returns text there and raises here."""
        ws.create_blob("x")
        assert ws.blobs() == ["x"]
        with pytest.raises(NotFoundError, match="uninitialized"):
            ws.fetch_blob("x")
        with pytest.raises(NotFoundError, match="uninitialized"):
            ws.peek_blob("x")

    def test_creating_is_idempotent_and_makes_nothing_where_an_ancestor_has_the_name(
        self, chain: tuple[Workspace, Workspace, Workspace]
    ) -> None:
        """caffe2.md 1: 'if a parent already has the name no local blob is made'."""
        root, child, _ = chain
        root.feed_blob("x", f32(1))
        child.create_blob("x")
        root.create_blob("x")
        assert child.local_blobs() == []
        assert child.fetch_blob("x") == 1

    def test_feeding_in_a_child_changes_the_ancestors_blob(self, chain: tuple[Workspace, Workspace, Workspace]) -> None:
        """caffe2.md 1: 'Reads and writes of a parent's name go to the parent's blob'; 'Chains of 3 work'."""
        root, _, grandchild = chain
        root.feed_blob("x", f32(1))
        grandchild.feed_blob("x", [b"other"])
        assert root.fetch_blob("x").tolist() == [b"other"]
        grandchild.run_operator("ConstantFill", [], ["x"], shape=[2], value=3.0)
        assert root.fetch_blob("x").tolist() == [3, 3]
        assert grandchild.local_blobs() == []

    def test_a_local_blob_shadows_one_that_an_ancestor_gets_later(
        self, chain: tuple[Workspace, Workspace, Workspace]
    ) -> None:
        root, child, grandchild = chain
        child.feed_blob("x", 1)
        root.feed_blob("x", 2)
        grandchild.feed_blob("x", 3)
        assert (root.fetch_blob("x"), child.fetch_blob("x")) == (2, 3)
        child.remove_blob("x")
        assert grandchild.fetch_blob("x") == 2

    def test_removing_is_local_only_and_a_missing_name_is_an_error(
        self, chain: tuple[Workspace, Workspace, Workspace]
    ) -> None:
        """caffe2.md 1: 'never removes from the parent'; ignored when missing there, an error here."""
        root, child, _ = chain
        root.feed_blob("x", 1)
        with pytest.raises(NotFoundError):
            child.remove_blob("x")
        assert root.has_blob("x")
        root.remove_blob("x")
        assert not child.has_blob("x")
        with pytest.raises(NotFoundError, match="has no blob 'x'"):
            root.remove_blob("x")

    def test_resetting_keeps_the_name_and_drops_the_value(self, ws: Workspace) -> None:
        for value in (f32(1), [b"s"], {"a": 1}):
            ws.feed_blob("x", value)
            ws.reset_blob("x")
            assert ws.blobs() == ["x"]
            assert kind_of(ws, "x") is Kind.UNINITIALIZED
            assert ws.memory().used_bytes == 0
        with pytest.raises(NotFoundError):
            ws.reset_blob("missing")

    def test_a_missing_blob_is_named_with_names_like_it(self, ws: Workspace) -> None:
        ws.feed_blob("fc_weight", 1)
        with pytest.raises(NotFoundError, match=r"'w' has no blob 'weight'. Names like it: 'fc_weight'"):
            ws.fetch_blob("weight")

    def test_specs_say_what_there_is(self, ws: Workspace) -> None:
        ws.feed_blob("t", np.zeros((2, 3), np.int16))
        ws.feed_blob("s", ["a"])
        ws.feed_blob("v", None)
        ws.child("c", create=True).feed_blob("t2", f32())
        found = [(s.workspace, s.name, s.kind, s.dtype, s.shape, s.nbytes) for s in ws.specs()]
        assert found == [
            ("w", "s", Kind.STRINGS, None, (1,), 0),
            ("w", "t", Kind.TENSOR, "int16", (2, 3), 12),
            ("w", "v", Kind.VALUE, None, None, 0),
            ("w:c", "t2", Kind.TENSOR, "float32", (0,), 0),
        ]
        assert ws.family_names() == {"": ["s", "t", "v"], "c": ["t2"]}

    @pytest.mark.parametrize("name", ["", "a b", "-a", "a/b", "é", "a" * 129, None, 3, "a\n"])
    def test_a_workspace_name_is_one_that_a_file_can_have(self, name: Any) -> None:
        with pytest.raises(InvalidInputError, match="cannot name a workspace"):
            check_workspace_name(name)
        with pytest.raises(InvalidInputError):
            Workspace(name)


class TestGetAllBlobNames:
    def test_its_own_output_and_uninitialized_blobs_are_listed_and_a_rerun_is_stable(self, ws: Workspace) -> None:
        """caffe2.md 2: 'The output blob's own name is included'."""
        ws.feed_blob("b", f32(1))
        ws.create_blob("a")
        ws.run_operator("GetAllBlobNames", [], ["names"])
        value = ws.fetch_blob("names")
        assert (value.dtype, value.ndim) == (np.dtype(object), 1)
        assert value.tolist() == [b"a", b"b", b"names"]
        ws.run_operator("GetAllBlobNames", [], ["names"])
        assert names_of(ws, "names") == ["a", "b", "names"]

    def test_as_first_operator_of_a_net_it_lists_the_outputs_of_later_ones(self, ws: Workspace) -> None:
        """caffe2.md 1: 'CreateNet creates every output blob of the net at construction'."""
        net = Net("n")
        net.GetAllBlobNames([], "names")
        net.ConstantFill([], "later", shape=[1])
        ws.run_net_once(net)
        assert names_of(ws, "names") == ["later", "names"]

    @pytest.mark.parametrize(
        ("include_shared", "expected"),
        [
            (None, ["c", "names", "x", "a", "x"]),
            (True, ["c", "names", "x", "a", "x"]),
            (1, ["c", "names", "x", "a", "x"]),
            (-5, ["c", "names", "x", "a", "x"]),
            (False, ["c", "names", "x"]),
            (0, ["c", "names", "x"]),
        ],
    )
    def test_include_shared_adds_the_ancestors_names(
        self, ws: Workspace, include_shared: Any, expected: list[str]
    ) -> None:
        """caffe2.md 2: 'Read as int: 0/False -> local only, any other int -> all'."""
        child = ws.child("k", create=True)
        child.feed_blob("x", 1)
        child.feed_blob("c", 1)
        ws.feed_blob("x", 2)
        ws.feed_blob("a", 2)
        args = {} if include_shared is None else {"include_shared": include_shared}
        child.run_operator("GetAllBlobNames", [], ["names"], **args)
        assert names_of(child, "names") == expected

    def test_in_a_net_that_is_bound_it_still_lists_what_is_there_now(self, ws: Workspace) -> None:
        net = Net("n")
        net.GetAllBlobNames([], "names")
        ws.create_net(net)
        ws.run_net("n", 3)
        ws.feed_blob("new", 1)
        ws.run_net("n", 1)
        assert names_of(ws, "names") == ["names", "new"]

    def test_a_parents_blob_of_the_outputs_name_receives_it(self, ws: Workspace) -> None:
        """caffe2.md 2: 'if the output name exists in the parent, the parent's blob receives it'."""
        child = ws.child("k", create=True)
        ws.create_blob("names")
        child.run_operator("GetAllBlobNames", [], ["names"], include_shared=False)
        assert child.local_blobs() == []
        assert ws.fetch_blob("names").shape == (0,)

    @pytest.mark.parametrize("value", [1.0, "yes", [1], None])
    def test_include_shared_must_be_an_integer(self, ws: Workspace, value: Any) -> None:
        """caffe2.md 2: 'float or string -> RuntimeError'."""
        with pytest.raises(InvalidInputError, match="include_shared"):
            ws.run_operator("GetAllBlobNames", [], ["names"], include_shared=value)
        assert ws.blobs() == []

    @pytest.mark.parametrize(("inputs", "outputs"), [(["x"], ["y"]), ([], []), ([], ["y", "z"])])
    def test_no_input_and_one_output(self, ws: Workspace, inputs: list[str], outputs: list[str]) -> None:
        ws.feed_blob("x", 1)
        with pytest.raises(InvalidInputError, match="does not fit its schema"):
            ws.run_operator("GetAllBlobNames", inputs, outputs)
        assert ws.blobs() == ["x"]


class TestFeedAndFetch:
    def test_both_copy(self, ws: Workspace) -> None:
        """caffe2.md 1: 'FeedBlob and FetchBlob copy (no aliasing)'."""
        array = f32(1, 2)
        strings = np.array([b"a"], dtype=object)
        plain = {"a": [1]}
        ws.feed_blob("t", array)
        ws.feed_blob("s", strings)
        ws.feed_blob("p", plain)
        array[:], strings[0] = 9, b"z"
        plain["a"].append(2)
        ws.fetch_blob("t")[:] = 8
        ws.fetch_blob("s")[0] = b"y"
        ws.fetch_blob("p")["a"].append(3)
        ws.peek_blob("t")[:] = 8
        ws.peek_blob("p")["a"].append(3)
        assert ws.fetch_blob("t").tolist() == [1, 2]
        assert ws.fetch_blob("s").tolist() == [b"a"]
        assert ws.fetch_blob("p") == {"a": [1]}

    def test_a_blob_may_be_fed_another_dtype_shape_and_kind(self, ws: Workspace) -> None:
        """caffe2.md 1: 'Re-feeding may change type, shape and kind freely'."""
        values: list[Any] = [
            f32(1, 2),
            np.zeros((2, 2), np.int64),
            ["a", "b"],
            "text",
            None,
            np.array(True),
            b"bytes",
            np.zeros((0, 5)),
            [1, "a"],
            3,
        ]
        for value in [*values, *reversed(values)]:
            ws.feed_blob("x", value)
            back = ws.fetch_blob("x")
            if isinstance(value, np.ndarray):
                assert (back.dtype, back.shape) == (value.dtype, value.shape)
                np.testing.assert_array_equal(back, value)
            elif value == ["a", "b"]:
                assert back.tolist() == [b"a", b"b"]
            else:
                assert back == value
        ws.remove_blob("x")
        assert ws.memory().used_bytes == 0

    def test_any_strides_are_stored_in_c_order(self, ws: Workspace) -> None:
        for array in (np.arange(6.0).reshape(2, 3).T, np.arange(9)[::-2], np.asfortranarray(np.eye(3)), np.arange(3)):
            ws.feed_blob("x", array)
            ws.feed_blob("y", array, copy=False)
            for name in "xy":
                back = ws.fetch_blob(name)
                assert back.flags.c_contiguous
                np.testing.assert_array_equal(back, array)

    def test_an_own_fetched_array_can_be_fed_back_to_any_blob(self, ws: Workspace) -> None:
        ws.feed_blob("x", np.arange(4))
        ws.feed_blob("x", ws.fetch_blob("x")[::-1])
        assert ws.fetch_blob("x").tolist() == [3, 2, 1, 0]

    def test_a_refused_value_leaves_the_blob_and_the_table_as_they_were(self, ws: Workspace) -> None:
        ws.feed_blob("x", 1)
        before = ws.specs()
        for name in ("x", "new"):
            with pytest.raises(InvalidInputError):
                ws.feed_blob(name, (1, 2))
        assert ws.specs() == before

    def test_without_copy_the_callers_array_is_shown_counted_and_never_written(self, ws: Workspace) -> None:
        array = f32(1, 2, 3, 4)
        ws.feed_blob("x", array, copy=False)
        memory = ws.memory()
        assert (memory.external_bytes, memory.used_bytes) == (16, 16)
        ws.run_operator("Relu", ["x"], ["y"])
        net = Net("n")
        net.Add(["x", "x"], "x")
        net.ConstantFill("x", "x", value=7.0)
        ws.run_net_once(net)
        assert array.tolist() == [1, 2, 3, 4]
        assert array.flags.writeable
        assert ws.memory().external_bytes == 0

    @pytest.mark.parametrize("then", ["feed", "feed without copy", "remove", "reset", "kind", "reset all"])
    def test_the_view_is_let_go_when_the_blob_is_next_written(self, ws: Workspace, then: str) -> None:
        array = f32(1, 2)
        ws.feed_blob("x", array, copy=False)
        match then:
            case "feed":
                ws.feed_blob("x", f32(5, 6))
            case "feed without copy":
                ws.feed_blob("x", np.zeros(2, np.int8), copy=False)
            case "remove":
                ws.remove_blob("x")
            case "reset":
                ws.reset_blob("x")
            case "kind":
                ws.feed_blob("x", "text")
            case _:
                ws.reset()
        assert array.tolist() == [1, 2]
        assert ws.memory().external_bytes == (2 if then == "feed without copy" else 0)

    def test_a_matrix_does_not_get_in_as_a_matrix(self, ws: Workspace) -> None:
        with pytest.warns(PendingDeprecationWarning):
            matrix = np.matrix([[1.0, 2.0], [3.0, 4.0]])
        ws.feed_blob("x", matrix, copy=False)
        ws.run_operator("Mul", ["x", "x"], ["y"])
        assert ws.fetch_blob("y").tolist() == [[1, 4], [9, 16]]


class TestRunOperator:
    def test_a_schema_failure_creates_nothing(self, ws: Workspace) -> None:
        """caffe2.md 1: 'a schema/missing-input failure creates no output'."""
        ws.feed_blob("x", f32(1))
        version = ws.names_version
        for type_, inputs, outputs, args in [
            ("Relu", ["x", "x"], ["y"], {}),
            ("Relu", ["x"], ["y"], {"slope": 1}),
            ("Relu", ["missing"], ["y"], {}),
            ("Rleu", ["x"], ["y"], {}),
            ("Scale", ["x"], ["y"], {"scale": "much"}),
            ("Copy", ["x"], ["x"], {}),
        ]:
            with pytest.raises(BlobspaceError):
                ws.run_operator(type_, inputs, outputs, **args)
        assert ws.blobs() == ["x"]
        assert ws.names_version == version

    def test_a_failure_at_run_time_leaves_the_output_created_and_the_inputs_intact(self, ws: Workspace) -> None:
        """caffe2.md 1: 'a run-time failure (wrong dtype, shape) leaves the output created/uninitialised'."""
        ws.feed_blob("a", f32(1, 2))
        ws.feed_blob("b", f32(1, 2, 3))
        with pytest.raises(InvalidInputError, match="Add"):
            ws.run_operator("Add", ["a", "b"], ["c"])
        assert kind_of(ws, "c") is Kind.UNINITIALIZED
        assert ws.fetch_blob("a").tolist() == [1, 2]
        ws.run_operator("Add", ["a", "a"], ["c"])
        assert ws.fetch_blob("c").tolist() == [2, 4]

    def test_a_failure_while_binding_leaves_an_older_output_as_it_was(self, ws: Workspace) -> None:
        ws.feed_blob("a", f32(1, 2))
        ws.feed_blob("b", f32(1, 2, 3))
        ws.feed_blob("c", f32(7))
        before = version_of(ws, "c")
        with pytest.raises(InvalidInputError):
            ws.run_operator("Add", ["a", "b"], ["c"])
        assert ws.fetch_blob("c").tolist() == [7]
        assert version_of(ws, "c") == before

    def test_the_missing_input_is_named(self, ws: Workspace) -> None:
        """caffe2.md 1: 'Encountered a non-existing input blob: X'."""
        with pytest.raises(NotFoundError, match="input blob 'x' is not in workspace 'w'"):
            ws.run_operator("Relu", ["x"], ["y"])

    def test_a_wrong_kind_is_named(self, ws: Workspace) -> None:
        ws.create_blob("u")
        ws.feed_blob("s", ["a"])
        ws.feed_blob("v", {"a": 1})
        for name, found in (("u", "uninitialized"), ("s", "a string tensor"), ("v", "a plain dict")):
            with pytest.raises(InvalidInputError, match=f"blob '{name}'.*{found}"):
                ws.run_operator("Relu", [name], ["y"])

    def test_whatever_an_own_operator_raises_becomes_a_typed_error(self, ws: Workspace, own_operators: None) -> None:
        class OddError(Exception):
            def __init__(self, a: int, b: int) -> None:
                super().__init__(f"{a}{b}")

        @register_cpu_operator(OperatorSchema(type="Odd", doc="Fail.", inputs=(0, 0), outputs=(1, 1)))
        def odd(call: OperatorCall) -> Callable[[], object]:
            raise OddError(4, 2)

        with pytest.raises(InvalidInputError, match=r"Odd\(\) -> y failed: OddError: 42. In workspace 'w'"):
            ws.run_operator("Odd", [], ["y"])
        net = Net("n")
        net.add("Odd", [], ["y"])
        with pytest.raises(InvalidInputError, match="operator 0 of 1 of net 'n', iteration 0"):
            ws.run_net_once(net)

    def test_a_step_that_fails_after_writing_raises_the_version_of_what_it_may_have_written(
        self, ws: Workspace, own_operators: None
    ) -> None:
        # A checkpoint that trusts versions must not take a half-written buffer for the one it has saved.
        @register_cpu_operator(OperatorSchema(type="Half", doc="Write, then fail.", inputs=(0, 0), outputs=(1, 1)))
        def half(call: OperatorCall) -> Callable[[], object]:
            out = call.output(0, (4,), np.dtype("float32"))

            def step() -> None:
                out[:2] = 5
                raise ValueError("half way")

            return step

        ws.feed_blob("y", f32(1, 1, 1, 1))
        before = version_of(ws, "y")
        with pytest.raises(InvalidInputError, match="half way"):
            ws.run_operator("Half", [], ["y"])
        assert ws.fetch_blob("y").tolist() == [1, 1, 1, 1] or version_of(ws, "y") > before
        ws.run_operator("Relu", ["y"], ["y"])

    def test_an_own_operator_cannot_store_what_a_checkpoint_cannot_carry(
        self, ws: Workspace, own_operators: None
    ) -> None:
        @register_cpu_operator(
            OperatorSchema(
                type="Store",
                doc="Store.",
                inputs=(0, 0),
                outputs=(1, 1),
                arguments=(Argument(name="good", type=ArgType.BOOL),),
            )
        )
        def store(call: OperatorCall) -> Callable[[], object]:
            return lambda: call.set_value(0, {"a": [1]} if call.arguments["good"] else {1, 2})

        ws.run_operator("Store", [], ["y"], good=True)
        assert ws.fetch_blob("y") == {"a": [1]}
        with pytest.raises(InvalidInputError, match="set"):
            ws.run_operator("Store", [], ["y"], good=False)
        ws.freeze().snapshot()

    def test_unregistered_device_is_refused(self, ws: Workspace) -> None:
        from blobspace.ops import DeviceOption

        ws.feed_blob("x", f32(1))
        with pytest.raises(InvalidInputError, match="asks for the device 'cuda'"):
            ws.run_operator("Relu", ["x"], ["y"], device_option=DeviceOption(device_type="cuda"))
        assert ws.blobs() == ["x"]


def adding(name: str = "n", times: int = 1) -> Net:
    net = Net(name)
    for _ in range(times):
        net.Add(["x", "one"], "x")
    return net


class TestNets:
    def test_creating_a_net_creates_its_outputs(self, ws: Workspace) -> None:
        ws.feed_blob("x", f32(1))
        net = Net("n")
        net.Relu("x", "b")
        net.Relu("b", "a")
        ws.create_net(net)
        assert ws.blobs() == ["a", "b", "x"]
        assert kind_of(ws, "a") is Kind.UNINITIALIZED

    def test_a_second_net_of_the_name_is_refused_unless_it_may_overwrite(self, ws: Workspace) -> None:
        """caffe2.md 1: 'I respectfully refuse to overwrite an existing net of the same name'."""
        ws.feed_blob("x", f32(0))
        ws.feed_blob("one", f32(1))
        ws.create_net(adding())
        with pytest.raises(ConflictError, match="'n'"):
            ws.create_net(adding(times=2))
        ws.run_net("n")
        assert ws.fetch_blob("x") == 1
        ws.create_net(adding(times=2), overwrite=True)
        ws.run_net("n")
        assert ws.fetch_blob("x") == 3

    def test_an_overwrite_that_fails_leaves_the_old_net(self, ws: Workspace) -> None:
        ws.feed_blob("x", f32(0))
        ws.feed_blob("one", f32(1))
        ws.create_net(adding())
        bad = Net("n")
        bad.Relu("nowhere", "new")
        with pytest.raises(InvalidInputError):
            ws.create_net(bad, overwrite=True)
        ws.run_net("n")
        assert ws.fetch_blob("x") == 1
        assert not ws.has_blob("new")

    def test_all_faults_are_listed_and_no_blob_is_created(self, ws: Workspace) -> None:
        """caffe2.md 1: a failed CreateNet leaves blobs behind; here it does not."""
        from blobspace.ops import NetDef

        net = NetDef(
            name="n",
            operators=(
                OperatorDef(type="ConstantFill", outputs=("a",), args={"shape": [1]}),
                OperatorDef(type="Relu", inputs=("nowhere",), outputs=("b",)),
                OperatorDef(type="Rleu", inputs=("a", "gone"), outputs=("c",)),
                OperatorDef(type="Relu", inputs=("c",), outputs=("d",), args={"slope": 1}),
            ),
        )
        with pytest.raises(InvalidInputError) as caught:
            ws.create_net(net)
        text = str(caught.value)
        for part in ("operator 1", "'nowhere'", "operator 2", "Unknown operator 'Rleu'", "'gone'", "operator 3"):
            assert part in text
        assert len(caught.value.fields["faults"]) == 4  # type: ignore[arg-type]
        assert ws.blobs() == ws.nets() == []

    def test_a_missing_net_is_named_with_those_there_are(self, ws: Workspace) -> None:
        """caffe2.md 1: "Can't find net X"."""
        ws.create_net(Net("there"))
        for iterations in (0, 1):
            with pytest.raises(NotFoundError, match=r"has no net 'n'. It has: there"):
                ws.run_net("n", iterations)
        with pytest.raises(NotFoundError):
            ws.delete_net("n")
        ws.delete_net("there")
        assert ws.nets() == []

    @pytest.mark.parametrize("iterations", [-1, 1.0, "3", True, None, np.int64(2)])
    def test_iterations_is_a_count(self, ws: Workspace, iterations: Any) -> None:
        ws.create_net(Net("n"))
        with pytest.raises(InvalidInputError, match="iterations must be"):
            ws.run_net("n", iterations)

    def test_a_failing_operator_keeps_the_effects_before_it_and_says_where(
        self, ws: Workspace, own_operators: None
    ) -> None:
        """caffe2.md 1: 'A net failing at op k keeps effects of ops < k'."""

        @register_cpu_operator(OperatorSchema(type="FailAt", doc="Fail at 3.", inputs=(1, 1), outputs=(0, 0)))
        def fail_at(call: OperatorCall) -> Callable[[], object]:
            x = call.input(0)

            def step() -> None:
                if x[0] == 3:
                    raise ValueError("three")

            return step

        ws.feed_blob("x", f32(0))
        ws.feed_blob("one", f32(1))
        net = adding()
        net.add("FailAt", ["x"], [])
        net.Add(["x", "one"], "after")
        ws.create_net(net)
        with pytest.raises(
            InvalidInputError, match=r"operator 1 of 3 of net 'n', iteration 2, workspace 'w'"
        ) as caught:
            ws.run_net("n", 10)
        assert "FailAt(x)" in str(caught.value)
        assert ws.fetch_blob("x") == 3
        assert ws.fetch_blob("after") == 3
        ws.feed_blob("x", f32(5))
        ws.run_net("n", 2)
        assert (ws.fetch_blob("x"), ws.fetch_blob("after")) == (7, 8)

    def test_a_net_that_has_run_notices_removed_reset_and_refed_blobs(self, ws: Workspace) -> None:
        ws.feed_blob("x", f32(0))
        ws.feed_blob("one", f32(1))
        ws.create_net(adding())
        ws.run_net("n", 3)
        ws.remove_blob("one")
        with pytest.raises(NotFoundError, match="'one'"):
            ws.run_net("n")
        ws.feed_blob("one", f32(10, 20))
        ws.feed_blob("x", f32(0, 0))
        ws.run_net("n", 3)
        assert ws.fetch_blob("x").tolist() == [30, 60]
        ws.reset_blob("one")
        with pytest.raises(InvalidInputError, match="uninitialized"):
            ws.run_net("n")
        ws.feed_blob("one", "text")
        with pytest.raises(InvalidInputError, match="plain str"):
            ws.run_net("n")

    def test_a_bound_copy_of_strings_notices_that_its_input_is_no_string_tensor_any_more(self, ws: Workspace) -> None:
        net = Net("n")
        net.Copy("s", "t")
        ws.feed_blob("s", ["a"])
        ws.create_net(net)
        ws.run_net("n", 3)
        ws.feed_blob("s", ["b", "c"])
        ws.run_net("n", 3)
        assert ws.fetch_blob("t").tolist() == [b"b", b"c"]
        ws.feed_blob("s", {"a": 1})
        with pytest.raises(InvalidInputError, match="plain dict"):
            ws.run_net("n")
        assert ws.fetch_blob("t").tolist() == [b"b", b"c"]
        ws.feed_blob("s", f32(4))
        ws.run_net("n", 3)
        assert ws.fetch_blob("t") == 4

    def test_nets_belong_to_their_workspace_and_write_ancestors_blobs(self, ws: Workspace) -> None:
        child = ws.child("c", create=True)
        ws.feed_blob("x", f32(0))
        child.feed_blob("one", f32(1))
        child.create_net(adding())
        with pytest.raises(NotFoundError):
            ws.run_net("n")
        child.run_net("n", 4)
        assert ws.fetch_blob("x") == 4
        assert child.local_blobs() == ["one"]

    def test_a_childs_net_notices_a_shadowing_blob(self, ws: Workspace) -> None:
        child = ws.child("c", create=True)
        ws.feed_blob("x", f32(0))
        ws.feed_blob("one", f32(1))
        child.create_net(adding())
        child.run_net("n", 3)
        assert ws.fetch_blob("x") == 3
        ws.remove_blob("x")
        child.feed_blob("x", f32(100))
        ws.feed_blob("x", f32(0))
        child.run_net("n", 3)
        assert (child.fetch_blob("x"), ws.fetch_blob("x")) == (103, 0)


class TestChildren:
    def test_a_child_is_made_found_listed_and_removed(self, ws: Workspace) -> None:
        grandchild = ws.child("a/b", create=True)
        assert grandchild.name == "w:a/b"
        assert ws.child("a").children() == ["b"]
        assert ws.child("") is ws
        assert ws.child("a/b") is grandchild
        grandchild.feed_blob("x", f32(1))
        ws.remove_child("a")
        assert ws.children() == []
        assert ws.memory().used_bytes == 0
        with pytest.raises(NotFoundError, match="has no child 'a'"):
            ws.child("a")

    def test_a_grandchild_can_be_removed_by_its_path(self, ws: Workspace) -> None:
        ws.child("a/b", create=True).feed_blob("x", 1)
        ws.child("a").feed_blob("y", 1)
        ws.remove_child("a/b")
        assert ws.child("a").children() == []
        assert ws.child("a").local_blobs() == ["y"]

    @pytest.mark.parametrize("name", ["", "missing", "a/missing", "/", "a/"])
    def test_removing_what_is_no_child_changes_nothing(self, ws: Workspace, name: str) -> None:
        ws.feed_blob("x", 1)
        ws.child("a", create=True).feed_blob("y", 1)
        with pytest.raises((NotFoundError, InvalidInputError)):
            ws.remove_child(name)
        assert ws.family_names() == {"": ["x"], "a": ["y"]}

    @pytest.mark.parametrize("path", ["a b", "a//b", "/a", "é", "a/"])
    def test_an_impossible_path_is_refused_and_makes_nothing(self, ws: Workspace, path: str) -> None:
        with pytest.raises(InvalidInputError):
            ws.child(path, create=True)
        assert ws.children() == []

    def test_resetting_a_child_leaves_the_parent(self, ws: Workspace) -> None:
        """caffe2.md 1: ResetWorkspace 'on a child workspace also cuts the parent link'; here it does not."""
        child = ws.child("a", create=True)
        ws.feed_blob("x", 1)
        child.feed_blob("y", 1)
        child.create_net(Net("n"))
        child.child("b", create=True)
        child.reset()
        assert (child.blobs(), child.nets(), child.children()) == (["x"], [], [])
        assert ws.child("a") is child

    def test_removing_a_child_ends_nets_that_are_bound_to_it_and_nothing_else(self, ws: Workspace) -> None:
        ws.feed_blob("x", f32(0))
        ws.feed_blob("one", f32(1))
        ws.create_net(adding())
        ws.run_net("n", 3)
        ws.child("a", create=True).feed_blob("x2", f32(0))
        ws.remove_child("a")
        ws.run_net("n", 3)
        assert ws.fetch_blob("x") == 6


class TestVersions:
    def test_every_write_raises_the_version(self, ws: Workspace) -> None:
        seen = [0]

        def raised() -> bool:
            seen.append(version_of(ws, "x"))
            return seen[-1] > seen[-2]

        ws.feed_blob("x", f32(1))
        assert raised()
        ws.feed_blob("x", f32(1))
        assert raised()
        ws.feed_blob("x", f32(1), copy=False)
        assert raised()
        ws.run_operator("Add", ["x", "x"], ["x"])
        assert raised()
        ws.feed_blob("one", f32(1))
        ws.create_net(adding())
        for _ in range(4):
            ws.run_net("n")
            assert raised()
        ws.run_net("n", 5)
        assert raised()
        ws.feed_blob("x", "text")
        assert raised()
        ws.feed_blob("x", "text")
        assert raised()
        ws.reset_blob("x")
        assert raised()
        ws.feed_blob("x", ["s"])
        assert raised()
        names = Net("names")
        names.GetAllBlobNames([], "x")
        ws.create_net(names)
        for _ in range(4):
            ws.run_net("names")
            assert raised()

    def test_reading_raises_nothing(self, ws: Workspace) -> None:
        ws.feed_blob("x", f32(1))
        ws.run_operator("Relu", ["x"], ["y"])
        before = (ws.specs(), ws.names_version)
        ws.fetch_blob("x")
        ws.peek_blob("x")
        ws.blobs()
        ws.freeze().lease.release()
        assert (ws.specs(), ws.names_version) == before

    def test_the_names_version_is_raised_by_names_and_specs_and_nothing_else(self, ws: Workspace) -> None:
        ws.feed_blob("x", f32(1))
        ws.feed_blob("one", f32(1))
        ws.feed_blob("s", ["a"])
        ws.create_net(adding())
        ws.run_net("n", 2)
        version = ws.names_version
        ws.feed_blob("x", f32(2))
        ws.feed_blob("s", ["b"])
        ws.run_net("n", 3)
        lease = ws.freeze().lease
        ws.run_net("n", 3)
        lease.release()
        assert ws.names_version == version

    @pytest.mark.parametrize(
        "change",
        [
            lambda ws: ws.create_blob("new"),
            lambda ws: ws.feed_blob("new", 1),
            lambda ws: ws.feed_blob("x", f32(1, 2)),
            lambda ws: ws.feed_blob("x", np.zeros(1, np.int32)),
            lambda ws: ws.feed_blob("x", "text"),
            lambda ws: ws.feed_blob("s", ["a", "b"]),
            lambda ws: ws.remove_blob("x"),
            lambda ws: ws.reset_blob("x"),
            lambda ws: ws.reset(),
            lambda ws: ws.run_operator("Relu", ["x"], ["new"]),
            lambda ws: ws.child("c", create=True),
            lambda ws: ws.child("c", create=True).feed_blob("new", 1),
        ],
    )
    def test_the_names_version_is_raised_by(self, ws: Workspace, change: Callable[[Workspace], object]) -> None:
        ws.feed_blob("x", f32(1))
        ws.feed_blob("s", ["a"])
        version = ws.names_version
        change(ws)
        assert ws.names_version > version


class TestMemoryLimit:
    @pytest.fixture
    def tight(self) -> Workspace:
        ws = Workspace("tight", memory_limit_bytes=16384)
        ws.feed_blob("big", np.ones(2048, np.float32))
        ws.feed_blob("small", np.ones(256, np.float32))
        return ws

    def check(self, ws: Workspace, error: MemoryLimitError, wanted: int, names: list[str]) -> None:
        assert error.fields["wanted_bytes"] == wanted
        assert error.fields["used_bytes"] == 9216
        assert error.fields["limit_bytes"] == 16384
        assert error.fields["largest"]["big"] == 8192  # type: ignore[index]
        for part in (f"{wanted:,}", "9,216", "16,384", "'big' 8,192", "'tight'"):
            assert part in str(error)
        assert ws.blobs() == names
        assert ws.fetch_blob("big").sum() == 2048
        assert ws.memory().used_bytes == 9216
        ws.run_operator("Relu", ["small"], ["fits"])
        assert ws.fetch_blob("fits").sum() == 256

    def test_a_feed_over_the_limit_loses_nothing(self, tight: Workspace) -> None:
        with pytest.raises(MemoryLimitError, match="feed_blob") as caught:
            tight.feed_blob("new", np.ones(2048, np.float32))
        self.check(tight, caught.value, 8192, ["big", "small"])

    def test_a_feed_without_copy_counts_too(self, tight: Workspace) -> None:
        with pytest.raises(MemoryLimitError, match="feed_blob") as caught:
            tight.feed_blob("new", np.ones(2048, np.float32), copy=False)
        self.check(tight, caught.value, 8192, ["big", "small"])

    def test_a_feed_of_another_size_that_does_not_fit_leaves_the_old_value(self, tight: Workspace) -> None:
        with pytest.raises(MemoryLimitError):
            tight.feed_blob("big", np.ones(3000, np.float32))
        assert tight.fetch_blob("big").shape == (2048,)

    def test_an_operator_over_the_limit_loses_nothing(self, tight: Workspace) -> None:
        with pytest.raises(MemoryLimitError, match=r"operator Relu\(big\) -> new wanted") as caught:
            tight.run_operator("Relu", ["big"], ["new"])
        self.check(tight, caught.value, 8192, ["big", "new", "small"])

    def test_a_net_over_the_limit_loses_nothing_and_says_where(self, tight: Workspace) -> None:
        net = Net("n")
        net.Scale("small", "small", scale=1.0)
        net.Relu("big", "new")
        tight.create_net(net)
        with pytest.raises(MemoryLimitError, match="operator 1 of 2 of net 'n'") as caught:
            tight.run_net("n")
        self.check(tight, caught.value, 8192, ["big", "new", "small"])
        tight.remove_blob("big")
        tight.feed_blob("big", f32(-1))
        tight.run_net("n", 3)
        assert tight.fetch_blob("new") == 0

    def test_an_operator_with_two_outputs_gives_the_first_back_when_the_second_does_not_fit(
        self, tight: Workspace, own_operators: None
    ) -> None:
        @register_cpu_operator(OperatorSchema(type="Two", doc="Two outputs.", inputs=(0, 0), outputs=(2, 2)))
        def two(call: OperatorCall) -> Callable[[], object]:
            call.output(0, (1024,), np.dtype("float32"))
            call.output(1, (2048,), np.dtype("float32"))
            return lambda: None

        before = tight.memory().used_bytes
        with pytest.raises(MemoryLimitError):
            tight.run_operator("Two", [], ["a", "b"])
        assert tight.memory().used_bytes == before
        assert kind_of(tight, "a") is Kind.UNINITIALIZED

    def test_a_limit_holds_for_children_too(self, tight: Workspace) -> None:
        with pytest.raises(MemoryLimitError):
            tight.child("c", create=True).feed_blob("new", np.ones(2048, np.float32))

    @pytest.mark.parametrize("limit", [0, -1])
    def test_a_limit_is_positive(self, limit: int) -> None:
        with pytest.raises(InvalidInputError, match="memory limit"):
            Workspace("w", memory_limit_bytes=limit)


class TestRandomness:
    def test_equal_seed_and_name_give_equal_numbers_and_reset_starts_anew(self) -> None:
        def draw(ws: Workspace) -> list[float]:
            ws.run_operator("UniformFill", [], ["r"], shape=[4])
            return ws.fetch_blob("r").tolist()

        first = Workspace("a", seed=3)
        numbers = [draw(first), draw(first)]
        assert numbers[0] != numbers[1]
        assert draw(Workspace("a", seed=3)) == numbers[0]
        assert draw(Workspace("a", seed=4)) != numbers[0]
        assert draw(Workspace("b", seed=3)) != numbers[0]
        assert draw(Workspace("a", seed=3).child("c", create=True)) != numbers[0]
        first.reset()
        assert draw(first) == numbers[0]

    def test_a_restored_generator_goes_on_where_it_was(self) -> None:
        ws = Workspace("a", seed=3)
        net = Net("n")
        net.UniformFill([], "u", shape=[3])
        net.GaussianFill([], "g", shape=[3])
        ws.create_net(net)
        ws.run_net("n", 3)
        frozen = ws.freeze()
        snapshot = frozen.snapshot()
        frozen.lease.release()
        ws.run_net("n", 2)
        expected = [ws.fetch_blob(name).tobytes() for name in "ug"]
        other = Workspace("a", seed=99)
        empty = type(snapshot)(workspace="a", blobs=(), nets=snapshot.nets, state=snapshot.state)
        other.restore(empty, other.stage())
        other.run_net("n", 2)
        assert [other.fetch_blob(name).tobytes() for name in "ug"] == expected


def test_many_threads_leave_a_consistent_workspace(
    ws: Workspace, in_thread: Callable[[Callable[[], object]], Any]
) -> None:
    ws.feed_blob("x", f32(0))
    ws.feed_blob("one", f32(1))
    ws.create_net(adding(times=2))
    start = threading.Barrier(9)
    rounds = 30

    def feeding(number: int) -> Callable[[], None]:
        def work() -> None:
            start.wait(10)
            for i in range(rounds):
                ws.feed_blob(f"f{number}", np.full(i % 5 + 1, i))
                assert set(ws.fetch_blob(f"f{number}").tolist()) == {i}
                if i % 3 == 0:
                    ws.remove_blob(f"f{number}")

        return work

    def running() -> None:
        start.wait(10)
        for _ in range(rounds):
            ws.run_net("n", 3)

    def looking() -> None:
        start.wait(10)
        for _ in range(rounds):
            names = ws.blobs()
            assert len(names) == len(set(names))
            ws.specs()
            ws.memory()
            assert ws.has_blob("x")
            assert ws.peek_blob("x", seconds=10).item() % 2 == 0

    def freezing() -> None:
        start.wait(10)
        for i in range(rounds):
            ws.gate.hold(f"b{i}", seconds=10)
            ws.gate.wait_stopped(f"b{i}", target=0)
            frozen = ws.freeze()
            ws.gate.resume(f"b{i}")
            x = next(blob.array for blob in frozen.snapshot().blobs if blob.name == "x")
            value = x.copy() if x is not None else None
            assert value % 2 == 0
            assert x == value
            frozen.lease.release()

    def childing() -> None:
        start.wait(10)
        for _ in range(rounds):
            ws.child("c", create=True).feed_blob("own", f32(1, 2))
            ws.remove_child("c")

    work = [feeding(0), feeding(1), feeding(2), running, running, looking, looking, freezing, childing]
    for background in [in_thread(each) for each in work]:
        background.finish()
    assert ws.fetch_blob("x") == 2 * 3 * 2 * rounds
    memory = ws.memory()
    assert (memory.leased_bytes, memory.retained_bytes, memory.external_bytes) == (0, 0, 0)
    for name in ws.blobs():
        ws.remove_blob(name)
    assert ws.memory().used_bytes == 0
