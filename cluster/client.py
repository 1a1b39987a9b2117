"""The cluster as a user holds it: launch or attach, then workspaces, names, checkpoints, recovery."""

from __future__ import annotations

import fnmatch
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import ray
from ray.exceptions import AuthenticationError, GetTimeoutError, RayActorError, RayError

from ..ops.definitions import NetDef
from ..ops.errors import (
    BlobspaceError,
    ConflictError,
    DeadlineError,
    InvalidInputError,
    NotFoundError,
    WorkspaceLostError,
)
from ..ops.net import Net
from ..ops.values import check_plain
from ..workspace_actors.actor import NamesToken
from ..workspace_actors.blob import BlobSpec
from ..workspace_actors.handle import WorkspaceHandle
from ..workspace_actors.names import check_workspace_name
from ..workspace_actors.packed_names import NameList, unpack_names
from ..workspace_actors.ray_errors import unwrapped
from .checkpoint import CheckpointSummary, LocalStore, list_checkpoints
from .config import ClusterConfig, load_config, make_config
from .coordinator import HEAD_ONLY, NAMESPACE, CoordinatorActor, coordinator_name, named_actors
from .messages import CheckpointReport, ClusterView, MemberView, RestoreReport

_ANSWER_S = 5.0
# A coordinator answers questions while it works, some after probes of 10 s; one that is silent for longer hangs.
_COORDINATOR_S = 60.0
_WORKSPACE_S = 60.0
_ENDED_S = 10.0


