"""A driver in a process of its own, and the waits of whoever supervises it. Knows nothing of Ray."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from ...ops.errors import DeadlineError, InternalError
from .training import Plan

_READ_BYTES = 65536
_STDERR_SHOWN = 3000


class DriverProcess:
    """A child process that drives. As a context manager it has ended at the end, in whatever way.

    Args:
        name: Name of the cluster that it launches.
        root: Folder of the checkpoints.
        plan: What to train.
        environment: Where Ray is; see :func:`~.local_ray.local_ray`.
        log: File for its standard error.
        patience_s: How long it may say nothing.
    """

    def __init__(
        self, name: str, root: Path, plan: Plan, *, environment: Mapping[str, str], log: Path, patience_s: float = 90.0
    ) -> None:
        self._log = log
        self._patience_s = patience_s
        with log.open("wb") as stderr:
            self._process = subprocess.Popen(  # noqa: S603  (our own interpreter and module)
                [
                    *(sys.executable, "-m", __package__ or "", "driver", name, str(root)),
                    *("--steps", str(plan.steps), "--checkpoint-every", str(plan.checkpoint_every)),
                ],
                stdin=subprocess.PIPE,  # never written to: its end tells the driver that we are gone
                stdout=subprocess.PIPE,
                stderr=stderr,
                env=dict(environment),
                start_new_session=True,  # Ctrl-C is the supervisor's business
            )

    @property
    def pid(self) -> int:
        """The process."""
        return self._process.pid

    def news(self) -> Iterator[dict[str, Any]]:
        """Yield what the driver tells, until it has finished.

        Raises:
            DeadlineError: It said nothing for too long.
            InternalError: It ended without having finished; the text has its last words.
        """
        assert self._process.stdout is not None
        descriptor, rest = self._process.stdout.fileno(), b""
        while True:
            if not select.select([descriptor], [], [], self._patience_s)[0]:
                raise DeadlineError(
                    f"The driver (process {self.pid}) said nothing for {self._patience_s:g} s. Its standard error:\n"
                    f"{self._last_words()}",
                    waited_s=self._patience_s,
                )
            data = os.read(descriptor, _READ_BYTES)
            if not data:
                code = self._process.wait()
                if code:
                    raise InternalError(f"The driver ended with code {code}. Its standard error:\n{self._last_words()}")
                return
            *lines, rest = (rest + data).split(b"\n")
            # Libraries may print; the news are the lines that hold an object.
            yield from (json.loads(line) for line in lines if line.startswith(b"{"))

    def kill(self) -> None:
        """Send SIGKILL, and wait until the process is gone."""
        self._process.kill()
        self._process.wait()

    def _last_words(self) -> str:
        return self._log.read_text(encoding="utf-8", errors="replace")[-_STDERR_SHOWN:].strip() or "(empty)"

    def __enter__(self) -> DriverProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                stream.close()


def wait_gone(pids: Iterable[int], *, deadline_s: float) -> None:
    """Wait until none of these processes lives.

    Raises:
        DeadlineError: Some still live.
    """
    ends_at = time.monotonic() + deadline_s
    for pid in pids:
        try:
            descriptor = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        try:
            if not select.select([descriptor], [], [], max(0.0, ends_at - time.monotonic()))[0]:
                raise DeadlineError(f"Process {pid} still lives after {deadline_s:g} s.", pid=pid, waited_s=deadline_s)
        finally:
            os.close(descriptor)
