"""The commands that only read checkpoints: what they print, with which code they end, and that they load no Ray."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import pytest

import blobspace
from blobspace.cluster.checkpoint import LocalStore, Manifest, commit, make_manifest, write_workspace
from blobspace.cluster.checkpoint.format import content_hash
from blobspace.cluster.command_line import EXIT_CODES, main
from blobspace.cluster.command_line.exit_codes import PHRASES, in_terminal_words
from blobspace.ops import errors
from blobspace.workspace_actors import Workspace

NODE = "0123456789abcdef" * 3


class Ran(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def document(self) -> Any:
        assert self.err == ""
        return json.loads(self.out, parse_constant=lambda constant: pytest.fail(f"{constant} is no JSON"))


Run = Callable[..., Ran]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run the command line in this process: ``run("ls", root)``."""
    monkeypatch.setenv("COLUMNS", "120")

    def run(*words: object) -> Ran:
        with pytest.raises(SystemExit) as stop:
            main([str(word) for word in words])
        captured = capsys.readouterr()
        assert isinstance(stop.value.code, int)
        return Ran(stop.value.code, captured.out, captured.err)

    return run


def save(root: Path, *, step: int = 1, metadata: dict[str, Any] | None = None) -> Manifest:
    store = LocalStore(root)
    receipts = []
    for ordinal in range(2):
        workspace = Workspace(f"w{ordinal}")
        workspace.feed_blob("fc_w", np.arange(2000, dtype=np.float32).reshape(20, 100))
        workspace.feed_blob("[bold]half", np.ones(3, ml_dtypes.bfloat16))
        workspace.feed_blob("labels", np.array([b"x", b"yy"], object))
        workspace.feed_blob("settings", {"rate": 0.1})
        workspace.create_blob("later")
        workspace.child("scratch", create=True).feed_blob("t", np.float64(7))
        frozen = workspace.freeze()
        receipts.append(write_workspace(store, save_id=f"s{step}", ordinal=ordinal, snapshot=frozen.snapshot()))
        frozen.lease.release()
    manifest = make_manifest(
        step=step,
        save_id=f"s{step}",
        created_unix_ns=1_700_000_000_000_000_000,
        cluster="default",
        generation=1,
        blobspace_version=blobspace.__version__,
        metadata={"loss": 0.5} if metadata is None else metadata,
        receipts=receipts,
        nodes={"w0": NODE, "w1": NODE},
    )
    commit(store, manifest)
    return manifest


@pytest.fixture
def root(tmp_path: Path) -> Path:
    save(tmp_path / "root", step=1)
    save(tmp_path / "root", step=12)
    return tmp_path / "root"


def manifest_file(root: Path, step: int) -> Path:
    return root / "checkpoints" / f"{step:020d}.manifest"


