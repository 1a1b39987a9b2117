"""How a command ends: its exit code, and its error as a text or a JSON document, in the words of a terminal."""

from __future__ import annotations

import shlex
import sys
import traceback
from collections.abc import Mapping, Sequence
from typing import Any, cast

import typer

from ...ops.errors import BlobspaceError, InternalError, InvalidInputError
from .output import print_json

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
INTERRUPTED, PIPE_CLOSED = 130, 141
# What the library tells who calls it, and what that is in a terminal. {cluster} becomes the --cluster of this command.
PHRASES: Mapping[str, str] = {
    "cluster.recover()": "'blobspace recover{cluster}'",
    "replace=True": "--replace",
    "root=…": "--root ROOT",
}
# Every error of usage, whichever copy of click this typer brings along.
_USAGE_ERROR = cast("type[Exception]", typer.BadParameter.__base__)


def as_blobspace_error(error: Exception) -> BlobspaceError:
    """Return the error of the one tree for whatever ended a command."""
    if isinstance(error, BlobspaceError):
        return error
    if isinstance(error, _USAGE_ERROR):
        context: Any = getattr(error, "ctx", None)
        path = "blobspace" if context is None else context.command_path
        message = cast("Any", error).format_message().rstrip(".")
        return InvalidInputError(f"{message}. See '{path} --help'.")
    ray = sys.modules.get("ray")
    if ray is not None and isinstance(error, ray.exceptions.RayError):
        from ...workspace_actors.ray_errors import unwrapped  # noqa: PLC0415  (loads Ray, which is loaded)

        return unwrapped(error, "the cluster")
    place = traceback.extract_tb(error.__traceback__)[-1]
    return InternalError(
        f"{type(error).__name__}: {error} (at {place.filename}:{place.lineno}). This is a bug of blobspace; please "
        f"report it with this text.",
        type=type(error).__name__,
    )


def report(error: BlobspaceError, words: Sequence[str]) -> int:
    """Print an error as the words of the command ask for, and return the exit code."""
    message = in_terminal_words(str(error), words)
    if "--json" in words:
        print_json({"error": {"kind": error.kind, "message": message, "fields": error.fields}})
    else:
        sys.stderr.write(f"error: {message}\n")
    return EXIT_CODES.get(error.kind, EXIT_CODES["internal"])


def in_terminal_words(message: str, words: Sequence[str]) -> str:
    """Return an error's text with commands and options in place of the library's calls and arguments."""
    for phrase, command in PHRASES.items():
        message = message.replace(phrase, command.format(cluster=_cluster_option(words)))
    return message


def _cluster_option(words: Sequence[str]) -> str:
    for word, following in zip(words, [*words[1:], ""], strict=True):
        if word == "--cluster":
            return f" --cluster {shlex.quote(following)}"
        if word.startswith("--cluster="):
            return f" {shlex.quote(word)}"
    return ""
