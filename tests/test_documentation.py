"""What the documents show is run, and what they name exists."""

from __future__ import annotations

import doctest
import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])


def python_blocks(document: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", document.read_text(), flags=re.DOTALL)


def test_the_readme_is_at_most_120_lines() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


def test_the_examples_of_operators_run() -> None:
    namespace: dict[str, object] = {}
    blocks = python_blocks(ROOT / "docs" / "operators.md")
    assert len(blocks) == 2
    for block in blocks:
        exec(compile(block, "docs/operators.md", "exec"), namespace)


@pytest.mark.parametrize(
    "module", ["blobspace.ops.net", "blobspace.workspace_actors.workspace"], ids=lambda name: name.rpartition(".")[2]
)
def test_the_examples_in_docstrings_run(module: str) -> None:
    loaded = importlib.import_module(module)
    result = doctest.testmod(loaded, extraglobs={"np": importlib.import_module("numpy")})
    assert result.attempted > 0
    assert result.failed == 0


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_a_document_links_to_what_is_there(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", document.read_text()):
        if "://" not in target:
            assert (document.parent / target).exists(), f"{document.name} links to {target}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_a_document_names_files_that_are_there(document: Path) -> None:
    text = document.read_text()
    for path in re.findall(r"`((?:ops|workspace_actors|cluster|tests|benchmarks|examples|configs)/[\w./]*)`", text):
        assert (ROOT / path).exists(), f"{document.name} names {path}"


def test_the_plain_reader_is_at_most_50_lines() -> None:
    assert len((ROOT / "examples" / "read_checkpoint.py").read_text().splitlines()) <= 50
