"""The coordinator: a thin Ray actor that makes the workspaces, watches them, and carries out the protocols.

What is decided is decided in ``operations.py`` and ``placement.py``; this file has the effects. It is asynchronous:
one event loop, no locks. One operation (checkpoint, restore, recovery) runs at a time; questions are answered
meanwhile. When a detached coordinator is restarted by Ray it finds the workspaces by their names and takes them
over under a new generation.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Iterable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError

from .. import __version__
from ..ops.definitions import CPU, CUDA
from ..ops.errors import (
    BlobspaceError,
    ConflictError,
    DeadlineError,
    InvalidInputError,
    WorkspaceLostError,
)
from ..workspace_actors.actor import CONCURRENCY_GROUPS, ActorIdentity, ActorOptions, WorkspaceActor
from ..workspace_actors.blob import BlobSpec
from ..workspace_actors.collectives import MeetingPoint
from ..workspace_actors.ray_errors import first_line, unwrapped
from .checkpoint import LocalStore, Manifest, commit, list_checkpoints, make_manifest, read_manifest, refuse_existing
from .config import ClusterConfig
from .messages import CheckpointReport, ClusterView, MemberView, RestoreReport
from .operations import Call, CheckpointOperation, Operation, RestoreOperation
from .placement import NODE_ID_LABEL, NodeView, PlacementRequest, check_feasible, describe_nodes
from .protocol_run import ProtocolRun
from .snapshot_io import CheckpointLoader, CheckpointWriter

NAMESPACE = "blobspace"
# Ray's own mark of the head node. What holds a cluster together lives there: a lost worker node then never takes
# the coordinator along, and a lost head takes all of Ray along anyway.
HEAD_ONLY = {"node:__internal_head__": 0.001}
_PROBE_S = 10.0


def coordinator_name(cluster: str) -> str:
    """Return the Ray actor name of a cluster's coordinator."""
    return f"{cluster}/coordinator"


def _workspace_actor_name(cluster: str, workspace: str, generation: int) -> str:
    return f"{cluster}/workspace/{workspace}#{generation}"


def live_nodes() -> list[NodeView]:
    """Return Ray's live nodes."""
    return [
        NodeView(node_id=node["NodeID"], resources=node["Resources"], labels=node.get("Labels", {}))
        for node in ray.nodes()
        if node["Alive"]
    ]


def named_actors() -> list[str]:
    """Return the names of all actors of all clusters on this Ray."""
    entries: list[Any] = ray.util.list_named_actors(all_namespaces=True)
    return [entry["name"] for entry in entries if entry["namespace"] == NAMESPACE]


@dataclass(slots=True)
class _Member:
    view: MemberView
    watcher: asyncio.Task[None] | None = None


