"""FORMAT.md, section 5: write order and commit point; savers that race; savers that are killed at every step."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from blobspace.cluster.checkpoint import (
    LocalStore,
    Manifest,
    commit,
    list_checkpoints,
    make_manifest,
    read_manifest,
    refuse_existing,
    verify,
    write_workspace,
)
from blobspace.ops.errors import BlobspaceError, ConflictError, InternalError, InvalidInputError, StorageError
from blobspace.ops.values import Kind
from blobspace.workspace_actors.snapshot import BlobSnapshot, WorkspaceSnapshot


def prepared(store: LocalStore, *, save_id: str = "s1", step: int = 1, value: int = 0) -> Manifest:
    """Write two workspaces and return the manifest that would commit them."""
    receipts = [
        write_workspace(
            store,
            save_id=save_id,
            ordinal=ordinal,
            snapshot=WorkspaceSnapshot(
                workspace=f"w{ordinal}",
                blobs=(
                    BlobSnapshot(
                        scope="", name="x", kind=Kind.TENSOR, array=np.full(9, value), payload=None, version=1
                    ),
                ),
                nets=(),
                state={},
            ),
        )
        for ordinal in range(2)
    ]
    return make_manifest(
        step=step,
        save_id=save_id,
        created_unix_ns=1,
        cluster="c",
        generation=1,
        blobspace_version="0",
        metadata={"value": value},
        receipts=receipts,
        nodes={"w0": "node-a", "w1": "node-b"},
    )


def test_nothing_is_visible_before_the_commit_and_all_is_after_it(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    manifest = prepared(store)
    assert list_checkpoints(store) == []
    assert commit(store, manifest) == "checkpoints/00000000000000000001.manifest"
    assert read_manifest(store) == manifest
    assert verify(store, manifest).is_sound


def test_a_save_of_a_step_that_exists_is_refused_before_it_begins_damaged_or_not(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    refuse_existing(store, 1)
    path = tmp_path / commit(store, prepared(store))
    refuse_existing(store, 2)
    for _ in range(2):
        with pytest.raises(ConflictError, match=r"Step 1 has a checkpoint already.*replace=True"):
            refuse_existing(store, 1)
        path.write_bytes(b"damaged")


def test_a_step_that_exists_is_refused_and_untouched(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    first = prepared(store)
    commit(store, first)
    with pytest.raises(ConflictError, match=r"Step 1 has a checkpoint already.*replace=True"):
        commit(store, prepared(store, save_id="s2", value=2))
    assert read_manifest(store, 1) == first


def test_a_step_is_replaced_when_asked(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    commit(store, prepared(store))
    second = prepared(store, save_id="s2", value=2)
    commit(store, second, replace=True)
    assert read_manifest(store, 1) == second
    assert verify(store, second).is_sound


def test_committing_the_same_manifest_again_succeeds(tmp_path: Path) -> None:
    # A coordinator whose answer was lost tries again; its own checkpoint must not look like somebody else's.
    store = LocalStore(tmp_path)
    manifest = prepared(store)
    assert commit(store, manifest) == commit(store, manifest)


@pytest.mark.parametrize("name", ["w00001.index", "w00001-p00000.safetensors"])
@pytest.mark.parametrize("damage", ["missing", "shorter"])
def test_a_file_that_the_coordinator_does_not_see_refuses_the_commit(tmp_path: Path, name: str, damage: str) -> None:
    store = LocalStore(tmp_path)
    manifest = prepared(store)
    path = tmp_path / "data" / "s1" / name
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(StorageError, match=r"'w1' on node 'node-b'.*probably not shared between the nodes") as caught:
        commit(store, manifest)
    assert caught.value.fields["node"] == "node-b"
    assert list_checkpoints(store) == []


def test_a_missing_pack_of_an_earlier_save_refuses_the_commit_too(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    older = prepared(store, save_id="s0")
    manifest = prepared(store)
    manifest = dataclasses.replace(manifest, packs=(*manifest.packs, older.packs[0]))
    (tmp_path / older.packs[0].path).unlink()
    with pytest.raises(StorageError, match="of an earlier save"):
        commit(store, manifest)


def test_two_workspaces_cannot_disagree_on_a_pack_or_share_a_name(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    content = WorkspaceSnapshot(
        workspace="w",
        blobs=(BlobSnapshot(scope="", name="x", kind=Kind.TENSOR, array=np.ones(3), payload=None, version=1),),
        nets=(),
        state={},
    )
    receipt = write_workspace(store, save_id="s1", ordinal=0, snapshot=content)
    pack = dataclasses.replace(receipt.packs[0], header_hash=b"?" * 16)
    other = dataclasses.replace(receipt, workspace="other", packs=(pack,))
    for pair, error in [((receipt, other), InternalError), ((receipt, receipt), InvalidInputError)]:
        with pytest.raises(error):
            make_manifest(
                step=1,
                save_id="s1",
                created_unix_ns=1,
                cluster="c",
                generation=1,
                blobspace_version="0",
                metadata={},
                receipts=pair,
                nodes={},
            )


def test_of_two_savers_in_threads_exactly_one_wins_each_step(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    steps = range(1, 21)
    manifests = {
        saver: dataclasses.replace(prepared(store, save_id=saver), metadata={"saver": saver}) for saver in ("a", "b")
    }
    barrier = threading.Barrier(2)
    won: dict[str, list[int]] = {"a": [], "b": []}

    def save(saver: str) -> None:
        for step in steps:
            barrier.wait(10)
            try:
                commit(store, dataclasses.replace(manifests[saver], step=step))
            except ConflictError:
                continue
            won[saver].append(step)

    threads = [threading.Thread(target=save, args=(saver,)) for saver in won]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert sorted(won["a"] + won["b"]) == list(steps)
    for saver, step in itertools.chain.from_iterable([(saver, step) for step in won[saver]] for saver in won):
        assert read_manifest(store, step).metadata == {"saver": saver}


SAVER = """
import dataclasses, json, sys
from blobspace.cluster.checkpoint import *
from blobspace.ops.errors import ConflictError
store, saver = LocalStore(sys.argv[1]), sys.argv[2]
manifest = dataclasses.replace(read_manifest(store, 0), metadata={"saver": saver})
won = []
print("ready", flush=True)
for line in sys.stdin:
    step = int(line)
    try:
        commit(store, dataclasses.replace(manifest, step=step))
        won.append(step)
    except ConflictError:
        pass
    print(step, flush=True)
