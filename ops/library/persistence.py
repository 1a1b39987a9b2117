"""Save and Load: blobs to and from one file in Caffe2's own format, minidb, for exchange with Caffe2.

Not the checkpoint: that one covers a whole cluster, is checked, and keeps what minidb cannot hold. What is safer
here than in Caffe2: a Save that fails leaves the old file as it was, and a Load that fails leaves the blobs so.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..errors import BlobspaceError
from ..execution import Allocation, OperatorCall, Slot
from ..minidb import CHUNK_ELEMENTS, decode_blobs, encode_blobs
from ..registry import Step, no_gradient, register_operator, should_not_do_gradient
from ..schema import UNBOUNDED, ArgType, Argument, OperatorSchema
from ..values import Array, Kind, check_name

_DB_TYPE = Argument(name="db_type", type=ArgType.STRING, required=True, doc='Format of the file; only "minidb".')
_ABSOLUTE_PATH = Argument(
    name="absolute_path",
    type=ArgType.BOOL,
    default=False,
    doc="Take the path as it is; otherwise it is relative to the root folder.",
)


def _check_db_type(call: OperatorCall) -> None:
    if (found := call.arguments["db_type"]) != "minidb":
        raise call.reject(f"Cannot find db implementation: expected db_type 'minidb', found {found!r}")


def _path(call: OperatorCall, db: str) -> str:
    if not db:
        raise call.reject("Must specify a db name: expected a path, found an empty one")
    if db.startswith("/") and not call.arguments["absolute_path"]:
        raise call.reject(f"expected a path relative to the root folder, or absolute_path=1; found {db!r}")
    return db


def _stripped(name: str, prefix: str) -> str:
    """Return ``name`` without everything up to and including the first ``prefix`` in it."""
    return name.partition(prefix)[2] if prefix and prefix in name else name


def _check_distinct(call: OperatorCall, what: str, names: list[str]) -> None:
    repeated = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []
    if repeated:
        raise call.reject(f"{what}: expected distinct names, found {', '.join(map(repr, repeated))} more than once")


@register_operator(
    OperatorSchema(
        type="Save",
        doc="Write blobs to one file, whole or not at all: a file of that name stays until the new one is durable.",
        inputs=(1, UNBOUNDED),
        outputs=(0, 0),
        input_names=("X: tensor of a dtype that Caffe2 has, string tensor, bytes, or str (saved as UTF-8 bytes).",),
        arguments=(
            Argument(name="db", type=ArgType.STRING, required=True, doc="Path of the file."),
            _DB_TYPE,
            _ABSOLUTE_PATH,
            Argument(
                name="strip_prefix",
                type=ArgType.STRING,
                default="",
                doc="Drop everything up to and including its first match from each blob's name in the file.",
            ),
            Argument(
                name="blob_name_overrides",
                type=ArgType.STRINGS,
                default=(),
                doc="Names in the file, one for each input; not together with strip_prefix.",
            ),
            Argument(
                name="chunk_size",
                type=ArgType.INT,
                default=0,
                doc="Most elements in one record; 0: Caffe2's default of 1,000,000; -1: one record for each tensor.",
            ),
        ),
    ),
    dynamic=True,
)
def save(call: OperatorCall) -> Step:
    """Source: Caffe2's Save. Repeated blob_name_overrides are refused, as no Load could tell them apart."""
    _check_db_type(call)
    path = _path(call, call.arguments["db"])
    names = _names_in_file(call)
    blobs = {name: _savable(call, position) for position, name in enumerate(names)}
    chunk = call.arguments["chunk_size"]
    if chunk < -1:
        raise call.reject(f"chunk_size is expected to be a number of elements, 0 or -1; found {chunk}")
    if chunk == -1:
        chunk = max([1, *(value.size for value in blobs.values() if not isinstance(value, bytes))])
    parts = encode_blobs(blobs, chunk_elements=chunk or CHUNK_ELEMENTS)
    return lambda: call.environment.files.write_atomically(path, parts)


def _names_in_file(call: OperatorCall) -> list[str]:
    inputs, prefix = list(call.definition.inputs), call.arguments["strip_prefix"]
    overrides = list(call.arguments["blob_name_overrides"])
    _check_distinct(call, "Duplicated input", inputs)
    if not overrides:
        names = [_stripped(name, prefix) for name in inputs]
        _check_distinct(call, f"Duplicated input after strip_prefix {prefix!r}", names)
        return names
    if prefix:
        raise call.reject("strip_prefix and blob_name_overrides are mutually exclusive: expected one, found both")
    if len(overrides) != len(inputs):
        raise call.reject(
            f"Number of blobs and blob_name_overrides mismatch: expected {len(inputs)}, found {len(overrides)}"
        )
    _check_distinct(call, "Duplicated name in blob_name_overrides", overrides)
    return overrides


def _savable(call: OperatorCall, position: int) -> Array | bytes:
    value: Any = call.value(position)
    if isinstance(value, str):
        return value.encode()
    if call.input_kind(position) is Kind.VALUE:
        if not isinstance(value, bytes):
            raise call.reject(
                f"input {position} ({call.definition.inputs[position]!r}) is expected to be a tensor, a string tensor, "
                f"bytes or str, found a plain {type(value).__name__}"
            )
        return value
    is_on_device = call.input_kind(position) is Kind.TENSOR and call.xp is not np
    return value.get() if is_on_device else value