class Cluster:
    """A named set of workspaces and their coordinator. Make one with :meth:`launch` or :meth:`attach`.

    As a context manager, a cluster that was launched is shut down at the end; one that was attached to is left.
    A cluster that is not detached also ends with the process that launched it.

    Example::

        with Cluster.launch({"workspaces": [{"name": "w{index}", "count": 4}]}) as cluster:
            cluster.workspaces["w0"].feed_blob("x", numpy.ones(3))
            print(cluster.blob_names())
            cluster.checkpoint(step=1, root="/shared/checkpoints")
    """

    def __init__(self, coordinator: Any, view: ClusterView, *, is_owner: bool) -> None:
        self._coordinator = coordinator
        self._view = view
        self._is_owner = is_owner
        self._names: dict[str, tuple[NamesToken, dict[str, NameList]]] = {}
        self._workspaces = _Workspaces(self._view_now, self._actor_of, self._lost)

    @classmethod
    def launch(cls, config: ClusterConfig | Mapping[str, Any] | str | Path, *, detached: bool = False) -> Cluster:
        """Make a cluster: a coordinator and its workspaces. Starts a local Ray if there is none.

        Args:
            config: A :class:`ClusterConfig`, a mapping of the same shape, or the path of a YAML file.
            detached: Let the cluster outlive this process; others :meth:`attach` to it by its name. Then Ray
                must be running already: one that is started here ends with this process.

        Raises:
            InvalidInputError: The configuration is wrong, or no set of nodes here can ever hold it.
            NotFoundError: A detached cluster was asked for, and there is no Ray.
            ConflictError: There is a cluster of that name already.
            DeadlineError: The workspaces did not start in time.

        Whatever it raises, and when it is interrupted, nothing of the cluster is left behind.
        """
        checked = load_config(config) if isinstance(config, (str, Path)) else make_config(config)
        if checked.checkpoint_root is not None:
            checked = checked.model_copy(update={"checkpoint_root": _absolute(checked.checkpoint_root)})
        connect(may_start=not detached)
        name = coordinator_name(checked.name)
        with suppress(ValueError):
            ray.get_actor(name, namespace=NAMESPACE)
            raise ConflictError(
                f"A cluster named {checked.name!r} exists already. Attach to it (Cluster.attach({checked.name!r})), "
                f"end it (blobspace down), or launch under another name.",
                cluster=checked.name,
            )
        options: dict[str, Any] = {
            "name": name,
            "namespace": NAMESPACE,
            "num_cpus": 0,
            "resources": HEAD_ONLY,
            "max_concurrency": 1000,
        }
        if detached:
            options |= {"lifetime": "detached", "max_restarts": -1}
        actor_class: Any = ray.remote(CoordinatorActor)
        coordinator: Any = None
        try:
            try:
                coordinator = actor_class.options(**options).remote(checked, detached)
            except ValueError as error:
                raise ConflictError(f"A cluster named {checked.name!r} was launched at the same moment.") from error
            view = _get(coordinator.start.remote(), "the coordinator")
        except BaseException:  # an interrupt too: nobody would hold what it leaves
            if coordinator is not None:
                _abandon(coordinator, checked.name)
            raise
        return cls(coordinator, view, is_owner=True)

    @classmethod
    def attach(cls, name: str = "default") -> Cluster:
        """Return the running cluster of that name, made by this or another job.

        Raises:
            NotFoundError: There is none on the Ray that this process is connected to, or no Ray.
            DeadlineError: Its coordinator does not answer.
        """
        check_workspace_name(name)
        connect(may_start=False)
        try:
            coordinator = ray.get_actor(coordinator_name(name), namespace=NAMESPACE)
        except ValueError:
            raise NotFoundError(
                f"There is no cluster named {name!r} on this Ray. Clusters here: {', '.join(clusters()) or 'none'}. "
                f"Make one with 'blobspace up', and check RAY_ADDRESS.",
                cluster=name,
            ) from None
        return cls(coordinator, _answer(coordinator.view.remote(), name), is_owner=False)

    @property
    def name(self) -> str:
        """The cluster's name."""
        return self._view.name

    @property
    def workspaces(self) -> Mapping[str, WorkspaceHandle]:
        """Handles of the workspaces by name; a child is reached as ``"parent:path"``."""
        return self._workspaces

    def view(self) -> ClusterView:
        """Return what the coordinator knows of the cluster now: members, placement, losses."""
        self._view = _answer(self._coordinator.view.remote(), self.name)
        return self._view

    # --- the catalog ---------------------------------------------------------------------------------------

    def blob_names(self) -> dict[str, list[str]]:
        """Return the blob names of every workspace: sorted, without duplicates; children as ``parent:path``.

        The coordinator has said who the workspaces are. Each of them answers with its names if they are not those
        that this process knows already, so an unchanged catalog costs one small answer each. The lists cannot be
        changed: they are the catalog's own, not copies.

        Raises:
            WorkspaceLostError: A workspace is gone, so the answer would not be the whole truth.
            DeadlineError: A workspace does not answer.
        """
        while not self._refresh_names():
            self.view()
        return {
            f"{name}:{path}" if path else name: names
            for name, (_, family) in self._names.items()
            for path, names in family.items()
        }

    def _refresh_names(self) -> bool:
        """Ask for changed names; return whether all who answered belong to the generation that this view shows."""
        members = self._view.members
        known = [self._names[member.name][0] if member.name in self._names else None for member in members]
        asked = [
            self._actor_of(member.name).names_since.remote(token) for member, token in zip(members, known, strict=True)
        ]
        unpacked: dict[bytes, dict[str, NameList]] = {}
        # In two halves, if all must send their names: while those of the first are unpacked, the second still packs.
        half = len(asked) if all(known) else (len(asked) + 1) // 2
        for part in (slice(0, half), slice(half, None)):
            for member, answer in zip(members[part], self._names_answers(members[part], asked[part]), strict=True):
                if answer is not None:
                    token, packed = answer
                    if packed not in unpacked:
                        unpacked[packed] = unpack_names(packed)
                    self._names[member.name] = (token, unpacked[packed])
        return all(self._names[member.name][0][0] == self._view.generation for member in members)

    def _names_answers(
        self, members: Sequence[MemberView], asked: Sequence[Any]
    ) -> Sequence[tuple[NamesToken, bytes] | None]:
        try:
            return ray.get(list(asked), timeout=_WORKSPACE_S)
        except (RayActorError, GetTimeoutError) as error:
            # Which of them it was is found out one by one, for the error's sake.
            seconds = 0.0 if isinstance(error, GetTimeoutError) else _WORKSPACE_S
            return [
                self._names_answer(member, reference, seconds) for member, reference in zip(members, asked, strict=True)
            ]

    def _names_answer(self, member: MemberView, reference: Any, seconds: float) -> tuple[NamesToken, bytes] | None:
        try:
            return ray.get(reference, timeout=seconds)
        except RayActorError as error:
            raise self._lost(member.name, unwrapped(error, f"workspace {member.name!r}")) from None
        except GetTimeoutError:
            raise DeadlineError(
                f"Workspace {member.name!r} did not say within {_WORKSPACE_S:g} s which names it has: its process or "
                f"node hangs. Look at it (blobspace status), or recover the cluster.",
                workspace=member.name,
                waited_s=_WORKSPACE_S,
            ) from None

    def blobs(self, match: str = "*", *, workspace: str = "*") -> list[BlobSpec]:
        """Return the specs of blobs: dtype, shape, bytes, version, and the workspace that owns them.

        Args:
            match: Pattern for blob names, as in a shell (``"*_grad"``).
            workspace: Pattern for workspace names; a child is ``parent:path``.

        Raises:
            WorkspaceLostError: A workspace is gone.
        """
        answers = _answer(self._coordinator.specs.remote(), self.name)
        return [
            spec
            for _, specs in answers
            for spec in specs
            if fnmatch.fnmatchcase(spec.name, match) and fnmatch.fnmatchcase(spec.workspace, workspace)
        ]

    # --- all workspaces at once ----------------------------------------------------------------------------

    def create_net(self, net: Net | NetDef, *, overwrite: bool = False) -> None:
        """Create a net in every workspace."""
        self._everywhere("create_net", net, overwrite=overwrite)

    def run_net(self, name: str, iterations: int = 1) -> None:
        """Run a net in every workspace at the same time, and wait for all.

        Raises:
            WorkspaceLostError: A workspace is gone; the others have ended their part, or failed for its sake.
            BlobspaceError: A workspace's net failed.
        """
        self._everywhere("run_net", name, iterations=iterations)

    def _everywhere(self, verb: str, *args: Any, **kwargs: Any) -> None:
        handles = [self._workspaces[member.name] for member in self._view.members]
        references = [handle.submit(verb, *args, **kwargs) for handle in handles]
        failures: list[tuple[str, Exception]] = []
        for handle, reference in zip(handles, references, strict=True):
            try:
                ray.get(reference)
            except RayError as error:
                failures.append((handle.name, error))
        for name, error in failures:
            if isinstance(error, RayActorError):
                raise self._lost(name, unwrapped(error, f"workspace {name!r}")) from None
        if failures:
            name, error = failures[0]
            raise unwrapped(error, f"workspace {name!r}") from None

    # --- checkpoint, restore, recover ----------------------------------------------------------------------

    def checkpoint(
        self,
        step: int,
        *,
        root: str | os.PathLike[str] | None = None,
        metadata: Mapping[str, Any] | None = None,
        replace: bool = False,
        deadline_s: float | None = None,
    ) -> CheckpointReport:
        """Save every blob, net and generator of every workspace, as of one moment, in one atomic commit.

        Compute stops at an iteration boundary, for about the time of a few actor calls, and goes on while the
        bytes are written. When this returns the checkpoint is durable. When it raises, nothing of it is visible
        and earlier checkpoints are untouched; after a StorageError from the commit itself, look before retrying.

        Args:
            step: From 0; names the checkpoint.
            root: Folder that all nodes share; None means the configured one.
            metadata: Plain values to keep with it.
            replace: Replace a checkpoint of that step, which stays valid until this one is committed.
            deadline_s: How long it may take; None means the configured time.

        Raises:
            ConflictError: The step has a checkpoint and ``replace`` is False; or another operation is running.
            DeadlineError: Names who did not answer, and in which phase.
            StorageError: No space, no permission, or a root that the nodes do not share.
            WorkspaceLostError: A workspace was lost before the commit.
        """
        plain = dict(metadata or {})
        check_plain(plain, where="The checkpoint's metadata")
        if isinstance(step, bool) or not isinstance(step, int) or not 0 <= step < 2**63:
            raise InvalidInputError(f"A step is an integer from 0 to 2**63 - 1; found {step!r}.")
        reference = self._coordinator.checkpoint.remote(step, self._root(root), plain, replace, deadline_s)
        return _get(reference, "the coordinator")

    def restore(
        self,
        step: int | None = None,
        *,
        root: str | os.PathLike[str] | None = None,
        deadline_s: float | None = None,
    ) -> RestoreReport:
        """Take every workspace back to a checkpoint: blobs, nets, generators, bit by bit.

        Everything is read and verified first; if anything is wrong, no workspace changes.

        Args:
            step: None means the newest.
            root: See :meth:`checkpoint`.
            deadline_s: See :meth:`checkpoint`.

        Raises:
            NotFoundError: There is no such checkpoint.
            CorruptCheckpointError: It is damaged; names file, blob and offset.
            InvalidInputError: It is of other workspaces than this cluster's.
            WorkspaceLostError: A workspace is lost; :meth:`recover` first.
        """
        return _get(self._coordinator.restore.remote(step, self._root(root), deadline_s), "the coordinator")

    def recover(
        self,
        step: int | None = None,
        *,
        root: str | os.PathLike[str] | None = None,
        deadline_s: float | None = None,
    ) -> RestoreReport:
        """Recreate lost workspaces, then take the whole cluster back to its last committed checkpoint.

        Handles stay valid. Work that was under way in the surviving workspaces ends with an error; work queued
        behind it runs afterwards, on the restored content.

        Args:
            step: None means the newest.
            root: See :meth:`checkpoint`.
            deadline_s: See :meth:`checkpoint`.

        Raises:
            NotFoundError: There is no checkpoint to go back to; nothing has changed.
            InvalidInputError: The nodes that remain cannot hold the lost workspaces; nothing has changed.
        """
        try:
            return _get(self._coordinator.recover.remote(step, self._root(root), deadline_s), "the coordinator")
        finally:
            with suppress(BlobspaceError):
                self.view()

    def checkpoints(self, *, root: str | os.PathLike[str] | None = None) -> list[CheckpointSummary]:
        """Return the committed checkpoints in a folder, steps ascending."""
        return list_checkpoints(LocalStore(self._root(root)))

    def _root(self, root: str | os.PathLike[str] | None) -> str:
        chosen = root if root is not None else self._view.checkpoint_root
        if chosen is None:
            raise InvalidInputError(
                f"Cluster {self.name!r} has no checkpoint_root configured and none was given. Pass root=…, or set "
                f"checkpoint_root in its configuration."
            )
        return _absolute(os.fspath(chosen))

    # --- the end -------------------------------------------------------------------------------------------

    def shut_down(self) -> None:
        """End the cluster: every workspace with its blobs, then the coordinator. Checkpoints stay."""
        with suppress(RayError):
            ray.get(self._coordinator.shut_down.remote(), timeout=_COORDINATOR_S)
        ray.kill(self._coordinator)

    def __enter__(self) -> Cluster:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._is_owner:
            self.shut_down()

    def __repr__(self) -> str:
        return f"Cluster({self.name!r}, {len(self._view.members)} workspaces)"

    def _view_now(self) -> ClusterView:
        return self._view

    # --- what handles need ---------------------------------------------------------------------------------

    def _actor_of(self, name: str) -> Any:
        member = next((member for member in self._view.members if member.name == name), None)
        if member is None or not member.is_alive:
            raise _answer(self._coordinator.lost_error.remote(name), self.name)
        return member.actor

    def _lost(self, name: str, error: BlobspaceError) -> BlobspaceError:
        """Return the error for a call whose actor is gone, and learn what the coordinator knows by now."""
        try:
            lost: WorkspaceLostError = _answer(self._coordinator.lost_error.remote(name), self.name)
            self.view()
        except BlobspaceError:
            return error
        return lost