print(json.dumps(won))
"""


def test_of_two_savers_in_processes_exactly_one_wins_each_step(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    commit(store, prepared(store, step=0))
    steps = range(1, 31)
    savers = {
        name: subprocess.Popen(
            [sys.executable, "-c", SAVER, str(tmp_path), name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )
        for name in ("a", "b")
    }
    won: dict[str, list[int]] = {}
    try:
        for saver in savers.values():
            assert saver.stdout is not None
            assert saver.stdout.readline() == "ready\n"
        for step in steps:
            for saver in savers.values():
                assert saver.stdin is not None
                saver.stdin.write(f"{step}\n")
            for saver in savers.values():
                assert saver.stdout is not None
                assert saver.stdout.readline() == f"{step}\n"
        for name, saver in savers.items():
            won[name] = json.loads(saver.communicate(timeout=20)[0])
    finally:
        for saver in savers.values():
            saver.kill()
            saver.communicate()
    assert sorted(won["a"] + won["b"]) == list(steps)
    for name, steps_won in won.items():
        assert all(read_manifest(store, step).metadata == {"saver": name} for step in steps_won)


# One process forks a child for each point at which the child kills itself: before and after every system call that
# changes what others can see. The fork costs milliseconds, so every point is tried, none is sampled.
KILLED_EVERYWHERE = """
import errno, json, os, shutil, signal, sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from test_checkpoint_commit import prepared
from blobspace.cluster.checkpoint import *
from blobspace.ops.errors import BlobspaceError, ConflictError

