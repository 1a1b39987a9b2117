"""Read a blobspace checkpoint without blobspace: ``python read_checkpoint.py ROOT [STEP]``. See FORMAT.md."""

import contextlib
import struct
import sys
from pathlib import Path

import msgpack
import numpy as np
import xxhash

with contextlib.suppress(ImportError):  # without it, bfloat16 and float8 come as raw bytes (V2, V1)
    import ml_dtypes  # noqa: F401  (importing it teaches NumPy their names)


def record(path, magic):
    data = path.read_bytes()
    found, version, length = struct.unpack_from("<8sIQ", data)
    if (found, length) != (magic, len(data) - 36) or xxhash.xxh3_128_digest(data[:-16]) != data[-16:] or version != 1:
        raise ValueError(f"{path} is damaged, or its format {version} is newer than 1")
    return msgpack.unpackb(data[20:-16], strict_map_key=False)


def value(root, packs, blob):
    data = bytearray()
    for chunk in blob["chunks"]:
        with (root / packs[chunk["pack"]]["path"]).open("rb") as file:
            file.seek(chunk["offset"])
            data += (part := file.read(chunk["bytes"]))
        if xxhash.xxh3_128_digest(part) != chunk["hash"]:
            raise ValueError(f"{file.name} is damaged at {chunk['offset']}, in blob {blob['name']!r}")
    if blob["kind"] != "tensor":  # a string tensor is [shape, items], a plain value itself, uninitialized nothing
        return msgpack.unpackb(data, strict_map_key=False) if data else None
    with contextlib.suppress(TypeError):
        return np.frombuffer(data, np.dtype(blob["dtype"])).reshape(blob["shape"])
    return np.frombuffer(data, "V2" if blob["dtype"] == "bfloat16" else "V1").reshape(blob["shape"])


def read(root, step=None):
    """Return {(workspace, scope, name): value} of a step, or of the newest."""
    root, name = Path(root), "[0-9]" * 20 if step is None else f"{step:020d}"
    manifest = record(max((root / "checkpoints").glob(f"{name}.manifest")), b"\x89BSMAN\r\n")
    indexes = [record(root / entry["index_path"], b"\x89BSIDX\r\n") for entry in manifest["workspaces"]]
    return {(i["workspace"], b["scope"], b["name"]): value(root, i["packs"], b) for i in indexes for b in i["blobs"]}


if __name__ == "__main__":
    for names, found in read(sys.argv[1], *map(int, sys.argv[2:3])).items():
        print(*map(repr, names), getattr(found, "dtype", type(found).__name__), getattr(found, "shape", ""))
