"""The figures as people read them: a table on the terminal, the same one in ``docs/benchmarks.md``, and JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from .measuring import Row, Section

DOCUMENT = Path(__file__).parent.parent / "docs" / "benchmarks.md"
BEGIN = "<!-- the table: begin (written by python -m benchmarks --write) -->"
END = "<!-- the table: end -->"
_HEAD = "| section | what | measured | target | met | in absolute terms |\n|---|---|---|---|---|---|"

Results = Mapping[str, Sequence[Row]]


def show(results: Results, sections: Sequence[Section]) -> None:
    """Print the table."""
    table = Table(title="blobspace benchmarks: medians of one interleaved run", show_lines=False)
    for column in ("section", "what", "measured", "target", "met"):
        table.add_column(column, justify="right" if column in ("measured", "target") else "left")
    table.add_column("in absolute terms", style="dim")
    for name, rows in results.items():
        for row in rows:
            style = "red" if row.is_met is False else None
            table.add_row(
                name, row.what, _figure(row.value, row.unit), _target(row), _met(row), row.absolute, style=style
            )
        table.add_section()
    console = Console(width=max(Console().width, 150))
    console.print(table)
    for section in sections:
        if section.name in results:
            console.print(f"[bold]{section.name}[/bold] is bounded by: {section.bound}", highlight=False)


def as_json(results: Results) -> str:
    """Return everything as JSON."""
    plain = {name: [asdict(row) | {"is_met": row.is_met} for row in rows] for name, rows in results.items()}
    return json.dumps(plain, indent=1, ensure_ascii=False)


def write(results: Results, sections: Sequence[Section], document: Path = DOCUMENT) -> None:
    """Replace the measured sections' rows of the document's table; those of other sections stay."""
    before, _, rest = document.read_text(encoding="utf-8").partition(BEGIN)
    present, _, after = rest.partition(END)
    lines: list[str] = []
    for section in sections:
        if section.name in results:
            lines += [_line(section.name, row) for row in results[section.name]]
        else:
            lines += [line for line in present.splitlines() if line.startswith(f"| {section.name} |")]
    bounds = "\n".join(f"- **{section.name}** is bounded by: {section.bound}" for section in sections)
    table = "\n".join([_HEAD, *lines])
    document.write_text(f"{before}{BEGIN}\n{table}\n\n{bounds}\n{END}{after}", encoding="utf-8")


def _line(section: str, row: Row) -> str:
    cells = (section, row.what, _figure(row.value, row.unit), _target(row), _met(row), row.absolute)
    return f"| {' | '.join(cells)} |"


def _figure(value: float, unit: str) -> str:
    return f"{value:.2f}x" if unit == "x" else f"{value:.1f} {unit}"


def _target(row: Row) -> str:
    return "" if row.target is None else f"≤ {row.target:g}{'x' if row.unit == 'x' else ' ' + row.unit}"


def _met(row: Row) -> str:
    return {None: "", True: "yes", False: "NO"}[row.is_met]
