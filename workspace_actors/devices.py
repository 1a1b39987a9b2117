"""The array library of a device. CuPy is imported here, and only when a GPU workspace is made."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np

from ..ops.definitions import CPU, CUDA
from ..ops.errors import InvalidInputError


def array_module(device_type: str) -> Any:
    """Return NumPy or CuPy.

    Raises:
        InvalidInputError: Unknown device; or CUDA where CuPy is not installed or sees no GPU.
    """
    if device_type == CPU:
        return np
    if device_type != CUDA:
        raise InvalidInputError(f"Unknown device {device_type!r}. Expected {CPU!r} or {CUDA!r}.", device=device_type)
    try:
        cupy = importlib.import_module("cupy")
    except ImportError as error:
        raise InvalidInputError(
            f"A workspace was asked for on CUDA, and CuPy cannot be imported here: {error}. Install the extra that "
            f"fits the machine's CUDA: blobspace[cuda12] or blobspace[cuda13].",
            device=CUDA,
        ) from error
    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        raise InvalidInputError(
            f"A workspace was asked for on CUDA, and CUDA does not work in this process: {error}. Give the workspace "
            f"num_gpus > 0 on a node that has a GPU.",
            device=CUDA,
        ) from error
    if count == 0:
        raise InvalidInputError(
            "A workspace was asked for on CUDA, and this process sees no GPU. Give the workspace num_gpus > 0.",
            device=CUDA,
        )
    return cupy


def to_host(array: Any) -> np.ndarray[Any, np.dtype[Any]]:
    """Return a NumPy copy of an array of either library."""
    return np.array(array, order="C") if isinstance(array, np.ndarray) else array.get()
