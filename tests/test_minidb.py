"""blobspace.ops.minidb: against a file that the real Caffe2 wrote, an independent reader, and damage of every kind."""

from __future__ import annotations

import struct
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from blobspace.ops.errors import CorruptCheckpointError, InvalidInputError
from blobspace.ops.minidb import decode_blobs, encode_blobs

GOLDEN = Path(__file__).parent / "caffe2_golden" / "minidb"
GOLDEN_CHUNK = 700
STRINGS = [b"a", b"b\0c", "é".encode(), b""]
DTYPES = ["float16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8", "uint16", "bool"]


@pytest.fixture(scope="module")
def golden() -> bytes:
    return (GOLDEN / "all_types.minidb").read_bytes()


@pytest.fixture(scope="module")
def small_file() -> bytes:
    blobs = {
        "f": np.array([[1.5, -2.0]], dtype=np.float32),
        "i": np.array([-1, 300, 5], dtype=np.int16),
        "s": string_array([b"ab", b""]),
        "t": b"text",
    }
    return encoded(blobs, chunk_elements=2)


def encoded(blobs: dict[str, object], **options: int) -> bytes:
    return b"".join(encode_blobs(blobs, **options))


def string_array(items: list[bytes]) -> np.ndarray:
    out = np.empty(len(items), dtype=object)
    out[:] = items
    return out


def assert_same(found: object, expected: object) -> None:
    """Equal to the bit: NaN payloads and the sign of zero included."""
    assert type(found) is type(expected)
    if isinstance(expected, bytes):
        assert found == expected
        return
    assert (found.dtype, found.shape) == (expected.dtype.newbyteorder("="), expected.shape)
    assert found.flags.c_contiguous
    assert found.flags.writeable
    if expected.dtype.kind == "O":
        assert found.tolist() == expected.tolist()
    else:
        assert found.tobytes() == np.ascontiguousarray(expected, dtype=found.dtype).tobytes()


def assert_same_blobs(found: dict[str, object], expected: dict[str, object]) -> None:
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert_same(found[name], value)


# A writer of our own, one byte at a time, for what Caffe2 and encode_blobs never write.


def varint(value: int) -> bytes:
    value %= 1 << 64
    out = b""
    while value > 127:
        out += bytes([value % 128 + 128])
        value //= 128
    return out + bytes([value])


def number_field(number: int, value: int) -> bytes:
    return varint(number * 8) + varint(value)


def bytes_field(number: int, payload: bytes) -> bytes:
    return varint(number * 8 + 2) + varint(len(payload)) + payload


def record(key: str | bytes, value: bytes) -> bytes:
    key = key.encode() if isinstance(key, str) else key
    return struct.pack("<ii", len(key), len(value)) + key + value


def tensor_record(
    *,
    dims: tuple[int, ...] = (3,),
    number: int = 2,
    payload: bytes | None = None,
    segment: tuple[int, int] | None = (0, 3),
    key: str = "w#%0",
) -> bytes:
    body = b"".join(number_field(1, size) for size in dims) + number_field(2, number)
    body += bytes_field(4, b"\1\2\3") if payload is None else payload
    if segment:
        body += bytes_field(11, number_field(1, segment[0]) + number_field(2, segment[1]))
    return record(key, bytes_field(2, b"Tensor") + bytes_field(3, body))


def split_records(data: bytes) -> Iterator[bytes]:
    while data:
        key_bytes, value_bytes = struct.unpack("<ii", data[:8])
        yield data[: 8 + key_bytes + value_bytes]
        data = data[8 + key_bytes + value_bytes :]


def refusal(data: bytes) -> CorruptCheckpointError:
    with pytest.raises(CorruptCheckpointError) as caught:
        decode_blobs(data)
    assert {"record", "offset", "expected", "found"} <= caught.value.fields.keys()
    return caught.value


def decodes_or_refuses(data: bytes) -> None:
    try:
        blobs = decode_blobs(data)
    except CorruptCheckpointError:
        return
    assert all(isinstance(value, (bytes, np.ndarray)) for value in blobs.values())


