"""The script ``blobspace``: clusters and checkpoints from a terminal, or from another script with ``--json``.

A command gathers plain values, then shows them as a table or prints them as one JSON document. Errors go to
stderr as text; with ``--json`` to stdout as ``{"error": {"kind", "message", "fields"}}``.

=========  ==================================================================
Exit code  Meaning
=========  ==================================================================
0          done
1          internal error: our bug
2          usage, or invalid input
3          not found: file, cluster, workspace, blob, checkpoint, or no Ray
4          conflict: it exists already, or the cluster is busy
5          corrupt checkpoint
6          storage: no space, no permission, not shared
7          deadline passed
8          workspace lost
9          memory limit passed
=========  ==================================================================

An interrupt ends with 130, a closed pipe with 141, as shells have it. Commands that only read a checkpoint
(``ls``, ``verify``, ``show --root``) load no Ray. The others connect to a running Ray and never start one.
"""

from __future__ import annotations

import fnmatch
import json
import logging
import math
import os
import sys
import time
import traceback
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import numpy as np
import typer
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from .. import __version__
from ..ops.errors import BlobspaceError, DeadlineError, InternalError, InvalidInputError, NotFoundError
from .checkpoint import (
    BlobEntry,
    CheckpointSummary,
    LocalStore,
    Manifest,
    VerifyReport,
    list_checkpoints,
    read_index,
    read_manifest,
)
from .checkpoint import verify as verify_checkpoint

if TYPE_CHECKING:
    from types import ModuleType

    from ..workspace_actors.workspace import BlobSpec
    from .client import Cluster
    from .messages import ClusterView, MemberView

EXIT_CODES: Mapping[str, int] = {
    "internal": 1,
    "invalid_input": 2,
    "not_found": 3,
    "conflict": 4,
    "corrupt_checkpoint": 5,
    "storage": 6,
    "deadline": 7,
    "workspace_lost": 8,
    "memory_limit": 9,
}
_INTERRUPTED, _PIPE_CLOSED = 130, 141
_EPILOG = (
    "Exit codes: 0 done, 1 internal error, 2 usage or invalid input, 3 not found, 4 conflict, 5 corrupt checkpoint, "
    "6 storage, 7 deadline passed, 8 workspace lost, 9 memory limit passed."
)
_ANSWER_S = 10.0
_GONE_S = 30.0
_FIRST_VALUES = 8
_PIPE_WIDTH = 10_000
_NAME_COLUMNS = ("workspace", "blob", "cluster", "shape")
# Every error of usage, whichever copy of click this typer brings along.
_USAGE_ERROR = cast("type[Exception]", typer.BadParameter.__base__)

_AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout, and nothing else there.")]
_ClusterName = Annotated[str, typer.Option("--cluster", metavar="NAME", help="The cluster.")]
_Root = Annotated[str, typer.Argument(metavar="ROOT", help="Folder of the checkpoints.", show_default=False)]
_ClusterRoot = Annotated[
    str | None,
    typer.Option("--root", metavar="ROOT", help="Folder of the checkpoints; the cluster's own if left out."),
]
_Step = Annotated[int | None, typer.Option("--step", metavar="N", help="The step; the newest if left out.")]
_Deadline = Annotated[
    float | None, typer.Option("--deadline", metavar="S", help="Seconds it may take; the configured time if left out.")
]

