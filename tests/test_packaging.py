"""What gets installed: one import name, every module of the three folders, and nothing else."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("ops", "workspace_actors", "cluster")
NEEDED = ("blobspace", *FOLDERS, "pyproject.toml", "README.md", "LICENSE", "tests/with_ray/support.py", "conftest.py")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    # A copy: building leaves folders behind. With stray files that a careless layout would pack too.
    copy = tmp_path_factory.mktemp("checkout")
    for name in NEEDED:
        source, target = ROOT / name, copy / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        elif source.exists():
            shutil.copy(source, target)
        else:
            target.write_text("")
    done = subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(copy / "dist"), str(copy)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = (copy / "dist").glob("*.whl")
    return zipfile.ZipFile(path)


def test_one_name_lands_at_top_level(wheel: zipfile.ZipFile) -> None:
    tops = {name.split("/")[0] for name in wheel.namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"blobspace"}
    assert len(tops) == 2


def test_every_module_is_there_as_a_real_file_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    packed = {name for name in wheel.namelist() if name.startswith("blobspace/")}
    expected = {"blobspace/__init__.py", "blobspace/py.typed"}
    for folder in FOLDERS:
        expected |= {f"blobspace/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / folder).rglob("*.py")}
    assert packed == expected
    with wheel.open("blobspace/ops/errors.py") as module:
        assert module.read() == (ROOT / "ops" / "errors.py").read_bytes()


def test_the_command_and_the_licence_are_there(wheel: zipfile.ZipFile) -> None:
    names = {name.partition("/")[2]: name for name in wheel.namelist() if ".dist-info/" in name}
    assert "blobspace = blobspace.cluster.command_line:main" in wheel.read(names["entry_points.txt"]).decode()
    assert "licenses/LICENSE" in names
    metadata = wheel.read(names["METADATA"]).decode()
    assert "License-Expression: Apache-2.0" in metadata
    for extra in ("cuda12", "cuda13", "demo", "jobs"):
        assert f"Provides-Extra: {extra}" in metadata
