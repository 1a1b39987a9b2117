"""What may name a workspace."""

from __future__ import annotations

import re

from ..ops.errors import InvalidInputError

_WORKSPACE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}\Z")


def check_workspace_name(name: object) -> str:
    """Return ``name`` if it may name a workspace: letters, digits, ``.``, ``_``, ``-``; at most 128 characters.

    Raises:
        InvalidInputError: It may not.
    """
    if not isinstance(name, str) or not _WORKSPACE_NAME.match(name):
        raise InvalidInputError(
            f"{name!r:.150} cannot name a workspace. Expected 1 to 128 characters: letters, digits, '.', '_' and '-', "
            f"the first one a letter or a digit.",
            name=str(name)[:150],
        )
    return name


def check_workspace_path(path: str) -> str:
    """Return ``path`` if it may name a child (``"a/b"``: the child ``b`` of the child ``a``); ``""`` is the root.

    Raises:
        InvalidInputError: It may not.
    """
    for part in path.split("/") if path != "" else ():
        check_workspace_name(part)
    return path
