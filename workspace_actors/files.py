"""Local files for the operators Save and Load: whole files, atomically."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from ..ops.errors import NotFoundError, StorageError


class LocalFiles:
    """Reads and writes files of this machine."""

    def read(self, path: str) -> bytes:
        """Return a file's content.

        Raises:
            NotFoundError: There is no such file.
            StorageError: It cannot be read.
        """
        try:
            return Path(path).read_bytes()
        except FileNotFoundError:
            raise NotFoundError(f"There is no file {path!r}.", path=path) from None
        except OSError as error:
            raise StorageError(f"File {path!r} cannot be read: {error.strerror or error}.", path=path) from error

    def write_atomically(self, path: str, parts: Iterator[bytes]) -> None:
        """Write a whole file or nothing: the old content of ``path`` stays until the new one is durable.

        Raises:
            StorageError: It cannot be written; a file of that name is as it was.
        """
        target = Path(path)
        try:
            descriptor, temporary = tempfile.mkstemp(prefix=f".{target.name[:40]}.", dir=target.parent)
        except OSError as error:
            raise StorageError(
                f"File {path!r} cannot be written: {error.strerror or error}. Its folder must exist and be writable.",
                path=path,
            ) from error
        try:
            with os.fdopen(descriptor, "wb") as file:
                for part in parts:
                    file.write(part)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
            _sync_directory(target.parent)
        except BaseException as error:
            with suppress(OSError):
                os.unlink(temporary)
            if isinstance(error, OSError) and not isinstance(error, StorageError):
                raise StorageError(
                    f"File {path!r} could not be written: {error.strerror or error}. A file of that name, if there "
                    f"was one, is as it was.",
                    path=path,
                ) from error
            raise


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
