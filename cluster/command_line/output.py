"""Where text leaves: stdout as lines, tables or one JSON document; and how numbers are written for people."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from typing import Any, Literal, cast

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from rich.text import Text

_PIPE_WIDTH = 10_000
_NAME_COLUMNS = ("workspace", "blob", "cluster", "shape")


class ReaderGoneError(Exception):
    """Nobody reads stdout any more. Not BrokenPipeError, which click and rich both end with code 1."""


def print_table(
    columns: Sequence[tuple[str, Literal["left", "right"]]],
    rows: Sequence[Sequence[str]],
    *,
    total: Sequence[str] | None = None,
) -> None:
    """Print rows under bold heads; ``total`` becomes the last row."""
    table = Table(
        box=SIMPLE, pad_edge=False, show_edge=False, header_style="bold", footer_style="bold", show_footer=bool(total)
    )
    for number, (name, justify) in enumerate(columns):
        footer = Text(total[number]) if total else ""
        # Names may be long and are folded; the rest is short and stays in one piece.
        is_name = name in _NAME_COLUMNS
        table.add_column(name, footer=footer, justify=justify, overflow="fold", no_wrap=not is_name)
    for row in rows:
        # Text, not str: a blob may be called "[bold]".
        table.add_row(*map(Text, row))
    _print(table)


def print_facts(facts: Mapping[str, str]) -> None:
    """Print a label and a text on each line."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column(overflow="fold")
    for label, text in facts.items():
        grid.add_row(Text(label.replace("_", " ")), Text(text))
    _print(grid)


def _print(table: Table) -> None:
    # What goes to a file or a pipe is not cut at a terminal's width.
    console = Console() if sys.stdout.isatty() or "COLUMNS" in os.environ else Console(width=_PIPE_WIDTH)
    with console.capture() as captured:
        console.print(table)
    say("\n".join(line.rstrip() for line in captured.get().splitlines()))


def print_json(document: object) -> None:
    """Print one JSON document."""
    say(json.dumps(_jsonable(document), indent=2, allow_nan=False, ensure_ascii=False))


def say(text: str) -> None:
    """Print a line.

    Raises:
        ReaderGoneError: Nobody reads any more.
    """
    try:
        sys.stdout.write(f"{text}\n")
        sys.stdout.flush()
    except BrokenPipeError:
        raise ReaderGoneError from None


def _jsonable(value: object) -> Any:
    """Return what JSON can hold: numbers that are not finite and bytes as text, every key a text."""
    if isinstance(value, Mapping):
        return {str(key): _jsonable(entry) for key, entry in cast("Mapping[object, object]", value).items()}
    if isinstance(value, (list, tuple)):
        return [_jsonable(entry) for entry in cast("Sequence[object]", value)]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, bytes):
        return value.decode("utf-8", "backslashreplace")
    return str(value)


def value_texts(facts: Mapping[str, Any]) -> dict[str, str]:
    """Return the facts of a value as texts."""
    texts = {label: value_text(fact) for label, fact in facts.items()}
    if "shape" in facts:
        texts |= {"shape": shape_text(facts["shape"]), "tensor_bytes": bytes_text(facts["tensor_bytes"])}
    return texts


def value_text(value: object) -> str:
    """Return a plain value in few characters."""
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, bytes):
        return repr(value)
    if isinstance(value, (list, tuple)):
        entries = cast("Sequence[object]", value)
        return "  ".join(map(value_text, entries)) if entries else "(none)"
    return str(value)


def shape_text(shape: Sequence[int]) -> str:
    """Return a shape as Python writes it."""
    return str(tuple(shape))


def bytes_text(count: int) -> str:
    """Return a byte count in binary units."""
    if count < 1024:
        return f"{count} B"
    power = min((count.bit_length() - 1) // 10, 4)
    return f"{count / 1024**power:.1f} {'KMGT'[power - 1]}iB"


def seconds_text(duration_s: float) -> str:
    """Return a duration in milliseconds or seconds."""
    return f"{duration_s * 1000:.0f} ms" if duration_s < 1 else f"{duration_s:.1f} s"


def count_text(number: int, noun: str) -> str:
    """Return ``1 blob``, ``2 blobs``."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def utc_text(unix_ns: int) -> str:
    """Return a moment in ISO 8601, for machines."""
    return datetime.fromtimestamp(unix_ns / 1e9, timezone.utc).isoformat(timespec="seconds")


def local_time_text(unix_ns: int) -> str:
    """Return a moment by this machine's clock, for people."""
    return datetime.fromtimestamp(unix_ns / 1e9, timezone.utc).astimezone().strftime("%Y-%m-%d %H:%M:%S")