_app = typer.Typer(
    name="blobspace",
    help="Workspaces of named blobs on a Ray cluster, and their checkpoints.",
    epilog=_EPILOG,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit with its code.

    Args:
        arguments: Words after the program's name; None means the process's own.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    sys.exit(_run(words))


class _ReaderGoneError(Exception):
    """Nobody reads stdout any more. Not BrokenPipeError, which click and rich both end with code 1."""


def _run(words: Sequence[str]) -> int:
    as_json = "--json" in words
    try:
        result = _app(args=list(words), prog_name="blobspace", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except typer.Exit as stop:
        return stop.exit_code
    except (KeyboardInterrupt, typer.Abort):
        sys.stderr.write("interrupted\n")
        return _INTERRUPTED
    except _ReaderGoneError:
        # Whoever reads has seen enough. Python would complain again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _PIPE_CLOSED
    except Exception as error:  # noqa: BLE001  (the shell's last resort: an error becomes a text and an exit code)
        return _report(_as_blobspace_error(error), as_json=as_json)


def _as_blobspace_error(error: Exception) -> BlobspaceError:
    if isinstance(error, BlobspaceError):
        return error
    if isinstance(error, _USAGE_ERROR):
        context: Any = getattr(error, "ctx", None)
        path = "blobspace" if context is None else context.command_path
        message = cast("Any", error).format_message().rstrip(".")
        return InvalidInputError(f"{message}. See '{path} --help'.")
    ray = sys.modules.get("ray")
    if ray is not None and isinstance(error, ray.exceptions.RayError):
        from ..workspace_actors.ray_errors import unwrapped  # noqa: PLC0415  (loads Ray, which is loaded)

        return unwrapped(error, "the cluster")
    place = traceback.extract_tb(error.__traceback__)[-1]
    return InternalError(
        f"{type(error).__name__}: {error} (at {place.filename}:{place.lineno}). This is a bug of blobspace; please "
        f"report it with this text.",
        type=type(error).__name__,
    )


def _report(error: BlobspaceError, *, as_json: bool) -> int:
    if as_json:
        _print_json({"error": {"kind": error.kind, "message": str(error), "fields": error.fields}})
    else:
        sys.stderr.write(f"error: {error}\n")
    return EXIT_CODES.get(error.kind, EXIT_CODES["internal"])


# --- the commands ----------------------------------------------------------------------------------------------


def _print_version(is_wanted: bool) -> None:
    if is_wanted:
        _say(f"blobspace {__version__}")
        raise typer.Exit


@_app.callback(invoke_without_command=True)
def _start(
    context: typer.Context,
    is_version_wanted: Annotated[  # noqa: ARG001  (its callback does the work)
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and end.")
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        _say(context.get_help())
        raise typer.Exit(EXIT_CODES["invalid_input"])


@_app.command(epilog=_EPILOG)
def up(
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="YAML file, such as configs/local.yaml.")],
    as_json: _AsJson = False,
) -> None:
    """Start a cluster that outlives this command.

    It ends when all workspaces run. Ray must be running already ('ray start --head').
    """
    from .config import load_config  # noqa: PLC0415  (pydantic and YAML, for this command alone)

    checked = load_config(config)
    client = _connected_client()
    names = checked.workspace_names()
    with Console(stderr=True).status(f"placing {len(names)} workspaces …"):
        cluster: Cluster = client.Cluster.launch(checked, detached=True)
    _show_clusters([_cluster_facts(cluster.view())], as_json=as_json)


@_app.command(epilog=_EPILOG)
def down(cluster: _ClusterName = "default", as_json: _AsJson = False) -> None:
    """End a cluster; its checkpoints stay."""
    client = _connected_client()
    running: Cluster = client.Cluster.attach(cluster)
    names = list(running.workspaces)
    running.shut_down()
    # Ray ends actors in the background; until then an 'up' of the same name would be refused.
    ends = time.monotonic() + _GONE_S
    while cluster in client.clusters():
        if time.monotonic() > ends:
            raise DeadlineError(
                f"Ray has not ended the coordinator of cluster {cluster!r} within {_GONE_S:g} s.", cluster=cluster
            )
        time.sleep(0.02)
    if as_json:
        _print_json({"cluster": cluster, "workspaces": names})
    else:
        _say(f"Cluster {cluster!r} with {_count(len(names), 'workspace')} is gone.")


@_app.command(epilog=_EPILOG)
def status(
    cluster: Annotated[
        str | None, typer.Option("--cluster", metavar="NAME", help="The cluster; all of them if left out.")
    ] = None,
    as_json: _AsJson = False,
) -> None:
    """Show where workspaces run and what they hold."""
    client = _connected_client()
    names: list[str] = [cluster] if cluster is not None else client.clusters()
    if not names:
        raise NotFoundError("There is no cluster on this Ray. Make one with 'blobspace up CONFIG'.")
    _show_clusters([_cluster_facts(client.Cluster.attach(name).view()) for name in names], as_json=as_json)


@_app.command(epilog=_EPILOG)
def blobs(
    cluster: _ClusterName = "default",
    match: Annotated[str, typer.Option("--match", metavar="PATTERN", help="Blobs, as in a shell: '*_grad'.")] = "*",
    workspace: Annotated[
        str, typer.Option("--workspace", metavar="PATTERN", help="Workspaces; a child is parent:path.")
    ] = "*",
    names: Annotated[bool, typer.Option("--names", help="Only names: workspace, tab, blob.")] = False,
    as_json: _AsJson = False,
) -> None:
    """List the blobs of all workspaces."""
    attached = _attach(cluster)
    if names:
        found = {
            owner: [name for name in own if fnmatch.fnmatchcase(name, match)]
            for owner, own in attached.blob_names().items()
            if fnmatch.fnmatchcase(owner, workspace)
        }
        if as_json:
            _print_json({"cluster": cluster, "names": found})
        else:
            for owner, own in found.items():
                for name in own:
                    _say(f"{owner}\t{name}")
        return
    specs = [_spec_facts(spec) for spec in attached.blobs(match, workspace=workspace)]
    if as_json:
        _print_json({"cluster": cluster, "blobs": specs, "tensor_bytes": sum(spec["tensor_bytes"] for spec in specs)})
    else:
        _show_blobs(specs)


@_app.command(epilog=_EPILOG)
def show(
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="[WORKSPACE] NAME", help="A blob, in one workspace or in all that have it."),
    ] = None,
    cluster: _ClusterName = "default",
    root: Annotated[
        str | None, typer.Option("--root", metavar="ROOT", help="Show a checkpoint in this folder instead.")
    ] = None,
    step: _Step = None,
    as_json: _AsJson = False,
) -> None:
    """Show a blob's values, or a checkpoint's content.

    A blob is shown as it is now, also while a net runs.

    With --root, NAME and WORKSPACE are patterns and may be left out. Only the manifest and the indexes are read.
    """
    words = names or []
    if len(words) > 2:
        raise InvalidInputError(f"Expected [WORKSPACE] NAME, found {len(words)} words. See 'blobspace show --help'.")
    if root is not None:
        _show_checkpoint(root, step, words, as_json=as_json)
        return
    if step is not None:
        raise InvalidInputError("--step is for a checkpoint; say where it is with --root ROOT.")
    if not words:
        raise InvalidInputError("Say which blob: blobspace show [WORKSPACE] NAME; or which checkpoint: --root ROOT.")
    _show_live(_attach(cluster), words, as_json=as_json)