def flip_a_bit(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def make_newer(path: Path) -> None:
    data = path.read_bytes()
    data = data[:8] + (99).to_bytes(4, "little") + data[12:-16]
    path.write_bytes(data + content_hash(data))


# --- ls --------------------------------------------------------------------------------------------------------


def test_ls_lists_every_checkpoint_on_a_line(run: Run, root: Path) -> None:
    ran = run("ls", root)
    assert (ran.code, ran.err) == (0, "")
    assert re.search(r"^ *1 +2023-11-1[45] ..:..:.. +default +2 +12 +1[0-9]\.[0-9] KiB$", ran.out, re.MULTILINE)
    assert re.search(r"^ *12 ", ran.out, re.MULTILINE)
    assert "problem" not in ran.out


def test_ls_as_json_has_the_same_facts(run: Run, root: Path) -> None:
    document = run("ls", root, "--json").document
    assert document["root"] == str(root)
    assert [entry["step"] for entry in document["checkpoints"]] == [1, 12]
    first = document["checkpoints"][0]
    assert (first["workspace_count"], first["blob_count"], first["cluster"]) == (2, 12, "default")
    assert first["created"] == "2023-11-14T22:13:20+00:00"
    assert first["problem"] is None


def test_ls_of_an_empty_folder_says_so_and_is_no_error(run: Run, tmp_path: Path) -> None:
    assert run("ls", tmp_path).out == f"There is no checkpoint in {tmp_path}.\n"
    assert run("ls", tmp_path, "--json").document == {"root": str(tmp_path), "checkpoints": []}


@pytest.mark.parametrize("damage", [lambda path: os.truncate(path, 100), make_newer])
def test_ls_shows_what_is_wrong_with_a_manifest_beside_the_good_ones(
    run: Run, root: Path, damage: Callable[[Path], None]
) -> None:
    damage(manifest_file(root, 12))
    ran = run("ls", root)
    assert ran.code == 0
    assert re.search(r"^ *1 +2023", ran.out, re.MULTILINE)
    assert re.search(r"^ *12 .* unreadable$", ran.out, re.MULTILINE)
    assert re.search(r"^step 12: checkpoints/0+12\.manifest", ran.out, re.MULTILINE)
    good, bad = run("ls", root, "--json").document["checkpoints"]
    assert good["problem"] is None
    assert "manifest" in bad["problem"]


# --- verify ----------------------------------------------------------------------------------------------------


def test_verify_of_a_sound_checkpoint_takes_the_newest_and_says_how_much_it_read(run: Run, root: Path) -> None:
    ran = run("verify", root)
    assert ran.code == 0
    assert re.fullmatch(r"Step 12 is sound: 12 blobs, 1[0-9]\.[0-9] KiB checked in [0-9.]+ m?s\.\n", ran.out)
    document = run("verify", root, "--step", 1, "--json").document
    assert (document["step"], document["is_sound"], document["damages"]) == (1, True, [])


def test_verify_lists_every_damage_and_ends_with_the_code_of_corruption(run: Run, root: Path) -> None:
    for ordinal in range(2):
        pack = root / f"data/s12/w{ordinal:05d}-p00000.safetensors"
        flip_a_bit(pack, pack.stat().st_size // 2)
    ran = run("verify", root)
    assert ran.code == 5
    assert ran.out.startswith("Step 12 is damaged: 2 findings")
    assert "w00000-p00000.safetensors" in ran.out
    assert "workspace w1, blob fc_w: expected" in ran.out
    failed = run("verify", root, "--json")
    assert failed.code == 5
    assert [damage["workspace"] for damage in failed.document["damages"]] == ["w0", "w1"]
    assert run("verify", root, "--step", 1).code == 0


def test_verify_of_a_truncated_manifest_is_corruption(run: Run, root: Path) -> None:
    os.truncate(manifest_file(root, 12), 100)
    ran = run("verify", root)
    assert (ran.code, ran.out) == (5, "")
    assert ran.err.startswith("error: checkpoints/")
    assert "Traceback" not in ran.err
    error = run("verify", root, "--json").document["error"]
    assert error["kind"] == "corrupt_checkpoint"
    assert error["fields"]["file"] == "checkpoints/00000000000000000012.manifest"


def test_verify_of_a_newer_format_asks_for_an_upgrade(run: Run, root: Path) -> None:
    make_newer(manifest_file(root, 12))
    ran = run("verify", root)
    assert ran.code == 2
    assert "Upgrade blobspace" in ran.err


# --- show --root -----------------------------------------------------------------------------------------------


def test_show_prints_the_manifest_and_every_blob(run: Run, root: Path) -> None:
    ran = run("show", "--root", root, "--step", 1)
    assert ran.code == 0
    assert re.search(r"^step +1$", ran.out, re.MULTILINE)
    assert re.search(r"^metadata loss +0\.5$", ran.out, re.MULTILINE)
    assert re.search(r"^w0 +0123456789ab +6 +7\.[89] KiB$", ran.out, re.MULTILINE)
    assert re.search(r"^w0 +fc_w +float32 +\(20, 100\) +7\.8 KiB +1$", ran.out, re.MULTILINE)
    assert re.search(r"^w1 +\[bold\]half +bfloat16 +\(3,\) +6 B +1$", ran.out, re.MULTILINE)
    assert re.search(r"^w1 +later +uninitialized +- +0 B +0$", ran.out, re.MULTILINE)
    assert re.search(r"^w1:scratch +t +float64 +\(\) +8 B +1$", ran.out, re.MULTILINE)
    assert re.search(r"^total +12 blobs +15\.7 KiB$", ran.out, re.MULTILINE)


def test_show_reads_no_pack(run: Run, root: Path) -> None:
    for pack in (root / "data").rglob("*.safetensors"):
        pack.unlink()
    document = run("show", "--root", root, "--json").document
    assert document["step"] == 12
    assert document["metadata"] == {"loss": 0.5}
    assert [entry["name"] for entry in document["workspaces"]] == ["w0", "w1"]
    assert len(document["blobs"]) == 12
    assert {
        key: value
        for key, value in next(blob for blob in document["blobs"] if blob["name"] == "fc_w").items()
        if key != "version"
    } == {"workspace": "w0", "name": "fc_w", "type": "float32", "shape": [20, 100], "tensor_bytes": 8000}


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["fc_w"], [("w0", "fc_w"), ("w1", "fc_w")]),
        (["w1", "l*"], [("w1", "labels"), ("w1", "later")]),
        (["*:scratch", "*"], [("w0:scratch", "t"), ("w1:scratch", "t")]),
        (["nothing"], []),
    ],
)
def test_show_takes_patterns_for_workspace_and_blob(
    run: Run, root: Path, words: list[str], found: list[tuple[str, str]]
) -> None:
    document = run("show", *words, "--root", root, "--json").document
    assert [(blob["workspace"], blob["name"]) for blob in document["blobs"]] == found


