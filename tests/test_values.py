"""What a blob may hold, what it may be called, and that everything else is refused by name."""

from __future__ import annotations

import datetime as dt
import math
from collections.abc import Callable
from decimal import Decimal
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from blobspace.ops.dtypes import CAFFE2_NUMBERS, TENSOR_DTYPES, is_tensor_dtype, parse_dtype
from blobspace.ops.errors import InvalidInputError
from blobspace.ops.values import (
    MAX_NAME_BYTES,
    MAX_PLAIN_DEPTH,
    Kind,
    check_name,
    check_plain,
    normalize_value,
    pack_plain,
    pack_strings,
    string_tensor,
    unpack_plain,
    unpack_strings,
)

PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False)
    | st.text(st.characters(exclude_categories=["Cs"]))
    | st.binary(),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.text(st.characters(exclude_categories=["Cs"])) | st.integers(-(2**63), 2**64 - 1) | st.binary(),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


class TestNames:
    @pytest.mark.parametrize("name", ["x", " ", "gpu_0/fc_w", "/", "é", "日本", "a\nb", "\x7f", "😀" * 256, "x" * 1024])
    def test_a_name_is_any_text_of_at_most_1024_bytes(self, name: str) -> None:
        assert check_name(name) == name

    @pytest.mark.parametrize("name", ["", "x" * 1025, "😀" * 256 + "x", "a\0b", "\0", "\ud800", "a\udfff"])
    def test_an_impossible_name_is_refused(self, name: str) -> None:
        with pytest.raises(InvalidInputError):
            check_name(name)

    @pytest.mark.parametrize("name", [None, 3, b"x", ["x"], np.array("x"), 1.5, object()])
    def test_a_name_is_a_str(self, name: object) -> None:
        with pytest.raises(InvalidInputError, match="is a str; found"):
            check_name(name)

    def test_the_refusal_says_what_kind_of_name_and_which_rule(self) -> None:
        with pytest.raises(InvalidInputError, match=r"net name .* 1030 bytes of UTF-8; at most 1024") as caught:
            check_name("x" * 1030, "net")
        assert caught.value.fields == {"found_bytes": 1030, "limit_bytes": MAX_NAME_BYTES}
        with pytest.raises(InvalidInputError, match="NUL character at position 1"):
            check_name("a\0b")

    def test_the_refusal_of_a_surrogate_can_itself_be_encoded(self) -> None:
        with pytest.raises(InvalidInputError) as caught:
            check_name("\ud800")
        str(caught.value).encode()
        pack_plain(caught.value.fields)