work, mode = Path(sys.argv[2]), sys.argv[3]
replace = mode == "replace"
new_step = 1 if replace else 2
template = work / "template"
old = prepared(LocalStore(template), save_id="old", step=1, value=1)
commit(LocalStore(template), old)

def refuse(*_, **__):
    raise OSError(errno.EPERM, "Operation not permitted")

if mode == "no_links":
    os.link = refuse

def child(root, die_at):
    calls = 0
    def point():
        nonlocal calls
        if calls == die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        calls += 1
    def wrap(name):
        original = getattr(os, name)
        def wrapped(*arguments, **options):
            point()
            result = original(*arguments, **options)
            point()
            return result
        setattr(os, name, wrapped)
    for name in ("mkdir", "write", "fsync", "link", "replace", "unlink"):
        wrap(name)
    store = LocalStore(root)
    commit(store, prepared(store, save_id="new", step=new_step, value=2), replace=replace)

outcomes = []
for die_at in range(10_000):
    root = work / str(die_at)
    shutil.copytree(template, root)
    process = os.fork()
    if process == 0:
        try:
            child(root, die_at)
            os._exit(0)
        finally:
            os._exit(1)
    status = os.waitpid(process, 0)[1]
    if not os.WIFSIGNALED(status):
        assert os.WEXITSTATUS(status) == 0, status
        break
    store = LocalStore(root)
    newest = read_manifest(store)
    assert all(summary.is_readable for summary in list_checkpoints(store))
    assert verify(store, newest).is_sound
    if replace:
        assert newest.save_id in ("old", "new") and newest.step == 1
    else:
        assert verify(store, read_manifest(store, 1)).is_sound
    # Whoever comes next can save; only a claim left behind (no hard links) refuses, and says what to remove.
    again = prepared(store, save_id="again", step=new_step, value=3)
    try:
        commit(store, again, replace=replace)
        after = "saved"
    except ConflictError as error:
        after = "claimed" if "remove the file" in str(error) else "exists"
    assert verify(store, read_manifest(store)).is_sound
    outcomes.append([newest.save_id, after])
    shutil.rmtree(root)
print(json.dumps(outcomes))
"""


@pytest.mark.parametrize("mode", ["create", "replace", "no_links"])
def test_a_saver_killed_at_any_point_leaves_the_old_checkpoint_or_the_whole_new_one(tmp_path: Path, mode: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", KILLED_EVERYWHERE, str(Path(__file__).parent), str(tmp_path), mode],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    outcomes: list[list[str]] = json.loads(done.stdout)
    newest = [outcome[0] for outcome in outcomes]
    commit_point = newest.index("new")
    assert len(newest) > 40
    assert set(newest[:commit_point]) == {"old"}
    assert set(newest[commit_point:]) == {"new"}
    after = {saved: {outcome[1] for outcome in outcomes if outcome[0] == saved} for saved in ("old", "new")}
    expected = {
        "create": {"old": {"saved"}, "new": {"exists"}},
        "replace": {"old": {"saved"}, "new": {"saved"}},
        "no_links": {"old": {"saved", "claimed"}, "new": {"claimed", "exists"}},
    }
    assert after == expected[mode]


def test_an_error_of_the_storage_while_publishing_can_be_settled_by_committing_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = LocalStore(tmp_path)
    manifest = prepared(store)
    unlink = os.unlink

    def failing(*arguments: object, **options: object) -> None:
        unlink(*arguments, **options)  # type: ignore[arg-type]
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", failing)
        with pytest.raises(BlobspaceError, match="Input/output error"):
            commit(store, manifest)
    commit(store, manifest)
    assert read_manifest(store) == manifest