class CoordinatorActor:
    """One per cluster. Users hold a :class:`~blobspace.cluster.Cluster`.

    Args:
        config: The cluster's configuration.
        is_detached: Whether the cluster outlives the job that made it.
    """

    def __init__(self, config: ClusterConfig, is_detached: bool) -> None:
        self._config = config
        self._is_detached = is_detached
        self._generation = 1
        self._members: dict[str, _Member] = {}
        self._meeting_point: Any = None
        self._operation: str | None = None
        self._run: ProtocolRun | None = None
        self._last_committed: tuple[str, int] | None = None
        self._starting: asyncio.Task[None] | None = None
        context = ray.get_runtime_context()
        if context.was_current_actor_reconstructed:
            # Nobody may call for a while, and an old barrier of its predecessor may hold the workspaces.
            context.current_actor.start.remote()

    def __repr__(self) -> str:
        return f"Coordinator({self._config.name})"

    # --- the members ---------------------------------------------------------------------------------------

    async def start(self) -> ClusterView:
        """Make the workspaces, or take over those that an earlier coordinator of this cluster has left.

        Raises:
            InvalidInputError: The nodes can never hold them.
            DeadlineError: Ray did not start them in time; none is left behind.
        """
        await self._ready()
        return self._view()

    async def view(self) -> ClusterView:
        """Return what is known of the cluster."""
        await self._ready()
        return self._view()

    async def _ready(self) -> None:
        """Wait until the workspaces are there; the first caller has them made, or taken over.

        Whoever comes while that is under way waits for the same; whoever comes after it has failed tries again.
        """
        if self._starting is None or (self._starting.done() and self._starting.exception() is not None):
            self._starting = asyncio.ensure_future(self._bring_up())
        await asyncio.shield(self._starting)

    async def _bring_up(self) -> None:
        async with self._exclusively("start"):
            found = self._find_workspaces() if self._is_detached else {}
            if found:
                await self._take_over(found)
            else:
                await self._make_all()

    async def shut_down(self) -> None:
        """End every workspace and the meeting point. The caller then ends the coordinator."""
        for member in self._members.values():
            self._forget(member)
        if self._meeting_point is not None:
            ray.kill(self._meeting_point)

    def _view(self) -> ClusterView:
        return ClusterView(
            name=self._config.name,
            generation=self._generation,
            members=tuple(member.view for member in self._members.values()),
            checkpoint_root=self._config.checkpoint_root,
            last_committed_step=None if self._last_committed is None else self._last_committed[1],
            code_version=__version__,
            operation=self._operation,
        )

    async def _make_all(self) -> None:
        names = self._config.workspace_names()
        check_feasible([self._request(name) for name in names], live_nodes())
        self._meeting_point = self._make_meeting_point()
        await self._make(names)
        await self._open_meetings()

    async def _take_over(self, found: dict[str, tuple[int, Any]]) -> None:
        identities = await asyncio.gather(*(self._probe(actor) for _, actor in found.values()), return_exceptions=True)
        for name in self._config.workspace_names():
            self._members[name] = _Member(self._absent(name, "it was gone when the coordinator was restarted"))
        for (name, (generation, actor)), identity in zip(found.items(), identities, strict=True):
            self._generation = max(self._generation, generation)
            if isinstance(identity, ActorIdentity):
                self._generation = max(self._generation, identity.generation)
                self._admit(name, actor, identity)
        self._generation += 1
        self._meeting_point = self._make_meeting_point()
        await self._join_all(barrier=None)
        await self._open_meetings()
        await asyncio.to_thread(self._find_last_committed)

    def _find_workspaces(self) -> dict[str, tuple[int, Any]]:
        prefix = f"{self._config.name}/workspace/"
        found: dict[str, tuple[int, Any]] = {}
        for actor_name in named_actors():
            if not actor_name.startswith(prefix):
                continue
            name, _, generation = actor_name.removeprefix(prefix).rpartition("#")
            if name in self._config.workspace_names() and int(generation) > found.get(name, (0, None))[0]:
                with suppress(ValueError):
                    found[name] = (int(generation), ray.get_actor(actor_name, namespace=NAMESPACE))
        return found

    def _find_last_committed(self) -> None:
        if self._config.checkpoint_root is None:
            return
        with suppress(BlobspaceError):
            readable = [
                summary for summary in list_checkpoints(LocalStore(self._config.checkpoint_root)) if summary.is_readable
            ]
            if readable:
                self._last_committed = (self._config.checkpoint_root, readable[-1].step)

    def _make_meeting_point(self) -> Any:
        options: dict[str, Any] = {"num_cpus": 0, "resources": HEAD_ONLY, "max_concurrency": 1000}
        if self._is_detached:
            # Its name carries the generation: an older coordinator's meeting point is never met by accident.
            options |= {
                "name": f"{self._config.name}/meeting-point#{self._generation}",
                "namespace": NAMESPACE,
                "lifetime": "detached",
            }
            for actor_name in named_actors():
                if actor_name.startswith(f"{self._config.name}/meeting-point#"):
                    with suppress(ValueError):
                        ray.kill(ray.get_actor(actor_name, namespace=NAMESPACE))
        return ray.remote(MeetingPoint).options(**options).remote()

    def _request(self, name: str) -> PlacementRequest:
        group = self._config.group_of(name)
        labels = dict(group.labels)
        if group.node is not None:
            labels[NODE_ID_LABEL] = group.node
        resources = {"CPU": group.num_cpus, "GPU": group.num_gpus, **group.resources}
        return PlacementRequest(
            workspace=name, resources={key: amount for key, amount in resources.items() if amount}, labels=labels
        )

    async def _make(self, names: Iterable[str]) -> None:
        """Create these workspaces' actors and wait until they run; on failure none of them is left."""
        actors = {name: self._create_actor(name) for name in names}
        probes = {name: asyncio.ensure_future(_awaited(actor.identity.remote())) for name, actor in actors.items()}
        try:
            await asyncio.wait(probes.values(), timeout=self._config.placement_deadline_s)
            pending = [name for name, probe in probes.items() if not probe.done()]
            if pending:
                raise self._not_placed(pending)
            for name, probe in probes.items():
                self._admit(name, actors[name], probe.result())
        except BaseException as error:
            for probe in probes.values():
                probe.cancel()
            for name, actor in actors.items():
                member = self._members.get(name)
                if member is not None and member.view.actor is actor:
                    self._forget(member)
                    self._members[name] = _Member(self._absent(name, "it could not be placed"))
                ray.kill(actor)
            if isinstance(error, RayError):
                raise unwrapped(error, "a new workspace") from None
            raise

    def _create_actor(self, name: str) -> Any:
        group = self._config.group_of(name)
        request = self._request(name)
        options: dict[str, Any] = {
            "name": _workspace_actor_name(self._config.name, name, self._generation),
            "namespace": NAMESPACE,
            "num_cpus": group.num_cpus,
            "num_gpus": group.num_gpus,
            "resources": dict(group.resources),
            "max_restarts": 0,
        }
        if request.labels:
            options["label_selector"] = dict(request.labels)
        if self._is_detached:
            options["lifetime"] = "detached"
        # Ray's types know neither concurrency groups nor options from a mapping.
        decorate: Any = ray.remote(num_cpus=0, concurrency_groups=CONCURRENCY_GROUPS)  # pyright: ignore[reportCallIssue, reportArgumentType]
        actor_class: Any = decorate(WorkspaceActor)
        names = self._config.workspace_names()
        return actor_class.options(**options).remote(
            ActorOptions(
                name=name,
                device_type=CUDA if group.num_gpus else CPU,
                memory_limit_bytes=group.memory_limit,
                seed=self._config.seed,
                generation=self._generation,
                meeting_point=self._meeting_point,
                rank=names.index(name),
                size=len(names),
                collective_deadline_s=self._config.collective_deadline_s,
                modules=tuple(self._config.modules),
            )
        )

    def _not_placed(self, pending: list[str]) -> DeadlineError:
        free = ", ".join(
            f"{amount:g} {name}"
            for name, amount in sorted(ray.available_resources().items())
            if not name.startswith("node:") and "memory" not in name
        )
        asked = ", ".join(str(self._request(name)) for name in pending)
        return DeadlineError(
            f"{len(pending)} workspaces were not started within {self._config.placement_deadline_s:g} s: {asked}. "
            f"The live nodes have:\n{describe_nodes(live_nodes())}\nFree at the moment: {free or 'nothing'}. Something "
            f"else holds the rest; wait for it, ask for less, or raise placement_deadline_s.",
            workspaces=pending,
            waited_s=self._config.placement_deadline_s,
        )

    def _admit(self, name: str, actor: Any, identity: ActorIdentity) -> None:
        view = MemberView(
            name=name,
            rank=self._config.workspace_names().index(name),
            actor=actor,
            node_id=identity.node_id,
            pid=identity.pid,
            device_type=identity.device_type,
            is_alive=True,
            lost_because="",
        )
        self._members[name] = _Member(view, asyncio.ensure_future(self._watch(name, actor)))
        self._members = {
            known: self._members[known] for known in self._config.workspace_names() if known in self._members
        }

    def _absent(self, name: str, reason: str) -> MemberView:
        rank = self._config.workspace_names().index(name)
        return MemberView(
            name=name, rank=rank, actor=None, node_id="", pid=0, device_type="", is_alive=False, lost_because=reason
        )

    def _forget(self, member: _Member) -> None:
        if member.watcher is not None:
            member.watcher.cancel()
        if member.view.actor is not None:
            ray.kill(member.view.actor)

    async def _join_all(self, *, barrier: str | None) -> None:
        """Take every living workspace into this generation; with a barrier each is held from that moment on."""
        alive = [member.view for member in self._members.values() if member.view.is_alive]
        await self._ask_all(
            alive,
            lambda view: view.actor.join.remote(
                self._generation,
                self._meeting_point,
                view.rank,
                len(self._members),
                barrier,
                self._config.checkpoint_deadline_s,
            ),
        )

    async def _open_meetings(self) -> None:
        if all(member.view.is_alive for member in self._members.values()):
            await self._meeting_point.open.remote(self._generation, list(self._members))
        else:
            await self._close_meetings()

    async def _close_meetings(self) -> None:
        lost = [member.view.name for member in self._members.values() if not member.view.is_alive]
        reason = f"lost workspace(s): {', '.join(lost)}" if lost else "the cluster is being recovered"
        await self._meeting_point.close.remote(self._generation, reason, lost)

    # --- losses --------------------------------------------------------------------------------------------

    async def _watch(self, name: str, actor: Any) -> None:
        try:
            await actor.watch.remote()
        except RayError as error:
            await self._lose(name, actor, first_line(error))

    async def _probe(self, actor: Any) -> ActorIdentity:
        return await asyncio.wait_for(_awaited(actor.identity.remote()), _PROBE_S)

    async def _lose(self, name: str, actor: Any, reason: str) -> None:
        member = self._members.get(name)
        if member is None or member.view.actor is not actor or not member.view.is_alive:
            return
        member.view = replace(member.view, is_alive=False, lost_because=reason)
        if self._run is not None:
            self._run.lose(name, self._lost_error(member.view))
        with suppress(RayError):
            await self._close_meetings()

    def _lost_error(self, view: MemberView) -> WorkspaceLostError:
        step = None if self._last_committed is None else self._last_committed[1]
        back = (
            "no checkpoint has been committed"
            if self._last_committed is None
            else f"the last committed step is {step}, in {self._last_committed[0]}"
        )
        return WorkspaceLostError(
            f"Workspace {view.name!r} on node {view.node_id[:12]} is lost: {view.lost_because} Its blobs are gone with "
            f"it; {back}. cluster.recover() recreates it and takes the cluster back to that step.",
            workspace=view.name,
            node=view.node_id,
            last_committed_step=step,
        )

    async def lost_error(self, name: str) -> WorkspaceLostError:
        """Return the error that says how a workspace was lost; a caller has just seen its actor gone."""
        await self._ready()
        member = self._members.get(name)
        if member is None:
            return WorkspaceLostError(f"The cluster has no workspace {name!r}.", workspace=name)
        if member.view.is_alive and member.view.actor is not None:
            try:
                await self._probe(member.view.actor)
            except (RayError, asyncio.TimeoutError) as error:
                await self._lose(name, member.view.actor, first_line(error))
        return self._lost_error(member.view)

    def _check_whole(self) -> None:
        lost = [member.view for member in self._members.values() if not member.view.is_alive]
        if lost:
            raise self._lost_error(lost[0])

    # --- the catalog ---------------------------------------------------------------------------------------

    async def specs(self) -> list[tuple[MemberView, list[BlobSpec]]]:
        """Return the specs of all blobs, by workspace.

        Raises:
            WorkspaceLostError: A workspace is gone.
        """
        await self._ready()
        self._check_whole()
        views = [member.view for member in self._members.values()]
        answers = await self._ask_all(views, lambda view: view.actor.specs.remote())
        return list(zip(views, answers, strict=True))

    async def _ask_all(self, views: list[MemberView], ask: Callable[[MemberView], Any]) -> list[Any]:
        answers = await asyncio.gather(*(ask(view) for view in views), return_exceptions=True)
        for view, answer in zip(views, answers, strict=True):
            if isinstance(answer, RayActorError):
                raise await self.lost_error(view.name)
            if isinstance(answer, BaseException):
                raise unwrapped(answer, f"workspace {view.name!r}") if isinstance(answer, Exception) else answer
        return answers

    # --- checkpoint and restore ----------------------------------------------------------------------------

    async def checkpoint(
        self, step: int, root: str, metadata: dict[str, Any], replace_step: bool, deadline_s: float | None
    ) -> CheckpointReport:
        """Make one checkpoint of all workspaces. See :meth:`Cluster.checkpoint`."""
        await self._ready()
        async with self._exclusively(f"checkpoint of step {step}"):
            self._check_whole()
            store = LocalStore(root)
            began = time.monotonic()
            if not replace_step:
                await asyncio.to_thread(refuse_existing, store, step)
            save_id = f"{time.time_ns():x}-{uuid.uuid4().hex[:8]}"
            operation = CheckpointOperation(
                barrier=f"checkpoint {save_id}",
                generation=self._generation,
                members=tuple(self._members),
                deadline_s=deadline_s or self._config.checkpoint_deadline_s,
                now=began,
                last_committed=None if self._last_committed is None else self._last_committed[1],
                make_writer=lambda rank: CheckpointWriter(root=root, save_id=save_id, ordinal=rank),
            )

            def publish(receipts: Any) -> Manifest:
                manifest = make_manifest(
                    step=step,
                    save_id=save_id,
                    created_unix_ns=time.time_ns(),
                    cluster=self._config.name,
                    generation=self._generation,
                    blobspace_version=__version__,
                    metadata=metadata,
                    receipts=receipts.values(),
                    nodes={name: member.view.node_id for name, member in self._members.items()},
                )
                commit(store, manifest, replace=replace_step)
                return manifest

            try:
                manifest: Manifest = await self._carry_out(operation, publish)
            except BlobspaceError:
                if "publish" not in operation.phase_began:
                    # Nothing refers to what was written; what a hanging writer adds later, collection removes.
                    with suppress(BlobspaceError):
                        await asyncio.to_thread(store.delete_tree, f"data/{save_id}")
                raise
            self._last_committed = (root, step)
            at = operation.phase_began
            return CheckpointReport(
                step=step,
                root=root,
                save_id=save_id,
                workspace_count=len(manifest.workspaces),
                blob_count=sum(entry.blob_count for entry in manifest.workspaces),
                tensor_bytes=sum(entry.tensor_bytes for entry in manifest.workspaces),
                stall_s=at["write"] - at["hold"],
                write_s=at["publish"] - at["write"],
                commit_s=at["release"] - at["publish"],
                total_s=at["release"] - began,
            )

    async def restore(self, step: int | None, root: str, deadline_s: float | None) -> RestoreReport:
        """Take all workspaces back to a checkpoint. See :meth:`Cluster.restore`."""
        await self._ready()
        async with self._exclusively("restore"):
            self._check_whole()
            manifest = await asyncio.to_thread(read_manifest, LocalStore(root), step)
            self._check_same_shape(manifest)
            return await self._restore(
                manifest, root, deadline_s, barrier=_restore_barrier(), recreated=(), began=time.monotonic()
            )

    async def recover(self, step: int | None, root: str, deadline_s: float | None) -> RestoreReport:
        """Recreate lost workspaces and take all back to a checkpoint. See :meth:`Cluster.recover`."""
        await self._ready()
        async with self._exclusively("recovery"):
            began = time.monotonic()
            manifest = await asyncio.to_thread(read_manifest, LocalStore(root), step)
            self._check_same_shape(manifest)
            await self._notice_losses()
            lost = [name for name, member in self._members.items() if not member.view.is_alive]
            if lost:
                check_feasible([self._request(name) for name in self._members], live_nodes())
            self._generation += 1
            try:
                await self._close_meetings()
            except RayActorError:
                self._meeting_point = self._make_meeting_point()
            if lost:
                for name in lost:
                    self._forget(self._members[name])
                await self._make(lost)
            barrier = _restore_barrier()
            # From here on the survivors stand still: queued work must not meet members that are still empty.
            await self._join_all(barrier=barrier)
            await self._open_meetings()
            return await self._restore(manifest, root, deadline_s, barrier=barrier, recreated=tuple(lost), began=began)

    async def _notice_losses(self) -> None:
        alive = [member.view for member in self._members.values() if member.view.is_alive]
        answers = await asyncio.gather(*(self._probe(view.actor) for view in alive), return_exceptions=True)
        for view, answer in zip(alive, answers, strict=True):
            if isinstance(answer, asyncio.TimeoutError):
                await self._lose(view.name, view.actor, f"It did not answer within {_PROBE_S:g} s.")
            elif isinstance(answer, Exception):
                await self._lose(view.name, view.actor, first_line(answer))

    async def _restore(
        self,
        manifest: Manifest,
        root: str,
        deadline_s: float | None,
        *,
        barrier: str,
        recreated: tuple[str, ...],
        began: float,
    ) -> RestoreReport:
        operation = RestoreOperation(
            barrier=barrier,
            generation=self._generation,
            members=tuple(self._members),
            deadline_s=deadline_s or self._config.checkpoint_deadline_s,
            now=time.monotonic(),
            last_committed=manifest.step,
            make_loader=lambda name: CheckpointLoader(
                root=root, step=manifest.step, save_id=manifest.save_id, workspace=name
            ),
        )
        await self._carry_out(operation, None)
        self._last_committed = (root, manifest.step)
        at = operation.phase_began
        return RestoreReport(
            step=manifest.step,
            root=root,
            recreated=recreated,
            workspace_count=len(manifest.workspaces),
            tensor_bytes=sum(entry.tensor_bytes for entry in manifest.workspaces),
            read_s=at["hold"] - at["prepare"],
            stall_s=at["over"] - at["hold"],
            total_s=at["over"] - began,
        )

    def _check_same_shape(self, manifest: Manifest) -> None:
        saved = {entry.name for entry in manifest.workspaces}
        missing = sorted(set(self._members) - saved)
        left_over = sorted(saved - set(self._members))
        if missing or left_over:
            raise InvalidInputError(
                f"The checkpoint of step {manifest.step} is of another shape than cluster {self._config.name!r}: it "
                f"has no workspace {', '.join(missing) or '(none is missing)'}, and the cluster has no workspace "
                f"{', '.join(left_over) or '(none is left over)'}. This version restores onto the same workspaces.",
                missing=missing,
                left_over=left_over,
            )

    @asynccontextmanager
    async def _exclusively(self, what: str) -> AsyncGenerator[None]:
        if self._operation is not None:
            raise ConflictError(
                f"Cluster {self._config.name!r} is busy with a {self._operation}; the {what} was not begun. Try again "
                f"when it has ended.",
                running=self._operation,
            )
        self._operation = what
        try:
            yield
        finally:
            self._operation = None

    async def _carry_out(self, operation: Operation, publish: Callable[[Any], Any] | None) -> Any:
        self._run = ProtocolRun(operation, call=self._call_member, publish=publish)
        try:
            return await self._run.to_the_end()
        finally:
            self._run = None

    async def _call_member(self, action: Call) -> Any:
        member = self._members[action.workspace].view
        try:
            return await getattr(member.actor, action.method).remote(*action.arguments)
        except RayActorError:
            raise await self.lost_error(action.workspace) from None
        except RayError as error:
            raise unwrapped(error, f"workspace {action.workspace!r}") from None


def _restore_barrier() -> str:
    return f"restore {uuid.uuid4().hex[:12]}"


async def _awaited(reference: Any) -> Any:
    return await reference