class TestTensors:
    @pytest.mark.parametrize("name", TENSOR_DTYPES)
    def test_every_element_type_is_kept(self, name: str) -> None:
        array = np.zeros((2, 3), TENSOR_DTYPES[name])
        kind, value = normalize_value("x", array)
        assert (kind, value.dtype.name, value.shape) == (Kind.TENSOR, name, (2, 3))

    @pytest.mark.parametrize("dtype", [">f4", ">i8", ">u2", ">f8", ">c16", ">f2"])
    def test_big_endian_arrays_are_converted_never_misread(self, dtype: str) -> None:
        # caffe2.md 1: "big-endian: silently misread bytes (no byte-swap)".
        array = np.array([1, 2, 300], dtype=dtype)
        _, value = normalize_value("x", array)
        assert value.dtype.isnative
        np.testing.assert_array_equal(value, array)

    def test_a_masked_array_is_refused(self) -> None:
        # caffe2.md 1: "masked arrays lose the mask".
        with pytest.raises(InvalidInputError, match="masked"):
            normalize_value("x", np.ma.masked_array([1.0, 2.0], mask=[True, False]))
        with pytest.raises(InvalidInputError, match="masked"):
            normalize_value("x", np.ma.masked)

    def test_a_matrix_becomes_a_plain_array(self) -> None:
        # caffe2.md 1: "matrix becomes plain 2-D". A matrix would multiply otherwise inside an operator.
        with pytest.warns(PendingDeprecationWarning):
            matrix = np.matrix([[1.0, 2.0], [3.0, 4.0]])
        _, value = normalize_value("x", matrix)
        assert type(value) is np.ndarray
        assert value.shape == (2, 2)

    @pytest.mark.parametrize("shape", [(), (0,), (0, 5), (3, 0), (1,), (1,) * 32])
    def test_0d_and_empty_arrays_keep_their_shape(self, shape: tuple[int, ...]) -> None:
        kind, value = normalize_value("x", np.zeros(shape, np.int16))
        assert (kind, value.shape) == (Kind.TENSOR, shape)

    @pytest.mark.parametrize(
        "array",
        [
            np.arange(12).reshape(3, 4).T,
            np.arange(12)[::3],
            np.arange(12)[::-1],
            np.asfortranarray(np.arange(12).reshape(3, 4)),
            np.broadcast_to(np.arange(3), (4, 3)),
        ],
        ids=["transposed", "strided", "reversed", "fortran", "broadcast"],
    )
    def test_any_strides_keep_the_values_and_leave_the_array_alone(self, array: np.ndarray) -> None:
        before = array.copy()
        _, value = normalize_value("x", array)
        np.testing.assert_array_equal(value, before)
        np.testing.assert_array_equal(array, before)

    @pytest.mark.parametrize(
        "array",
        [
            np.zeros(2, "datetime64[s]"),
            np.zeros(2, "timedelta64[D]"),
            np.zeros(2, [("a", "f4")]),
            np.zeros(2, "V7"),
            np.zeros(2, np.longdouble),
            np.zeros(2, ml_dtypes.int4),
        ],
        ids=lambda array: str(array.dtype),
    )
    def test_other_element_types_are_refused_and_named(self, array: np.ndarray) -> None:
        with pytest.raises(InvalidInputError, match="cannot hold an array of dtype") as caught:
            normalize_value("x", array)
        assert caught.value.fields["found"] == str(array.dtype)

    @pytest.mark.parametrize(
        ("scalar", "dtype"),
        [
            (np.float32(1.5), "float32"),
            (np.int8(-3), "int8"),
            (np.bool_(True), "bool"),
            (np.complex64(1j), "complex64"),
            (ml_dtypes.bfloat16(2), "bfloat16"),
        ],
    )
    def test_numpy_scalars_are_0d_tensors(self, scalar: Any, dtype: str) -> None:
        kind, value = normalize_value("x", scalar)
        assert (kind, value.dtype.name, value.shape, value.item()) == (Kind.TENSOR, dtype, (), scalar.item())

    @pytest.mark.parametrize("scalar", [np.datetime64("2020-01-01"), np.timedelta64(3, "s"), np.longdouble(1)])
    def test_other_numpy_scalars_are_refused(self, scalar: Any) -> None:
        with pytest.raises(InvalidInputError):
            normalize_value("x", scalar)


class FromElsewhere:
    def __init__(self, array: np.ndarray, error: Exception | None = None) -> None:
        self.array = array
        self.error = error

    def __dlpack__(self, **arguments: Any) -> Any:
        if self.error is not None:
            raise self.error
        return self.array.__dlpack__(**arguments)

    def __dlpack_device__(self) -> Any:
        return self.array.__dlpack_device__()


class TestDLPack:
    def test_an_array_of_another_library_comes_in(self) -> None:
        kind, value = normalize_value("x", FromElsewhere(np.arange(6.0).reshape(2, 3)))
        assert kind is Kind.TENSOR
        np.testing.assert_array_equal(value, np.arange(6.0).reshape(2, 3))

    @pytest.mark.parametrize(
        "error", [BufferError("b"), RuntimeError("r"), TypeError("t"), ValueError("v"), AttributeError("a")]
    )
    def test_one_that_does_not_come_in_is_refused_with_its_reason(self, error: Exception) -> None:
        with pytest.raises(InvalidInputError, match=f"through DLPack: {error}"):
            normalize_value("x", FromElsewhere(np.zeros(1), error))