def test_metadata_that_json_cannot_hold_is_printed_as_text(run: Run, tmp_path: Path) -> None:
    save(tmp_path, metadata={"loss": float("nan"), "id": b"\xffab", "by step": {3: [1, 2]}})
    metadata = run("show", "--root", tmp_path, "--json").document["metadata"]
    assert metadata == {"loss": "nan", "id": "\\xffab", "by step": {"3": [1, 2]}}


def test_show_of_a_damaged_index_is_corruption(run: Run, root: Path) -> None:
    flip_a_bit(root / "data/s12/w00001.index", 40)
    ran = run("show", "--root", root)
    assert (ran.code, ran.out) == (5, "")
    assert "w00001.index" in ran.err


def test_a_table_in_a_pipe_is_as_wide_as_it_needs_to_be(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "n" * 300
    workspace = Workspace("w0")
    workspace.feed_blob(name, np.zeros(1))
    store = LocalStore(tmp_path)
    receipt = write_workspace(store, save_id="s", ordinal=0, snapshot=workspace.freeze().snapshot())
    manifest = make_manifest(
        step=1, save_id="s", created_unix_ns=1, cluster="c", generation=1, blobspace_version="1", metadata={},
        receipts=[receipt], nodes={"w0": NODE},
    )  # fmt: skip
    commit(store, manifest)
    monkeypatch.delenv("COLUMNS")
    assert name in run("show", "--root", tmp_path).out


# --- codes and errors ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["ls", "{root}/absent"], 3),
        (["verify", "{root}/absent"], 3),
        (["verify", "{root}", "--step", "5"], 3),
        (["verify", "{root}/data"], 3),
        (["show", "--root", "{root}/absent"], 3),
        (["show", "--root", "{root}", "--step", "5"], 3),
        (["show", "--root", "{root}", "--step", "-1"], 2),
        (["show", "--root", "{root}", "a", "b", "c"], 2),
        (["show", "--step", "1"], 2),
        (["show"], 2),
        (["ls"], 2),
        (["verify", "{root}", "--step", "many"], 2),
        (["ls", "{root}", "--colour"], 2),
        (["frobnicate"], 2),
        (["checkpoint", "--step", "1", "--metadata", "novalue"], 2),
        (["up", "{root}/absent.yaml"], 3),
        (["up", "{root}"], 2),
    ],
)
def test_an_error_is_one_text_or_one_json_document_with_its_code(
    run: Run, root: Path, words: list[str], code: int
) -> None:
    words = [word.replace("{root}", str(root)) for word in words]
    ran = run(*words)
    assert (ran.code, ran.out) == (code, "")
    assert ran.err.startswith("error: ")
    assert ran.err.count("\n") == 1
    failed = run(*words, "--json")
    assert failed.code == code
    error = failed.document["error"]
    assert set(error) == {"kind", "message", "fields"}
    assert EXIT_CODES[error["kind"]] == code
    assert ran.err == f"error: {error['message']}\n".replace(" --json", "")


def test_every_kind_of_error_has_a_code_of_its_own() -> None:
    kinds = {kind.kind for kind in errors.BlobspaceError.__subclasses__()}
    assert set(EXIT_CODES) == kinds
    assert sorted(EXIT_CODES.values()) == list(range(1, 10))