class _Workspaces(Mapping[str, WorkspaceHandle]):
    """The workspaces of a cluster by name, in the order of their ranks."""

    def __init__(
        self,
        view: Callable[[], ClusterView],
        actor_of: Callable[[str], Any],
        on_lost: Callable[[str, BlobspaceError], BlobspaceError],
    ) -> None:
        self._view = view
        self._actor_of = actor_of
        self._on_lost = on_lost

    def __getitem__(self, name: str) -> WorkspaceHandle:
        own, _, child = name.partition(":")
        if own not in set(self):
            raise NotFoundError(
                f"Cluster {self._view().name!r} has no workspace {own!r:.150}. It has: {', '.join(self)}.",
                workspace=own[:150],
            )
        return WorkspaceHandle(own, find_actor=partial(self._actor_of, own), on_lost=self._on_lost, child=child)

    def __iter__(self) -> Iterator[str]:
        return iter([member.name for member in self._view().members])

    def __len__(self) -> int:
        return len(self._view().members)


def clusters() -> list[str]:
    """Return the names of the clusters on the Ray that this process is connected to, sorted."""
    connect(may_start=False)
    suffix = coordinator_name("")
    return sorted(name.removesuffix(suffix) for name in named_actors() if name.endswith(suffix))


def remove_remains(name: str) -> list[str]:
    """End every actor of a cluster by its name, and return which workspaces those were.

    For a cluster whose coordinator is gone or hangs: the detached workspaces outlive it, and nobody else ends them.
    Ray ends them in the background; :func:`has_remains` says when they are gone.
    """
    remains = _remains(name)
    # The coordinator first, so that it makes no more of them.
    for actor_name in sorted(remains, key=lambda remain: remain != coordinator_name(name)):
        with suppress(ValueError):  # gone by itself meanwhile
            ray.kill(ray.get_actor(actor_name, namespace=NAMESPACE))
    own = f"{name}/workspace/"
    return sorted({remain.removeprefix(own).rpartition("#")[0] for remain in remains if remain.startswith(own)})


