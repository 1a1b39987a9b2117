"""``ray job submit`` from the repository's root: a job saves a cluster that another process has made."""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray_head import SCRIPTS, RayHead, ray_head, wait_until

REPOSITORY = Path(__file__).parent.parent.parent
NAMED_ACTORS = """
import ray
ray.init(address="auto", log_to_driver=False)
print([entry["name"] for entry in ray.util.list_named_actors(all_namespaces=True)])
"""


@pytest.fixture(scope="module")
def head() -> Iterator[RayHead]:
    pytest.importorskip("ray")
    # What ray[default] brings along, and ray alone does not.
    if any(importlib.util.find_spec(name) is None for name in ("aiohttp", "opencensus")):
        pytest.skip("ray[default] is not installed: no dashboard, no jobs")
    with ray_head(has_dashboard=True, RAY_AUTH_MODE="disabled") as running:
        yield running


def test_a_job_checkpoints_a_running_cluster(head: RayHead) -> None:
    config = head.folder / "cluster.yaml"
    config.write_text('name: shop\nworkspaces:\n  - {name: "w{index}", count: 2}\n', encoding="utf-8")
    up = head.blobspace("up", config)
    assert up.returncode == 0, up.stderr

    root = head.folder / "checkpoints"
    ran = submit(head, "blobspace", "checkpoint", "--cluster", "shop", "--step", "7", "--root", root)
    assert f"Step 7 is committed in {root}: 2 workspaces" in ran
    assert "succeeded" in ran
    check_upload(head)

    verified = head.blobspace("verify", root, "--json")
    assert verified.returncode == 0, verified.stdout
    assert json.loads(verified.stdout)["step"] == 7

    assert head.blobspace("down", "--cluster", "shop").returncode == 0
    wait_until(lambda: head.run(sys.executable, "-c", NAMED_ACTORS).stdout == "[]\n", "the end of all actors")


def submit(head: RayHead, *words: object) -> str:
    """Submit a job with the repository as its working directory, wait for it, and return what it printed."""
    assert head.dashboard_address is not None
    command = [SCRIPTS / "ray", "job", "submit", "--working-dir", ".", "--", *words]
    ends = time.monotonic() + 30
    while True:
        ran = head.run(*command, cwd=REPOSITORY, RAY_ADDRESS=head.dashboard_address)
        # Right after its start the head has no agent that could run a job.
        if "No available agent" not in ran.stdout + ran.stderr or time.monotonic() > ends:
            assert ran.returncode == 0, ran.stdout + ran.stderr
            return ran.stdout


def check_upload(head: RayHead) -> None:
    """What was uploaded is the package and what belongs to it, not the history and not an environment."""
    [uploaded] = (head.folder / "r").glob("session_2*/runtime_resources/working_dir_files/_ray_pkg_*/")
    top = {path.name for path in uploaded.iterdir()}
    assert {"blobspace", "configs", "pyproject.toml"} <= top
    assert not top & {".git", ".venv", "venv", ".ruff_cache", ".pytest_cache"}
    assert (uploaded / "blobspace" / "cluster" / "command_line.py").is_file()
    assert sum(path.stat().st_size for path in uploaded.rglob("*")) < 20 * 2**20