@_app.command(epilog=_EPILOG)
def checkpoint(
    step: Annotated[int, typer.Option("--step", metavar="N", help="The step; it names the checkpoint.")],
    cluster: _ClusterName = "default",
    root: _ClusterRoot = None,
    replace: Annotated[bool, typer.Option("--replace", help="Replace a checkpoint of that step.")] = False,
    metadata: Annotated[
        list[str] | None,
        typer.Option("--metadata", metavar="KEY=VALUE", help="Kept with it; JSON if it is, else text. Repeatable."),
    ] = None,
    deadline: _Deadline = None,
    as_json: _AsJson = False,
) -> None:
    """Save every workspace in one atomic commit."""
    plain = _metadata(metadata or [])
    attached = _attach(cluster)
    with Console(stderr=True).status(f"saving step {step} …"):
        report = attached.checkpoint(step, root=root, metadata=plain, replace=replace, deadline_s=deadline)
    if as_json:
        _print_json(asdict(report))
        return
    _say(
        f"Step {report.step} is committed in {report.root}: {_count(report.workspace_count, 'workspace')}, "
        f"{_count(report.blob_count, 'blob')}, {_bytes(report.tensor_bytes)}."
    )
    _say(
        f"Compute stood still for {_seconds(report.stall_s)}; writing took {_seconds(report.write_s)}, all together "
        f"{_seconds(report.total_s)}."
    )


@_app.command(epilog=_EPILOG)
def restore(
    cluster: _ClusterName = "default",
    step: _Step = None,
    root: _ClusterRoot = None,
    deadline: _Deadline = None,
    as_json: _AsJson = False,
) -> None:
    """Take every workspace back to a checkpoint.

    All of it is read and verified first; if anything is wrong, nothing changes.
    """
    attached = _attach(cluster)
    with Console(stderr=True).status("restoring …"):
        report = attached.restore(step, root=root, deadline_s=deadline)
    if as_json:
        _print_json(asdict(report))
        return
    _say(
        f"Cluster {cluster!r} is back at step {report.step} from {report.root}: "
        f"{_count(report.workspace_count, 'workspace')}, {_bytes(report.tensor_bytes)} in {_seconds(report.total_s)}."
    )