class TestTheRealCaffe2:
    def test_its_file_decodes_to_the_values_it_saved(self, golden: bytes) -> None:
        blobs = decode_blobs(golden)
        with np.load(GOLDEN / "all_types.npz") as expected:
            assert set(blobs) == {*expected.files, "strings"}
            for name in expected.files:
                assert_same(blobs[name], expected[name])
        assert_same(blobs["strings"], string_array(STRINGS))

    def test_its_values_encode_to_its_very_bytes(self, golden: bytes) -> None:
        again = list(encode_blobs(decode_blobs(golden), chunk_elements=GOLDEN_CHUNK))
        # As a set: Caffe2 may write the chunks of a tensor in any order.
        assert sorted(again) == sorted(split_records(golden))

    def test_its_names_keep_their_order_of_appearance(self, golden: bytes) -> None:
        keys = [item[8 : 8 + struct.unpack("<i", item[:4])[0]] for item in split_records(golden)]
        assert list(decode_blobs(golden)) == list(dict.fromkeys(key.decode().split("#%")[0] for key in keys))


class TestRoundTrips:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("shape", [(), (0,), (0, 5), (1,), (3, 4, 5)], ids=str)
    @pytest.mark.parametrize("chunk_elements", [1, 7, 60, 1_000_000])
    def test_a_tensor_comes_back(self, dtype: str, shape: tuple[int, ...], chunk_elements: int) -> None:
        count = int(np.prod(shape))
        raw = np.random.default_rng(7).bytes(count * np.dtype(dtype).itemsize)
        value = np.frombuffer(raw, np.uint8) % 2 == 1 if dtype == "bool" else np.frombuffer(raw, dtype)
        value = value.reshape(shape)
        file = encoded({"w": value}, chunk_elements=chunk_elements)
        assert len(list(split_records(file))) == max(1, -(-count // chunk_elements))
        assert_same_blobs(decode_blobs(file), {"w": value})

    @pytest.mark.parametrize("dtype", [name for name in DTYPES if "int" in name])
    def test_the_extremes_of_an_integer_type_come_back(self, dtype: str) -> None:
        limits = np.iinfo(dtype)
        value = np.array([limits.min, limits.max, 0, 1, limits.max // 2 + 1, limits.min // 2, 127, 1], dtype=dtype)
        assert_same_blobs(decode_blobs(encoded({"w": value})), {"w": value})

    def test_more_elements_than_a_block_come_back(self) -> None:
        rng = np.random.default_rng(1)
        blobs = {
            "wide": rng.integers(-(2**63), 2**63 - 1, 100_000),
            "mixed": rng.integers(0, 2, 100_000) * rng.integers(-(2**31), 2**31, 100_000),
            "short": rng.integers(0, 100, 300_000, dtype=np.uint8),
        }
        assert_same_blobs(decode_blobs(encoded(blobs)), blobs)

    def test_nan_payloads_infinities_and_negative_zero_keep_their_bits(self) -> None:
        blobs = {
            "half": np.arange(65536, dtype=np.uint16).view(np.float16),
            "single": np.array([0x7FC00001, 0xFF800000, 0x80000000, 0x7F800001], np.uint32).view(np.float32),
            "double": np.array([0x7FF8000000000001, 1 << 63, 0x7FF0000000000001], np.uint64).view(np.float64),
        }
        assert_same_blobs(decode_blobs(encoded(blobs)), blobs)

    def test_strings_and_string_tensors_come_back(self) -> None:
        blobs = {
            "text": b"caf\xe9\0\xff",
            "empty": b"",
            "tensor": string_array([*STRINGS, b"\xff" * 300, b"x"]).reshape(2, 3),
            "none": np.empty((0, 2), dtype=object),
            "scalar": string_array([b"one"]).reshape(()),
        }
        for chunk_elements in (1, 4, 100):
            assert_same_blobs(decode_blobs(encoded(blobs, chunk_elements=chunk_elements)), blobs)

    def test_strides_and_byte_order_are_resolved(self) -> None:
        base = np.arange(24, dtype=np.int32).reshape(4, 6)
        blobs = {
            "transposed": base.T,
            "backwards": base[::-1, ::-2],
            "fortran": np.asfortranarray(base.astype(np.float64)),
            "big_float": base.astype(">f4"),
            "big_half": base.astype(">f2"),
            "big_int": base.astype(">i8"),
        }
        expected = {name: np.ascontiguousarray(value) for name, value in blobs.items()}
        assert_same_blobs(decode_blobs(encoded(blobs, chunk_elements=5)), expected)

    def test_the_result_shares_no_memory_with_the_file(self) -> None:
        file = bytearray(encoded({"w": np.arange(4.0), "s": b"abc"}))
        blobs = decode_blobs(memoryview(file))
        file[:] = bytes(len(file))
        assert_same_blobs(blobs, {"w": np.arange(4.0), "s": b"abc"})

    def test_a_strided_memoryview_is_read_too(self) -> None:
        file = encoded({"w": np.arange(4.0)})
        spread = bytes(byte for item in file for byte in (item, 0))
        assert_same_blobs(decode_blobs(memoryview(spread)[::2]), {"w": np.arange(4.0)})

    def test_no_bytes_are_no_blobs(self) -> None:
        assert encoded({}) == b""
        assert decode_blobs(b"") == {}

    def test_a_million_int32_take_well_under_a_second_each_way(self) -> None:
        value = np.random.default_rng(0).integers(-(2**31), 2**31, 1_000_000, dtype=np.int32)
        start = time.perf_counter()
        file = encoded({"w": value})
        middle = time.perf_counter()
        found = decode_blobs(file)
        end = time.perf_counter()
        assert_same_blobs(found, {"w": value})
        assert (middle - start, end - middle) < (1.0, 1.0)

    @settings(max_examples=60, deadline=None)
    @given(
        st.dictionaries(
            st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=6).filter(
                lambda name: "#%" not in name
            ),
            st.binary(max_size=6)
            | st.lists(st.binary(max_size=4), max_size=5).map(string_array)
            | st.sampled_from(DTYPES).flatmap(
                lambda dtype: hnp.arrays(dtype, hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4))
            ),
            max_size=4,
        ),
        st.integers(1, 9),
        st.randoms(use_true_random=False),
    )
    def test_any_blobs_come_back_from_records_in_any_order(self, blobs, chunk_elements, random) -> None:
        records = list(encode_blobs(blobs, chunk_elements=chunk_elements))
        assert_same_blobs(decode_blobs(b"".join(records)), blobs)
        random.shuffle(records)
        found = decode_blobs(b"".join(records))
        assert_same_blobs({name: found.pop(name) for name in blobs}, blobs)
        assert not found


class TestOtherWriters:
    def test_repeated_fields_may_be_unpacked_or_in_pieces(self) -> None:
        pieces = {
            (2, "int32"): [number_field(4, -5), bytes_field(4, varint(300) + varint(-1)), number_field(4, 7)],
            (10, "int64"): [number_field(10, -(2**63)), number_field(10, 1), bytes_field(10, b"\2\3")],
            (1, "float32"): [varint(3 * 8 + 5) + struct.pack("<f", item) for item in (1, -2, 3, 4)],
            (13, "float64"): [varint(9 * 8 + 1) + struct.pack("<d", item) for item in (1, -2, 3, 4)],
        }
        expected = {2: [-5, 300, -1, 7], 10: [-(2**63), 1, 2, 3], 1: [1, -2, 3, 4], 13: [1, -2, 3, 4]}
        for (number, dtype), payload in pieces.items():
            data = tensor_record(dims=(4,), number=number, payload=b"".join(payload), segment=(0, 4))
            assert_same(decode_blobs(data)["w"], np.array(expected[number], dtype=dtype))

    def test_dims_may_be_packed(self) -> None:
        body = bytes_field(1, b"\1\3") + number_field(2, 6) + bytes_field(4, b"\7\x08\x09")
        data = record("w#%0", bytes_field(2, b"Tensor") + bytes_field(3, body))
        assert_same(decode_blobs(data)["w"], np.array([[7, 8, 9]], dtype=np.uint8))

    def test_unknown_fields_are_skipped(self) -> None:
        unknown = (
            number_field(900, 1)
            + bytes_field(77, b"later")
            + varint(50 * 8 + 1)
            + bytes(8)
            + varint(51 * 8 + 5)
            + bytes(4)
        )
        payload = unknown + bytes_field(4, b"\1\2\3") + unknown
        value = bytes_field(2, b"Tensor") + unknown
        body = number_field(1, 3) + number_field(2, 2) + payload
        data = record("w#%0", value + bytes_field(3, body) + unknown)
        assert_same(decode_blobs(data)["w"], np.array([1, 2, 3], dtype=np.int32))

    def test_a_tensor_without_segment_is_whole_and_without_data_type_is_float(self) -> None:
        body = number_field(1, 2) + bytes_field(3, struct.pack("<2f", 1, 2))
        data = record("w", bytes_field(2, b"Tensor") + bytes_field(3, body))
        assert_same(decode_blobs(data)["w"], np.array([1, 2], dtype=np.float32))

    def test_a_tensor_that_never_got_a_dtype_is_empty(self) -> None:
        data = tensor_record(dims=(0,), number=0, payload=b"", segment=(0, 0))
        assert_same(decode_blobs(data)["w"], np.zeros(0, dtype=np.float32))

    @pytest.mark.parametrize(
        ("number", "dtype"), [(3, "uint8"), (5, "bool"), (6, "uint8"), (7, "int8"), (9, "int16"), (12, "float16")]
    )
    def test_small_elements_may_be_raw_bytes(self, number: int, dtype: str) -> None:
        value = np.array([1, 0, 1], dtype=dtype)
        data = tensor_record(number=number, payload=bytes_field(5, value.tobytes()))
        assert_same(decode_blobs(data)["w"], value)

    def test_a_negative_int32_may_have_five_bytes(self) -> None:
        data = tensor_record(dims=(1,), payload=bytes_field(4, varint(2**32 - 5)), segment=(0, 1))
        assert_same(decode_blobs(data)["w"], np.array([-5], dtype=np.int32))

    def test_the_key_names_the_blob(self) -> None:
        data = record("key", bytes_field(1, b"inside") + bytes_field(2, b"std::string") + bytes_field(4, b"x"))
        assert decode_blobs(data) == {"key": b"x"}


class TestRefusedInput:
    @pytest.mark.parametrize("dtype", ["uint32", "uint64", "complex64", "datetime64[s]", "U3", "float128"])
    def test_a_dtype_that_caffe2_lacks_is_named_with_those_it_has(self, dtype: str) -> None:
        value = np.zeros(2, dtype=dtype)
        with pytest.raises(InvalidInputError) as caught:
            encode_blobs({"good": np.zeros(1), "w": value})
        text = str(caught.value)
        assert all(part in text for part in ("'w'", value.dtype.name, *DTYPES))
        assert caught.value.fields["blob"] == "w"

    @pytest.mark.parametrize("value", [1.5, "text", None, [1], np.float32(1), bytearray(b"x")], ids=repr)
    def test_what_is_no_array_and_no_bytes_is_refused(self, value: object) -> None:
        with pytest.raises(InvalidInputError, match=f"'w'.*{type(value).__name__}"):
            encode_blobs({"w": value})

    def test_an_object_array_holds_bytes_only(self) -> None:
        with pytest.raises(InvalidInputError, match=r"element 1 .* must be bytes; found str"):
            encode_blobs({"w": np.array([b"a", "b"], dtype=object)})

    @pytest.mark.parametrize("name", ["", "a#%0", "nul\0", "\ud800", 3])
    def test_a_name_that_would_not_come_back_is_refused(self, name: object) -> None:
        with pytest.raises(InvalidInputError):
            encode_blobs({name: b""})

    @pytest.mark.parametrize("chunk_elements", [0, -1, 1.5, True])
    def test_a_chunk_has_at_least_one_element(self, chunk_elements: object) -> None:
        with pytest.raises(InvalidInputError, match="chunk_elements"):
            encode_blobs({}, chunk_elements=chunk_elements)


INT8_PAYLOAD = bytes_field(4, varint(1) + varint(-129) + varint(3))
TOO_LONG = bytes_field(4, b"\1\2" + b"\x80" * 10 + b"\0")
TOO_LARGE = bytes_field(4, b"\1\2" + b"\xff" * 9 + b"\2")

DAMAGED: dict[str, tuple[bytes, str]] = {
    "lengths cut off": (b"\1\0\0", "expected 8 bytes, found 3"),
    "negative key length": (struct.pack("<ii", -1, 4) + bytes(20), "negative length.*found key -1, value 4"),
    "negative value length": (struct.pack("<ii", 1, -9) + bytes(20), "negative length.*found key 1, value -9"),
    "value cut off": (tensor_record()[:-1], "ends inside the record: expected .* bytes, found .* bytes"),
    "key not text": (record(b"\xff", b""), "expected UTF-8"),
    "no type": (record("w", b""), "expected Tensor or std::string, found b''"),
    "native kind": (record("w", bytes_field(2, b"Int8TensorCPU")), "found b'Int8TensorCPU'"),
    "no tensor": (record("w", bytes_field(2, b"Tensor")), "expected the field tensor"),
    "string twice": (record("w", bytes_field(2, b"std::string")) * 2, "record 1.*one std::string"),
    "string then tensor": (record("w", bytes_field(2, b"std::string")) + tensor_record(), "record 1.*tensor's record"),
    "tensor then string": (tensor_record() + record("w", bytes_field(2, b"std::string")), "record 1.*one std::string"),
    "string in chunks": (record("w", bytes_field(2, b"std::string") + number_field(6, 2)), "content_num_chunks 1"),
    "field cut off": (record("w", b"\x12\x09Tensor"), "field 2 is cut off: expected 9 bytes, found 6"),
    "field number 0": (record("w", b"\2\0"), "expected a field number from 1"),
    "group": (record("w", b"\x0b\x0c"), "expected wire type 0, 1, 2 or 5, found 3"),
    "tag cut off": (record("w", b"\x80"), "invalid varint"),
    "type as number": (record("w", number_field(2, 1)), "expected wire type 2, found 0"),
    "dims as fixed": (tensor_record(dims=(), payload=varint(8 + 5) + bytes(4)), "expected wire type 0, found 5"),
    "negative dims": (tensor_record(dims=(-3,)), "impossible dims"),
    "too many dims": (tensor_record(dims=(1,) * 65), "impossible dims: expected at most 64"),
    "absurd dims": (tensor_record(dims=(2**40, 2**20), segment=None), f"expected {2**60} elements, found 3"),
    "absurd segment": (tensor_record(dims=(2**62,), segment=(0, 2**62)), f"expected {2**62} elements, found 3"),
    "empty absurd dims": (
        tensor_record(dims=(0, 2**62, 2**62), payload=b"", segment=(0, 0)),
        "expected a shape that NumPy can have",
    ),
    "half a segment": (tensor_record(payload=bytes_field(11, number_field(1, 0)), segment=None), "begin and end"),
    "segment backwards": (tensor_record(segment=(3, 0)), "impossible segment"),
    "segment negative": (tensor_record(segment=(-1, 2)), "impossible segment"),
    "segment too far": (tensor_record(segment=(1, 4)), r"expected 0 <= begin <= end <= 3, found \[1, 4\)"),
    "too few elements": (tensor_record(dims=(4,), segment=(0, 4)), "expected 4 elements, found 3"),
    "too many elements": (tensor_record(segment=(0, 2)), "expected 2 elements, found 3"),
    "missing chunk": (
        tensor_record(dims=(9,)) + tensor_record(dims=(9,), segment=(6, 9)),
        "record 0.*expected 9 elements, found 6",
    ),
    "extra part": (tensor_record() * 2, "record 1.*extra part for a filled tensor"),
    "extra empty part": (
        tensor_record(dims=(0,), payload=b"", segment=(0, 0)) * 2,
        "record 1.*extra part for a filled tensor",
    ),
    "overlap": (
        tensor_record(dims=(6,)) + tensor_record(dims=(6,), segment=(2, 5)),
        "record 1.*overlapping segments: expected a begin of 3 or more, found 2",
    ),
    "overlap and missing": (
        tensor_record(dims=(9,), segment=(2, 5)) + tensor_record(dims=(9,), segment=(4, 7)),
        "record 1.*overlapping",
    ),
    "other shape": (tensor_record(dims=(6,)) + tensor_record(dims=(3, 2), segment=(3, 6)), "record 1.*another tensor"),
    "other dtype": (
        tensor_record(dims=(6,)) + tensor_record(dims=(6,), number=9, segment=(3, 6)),
        "expected int32 of shape.*found int16",
    ),
    "unknown data_type": (tensor_record(number=14), "unknown data_type: expected one of .*found 14"),
    "no data_type": (tensor_record(number=0), "unknown data_type"),
    "foreign payload": (tensor_record(number=1), "expected float_data, found int32_data"),
    "varint cut off": (tensor_record(payload=bytes_field(4, b"\1\2\x83")), "int32_data ends inside a varint"),
    "varint too long": (tensor_record(payload=TOO_LONG), "at most 64 bits in ten bytes"),
    "varint too large": (tensor_record(payload=TOO_LARGE), "at most 64 bits in ten bytes"),
    "endless varint": (
        tensor_record(payload=bytes_field(4, b"\x80" * 200_000 + b"\0")),
        "at most 64 bits in ten bytes",
    ),
    "element out of range": (tensor_record(number=7, payload=INT8_PAYLOAD), "expected -128 to 127, found -129"),
    "int32 out of range": (
        tensor_record(dims=(1,), payload=bytes_field(4, varint(2**32)), segment=None),
        "found 4294967296",
    ),
    "bool of 2": (tensor_record(number=5), "expected 0 to 1, found 3"),
    "raw bool of 2": (tensor_record(number=5, payload=bytes_field(5, b"\0\1\2")), "expected 0 or 1, found 2"),
    "raw cut off": (tensor_record(number=9, payload=bytes_field(5, b"\0\1\2")), "a multiple of 2 bytes, found 3"),
    "float cut off": (tensor_record(number=1, payload=bytes_field(3, bytes(11))), "a multiple of 4 bytes, found 11"),
    "double cut off": (tensor_record(number=13, payload=bytes_field(9, bytes(23))), "a multiple of 8 bytes, found 23"),
}


class TestDamage:
    @pytest.mark.parametrize("case", DAMAGED)
    def test_the_error_says_where_what_was_expected_and_what_was_found(self, case: str) -> None:
        data, text = DAMAGED[case]
        error = refusal(data)
        assert error.fields["offset"] in range(len(data) + 1)
        with pytest.raises(CorruptCheckpointError, match=text):
            raise error

    def test_the_offset_is_that_of_the_damaged_bytes(self) -> None:
        good = encoded({"first": np.arange(5)})
        data = bytearray(good + tensor_record(payload=TOO_LONG))
        error = refusal(bytes(data))
        assert data[error.fields["offset"] :].startswith(b"\1\2\x80\x80")
        assert (error.fields["record"], error.fields["key"]) == (1, b"w#%0")

    def test_a_file_cut_anywhere_decodes_or_is_refused(self, small_file: bytes) -> None:
        ends = {0}
        for item in split_records(small_file):
            ends.add(max(ends) + len(item))
        for length in range(len(small_file)):
            if length in ends:
                decodes_or_refuses(small_file[:length])
            else:
                refusal(small_file[:length])

    def test_a_golden_file_cut_near_its_ends_decodes_or_is_refused(self, golden: bytes) -> None:
        for length in [*range(1, 400), *range(len(golden) - 300, len(golden))]:
            decodes_or_refuses(golden[:length])

    def test_every_single_flipped_bit_decodes_or_is_refused(self, small_file: bytes) -> None:
        data = bytearray(small_file)
        for position in range(len(data)):
            for bit in range(8):
                data[position] ^= 1 << bit
                decodes_or_refuses(bytes(data))
                data[position] ^= 1 << bit

    @settings(max_examples=200, deadline=None)
    @given(st.data())
    def test_a_golden_file_with_bytes_changed_decodes_or_is_refused(self, golden: bytes, data: st.DataObject) -> None:
        changed = bytearray(golden)
        position = st.integers(0, len(golden) - 1)
        for at, value in data.draw(st.lists(st.tuples(position, st.integers(0, 255)), min_size=1, max_size=4)):
            changed[at] = value
        start, length = data.draw(position), data.draw(st.integers(0, 40))
        decodes_or_refuses(bytes(changed))
        del changed[start : start + length]
        decodes_or_refuses(bytes(changed))

    @settings(max_examples=200, deadline=None)
    @given(st.binary(max_size=60), st.binary(max_size=60))
    @example(b"\x08" * 40, b"")
    def test_arbitrary_bytes_decode_or_are_refused(self, value: bytes, body: bytes) -> None:
        decodes_or_refuses(value)
        decodes_or_refuses(record("w#%0", value))
        decodes_or_refuses(record("w#%0", bytes_field(2, b"Tensor") + bytes_field(3, body)))

    @pytest.mark.parametrize(
        "make",
        [
            lambda: DAMAGED["absurd dims"][0],
            lambda: DAMAGED["absurd segment"][0],
            lambda: tensor_record(dims=(2**63 - 1,) * 64, segment=None),
            lambda: tensor_record(payload=bytes_field(1, b"\1" * 50_000)),
            lambda: tensor_record(dims=(2**40,), payload=bytes_field(4, bytes(100_000)), segment=(0, 100_000)),
            lambda: tensor_record(dims=(20_000,), number=10, payload=b"\x50\1" * 20_000, segment=None),
            lambda: tensor_record(dims=(20_000,), number=4, payload=bytes_field(6, b"") * 20_000, segment=None),
            lambda: b"".join(tensor_record(key=f"{i}", payload=b"", segment=(0, 0)) for i in range(1_500)),
        ],
    )
    def test_memory_follows_the_file_not_what_it_claims(self, make: Callable[[], bytes]) -> None:
        data = make()
        tracemalloc.start()
        try:
            decodes_or_refuses(data)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert peak < 40 * len(data) + 4_000_000
