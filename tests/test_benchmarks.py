"""The benchmarks can be listed, and the document has their figures. Nothing here is timed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

_ROOT = Path(__file__).parent.parent
_SECTIONS = ("names", "net", "stall", "disk", "latency")


def test_the_sections_can_be_listed() -> None:
    pytest.importorskip("ray")
    listed = subprocess.run(
        [sys.executable, "-m", "benchmarks", "--list"], cwd=_ROOT, capture_output=True, text=True, check=True
    )
    assert tuple(line.split()[0] for line in listed.stdout.splitlines()) == _SECTIONS


@pytest.mark.parametrize("section", _SECTIONS)
def test_the_document_has_a_row_of_each_section(section: str) -> None:
    text = (_ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    table = text.partition("<!-- the table: begin")[2].partition("<!-- the table: end")[0]
    assert any(line.startswith(f"| {section} |") for line in table.splitlines())