@_app.command(epilog=_EPILOG)
def ls(root: _Root, as_json: _AsJson = False) -> None:
    """List the checkpoints in a folder."""
    summaries = list_checkpoints(_store(root))
    if as_json:
        _print_json({"root": root, "checkpoints": [_summary_facts(summary) for summary in summaries]})
    else:
        _show_summaries(root, summaries)


@_app.command(epilog=_EPILOG)
def verify(root: _Root, step: _Step = None, as_json: _AsJson = False) -> None:
    """Check every byte of a checkpoint.

    Lists all damage; exit code 5 if there is any.
    """
    store = _store(root)
    manifest = read_manifest(store, step)
    began = time.monotonic()
    with _progress(f"step {manifest.step}") as advance:
        report = verify_checkpoint(store, manifest, advance)
    if as_json:
        _print_json({"root": root, **asdict(report), "is_sound": report.is_sound})
    else:
        _show_verification(report, took_s=time.monotonic() - began)
    if not report.is_sound:
        raise typer.Exit(EXIT_CODES["corrupt_checkpoint"])


@_app.command(epilog=_EPILOG)
def demo(
    quick: Annotated[bool, typer.Option("--quick", help="Fewer steps; the same kills.")] = False,
    keep: Annotated[
        str | None, typer.Option("--keep", metavar="FOLDER", help="Keep the checkpoints in this new folder.")
    ] = None,
    as_json: _AsJson = False,
) -> None:
    """Train, kill, recover, and compare the bits.

    Starts a local Ray of its own. Exit code 0 means that the interrupted training ended with the same bits.
    """
    from . import demo as demonstration  # noqa: PLC0415  (for this command alone)

    raise typer.Exit(demonstration.main(as_json=as_json, quick=quick, keep=keep))


# --- live clusters ---------------------------------------------------------------------------------------------


def _connected_client() -> ModuleType:
    """Load Ray, connect to one that runs, and return the module that needs it."""
    from . import client  # noqa: PLC0415  (loads Ray, which the commands that only read do without)

    with _silent_stderr():
        client.connect(may_start=False, log_level=logging.ERROR)
    return client


@contextmanager
def _silent_stderr() -> Generator[None]:
    """Drop what native code writes: Ray repeats each failed try there, and the error that follows says it once."""
    sys.stderr.flush()
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _attach(name: str) -> Cluster:
    return _connected_client().Cluster.attach(name)


def _cluster_facts(view: ClusterView) -> dict[str, Any]:
    return {
        "name": view.name,
        "generation": view.generation,
        "code_version": view.code_version,
        "checkpoint_root": view.checkpoint_root,
        "last_committed_step": view.last_committed_step,
        "workspaces": _member_facts(view.members),
    }


def _member_facts(members: Sequence[MemberView]) -> list[dict[str, Any]]:
    """Ask every living workspace at once; one that is gone or silent does not hide the others."""
    import ray  # noqa: PLC0415  (loaded by now)
    from ray.exceptions import GetTimeoutError, RayActorError  # noqa: PLC0415

    asked = {
        member.name: [member.actor.specs.remote(), member.actor.memory.remote()]
        for member in members
        if member.is_alive
    }
    ends = time.monotonic() + _ANSWER_S
    facts: list[dict[str, Any]] = []
    for member in members:
        fact: dict[str, Any] = {
            "name": member.name,
            "rank": member.rank,
            "node_id": member.node_id,
            "pid": member.pid,
            "device": member.device_type,
            "state": "alive" if member.is_alive else "lost",
            "reason": member.lost_because,
            "blob_count": None,
            "tensor_bytes": None,
            "used_bytes": None,
            "limit_bytes": None,
        }
        facts.append(fact)
        if not member.is_alive:
            continue
        try:
            specs, memory = ray.get(asked[member.name], timeout=max(0.0, ends - time.monotonic()))
        except RayActorError as error:
            fact |= {"state": "lost", "reason": str(error).strip().partition("\n")[0]}
        except GetTimeoutError:
            fact |= {"state": "silent", "reason": f"It did not answer within {_ANSWER_S:g} s."}
        else:
            fact |= {
                "blob_count": len(specs),
                "tensor_bytes": sum(spec.nbytes for spec in specs),
                "used_bytes": memory.used_bytes,
                "limit_bytes": memory.limit_bytes,
            }
    return facts


