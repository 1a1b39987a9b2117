"""What a user holds: a workspace's verbs, called on its actor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError

from ..ops.definitions import NetDef, OperatorDef, operator_def
from ..ops.errors import BlobspaceError, InvalidInputError
from ..ops.net import Net
from ..ops.values import check_name, normalize_value
from .memory import MemoryStatistics
from .names import check_workspace_name
from .ray_errors import unwrapped


class WorkspaceHandle:
    """A workspace somewhere in the cluster, with the verbs of :class:`~blobspace.workspace_actors.Workspace`.

    Each verb waits for its answer. Calls that change or read blobs run in the workspace in the order in which
    this handle's process made them; names and statistics answer while they run. Every verb also comes as
    ``handle.submit("run_net", "train", iterations=10)``, which returns at once with a Ray object reference.

    Args:
        name: The workspace's name.
        find_actor: Returns the present actor; after ``cluster.recover()`` it is another one.
        on_lost: Makes the error to raise when the process is gone.
        child: Path of a child workspace, ``""`` for the workspace itself.

    Every verb raises :class:`WorkspaceLostError` when the workspace's process or node is gone.
    """

    def __init__(
        self,
        name: str,
        *,
        find_actor: Callable[[], Any],
        on_lost: Callable[[str, BlobspaceError], BlobspaceError],
        child: str = "",
    ) -> None:
        self._name = name
        self._find_actor = find_actor
        self._on_lost = on_lost
        self._child = child

    @property
    def name(self) -> str:
        """The workspace's name; a child's is ``parent:path``."""
        return f"{self._name}:{self._child}" if self._child else self._name

    # --- blobs ---------------------------------------------------------------------------------------------

    def create_blob(self, name: str) -> None:
        """Make an uninitialised blob; one that is there already stays as it is."""
        self._get("create_blob", check_name(name))

    def feed_blob(self, name: str, value: object, *, copy: bool = True) -> None:
        """Give a blob a value. See :meth:`Workspace.feed_blob`.

        The caller's array stays the caller's: it travels by Ray's object store, and the workspace copies it into
        memory of its own. ``copy=False`` lets the workspace keep the object store's read-only view instead,
        for inputs that are soon replaced; it pins that memory as long as the blob shows it.
        """
        self._get("feed_blob", name, value, copy=copy)

    def fetch_blob(self, name: str) -> Any:
        """Return a blob's value: an array (read-only, as all that Ray brings), a string tensor, or a plain value."""
        return self._get("fetch_blob", name)

    def peek_blob(self, name: str, *, seconds: float = 5.0) -> Any:
        """Return a blob's value as of the next iteration boundary, while a net may be running."""
        return self._get("peek_blob", name, seconds=seconds)

    def has_blob(self, name: str) -> bool:
        """Whether the workspace or an ancestor has a blob of that name."""
        return self._get("has_blob", name)

    def remove_blob(self, name: str) -> None:
        """Remove a blob."""
        self._get("remove_blob", name)

    def reset_blob(self, name: str) -> None:
        """Keep a blob's name and drop its value."""
        self._get("reset_blob", name)

    def blobs(self) -> list[str]:
        """Return all names in Caffe2's order."""
        return self._get("blobs")

    def local_blobs(self) -> list[str]:
        """Return the workspace's own names, sorted bytewise."""
        return self._get("local_blobs")

    def reset(self) -> None:
        """Drop all blobs, nets and children."""
        self._get("reset")

    # --- operators and nets --------------------------------------------------------------------------------

    def run_operator(
        self,
        type: str | OperatorDef,  # noqa: A002  (Caffe2's word)
        inputs: Sequence[str] = (),
        outputs: Sequence[str] = (),
        **args: Any,
    ) -> None:
        """Run one operator once, in the workspace. See :meth:`Workspace.run_operator`."""
        self._get("run_operator", type, inputs, outputs, **args)

    def create_net(self, net: Net | NetDef, *, overwrite: bool = False) -> None:
        """Compile a net in the workspace and keep it under its name."""
        self._get("create_net", net, overwrite=overwrite)

    def run_net(self, name: str, iterations: int = 1) -> None:
        """Run a created net ``iterations`` times in one call. A checkpoint may stop it between two iterations."""
        self._get("run_net", name, iterations=iterations)

    def run_net_once(self, net: Net | NetDef) -> None:
        """Compile a net, run it once, and forget it."""
        self._get("run_net_once", net)

    def delete_net(self, name: str) -> None:
        """Forget a net; its blobs stay."""
        self._get("delete_net", name)

    def nets(self) -> list[str]:
        """Return the names of the created nets."""
        return self._get("nets")

    # --- children and statistics ---------------------------------------------------------------------------

    def child(self, path: str, *, create: bool = False) -> WorkspaceHandle:
        """Return a handle of a child workspace, which shares this one's process and blobs.

        Args:
            path: The child's name; ``"a/b"`` for a child of a child.
            create: Make it if it is missing.
        """
        for part in path.split("/"):
            check_workspace_name(part)
        whole = f"{self._child}/{path}" if self._child else path
        if create:
            self._wait(self._actor().create_child.remote(whole))
        return WorkspaceHandle(self._name, find_actor=self._find_actor, on_lost=self._on_lost, child=whole)

    def children(self) -> list[str]:
        """Return the names of the child workspaces."""
        return self._get("children")

    def remove_child(self, name: str) -> None:
        """Remove a child workspace with everything in it."""
        self._get("remove_child", name)

    def memory(self) -> MemoryStatistics:
        """Return the bytes of the workspace's process."""
        return self._wait(self._actor().memory.remote())

    # --- calls ---------------------------------------------------------------------------------------------

    def submit(self, verb: str, *args: Any, **kwargs: Any) -> Any:
        """Make a call and return its Ray object reference at once; ``ray.get`` gives the result or the error.

        Args:
            verb: The name of a method of this class, such as ``"run_net"``.
            *args: Its arguments.
            **kwargs: Likewise.

        Raises:
            InvalidInputError: There is no such verb, or its arguments do not fit. (A wrong name must never reach
                the actor: Ray ends an actor that is called in a concurrency group which it does not have.)
        """
        prepare = _VERBS.get(verb)
        if prepare is None:
            raise InvalidInputError(f"A workspace has no verb {verb!r}. It has: {', '.join(sorted(_VERBS))}.")
        try:
            method, arguments = prepare(*args, **kwargs)
        except TypeError as error:
            raise InvalidInputError(f"The arguments of {verb} do not fit: {error}.", verb=verb) from None
        return getattr(self._actor(), method).remote(self._child, *arguments)

    def _get(self, verb: str, *args: Any, **kwargs: Any) -> Any:
        return self._wait(self.submit(verb, *args, **kwargs))

    def _wait(self, reference: Any) -> Any:
        try:
            return ray.get(reference)
        except RayActorError as error:
            raise self._on_lost(self._name, unwrapped(error, f"workspace {self._name!r}")) from None
        except RayTaskError as error:
            raise unwrapped(error, f"workspace {self._name!r}") from None

    def _actor(self) -> Any:
        return self._find_actor()

    def __repr__(self) -> str:
        return f"WorkspaceHandle({self.name!r})"


