"""What a blob may hold, and the plain-bytes form of whatever is not a tensor of numbers.

A blob's value is one of three kinds: a **tensor** (C-contiguous array of a dtype in ``dtypes``), a **string
tensor** (an object array of ``bytes``, Caffe2's), or a **plain value** (what MessagePack carries: None, bool,
int, float, str, bytes, list, dict). Anything else is refused here, by name, before it touches a workspace.
Nothing is ever pickled.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from enum import Enum
from typing import Any, TypeAlias

import msgpack
import numpy as np
import numpy.typing as npt

from .dtypes import TENSOR_DTYPES, is_tensor_dtype
from .errors import InvalidInputError

Array: TypeAlias = npt.NDArray[Any]
"""A ``numpy.ndarray``, or a ``cupy.ndarray`` where a workspace is on a GPU (they share the interface used)."""

MAX_NAME_BYTES = 1024
MAX_PLAIN_DEPTH = 64
_MAX_DIMENSIONS = 64


class Kind(str, Enum):
    """What a blob holds at the moment."""

    UNINITIALIZED = "uninitialized"
    TENSOR = "tensor"
    STRINGS = "strings"
    VALUE = "value"


def check_name(name: object, what: str = "blob") -> str:
    """Return ``name`` if it may name a blob (or a net): non-empty UTF-8, at most 1,024 bytes, no NUL.

    Raises:
        InvalidInputError: It may not; the text says which rule it breaks.
    """
    if not isinstance(name, str):
        raise InvalidInputError(
            f"A {what} name is a str; found {type(name).__name__} {name!r:.80}.", found=type(name).__name__
        )
    if not name:
        raise InvalidInputError(f"A {what} name must not be empty.", name=name)
    try:
        encoded = name.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InvalidInputError(
            f"The {what} name {name!r:.80} is not UTF-8: {error.reason} at position {error.start}.",
            position=error.start,
        ) from None
    if len(encoded) > MAX_NAME_BYTES:
        raise InvalidInputError(
            f"The {what} name {name!r:.40}… has {len(encoded)} bytes of UTF-8; at most {MAX_NAME_BYTES} are allowed.",
            found_bytes=len(encoded),
            limit_bytes=MAX_NAME_BYTES,
        )
    if "\0" in name:
        raise InvalidInputError(
            f"The {what} name {name!r:.80} has a NUL character at position {name.index(chr(0))}.",
            position=name.index("\0"),
        )
    return name


def is_array(value: object) -> bool:
    """Whether a value is a NumPy or CuPy array, told without importing CuPy."""
    return isinstance(value, np.ndarray) or type(value).__module__.partition(".")[0] == "cupy"


def normalize_value(name: str, value: object) -> tuple[Kind, Any]:
    """Sort a fed value into its kind and its canonical form. The value itself is never modified.

    Args:
        name: The blob's name, for the error text.
        value: An array (any strides, any byte order), a NumPy scalar, anything with DLPack, a list of only
            ``str`` or only ``bytes`` (a string tensor), or a plain value.

    Returns:
        The kind, and: for a tensor an array in native byte order, possibly the caller's own (the workspace
        copies it); for a string tensor a fresh object array of ``bytes``; for a plain value the value itself.

    Raises:
        InvalidInputError: The value cannot be stored.
    """
    if isinstance(value, np.ma.MaskedArray):
        raise InvalidInputError(
            f"Blob {name!r} cannot hold a masked array: its mask would be lost. Feed value.filled(...) and, if it is "
            f"needed, value.mask as a blob of its own.",
            blob=name,
            found="numpy.ma.MaskedArray",
        )
    if isinstance(value, np.generic):
        value = np.asarray(value)
    if is_array(value):
        return _normalize_array(name, value)  # type: ignore[arg-type]
    if hasattr(value, "__dlpack__"):
        try:
            array = np.from_dlpack(value)  # type: ignore[arg-type]
        except (BufferError, RuntimeError, TypeError, ValueError, AttributeError) as error:
            raise InvalidInputError(
                f"Blob {name!r} cannot take this {type(value).__module__}.{type(value).__qualname__} through DLPack: "
                f"{error}. Convert it to a NumPy array first.",
                blob=name,
            ) from error
        return _normalize_array(name, array)
    if isinstance(value, list) and value and all(isinstance(item, (str, bytes)) for item in value):
        items = np.empty(len(value), dtype=object)
        items[:] = value
        return Kind.STRINGS, _string_array(name, items)
    check_plain(value, where=f"Blob {name!r}")
    return Kind.VALUE, value


def _normalize_array(name: str, value: Array) -> tuple[Kind, Array]:
    if isinstance(value, np.ndarray):
        value = np.asarray(value)  # a subclass, such as a matrix, would compute by rules of its own
    if value.ndim > _MAX_DIMENSIONS:
        raise InvalidInputError(f"Blob {name!r}: {value.ndim} dimensions; at most {_MAX_DIMENSIONS} are allowed.")
    if value.dtype.kind == "O":
        return Kind.STRINGS, _string_array(name, value)
    if value.dtype.kind in "US":
        return Kind.STRINGS, _string_array(name, value.astype(object))
    if not value.dtype.isnative:
        value = value.astype(value.dtype.newbyteorder("="))
    if not is_tensor_dtype(value.dtype):
        raise InvalidInputError(
            f"Blob {name!r} cannot hold an array of dtype {value.dtype}. Expected one of {', '.join(TENSOR_DTYPES)}, "
            f"or an object array of str or bytes (a string tensor).",
            blob=name,
            found=str(value.dtype),
        )
    return Kind.TENSOR, value


def string_tensor(items: Sequence[str | bytes]) -> Array:
    """Return a 1-D string tensor, ``(len(items),)``, object array of ``bytes`` (``str`` is encoded as UTF-8)."""
    array = np.empty(len(items), dtype=object)
    array[:] = [item.encode("utf-8") if isinstance(item, str) else item for item in items]
    return array


def _string_array(name: str, value: Array) -> Array:
    out = np.empty(value.shape, dtype=object)
    flat = out.reshape(-1)
    for position, item in enumerate(value.reshape(-1).tolist()):
        if isinstance(item, str):
            try:
                flat[position] = item.encode("utf-8")
            except UnicodeEncodeError as error:
                raise InvalidInputError(
                    f"Blob {name!r}: element {position}, the text {item!r:.60}, is not UTF-8 ({error.reason}).",
                    blob=name,
                ) from None
        elif isinstance(item, bytes):
            flat[position] = item
        else:
            raise InvalidInputError(
                f"Blob {name!r}: element {position} of the object array is a {type(item).__name__}. An object array "
                f"must hold only str or bytes (a string tensor).",
                blob=name,
                found=type(item).__name__,
            )
    return flat.reshape(value.shape)


def check_plain(value: object, *, where: str) -> None:
    """Raise unless MessagePack carries ``value`` and brings back the same value, types included.

    Raises:
        InvalidInputError: It holds a type, an integer or a nesting that MessagePack does not carry.
    """
    _check_plain(value, where, 0)


def _check_plain(value: object, where: str, depth: int) -> None:
    if depth > MAX_PLAIN_DEPTH:
        raise InvalidInputError(f"{where}: nested deeper than {MAX_PLAIN_DEPTH} levels.")
    kind = type(value)
    if value is None or kind in (bool, float, bytes):
        return
    if kind is str:
        try:
            value.encode("utf-8")  # type: ignore[attr-defined]
        except UnicodeEncodeError as error:
            raise InvalidInputError(f"{where}: the text {value!r:.60} is not UTF-8 ({error.reason}).") from None
    elif kind is int:
        if not -(2**63) <= value < 2**64:  # type: ignore[operator]
            raise InvalidInputError(
                f"{where}: the integer {value} does not fit into 64 bits. Feed it as text or as bytes."
            )
    elif kind is list:
        for item in value:  # type: ignore[attr-defined]
            _check_plain(item, where, depth + 1)
    elif kind is dict:
        for key, item in value.items():  # type: ignore[attr-defined]
            if type(key) not in (str, int, bytes):
                raise InvalidInputError(f"{where}: a dict key must be str, int or bytes; found {type(key).__name__}.")
            _check_plain(key, where, depth + 1)
            _check_plain(item, where, depth + 1)
    else:
        raise InvalidInputError(
            f"{where} cannot hold a {kind.__module__}.{kind.__qualname__}. Expected a NumPy or CuPy array, an array "
            f"library's tensor with DLPack, a list of str or bytes, or a plain value (None, bool, int, float, str, "
            f"bytes, list, dict; a tuple as a list).",
            found=f"{kind.__module__}.{kind.__qualname__}",
        )


def pack_plain(value: object) -> bytes:
    """Encode a plain value as MessagePack."""
    packed: bytes | None = msgpack.packb(value, use_bin_type=True)
    assert packed is not None
    return packed


def unpack_plain(data: bytes) -> Any:
    """Decode what :func:`pack_plain` made. Memory is bounded by ``len(data)``.

    Raises:
        ValueError: The bytes are no MessagePack value, or more than one.
    """
    try:
        return msgpack.unpackb(data, raw=False, strict_map_key=False, use_list=True)
    except (msgpack.exceptions.UnpackException, RecursionError, TypeError) as error:
        raise ValueError(f"not MessagePack: {error!r}") from error


def pack_strings(value: Array) -> bytes:
    """Encode a string tensor of any shape as MessagePack ``[shape, [bytes…]]``."""
    return pack_plain([list(value.shape), value.reshape(-1).tolist()])


def unpack_strings(data: bytes) -> Array:
    """Decode what :func:`pack_strings` made.

    Raises:
        ValueError: The bytes are something else.
    """
    decoded = unpack_plain(data)
    match decoded:
        case [[*shape], [*items]] if (
            all(type(size) is int and size >= 0 for size in shape)
            and len(shape) <= _MAX_DIMENSIONS
            and math.prod(shape) == len(items)
            and all(type(item) is bytes for item in items)
        ):
            return string_tensor(items).reshape(shape)
        case _:
            raise ValueError("not a packed string tensor")