def _show_live(cluster: Cluster, words: Sequence[str], *, as_json: bool) -> None:
    name = words[-1]
    owners = words[:-1] or [owner for owner, own in cluster.blob_names().items() if name in own]
    if not owners:
        raise NotFoundError(f"No workspace of cluster {cluster.name!r} has a blob {name!r}.", blob=name)
    values = [{"workspace": owner, "name": name, **_value_facts(cluster, owner, name)} for owner in owners]
    if as_json:
        _print_json({"cluster": cluster.name, "blobs": values})
        return
    for number, value in enumerate(values):
        if number:
            _say("")
        _print_facts(_value_texts(value))


def _value_facts(cluster: Cluster, owner: str, name: str) -> dict[str, Any]:
    value = cluster.workspaces[owner].peek_blob(name)
    if not isinstance(value, np.ndarray):
        return {"type": "value", "value": value}
    array = cast("np.ndarray[Any, Any]", value)
    facts: dict[str, Any] = {
        "type": "strings" if array.dtype == object else array.dtype.name,
        "shape": list(array.shape),
        "tensor_bytes": 0 if array.dtype == object else int(array.nbytes),
    }
    first = array.reshape(-1)[:_FIRST_VALUES]
    if array.dtype == object:
        return facts | {"first": first.tolist()}
    return facts | _statistics(array) | {"first": _plain_numbers(first)}


def _value_texts(facts: Mapping[str, Any]) -> dict[str, str]:
    texts = {label: _value_text(fact) for label, fact in facts.items()}
    if "shape" in facts:
        texts |= {"shape": _shape(facts["shape"]), "tensor_bytes": _bytes(facts["tensor_bytes"])}
    return texts


def _statistics(array: np.ndarray[Any, Any]) -> dict[str, Any]:
    """Return min, max and mean of the finite elements, and how many are not finite."""
    if array.size == 0 or array.dtype.kind == "c":
        return {}
    # bfloat16 and float8 (kind V) have no ufuncs for all of it; integers keep their exact bounds.
    numbers = array if array.dtype.kind in "biuf" else array.astype(np.float64)
    is_finite = np.isfinite(numbers)
    not_finite = int(array.size - np.count_nonzero(is_finite))
    finite = numbers[is_finite] if not_finite else numbers
    facts: dict[str, Any] = {}
    if finite.size:
        facts = {
            "min": finite.min().item(),
            "max": finite.max().item(),
            "mean": finite.mean(dtype=np.float64).item(),
        }
    if not_finite:
        facts["not_finite"] = not_finite
    return facts


def _plain_numbers(array: np.ndarray[Any, Any]) -> list[Any]:
    return (array if array.dtype.kind in "biufc" else array.astype(np.float64)).tolist()


def _metadata(words: Iterable[str]) -> dict[str, Any]:
    plain: dict[str, Any] = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not equals or not key:
            raise InvalidInputError(f"--metadata expects KEY=VALUE, found {word!r}.")
        try:
            plain[key] = json.loads(text)
        except ValueError:
            plain[key] = text
    return plain


# --- stored checkpoints ----------------------------------------------------------------------------------------


def _store(root: str) -> LocalStore:
    try:
        is_folder = Path(root).is_dir()
    except OSError:
        is_folder = True  # no permission to look; the store says so
    if not is_folder:
        raise NotFoundError(f"There is no folder {root!r}.", root=root)
    return LocalStore(root)


def _show_checkpoint(root: str, step: int | None, words: Sequence[str], *, as_json: bool) -> None:
    store = _store(root)
    manifest = read_manifest(store, step)
    workspace, name = (["*", "*"] + (["*", *words] if len(words) == 1 else list(words)))[-2:]
    blobs = [
        fact
        for entry in manifest.workspaces
        for fact in (_entry_facts(entry.name, blob) for blob in read_index(store, manifest, entry.name).blobs)
        if fnmatch.fnmatchcase(fact["workspace"], workspace) and fnmatch.fnmatchcase(fact["name"], name)
    ]
    facts = _manifest_facts(root, manifest)
    if as_json:
        _print_json(facts | {"blobs": blobs})
        return
    shown = {label: _value_text(fact) for label, fact in facts.items() if not isinstance(fact, (list, dict))}
    _print_facts(shown | {f"metadata {key}": _value_text(value) for key, value in manifest.metadata.items()})
    _say("")
    _show_table(
        [("workspace", "left"), ("node", "left"), ("blobs", "right"), ("bytes", "right")],
        [
            (entry.name, entry.node[:12], str(entry.blob_count), _bytes(entry.tensor_bytes))
            for entry in manifest.workspaces
        ],
    )
    _say("")
    _show_blobs(blobs)


