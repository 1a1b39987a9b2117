"""The one error tree of blobspace, grouped by what a handler does about it.

::

    BlobspaceError
    ├── InvalidInputError (ValueError)    the caller fixes the input
    ├── NotFoundError (KeyError)          the blob, workspace, net or checkpoint is not there
    ├── ConflictError                     re-read, then retry
    ├── WorkspaceLostError                recreate and resume
    ├── DeadlineError (TimeoutError)      somebody did not answer in time
    ├── MemoryLimitError (MemoryError)    a workspace's memory limit was passed
    ├── StorageError (OSError)            the storage refused: space, permission, not shared
    ├── CorruptCheckpointError            do not retry; choose an older checkpoint
    └── InternalError                     our bug; report it

Errors cross process borders, and there an exception is rebuilt from what its ``__reduce__`` gives. So the
root class alone has state (a message and named fields) and the one ``__reduce__``; subclasses add a kind.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar


def _rebuild(cls: type[BlobspaceError], message: str, fields: dict[str, object], notes: list[str]) -> BlobspaceError:
    error = cls(message, **fields)
    for note in notes:
        error.add_context(note)
    return error


class BlobspaceError(Exception):
    """Root of every error that blobspace raises on purpose.

    Args:
        message: What, where, expected, found, way out; complete sentences.
        **fields: The same facts by name, plain values only (``workspace="w0"``), for handlers and ``--json``.
    """

    kind: ClassVar[str] = "error"

    def __init__(self, message: str, **fields: object) -> None:
        super().__init__(message)
        self.message = message
        self.fields = fields
        self.notes: list[str] = []

    def __str__(self) -> str:
        return "\n".join([self.message, *self.notes])

    def __reduce__(self) -> tuple[Callable[..., BlobspaceError], tuple[object, ...]]:
        return _rebuild, (type(self), self.message, dict(self.fields), list(self.notes))

    def add_context(self, note: str) -> None:
        """Append a line of context that survives a process border (``__cause__`` does not)."""
        self.notes.append(note)


class InvalidInputError(BlobspaceError, ValueError):
    """The caller fixes it: names, shapes, dtypes, unknown operators or arguments, configuration."""

    kind = "invalid_input"


class NotFoundError(BlobspaceError, KeyError):
    """A blob, workspace, net, cluster or checkpoint of that name is not there."""

    kind = "not_found"


class ConflictError(BlobspaceError):
    """Somebody else was first: the checkpoint exists, the generation is stale. Re-read, then retry."""

    kind = "conflict"


class WorkspaceLostError(BlobspaceError):
    """A workspace's process or node is gone, and its blobs with it. Recover, then resume."""

    kind = "workspace_lost"


class DeadlineError(BlobspaceError, TimeoutError):
    """A wait ended without its answer; the text names what was awaited, from whom, and how long."""

    kind = "deadline"


class MemoryLimitError(BlobspaceError, MemoryError):
    """A workspace's memory limit would have been passed; nothing was lost and the workspace goes on."""

    kind = "memory_limit"


class StorageError(BlobspaceError, OSError):
    """The storage refused: out of space, unreachable, no permission, or not shared between nodes."""

    kind = "storage"


class CorruptCheckpointError(BlobspaceError):
    """Stored bytes are not what was written. Retrying does not help; choose an older checkpoint."""

    kind = "corrupt_checkpoint"


class InternalError(BlobspaceError):
    """A bug of blobspace. Please report it with this text."""

    kind = "internal"