def has_remains(name: str) -> bool:
    """Return whether Ray has any actor of the cluster, alive or about to end."""
    return bool(_remains(name))


def _remains(name: str) -> list[str]:
    check_workspace_name(name)
    connect(may_start=False)
    return [actor_name for actor_name in named_actors() if actor_name.startswith(f"{name}/")]


def _abandon(coordinator: Any, name: str) -> None:
    """End a cluster that is half made; what stopped the launch is more telling than what may fail here."""
    with suppress(RayError, BlobspaceError, RuntimeError):
        ray.kill(coordinator)
        ends = time.monotonic() + _ENDED_S
        # Again and again: the coordinator may make one more workspace while it is being ended.
        while has_remains(name) and time.monotonic() < ends:
            remove_remains(name)
            time.sleep(0.02)


def connect(*, may_start: bool, log_level: int = logging.INFO) -> None:
    """Connect to the Ray of RAY_ADDRESS, of the job, or of this machine; leave a connection as it is.

    Args:
        may_start: Start a local Ray, which ends with this process, if there is none. False where that is of no
            use: a fresh Ray holds no cluster to attach to, and a detached cluster would not outlive it.
        log_level: What Ray's own logger tells this process.

    Raises:
        NotFoundError: There is no Ray, or none answers at RAY_ADDRESS.
        InvalidInputError: RAY_ADDRESS is none that a program can connect to, or Ray demands a token.
    """
    if ray.is_initialized():
        return
    # Ray's own variable. An address where nobody listens is refused here at once; Ray would try for 80 s.
    address = os.environ.get("RAY_ADDRESS", "")
    if address == "local" and not may_start:
        raise _no_ray("RAY_ADDRESS=local asks for a fresh Ray")
    if address not in ("", "auto", "local"):
        _check_answers(address)
    logging.getLogger("ray").setLevel(log_level)
    try:
        ray.init(
            address=None if may_start else "auto",
            namespace=NAMESPACE,
            log_to_driver=False,
            include_dashboard=False,
            logging_level=log_level,
        )
    except (AuthenticationError, ConnectionError) as error:
        if address in ("", "auto") and "Could not find any running Ray" in str(error):
            raise _no_ray("No Ray is running on this machine") from None
        raise InvalidInputError(
            f"Ray at {address or 'this machine'} answers but refuses this process; it seems to demand a token. Set "
            f"RAY_AUTH_MODE=token, with the cluster's token in ~/.ray/auth_token or RAY_AUTH_TOKEN.",
            address=address,
        ) from None


