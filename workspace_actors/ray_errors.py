"""What Ray raises, turned into the one error tree."""

from __future__ import annotations

from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

from ..ops.errors import BlobspaceError, DeadlineError, InternalError, WorkspaceLostError


def unwrapped(error: Exception, who: str) -> BlobspaceError:
    """Return the error to raise for one that came out of ``ray.get``.

    Args:
        error: What Ray raised.
        who: Whom the call was made to, for the text: ``"workspace 'w0'"``.
    """
    if isinstance(error, RayTaskError):
        cause = getattr(error, "cause", None)
        if isinstance(cause, BlobspaceError):
            return cause
        return InternalError(f"A call to {who} failed in a way that blobspace does not expect: {cause!r}.\n{error}")
    if isinstance(error, GetTimeoutError):
        return DeadlineError(f"No answer came in time from {who}.", who=who)
    if isinstance(error, RayActorError):
        if error.args and isinstance(error.args[0], RayTaskError):
            # The actor never came to life: what its constructor raised says why.
            return unwrapped(error.args[0], who)
        return WorkspaceLostError(
            f"The process of {who} is gone: {first_line(error)} Recover the cluster (cluster.recover()), then resume.",
            who=who,
        )
    return InternalError(f"A call to {who} failed: {error!r}.")


def first_line(error: Exception) -> str:
    """Return the first line of an error's text that says something."""
    lines = [line.strip() for line in str(error).splitlines()]
    text = next((line for line in lines if line), type(error).__name__)
    return text if text.endswith(".") else f"{text}."
