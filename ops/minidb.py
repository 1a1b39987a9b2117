"""Caffe2's checkpoint database, minidb, as bytes: what its operators Save and Load write and read.

Not a file reader, not a protobuf library, and no format to prefer: minidb has no header, no count and no
checksum, so a file cut between two blobs decodes, without the rest. It is here for exchange with Caffe2.

A file is a sequence of records ``{int32 key length, int32 value length, key, BlobProto}``, little-endian. A
``std::string`` is one record under its own name. A tensor is at least one record, under ``NAME#%K``; each repeats
the tensor's dims and says by its segment ``[begin, end)`` which elements it carries.

Source: caffe2/db/minidb.cc, caffe2/core/blob_serialization.cc, caffe2/proto/caffe2.proto, and a file of the real one.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias, cast

import numpy as np
import numpy.typing as npt

from .dtypes import CAFFE2_NUMBERS, DType
from .errors import CorruptCheckpointError, InvalidInputError
from .values import Array, check_name

CHUNK_ELEMENTS = 1_000_000
"""Elements in one record, Caffe2's own default."""

_Bytes: TypeAlias = npt.NDArray[np.uint8]

_SEPARATOR = "#%"
_LENGTHS = struct.Struct("<ii")
_INT32_MAX = 2**31 - 1
_INT64_MAX = 2**63 - 1
_MAX_DIMENSIONS = 64

_VARINT, _FIXED64, _LENGTH_DELIMITED, _FIXED32 = 0, 1, 2, 5

# BlobProto
_BLOB_NAME, _BLOB_TYPE, _BLOB_TENSOR, _BLOB_CONTENT, _BLOB_CONTENT_NUM_CHUNKS = 1, 2, 3, 4, 6
_TYPE_TENSOR, _TYPE_STRING = b"Tensor", b"std::string"

# TensorProto
_DIMS, _DATA_TYPE, _NAME, _DEVICE_DETAIL, _SEGMENT = 1, 2, 7, 8, 11
_FLOAT_DATA, _INT32_DATA, _BYTE_DATA, _STRING_DATA, _DOUBLE_DATA, _INT64_DATA = 3, 4, 5, 6, 9, 10
_PAYLOAD_NAMES = {
    _FLOAT_DATA: "float_data",
    _INT32_DATA: "int32_data",
    _BYTE_DATA: "byte_data",
    _STRING_DATA: "string_data",
    _DOUBLE_DATA: "double_data",
    _INT64_DATA: "int64_data",
}
_ELEMENT_WIRE_TYPES = {
    _FLOAT_DATA: _FIXED32,
    _DOUBLE_DATA: _FIXED64,
    _INT32_DATA: _VARINT,
    _INT64_DATA: _VARINT,
}
_CPU_DEVICE = b"\x08\x00"

_UNDEFINED, _BYTE, _STRING = 0, 3, 4
_NUMBERS = {dtype.name: number for number, dtype in CAFFE2_NUMBERS.items() if number != _BYTE}
_PAYLOAD_FIELDS = {"float32": _FLOAT_DATA, "float64": _DOUBLE_DATA, "int64": _INT64_DATA}  # the others: int32_data
_WIRE_DTYPES = {"float16": np.dtype("uint16"), "bool": np.dtype("uint8")}  # the bits that stand for an element

_MAX_VARINT_BYTES = 10
_ENCODE_BLOCK_ELEMENTS = 1 << 15
_DECODE_BLOCK_BYTES = 1 << 17


