"""The job behind ``blobspace demo``: real training, real kills, and a proof that nothing was lost.

``training`` is what is trained, ``driver`` the loop that a user would write, ``supervisor`` the part of fate:
it starts local Ray, kills processes, and compares the ends. ``narrator`` tells the story.

Importing this package loads no Ray; :func:`main` does.
"""

from __future__ import annotations

import importlib
import os

__all__ = ["main"]


def main(*, as_json: bool = False, quick: bool = False, keep: str | os.PathLike[str] | None = None) -> int:
    """Train twice, once in peace and once with two kills, and compare the parameters bit by bit.

    Args:
        as_json: Write one JSON document to standard output at the end, and nothing else.
        quick: Fewer steps and a lower bar for the accuracy; the same kills.
        keep: An empty or new folder for the checkpoints of the interrupted run (``checkpoints``) and the quiet
            run's parameters (``quiet.npz``); None means a temporary folder.

    Returns:
        The exit code: 0 if both runs end with the same bits and enough accuracy, 1 if not or if anything failed,
        2 if scikit-learn is missing, 130 after Ctrl-C. Whatever was started has ended.
    """
    return importlib.import_module(".supervisor", __name__).main(as_json=as_json, quick=quick, keep=keep)
