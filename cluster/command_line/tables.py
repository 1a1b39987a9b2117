"""Plain values as tables for people."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

from ..checkpoint import CheckpointSummary, VerifyReport
from ..messages import RestoreReport
from .output import bytes_text, count_text, local_time_text, print_json, print_table, say, seconds_text, shape_text


def show_clusters(clusters: Sequence[dict[str, Any]], *, as_json: bool) -> None:
    """Show clusters with their workspaces."""
    if as_json:
        print_json({"clusters": clusters})
        return
    for number, cluster in enumerate(clusters):
        if number:
            say("")
        step = cluster["last_committed_step"]
        workspaces: list[dict[str, Any]] = cluster["workspaces"]
        alive = sum(fact["state"] == "alive" for fact in workspaces)
        say(
            f"Cluster {cluster['name']!r}, generation {cluster['generation']}: {alive} of "
            f"{count_text(len(workspaces), 'workspace')} alive, "
            + ("nothing committed yet" if step is None else f"last committed step {step}")
        )
        if cluster["checkpoint_root"] is not None:
            say(f"Checkpoints in {cluster['checkpoint_root']}")
        _show_members(workspaces)


def _show_members(workspaces: Sequence[dict[str, Any]]) -> None:
    def used(fact: dict[str, Any]) -> str:
        if fact["used_bytes"] is None:
            return "-"
        limit = "" if fact["limit_bytes"] is None else f" / {bytes_text(fact['limit_bytes'])}"
        return f"{bytes_text(fact['used_bytes'])}{limit}"

    rows = [
        (
            fact["name"],
            fact["state"],
            fact["device"] or "-",
            fact["node_id"][:8] or "-",
            str(fact["pid"] or "-"),
            "-" if fact["blob_count"] is None else str(fact["blob_count"]),
            "-" if fact["tensor_bytes"] is None else bytes_text(fact["tensor_bytes"]),
            used(fact),
        )
        for fact in workspaces
    ]
    counted = [fact for fact in workspaces if fact["blob_count"] is not None]
    sums = [sum(fact[key] for fact in counted) for key in ("blob_count", "tensor_bytes", "used_bytes")]
    print_table(
        [
            ("workspace", "left"),
            ("state", "left"),
            ("device", "left"),
            ("node", "left"),
            ("pid", "right"),
            ("blobs", "right"),
            ("bytes", "right"),
            ("memory", "right"),
        ],
        rows,
        total=("total", "", "", "", "", str(sums[0]), bytes_text(sums[1]), bytes_text(sums[2]))
        if len(rows) > 1
        else None,
    )
    for fact in workspaces:
        if fact["reason"]:
            say(f"{fact['name']} is {fact['state']}: {fact['reason']}")


def show_blobs(blobs: Sequence[dict[str, Any]]) -> None:
    """Show blobs, live or stored, and their total."""
    rows = [
        (
            fact["workspace"],
            fact["name"],
            fact["type"],
            "-" if fact["shape"] is None else shape_text(fact["shape"]),
            bytes_text(fact["tensor_bytes"]),
            str(fact["version"]),
        )
        for fact in blobs
    ]
    print_table(
        [
            ("workspace", "left"),
            ("blob", "left"),
            ("type", "left"),
            ("shape", "left"),
            ("bytes", "right"),
            ("version", "right"),
        ],
        rows,
        total=(
            "total",
            count_text(len(blobs), "blob"),
            "",
            "",
            bytes_text(sum(fact["tensor_bytes"] for fact in blobs)),
            "",
        ),
    )


def show_summaries(root: str, summaries: Sequence[CheckpointSummary]) -> None:
    """Show the checkpoints of a folder, the unreadable ones with their problem."""
    if not summaries:
        say(f"There is no checkpoint in {root}.")
        return
    rows = [
        (
            str(summary.step),
            local_time_text(summary.created_unix_ns),
            summary.cluster,
            str(summary.workspace_count),
            str(summary.blob_count),
            bytes_text(summary.byte_count),
            "",
        )
        if summary.is_readable
        else (str(summary.step), "-", "-", "-", "-", "-", "unreadable")
        for summary in summaries
    ]
    is_whole = all(summary.is_readable for summary in summaries)
    columns: list[tuple[str, Literal["left", "right"]]] = [
        ("step", "right"),
        ("time", "left"),
        ("cluster", "left"),
        ("workspaces", "right"),
        ("blobs", "right"),
        ("bytes", "right"),
        ("problem", "left"),
    ]
    shown = columns[:-1] if is_whole else columns
    print_table(shown, [row[: len(shown)] for row in rows])
    for summary in summaries:
        if summary.problem is not None:
            say(f"step {summary.step}: {summary.problem}")


def show_verification(report: VerifyReport, *, took_s: float) -> None:
    """Show a verification's findings."""
    checked = (
        f"{count_text(report.blob_count, 'blob')}, {bytes_text(report.checked_bytes)} checked in {seconds_text(took_s)}"
    )
    if report.is_sound:
        say(f"Step {report.step} is sound: {checked}.")
        return
    say(f"Step {report.step} is damaged: {count_text(len(report.damages), 'finding')}; {checked}.")
    for damage in report.damages:
        place = f"{damage.file} at {damage.offset}"
        if damage.workspace is not None:
            place += f", workspace {damage.workspace}" + (f":{damage.scope}" if damage.scope else "")
        if damage.blob is not None:
            place += f", blob {damage.blob}"
        say(f"  - {place}: {damage.problem}")


def show_return(cluster: str, report: RestoreReport) -> None:
    """Say where a restore or a recovery has taken a cluster."""
    say(
        f"Cluster {cluster!r} is back at step {report.step} from {report.root}: "
        f"{count_text(report.workspace_count, 'workspace')}, {bytes_text(report.tensor_bytes)} in "
        f"{seconds_text(report.total_s)}."
    )


@contextmanager
def verify_progress(label: str) -> Generator[Callable[[int, int], None]]:
    """Show a bar on stderr while the block runs, if that is a terminal."""
    console = Console(stderr=True)
    columns = (TextColumn("verifying {task.description}"), BarColumn(), DownloadColumn(binary_units=True))
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(label, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