@register_operator(
    OperatorSchema(
        type="Load",
        doc="Read blobs from one or more files. Nothing changes unless everything that is wanted was read.",
        inputs=(0, 0),
        outputs=(0, UNBOUNDED),
        output_names=("X: blob to load, whatever its kind, dtype and shape; a std::string becomes bytes.",),
        arguments=(
            Argument(name="db", type=ArgType.STRING, default="", doc="Path of the file."),
            Argument(name="dbs", type=ArgType.STRINGS, default=(), doc="Paths of several files, instead of db."),
            _DB_TYPE,
            _ABSOLUTE_PATH,
            Argument(name="add_prefix", type=ArgType.STRING, default="", doc="Put before each name in the file."),
            Argument(
                name="strip_prefix",
                type=ArgType.STRING,
                default="",
                doc="Drop everything up to and including its first match from each name in the file, first of all.",
            ),
            Argument(
                name="source_blob_names",
                type=ArgType.STRINGS,
                default=(),
                doc="Names to look for, one for each output; not together with strip_prefix or load_all.",
            ),
            Argument(name="load_all", type=ArgType.BOOL, default=False, doc="Load every blob, under its name."),
            Argument(
                name="allow_incomplete",
                type=ArgType.BOOL,
                default=False,
                doc="Leave an output as it is where no file has it, instead of failing.",
            ),
            Argument(
                name="keep_device",
                type=ArgType.BOOL,
                default=False,
                doc="Accepted for Caffe2's sake; blobs always come to the workspace's device.",
            ),
        ),
    ),
    dynamic=True,
)
def load(call: OperatorCall) -> Step:
    """Source: Caffe2's Load."""
    _check_db_type(call)
    wanted = _wanted_names(call)
    found = _read(call, wanted)
    _check_complete(call, wanted, found)
    tensors = [
        (call.output(index, found[name].shape, found[name].dtype), found[name])
        for name, index in wanted.items()
        if name in found and _is_tensor(found[name])
    ]
    further = {name: value for name, value in found.items() if name not in wanted}
    for name in further:
        check_name(name)

    def step() -> None:
        # What can fail, for want of memory, comes before the first write.
        allocations = _allocated(call, further)
        for array, value in [*tensors, *((allocation.array, further[slot.name]) for slot, allocation in allocations)]:
            call.xp.copyto(array, call.xp.asarray(value))
        for slot, allocation in allocations:
            call.environment.adopt(slot, allocation)
        for name, value in found.items():
            if not _is_tensor(value):
                kind = Kind.VALUE if isinstance(value, bytes) else Kind.STRINGS
                target = call.definition.outputs[wanted[name]] if name in wanted else name
                call.environment.store(call.environment.create(target), kind, value)

    return step


def _is_tensor(value: Any) -> bool:
    return not isinstance(value, bytes) and value.dtype.kind != "O"


def _wanted_names(call: OperatorCall) -> dict[str, int]:
    """Return the names to look for, and the output that each one goes to."""
    outputs, sources = call.definition.outputs, list(call.arguments["source_blob_names"])
    if not sources:
        return {name: index for index, name in enumerate(outputs)}
    for other in ("strip_prefix", "load_all"):
        if call.arguments[other]:
            raise call.reject(f"{other} and source_blob_names are mutually exclusive: expected one, found both")
    if len(sources) != len(outputs):
        raise call.reject(
            f"Number of output blobs and source_blob_names mismatch: expected {len(outputs)}, found {len(sources)}"
        )
    _check_distinct(call, "Duplicated source blob name", sources)
    return {name: index for index, name in enumerate(sources)}


def _read(call: OperatorCall, wanted: Mapping[str, int]) -> dict[str, Any]:
    """Return the blobs that are wanted and that the files have, by name."""
    db, dbs = call.arguments["db"], list(call.arguments["dbs"])
    if bool(db) == bool(dbs):
        raise call.reject(f"Must specify a db name: expected one of db and dbs, found {'both' if db else 'neither'}")
    _check_distinct(call, "Duplicated db name", dbs)
    found: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for path in [_path(call, name) for name in dbs or [db]]:
        for key, value in _decoded(call, path).items():
            name = call.arguments["add_prefix"] + _stripped(key, call.arguments["strip_prefix"])
            if name not in wanted and not call.arguments["load_all"]:
                continue
            if name in found:
                raise call.reject(
                    f"Duplicate Key {name!r} is found: expected it once, found it in {origins[name]!r} and {path!r}"
                )
            found[name], origins[name] = value, path
    return found


def _decoded(call: OperatorCall, path: str) -> dict[str, Array | bytes]:
    data = call.environment.files.read(path)
    try:
        return decode_blobs(data)
    except BlobspaceError as error:
        error.add_context(f"In the db {path!r}.")
        raise


def _check_complete(call: OperatorCall, wanted: Mapping[str, int], found: Mapping[str, Any]) -> None:
    missing = [name for name in wanted if name not in found]
    if not missing or (call.arguments["allow_incomplete"] and not call.arguments["load_all"]):
        return
    names = ", ".join(map(repr, missing[:5])) + (", …" if len(missing) > 5 else "")
    if call.arguments["load_all"]:
        raise call.reject(f"Output blob name does not exist in the db(s): expected {names}, found no such key")
    raise call.reject(
        f"Expected to load {len(wanted)} blobs, got {len(wanted) - len(missing)} only. Missing: {names}. "
        f"allow_incomplete=1 leaves them as they are"
    )


def _allocated(call: OperatorCall, values: Mapping[str, Any]) -> list[tuple[Slot, Allocation]]:
    """Return memory for the tensors among blobs that are no outputs of the operator; for all of them or none."""
    environment = call.environment
    made: list[tuple[Slot, Allocation]] = []
    try:
        for name, value in values.items():
            slot = environment.create(name)
            if _is_tensor(value):
                allocation = environment.allocate(
                    slot, value.shape, value.dtype, is_input=False, operator=str(call.definition)
                )
                made.append((slot, allocation))
    except BaseException:
        for _, allocation in made:
            environment.discard(allocation)
        raise
    return made


should_not_do_gradient("Save")
no_gradient("Load")