def test_a_bug_ends_with_the_code_of_an_internal_error_and_no_traceback(
    run: Run, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise TypeError("a bug")

    monkeypatch.setattr("blobspace.cluster.command_line.commands.list_checkpoints", broken)
    ran = run("ls", root)
    assert (ran.code, ran.out) == (1, "")
    assert re.match(r"error: TypeError: a bug \(at .*test_command_line\.py:[0-9]+\)\.", ran.err)
    assert run("ls", root, "--json").document["error"]["kind"] == "internal"


def test_an_error_tells_a_terminal_the_command_and_not_the_call() -> None:
    message = "It is lost. cluster.recover() recreates it. Pass replace=True."
    assert in_terminal_words(message, ["checkpoint"]) == (
        "It is lost. 'blobspace recover' recreates it. Pass --replace."
    )
    for words in (["checkpoint", "--cluster", "shop"], ["--cluster=shop"]):
        option = " ".join(words[-2:]).removeprefix("checkpoint ")
        assert f"'blobspace recover {option}'" in in_terminal_words(message, words)


@pytest.mark.parametrize("phrase", PHRASES)
def test_every_phrase_that_is_replaced_is_one_of_the_library(phrase: str) -> None:
    root = Path(__file__).parent.parent
    sources = [*(root / "cluster").glob("*.py"), *(root / "cluster/checkpoint").glob("*.py")]
    assert any(phrase in source.read_text(encoding="utf-8") for source in sources)


def test_the_help_names_every_exit_code(run: Run) -> None:
    for words in (["--help"], ["verify", "--help"]):
        ran = run(*words)
        assert ran.code == 0
        text = " ".join(ran.out.split())
        assert "Exit codes: 0 done, 1 internal error, 2 usage or invalid input" in text
        assert all(f" {code} " in text for code in EXIT_CODES.values())


def test_the_version_is_the_packages(run: Run) -> None:
    assert run("--version") == (0, f"blobspace {blobspace.__version__}\n", "")


def test_no_command_shows_the_help_and_is_a_usage_error(run: Run) -> None:
    ran = run()
    assert ran.code == 2
    assert "Usage: blobspace" in ran.out


# --- processes -------------------------------------------------------------------------------------------------


def python(code: str, *words: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, words)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={key: value for key, value in os.environ.items() if not key.startswith("RAY_")} | environment,
    )


def test_reading_a_checkpoint_loads_neither_ray_nor_cupy(root: Path) -> None:
    code = """
import sys
from blobspace.cluster.command_line import main
for words in (["ls", sys.argv[1]], ["verify", sys.argv[1]], ["show", "--root", sys.argv[1]], ["--help"]):
    try:
        main(words)
    except SystemExit as stop:
        assert stop.code == 0, (words, stop.code)
print("loaded:", [name for name in ("ray", "cupy", "torch") if name in sys.modules])
"""
    ran = python(code, root)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.endswith("loaded: []\n")


def test_a_reader_that_goes_away_is_no_error(tmp_path: Path) -> None:
    for step in range(3):
        save(tmp_path, step=step)
    show = f"{sys.executable} -m blobspace.cluster.command_line show --root {tmp_path} --json"
    command = f"{show} | true; exit ${{PIPESTATUS[0]}}"
    ran = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60, check=False)
    assert ran.returncode == 141
    assert ran.stderr == ""


# Ray finds other Rays of the machine by looking at its processes; here it sees none.
ALONE = """
import os, sys
import ray._private.services
import psutil
for name in os.listdir("/proc"):
    if name == str(os.getpid()) or not name.isdigit():
        os.symlink(f"/proc/{name}", f"{sys.argv[1]}/{name}")
psutil.PROCFS_PATH = sys.argv[1]
from blobspace.cluster.command_line import main
main(sys.argv[2:])
"""


@pytest.mark.parametrize("words", [["status"], ["up", "configs/local.yaml"], ["checkpoint", "--step", "1"]])
def test_without_ray_a_line_says_how_to_start_one_and_none_is_started(tmp_path: Path, words: list[str]) -> None:
    pytest.importorskip("ray")
    (tmp_path / "proc").mkdir()
    words = [word.replace("configs", str(Path(__file__).parent.parent / "configs")) for word in words]
    ran = python(ALONE, tmp_path / "proc", *words, RAY_TMPDIR=str(tmp_path), RAY_AUTH_MODE="disabled")
    assert (ran.returncode, ran.stdout) == (3, "")
    assert ran.stderr.startswith("error: No Ray is running on this machine. Start one with 'ray start --head'")
    assert ran.stderr.count("\n") == 1
    assert os.listdir(tmp_path) == ["proc"]


@pytest.mark.parametrize(
    ("address", "code", "says"),
    [
        ("127.0.0.1:1", 3, "No Ray answers at RAY_ADDRESS=127.0.0.1:1"),
        ("local", 3, "ray start --head"),
        ("http://127.0.0.1:8265", 2, "host:port of Ray itself"),
        ("ray://127.0.0.1:10001", 2, "host:port of Ray itself"),
        ("nowhere", 2, "host:port of Ray itself"),
    ],
)
def test_an_address_without_a_ray_is_refused_at_once(
    run: Run, monkeypatch: pytest.MonkeyPatch, address: str, code: int, says: str
) -> None:
    ray = pytest.importorskip("ray")
    if ray.is_initialized():
        pytest.skip("this process is connected to a Ray already")
    monkeypatch.setenv("RAY_ADDRESS", address)
    ran = run("status")
    assert (ran.code, ran.out) == (code, "")
    assert says in ran.err
    assert ran.err.count("\n") == 1