class TestStringTensors:
    @pytest.mark.parametrize("shape", [(), (1,), (2, 3), (0,), (0, 2)])
    def test_object_arrays_of_str_and_bytes_are_string_tensors_of_bytes(self, shape: tuple[int, ...]) -> None:
        array = np.full(shape, "é", dtype=object)
        kind, value = normalize_value("x", array)
        assert (kind, value.dtype, value.shape) == (Kind.STRINGS, np.dtype(object), shape)
        assert set(value.reshape(-1).tolist()) <= {"é".encode()}
        assert set(array.reshape(-1).tolist()) <= {"é"}

    def test_any_bytes_are_kept(self) -> None:
        _, value = normalize_value("x", np.array([b"", b"\0\0", b"\xff\x00", "a\0"], dtype=object))
        assert value.tolist() == [b"", b"\0\0", b"\xff\x00", b"a\0"]

    @pytest.mark.parametrize("array", [np.array(["ab", "日"]), np.array([b"ab", b"c"]), np.array("ab"), np.str_("ab")])
    def test_arrays_of_fixed_width_text_are_string_tensors(self, array: Any) -> None:
        # caffe2.md 1: "converted to object arrays first (breaks with numpy >= 1.24)".
        kind, value = normalize_value("x", array)
        assert (kind, value.shape) == (Kind.STRINGS, np.shape(array))
        assert all(type(item) is bytes for item in value.reshape(-1).tolist())

    def test_a_list_of_only_text_is_a_string_tensor_and_an_empty_list_a_plain_value(self) -> None:
        assert normalize_value("x", ["a", b"b"])[1].tolist() == [b"a", b"b"]
        assert normalize_value("x", [])[0] is Kind.VALUE
        assert normalize_value("x", ["a", 1])[0] is Kind.VALUE

    @pytest.mark.parametrize("item", [None, 3, 1.5, [b"a"], np.float32(1), bytearray(b"x")])
    def test_an_object_array_of_anything_else_is_refused_with_its_place(self, item: object) -> None:
        array = np.empty((2, 2), dtype=object)
        array[:] = b"a"
        array[1, 0] = item
        with pytest.raises(InvalidInputError, match="element 2 of the object array is a"):
            normalize_value("x", array)

    @pytest.mark.parametrize("make", [list, lambda items: np.array(items, dtype=object), np.array])
    def test_text_that_is_not_utf8_is_refused(self, make: Callable[[list[str]], object]) -> None:
        with pytest.raises(InvalidInputError, match="not UTF-8"):
            normalize_value("x", make(["a", "\ud800"]))

    @given(st.lists(st.binary(max_size=4), max_size=6))
    def test_what_is_packed_comes_back(self, items: list[bytes]) -> None:
        for shape in [(len(items),), (1, len(items)), (len(items), 1, 1)]:
            back = unpack_strings(pack_strings(string_tensor(items).reshape(shape)))
            assert (back.shape, back.reshape(-1).tolist()) == (shape, items)

    @pytest.mark.parametrize(
        "value",
        [
            None,
            [],
            [[1]],
            [[2], [b"a"]],
            [[-1], []],
            [[1], ["text"]],
            [[1.0], [b"a"]],
            [[True], [b"a"]],
            [[1] * 65, [b"a"]],
            [[1], [b"a"], 0],
            {"a": 1},
        ],
    )
    def test_bytes_that_are_no_string_tensor_are_a_value_error(self, value: object) -> None:
        with pytest.raises(ValueError, match="not a packed string tensor"):
            unpack_strings(pack_plain(value))


