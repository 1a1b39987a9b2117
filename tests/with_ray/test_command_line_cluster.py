"""The commands against a real Ray that demands a token: each is a process of its own, as in a shell."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ray_head import RayHead, ray_head, wait_until

TOKEN = "0123456789abcdef" * 4
FEED = """
import sys
import numpy as np
from blobspace.cluster import Cluster
cluster = Cluster.attach()
for rank, workspace in enumerate(cluster.workspaces.values()):
    workspace.feed_blob("fc_w", np.full((20, 100), float(sys.argv[1]) + rank, np.float32))
    workspace.feed_blob("fc_b", np.array([1.0, np.nan]))
print("fed", len(cluster.workspaces))
"""


@pytest.fixture(scope="module")
def head() -> Iterator[RayHead]:
    pytest.importorskip("ray")
    with ray_head(has_dashboard=False, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=TOKEN) as running:
        yield running


@pytest.fixture(scope="module")
def cluster(head: RayHead) -> Path:
    """The configuration of a running cluster of two workspaces, which was made by ``blobspace up``."""
    config = head.folder / "cluster.yaml"
    config.write_text(
        'checkpoint_root: checkpoints\nworkspaces:\n  - {name: "w{index}", count: 2, memory_limit: 64MiB}\n',
        encoding="utf-8",
    )
    up = head.blobspace("up", config)
    assert (up.returncode, up.stderr) == (0, "")
    assert "Cluster 'default', generation 1: 2 of 2 workspaces alive, nothing committed yet" in up.stdout
    assert re.search(r"^w1 +alive +cpu +[0-9a-f]{8} +[0-9]+ +0 +0 B +0 B / 64\.0 MiB$", up.stdout, re.MULTILINE)
    feed(head, 1)
    return config


def feed(head: RayHead, value: float) -> None:
    ran = head.run(sys.executable, "-c", FEED, value)
    assert ran.stdout == "fed 2\n", ran.stderr


def document(ran: subprocess.CompletedProcess[str], code: int = 0) -> Any:
    assert ran.returncode == code, ran.stdout + ran.stderr
    assert ran.stderr == ""
    return json.loads(ran.stdout)


def test_a_cluster_is_saved_and_restored_and_read_from_the_shell(head: RayHead, cluster: Path) -> None:
    root = head.folder / "checkpoints"
    words = ["--step", "3", "--metadata", "loss=0.5", "--metadata", "note=first try"]
    saved = document(head.blobspace("checkpoint", *words, "--json"))
    assert (saved["step"], saved["workspace_count"], saved["blob_count"]) == (3, 2, 4)
    assert saved["root"] == str(root)

    again = head.blobspace("checkpoint", "--step", "3")
    assert (again.returncode, again.stdout) == (4, "")
    assert again.stderr.startswith("error: Step 3 has a checkpoint already")

    feed(head, 8)
    restored = head.blobspace("restore")
    assert restored.returncode == 0, restored.stderr
    assert restored.stdout.startswith(f"Cluster 'default' is back at step 3 from {root}: 2 workspaces, ")

    shown = document(head.blobspace("show", "w1", "fc_w", "--json"))["blobs"]
    assert shown == [
        {
            "workspace": "w1",
            "name": "fc_w",
            "type": "float32",
            "shape": [20, 100],
            "tensor_bytes": 8000,
            "min": 2.0,
            "max": 2.0,
            "mean": 2.0,
            "first": [2.0] * 8,
        }
    ]
    [listed] = document(head.blobspace("ls", root, "--json"))["checkpoints"]
    assert (listed["step"], listed["blob_count"]) == (3, 4)
    assert head.blobspace("verify", root).stdout.startswith("Step 3 is sound: 4 blobs")
    stored = document(head.blobspace("show", "--root", root, "--json"))
    assert stored["metadata"] == {"loss": 0.5, "note": "first try"}


def test_up_of_a_name_that_is_taken_is_a_conflict_and_leaves_the_cluster_alone(head: RayHead, cluster: Path) -> None:
    ran = head.blobspace("up", cluster)
    assert (ran.returncode, ran.stdout) == (4, "")
    assert ran.stderr.startswith("error: A cluster named 'default' exists already.")


def test_blobs_lists_specs_and_totals_of_what_matches(head: RayHead, cluster: Path) -> None:
    ran = head.blobspace("blobs", "--match", "*_b")
    assert ran.returncode == 0, ran.stderr
    assert re.search(r"^w0 +fc_b +float64 +\(2,\) +16 B +[0-9]+$", ran.stdout, re.MULTILINE)
    assert re.search(r"^total +2 blobs +32 B$", ran.stdout, re.MULTILINE)
    assert "fc_w" not in ran.stdout
    names = head.blobspace("blobs", "--names", "--workspace", "w1")
    assert names.stdout == "w1\tfc_b\nw1\tfc_w\n"


def test_without_the_token_one_line_says_what_to_set(head: RayHead, cluster: Path) -> None:
    # Ray tries 20 times, a second apart, before it gives up; once is enough here.
    ran = head.blobspace("status", RAY_AUTH_MODE="disabled", RAY_NUM_REDIS_GET_RETRIES="1")
    assert (ran.returncode, ran.stdout) == (2, "")
    assert ran.stderr.count("\n") == 1
    assert "RAY_AUTH_MODE=token" in ran.stderr


# The last test of this module: it breaks the cluster, then ends it.
def test_a_lost_workspace_is_shown_and_down_leaves_nothing(head: RayHead, cluster: Path) -> None:
    [facts] = document(head.blobspace("status", "--json"))["clusters"]
    assert facts["name"] == "default"
    assert [fact["state"] for fact in facts["workspaces"]] == ["alive", "alive"]
    assert facts["workspaces"][0]["limit_bytes"] == 64 * 2**20
    victim = facts["workspaces"][0]["pid"]
    os.kill(victim, signal.SIGKILL)

    ran = head.blobspace("status")
    assert ran.returncode == 0, ran.stderr
    assert re.search(r"^w0 +lost ", ran.stdout, re.MULTILINE)
    assert re.search(r"^w1 +alive ", ran.stdout, re.MULTILINE)
    assert re.search(r"^w0 is lost: ", ran.stdout, re.MULTILINE)
    failed = document(head.blobspace("checkpoint", "--step", "4", "--json"), code=8)
    assert failed["error"]["kind"] == "workspace_lost"
    assert failed["error"]["fields"]["workspace"] == "w0"

    assert head.blobspace("down").stdout == "Cluster 'default' with 2 workspaces is gone.\n"
    survivor = Path(f"/proc/{facts['workspaces'][1]['pid']}")
    wait_until(lambda: not survivor.exists(), "the end of the workspace's process")
    gone = head.blobspace("status")
    assert (gone.returncode, gone.stdout) == (3, "")
    assert gone.stderr.startswith("error: There is no cluster on this Ray.")
