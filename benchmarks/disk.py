"""Bandwidth of checkpoints and restores, against the same bytes written and read without any of it."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import numpy as np

from blobspace.cluster import Cluster

from .clusters import launched, local_ray
from .measuring import Rounds, Row, Section, Settings, interleave, timed
from .page_cache import MIB, evict, prewarm
from .stall import fill_net

_BLOB_BYTES = 16 * MIB
_ROUNDS = 5
_WORKSPACES = (1, 4)
_STEPS = (MIB, 16 * MIB)


class _Raw:
    """One file, written and read by one process with nothing but system calls."""

    def __init__(self, folder: Path, byte_count: int) -> None:
        self._path = folder / "raw"
        self._data = np.random.default_rng(0).integers(0, 255, byte_count, np.uint8)
        self._byte_count = byte_count

    def write(self, step: int) -> None:
        file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            view = memoryview(self._data)
            for begin in range(0, self._byte_count, step):
                os.write(file, view[begin : begin + step])
            os.fsync(file)
        finally:
            os.close(file)

    def read(self, step: int, *, is_fresh: bool) -> None:
        target = memoryview(np.empty(self._byte_count, np.uint8) if is_fresh else self._data)
        file = os.open(self._path, os.O_RDONLY)
        try:
            for begin in range(0, self._byte_count, step):
                assert os.preadv(file, [target[begin : begin + step]], begin) == len(target[begin : begin + step])
        finally:
            os.close(file)

    def remove(self) -> None:
        self._path.unlink(missing_ok=True)


class _Disk:
    """What is compared, all on one folder."""

    def __init__(self, folder: Path, byte_count: int, clusters: dict[int, Cluster]) -> None:
        self._folder = folder
        self._byte_count = byte_count
        self._clusters = clusters
        self._raw = _Raw(folder, byte_count)
        for count, cluster in clusters.items():
            cluster.create_net(fill_net(byte_count // _BLOB_BYTES // count))
            cluster.run_net("fill")

    def contenders(self) -> dict[str, Callable[[], float]]:
        found: dict[str, Callable[[], float]] = {
            "raw write": self._raw_write,
            "raw read, cold, reused": lambda: self._raw_read(is_cold=True, is_fresh=False),
            "raw read, cold, fresh": lambda: self._raw_read(is_cold=True, is_fresh=True),
            "raw read, warm, reused": lambda: self._raw_read(is_cold=False, is_fresh=False),
            "raw read, warm, fresh": lambda: self._raw_read(is_cold=False, is_fresh=True),
        }
        for count in self._clusters:
            found[f"save {count}"] = partial(self._save, count)
            for is_cold, is_fresh in _states(count):
                name = f"restore {count}, {_state(is_cold=is_cold, is_fresh=is_fresh)}"
                found[name] = partial(self._restore, count, is_cold=is_cold, is_fresh=is_fresh)
        return found

    def _prewarm(self) -> None:
        prewarm(3 * self._byte_count, self._folder)

    def _raw_write(self) -> float:
        times: list[float] = []
        for step in _STEPS:
            self._raw.remove()
            self._prewarm()
            times.append(timed(partial(self._raw.write, step)))
        return min(times)

    def _raw_read(self, *, is_cold: bool, is_fresh: bool) -> float:
        if not (self._folder / "raw").exists():
            self._raw.write(MIB)
        times: list[float] = []
        for step in _STEPS:
            self._settle(self._folder / "raw", is_cold=is_cold)
            times.append(timed(partial(self._raw.read, step, is_fresh=is_fresh)))
        return min(times)

    def _save(self, count: int) -> float:
        root = self._folder / f"save-{count}"
        shutil.rmtree(root, ignore_errors=True)
        self._prewarm()
        return timed(lambda: self._clusters[count].checkpoint(step=1, root=root))

    def _restore(self, count: int, *, is_cold: bool, is_fresh: bool) -> float:
        root, cluster = self._folder / f"save-{count}", self._clusters[count]
        if not root.exists():
            cluster.checkpoint(step=1, root=root)
        if is_fresh:
            # Blobs that are dropped without others in their place give most of their memory back to the system.
            for handle in cluster.workspaces.values():
                handle.reset()
        else:
            # A restore reads beside the present blobs, whose memory the next restore reuses.
            cluster.restore(step=1, root=root)
        self._settle(root, is_cold=is_cold)
        return timed(lambda: cluster.restore(step=1, root=root))

    def _settle(self, path: Path, *, is_cold: bool) -> None:
        self._prewarm()
        for file in [path] if path.is_file() else path.rglob("*"):
            if file.is_file():
                (evict if is_cold else _read_once)(file)


def _read_once(file: Path) -> None:
    with file.open("rb", buffering=0) as opened:
        block = bytearray(MIB)
        while opened.readinto(block):
            pass


def _states(count: int) -> list[tuple[bool, bool]]:
    """Return what to restore from and into: cold or warm pages, fresh or reused memory.

    A workspace keeps 64 MiB of free memory in any case, so with several of them fresh memory would be half fresh.
    """
    return [(is_cold, is_fresh) for is_cold in (True, False) for is_fresh in (False, True)[: 1 + (count == 1)]]


def _state(*, is_cold: bool, is_fresh: bool) -> str:
    return f"{'cold' if is_cold else 'warm'}, {'fresh' if is_fresh else 'reused'}"


def run(settings: Settings) -> list[Row]:
    byte_count = (64 if settings.is_quick else 512) * MIB
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="blobspace-benchmark-")))
        stack.enter_context(local_ray())
        clusters = {count: stack.enter_context(launched(f"disk{count}", count)) for count in _WORKSPACES}
        disk = _Disk(folder, byte_count, clusters)
        found = interleave(disk.contenders(), rounds=settings.rounds(_ROUNDS), settings=settings)
    return _rows(found, byte_count)


def _rows(found: Rounds, byte_count: int) -> list[Row]:
    def row(what: str, name: str, base: str) -> Row:
        speeds = [byte_count / MIB / found.median(one) for one in (name, base)]
        return Row(
            what=f"{what}, time / {base}",
            value=found.ratio(name, base),
            unit="x",
            absolute=f"{speeds[0]:,.0f} MiB/s, {speeds[1]:,.0f} MiB/s",
        )

    rows: list[Row] = []
    for count in _WORKSPACES:
        where = f"{byte_count // MIB} MiB in {count} workspace{'s' * (count > 1)}"
        rows.append(row(f"checkpoint of {where}", f"save {count}", "raw write"))
        for is_cold, is_fresh in _states(count):
            state = _state(is_cold=is_cold, is_fresh=is_fresh)
            rows.append(row(f"restore of {where}", f"restore {count}, {state}", f"raw read, {state}"))
    return rows


SECTION = Section(
    name="disk",
    title="Checkpoint and restore bandwidth",
    bound="Save and cold restore: the disk; warm restore: one memory copy and one hash of every byte, on two cores.",
    run=run,
)
