"""Definitions: checked when made, frozen afterwards, and the same again after a checkpoint."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from blobspace.ops import DeviceOption, InvalidInputError, Net, NetDef, OperatorDef, operator_def
from blobspace.ops.definitions import CPU, CUDA
from blobspace.ops.values import pack_plain, unpack_plain

TEXT = st.text(st.characters(exclude_categories=["Cs"]))
NAMES = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=20)
ARGUMENTS = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False) | TEXT | st.binary(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)
DEVICES = st.builds(
    DeviceOption, device_type=st.sampled_from([CPU, CUDA]), random_seed=st.none() | st.integers(0, 2**64 - 1)
)
OPERATORS = st.builds(
    OperatorDef,
    type=TEXT.filter(bool),
    inputs=st.lists(NAMES, max_size=3).map(tuple),
    outputs=st.lists(NAMES, max_size=3).map(tuple),
    args=st.dictionaries(TEXT.filter(bool), ARGUMENTS, max_size=3),
    device_option=st.none() | DEVICES,
    name=TEXT,
    is_gradient_op=st.booleans(),
)


class TestPlainForm:
    @given(OPERATORS)
    def test_an_operator_comes_back_equal_through_messagepack(self, operator: OperatorDef) -> None:
        assert OperatorDef.from_plain(unpack_plain(pack_plain(operator.to_plain()))) == operator

    @given(st.builds(NetDef, name=NAMES, operators=st.lists(OPERATORS, max_size=3).map(tuple)))
    def test_a_net_comes_back_equal_through_messagepack(self, net: NetDef) -> None:
        assert NetDef.from_plain(unpack_plain(pack_plain(net.to_plain()))) == net

    @pytest.mark.parametrize("field", ["type", "inputs", "outputs", "args", "device", "random_seed", "name"])
    def test_a_missing_or_wrong_field_is_refused(self, field: str) -> None:
        whole = OperatorDef(
            type="Add", inputs=("a", "b"), outputs=("c",), device_option=DeviceOption(random_seed=1)
        ).to_plain()
        with pytest.raises(InvalidInputError):
            OperatorDef.from_plain({key: value for key, value in whole.items() if key != field})
        with pytest.raises(InvalidInputError):
            OperatorDef.from_plain({**whole, field: 3.5})

    @pytest.mark.parametrize(
        "plain",
        [
            None,
            3,
            "net",
            [],
            {},
            {"name": "n"},
            {"name": "n", "operators": 3},
            {"name": "n", "operators": [3]},
            {"name": "", "operators": []},
        ],
    )
    def test_what_is_no_net_is_refused(self, plain: Any) -> None:
        with pytest.raises(InvalidInputError):
            NetDef.from_plain(plain)


class TestOwnership:
    def test_a_change_of_the_callers_lists_and_dicts_does_not_leak_in(self) -> None:
        inner, table, inputs = [1, 2], {"k": [1]}, ["a"]
        args: dict[str, Any] = {"lists": [inner], "table": table}
        operator = OperatorDef(type="T", inputs=inputs, args=args)  # type: ignore[arg-type]
        inner.append(3)
        table["k"].append(2)
        args["new"] = 1
        inputs.append("b")
        assert operator.args == {"lists": [[1, 2]], "table": {"k": [1]}}
        assert operator.inputs == ("a",)

    def test_a_change_of_the_plain_form_does_not_leak_in(self) -> None:
        operator = OperatorDef(type="T", args={"lists": [[1]]})
        plain = operator.to_plain()
        plain["args"]["lists"][0].append(2)
        plain["inputs"].append("x")
        assert operator == OperatorDef(type="T", args={"lists": [[1]]})

    def test_a_definition_taken_from_a_net_does_not_grow_with_it(self) -> None:
        net = Net("n")
        net.Relu("x", "y")
        before = net.definition()
        net.Relu("y", "z")
        assert len(before.operators) == 1
        operators = [*before.operators]
        definition = NetDef(name="n", operators=operators)  # type: ignore[arg-type]
        operators.clear()
        assert len(definition.operators) == 1

    def test_definitions_are_frozen(self) -> None:
        with pytest.raises(dataclasses.FrozenInstanceError):
            OperatorDef(type="T").type = "U"  # type: ignore[misc]
        with pytest.raises(dataclasses.FrozenInstanceError):
            NetDef(name="n").name = "m"  # type: ignore[misc]


class TestArguments:
    @pytest.mark.parametrize(
        ("given", "kept"),
        [
            ((1, 2), [1, 2]),
            (range(3), [0, 1, 2]),
            (np.float32(0.5), 0.5),
            (np.int64(3), 3),
            (np.bool_(True), True),
            (np.str_("a"), "a"),
            (np.arange(4).reshape(2, 2), [[0, 1], [2, 3]]),
            (np.array(2.0), 2.0),
            ([np.int32(1), 2], [1, 2]),
            (np.float32, "float32"),
            (np.dtype("int8"), "int8"),
            (float, "float64"),
            (None, None),
        ],
        ids=repr,
    )
    def test_numpy_values_become_plain_ones(self, given: Any, kept: Any) -> None:
        value = OperatorDef(type="T", args={"a": given}).args["a"]
        assert (value, type(value)) == (kept, type(kept))

    @pytest.mark.parametrize(
        "value",
        [
            object(),
            {1, 2},
            1j,
            2**64,
            [(1,)],
            np.array([1j]),
            np.datetime64("2020-01-01"),
            np.longdouble(1),
            "\ud800",
            OperatorDef,
            object,
            str,
            np.dtype("M8[s]"),
            np.array([None, object()]),
        ],
        ids=lambda value: repr(value).partition(" at 0x")[0][:30],
    )
    def test_what_no_checkpoint_could_carry_is_refused_by_name(self, value: object) -> None:
        with pytest.raises(InvalidInputError, match="Operator T: argument 'a'"):
            OperatorDef(type="T", args={"a": value})

    @pytest.mark.parametrize("key", ["", 3, None])
    def test_an_argument_name_is_a_str(self, key: Any) -> None:
        with pytest.raises(InvalidInputError, match="argument name"):
            OperatorDef(type="T", args={key: 1})


class TestChecks:
    @pytest.mark.parametrize("type_", ["", None, 3, b"T"])
    def test_a_type_is_a_str(self, type_: Any) -> None:
        with pytest.raises(InvalidInputError, match="operator type"):
            OperatorDef(type=type_)

    @pytest.mark.parametrize("name", ["", "a\0", "\ud800", "x" * 1025, 3])
    def test_blob_names_are_checked(self, name: Any) -> None:
        with pytest.raises(InvalidInputError):
            OperatorDef(type="T", inputs=(name,))
        with pytest.raises(InvalidInputError):
            OperatorDef(type="T", outputs=(name,))
        with pytest.raises(InvalidInputError):
            NetDef(name=name)

    def test_a_bare_str_is_no_list_of_names(self) -> None:
        with pytest.raises(InvalidInputError, match=r"Write \['abc'\]"):
            OperatorDef(type="T", inputs="abc")  # type: ignore[arg-type]
        assert operator_def("T", "abc", "d").inputs == ("abc",)  # type: ignore[arg-type]

    @pytest.mark.parametrize("inputs", [3, None])
    def test_what_cannot_be_listed_is_refused(self, inputs: Any) -> None:
        with pytest.raises(InvalidInputError, match="must be a list of blob names"):
            operator_def("T", inputs)

    @pytest.mark.parametrize("name", [3, None, "\ud800"])
    def test_a_label_is_text_that_a_checkpoint_can_carry(self, name: Any) -> None:
        with pytest.raises(InvalidInputError):
            OperatorDef(type="T", name=name)

    @pytest.mark.parametrize("device", ["gpu", "CPU", "", None, 0])
    def test_an_unknown_device_is_refused(self, device: Any) -> None:
        with pytest.raises(InvalidInputError, match="Unknown device type"):
            DeviceOption(device_type=device)

    @pytest.mark.parametrize("seed", [-1, 2**64, 1.5, "3", True])
    def test_a_seed_is_one_that_a_checkpoint_can_carry(self, seed: Any) -> None:
        with pytest.raises(InvalidInputError, match="random seed"):
            DeviceOption(random_seed=seed)

    def test_a_net_holds_only_operators(self) -> None:
        with pytest.raises(InvalidInputError, match="found str"):
            NetDef(name="n", operators=("Relu",))  # type: ignore[arg-type]

    def test_an_operator_is_given_finished_or_in_parts(self) -> None:
        finished = OperatorDef(type="T")
        assert operator_def(finished) is finished
        with pytest.raises(InvalidInputError, match="again in parts"):
            operator_def(finished, ["x"])
        with pytest.raises(InvalidInputError, match="again in parts"):
            operator_def(finished, alpha=1)


def test_external_inputs_are_what_is_read_before_it_is_written() -> None:
    net = NetDef(
        name="n",
        operators=(
            OperatorDef(type="A", inputs=("x", "w"), outputs=("h",)),
            OperatorDef(type="B", inputs=("h", "y"), outputs=("x",)),
            OperatorDef(type="C", inputs=("x", "z", "z"), outputs=("z", "h")),
        ),
    )
    assert net.external_inputs == ("x", "w", "y", "z")
    assert net.outputs == ("h", "x", "z")


def test_an_operator_reads_as_a_line() -> None:
    assert str(OperatorDef(type="Add", inputs=("a", "b"), outputs=("c",), name="first")) == "Add (first)(a, b) -> c"
    assert str(OperatorDef(type="Print", inputs=("a",))) == "Print(a) -> nothing"