def encode_blobs(blobs: Mapping[str, object], *, chunk_elements: int = CHUNK_ELEMENTS) -> Iterator[bytes]:
    """Encode blobs as a minidb file, one record at a time. Everything but a record's size is checked by the call.

    Args:
        blobs: Blob name → an array of any shape, strides and byte order with a dtype that Caffe2 has (float16/32/64,
            int8/16/32/64, uint8/16, bool); or an object array of ``bytes`` (a string tensor); or ``bytes`` (a
            ``std::string``). Read while the iterator runs; never modified.
        chunk_elements: Most elements in one record, at least 1. A record has at most 2 GiB - 1 bytes.

    Returns:
        An iterator over whole records, in the order of ``blobs``; joined they are the file. For equal arguments the
        bytes are equal, and they are Caffe2's own.

    Raises:
        InvalidInputError: A name, a value or ``chunk_elements`` cannot be written; no record was produced. Or, while
            iterating, a record would pass 2 GiB; the records before it are good.

    Example:
        >>> file = b"".join(encode_blobs({"w": np.arange(3, dtype=np.int32)}))
        >>> decode_blobs(file)["w"]
        array([0, 1, 2], dtype=int32)
    """
    if type(chunk_elements) is not int or chunk_elements < 1:
        raise InvalidInputError(
            f"chunk_elements is the most elements in one record: expected an int of at least 1, found "
            f"{chunk_elements!r}.",
            found=repr(chunk_elements),
        )
    checked = {name: _check_blob(name, value) for name, value in blobs.items()}
    return _records(checked, chunk_elements)


def _check_blob(name: str, value: object) -> Array | bytes:
    if _SEPARATOR in check_name(name):
        raise InvalidInputError(
            f"Blob {name!r} cannot be written to a minidb: {_SEPARATOR!r} separates a name from a chunk number there, "
            f"and the blob would come back as {name.partition(_SEPARATOR)[0]!r}. Save it under another name.",
            blob=name,
        )
    if isinstance(value, bytes):
        return value
    if not isinstance(value, np.ndarray):
        raise InvalidInputError(
            f"Blob {name!r}: a minidb holds NumPy arrays and bytes; found {type(value).__name__}.",
            blob=name,
            found=type(value).__name__,
        )
    array: Array = np.asarray(cast("Array", value))
    if array.dtype.kind == "O":
        for position, item in enumerate(array.flat):
            if type(item) is not bytes:
                raise InvalidInputError(
                    f"Blob {name!r}: element {position} of a string tensor must be bytes; found {type(item).__name__}.",
                    blob=name,
                    found=type(item).__name__,
                )
    elif array.dtype.name not in _NUMBERS:
        raise InvalidInputError(
            f"Blob {name!r} cannot be written to a minidb: Caffe2 has no dtype {array.dtype.name}. Expected one of "
            f"{', '.join(_NUMBERS)}, or an object array of bytes. Cast it, or save it as a blobspace checkpoint.",
            blob=name,
            found=array.dtype.name,
            expected=list(_NUMBERS),
        )
    return array


def _records(blobs: Mapping[str, Array | bytes], chunk_elements: int) -> Iterator[bytes]:
    for name, value in blobs.items():
        encoded_name = name.encode()
        if isinstance(value, bytes):
            content = [_length_delimited(_BLOB_CONTENT, value)]
            yield _record(name, encoded_name, _blob_proto(encoded_name, _TYPE_STRING, content))
            continue
        flat = value.reshape(-1)
        for index, begin in enumerate(range(0, max(flat.size, 1), chunk_elements)):
            chunk = flat[begin : begin + chunk_elements]
            tensor = _tensor_proto(encoded_name, value.shape, chunk, begin)
            key = encoded_name + f"{_SEPARATOR}{index}".encode()
            yield _record(name, key, _blob_proto(encoded_name, _TYPE_TENSOR, [_length_delimited(_BLOB_TENSOR, tensor)]))


def _record(name: str, key: bytes, value: bytes) -> bytes:
    if len(value) > _INT32_MAX:
        raise InvalidInputError(
            f"Blob {name!r}: a minidb record has at most {_INT32_MAX} bytes; {key!r:.80} would have {len(value)}. "
            f"Write a tensor with fewer elements in a chunk; a string cannot be divided.",
            blob=name,
            found_bytes=len(value),
            limit_bytes=_INT32_MAX,
        )
    return b"".join((_LENGTHS.pack(len(key), len(value)), key, value))