def _check_answers(address: str) -> None:
    host, _, port = address.rpartition(":")
    if "://" in address or not host or not port.isdigit():
        raise InvalidInputError(
            f"RAY_ADDRESS is {address!r}; programs connect to host:port of Ray itself (port 6379 unless chosen), and "
            f"only 'ray job' and 'ray list' to the dashboard's http://host:port.",
            address=address,
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_ANSWER_S).close()
    except (OSError, OverflowError) as error:
        raise _no_ray(f"No Ray answers at RAY_ADDRESS={address} ({error})") from None


def _no_ray(problem: str) -> NotFoundError:
    return NotFoundError(
        f"{problem}. Start one with 'ray start --head', or set RAY_ADDRESS=host:port of one that runs.",
        address=os.environ.get("RAY_ADDRESS", ""),
    )


def _get(reference: Any, who: str) -> Any:
    try:
        return ray.get(reference)
    except RayError as error:
        raise unwrapped(error, who) from None


def _answer(reference: Any, cluster: str) -> Any:
    """Return the coordinator's answer to a question, which it gives at once whatever else it is doing."""
    try:
        return ray.get(reference, timeout=_COORDINATOR_S)
    except GetTimeoutError:
        raise DeadlineError(
            f"The coordinator of cluster {cluster!r} did not answer within {_COORDINATOR_S:g} s; its process hangs or "
            f"is cut off. Try again; if it stays so, end the cluster (blobspace down), launch it again, and restore "
            f"its last checkpoint.",
            cluster=cluster,
            waited_s=_COORDINATOR_S,
        ) from None
    except RayError as error:
        raise unwrapped(error, f"the coordinator of cluster {cluster!r}") from None


def _absolute(root: str) -> str:
    if "://" in root:
        raise InvalidInputError(
            f"Checkpoint root {root!r} is a URL. This version stores checkpoints in folders that all nodes share; "
            f"object stores come later."
        )
    return os.path.abspath(os.path.expanduser(root))
