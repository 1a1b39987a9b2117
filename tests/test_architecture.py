"""The house: layers that import one way, shells that alone know Ray, a public surface that is written down."""

from __future__ import annotations

import ast
import importlib
import inspect
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LAYERS = ("ops", "workspace_actors", "cluster")
SHELLS = {
    "workspace_actors/actor.py",
    "workspace_actors/collectives.py",
    "workspace_actors/handle.py",
    "workspace_actors/ray_errors.py",
    "cluster/client.py",
    "cluster/coordinator.py",
    "cluster/command_line/live_facts.py",
}
SHELL_FOLDERS = ("cluster/demo/",)

SURFACE = {
    "blobspace": ["__version__"],
    "blobspace.ops": [
        "UNBOUNDED",
        "ArgType",
        "Argument",
        "BlobspaceError",
        "ConflictError",
        "CorruptCheckpointError",
        "DeadlineError",
        "DeviceOption",
        "GradientCall",
        "GradientResult",
        "GradientSlice",
        "InternalError",
        "InvalidInputError",
        "Kind",
        "MemoryLimitError",
        "Net",
        "NetDef",
        "NotFoundError",
        "OperatorCall",
        "OperatorDef",
        "OperatorSchema",
        "StorageError",
        "WorkspaceLostError",
        "add_gradient_operators",
        "documentation",
        "gradient_not_implemented_yet",
        "gradient_operators",
        "no_gradient",
        "operator_def",
        "operator_types",
        "register_cpu_operator",
        "register_cuda_operator",
        "register_gradient",
        "register_operator",
        "register_schema",
        "should_not_do_gradient",
    ],
    "blobspace.workspace_actors": [
        "BlobSnapshot",
        "BlobSpec",
        "MemoryStatistics",
        "Workspace",
        "WorkspaceActor",
        "WorkspaceHandle",
        "WorkspaceSnapshot",
        "check_workspace_name",
    ],
    "blobspace.cluster": [
        "CheckpointReport",
        "Cluster",
        "ClusterConfig",
        "ClusterView",
        "MemberView",
        "RestoreReport",
        "WorkspaceGroup",
        "clusters",
        "load_config",
    ],
    "blobspace.cluster.checkpoint": [
        "FORMAT_VERSION",
        "BlobEntry",
        "CheckpointSummary",
        "Chunk",
        "Damage",
        "Index",
        "LocalStore",
        "Manifest",
        "PackEntry",
        "Store",
        "VerifyReport",
        "WorkspaceEntry",
        "WorkspaceReceipt",
        "commit",
        "decode_index",
        "decode_manifest",
        "encode_index",
        "encode_manifest",
        "list_checkpoints",
        "load_workspace",
        "make_manifest",
        "read_index",
        "read_manifest",
        "refuse_existing",
        "verify",
        "write_workspace",
    ],
}
# Shown by their class: a Ray actor repeats Workspace's verbs, and protocols name what they ask for.
DOCUMENTED_ELSEWHERE = {"WorkspaceActor"}


def sources() -> list[str]:
    files = [path for layer in LAYERS for path in (ROOT / layer).rglob("*.py")]
    return [*sorted(str(path.relative_to(ROOT)) for path in files), "blobspace/__init__.py"]


@cache
def tree(source: str) -> ast.Module:
    return ast.parse((ROOT / source).read_text(encoding="utf-8"), source)


def imported(source: str) -> Iterator[str]:
    """Every module that a file imports, by its absolute name, wherever in the file the import stands."""
    package = ["blobspace", *Path(source).parts[:-1]] if not source.startswith("blobspace/") else ["blobspace"]
    for statement in ast.walk(tree(source)):
        if isinstance(statement, ast.Import):
            yield from (alias.name for alias in statement.names)
        elif isinstance(statement, ast.ImportFrom):
            base = package[: len(package) - statement.level + 1] if statement.level else []
            module = ".".join([*base, *([statement.module] if statement.module else [])])
            yield module
            yield from (f"{module}.{alias.name}" for alias in statement.names)


every_source = pytest.mark.parametrize("source", sources())


@every_source
def test_imports_go_one_way(source: str) -> None:
    layer = source.split("/", maxsplit=1)[0]
    above = LAYERS[LAYERS.index(layer) + 1 :] if layer in LAYERS else LAYERS
    upward = [name for name in imported(source) for other in above if f"{name}.".startswith(f"blobspace.{other}.")]
    assert not upward


