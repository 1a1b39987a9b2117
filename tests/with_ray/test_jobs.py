"""``ray job submit`` from the repository's root: a job saves a cluster that another process has made."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest
from ray_head import SCRIPTS, RayHead, shared_head, wait_until

REPOSITORY = Path(__file__).parent.parent.parent
NAMED_ACTORS = """
import ray
ray.init(address="auto", log_to_driver=False)
print([entry["name"] for entry in ray.util.list_named_actors(all_namespaces=True)])
"""


@pytest.fixture(scope="module")
def head(request: pytest.FixtureRequest) -> RayHead:
    running = shared_head(request.config)
    if running.dashboard_address is None:
        pytest.skip("ray[default] is not installed: no dashboard, no jobs")
    return running


def test_a_job_checkpoints_a_running_cluster(head: RayHead) -> None:
    config = head.folder / "shop.yaml"
    config.write_text('name: shop\nworkspaces:\n  - {name: "w{index}", count: 2}\n', encoding="utf-8")
    up = head.command("up", config)
    assert up.returncode == 0, up.stderr

    root = head.folder / "of-the-job"
    ran = submit(head, "blobspace", "checkpoint", "--cluster", "shop", "--step", "7", "--root", root)
    assert f"Step 7 is committed in {root}: 2 workspaces" in ran
    assert "succeeded" in ran
    check_upload(head)

    verified = head.command("verify", root, "--json")
    assert verified.returncode == 0, verified.stdout
    assert json.loads(verified.stdout)["step"] == 7

    down = head.blobspace("down", "--cluster", "shop")
    assert (down.returncode, down.stdout) == (0, "Cluster 'shop' with 2 workspaces is gone.\n")
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
    assert (uploaded / "blobspace" / "cluster" / "command_line" / "__main__.py").is_file()
    assert sum(path.stat().st_size for path in uploaded.rglob("*")) < 20 * 2**20