def _blob_proto(name: bytes, kind: bytes, body: list[bytes]) -> bytes:
    return b"".join([_length_delimited(_BLOB_NAME, name), _length_delimited(_BLOB_TYPE, kind), *body])


def _tensor_proto(name: bytes, dims: tuple[int, ...], chunk: Array, begin: int) -> bytes:
    """Encode one chunk, fields in the order of their numbers as protobuf does."""
    payload_field, payload = _encode_payload(chunk)
    number = _STRING if payload_field == _STRING_DATA else _NUMBERS[chunk.dtype.name]
    segment = _varint_field(1, begin) + _varint_field(2, begin + chunk.size)
    fields = {
        _DIMS: [_varint_field(_DIMS, size) for size in dims],
        _DATA_TYPE: [_varint_field(_DATA_TYPE, number)],
        payload_field: payload,
        _NAME: [_length_delimited(_NAME, name)],
        _DEVICE_DETAIL: [_length_delimited(_DEVICE_DETAIL, _CPU_DEVICE)],
        _SEGMENT: [_length_delimited(_SEGMENT, segment)],
    }
    return b"".join(part for number in sorted(fields) for part in fields[number])


def _encode_payload(chunk: Array) -> tuple[int, list[bytes]]:
    """Return the field that carries a chunk's elements, and the field's bytes in pieces (none if it is empty)."""
    if chunk.dtype.kind == "O":
        return _STRING_DATA, [_length_delimited(_STRING_DATA, item) for item in chunk.tolist()]
    payload_field = _PAYLOAD_FIELDS.get(chunk.dtype.name, _INT32_DATA)
    if not chunk.size:
        return payload_field, []
    if payload_field in (_FLOAT_DATA, _DOUBLE_DATA):
        packed = chunk.astype(chunk.dtype.newbyteorder("<"), copy=False).tobytes()
    else:
        packed = _pack_varints(chunk)
    return payload_field, [_varint((payload_field << 3) | _LENGTH_DELIMITED), _varint(len(packed)), packed]


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _varint_field(number: int, value: int) -> bytes:
    return _varint((number << 3) | _VARINT) + _varint(value)


def _length_delimited(number: int, payload: bytes) -> bytes:
    return b"".join((_varint((number << 3) | _LENGTH_DELIMITED), _varint(len(payload)), payload))


