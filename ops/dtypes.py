"""Element types that a tensor may have: their names, their Caffe2 numbers, and how they are told apart."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import ml_dtypes
import numpy as np

from .errors import InvalidInputError

DType = np.dtype[Any]

_NATIVE = (
    "bool int8 int16 int32 int64 uint8 uint16 uint32 uint64 float16 float32 float64 complex64 complex128"
).split()
_EXTENDED = "bfloat16 float8_e4m3fn float8_e4m3fnuz float8_e5m2 float8_e5m2fnuz float8_e4m3b11fnuz".split()

TENSOR_DTYPES: Mapping[str, DType] = MappingProxyType(
    {name: np.dtype(name) for name in _NATIVE} | {name: np.dtype(getattr(ml_dtypes, name)) for name in _EXTENDED}
)
"""Every storable element type by name."""

# Source: TensorProto.DataType of Caffe2; STRING (4) is a string tensor and has no element type here.
CAFFE2_NUMBERS: Mapping[int, DType] = MappingProxyType(
    {
        1: np.dtype("float32"),
        2: np.dtype("int32"),
        3: np.dtype("uint8"),
        5: np.dtype("bool"),
        6: np.dtype("uint8"),
        7: np.dtype("int8"),
        8: np.dtype("uint16"),
        9: np.dtype("int16"),
        10: np.dtype("int64"),
        12: np.dtype("float16"),
        13: np.dtype("float64"),
    }
)
_CAFFE2_NAMES = {
    "float": 1, "int": 2, "byte": 3, "double": 13, "long": 10, "half": 12,
}  # fmt: skip


def is_tensor_dtype(dtype: DType) -> bool:
    """Whether a tensor blob may have this element type (native byte order included in the question)."""
    return dtype.isnative and TENSOR_DTYPES.get(dtype.name) == dtype


def parse_dtype(value: object) -> DType:
    """Return the element type that a user or a Caffe2 argument means.

    Args:
        value: A Caffe2 TensorProto number (1 is float32), a name (``"float32"``, ``"bfloat16"``, Caffe2's
            ``"float"``), a NumPy dtype or scalar type.

    Raises:
        InvalidInputError: It names no storable element type.
    """
    if isinstance(value, bool):
        raise _unknown(value)
    if isinstance(value, int):
        if value in CAFFE2_NUMBERS:
            return CAFFE2_NUMBERS[value]
        raise _unknown(value)
    if isinstance(value, str):
        lowered = value.lower()
        if lowered in TENSOR_DTYPES:
            return TENSOR_DTYPES[lowered]
        if lowered in _CAFFE2_NAMES:
            return CAFFE2_NUMBERS[_CAFFE2_NAMES[lowered]]
        raise _unknown(value)
    if value is None:
        raise _unknown(value)  # NumPy takes None for float64
    try:
        dtype = np.dtype(value)  # type: ignore[call-overload]
    except (TypeError, ValueError):
        raise _unknown(value) from None
    if not is_tensor_dtype(dtype):
        raise _unknown(value)
    return dtype


def _unknown(value: object) -> InvalidInputError:
    return InvalidInputError(
        f"{value!r} is no element type that a tensor can have. Expected one of {', '.join(TENSOR_DTYPES)}, "
        f"or a Caffe2 number ({', '.join(f'{number}={dtype}' for number, dtype in CAFFE2_NUMBERS.items())}).",
        found=repr(value),
    )
