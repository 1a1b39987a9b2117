"""Names below a checkpoint root. They never derive from the name of a blob, a workspace or a cluster.

::

    checkpoints/00000000000000001200.manifest      the commit of step 1,200
    data/<save id>/w00000.index                    one workspace's index
    data/<save id>/w00000-p00000.safetensors       its packs

Every path is relative to the root, has ``/`` between its parts, and is checked here before it reaches a store:
a record that says ``../../etc/passwd`` is refused, whoever wrote it.
"""

from __future__ import annotations

import re

from ...ops.errors import InvalidInputError

MANIFEST_FOLDER = "checkpoints"
DATA_FOLDER = "data"
STEP_LIMIT = 2**63
MAX_WORKSPACES = 100_000
MAX_PACKS_PER_WORKSPACE = 100_000

_PART = re.compile(r"[A-Za-z0-9_.-]{1,255}", re.ASCII)
_SAVE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}", re.ASCII)
_DATA_PATH = re.compile(r"data/([A-Za-z0-9][A-Za-z0-9_-]{0,63})/[A-Za-z0-9][A-Za-z0-9_.-]{0,127}", re.ASCII)
_MANIFEST_PATH = re.compile(r"checkpoints/([0-9]{20})\.manifest", re.ASCII)
_WRITER_PREFIX = re.compile(r"data/[^/]+/w[0-9]{5}", re.ASCII)


def is_step(value: object) -> bool:
    """Whether ``value`` may be a step: an integer, at least 0, below 2**63."""
    return type(value) is int and 0 <= value < STEP_LIMIT


def is_save_id(value: object) -> bool:
    """Whether ``value`` may be a save id: 1 to 64 of ``A-Z a-z 0-9 _ -``, the first a letter or a digit."""
    return isinstance(value, str) and _SAVE_ID.fullmatch(value) is not None


def is_data_path(value: object) -> bool:
    """Whether ``value`` may name an index or a pack in a record: ``data/<save id>/<file>`` and nothing else."""
    return isinstance(value, str) and _DATA_PATH.fullmatch(value) is not None


def split_path(path: str) -> list[str]:
    """Return the parts of a relative path below the root.

    Raises:
        InvalidInputError: It is empty, absolute, has ``.``, ``..`` or an empty part, or an odd character.
    """
    parts = path.split("/")
    if any(part in (".", "..") or _PART.fullmatch(part) is None for part in parts):
        raise InvalidInputError(
            f"{path!r:.200} is no path below a checkpoint root. Expected parts of letters, digits, '_', '.' and '-', "
            f"separated by '/', none of them empty, '.' or '..', and no '/' in front.",
            path=path[:200],
        )
    return parts


def manifest_path(step: int) -> str:
    """Return the path of a step's manifest.

    Raises:
        InvalidInputError: The step is no integer from 0 to 2**63 - 1.
    """
    if not is_step(step):
        raise InvalidInputError(f"A step is an integer from 0 to 2**63 - 1; found {step!r:.80}.", found=repr(step)[:80])
    return f"{MANIFEST_FOLDER}/{step:020d}.manifest"


def step_of(path: str) -> int | None:
    """Return the step whose manifest ``path`` is; None for temporary and foreign files."""
    match = _MANIFEST_PATH.fullmatch(path)
    if match is None or int(match[1]) >= STEP_LIMIT:
        return None
    return int(match[1])


def index_path(save_id: str, ordinal: int) -> str:
    """Return the path of the index that the workspace with this ordinal writes in this save."""
    return f"{_writer_prefix(save_id, ordinal)}.index"


def pack_path(save_id: str, ordinal: int, number: int) -> str:
    """Return the path of pack ``number`` that the workspace with this ordinal writes in this save."""
    if not 0 <= number < MAX_PACKS_PER_WORKSPACE:
        raise InvalidInputError(
            f"A workspace writes at most {MAX_PACKS_PER_WORKSPACE} packs in one save; found number {number}. "
            f"Choose a larger pack target.",
            found=number,
        )
    return f"{_writer_prefix(save_id, ordinal)}-p{number:05d}.safetensors"


def save_id_of(path: str) -> str | None:
    """Return the save that a data path belongs to; None if it is no data path."""
    match = _DATA_PATH.fullmatch(path)
    return None if match is None else match[1]


def writer_of(path: str) -> str | None:
    """Return what all files of one writer in one save begin with (``data/<save id>/w00000``)."""
    match = _WRITER_PREFIX.match(path)
    return None if match is None else match[0]


def _writer_prefix(save_id: str, ordinal: int) -> str:
    if not is_save_id(save_id):
        raise InvalidInputError(
            f"A save id has 1 to 64 letters, digits, '_' or '-' and begins with a letter or a digit; found "
            f"{save_id!r:.80}.",
            found=repr(save_id)[:80],
        )
    if not 0 <= ordinal < MAX_WORKSPACES:
        raise InvalidInputError(
            f"A workspace's ordinal is from 0 to {MAX_WORKSPACES - 1}; found {ordinal}.", found=ordinal
        )
    return f"{DATA_FOLDER}/{save_id}/w{ordinal:05d}"
