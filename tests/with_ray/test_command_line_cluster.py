"""The commands against a real Ray that demands a token: each is a process of its own, as in a shell."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ray_head import RayHead, shared_head, wait_until

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
# The workspace waits for all CPUs, of which another actor holds one: there the launch is interrupted.
INTERRUPTED_LAUNCH = """
import signal, threading, time
import ray
from blobspace.cluster import Cluster, client
client.connect(may_start=False)
class Hog:
    def ready(self): pass
hog = ray.remote(num_cpus=1)(Hog).remote()
ray.get(hog.ready.remote())
def own():
    return sorted(name for name in client.named_actors() if name.startswith("half/"))
def interrupt():
    while len(own()) < 2:
        time.sleep(0.05)
    print(own(), flush=True)
    signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
threading.Thread(target=interrupt, daemon=True).start()
try:
    Cluster.launch({"name": "half", "workspaces": [{"name": "w0", "num_cpus": 4}]})
except KeyboardInterrupt:
    print("interrupted")
print(own())
"""
HUNG_COORDINATOR = """
import threading
from blobspace.cluster import Cluster, client
from blobspace.cluster.command_line import main
from blobspace.ops import DeadlineError
client.connect(may_start=False)
cluster = Cluster.launch({"name": "hung", "workspaces": [{"name": "w0"}]}, detached=True)
cluster._coordinator.__ray_call__.remote(lambda _: threading.Event().wait())
client._COORDINATOR_S = 0.3
for ask in (cluster.view, cluster.blobs, lambda: Cluster.attach("hung")):
    try:
        ask()
    except DeadlineError as error:
        print(error)
try:
    main(["down", "--cluster", "hung"])
except SystemExit:
    print([name for name in client.named_actors() if name.startswith("hung/")])
"""
KILL_COORDINATOR = """
import time
import ray
from blobspace.cluster import client
client.connect(may_start=False)
ray.kill(ray.get_actor("default/coordinator", namespace="blobspace"), no_restart=True)
while client.clusters():
    time.sleep(0.05)
