"""Where checkpoint files live: the ``Store`` contract, and the one for local and shared POSIX paths.

A store knows nothing of checkpoints. It writes files that are durable when the call returns, publishes small
files atomically, and reads ranges. Everything that a checkpoint promises after a crash rests on these few verbs,
so each says what holds when it returns, when it raises, and when the process dies inside it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
from collections.abc import Generator, Iterable, Sequence
from typing import Protocol, TypeAlias

from ...ops.errors import BlobspaceError, ConflictError, NotFoundError, StorageError
from .layout import split_path

Buffer: TypeAlias = "bytes | bytearray | memoryview"

_SMALL_BYTES = 64 * 2**10
_GATHER_BYTES = 2**20
_MAX_TEMPORARY_FILES = 10_000

# What file systems without hard links answer to link(2): FAT and many FUSE ones (object stores mounted as folders).
_NO_HARD_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)

_WAYS_OUT = {
    errno.ENOSPC: "The disk is full: free space or choose another root.",
    errno.EDQUOT: "The disk quota is used up: free space or choose another root.",
    errno.EFBIG: "The file would be larger than the file system or the process limit (ulimit -f) allows.",
    errno.EROFS: "The file system is read-only: choose another root, or mount it for writing.",
    errno.EACCES: "This user has no permission: change the owner or mode, or choose another root.",
    errno.EPERM: "This user has no permission: change the owner or mode, or choose another root.",
    errno.ENOTDIR: "A file, or a symbolic link, is in the place of a folder: move it away, or choose another root.",
    errno.EISDIR: "A folder is in the place of a file: move it away, or choose another root.",
    errno.ELOOP: "A symbolic link is in the place of a file; links below a root are never followed.",
    errno.ESTALE: "The network file system lost the file: check the mount on this node.",
    errno.EIO: "The device reported an error: check the disk or the mount.",
    errno.EMFILE: "Too many open files: raise ulimit -n.",
}


class Store(Protocol):
    """A flat set of files named by relative paths (``data/save/w00000.index``), as ``layout`` checks them.

    Every method raises ``InvalidInputError`` for a path that could leave the root, and ``StorageError`` (path,
    the system's reason, way out) when the storage refuses. A store may be used from several threads at once.
    """

    @property
    def location(self) -> str:
        """The root, for people."""
        ...

    def write(self, path: str, buffers: Iterable[Buffer]) -> int:
        """Write a new file from ``buffers``, in order, without joining them. Returns its size in bytes.

        After success the bytes and every folder on the way are durable. After any error, one that ``buffers``
        itself raises included, no file is there. A process that dies inside leaves a partial file or none.

        Raises:
            ConflictError: The file exists; it is untouched.
        """
        ...

    def put_if_absent(self, path: str, data: Buffer) -> None:
        """Publish a small file, whole, durably, unless one is there. Of several callers exactly one succeeds.

        A process that dies inside leaves the whole file or none, never a part. After a ``StorageError`` the file
        may be there all the same: read it back to know.

        Raises:
            ConflictError: The file exists, durably, and is untouched.
        """
        ...

    def replace(self, path: str, data: Buffer) -> None:
        """Publish a small file, whole, durably, in place of the one there, if any.

        Readers, and whoever looks after a crash, find the whole old file or the whole new one.
        """
        ...

    def read(self, path: str, offset: int = 0, length: int | None = None) -> bytes:
        """Return ``length`` bytes from ``offset`` (None: up to the end); fewer where the file ends.

        Raises:
            NotFoundError: There is no such file.
        """
        ...

    def readinto(self, path: str, offset: int, buffer: memoryview) -> int:
        """Fill ``buffer`` from ``offset``. Returns the bytes read: fewer than its size where the file ends.

        Raises:
            NotFoundError: There is no such file.
        """
        ...

    def size(self, path: str) -> int:
        """Return a file's size in bytes.

        Raises:
            NotFoundError: There is no such file.
        """
        ...

    def list_files(self, prefix: str) -> list[str]:
        """Return the paths of all files below the folder ``prefix``, sorted; none if there is no such folder."""
        ...

    def delete_tree(self, prefix: str) -> None:
        """Remove the folder or file ``prefix`` and all below it, durably. It is no error if nothing is there.

        A process that dies inside leaves a part of the tree.
        """
        ...


class LocalStore:
    """A store below a folder of a local disk or of a POSIX file system that all nodes share.

    The folder, and its parents, are made by the first write. Every folder below the root is opened step by step
    without following symbolic links, so nothing outside the root is ever read, written or removed.

    Args:
        root: The folder. It may itself be, or be reached through, a symbolic link.
    """

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self._root: str = os.path.abspath(os.fspath(root))

    def __repr__(self) -> str:
        return f"LocalStore({self._root!r})"

    @property
    def location(self) -> str:
        """The root folder's absolute path."""
        return self._root

    def write(self, path: str, buffers: Iterable[Buffer]) -> int:
        """See :meth:`Store.write`. The file appears under its name at once and grows there."""
        *folders, name = split_path(path)
        with self._refusals("write", path), self._opened(folders, create=True) as opened:
            try:
                byte_count = _write_new(opened[-1], name, buffers)
            except FileExistsError:
                raise self._exists(path) from None
            _sync_all(opened)
        return byte_count

    def put_if_absent(self, path: str, data: Buffer) -> None:
        """See :meth:`Store.put_if_absent`. Where hard links are missing, see ``_claim_and_rename``.

        Source: open(2), the notes on O_EXCL and link(2) as the portable way to publish a file once.
        """
        *folders, name = split_path(path)
        with self._refusals("publish", path), self._opened(folders, create=True) as opened:
            folder = opened[-1]
            temporary = _write_temporary(folder, name, data)
            try:
                os.link(temporary, name, src_dir_fd=folder, dst_dir_fd=folder, follow_symlinks=False)
                is_ours = True
            except FileExistsError:
                # A network file system may repeat a link whose reply was lost; the count of links tells.
                is_ours = os.stat(temporary, dir_fd=folder, follow_symlinks=False).st_nlink > 1
            except OSError as error:
                if error.errno not in _NO_HARD_LINKS:
                    raise
                is_ours = self._claim_and_rename(folder, temporary, name, path)
            finally:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(temporary, dir_fd=folder)
            # For the loser too: it may report the winner's file, which must then outlive a crash.
            _sync_all(opened)
            if not is_ours:
                raise self._exists(path)

    def replace(self, path: str, data: Buffer) -> None:
        """See :meth:`Store.replace`."""
        *folders, name = split_path(path)
        with self._refusals("replace", path), self._opened(folders, create=True) as opened:
            folder = opened[-1]
            temporary = _write_temporary(folder, name, data)
            try:
                os.replace(temporary, name, src_dir_fd=folder, dst_dir_fd=folder)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.unlink(temporary, dir_fd=folder)
                raise
            _sync_all(opened)

    def read(self, path: str, offset: int = 0, length: int | None = None) -> bytes:
        """See :meth:`Store.read`."""
        with self._refusals("read", path), self._opened_file(path) as file:
            rest = max(0, os.fstat(file).st_size - offset)
            buffer = bytearray(rest if length is None else min(rest, length))
            return bytes(memoryview(buffer)[: _fill(file, offset, memoryview(buffer))])

    def readinto(self, path: str, offset: int, buffer: memoryview) -> int:
        """See :meth:`Store.readinto`."""
        with self._refusals("read", path), self._opened_file(path) as file:
            return _fill(file, offset, buffer)

    def size(self, path: str) -> int:
        """See :meth:`Store.size`."""
        with self._refusals("read", path), self._opened_file(path) as file:
            return os.fstat(file).st_size

    def list_files(self, prefix: str) -> list[str]:
        """See :meth:`Store.list_files`. Files that a write left behind (``.*.tmp``) are listed too."""
        found: list[str] = []
        with self._refusals("list", prefix):
            try:
                with self._opened(split_path(prefix), create=False) as opened:
                    for folder, _, names, _ in os.fwalk(".", dir_fd=opened[-1], onerror=_raise):
                        found += [os.path.normpath(f"{prefix}/{folder}/{name}") for name in names]
            except FileNotFoundError:
                return []
        return sorted(found)

    def delete_tree(self, prefix: str) -> None:
        """See :meth:`Store.delete_tree`."""
        *folders, name = split_path(prefix)
        with self._refusals("delete", prefix):
            try:
                with self._opened(folders, create=False) as opened:
                    if stat.S_ISDIR(os.stat(name, dir_fd=opened[-1], follow_symlinks=False).st_mode):
                        shutil.rmtree(os.path.join(self._root, prefix))
                    else:
                        os.unlink(name, dir_fd=opened[-1])
                    _sync_all(opened)
            except FileNotFoundError:
                return

    def _claim_and_rename(self, folder: int, temporary: str, name: str, path: str) -> bool:
        """Publish without hard links. Still whole or nothing, still exactly one winner.

        Who creates the claim file may rename its own file into place, if none is there. A process that dies in
        between leaves the claim, and that one path then refuses until a person removes it: the price of a file
        system that can neither link nor rename-if-absent. All savers of a root must be of one sort, linking or not.
        """
        claim = f".{name}.claim"
        try:
            os.close(os.open(claim, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666, dir_fd=folder))
        except FileExistsError:
            raise ConflictError(
                f"{path} in {self._root}: another process is publishing it, or died while it did. If none is running, "
                f"remove the file {claim!r} beside it and try again.",
                path=path,
                root=self._root,
                claim=claim,
            ) from None
        try:
            try:
                os.stat(name, dir_fd=folder, follow_symlinks=False)
            except FileNotFoundError:
                os.replace(temporary, name, src_dir_fd=folder, dst_dir_fd=folder)
                return True
            return False
        finally:
            os.unlink(claim, dir_fd=folder)

    @contextlib.contextmanager
    def _opened(self, folders: Sequence[str], *, create: bool) -> Generator[list[int]]:
        """Open the root and each folder below it; yields their descriptors, the root's first."""
        opened: list[int] = []
        try:
            if create:
                _make_folders(self._root)
            opened.append(os.open(self._root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
            for name in folders:
                if create:
                    with contextlib.suppress(FileExistsError):
                        os.mkdir(name, dir_fd=opened[-1])
                flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
                opened.append(os.open(name, flags, dir_fd=opened[-1]))
            yield opened
        finally:
            for folder in opened:
                os.close(folder)

    @contextlib.contextmanager
    def _opened_file(self, path: str) -> Generator[int]:
        *folders, name = split_path(path)
        try:
            with self._opened(folders, create=False) as opened:
                # O_NONBLOCK: opening a FIFO that somebody put there must not hang.
                flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
                file = os.open(name, flags, dir_fd=opened[-1])
        except FileNotFoundError:
            raise NotFoundError(f"There is no file {path} in {self._root}.", path=path, root=self._root) from None
        try:
            if not stat.S_ISREG(os.fstat(file).st_mode):
                raise StorageError(
                    f"{path} in {self._root} is no regular file. Move it away.", path=path, root=self._root
                )
            yield file
        finally:
            os.close(file)

    @contextlib.contextmanager
    def _refusals(self, verb: str, path: str) -> Generator[None]:
        """Turn the system's errors into ``StorageError``; our own, some of which are OSErrors too, pass."""
        try:
            yield
        except BlobspaceError:
            raise
        except OSError as error:
            number = error.errno or 0
            way_out = _WAYS_OUT.get(number, "Check the path, the mount and the disk.")
            raise StorageError(
                f"Cannot {verb} {path} in {self._root}: {error.strerror or error}. {way_out}",
                path=path,
                root=self._root,
                errno_name=errno.errorcode.get(number, "unknown"),
            ) from error

    def _exists(self, path: str) -> ConflictError:
        return ConflictError(f"{path} exists already in {self._root}.", path=path, root=self._root)


def _make_folders(path: str) -> None:
    """Make a folder and its missing parents, each one durable in the folder above it."""
    if os.path.isdir(path):
        return
    above = os.path.dirname(path)
    if above != path:
        _make_folders(above)
    with contextlib.suppress(FileExistsError):
        os.mkdir(path)
    folder = os.open(above, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        _sync_folder(folder)
    finally:
        os.close(folder)


def _sync_all(folders: Sequence[int]) -> None:
    """Make a new name durable: in its folder, and that folder in those above.

    All of them each time, not just those this call created: another process may have created one and died before
    it synced it.
    """
    for folder in reversed(folders):
        _sync_folder(folder)


def _sync_folder(folder: int) -> None:
    try:
        os.fsync(folder)
    except OSError as error:
        # Some network and FUSE file systems cannot sync a folder, because they make names durable by themselves.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise


def _write_temporary(folder: int, name: str, data: Buffer) -> str:
    """Write a durable file beside ``name`` under a name of its own. No clock, no randomness: O_EXCL decides."""
    for number in range(_MAX_TEMPORARY_FILES):
        temporary = f".{name}.{number}.tmp"
        try:
            _write_new(folder, temporary, (data,))
        except FileExistsError:
            continue
        return temporary
    raise FileExistsError(errno.EEXIST, f"{_MAX_TEMPORARY_FILES} temporary files .{name}.*.tmp are in the way")


def _write_new(folder: int, name: str, buffers: Iterable[Buffer]) -> int:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    file = os.open(name, flags, 0o666, dir_fd=folder)
    try:
        try:
            byte_count = _write_buffers(file, buffers)
            os.fsync(file)
        finally:
            os.close(file)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name, dir_fd=folder)
        raise
    return byte_count


def _write_buffers(file: int, buffers: Iterable[Buffer]) -> int:
    """Write all buffers; small neighbours go out together, large ones straight from where they are."""
    byte_count = 0
    gathered = bytearray()
    for buffer in buffers:
        view = memoryview(buffer).cast("B")
        byte_count += view.nbytes
        if view.nbytes < _SMALL_BYTES:
            gathered += view
            if len(gathered) < _GATHER_BYTES:
                continue
            view = memoryview(b"")
        if gathered:
            _write_all(file, memoryview(gathered))
            gathered = bytearray()
        _write_all(file, view)
    _write_all(file, memoryview(gathered))
    return byte_count


def _write_all(file: int, view: memoryview) -> None:
    while view.nbytes:
        view = view[os.write(file, view) :]


def _fill(file: int, offset: int, buffer: memoryview) -> int:
    view = buffer.cast("B")
    done = 0
    while done < view.nbytes:
        count = os.preadv(file, [view[done:]], offset + done)
        if count == 0:
            break
        done += count
    return done


def _raise(error: OSError) -> None:
    raise error
