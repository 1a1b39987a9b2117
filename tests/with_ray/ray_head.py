"""A real ``ray start --head`` for tests: on loopback, with a token, its own ports and folder, and gone at the end."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

SCRIPTS = Path(sys.executable).parent
TOKEN = "0123456789abcdef" * 4
# Runs command after command: loading Ray and connecting to it, which is most of a command's time, is done once.
SHELL = """
import contextlib, io, json, sys
from blobspace.cluster.command_line import main
for line in sys.stdin:
    out, err, code = io.StringIO(), io.StringIO(), None
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(json.loads(line))
        except SystemExit as stop:
            code = stop.code
    print(json.dumps([code, out.getvalue(), err.getvalue()]), flush=True)
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class RayHead:
    """A running head.

    Attributes:
        folder: Its files, and a good place for more.
        environment: What a process needs to connect to it.
        dashboard_address: For ``ray job``; None without a dashboard.
    """

    folder: Path
    environment: dict[str, str]
    dashboard_address: str | None
    _shell: list[subprocess.Popen[str]] = field(default_factory=list)

    def run(self, *words: object, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run a program that connects to it."""
        return subprocess.run(
            [str(word) for word in words],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
            cwd=cwd or self.folder,
            env=self.environment | environment,
        )

    def blobspace(self, *words: object, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run the script ``blobspace``."""
        return self.run(SCRIPTS / "blobspace", *words, **environment)

    def command(self, *words: object) -> subprocess.CompletedProcess[str]:
        """Run a command of ``blobspace`` in the one process that runs all of these."""
        if not self._shell:
            self._shell.append(
                subprocess.Popen(
                    [sys.executable, "-c", SHELL],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                    cwd=self.folder,
                    env=self.environment,
                )
            )
        shell = self._shell[0]
        assert shell.stdin is not None
        assert shell.stdout is not None
        shell.stdin.write(json.dumps([str(word) for word in words]) + "\n")
        shell.stdin.flush()
        # A command that hangs ends here, and with it the shell: its output ends, and there is nothing to parse.
        watchdog = threading.Timer(120, shell.kill)
        watchdog.start()
        code, out, err = json.loads(shell.stdout.readline())
        watchdog.cancel()
        return subprocess.CompletedProcess(words, code, out, err)

    def end_shell(self) -> None:
        """End the process of :meth:`command`, if there is one."""
        for shell in self._shell:
            with shell:
                shell.kill()


_HEAD: pytest.StashKey[RayHead] = pytest.StashKey()


def shared_head(config: pytest.Config) -> RayHead:
    """Return the one head of this session, which is started for whoever asks first."""
    pytest.importorskip("ray")
    if _HEAD not in config.stash:
        # What ray[default] brings along, and ray alone does not.
        has_dashboard = all(importlib.util.find_spec(name) is not None for name in ("aiohttp", "opencensus"))
        stack = contextlib.ExitStack()
        config.add_cleanup(stack.close)
        head = ray_head(has_dashboard=has_dashboard, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=TOKEN)
        config.stash[_HEAD] = stack.enter_context(head)
        stack.callback(config.stash[_HEAD].end_shell)
    return config.stash[_HEAD]


@contextmanager
def ray_head(*, has_dashboard: bool, **environment: str) -> Iterator[RayHead]:
    """Start a head with 4 CPUs; on the way out, whatever happened, end every process of it."""
    folder = Path(tempfile.mkdtemp(prefix="bs", dir="/tmp"))  # short: Ray's socket paths have at most 107 bytes
    port, dashboard_port, agent_port = _free_ports(3)
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("RAY_") and key != "COLUMNS"}
    whole = inherited | {
        "HOME": str(folder),
        "PATH": f"{SCRIPTS}{os.pathsep}{os.environ['PATH']}",
        # Where Ray notes the address of the latest head; in its usual place it would catch every ray.init() here.
        "RAY_TMPDIR": str(folder),
        "RAY_USAGE_STATS_ENABLED": "0",
        **environment,
    }
    dashboard = [
        "--include-dashboard=true",
        "--dashboard-host=127.0.0.1",
        f"--dashboard-port={dashboard_port}",
        f"--dashboard-agent-listen-port={agent_port}",
    ]
    command = [
        str(SCRIPTS / "ray"),
        "start",
        "--head",
        f"--port={port}",
        "--node-ip-address=127.0.0.1",
        "--num-cpus=4",
        f"--temp-dir={folder / 'r'}",
        "--object-store-memory=200000000",
        "--disable-usage-stats",
        *(dashboard if has_dashboard else ["--include-dashboard=false"]),
    ]
    try:
        # To a file: the head's daemons inherit a pipe, and whoever reads it to its end would wait for them.
        with (folder / "start.log").open("wb") as log:
            started = subprocess.run(command, env=whole, stdout=log, stderr=log, timeout=60, check=False)
        assert started.returncode == 0, (folder / "start.log").read_text(encoding="utf-8")
        yield RayHead(
            folder=folder,
            environment=whole | {"RAY_ADDRESS": f"127.0.0.1:{port}"},
            dashboard_address=f"http://127.0.0.1:{dashboard_port}" if has_dashboard else None,
        )
    finally:
        _end_all(str(folder))
        shutil.rmtree(folder, ignore_errors=True)


def wait_until(is_met: Callable[[], bool], what: str, *, seconds: float = 20.0) -> None:
    ends = time.monotonic() + seconds
    while not is_met():
        assert time.monotonic() < ends, f"not within {seconds:g} s: {what}"
        time.sleep(0.05)


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        taken = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in taken:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in taken]


def _end_all(marker: str) -> None:
    """End every process that has the head's folder in its command line or environment, and all below them."""

    def end_those_there() -> bool:
        pids = _marked(marker)
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return not pids

    # More than once: Ray may start another worker while its processes are being looked up.
    wait_until(end_those_there, f"the end of the processes of {marker}")


def _marked(marker: str) -> set[int]:
    parents: dict[int, int] = {}
    found: set[int] = set()
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit() or int(folder.name) == os.getpid():
            continue
        with contextlib.suppress(OSError):
            pid = int(folder.name)
            parents[pid] = _stat(pid)[1]
            text = (folder / "cmdline").read_bytes() + (folder / "environ").read_bytes()
            if marker.encode() in text and _is_running(pid):
                found.add(pid)
    while below := {pid for pid, parent in parents.items() if parent in found and _is_running(pid)} - found:
        found |= below
    return found


def _stat(pid: int) -> tuple[str, int]:
    # The name before them is in brackets and may contain anything.
    state, parent, *_ = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return state, int(parent)


def _is_running(pid: int) -> bool:
    try:
        return _stat(pid)[0] not in "ZX"
    except OSError:
        return False
