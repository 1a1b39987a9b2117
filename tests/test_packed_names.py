"""Names on the wire come back as they were, and take less room than they would by themselves."""

from __future__ import annotations

import pickle
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blobspace.workspace_actors import Workspace
from blobspace.workspace_actors.packed_names import pack_names, unpack_names

NAMES = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1)


@given(st.dictionaries(NAMES, st.lists(NAMES, max_size=6), max_size=4), st.lists(NAMES, max_size=6))
def test_what_is_packed_comes_back_in_its_order(children: dict[str, list[str]], own: list[str]) -> None:
    names = {"": own, **children}
    back = unpack_names(pack_names(names))
    assert back == names
    assert list(back) == list(names)


def test_names_of_a_workspace_and_its_children_come_back() -> None:
    ws = Workspace("w")
    for name in ("a", "gpu_0/fc_w", "é\n", " ", "日本" * 100):
        ws.feed_blob(name, 1)
        ws.child("c/d", create=True).create_blob(f"{name}!")
    assert unpack_names(pack_names(ws.family_names())) == ws.family_names()


def test_many_names_that_are_alike_take_little_room() -> None:
    names = [f"tower_{i:02}/layer_{j:03}/weight_momentum" for i in range(20) for j in range(50)]
    packed = pack_names({"": names})
    assert len(packed) < sum(map(len, names)) / 4
    assert unpack_names(packed) == {"": names}


def test_names_that_were_unpacked_cannot_be_changed() -> None:
    names = unpack_names(pack_names({"": ["a", "b"]}))[""]
    assert names == ["a", "b"]
    assert isinstance(names, list)
    changes: list[Callable[[], object]] = [
        lambda: names.append("c"),
        names.sort,
        lambda: names.__setitem__(0, "c"),
        lambda: names.__delitem__(0),
        lambda: names.__iadd__(["c"]),
        names.clear,
        names.pop,
    ]
    for change in changes:
        with pytest.raises(TypeError, match="change a copy"):
            change()
    assert list(names) == ["a", "b"]
    assert type(pickle.loads(pickle.dumps(names))) is list
