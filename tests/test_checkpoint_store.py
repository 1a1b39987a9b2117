"""What every ``Store`` promises, and what the one for local paths adds."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from blobspace.cluster.checkpoint import LocalStore, Store
from blobspace.ops.errors import ConflictError, InvalidInputError, NotFoundError, StorageError


class StoreContract:
    """Every backend inherits this class and gives a fresh ``store``."""

    @pytest.fixture
    def store(self) -> Store:
        raise NotImplementedError

    def test_buffers_are_written_in_order_whatever_their_size(self, store: Store) -> None:
        parts = [b"a", bytes(range(256)) * 1000, b"", bytearray(b"b" * 70_000), memoryview(b"c" * 3), b"d" * 2_000_000]
        whole = b"".join(bytes(part) for part in parts)
        assert store.write("data/s1/f", iter(parts)) == len(whole)
        assert store.read("data/s1/f") == whole
        assert store.size("data/s1/f") == len(whole)

    def test_many_small_buffers_make_up_one_file(self, store: Store) -> None:
        store.write("data/s1/f", (b"%07d" % number for number in range(300_000)))
        assert store.read("data/s1/f", 7 * 299_999) == b"0299999"

    def test_an_empty_file_can_be_written(self, store: Store) -> None:
        assert store.write("data/s1/f", ()) == 0
        assert store.read("data/s1/f") == b""

    def test_a_file_is_never_written_over(self, store: Store) -> None:
        store.write("data/s1/f", (b"first",))
        with pytest.raises(ConflictError, match="data/s1/f exists already"):
            store.write("data/s1/f", (b"second",))
        assert store.read("data/s1/f") == b"first"

    def test_no_file_is_left_when_the_buffers_fail(self, store: Store) -> None:
        def failing() -> Iterator[bytes]:
            yield b"x" * 100_000
            raise ConflictError("cancelled")

        with pytest.raises(ConflictError, match="cancelled"):
            store.write("data/s1/f", failing())
        assert store.list_files("data") == []

    def test_ranges_are_read_and_end_where_the_file_ends(self, store: Store) -> None:
        store.write("data/s1/f", (b"0123456789",))
        assert store.read("data/s1/f", 3, 4) == b"3456"
        assert store.read("data/s1/f", 8, 2**60) == b"89"
        assert store.read("data/s1/f", 50) == b""
        buffer = bytearray(b"....")
        assert store.readinto("data/s1/f", 8, memoryview(buffer)) == 2
        assert buffer == b"89.."

    def test_put_if_absent_succeeds_once(self, store: Store) -> None:
        store.put_if_absent("checkpoints/m", b"first")
        with pytest.raises(ConflictError, match="exists already"):
            store.put_if_absent("checkpoints/m", b"second")
        assert store.read("checkpoints/m") == b"first"
        assert store.list_files("checkpoints") == ["checkpoints/m"]

    def test_of_many_threads_exactly_one_puts(self, store: Store) -> None:
        barrier = threading.Barrier(8)
        won: list[int] = []
        refused: list[int] = []

        def put(number: int) -> None:
            barrier.wait(10)
            try:
                store.put_if_absent("checkpoints/m", b"%d" % number)
                won.append(number)
            except ConflictError:
                refused.append(number)

        threads = [threading.Thread(target=put, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(10)
        assert len(won) == 1
        assert len(refused) == 7
        assert store.read("checkpoints/m") == b"%d" % won[0]
        assert store.list_files("checkpoints") == ["checkpoints/m"]

    def test_replace_writes_over_and_makes_new(self, store: Store) -> None:
        store.replace("checkpoints/m", b"first")
        store.replace("checkpoints/m", b"second, longer")
        assert store.read("checkpoints/m") == b"second, longer"
        assert store.list_files("checkpoints") == ["checkpoints/m"]

    def test_a_missing_file_is_not_found(self, store: Store) -> None:
        for attempt in (
            lambda: store.read("data/s1/f"),
            lambda: store.readinto("data/s1/f", 0, memoryview(bytearray(1))),
            lambda: store.size("data/s1/f"),
        ):
            with pytest.raises(NotFoundError, match="data/s1/f"):
                attempt()

    def test_files_are_listed_sorted_and_below_the_prefix_alone(self, store: Store) -> None:
        for path in ["data/s2/b", "data/s1/a", "data/s1/c", "checkpoints/m"]:
            store.write(path, (b"x",))
        assert store.list_files("data") == ["data/s1/a", "data/s1/c", "data/s2/b"]
        assert store.list_files("data/s1") == ["data/s1/a", "data/s1/c"]
        assert store.list_files("nothing") == []

    def test_a_tree_is_deleted_with_all_below_it_and_nothing_else(self, store: Store) -> None:
        for path in ["data/s1/a", "data/s1/b", "data/s2/a"]:
            store.write(path, (b"x",))
        store.delete_tree("data/s1")
        store.delete_tree("data/s1")
        assert store.list_files("data") == ["data/s2/a"]
        store.delete_tree("data/s2/a")
        assert store.list_files("data") == []

    @pytest.mark.parametrize("path", ["../x", "/etc/passwd", "a/../../x", "", "a//b"])
    def test_a_path_out_of_the_root_is_refused_by_every_verb(self, store: Store, path: str) -> None:
        for attempt in (
            lambda: store.write(path, (b"x",)),
            lambda: store.put_if_absent(path, b"x"),
            lambda: store.replace(path, b"x"),
            lambda: store.read(path),
            lambda: store.readinto(path, 0, memoryview(bytearray(1))),
            lambda: store.size(path),
            lambda: store.list_files(path),
            lambda: store.delete_tree(path),
        ):
            with pytest.raises(InvalidInputError, match="no path below"):
                attempt()


class TestLocalStore(StoreContract):
    @pytest.fixture
    def store(self, tmp_path: Path) -> Store:
        # The root and a folder above it are not there yet.
        return LocalStore(tmp_path / "above" / "root")


class TestLocalStoreWithoutHardLinks(StoreContract):
    @pytest.fixture
    def store(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
        def refuse(*_: object, **__: object) -> None:
            raise OSError(errno.EPERM, "Operation not permitted")

        monkeypatch.setattr(os, "link", refuse)
        return LocalStore(tmp_path / "root")

    def test_of_many_threads_exactly_one_puts(self, store: Store) -> None:
        # Without links a loser may also be told that another process is publishing: a ConflictError too.
        super().test_of_many_threads_exactly_one_puts(store)

    def test_a_claim_that_a_crash_left_refuses_and_says_what_to_remove(self, store: Store) -> None:
        store.write("checkpoints/.m.claim", ())
        with pytest.raises(ConflictError, match=r"remove the file '\.m\.claim'"):
            store.put_if_absent("checkpoints/m", b"x")
        store.delete_tree("checkpoints/.m.claim")
        store.put_if_absent("checkpoints/m", b"x")


def test_a_link_whose_reply_was_lost_counts_as_won(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    link = os.link

    def repeated(source: str, target: str, **options: object) -> None:
        link(source, target, **options)  # type: ignore[arg-type]
        raise FileExistsError(errno.EEXIST, "File exists")

    monkeypatch.setattr(os, "link", repeated)
    store = LocalStore(tmp_path)
    store.put_if_absent("checkpoints/m", b"x")
    assert store.list_files("checkpoints") == ["checkpoints/m"]


def test_making_a_store_and_reading_from_it_make_no_folder(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "root")
    assert store.list_files("checkpoints") == []
    with pytest.raises(NotFoundError):
        store.size("data/s1/f")
    store.delete_tree("data/s1")
    assert list(tmp_path.iterdir()) == []


def test_symbolic_links_below_the_root_are_never_followed(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").write_bytes(b"secret")
    root = tmp_path / "root"
    (root / "data" / "s1").mkdir(parents=True)
    (root / "data" / "s1" / "file").symlink_to(outside / "secret")
    (root / "data" / "s2").symlink_to(outside)
    store = LocalStore(root)
    with pytest.raises(StorageError, match="symbolic link"):
        store.read("data/s1/file")
    for attempt in (
        lambda: store.read("data/s2/secret"),
        lambda: store.write("data/s2/new", (b"x",)),
        lambda: store.put_if_absent("data/s2/new", b"x"),
        lambda: store.delete_tree("data/s2/secret"),
    ):
        with pytest.raises(StorageError, match="symbolic link"):
            attempt()
    store.delete_tree("data/s2")
    assert [path.name for path in outside.iterdir()] == ["secret"]


def test_the_root_itself_may_be_a_symbolic_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "root").symlink_to(tmp_path / "real")
    LocalStore(tmp_path / "root").write("data/s1/f", (b"x",))
    assert (tmp_path / "real" / "data" / "s1" / "f").read_bytes() == b"x"


def test_a_fifo_in_the_place_of_a_file_is_refused_and_does_not_hang(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    os.mkfifo(tmp_path / "data" / "f")
    with pytest.raises(StorageError, match="no regular file"):
        LocalStore(tmp_path).read("data/f")


def test_a_file_in_the_place_of_a_folder_is_a_storage_error_with_a_way_out(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError, match=r"Cannot write data/s1/f in .*/file.*in the place of a folder"):
        LocalStore(tmp_path / "file").write("data/s1/f", (b"x",))
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "data").write_bytes(b"")
    with pytest.raises(StorageError, match="in the place of a folder"):
        LocalStore(tmp_path / "root").write("data/s1/f", (b"x",))


def test_every_folder_on_the_way_is_synced_after_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    fsync = os.fsync

    def noted(file: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{file}"))
        fsync(file)

    monkeypatch.setattr(os, "fsync", noted)
    root = tmp_path / "root"
    LocalStore(root).write("data/s1/f", (b"x",))
    assert synced == [str(path) for path in (tmp_path, root / "data/s1/f", root / "data/s1", root / "data", root)]
    synced.clear()
    LocalStore(root).put_if_absent("checkpoints/m", b"x")
    assert synced[0].endswith(".m.0.tmp")
    assert synced[1:] == [str(root / "checkpoints"), str(root)]


def test_a_file_system_that_cannot_sync_folders_is_accepted_but_no_other_failure_to_sync(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsync, answer = os.fsync, [errno.EINVAL]

    def refusing(file: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{file}"):
            raise OSError(answer[0], os.strerror(answer[0]))
        fsync(file)

    monkeypatch.setattr(os, "fsync", refusing)
    store = LocalStore(tmp_path)
    store.put_if_absent("checkpoints/m", b"x")
    assert store.read("checkpoints/m") == b"x"
    answer[0] = errno.EIO
    with pytest.raises(StorageError, match=r"Cannot write data/s1/f.*check the disk"):
        store.write("data/s1/f", (b"x",))


def run_python(script: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_full_disk_is_a_storage_error_and_leaves_no_file(tmp_path: Path) -> None:
    script = """