def _manifest_facts(root: str, manifest: Manifest) -> dict[str, Any]:
    return {
        "root": root,
        "step": manifest.step,
        "created": _utc(manifest.created_unix_ns),
        "cluster": manifest.cluster,
        "generation": manifest.generation,
        "save_id": manifest.save_id,
        "blobspace_version": manifest.blobspace_version,
        "metadata": manifest.metadata,
        "workspaces": [
            {
                "name": entry.name,
                "node_id": entry.node,
                "index": entry.index_path,
                "blob_count": entry.blob_count,
                "tensor_bytes": entry.tensor_bytes,
            }
            for entry in manifest.workspaces
        ],
        "packs": [{"path": pack.path, "byte_count": pack.byte_count} for pack in manifest.packs],
    }


def _entry_facts(workspace: str, entry: BlobEntry) -> dict[str, Any]:
    return {
        "workspace": f"{workspace}:{entry.scope}" if entry.scope else workspace,
        "name": entry.name,
        "type": entry.dtype or entry.kind.value,
        "shape": None if entry.dtype is None and entry.kind.value != "strings" else list(entry.shape),
        "tensor_bytes": entry.byte_count,
        "version": entry.version,
    }


def _spec_facts(spec: BlobSpec) -> dict[str, Any]:
    return {
        "workspace": spec.workspace,
        "name": spec.name,
        "type": spec.dtype or spec.kind.value,
        "shape": None if spec.shape is None else list(spec.shape),
        "tensor_bytes": spec.nbytes,
        "version": spec.version,
    }


def _summary_facts(summary: CheckpointSummary) -> dict[str, Any]:
    return asdict(summary) | {"created": _utc(summary.created_unix_ns) if summary.is_readable else None}


# --- tables and JSON -------------------------------------------------------------------------------------------


def _show_clusters(clusters: Sequence[dict[str, Any]], *, as_json: bool) -> None:
    if as_json:
        _print_json({"clusters": clusters})
        return
    for number, cluster in enumerate(clusters):
        if number:
            _say("")
        step = cluster["last_committed_step"]
        workspaces: list[dict[str, Any]] = cluster["workspaces"]
        alive = sum(fact["state"] == "alive" for fact in workspaces)
        _say(
            f"Cluster {cluster['name']!r}, generation {cluster['generation']}: {alive} of "
            f"{_count(len(workspaces), 'workspace')} alive, "
            + ("nothing committed yet" if step is None else f"last committed step {step}")
        )
        if cluster["checkpoint_root"] is not None:
            _say(f"Checkpoints in {cluster['checkpoint_root']}")
        _show_members(workspaces)


def _show_members(workspaces: Sequence[dict[str, Any]]) -> None:
    def used(fact: dict[str, Any]) -> str:
        if fact["used_bytes"] is None:
            return "-"
        limit = "" if fact["limit_bytes"] is None else f" / {_bytes(fact['limit_bytes'])}"
        return f"{_bytes(fact['used_bytes'])}{limit}"

    rows = [
        (
            fact["name"],
            fact["state"],
            fact["device"] or "-",
            fact["node_id"][:8] or "-",
            str(fact["pid"] or "-"),
            "-" if fact["blob_count"] is None else str(fact["blob_count"]),
            "-" if fact["tensor_bytes"] is None else _bytes(fact["tensor_bytes"]),
            used(fact),
        )
        for fact in workspaces
    ]
    counted = [fact for fact in workspaces if fact["blob_count"] is not None]
    sums = [sum(fact[key] for fact in counted) for key in ("blob_count", "tensor_bytes", "used_bytes")]
    _show_table(
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
        total=("total", "", "", "", "", str(sums[0]), _bytes(sums[1]), _bytes(sums[2])) if len(rows) > 1 else None,
    )
    for fact in workspaces:
        if fact["reason"]:
            _say(f"{fact['name']} is {fact['state']}: {fact['reason']}")


