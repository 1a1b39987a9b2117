"""The supervisor: starts local Ray, runs the training twice, kills processes in the second run, compares the ends.

What the two runs end with comes by two roads: the quiet run's parameters are fetched from its living workspaces,
the interrupted run's are read from its last checkpoint's files, without Ray.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape

from ...ops.errors import BlobspaceError, InternalError, InvalidInputError
from ...ops.values import Array
from ..checkpoint import LocalStore, list_checkpoints, load_workspace, read_index, read_manifest
from ..client import Cluster
from .driver import configuration, evaluate, prepare, train
from .driver_process import DriverProcess, wait_gone
from .local_ray import local_ray
from .narrator import Narrator
from .training import ACCURACY, FULL, PARAMETERS, QUICK, STEP, WORKSPACES, Plan

_VICTIM = "w2"
_COMPARED = (*PARAMETERS, *(f"{name}_momentum" for name in PARAMETERS), STEP)
_GONE_S = 30.0
_SHOWN_HASH = 12

EXIT_IDENTICAL, EXIT_FAILED, EXIT_NO_DATA, EXIT_INTERRUPTED = 0, 1, 2, 130

State = dict[str, dict[str, Array]]
"""What a run ends with: workspace, blob, tensor."""


@dataclass(slots=True, kw_only=True)
class Run:
    """One training run, and what became of it.

    Attributes:
        state: The compared blobs.
        accuracy: Share of the test images that are classified right.
        seconds: How long it took, with launching its clusters.
    """

    state: State
    accuracy: float
    seconds: float


@dataclass(slots=True, kw_only=True)
class Interruptions:
    """What was done to the interrupted run. Each is written once, when it happens.

    Attributes:
        driver_pids: The drivers, in order.
        workspace_pids: For each launch and each recovery, the process of every workspace.
        workspace_killed_at: Step of the last news before the workspace was killed.
        is_in_net: Whether the driver's latest news came from the middle of a net.
        loss: How the driver learnt of it: the error's text and fields, and whether in the middle of a net.
        recovered: What ``cluster.recover()`` reported.
        driver_killed_at: Step of the last news before the driver was killed.
        resumed_at: Step from which the second driver went on.
    """

    driver_pids: list[int] = field(default_factory=list[int])
    workspace_pids: list[dict[str, int]] = field(default_factory=list[dict[str, int]])
    workspace_killed_at: int | None = None
    is_in_net: bool = False
    loss: dict[str, Any] = field(default_factory=dict[str, Any])
    recovered: dict[str, Any] = field(default_factory=dict[str, Any])
    driver_killed_at: int | None = None
    resumed_at: int | None = None


def main(*, as_json: bool, quick: bool, keep: str | os.PathLike[str] | None) -> int:
    """See :func:`blobspace.cluster.demo.main`."""
    complaints = Console(stderr=True)
    if importlib.util.find_spec("sklearn") is None:
        complaints.print(
            'The demo needs scikit-learn\'s digits: pip install "blobspace[demo]"', markup=False, soft_wrap=True
        )
        return EXIT_NO_DATA
    plan = QUICK if quick else FULL
    narrator = Narrator(Console(quiet=as_json), plan.steps)
    try:
        with ExitStack() as stack:
            folder = _folder(keep, stack)
            document = _Demo(plan, narrator, folder, is_kept=keep is not None).run(stack)
    except BlobspaceError as error:
        complaints.print(f"[red]The demo failed.[/red] {escape(str(error))}", highlight=False, soft_wrap=True)
        return EXIT_FAILED
    except KeyboardInterrupt:
        complaints.print("Interrupted. Everything that was started has ended.")
        return EXIT_INTERRUPTED
    if as_json:
        sys.stdout.write(json.dumps(document, indent=2) + "\n")
    return EXIT_IDENTICAL if document["is_passed"] else EXIT_FAILED


def _folder(keep: str | os.PathLike[str] | None, stack: ExitStack) -> Path:
    if keep is None:
        return Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="blobspace-demo-")))
    folder = Path(keep).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise InvalidInputError(f"{str(folder)!r} is not empty. Name a new folder to keep the demo's results in.")
    return folder


class _Demo:
    def __init__(self, plan: Plan, narrator: Narrator, folder: Path, *, is_kept: bool) -> None:
        self._plan = plan
        self._narrator = narrator
        self._folder = folder
        self._is_kept = is_kept
        self._root = folder / "checkpoints"
        self._environment: dict[str, str] = {}
        self._names: dict[str, list[str]] = {}
        self._happened = Interruptions()

    def run(self, stack: ExitStack) -> dict[str, Any]:
        """Do it all; return the document for scripts."""
        began = time.monotonic()
        say = self._narrator.say
        self._narrator.heading("blobspace demo: kill it, and compare the bits")
        say(
            "Four workspaces train one network on real handwritten digits: each learns from its own 360 images, and "
            "after every step one Allreduce averages their gradients. We train twice: first in peace, then with two "
            "kills. If checkpoints tell the truth, both runs end with the same bits."
        )
        self._environment = stack.enter_context(local_ray())
        say(f"Local Ray is up ({time.monotonic() - began:.1f} s).", style="dim")
        quiet = self._quiet_run()
        interrupted = self._interrupted_run()
        seconds = time.monotonic() - began
        return self._compare(quiet, interrupted, seconds)

    # --- the quiet run -------------------------------------------------------------------------------------

    def _quiet_run(self) -> Run:
        narrator, plan = self._narrator, self._plan
        began = time.monotonic()
        narrator.heading("1. The quiet run")
        with Cluster.launch(configuration("demo-quiet")) as cluster:
            prepare(cluster)
            narrator.say(
                f"Each workspace holds its images and the net. {plan.steps} steps are one call per workspace; no "
                f"checkpoint, no interruption."
            )

            def tell(event: str, /, **facts: Any) -> None:
                if event == "progress":
                    narrator.step(facts["step"])

            with narrator.run("quiet run"):
                train(cluster, plan.steps, tell)
                narrator.step(plan.steps)
            accuracy = evaluate(cluster)
            state = {
                name: {blob: handle.fetch_blob(blob) for blob in _COMPARED}
                for name, handle in cluster.workspaces.items()
            }
            for spec in cluster.blobs():
                self._names.setdefault(spec.workspace, []).append(spec.name)
            narrator.say(f"Test accuracy {accuracy:.1%}. We keep the parameters of all four workspaces.")
            narrator.say("The coordinator has asked every workspace what it holds:")
            narrator.names(self._names)
        if self._is_kept:
            arrays: dict[str, Any] = {
                f"{name}/{blob}": array for name, own in state.items() for blob, array in own.items()
            }
            np.savez(self._folder / "quiet.npz", **arrays)
        return Run(state=state, accuracy=accuracy, seconds=time.monotonic() - began)

    # --- the interrupted run -------------------------------------------------------------------------------

    def _interrupted_run(self) -> Run:
        narrator, plan, happened = self._narrator, self._plan, self._happened
        began = time.monotonic()
        narrator.heading("2. The interrupted run")
        narrator.say(
            f"Now a driver process of its own trains the same network from the same start, and saves a cluster-wide "
            f"checkpoint every {plan.checkpoint_every} steps."
        )
        with narrator.run("interrupted run"):
            self._first_driver()
            narrator.say(
                "A second driver starts with nothing but the checkpoint folder. It launches a new cluster and "
                "restores it: images, nets, parameters, momentum and step counter all come from disk."
            )
            self._second_driver()
            narrator.step(plan.steps)
        if happened.workspace_killed_at is None or not happened.recovered or happened.resumed_at is None:
            raise InternalError(f"The interrupted run was not interrupted as planned: {happened}.")
        seconds = time.monotonic() - began
        state = _read_state(self._root)
        accuracy = float(state[WORKSPACES[0]].pop(ACCURACY))
        narrator.say(f"Test accuracy {accuracy:.1%}, read from the last checkpoint's files.")
        return Run(state=state, accuracy=accuracy, seconds=seconds)

    def _first_driver(self) -> None:
        narrator, plan, happened = self._narrator, self._plan, self._happened
        with self._driver(1) as driver:
            for news in driver.news():
                self._retell(news)
                if news["event"] != "progress":
                    continue
                step: int = news["step"]
                if happened.workspace_killed_at is None and step > plan.kill_workspace_after:
                    pid = happened.workspace_pids[-1][_VICTIM]
                    happened.workspace_killed_at = step
                    os.kill(pid, signal.SIGKILL)
                    narrator.say(
                        f"SIGKILL to workspace {_VICTIM} (process {pid}) at step {step}, in the middle of run_net. Its "
                        f"images, parameters and momentum are gone.",
                        style="bold red",
                    )
                elif happened.recovered and step > plan.kill_driver_after:
                    happened.driver_killed_at = step
                    driver.kill()
                    narrator.say(f"SIGKILL to the driver (process {driver.pid}) at step {step}.", style="bold red")
                    wait_gone(happened.workspace_pids[-1].values(), deadline_s=_GONE_S)
                    narrator.say("Its four workspaces have ended with it: nothing is left in memory.")
                    return
        raise InternalError("The driver finished before it could be killed.")

    def _second_driver(self) -> None:
        with self._driver(2) as driver:
            for news in driver.news():
                self._retell(news)

    def _driver(self, number: int) -> DriverProcess:
        driver = DriverProcess(
            f"demo-{number}",
            self._root,
            self._plan,
            environment=self._environment,
            log=self._folder / f"driver-{number}.log",
        )
        self._happened.driver_pids.append(driver.pid)
        return driver

    def _retell(self, news: Mapping[str, Any]) -> None:
        narrator, happened = self._narrator, self._happened
        match news["event"]:
            case "progress":
                happened.is_in_net = True
                narrator.step(news["step"])
            case "trained":
                happened.is_in_net = False
            case "launched":
                happened.workspace_pids.append(news["pids"])
                shown = ", ".join(f"{name}={pid}" for name, pid in news["pids"].items())
                narrator.say(f"Driver {happened.driver_pids[-1]} has launched four workspaces (processes: {shown}).")
            case "committed":
                narrator.step(news["step"])
                narrator.say(
                    f"Step {news['step']}: checkpoint committed, {news['tensor_bytes'] / 1e6:.1f} MB in "
                    f"{news['seconds']:.2f} s. Test accuracy {news['accuracy']:.1%}."
                )
            case "lost":
                happened.loss = {**news, "is_in_net": happened.is_in_net}
                narrator.say(
                    f"Nobody hangs: the driver's {'run_net' if happened.is_in_net else 'call'} ends with "
                    f"WorkspaceLostError, which names {news['workspace']} and the last committed step, "
                    f"{news['last_committed_step']}."
                )
            case "recovered":
                happened.recovered = dict(news)
                happened.workspace_pids.append(news["pids"])
                narrator.step(news["step"])
                narrator.say(
                    f"cluster.recover() made {', '.join(news['recreated'])} anew (process {news['pids'][_VICTIM]}) and "
                    f"took all four back to step {news['step']}, in {news['seconds']:.1f} s. Training goes on.",
                    style="green",
                )
            case "restored":
                happened.resumed_at = news["step"]
                narrator.step(news["step"])
                narrator.say(f"Step {news['step']} is restored. Training goes on.", style="green")
            case _:
                pass

    # --- the end -------------------------------------------------------------------------------------------

    def _compare(self, quiet: Run, interrupted: Run, seconds: float) -> dict[str, Any]:
        plan, happened, narrator = self._plan, self._happened, self._narrator
        differing = _differences(quiet.state, interrupted.state)
        least = min(quiet.accuracy, interrupted.accuracy)
        is_passed = not differing and least > plan.least_accuracy
        hashes = {"quiet": _hashes(quiet.state), "interrupted": _hashes(interrupted.state)}
        first = WORKSPACES[0]

        narrator.heading("3. The comparison")
        rows = [
            ("steps", *(str(int(run.state[first][STEP].item())) for run in (quiet, interrupted))),
            ("test accuracy", f"{quiet.accuracy:.2%}", f"{interrupted.accuracy:.2%}"),
            *(
                (f"{name} SHA-256", *(hashes[run][first][name][:_SHOWN_HASH] for run in ("quiet", "interrupted")))
                for name in PARAMETERS
            ),
        ]
        narrator.comparison(
            [
                *((what, one, other, "yes" if one == other else "NO") for what, one, other in rows),
                ("killed on the way", "nothing", f"{_VICTIM}, the driver", ""),
                ("time", f"{quiet.seconds:.1f} s", f"{interrupted.seconds:.1f} s", ""),
            ]
        )
        count = sum(len(own) for own in quiet.state.values())
        if differing:
            narrator.say(f"NOT identical: {', '.join(differing)}.", style="bold red")
        else:
            narrator.say(
                f"Identical, bit for bit: parameters, momentum and step counter of all four workspaces ({count} "
                f"tensors). {seconds:.0f} s in all.",
                style="bold green",
            )
        if least <= plan.least_accuracy:
            narrator.say(
                f"But the test accuracy is {least:.2%}; expected more than {plan.least_accuracy:.0%}.", style="bold red"
            )
        if self._is_kept:
            narrator.say(f"Kept in {self._folder}: the checkpoints, and the quiet run's parameters in quiet.npz.")
        before, after = happened.workspace_pids[0], happened.workspace_pids[1]
        return {
            "is_passed": is_passed,
            "is_identical": not differing,
            "differing": differing,
            "accuracy": {"quiet": quiet.accuracy, "interrupted": interrupted.accuracy, "expected": plan.least_accuracy},
            "steps": plan.steps,
            "checkpoint_every": plan.checkpoint_every,
            "checkpoints": [summary.step for summary in list_checkpoints(LocalStore(str(self._root)))],
            "parameters": list(PARAMETERS),
            "sha256": hashes,
            "workspace_killed": {
                "workspace": _VICTIM,
                "step": happened.workspace_killed_at,
                "pid": before[_VICTIM],
                "new_pid": after[_VICTIM],
                "is_in_net": happened.loss["is_in_net"],
                "error": happened.loss["text"],
                "last_committed_step": happened.loss["last_committed_step"],
                "recovered_step": happened.recovered["step"],
                "recreated": happened.recovered["recreated"],
            },
            "driver_killed": {
                "step": happened.driver_killed_at,
                "pid": happened.driver_pids[0],
                "new_pid": happened.driver_pids[1],
                "resumed_step": happened.resumed_at,
            },
            "workspace_pids": happened.workspace_pids,
            "blob_names": self._names,
            "seconds": {"quiet": quiet.seconds, "interrupted": interrupted.seconds, "all": seconds},
            "kept": str(self._folder) if self._is_kept else None,
        }


def _read_state(root: Path) -> State:
    """Read the compared blobs, and w0's accuracy, from the newest checkpoint."""
    store = LocalStore(str(root))
    manifest = read_manifest(store)
    state: State = {}
    for name in WORKSPACES:
        wanted = (*_COMPARED, ACCURACY) if name == WORKSPACES[0] else _COMPARED
        snapshot = load_workspace(
            store, read_index(store, manifest, name), select=lambda entry, wanted=wanted: entry.name in wanted
        )
        state[name] = {blob.name: blob.array for blob in snapshot.blobs if blob.array is not None}
    return state


def _differences(one: State, other: State) -> list[str]:
    """Return the blobs that are not the same, bit by bit: dtype, shape, and every byte."""
    return [
        f"{workspace}/{blob}"
        for workspace in WORKSPACES
        for blob in _COMPARED
        if _fingerprint(one[workspace][blob]) != _fingerprint(other[workspace][blob])
        or not np.array_equal(one[workspace][blob], other[workspace][blob])
    ]


def _fingerprint(array: Array) -> tuple[str, tuple[int, ...], str]:
    return array.dtype.name, tuple(array.shape), _sha256(array)


def _hashes(state: State) -> dict[str, dict[str, str]]:
    return {workspace: {blob: _sha256(array) for blob, array in own.items()} for workspace, own in state.items()}


def _sha256(array: Array) -> str:
    return hashlib.sha256(array.tobytes()).hexdigest()
