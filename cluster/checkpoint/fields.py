"""Checks of single fields of a record, and the two errors that they end in.

A check raises ``InvalidInputError`` with ``field``, ``expected`` and ``found``, because the same code checks what a
writer makes. Where the record came from storage, ``format`` turns that into the error of :func:`corrupt`.
"""

from __future__ import annotations

import reprlib
from collections.abc import Iterable
from typing import Any, cast

from ...ops.errors import CorruptCheckpointError, InvalidInputError
from ...ops.values import check_name, check_plain
from .layout import is_data_path, is_save_id

HASH_BYTES = 16
MAX_DIMENSIONS = 64
_INT64 = 2**63


def corrupt(
    file: str, *, expected: object, found: object, field: str | None = None, **more: object
) -> CorruptCheckpointError:
    """Return the error for a damaged file, in the one wording that all readers share."""
    place = f"{file}, {field}" if field else file
    extra = "".join(f", {name} {value!r}" for name, value in more.items())
    fields: dict[str, object] = {"file": file, "field": field} if field else {"file": file}
    return CorruptCheckpointError(
        f"{place}{extra}: expected {expected}, found {found}. The file is not what was written, and reading again "
        f"does not help: choose an older checkpoint.",
        **fields,
        **more,
        expected=str(expected),
        found=str(found),
    )


def malformed(field: str, expected: object, found: object) -> InvalidInputError:
    """Return the error for a field that is not as FORMAT.md says; ``field``, ``expected`` and ``found`` are in it."""
    # reprlib: what was found may be as large as the record.
    shown = found if isinstance(found, str) and len(found) < 200 else reprlib.repr(found)
    return InvalidInputError(
        f"Checkpoint field {field}: expected {expected}, found {shown}.", field=field, expected=expected, found=shown
    )


def as_map(field: str, value: object) -> dict[Any, Any]:
    """Return ``value`` if it is a map."""
    if not isinstance(value, dict):
        raise malformed(field, "a map", value)
    return cast("dict[Any, Any]", value)


def as_list(field: str, value: object, limit: int) -> list[Any]:
    """Return ``value`` if it is a list of at most ``limit`` entries."""
    if not isinstance(value, list):
        raise malformed(field, "a list", value)
    items = cast("list[Any]", value)
    check_count(field, items, limit)
    return items


def check_count(field: str, value: Any, limit: int) -> None:
    """Refuse more than ``limit`` entries."""
    if len(value) > limit:
        raise malformed(field, f"at most {limit} entries", f"{len(value)} entries")


def check_integer(field: str, value: object, low: int, high: int) -> None:
    """Refuse what is no integer from ``low`` to below ``high``; a bool is none."""
    if type(value) is not int or not low <= value < high:
        raise malformed(field, f"an integer from {low} to {high - 1}", value)


def check_equal(field: str, value: object, expected: object) -> None:
    """Refuse another value, or an equal one of another type."""
    if value != expected or type(value) is not type(expected):
        raise malformed(field, repr(expected), value)


def check_hash(field: str, value: object) -> None:
    """Refuse what is not 16 bytes."""
    if type(value) is not bytes or len(value) != HASH_BYTES:
        raise malformed(field, f"{HASH_BYTES} bytes", value)


def check_text(field: str, value: object, limit_bytes: int) -> None:
    """Refuse what is no UTF-8 text of at most ``limit_bytes`` without NUL."""
    if type(value) is not str:
        raise malformed(field, "text", value)
    try:
        length = len(value.encode("utf-8"))
    except UnicodeEncodeError:
        raise malformed(field, "UTF-8 text", value) from None
    if length > limit_bytes or "\0" in value:
        raise malformed(field, f"at most {limit_bytes} bytes of UTF-8 without NUL", value)


def check_named(field: str, value: object, what: str) -> None:
    """Refuse what may name no blob, workspace or cluster."""
    try:
        check_name(value, what)
    except InvalidInputError:
        raise malformed(field, f"a {what} name (1 to 1,024 bytes of UTF-8, no NUL)", value) from None


def check_save_id(field: str, value: object) -> None:
    """Refuse what may be no save id."""
    if not is_save_id(value):
        raise malformed(field, "a save id (1 to 64 letters, digits, '_' or '-')", value)


def check_data_path(field: str, value: object) -> None:
    """Refuse what is no path of an index or a pack."""
    if not is_data_path(value):
        raise malformed(field, "a path data/<save id>/<file>", value)


def check_shape(field: str, value: tuple[int, ...]) -> None:
    """Refuse what may be no shape."""
    check_count(field, value, MAX_DIMENSIONS)
    for size in value:
        check_integer(field, size, 0, _INT64)


def check_unique(field: str, values: Iterable[object]) -> None:
    """Refuse a second entry of the same identity."""
    seen: set[object] = set()
    for position, value in enumerate(values):
        if value in seen:
            raise malformed(f"{field}[{position}]", "each entry once", value)
        seen.add(value)


def check_plain_map(field: str, value: object) -> None:
    """Refuse what is no map of plain values."""
    if type(value) is not dict:
        raise malformed(field, "a map", value)
    try:
        check_plain(cast("dict[Any, Any]", value), where=field)
    except InvalidInputError as error:
        raise malformed(field, "plain values (None, bool, int, float, str, bytes, list, dict)", error.message) from None
