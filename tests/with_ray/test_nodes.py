"""Several Ray nodes, one of which is killed with SIGKILL while a net runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    # A process can be connected to one Ray alone, and this session's is another one.
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("node_loss.py")), str(tmp_path_factory.mktemp("nodes"))],
        env={**environment, "RAY_AUTH_MODE": "disabled"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert lines, done.stdout[-2000:] + done.stderr[-4000:]
    return json.loads(lines[0].removeprefix("RESULT "))


def test_workspaces_stand_on_nodes_of_their_own(result: dict[str, Any]) -> None:
    assert len(set(result["placed"].values())) == 3


def test_every_waiting_call_ends_and_the_loss_names_workspace_node_and_step(result: dict[str, Any]) -> None:
    assert len(result["errors"]) == 3
    for text in (f"'{result['lost']}'", result["victim"][:12], "last committed step is 4"):
        assert text in result["message"]


def test_recovery_moves_the_lost_workspace_to_another_node_bit_by_bit(result: dict[str, Any]) -> None:
    assert result["recreated"] == [result["lost"]]
    assert result["step"] == 4
    assert result["after"][result["lost"]] != result["victim"]
    assert result["identical"]


def test_recovery_that_the_remaining_nodes_cannot_hold_is_refused(result: dict[str, Any]) -> None:
    assert "No node can hold" in result["refusal"] or "together" in result["refusal"]
    assert "The live nodes have" in result["refusal"]
