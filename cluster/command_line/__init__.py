"""The script ``blobspace``: clusters and checkpoints from a terminal, or from another script with ``--json``.

A command (``commands.py``) gathers plain values (``live_facts.py``, ``stored_facts.py``), then shows them as a table
(``tables.py``) or prints them as one JSON document (``output.py``). Errors (``exit_codes.py``) go to stderr as text;
with ``--json`` to stdout as ``{"error": {"kind", "message", "fields"}}``.

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

import os
import sys
from collections.abc import Sequence

import typer

from .commands import app
from .exit_codes import EXIT_CODES, INTERRUPTED, PIPE_CLOSED, as_blobspace_error, report
from .output import ReaderGoneError

__all__ = ["EXIT_CODES", "main"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit with its code.

    Args:
        arguments: Words after the program's name; None means the process's own.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    sys.exit(_run(words))


def _run(words: Sequence[str]) -> int:
    try:
        result = app(args=list(words), prog_name="blobspace", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except typer.Exit as stop:
        return stop.exit_code
    except (KeyboardInterrupt, typer.Abort):
        sys.stderr.write("interrupted\n")
        return INTERRUPTED
    except ReaderGoneError:
        # Whoever reads has seen enough. Python would complain again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PIPE_CLOSED
    except Exception as error:  # noqa: BLE001  (the shell's last resort: an error becomes a text and an exit code)
        return report(as_blobspace_error(error), words)