def _show_blobs(blobs: Sequence[dict[str, Any]]) -> None:
    rows = [
        (
            fact["workspace"],
            fact["name"],
            fact["type"],
            "-" if fact["shape"] is None else _shape(fact["shape"]),
            _bytes(fact["tensor_bytes"]),
            str(fact["version"]),
        )
        for fact in blobs
    ]
    _show_table(
        [
            ("workspace", "left"),
            ("blob", "left"),
            ("type", "left"),
            ("shape", "left"),
            ("bytes", "right"),
            ("version", "right"),
        ],
        rows,
        total=("total", _count(len(blobs), "blob"), "", "", _bytes(sum(fact["tensor_bytes"] for fact in blobs)), ""),
    )


def _show_summaries(root: str, summaries: Sequence[CheckpointSummary]) -> None:
    if not summaries:
        _say(f"There is no checkpoint in {root}.")
        return
    rows = [
        (
            str(summary.step),
            _local_time(summary.created_unix_ns),
            summary.cluster,
            str(summary.workspace_count),
            str(summary.blob_count),
            _bytes(summary.byte_count),
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
    _show_table(shown, [row[: len(shown)] for row in rows])
    for summary in summaries:
        if summary.problem is not None:
            _say(f"step {summary.step}: {summary.problem}")


def _show_verification(report: VerifyReport, *, took_s: float) -> None:
    checked = f"{_count(report.blob_count, 'blob')}, {_bytes(report.checked_bytes)} checked in {_seconds(took_s)}"
    if report.is_sound:
        _say(f"Step {report.step} is sound: {checked}.")
        return
    _say(f"Step {report.step} is damaged: {_count(len(report.damages), 'finding')}; {checked}.")
    for damage in report.damages:
        place = f"{damage.file} at {damage.offset}"
        if damage.workspace is not None:
            place += f", workspace {damage.workspace}" + (f":{damage.scope}" if damage.scope else "")
        if damage.blob is not None:
            place += f", blob {damage.blob}"
        _say(f"  - {place}: {damage.problem}")


@contextmanager
def _progress(label: str) -> Generator[Callable[[int, int], None]]:
    """Show a bar on stderr while the block runs, if that is a terminal."""
    console = Console(stderr=True)
    columns = (TextColumn("verifying {task.description}"), BarColumn(), DownloadColumn(binary_units=True))
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(label, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _show_table(
    columns: Sequence[tuple[str, Literal["left", "right"]]],
    rows: Sequence[Sequence[str]],
    *,
    total: Sequence[str] | None = None,
) -> None:
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


def _print_facts(facts: Mapping[str, str]) -> None:
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
    _say("\n".join(line.rstrip() for line in captured.get().splitlines()))


def _print_json(document: object) -> None:
    _say(json.dumps(_jsonable(document), indent=2, allow_nan=False, ensure_ascii=False))


def _say(text: str) -> None:
    try:
        sys.stdout.write(f"{text}\n")
        sys.stdout.flush()
    except BrokenPipeError:
        raise _ReaderGoneError from None


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


def _value_text(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, bytes):
        return repr(value)
    if isinstance(value, (list, tuple)):
        entries = cast("Sequence[object]", value)
        return "  ".join(map(_value_text, entries)) if entries else "(none)"
    return str(value)


def _shape(shape: Sequence[int]) -> str:
    return str(tuple(shape))


def _bytes(count: int) -> str:
    if count < 1024:
        return f"{count} B"
    power = min((count.bit_length() - 1) // 10, 4)
    return f"{count / 1024**power:.1f} {'KMGT'[power - 1]}iB"


def _seconds(duration_s: float) -> str:
    return f"{duration_s * 1000:.0f} ms" if duration_s < 1 else f"{duration_s:.1f} s"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _utc(unix_ns: int) -> str:
    return datetime.fromtimestamp(unix_ns / 1e9, timezone.utc).isoformat(timespec="seconds")


def _local_time(unix_ns: int) -> str:
    return datetime.fromtimestamp(unix_ns / 1e9, timezone.utc).astimezone().strftime("%Y-%m-%d %H:%M:%S")


if __name__ == "__main__":
    main()