"""


@pytest.fixture(scope="module")
def head(request: pytest.FixtureRequest) -> RayHead:
    return shared_head(request.config)


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
    saved = document(head.command("checkpoint", *words, "--json"))
    assert (saved["step"], saved["workspace_count"], saved["blob_count"]) == (3, 2, 4)
    assert saved["root"] == str(root)

    again = head.command("checkpoint", "--step", "3")
    assert (again.returncode, again.stdout) == (4, "")
    assert again.stderr.startswith("error: Step 3 has a checkpoint already")
    assert again.stderr.endswith("or pass --replace to replace it.\n")

    feed(head, 8)
    restored = head.command("restore")
    assert restored.returncode == 0, restored.stderr
    assert restored.stdout.startswith(f"Cluster 'default' is back at step 3 from {root}: 2 workspaces, ")

    shown = document(head.command("show", "w1", "fc_w", "--json"))["blobs"]
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
    [listed] = document(head.command("ls", root, "--json"))["checkpoints"]
    assert (listed["step"], listed["blob_count"]) == (3, 4)
    assert head.command("verify", root).stdout.startswith("Step 3 is sound: 4 blobs")
    stored = document(head.command("show", "--root", root, "--json"))
    assert stored["metadata"] == {"loss": 0.5, "note": "first try"}


def test_up_of_a_name_that_is_taken_is_a_conflict_and_leaves_the_cluster_alone(head: RayHead, cluster: Path) -> None:
    ran = head.command("up", cluster)
    assert (ran.returncode, ran.stdout) == (4, "")
    assert ran.stderr.startswith("error: A cluster named 'default' exists already.")


def test_blobs_lists_specs_and_totals_of_what_matches(head: RayHead, cluster: Path) -> None:
    ran = head.command("blobs", "--match", "*_b")
    assert ran.returncode == 0, ran.stderr
    assert re.search(r"^w0 +fc_b +float64 +\(2,\) +16 B +[0-9]+$", ran.stdout, re.MULTILINE)
    assert re.search(r"^total +2 blobs +32 B$", ran.stdout, re.MULTILINE)
    assert "fc_w" not in ran.stdout
    names = head.command("blobs", "--names", "--workspace", "w1")
    assert names.stdout == "w1\tfc_b\nw1\tfc_w\n"


def test_without_the_token_one_line_says_what_to_set(head: RayHead, cluster: Path) -> None:
    # Ray tries 20 times, a second apart, before it gives up; once is enough here.
    ran = head.blobspace("status", RAY_AUTH_MODE="disabled", RAY_NUM_REDIS_GET_RETRIES="1")
    assert (ran.returncode, ran.stdout) == (2, "")
    assert ran.stderr.count("\n") == 1
    assert "RAY_AUTH_MODE=token" in ran.stderr


def test_an_interrupted_launch_leaves_nothing(head: RayHead) -> None:
    ran = head.run(sys.executable, "-c", INTERRUPTED_LAUNCH)
    assert (ran.returncode, ran.stdout) == (0, "['half/coordinator', 'half/workspace/w0#1']\ninterrupted\n[]\n"), (
        ran.stderr
    )


def test_a_coordinator_that_hangs_is_named_and_down_ends_it_with_its_workspaces(head: RayHead) -> None:
    ran = head.run(sys.executable, "-c", HUNG_COORDINATOR)
    assert ran.returncode == 0, ran.stderr
    *refused, gone, left = ran.stdout.splitlines()
    assert len(refused) == 3
    assert all(line.startswith("The coordinator of cluster 'hung' did not answer within 0.3 s;") for line in refused)
    assert gone == "Cluster 'hung' had no working coordinator any more. What it left is ended: w0."
    assert left == "[]"


# The last tests of this module: they break the cluster, mend it, and end it.
def test_a_lost_workspace_is_shown_and_recovered(head: RayHead, cluster: Path) -> None:
    document(head.command("checkpoint", "--step", "5", "--json"))
    [facts] = document(head.command("status", "--json"))["clusters"]
    assert facts["name"] == "default"
    assert [fact["state"] for fact in facts["workspaces"]] == ["alive", "alive"]
    assert facts["workspaces"][0]["limit_bytes"] == 64 * 2**20
    os.kill(facts["workspaces"][0]["pid"], signal.SIGKILL)

    lost = head.blobspace("status")
    assert lost.returncode == 0, lost.stderr
    assert re.search(r"^w0 +lost ", lost.stdout, re.MULTILINE)
    assert re.search(r"^w1 +alive ", lost.stdout, re.MULTILINE)
    assert re.search(r"^w0 is lost: .*\bdie", lost.stdout, re.MULTILINE)
    failed = document(head.command("checkpoint", "--cluster", "default", "--step", "6", "--json"), code=8)
    assert failed["error"]["kind"] == "workspace_lost"
    assert failed["error"]["fields"]["workspace"] == "w0"
    assert "'blobspace recover --cluster default' recreates it" in failed["error"]["message"]

    recovered = head.blobspace("recover")
    assert recovered.returncode == 0, recovered.stderr
    assert recovered.stdout.startswith(f"Cluster 'default' is back at step 5 from {head.folder / 'checkpoints'}: 2 wo")
    assert recovered.stdout.endswith("\nMade anew: w0.\n")
    [facts] = document(head.command("status", "--json"))["clusters"]
    assert [(fact["state"], fact["blob_count"]) for fact in facts["workspaces"]] == [("alive", 2), ("alive", 2)]
    assert facts["last_committed_step"] == 5

    again = document(head.command("recover", "--step", "5", "--root", "checkpoints", "--deadline", "60", "--json"))
    assert (again["step"], again["recreated"], again["workspace_count"]) == (5, [], 2)
    absent = head.command("recover", "--step", "77")
    assert (absent.returncode, absent.stdout) == (3, "")


def test_down_ends_the_workspaces_that_a_dead_coordinator_left(head: RayHead, cluster: Path) -> None:
    [facts] = document(head.command("status", "--json"))["clusters"]
    processes = [Path(f"/proc/{fact['pid']}") for fact in facts["workspaces"]]
    killed = head.run(sys.executable, "-c", KILL_COORDINATOR)
    assert killed.returncode == 0, killed.stderr
    gone = head.command("status")
    assert (gone.returncode, gone.stdout) == (3, "")
    assert gone.stderr.startswith("error: There is no cluster on this Ray.")
    assert all(process.exists() for process in processes)

    down = head.blobspace("down")
    assert (down.returncode, down.stderr) == (0, "")
    assert down.stdout == "Cluster 'default' had no working coordinator any more. What it left is ended: w0, w1.\n"
    wait_until(lambda: not any(process.exists() for process in processes), "the end of the workspaces' processes")
    again = head.command("down", "--json")
    assert document(again, code=3)["error"]["kind"] == "not_found"