class TestPlainValues:
    @given(PLAIN)
    def test_what_is_accepted_comes_back_equal_with_its_types(self, value: Any) -> None:
        check_plain(value, where="here")
        back = unpack_plain(pack_plain(value))
        assert back == value
        assert repr(back) == repr(value)

    @pytest.mark.parametrize("value", [2**64, -(2**63) - 1, 10**400])
    def test_integers_beyond_64_bits_are_refused(self, value: int) -> None:
        with pytest.raises(InvalidInputError, match="64 bits"):
            normalize_value("x", value)
        with pytest.raises(InvalidInputError, match="64 bits"):
            normalize_value("x", {"a": [value]})

    @pytest.mark.parametrize(
        "value",
        [
            (1, 2),
            [(1,)],
            {1, 2},
            object(),
            bytearray(b"x"),
            memoryview(b"x"),
            1j,
            Decimal(1),
            dt.date(2020, 1, 1),
            range(3),
            {"a": (1,)},
            {None: 1},
            {1.5: 1},
            {True: 1},
            [np.zeros(2)],
            {"a": np.float32(1)},
            np.float32,
            Kind.VALUE,
            Ellipsis,
            lambda: None,
        ],
        ids=lambda value: repr(value).partition(" at 0x")[0][:30],
    )
    def test_what_messagepack_would_change_or_not_carry_is_refused(self, value: object) -> None:
        with pytest.raises(InvalidInputError, match="x"):
            normalize_value("x", value)

    def test_nesting_has_a_limit_and_a_cycle_meets_it(self) -> None:
        def nested(levels: int) -> list[Any]:
            value: list[Any] = []
            for _ in range(levels):
                value = [value]
            return value

        check_plain(nested(MAX_PLAIN_DEPTH), where="x")
        assert unpack_plain(pack_plain(nested(MAX_PLAIN_DEPTH))) == nested(MAX_PLAIN_DEPTH)
        with pytest.raises(InvalidInputError, match="nested deeper than 64"):
            check_plain(nested(MAX_PLAIN_DEPTH + 1), where="x")
        cycle: dict[str, Any] = {}
        cycle["self"] = cycle
        with pytest.raises(InvalidInputError, match="nested deeper"):
            check_plain(cycle, where="x")

    @pytest.mark.parametrize("value", ["\ud800", ["ok", "\udfff", 1], {"\ud800": 1}])
    def test_text_that_is_not_utf8_is_refused(self, value: object) -> None:
        with pytest.raises(InvalidInputError, match="not UTF-8"):
            normalize_value("x", value)

    @pytest.mark.parametrize("value", [math.inf, -math.inf, -0.0, 5e-324])
    def test_every_float_comes_back_bit_for_bit(self, value: float) -> None:
        check_plain(value, where="x")
        assert repr(unpack_plain(pack_plain(value))) == repr(value)
        assert math.isnan(unpack_plain(pack_plain(math.nan)))

    @pytest.mark.parametrize("data", [b"", b"\xc1", b"\x92\x01", b"\x01\x02", b"\xd9", b"\xa1\xff", b"\x91" * 2000])
    def test_bytes_that_are_no_plain_value_are_a_value_error(self, data: bytes) -> None:
        with pytest.raises(ValueError):  # noqa: PT011  (any ValueError keeps the promise)
            unpack_plain(data)


class TestElementTypes:
    @pytest.mark.parametrize("value", [*CAFFE2_NUMBERS, *TENSOR_DTYPES, "float", "long", "FLOAT32", "half"])
    def test_numbers_and_names_mean_an_element_type(self, value: object) -> None:
        assert is_tensor_dtype(parse_dtype(value))

    def test_dtypes_and_scalar_types_mean_themselves(self) -> None:
        assert parse_dtype(np.float32) == np.dtype("float32")
        assert parse_dtype(np.dtype("int8")) == np.dtype("int8")
        assert parse_dtype(ml_dtypes.bfloat16).name == "bfloat16"

    @pytest.mark.parametrize(
        "value",
        [
            None,
            True,
            0,
            4,
            99,
            "string",
            "float128",
            "",
            object,
            str,
            ">f4",
            np.dtype(">f4"),
            [],
            {},
            {"names": 3},
            1.5,
        ],
        ids=repr,
    )
    def test_anything_else_is_refused(self, value: object) -> None:
        with pytest.raises(InvalidInputError, match="no element type"):
            parse_dtype(value)
