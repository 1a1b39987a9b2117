"""Every error of the tree survives a real actor: as itself, with its text, fields and context."""

from __future__ import annotations

import pytest
import ray

from blobspace.ops import errors
from blobspace.ops.errors import BlobspaceError
from blobspace.workspace_actors.ray_errors import unwrapped


def all_classes() -> list[type[BlobspaceError]]:
    return [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, BlobspaceError)]


@pytest.fixture(scope="module")
def thrower(local_ray: None) -> object:
    class Thrower:  # a local class travels by value; a worker cannot import a test module
        def throw(self, name: str) -> None:
            error = getattr(errors, name)("what, where, expected, found, way out", workspace="w0", wanted_bytes=7)
            error.add_context("In a context.")
            raise error

    return ray.remote(num_cpus=0)(Thrower).remote()


@pytest.mark.parametrize("cls", all_classes(), ids=lambda cls: cls.__name__)
def test_an_error_arrives_as_itself(thrower: object, cls: type[BlobspaceError]) -> None:
    with pytest.raises(cls) as caught:
        ray.get(thrower.throw.remote(cls.__name__))
    error = unwrapped(caught.value, "the thrower")
    assert type(error) is cls
    assert error.kind == cls.kind
    assert error.fields == {"workspace": "w0", "wanted_bytes": 7}
    assert str(error) == "what, where, expected, found, way out\nIn a context."