@every_source
def test_only_the_shells_import_ray(source: str) -> None:
    knows_ray = any(name.partition(".")[0] == "ray" for name in imported(source))
    assert not knows_ray or source in SHELLS or source.startswith(SHELL_FOLDERS)


@every_source
def test_cupy_is_never_imported_by_a_statement(source: str) -> None:
    assert not any(name.partition(".")[0] == "cupy" for name in imported(source))


@every_source
def test_the_folders_are_never_imported_by_their_bare_names(source: str) -> None:
    assert not [name for name in imported(source) if name.partition(".")[0] in LAYERS]


@every_source
def test_nothing_is_ever_pickled(source: str) -> None:
    forbidden = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"}
    assert not [name for name in imported(source) if forbidden & set(name.split("."))]
    for node in ast.walk(tree(source)):
        if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            assert isinstance(node.value, ast.Constant)
            assert node.value.value is False


@every_source
def test_an_assert_is_for_the_type_checker_and_has_no_message(source: str) -> None:
    assert not [node.lineno for node in ast.walk(tree(source)) if isinstance(node, ast.Assert) and node.msg]


@every_source
def test_private_files_stay_in_their_layer(source: str) -> None:
    layer = source.split("/", maxsplit=1)[0]
    for name in imported(source):
        parts = name.split(".")
        if parts[0] == "blobspace" and len(parts) > 2 and parts[1] in LAYERS and parts[1] != layer:
            assert not any(part.startswith("_") and not part.startswith("__") for part in parts[2:])


def test_tests_import_the_layers_by_their_full_names_too() -> None:
    for path in sorted((ROOT / "tests").rglob("*.py")):
        source = str(path.relative_to(ROOT))
        assert not [name for name in imported(source) if name.partition(".")[0] in LAYERS], source


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=60, check=False)


def test_importing_loads_neither_ray_nor_cupy_nor_what_only_the_demo_needs() -> None:
    heavy = ("ray", "cupy", "sklearn", "torch", "scipy", "pandas")
    code = f"import sys, {', '.join(SURFACE)}; print(sorted(set(sys.modules) & set({heavy!r})))"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


def test_importing_has_no_effect_on_threads_warnings_logging_or_the_environment() -> None:
    code = (
        "import logging, os, sys, threading, warnings, numpy, msgpack, ml_dtypes, pydantic, yaml\n"
        "def state():\n"
        "    return (dict(os.environ), threading.active_count(), list(warnings.filters), logging.root.handlers[:],\n"
        "            logging.root.level, os.getcwd(), sys.excepthook, numpy.geterr())\n"
        "before = state()\n"
        f"import {', '.join(SURFACE)}\n"
        "assert state() == before\n"
    )
    done = python("-c", code)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("module", SURFACE)
def test_the_public_surface_is_this_list(module: str) -> None:
    found = importlib.import_module(module)
    assert sorted(found.__all__) == sorted(SURFACE[module])
    assert len(set(found.__all__)) == len(found.__all__)


def _public(module: str) -> list[tuple[str, object]]:
    found = importlib.import_module(module)
    pairs: list[tuple[str, object]] = []
    for name in SURFACE[module]:
        if name in ("Cluster", "clusters", "WorkspaceActor", "WorkspaceHandle"):
            pytest.importorskip("ray", exc_type=ImportError)
        value = getattr(found, name)
        if not inspect.isclass(value) and not inspect.isroutine(value):
            continue
        pairs.append((name, value))
        if inspect.isclass(value) and name not in DOCUMENTED_ELSEWHERE:
            pairs.extend(
                (f"{name}.{key}", member)
                for key, member in vars(value).items()
                if not key.startswith("_") and (inspect.isroutine(member) or isinstance(member, property))
            )
    return pairs


@pytest.mark.parametrize("module", SURFACE)
def test_everything_public_has_a_docstring(module: str) -> None:
    bare = [
        name
        for name, value in _public(module)
        if not (getattr(value, "__doc__", None) or "").strip()
        # What a dataclass or a model writes by itself says nothing.
        or (inspect.isclass(value) and (value.__doc__ or "").startswith(f"{value.__name__}("))
    ]
    assert not bare


def test_an_unknown_name_of_a_lazy_package_is_an_attribute_error() -> None:
    for module in ("blobspace.workspace_actors", "blobspace.cluster"):
        with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
            importlib.import_module(module).Nothing  # noqa: B018