def _definition(net: Net | NetDef) -> NetDef:
    return net.definition() if isinstance(net, Net) else net


def _feed(name: str, value: object, *, copy: bool = True) -> tuple[str, tuple[Any, ...]]:
    # What cannot be stored need not travel first; and what comes in through DLPack travels as a NumPy array, so that
    # the workspace's machine need not have the library that it came from.
    return "feed_blob", (name, normalize_value(check_name(name), value)[1], copy)


# Each verb turns its public arguments into those of the actor's method; this is where they are checked, on the
# caller's side.
_VERBS: dict[str, Callable[..., tuple[str, tuple[Any, ...]]]] = {
    "create_blob": lambda name: ("create_blob", (name,)),
    "feed_blob": _feed,
    "fetch_blob": lambda name: ("fetch_blob", (name,)),
    "peek_blob": lambda name, *, seconds=5.0: ("peek_blob", (name, seconds)),
    "has_blob": lambda name: ("has_blob", (name,)),
    "remove_blob": lambda name: ("remove_blob", (name,)),
    "reset_blob": lambda name: ("reset_blob", (name,)),
    "blobs": lambda: ("blobs", ()),
    "local_blobs": lambda: ("local_blobs", ()),
    "reset": lambda: ("reset", ()),
    "run_operator": lambda *args, **kwargs: ("run_operator", (operator_def(*args, **kwargs),)),
    "create_net": lambda net, *, overwrite=False: ("create_net", (_definition(net), overwrite)),
    "run_net": lambda name, iterations=1: ("run_net", (name, iterations)),
    "run_net_once": lambda net: ("run_net_once", (_definition(net),)),
    "delete_net": lambda name: ("delete_net", (name,)),
    "nets": lambda: ("nets", ()),
    "children": lambda: ("children", ()),
    "remove_child": lambda name: ("remove_child", (name,)),
}
