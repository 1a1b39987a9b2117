"""The commands: each gathers plain values, then shows them as a table or prints them as one JSON document."""

from __future__ import annotations

import fnmatch
import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from ... import __version__
from ...ops.errors import DeadlineError, InvalidInputError, NotFoundError
from ..checkpoint import list_checkpoints, read_index, read_manifest
from ..checkpoint import verify as verify_checkpoint
from .exit_codes import EXIT_CODES
from .live_facts import attach, cluster_facts, connected_client, spec_facts, value_facts
from .output import (
    bytes_text,
    count_text,
    print_facts,
    print_json,
    print_table,
    say,
    seconds_text,
    value_text,
    value_texts,
)
from .stored_facts import entry_facts, manifest_facts, open_store, summary_facts
from .tables import show_blobs, show_clusters, show_return, show_summaries, show_verification, verify_progress

if TYPE_CHECKING:
    from ..client import Cluster

_EPILOG = (
    "Exit codes: 0 done, 1 internal error, 2 usage or invalid input, 3 not found, 4 conflict, 5 corrupt checkpoint, "
    "6 storage, 7 deadline passed, 8 workspace lost, 9 memory limit passed."
)
_GONE_S = 30.0


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

app = typer.Typer(
    name="blobspace",
    help="Workspaces of named blobs on a Ray cluster, and their checkpoints.",
    epilog=_EPILOG,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _print_version(is_wanted: bool) -> None:
    if is_wanted:
        say(f"blobspace {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _start(
    context: typer.Context,
    is_version_wanted: Annotated[  # noqa: ARG001  (its callback does the work)
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and end.")
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        say(context.get_help())
        raise typer.Exit(EXIT_CODES["invalid_input"])


@app.command(epilog=_EPILOG)
def up(
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="YAML file, such as configs/local.yaml.")],
    as_json: _AsJson = False,
) -> None:
    """Start a cluster that outlives this command.

    It ends when all workspaces run. Ray must be running already ('ray start --head').
    """
    from ..config import load_config  # noqa: PLC0415  (pydantic and YAML, for this command alone)

    checked = load_config(config)
    client = connected_client()
    names = checked.workspace_names()
    with Console(stderr=True).status(f"placing {len(names)} workspaces …"):
        cluster: Cluster = client.Cluster.launch(checked, detached=True)
    show_clusters([cluster_facts(cluster.view())], as_json=as_json)


@app.command(epilog=_EPILOG)
def down(cluster: _ClusterName = "default", as_json: _AsJson = False) -> None:
    """End a cluster; its checkpoints stay.

    Also ends what is left of a cluster whose coordinator is gone, or does not answer.
    """
    client = connected_client()
    try:
        running: Cluster = client.Cluster.attach(cluster)
        names = list(running.workspaces)
        running.shut_down()
        had_coordinator = True
    except (NotFoundError, DeadlineError):
        if not client.has_remains(cluster):
            raise
        names = client.remove_remains(cluster)
        had_coordinator = False
    # Ray ends actors in the background; until then an 'up' of the same name would be refused.
    ends = time.monotonic() + _GONE_S
    while client.has_remains(cluster):
        if time.monotonic() > ends:
            raise DeadlineError(f"Ray has not ended all of cluster {cluster!r} within {_GONE_S:g} s.", cluster=cluster)
        time.sleep(0.02)
    if as_json:
        print_json({"cluster": cluster, "workspaces": names, "had_coordinator": had_coordinator})
    elif had_coordinator:
        say(f"Cluster {cluster!r} with {count_text(len(names), 'workspace')} is gone.")
    else:
        say(
            f"Cluster {cluster!r} had no working coordinator any more. What it left is ended: "
            f"{', '.join(names) or 'no workspace'}."
        )


@app.command(epilog=_EPILOG)
def status(
    cluster: Annotated[
        str | None, typer.Option("--cluster", metavar="NAME", help="The cluster; all of them if left out.")
    ] = None,
    as_json: _AsJson = False,
) -> None:
    """Show where workspaces run and what they hold."""
    client = connected_client()
    names: list[str] = [cluster] if cluster is not None else client.clusters()
    if not names:
        raise NotFoundError("There is no cluster on this Ray. Make one with 'blobspace up CONFIG'.")
    show_clusters([cluster_facts(client.Cluster.attach(name).view()) for name in names], as_json=as_json)


@app.command(epilog=_EPILOG)
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
    attached = attach(cluster)
    if names:
        found = {
            owner: [name for name in own if fnmatch.fnmatchcase(name, match)]
            for owner, own in attached.blob_names().items()
            if fnmatch.fnmatchcase(owner, workspace)
        }
        if as_json:
            print_json({"cluster": cluster, "names": found})
        else:
            for owner, own in found.items():
                for name in own:
                    say(f"{owner}\t{name}")
        return
    specs = [spec_facts(spec) for spec in attached.blobs(match, workspace=workspace)]
    if as_json:
        print_json({"cluster": cluster, "blobs": specs, "tensor_bytes": sum(spec["tensor_bytes"] for spec in specs)})
    else:
        show_blobs(specs)


@app.command(epilog=_EPILOG)
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
    _show_live(attach(cluster), words, as_json=as_json)


@app.command(epilog=_EPILOG)
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
    plain = _plain_metadata(metadata or [])
    attached = attach(cluster)
    with Console(stderr=True).status(f"saving step {step} …"):
        report = attached.checkpoint(step, root=root, metadata=plain, replace=replace, deadline_s=deadline)
    if as_json:
        print_json(asdict(report))
        return
    say(
        f"Step {report.step} is committed in {report.root}: {count_text(report.workspace_count, 'workspace')}, "
        f"{count_text(report.blob_count, 'blob')}, {bytes_text(report.tensor_bytes)}."
    )
    say(
        f"Compute stood still for {seconds_text(report.stall_s)}; writing took {seconds_text(report.write_s)}, all "
        f"together {seconds_text(report.total_s)}."
    )


@app.command(epilog=_EPILOG)
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
    attached = attach(cluster)
    with Console(stderr=True).status("restoring …"):
        report = attached.restore(step, root=root, deadline_s=deadline)
    if as_json:
        print_json(asdict(report))
    else:
        show_return(cluster, report)


@app.command(epilog=_EPILOG)
def recover(
    cluster: _ClusterName = "default",
    step: _Step = None,
    root: _ClusterRoot = None,
    deadline: _Deadline = None,
    as_json: _AsJson = False,
) -> None:
    """Recreate lost workspaces, and take all back to a checkpoint.

    Work under way in the others ends with an error. Without a checkpoint to go back to, nothing changes.
    """
    attached = attach(cluster)
    with Console(stderr=True).status("recovering …"):
        report = attached.recover(step, root=root, deadline_s=deadline)
    if as_json:
        print_json(asdict(report))
        return
    show_return(cluster, report)
    say(f"Made anew: {', '.join(report.recreated)}." if report.recreated else "No workspace was lost.")


@app.command(epilog=_EPILOG)
def ls(root: _Root, as_json: _AsJson = False) -> None:
    """List the checkpoints in a folder."""
    summaries = list_checkpoints(open_store(root))
    if as_json:
        print_json({"root": root, "checkpoints": [summary_facts(summary) for summary in summaries]})
    else:
        show_summaries(root, summaries)


@app.command(epilog=_EPILOG)
def verify(root: _Root, step: _Step = None, as_json: _AsJson = False) -> None:
    """Check every byte of a checkpoint.

    Lists all damage; exit code 5 if there is any.
    """
    store = open_store(root)
    manifest = read_manifest(store, step)
    began = time.monotonic()
    with verify_progress(f"step {manifest.step}") as advance:
        report = verify_checkpoint(store, manifest, advance)
    if as_json:
        print_json({"root": root, **asdict(report), "is_sound": report.is_sound})
    else:
        show_verification(report, took_s=time.monotonic() - began)
    if not report.is_sound:
        raise typer.Exit(EXIT_CODES["corrupt_checkpoint"])


@app.command(epilog=_EPILOG)
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
    from .. import demo as demonstration  # noqa: PLC0415  (for this command alone)

    raise typer.Exit(demonstration.main(as_json=as_json, quick=quick, keep=keep))


def _plain_metadata(words: Iterable[str]) -> dict[str, Any]:
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


def _show_checkpoint(root: str, step: int | None, words: Sequence[str], *, as_json: bool) -> None:
    store = open_store(root)
    manifest = read_manifest(store, step)
    workspace, name = (["*", "*"] + (["*", *words] if len(words) == 1 else list(words)))[-2:]
    blobs = [
        fact
        for entry in manifest.workspaces
        for fact in (entry_facts(entry.name, blob) for blob in read_index(store, manifest, entry.name).blobs)
        if fnmatch.fnmatchcase(fact["workspace"], workspace) and fnmatch.fnmatchcase(fact["name"], name)
    ]
    facts = manifest_facts(root, manifest)
    if as_json:
        print_json(facts | {"blobs": blobs})
        return
    shown = {label: value_text(fact) for label, fact in facts.items() if not isinstance(fact, (list, dict))}
    print_facts(shown | {f"metadata {key}": value_text(value) for key, value in manifest.metadata.items()})
    say("")
    print_table(
        [("workspace", "left"), ("node", "left"), ("blobs", "right"), ("bytes", "right")],
        [
            (entry.name, entry.node[:12], str(entry.blob_count), bytes_text(entry.tensor_bytes))
            for entry in manifest.workspaces
        ],
    )
    say("")
    show_blobs(blobs)


def _show_live(cluster: Cluster, words: Sequence[str], *, as_json: bool) -> None:
    name = words[-1]
    owners = words[:-1] or [owner for owner, own in cluster.blob_names().items() if name in own]
    if not owners:
        raise NotFoundError(f"No workspace of cluster {cluster.name!r} has a blob {name!r}.", blob=name)
    values = [{"workspace": owner, "name": name, **value_facts(cluster, owner, name)} for owner in owners]
    if as_json:
        print_json({"cluster": cluster.name, "blobs": values})
        return
    for number, value in enumerate(values):
        if number:
            say("")
        print_facts(value_texts(value))
