"""The README's example, run as it stands; and a user's own operator in the workspaces of a cluster."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import ray

from blobspace.cluster import Cluster
from blobspace.ops import InvalidInputError

README = Path(__file__).parents[2] / "README.md"


def test_the_readme_example_runs_and_prints_what_it_says(local_ray: None, tmp_path: Path) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    said = [line.rpartition("  # ")[2] for line in block.splitlines() if line.lstrip().startswith("print(")]
    done = subprocess.run(
        [sys.executable, "-c", block],
        env={
            **os.environ,
            "RAY_ADDRESS": ray.get_runtime_context().gcs_address,
            "RAY_AUTH_MODE": "disabled",
        },
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == said


def test_a_users_own_operator_runs_in_every_workspace(local_ray: None, tmp_path: Path) -> None:
    (tmp_path / "my_operators.py").write_text(
        textwrap.dedent(
            """
            from blobspace.ops import OperatorSchema, register_operator

            @register_operator(OperatorSchema(type="Square", doc="Square.", inputs=(1, 1), outputs=(1, 1)))
            def square(call):
                x = call.input(0)
                y = call.output(0, x.shape, x.dtype)
                return lambda: call.xp.multiply(x, x, out=y)
            """
        )
    )
    driver = textwrap.dedent(
        """
        import sys, numpy as np, ray
        ray.init(address=sys.argv[1], log_to_driver=False, runtime_env={"working_dir": "."})
        from blobspace.cluster import Cluster
        config = {"name": "own", "modules": ["my_operators"], "workspaces": [{"name": "w"}]}
        with Cluster.launch(config) as cluster:
            cluster.workspaces["w"].feed_blob("x", np.array([3.0]))
            cluster.workspaces["w"].run_operator("Square", ["x"], ["y"])
            print(cluster.workspaces["w"].fetch_blob("y"))
        """
    )
    done = subprocess.run(
        [sys.executable, "-c", driver, ray.get_runtime_context().gcs_address],
        env={**os.environ, "RAY_AUTH_MODE": "disabled"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[9.]"


def test_a_module_that_the_workspaces_cannot_import_is_named(local_ray: None) -> None:
    with pytest.raises(InvalidInputError, match="'no_such_module' cannot be imported"):
        Cluster.launch({"name": "own", "modules": ["no_such_module"], "workspaces": [{"name": "w"}]})
