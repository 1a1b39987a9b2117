"""The error tree: its shape, what an error carries, and that it survives a process border."""

from __future__ import annotations

import copy
import importlib
import pickle
from types import ModuleType

import pytest

from blobspace.ops import errors
from blobspace.ops.errors import BlobspaceError, NotFoundError, StorageError


def _family(root: type[BlobspaceError]) -> list[type[BlobspaceError]]:
    return [root, *(member for child in root.__subclasses__() for member in _family(child))]


CLASSES = [cls for cls in _family(BlobspaceError) if cls.__module__ == errors.__name__]
BUILT_IN = {
    "BlobspaceError": Exception,
    "InvalidInputError": ValueError,
    "NotFoundError": KeyError,
    "ConflictError": Exception,
    "WorkspaceLostError": Exception,
    "DeadlineError": TimeoutError,
    "MemoryLimitError": MemoryError,
    "StorageError": OSError,
    "CorruptCheckpointError": Exception,
    "InternalError": Exception,
}

every_class = pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)


def _pickler(name: str) -> ModuleType:
    if name == "ray.cloudpickle":
        pytest.importorskip("ray", exc_type=ImportError)
    return pytest.importorskip(name, exc_type=ImportError)


def test_the_tree_drawn_in_the_docstring_is_the_tree_of_classes() -> None:
    drawn: dict[str, str | None] = {}
    for line in (errors.__doc__ or "").splitlines():
        words = line.replace("├──", " ").replace("└──", " ").split()
        if words and words[0].endswith("Error"):
            built_in = words[1].strip("()") if len(words) > 1 and words[1].startswith("(") else None
            drawn[words[0]] = built_in
    there = {
        cls.__name__: next((base.__name__ for base in cls.__bases__ if not issubclass(base, BlobspaceError)), None)
        for cls in CLASSES
    }
    there["BlobspaceError"] = None
    assert drawn == there


def test_the_module_defines_no_other_exception() -> None:
    found = {name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, Exception)}
    assert found == set(BUILT_IN)


@every_class
def test_each_class_is_a_child_of_the_root_and_the_built_in_that_it_resembles(cls: type[BlobspaceError]) -> None:
    assert issubclass(cls, BUILT_IN[cls.__name__])
    assert cls is BlobspaceError or cls.__bases__[0] is BlobspaceError


def test_each_kind_is_unique_and_plain() -> None:
    kinds = [cls.kind for cls in CLASSES]
    assert len(set(kinds)) == len(kinds)
    assert all(kind.replace("_", "").isalpha() and kind.islower() for kind in kinds)


@every_class
def test_each_class_has_a_docstring_and_a_kind_of_its_own(cls: type[BlobspaceError]) -> None:
    assert cls.__doc__
    assert "kind" in vars(cls)


@every_class
def test_the_text_is_the_message_whatever_the_built_in_does(cls: type[BlobspaceError]) -> None:
    assert str(cls("It's gone.", blob="x")) == "It's gone."
    assert cls("m").fields == {}


@every_class
def test_context_is_appended_line_by_line(cls: type[BlobspaceError]) -> None:
    error = cls("First.")
    error.add_context("Second.")
    error.add_context("Third.")
    assert str(error) == "First.\nSecond.\nThird."


@every_class
@pytest.mark.parametrize("pickler", ["pickle", "cloudpickle", "ray.cloudpickle"])
def test_an_error_survives_a_process_border(cls: type[BlobspaceError], pickler: str) -> None:
    module = importlib.import_module("pickle") if pickler == "pickle" else _pickler(pickler)
    error = cls("Größe: 日本.", workspace="w0", step=3, largest={"x": 4}, names=["a", "b"])
    error.add_context("In operator 3.")
    back = pickle.loads(module.dumps(error))
    assert type(back) is cls
    assert (back.message, back.fields, back.notes, str(back)) == (
        error.message,
        error.fields,
        error.notes,
        str(error),
    )
    assert back.args == error.args
    back.add_context("Later.")
    assert error.notes == ["In operator 3."]


@every_class
def test_an_error_can_be_copied_and_the_copy_is_its_own(cls: type[BlobspaceError]) -> None:
    error = cls("m", a=1)
    twin = copy.copy(error)
    twin.fields["a"] = 2
    twin.add_context("n")
    assert (error.fields, error.notes) == ({"a": 1}, [])


def test_a_subclass_of_a_user_survives_too() -> None:
    assert isinstance(pickle.loads(pickle.dumps(OwnError("m", blob="x"))), OwnError)


class OwnError(NotFoundError):
    kind = "own"


def test_a_storage_error_has_no_errno_that_would_hide_its_message() -> None:
    error = StorageError("Disk full.", path="/x")
    assert error.errno is None
    assert str(error) == "Disk full."


@every_class
def test_an_error_is_caught_as_the_built_in(cls: type[BlobspaceError]) -> None:
    with pytest.raises(BUILT_IN[cls.__name__]):
        raise cls("m")
