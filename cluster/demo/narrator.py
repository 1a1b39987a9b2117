"""Tells the demo's story: short sentences, a progress bar that may go back, and the tables."""

from __future__ import annotations

import textwrap
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.table import Table

_LINES_PER_RUN = 4


class Narrator:
    """Writes to a console; where that is no terminal, progress becomes an occasional line.

    Args:
        console: Where to.
        steps: The step at which a run ends.
    """

    def __init__(self, console: Console, steps: int) -> None:
        self._console = console
        self._steps = steps
        self._bar: tuple[Progress, TaskID] | None = None
        self._told = 0

    def heading(self, text: str) -> None:
        """Begin a part."""
        self._console.print(f"\n[bold]{escape(text)}[/bold]")

    def say(self, text: str, *, style: str = "") -> None:
        """Say what happens."""
        lines = textwrap.fill(text, self._console.width - 2, initial_indent="  ", subsequent_indent="  ")
        self._console.print(lines, style=style, markup=False, highlight=False)

    @contextmanager
    def run(self, label: str) -> Generator[None]:
        """Show the progress of a run; :meth:`step` moves it."""
        self._told = 0
        if not self._console.is_terminal:
            yield
            return
        columns = (TextColumn("  {task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("steps"))
        with Progress(*columns, console=self._console) as progress:
            self._bar = progress, progress.add_task(label, total=self._steps)
            try:
                yield
            finally:
                self._bar = None

    def step(self, step: int) -> None:
        """Training stands at this step, which may be an earlier one than before."""
        if self._bar is not None:
            progress, task = self._bar
            progress.update(task, completed=step)
            return
        quarter = max(1, self._steps // _LINES_PER_RUN)
        if step // quarter > self._told // quarter:
            self.say(f"step {step} of {self._steps}", style="dim")
        self._told = step

    def names(self, names: Mapping[str, Sequence[str]]) -> None:
        """Show the blob names of all workspaces; names that the same workspaces have are one row."""
        owners: dict[str, list[str]] = {}
        for workspace, own in names.items():
            for name in own:
                owners.setdefault(name, []).append(workspace)
        groups: dict[tuple[str, ...], list[str]] = {}
        for name, having in owners.items():
            groups.setdefault(tuple(having), []).append(name)
        table = Table(show_edge=False, pad_edge=False)
        table.add_column("workspaces", no_wrap=True)
        table.add_column("blobs", justify="right", no_wrap=True)
        table.add_column("names")
        for workspaces, shared in sorted(groups.items(), key=lambda group: -len(group[0])):
            table.add_row(", ".join(workspaces), str(len(shared)), escape(", ".join(shared)))
        self._console.print(Padding(table, (0, 0, 0, 2)))

    def comparison(self, rows: Sequence[tuple[str, str, str, str]]) -> None:
        """Show the final table: what, in the quiet run, in the interrupted run, and whether they are equal."""
        table = Table(show_edge=False, pad_edge=False)
        for title in ("", "quiet run", "interrupted run", "identical"):
            table.add_column(title, no_wrap=True)
        for row in rows:
            style = "bold red" if row[-1] == "NO" else ""
            table.add_row(*(escape(cell) for cell in row), style=style)
        self._console.print(Padding(table, (0, 0, 0, 2)))
