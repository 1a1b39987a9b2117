"""From a workspace to a snapshot and back: leases, staged memory, and the plain form of a generator's state."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..ops.definitions import NetDef
from ..ops.dtypes import DType
from ..ops.errors import BlobspaceError, InternalError, InvalidInputError
from ..ops.values import Array, Kind, check_name, pack_plain, pack_strings, unpack_plain, unpack_strings
from .memory import BlobAllocation, Buffer, BufferPool
from .names import check_workspace_path
from .snapshot import BlobSnapshot, WorkspaceSnapshot


class Lease:
    """A snapshot's hold on buffers. Release it when the bytes are safe; releasing twice does nothing."""

    def __init__(self, pool: BufferPool, buffers: Sequence[Buffer]) -> None:
        self._pool = pool
        self._buffers: Sequence[Buffer] = buffers
        self._lock = threading.Lock()

    def release(self) -> None:
        """Give the buffers back to their blobs, or to the pool where a blob has moved on."""
        with self._lock:
            buffers, self._buffers = self._buffers, ()
        for buffer in buffers:
            self._pool.release(buffer)


@dataclass(frozen=True, slots=True)
class FrozenWorkspace:
    """A workspace's content at one moment, held by a lease. Nothing has been copied.

    Attributes:
        lease: To be released when the content is not needed any more.
        snapshot: Makes the snapshot; packs plain values, so it is called by whoever writes, not by who freezes.
    """

    lease: Lease
    snapshot: Callable[[], WorkspaceSnapshot]


class Stage:
    """Memory of a workspace's pool that a snapshot is read into, before any of it is visible."""

    def __init__(self, xp: Any, pool: BufferPool, fresh: Callable[..., BlobAllocation]) -> None:
        self._xp = xp
        self._pool = pool
        self._fresh = fresh
        self._allocations: dict[int, BlobAllocation] = {}
        self._on_host: dict[int, Array] = {}

    def allocate(self, shape: tuple[int, ...], dtype: DType) -> Array:
        """Return an array to fill; of host memory also where the workspace is on a GPU.

        Raises:
            MemoryLimitError: The workspace's limit does not leave room for a second copy of its blobs.
        """
        allocation = self._fresh(tuple(shape), dtype, wanted_by="restore", blob="(a checkpoint's)")
        array = allocation.array
        if not isinstance(array, np.ndarray):
            array = np.empty(shape, dtype)
        # Keyed by identity: the reader hands back the very arrays that it was given.
        self._allocations[id(array)] = allocation
        self._on_host[id(array)] = array
        return array

    def holds(self, array: Array) -> bool:
        """Whether this is one of the stage's arrays, not taken yet."""
        return id(array) in self._allocations

    def take(self, array: Array) -> BlobAllocation:
        """Return the allocation behind a filled array; it is the blob's from now on."""
        allocation = self._allocations.pop(id(array), None)
        if allocation is None:
            raise InternalError("A restored array did not come from the stage that it was read into.")
        if allocation.array is not array:
            allocation.array[...] = self._xp.asarray(array)
        del self._on_host[id(array)]
        return allocation

    def discard(self) -> None:
        """Give back what no blob has taken."""
        for allocation in self._allocations.values():
            self._pool.disown(allocation.buffer)
        self._allocations.clear()
        self._on_host.clear()


@dataclass(frozen=True, slots=True)
class RestorableContent:
    """A snapshot that has been checked as a whole, taken apart.

    Attributes:
        blobs: Each blob with its string tensor or plain value (None for a tensor).
        nets: Each net with its scope.
        generators: Each scope's generator.
    """

    blobs: tuple[tuple[BlobSnapshot, Any], ...]
    nets: tuple[tuple[str, NetDef], ...]
    generators: Mapping[str, np.random.Generator]


def restorable(snapshot: WorkspaceSnapshot, stage: Stage) -> RestorableContent:
    """Check a snapshot and take it apart; nothing else can go wrong with it afterwards.

    Raises:
        InvalidInputError: It is not what a workspace can become.
    """
    try:
        _check_blobs(snapshot, stage)
        states: Mapping[str, Any] = snapshot.state.get("generators", {})
        return RestorableContent(
            blobs=tuple((blob, _unpacked(blob)) for blob in snapshot.blobs),
            nets=tuple((check_workspace_path(net["scope"]), NetDef.from_plain(net["net"])) for net in snapshot.nets),
            generators={check_workspace_path(path): _generator_from(state) for path, state in states.items()},
        )
    except BlobspaceError:
        raise
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
        raise InvalidInputError(
            f"Workspace {snapshot.workspace!r} cannot become what this snapshot says, and is as it was: {error!r}.",
            workspace=snapshot.workspace,
        ) from error


def packed_payload(kind: Kind, value: Any) -> bytes | None:
    """Return the MessagePack form of what is not a tensor; None for what is."""
    if kind is Kind.STRINGS:
        return pack_strings(value)
    return pack_plain(value) if kind is Kind.VALUE else None


def _check_blobs(snapshot: WorkspaceSnapshot, stage: Stage) -> None:
    names = {(check_workspace_path(blob.scope), check_name(blob.name)) for blob in snapshot.blobs}
    if len(names) < len(snapshot.blobs):
        raise ValueError("a blob is there twice")
    arrays = [blob.array for blob in snapshot.blobs if blob.array is not None]
    if len({id(array) for array in arrays}) < len(arrays) or not all(map(stage.holds, arrays)):
        raise ValueError("an array does not come from the stage, or is there twice")


def _unpacked(blob: BlobSnapshot) -> Any:
    has_payload = blob.kind in (Kind.STRINGS, Kind.VALUE)
    if (blob.array is not None) != (blob.kind is Kind.TENSOR) or (blob.payload is not None) != has_payload:
        raise ValueError(f"blob {blob.name!r} does not have what a blob of kind {blob.kind.value} has")
    if blob.payload is None:
        return None
    return unpack_strings(blob.payload) if blob.kind is Kind.STRINGS else unpack_plain(blob.payload)


def generator_state(generator: np.random.Generator) -> dict[str, Any]:
    """Return the state of a generator as a plain value."""
    # PCG64 counts in 128 bits, which MessagePack does not carry; as hexadecimal text it does.
    state: Mapping[str, Any] = generator.bit_generator.state
    inner: Mapping[str, int] = state["state"]
    return {
        "algorithm": state["bit_generator"],
        "state": f"{inner['state']:x}",
        "increment": f"{inner['inc']:x}",
        "has_uint32": int(state["has_uint32"]),
        "uinteger": int(state["uinteger"]),
    }


def _generator_from(plain: Mapping[str, Any]) -> np.random.Generator:
    if plain.get("algorithm") != "PCG64":
        raise InvalidInputError(f"Unknown random generator {plain.get('algorithm')!r}; expected 'PCG64'.")
    bits = np.random.PCG64()
    bits.state = {
        "bit_generator": "PCG64",
        "state": {"state": int(plain["state"], 16), "inc": int(plain["increment"], 16)},
        "has_uint32": plain["has_uint32"],
        "uinteger": plain["uinteger"],
    }
    return np.random.Generator(bits)
