"""How a command ends: its exit code, and its error as a text or a JSON document in a terminal's words."""

from __future__ import annotations


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


def run(words: Sequence[str]) -> int:
    as_json = "--json" in words
    try:
        result = app(args=list(words), prog_name="blobspace", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except typer.Exit as stop:
        return stop.exit_code
    except (KeyboardInterrupt, typer.Abort):
        sys.stderr.write("interrupted\n")
        return _INTERRUPTED
    except ReaderGoneError:
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
        print_json({"error": {"kind": error.kind, "message": str(error), "fields": error.fields}})
    else:
        sys.stderr.write(f"error: {error}\n")
    return EXIT_CODES.get(error.kind, EXIT_CODES["internal"])
