"""The demo from outside: its own processes, its document, and the files that it leaves."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from blobspace.cluster import demo
from blobspace.cluster.demo.narrator import Narrator

_DEADLINE_S = 170
_READER = Path(__file__).parents[2] / "examples" / "read_checkpoint.py"


@dataclass(frozen=True)
class Ended:
    document: dict[str, Any]
    folder: Path
    stderr: str


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Ended:
    pytest.importorskip("sklearn")
    folder = tmp_path_factory.mktemp("demo") / "kept"
    command = [sys.executable, "-m", "blobspace.cluster.demo", "--quick", "--json", "--keep", str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        stdout, stderr = process.communicate(timeout=_DEADLINE_S)
    except subprocess.TimeoutExpired:
        process.terminate()  # it cleans up
        pytest.fail(f"The demo did not end within {_DEADLINE_S} s: {process.communicate()}")
    assert process.returncode == 0, stdout + stderr
    return Ended(document=json.loads(stdout), folder=folder, stderr=stderr)


def _read_with_the_documented_reader(root: Path) -> dict[tuple[str, str, str], Any]:
    spec = importlib.util.spec_from_file_location("read_checkpoint", _READER)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.read(root)


def _sha256(array: np.ndarray[Any, Any]) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def test_both_runs_end_with_the_same_bits_and_the_files_say_so_too(ended: Ended) -> None:
    stored = _read_with_the_documented_reader(ended.folder / "checkpoints")
    quiet = np.load(ended.folder / "quiet.npz")
    hashes = ended.document["sha256"]
    for workspace in ("w0", "w1", "w2", "w3"):
        for name in ("fc1_w", "fc1_b", "fc2_w", "fc2_b", "fc1_w_momentum", "step"):
            one, other = quiet[f"{workspace}/{name}"], stored[workspace, "", name]
            assert one.dtype == other.dtype
            assert np.array_equal(one, other)
            assert _sha256(one) == hashes["quiet"][workspace][name]
            assert _sha256(other) == hashes["interrupted"][workspace][name]
        assert hashes["quiet"][workspace] == hashes["interrupted"][workspace] == hashes["quiet"]["w0"]
    assert int(stored["w0", "", "step"].item()) == ended.document["steps"]
    assert ended.document["is_identical"]
    assert ended.document["differing"] == []
    assert ended.document["is_passed"]


def test_the_network_has_learnt_something(ended: Ended) -> None:
    stored = _read_with_the_documented_reader(ended.folder / "checkpoints")
    assert not np.array_equal(stored["w0", "", "fc1_b"], np.zeros(64))
    labels = stored["w0", "", "test_labels"]
    hidden = np.maximum(stored["w0", "", "test_images"] @ stored["w0", "", "fc1_w"].T + stored["w0", "", "fc1_b"], 0)
    logits = hidden @ stored["w0", "", "fc2_w"].T + stored["w0", "", "fc2_b"]
    accuracy = float((logits.argmax(axis=1) == labels).mean())
    assert accuracy == pytest.approx(ended.document["accuracy"]["interrupted"], abs=0.01)
    assert accuracy > 0.9


def test_a_workspace_was_killed_in_the_middle_of_a_net_and_made_anew(ended: Ended) -> None:
    killed = ended.document["workspace_killed"]
    before, after, _ = ended.document["workspace_pids"]
    assert killed["workspace"] == "w2"
    assert killed["is_in_net"]
    assert "'w2'" in killed["error"]
    assert killed["recreated"] == ["w2"]
    assert killed["recovered_step"] == killed["last_committed_step"] < killed["step"]
    assert {name for name in before if before[name] != after[name]} == {"w2"}


def test_the_driver_was_killed_and_another_one_resumed_on_new_workspaces(ended: Ended) -> None:
    killed = ended.document["driver_killed"]
    _, before, after = ended.document["workspace_pids"]
    assert killed["pid"] != killed["new_pid"]
    assert 0 < killed["resumed_step"] < killed["step"]
    assert not set(before.values()) & set(after.values())


def test_every_checkpoint_was_committed_and_the_coordinator_named_all_blobs(ended: Ended) -> None:
    document = ended.document
    every = document["checkpoint_every"]
    assert document["checkpoints"] == list(range(0, document["steps"] + 1, every))
    assert set(document["blob_names"]) == {"w0", "w1", "w2", "w3"}
    assert {"fc1_w", "images", "test_images"} <= set(document["blob_names"]["w0"])
    assert "test_images" not in document["blob_names"]["w3"]


def test_no_process_is_left(ended: Ended) -> None:
    pids = [pid for family in ended.document["workspace_pids"] for pid in family.values()]
    pids += [ended.document["driver_killed"]["pid"], ended.document["driver_killed"]["new_pid"]]
    assert [pid for pid in pids if Path(f"/proc/{pid}").exists() and _is_ours(pid)] == []


def _is_ours(pid: int) -> bool:
    # A pid may have been given to another process meanwhile.
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False
    return b"blobspace.cluster.demo" in command or b"WorkspaceActor" in command


def test_without_scikit_learn_one_line_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    assert demo.main(as_json=True) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1
    assert 'pip install "blobspace[demo]"' in captured.err


def test_a_folder_with_something_in_it_is_refused_and_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("sklearn")
    (tmp_path / "mine").write_text("precious")
    assert demo.main(as_json=True, keep=tmp_path) == 1
    assert "is not empty" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["mine"]


def test_without_a_terminal_progress_is_a_few_plain_lines() -> None:
    out = io.StringIO()
    narrator = Narrator(Console(file=out, width=80), steps=100)
    with narrator.run("run"):
        for step in (1, 20, 30, 60, 20, 30, 100):
            narrator.step(step)
    told = [line.strip() for line in out.getvalue().splitlines()]
    assert told == [f"step {step} of 100" for step in (30, 60, 30, 100)]
    assert "\x1b" not in out.getvalue()