import resource, sys
from blobspace.cluster.checkpoint import LocalStore
from blobspace.ops.errors import StorageError
store = LocalStore(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
for write in (lambda: store.write("data/s1/f", [b"x" * 90_000] * 2), lambda: store.put_if_absent("m", b"x" * 200_000)):
    try:
        write()
    except StorageError as error:
        print(error, error.fields["errno_name"])
store.write("data/s1/small", [b"x"])
print(store.list_files("data"))
"""
    lines = run_python(script, str(tmp_path)).splitlines()
    assert "Cannot write data/s1/f" in lines[0]
    assert lines[0].endswith("EFBIG")
    assert "Cannot publish m" in lines[1]
    assert lines[2] == "['data/s1/small']"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data"]


def test_a_root_without_permission_is_a_storage_error(tmp_path: Path) -> None:
    # Root may write anywhere, so the child gives that up first; then the folders above must let it through.
    script = """
import os, sys, tempfile
from blobspace.cluster.checkpoint import LocalStore
from blobspace.ops.errors import StorageError
with tempfile.TemporaryDirectory() as root:
    os.chmod(root, 0o555)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        LocalStore(root).write("data/s1/f", [b"x"])
    except StorageError as error:
        print(error)
    finally:
        os.seteuid(user)
        os.chmod(root, 0o755)
"""
    assert "This user has no permission: change the owner or mode" in run_python(script)