def _pack_varints(values: Array) -> bytes:
    """Encode integers, bools, or the bits of float16 as varints; a negative one has ten bytes, as protobuf has it."""
    native = values.dtype.newbyteorder("=")
    blocks: list[bytes] = []
    for begin in range(0, values.size, _ENCODE_BLOCK_ELEMENTS):
        block = np.ascontiguousarray(values[begin : begin + _ENCODE_BLOCK_ELEMENTS], dtype=native)
        wide = block.view(_WIRE_DTYPES.get(native.name, native)).astype(np.int64).view(np.uint64)
        width = max(1, -(-int(wide.max()).bit_length() // 7))
        if width == 1:
            blocks.append(wide.astype(np.uint8).tobytes())
            continue
        # One row for each element, one column for each byte it may have; the bytes it does have are kept.
        rows = np.empty((wide.size, width), dtype=np.uint8)
        is_kept = np.ones((wide.size, width), dtype=np.bool_)
        for column in range(width):
            has_more = wide > 0x7F
            rows[:, column] = (wide.astype(np.uint8) & 0x7F) | (has_more.view(np.uint8) << 7)
            if column + 1 < width:
                is_kept[:, column + 1] = has_more
                wide = wide >> np.uint64(7)
        blocks.append(rows[is_kept].tobytes())
    return b"".join(blocks)


def decode_blobs(data: bytes | memoryview) -> dict[str, Array | bytes]:
    """Decode a whole minidb file. Memory stays within a small multiple of ``len(data)``, whatever the bytes claim.

    The records of one tensor may come in any order and between those of others; repeated fields may be packed or
    not; unknown fields are skipped. As in Caffe2, a record's key names the blob, not the name inside its value.

    Args:
        data: The file's bytes. Not kept: the values are copies.

    Returns:
        Blob name → value, in the order in which the names first appear: an array in native byte order (an object
        array of ``bytes`` for a string tensor), or ``bytes`` for a ``std::string``. No records, no blobs.

    Raises:
        CorruptCheckpointError: The bytes are no minidb, are damaged, lack a part of a tensor, or hold a kind of blob
            that blobspace does not read (Int8 tensors, counters, mutexes). It names the record, the byte, what was
            expected and what was found.
    """
    view = memoryview(data)
    view = view.cast("B") if view.c_contiguous else memoryview(view.tobytes())
    blobs: dict[str, _TensorParts | bytes] = {}
    offset = index = 0
    while offset < len(view):
        record = _read_record(view, offset, index)
        _add_record(blobs, record)
        offset, index = record.stop, index + 1
    return {name: blob if isinstance(blob, bytes) else blob.whole() for name, blob in blobs.items()}


def _add_record(blobs: dict[str, _TensorParts | bytes], record: _Record) -> None:
    name = record.blob_name()
    kind, content, tensor = _read_blob_proto(record)
    known = blobs.get(name)
    if kind == _TYPE_STRING:
        if known is not None:
            raise record.corrupt("a second value for one name", expected="one std::string", found="another record")
        blobs[name] = content
        return
    if isinstance(known, bytes):
        raise record.corrupt("a second value for one name", expected="one std::string", found="a tensor's record")
    part = _tensor_part(record, tensor)
    if known is None:
        known = blobs[name] = _TensorParts(dims=part.dims, dtype=part.values.dtype, total=part.total)
    known.add(part)


@dataclass(frozen=True, slots=True)
class _Record:
    """One record of a file, and the reading of protobuf fields within it. Offsets count from the file's start."""

    file: memoryview
    index: int
    offset: int
    key: bytes
    start: int
    stop: int

    def corrupt(
        self, problem: str, *, expected: object, found: object, offset: int | None = None
    ) -> CorruptCheckpointError:
        where = self.offset if offset is None else offset
        return CorruptCheckpointError(
            f"minidb record {self.index}, key {self.key!r:.80}, byte {where}: {problem}: expected {expected}, found "
            f"{found}. The file is damaged or is no minidb; choose another checkpoint.",
            record=self.index,
            key=self.key[:80],
            offset=where,
            expected=str(expected),
            found=str(found),
        )

    def blob_name(self) -> str:
        try:
            return self.key.decode().partition(_SEPARATOR)[0]
        except UnicodeDecodeError as error:
            raise self.corrupt("the key is not text", expected="UTF-8", found=error.reason) from None

    def varint(self, offset: int, stop: int) -> tuple[int, int]:
        """Return the unsigned number at ``offset`` and the offset after it."""
        value = 0
        for position in range(offset, min(offset + _MAX_VARINT_BYTES, stop)):
            byte = self.file[position]
            value |= (byte & 0x7F) << (7 * (position - offset))
            if byte < 0x80:
                if value >> 64:
                    break
                return value, position + 1
        raise self.corrupt(
            "invalid varint", expected="at most 64 bits in ten bytes", found="more, or the end", offset=offset
        )

    def signed(self, offset: int, stop: int) -> int:
        value = self.varint(offset, stop)[0]
        return value - (1 << 64) if value >> 63 else value

    def fields(self, start: int, stop: int) -> Iterator[tuple[int, int, int, int]]:
        """Yield a message's fields: number, wire type, start and stop of the content (of a varint: its bytes)."""
        offset = start
        while offset < stop:
            tag, content = self.varint(offset, stop)
            number, wire_type = tag >> 3, tag & 7
            if wire_type == _VARINT:
                end = self.varint(content, stop)[1]
            elif wire_type == _LENGTH_DELIMITED:
                length, content = self.varint(content, stop)
                end = content + length
            elif wire_type in (_FIXED32, _FIXED64):
                end = content + (4 if wire_type == _FIXED32 else 8)
            else:
                raise self.corrupt("invalid field", expected="wire type 0, 1, 2 or 5", found=wire_type, offset=offset)
            if not number:
                raise self.corrupt("invalid field", expected="a field number from 1", found=0, offset=offset)
            if end > stop:
                raise self.corrupt(
                    f"field {number} is cut off", expected=f"{end - content} bytes", found=stop - content, offset=offset
                )
            yield number, wire_type, content, end
            offset = end

    def check_wire_type(self, number: int, wire_type: int, expected: int, offset: int) -> None:
        if wire_type != expected:
            raise self.corrupt(
                f"field {number} is of another type", expected=f"wire type {expected}", found=wire_type, offset=offset
            )


def _read_record(view: memoryview, offset: int, index: int) -> _Record:
    left = len(view) - offset
    headless = _Record(view, index, offset, b"", offset, offset)
    if left < _LENGTHS.size:
        raise headless.corrupt("the file ends in a record's lengths", expected=f"{_LENGTHS.size} bytes", found=left)
    key_bytes, value_bytes = _LENGTHS.unpack_from(view, offset)
    if key_bytes < 0 or value_bytes < 0:
        raise headless.corrupt(
            "negative length", expected="lengths from 0", found=f"key {key_bytes}, value {value_bytes}"
        )
    start = offset + _LENGTHS.size + key_bytes
    stop = start + value_bytes
    if stop > len(view):
        raise headless.corrupt(
            "the file ends inside the record", expected=f"{stop - offset} bytes", found=f"{left} bytes"
        )
    return _Record(view, index, offset, bytes(view[offset + _LENGTHS.size : start]), start, stop)


def _read_blob_proto(record: _Record) -> tuple[bytes, bytes, _TensorProto]:
    kind = content = b""
    tensor: _TensorProto | None = None
    for number, wire_type, start, stop in record.fields(record.start, record.stop):
        if number in (_BLOB_TYPE, _BLOB_CONTENT, _BLOB_TENSOR):
            record.check_wire_type(number, wire_type, _LENGTH_DELIMITED, start)
        if number == _BLOB_TYPE:
            kind = bytes(record.file[start:stop])
        elif number == _BLOB_CONTENT:
            content = bytes(record.file[start:stop])
        elif number == _BLOB_TENSOR:
            tensor = tensor or _TensorProto()
            _read_tensor_proto(record, start, stop, tensor)
        elif number == _BLOB_CONTENT_NUM_CHUNKS:
            record.check_wire_type(number, wire_type, _VARINT, start)
            if (chunk_count := record.signed(start, stop)) > 1:
                raise record.corrupt(
                    "content in several records", expected="content_num_chunks 1", found=chunk_count, offset=start
                )
    if kind not in (_TYPE_TENSOR, _TYPE_STRING):
        raise record.corrupt("unreadable kind of blob", expected="Tensor or std::string", found=f"{kind!r:.80}")
    if kind == _TYPE_TENSOR and tensor is None:
        raise record.corrupt("a Tensor without its content", expected="the field tensor", found="none")
    return kind, content, tensor or _TensorProto()


@dataclass(slots=True)
class _TensorProto:
    """What was read of one TensorProto. A payload is a view of the file, or a copy where it came in pieces."""

    dims: list[int] = field(default_factory=list[int])
    data_type: int = 1
    segment: tuple[int, int] | None = None
    payloads: dict[int, memoryview | bytearray] = field(default_factory=dict[int, memoryview | bytearray])
    payload_offset: int = 0
    strings: list[bytes] = field(default_factory=list[bytes])

    def append(self, number: int, piece: memoryview) -> None:
        known = self.payloads.get(number)
        if known is None:
            self.payloads[number] = piece
        elif isinstance(known, bytearray):
            known += piece
        else:
            self.payloads[number] = bytearray(known) + piece


def _read_tensor_proto(record: _Record, start: int, stop: int, tensor: _TensorProto) -> None:
    for number, wire_type, begin, end in record.fields(start, stop):
        if number == _DIMS and wire_type == _LENGTH_DELIMITED:
            position = begin
            while position < end:
                size, position = record.varint(position, end)
                tensor.dims.append(size)
        elif number == _DIMS:
            record.check_wire_type(number, wire_type, _VARINT, begin)
            tensor.dims.append(record.varint(begin, end)[0])
        elif number == _DATA_TYPE:
            record.check_wire_type(number, wire_type, _VARINT, begin)
            tensor.data_type = record.signed(begin, end)
        elif number == _SEGMENT:
            record.check_wire_type(number, wire_type, _LENGTH_DELIMITED, begin)
            tensor.segment = _read_segment(record, begin, end)
        elif number in _ELEMENT_WIRE_TYPES:
            _read_payload(record, tensor, number, wire_type, begin, end)
        elif number in (_BYTE_DATA, _STRING_DATA):
            record.check_wire_type(number, wire_type, _LENGTH_DELIMITED, begin)
            if number == _STRING_DATA:
                tensor.strings.append(bytes(record.file[begin:end]))
            else:
                tensor.payloads[number] = record.file[begin:end]


def _read_segment(record: _Record, start: int, stop: int) -> tuple[int, int]:
    bounds: dict[int, int] = {}
    for number, wire_type, begin, end in record.fields(start, stop):
        if number in (1, 2):
            record.check_wire_type(number, wire_type, _VARINT, begin)
            bounds[number] = record.signed(begin, end)
    if len(bounds) != 2:
        raise record.corrupt("half a segment", expected="begin and end", found=f"{len(bounds)} of them", offset=start)
    return bounds[1], bounds[2]


def _read_payload(record: _Record, tensor: _TensorProto, number: int, wire_type: int, begin: int, end: int) -> None:
    element = _ELEMENT_WIRE_TYPES[number]
    if wire_type != _LENGTH_DELIMITED:
        record.check_wire_type(number, wire_type, element, begin)
    elif element == _VARINT:
        if begin < end and record.file[end - 1] > 0x7F:
            raise record.corrupt(
                f"{_PAYLOAD_NAMES[number]} ends inside a varint",
                expected="a last byte below 128",
                found=record.file[end - 1],
                offset=end - 1,
            )
    elif (end - begin) % (size := 4 if element == _FIXED32 else 8):
        raise record.corrupt(
            f"{_PAYLOAD_NAMES[number]} ends inside an element",
            expected=f"a multiple of {size} bytes",
            found=end - begin,
            offset=begin,
        )
    if not tensor.payloads:
        tensor.payload_offset = begin
    tensor.append(number, record.file[begin:end])


@dataclass(frozen=True, slots=True)
class _Part:
    """The elements ``[begin, end)`` of a tensor of ``total``, decoded; ``values`` may be a view of the file."""

    record: _Record
    dims: tuple[int, ...]
    total: int
    begin: int
    end: int
    values: Array


def _tensor_part(record: _Record, tensor: _TensorProto) -> _Part:
    dims = tuple(tensor.dims)
    if len(dims) > _MAX_DIMENSIONS or any(size > _INT64_MAX for size in dims):
        raise record.corrupt(
            "impossible dims",
            expected=f"at most {_MAX_DIMENSIONS} dims, each from 0 to {_INT64_MAX}",
            found=f"{len(dims)}: {dims!s:.60}",
        )
    total = math.prod(dims)
    if tensor.data_type == _UNDEFINED and not total:
        # A tensor that never got a dtype; Caffe2 reads it as an empty one of floats.
        dims, tensor.data_type = (0,), 1
    values = _part_values(record, tensor)
    begin, end = (0, total) if tensor.segment is None else tensor.segment
    if not 0 <= begin <= end <= total:
        raise record.corrupt("impossible segment", expected=f"0 <= begin <= end <= {total}", found=f"[{begin}, {end})")
    if values.size != end - begin:
        raise record.corrupt(
            f"wrong number of {values.dtype.name} elements in the segment [{begin}, {end}) of a tensor of shape "
            f"{dims!s:.60}",
            expected=f"{end - begin} elements",
            found=values.size,
        )
    return _Part(record, dims, total, begin, end, values)


def _part_values(record: _Record, tensor: _TensorProto) -> Array:
    """Decode the payload, whose size alone bounds the result's."""
    dtype = CAFFE2_NUMBERS.get(tensor.data_type)
    if dtype is None and tensor.data_type != _STRING:
        raise record.corrupt(
            "unknown data_type", expected=f"one of {sorted([*CAFFE2_NUMBERS, _STRING])}", found=tensor.data_type
        )
    # Caffe2 also reads raw bytes where it writes varints; it writes them for BYTE.
    has_bytes = _BYTE_DATA in tensor.payloads
    if dtype is None:
        payload_field = _STRING_DATA
    else:
        payload_field = _PAYLOAD_FIELDS.get(dtype.name, _BYTE_DATA if has_bytes else _INT32_DATA)
    present = {number for number, payload in tensor.payloads.items() if len(payload)}
    if tensor.strings:
        present.add(_STRING_DATA)
    if foreign := present - {payload_field}:
        raise record.corrupt(
            f"a payload that data_type {tensor.data_type} does not have",
            expected=_PAYLOAD_NAMES[payload_field],
            found=", ".join(_PAYLOAD_NAMES[number] for number in sorted(foreign)),
        )
    if dtype is None:
        strings = np.empty(len(tensor.strings), dtype=object)
        strings[:] = tensor.strings
        return strings
    payload = tensor.payloads.get(payload_field, b"")
    if payload_field in (_INT32_DATA, _INT64_DATA):
        # The offset of a byte is known only where the payload is one piece of the file.
        offset = tensor.payload_offset if isinstance(payload, memoryview) else None
        return _decode_varints(record, np.frombuffer(payload, np.uint8), dtype, offset)
    if len(payload) % dtype.itemsize:
        raise record.corrupt(
            "byte_data ends inside an element", expected=f"a multiple of {dtype.itemsize} bytes", found=len(payload)
        )
    wire = _WIRE_DTYPES.get(dtype.name, dtype)
    values = np.frombuffer(payload, wire.newbyteorder("<")).astype(wire, copy=False)
    if dtype.kind == "b" and values.size and int(values.max()) > 1:
        raise record.corrupt("impossible bool", expected="0 or 1", found=int(values.max()))
    return values.view(dtype)


def _decode_varints(record: _Record, raw: _Bytes, dtype: DType, offset: int | None) -> Array:
    """Decode varints into ``dtype``, block by block so that the wide integers in between stay small.

    ``raw`` is empty or ends at a varint's end.
    """
    wire = _WIRE_DTYPES.get(dtype.name, dtype)
    limits: Any = np.iinfo(wire)
    low, high = (0, 1) if dtype.kind == "b" else (int(limits.min), int(limits.max))
    out = np.empty(np.count_nonzero(raw < 0x80), dtype=wire)
    done = position = 0
    while position < raw.size:
        where = None if offset is None else offset + position
        block = raw[position : position + _DECODE_BLOCK_BYTES]
        last_bytes = np.flatnonzero(block < 0x80)
        stop = int(last_bytes[-1]) + 1 if last_bytes.size else 0
        values = _unpack_block(block[:stop], last_bytes)
        if values is None:
            raise record.corrupt(
                "invalid varint in the elements from this byte",
                expected="at most 64 bits in ten bytes",
                found="more",
                offset=where,
            )
        if dtype.name == "int32":
            # protobuf keeps an int32's low 32 bits: a writer may leave out the sign's extension.
            values = np.where(values >> 31 == 1, values - (1 << 32), values)
        smallest, largest = int(values.min()), int(values.max())
        if smallest < low or largest > high:
            raise record.corrupt(
                f"elements from this byte do not fit {dtype.name}",
                expected=f"{low} to {high}",
                found=smallest if smallest < low else largest,
                offset=where,
            )
        out[done : done + values.size] = values
        done, position = done + values.size, position + stop
    return out.view(dtype)


def _unpack_block(block: _Bytes, last_bytes: npt.NDArray[np.intp]) -> npt.NDArray[np.int64] | None:
    """Return the numbers of whole varints, given where each ends, or None if one is none."""
    if not last_bytes.size:
        return None
    if last_bytes.size == block.size:
        return block.astype(np.int64)
    lengths = np.diff(last_bytes, prepend=-1)
    width = int(lengths.max())
    if width > _MAX_VARINT_BYTES:
        return None
    # The inverse of _pack_varints: one row for each element, zero where it has no byte.
    rows = np.zeros((lengths.size, width), dtype=np.uint8)
    rows[np.arange(width) < lengths[:, None]] = block
    if width == _MAX_VARINT_BYTES and int(rows[:, -1].max()) > 1:
        return None
    values = (rows[:, 0] & 0x7F).astype(np.uint64)
    for column in range(1, width):
        values |= (rows[:, column] & 0x7F).astype(np.uint64) << np.uint64(7 * column)
    return values.view(np.int64)


@dataclass(slots=True)
class _TensorParts:
    """A tensor of which some parts were read. Memory for the whole is taken once the parts add up to it."""

    dims: tuple[int, ...]
    dtype: DType
    total: int
    filled: int = 0
    parts: list[_Part] = field(default_factory=list[_Part])
    value: Array | None = None

    def add(self, part: _Part) -> None:
        if (part.dims, part.values.dtype) != (self.dims, self.dtype):
            raise part.record.corrupt(
                "a part of another tensor",
                expected=f"{self.dtype} of shape {self.dims!s:.80}",
                found=f"{part.values.dtype} of shape {part.dims!s:.80}",
            )
        if self.value is not None:
            raise part.record.corrupt(
                "an extra part for a filled tensor",
                expected=f"{self.total} elements",
                found=f"[{part.begin}, {part.end}) once more",
            )
        self.parts.append(part)
        self.filled += part.values.size
        if self.filled >= self.total:
            self.value = self._assemble()
            self.parts.clear()

    def whole(self) -> Array:
        """Return the tensor, or raise if a part of it is missing."""
        return self._assemble() if self.value is None else self.value

    def _assemble(self) -> Array:
        parts = sorted(self.parts, key=lambda part: (part.begin, part.end))
        reached = 0
        for part in parts:
            if part.begin < reached:
                raise part.record.corrupt(
                    "overlapping segments", expected=f"a begin of {reached} or more", found=part.begin
                )
            reached = part.end
        if self.filled < self.total:
            raise parts[0].record.corrupt(
                f"a part of the tensor of shape {self.dims!s:.80} that starts here is missing",
                expected=f"{self.total} elements",
                found=f"{self.filled} elements",
            )
        flat: Array = np.empty(self.total, dtype=self.dtype)
        for part in parts:
            flat[part.begin : part.end] = part.values
        try:
            return flat.reshape(self.dims)
        except ValueError as error:
            raise parts[0].record.corrupt(
                "impossible dims", expected="a shape that NumPy can have", found=f"{self.dims!s:.80} ({error})"
            ) from None
