"""A checkpoint written by each released version of the format loads for ever. FORMAT.md, section 7."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from blobspace.cluster.checkpoint import LocalStore, list_checkpoints, load_workspace, read_index, read_manifest, verify
from blobspace.ops import Net
from blobspace.ops.dtypes import TENSOR_DTYPES
from blobspace.workspace_actors import Workspace

GOLDEN = Path(__file__).parent / "golden_checkpoints"


def filled_workspace() -> Workspace:
    """Return what the golden checkpoints hold: every kind and dtype, children, a net, drawn numbers."""
    ws = Workspace("w0", seed=7)
    for name, dtype in TENSOR_DTYPES.items():
        ws.feed_blob(f"tensors/{name}", np.arange(6).reshape(2, 3).astype(dtype))
    ws.feed_blob("scalar", np.array(2.5, ml_dtypes.bfloat16))
    ws.feed_blob("nothing", np.zeros((0, 3), np.float32))
    ws.feed_blob("strings", np.array([[b"a"], [b"\0\xff"], ["é".encode()]], dtype=object))
    ws.feed_blob("plain", {"list": [1, -1, 2.5, None, True], 3: b"bytes", "text": "日本"})
    ws.create_blob("never written")
    ws.child("inner/most", create=True).feed_blob("own", np.arange(3))
    net = Net("draw")
    net.UniformFill([], "drawn", shape=[4])
    ws.create_net(net)
    ws.run_net("draw", 3)
    return ws


@pytest.mark.parametrize("version", [1])
def test_a_golden_checkpoint_is_sound_and_comes_back_bit_by_bit(version: int) -> None:
    store = LocalStore(GOLDEN / f"v{version}")
    assert [summary.step for summary in list_checkpoints(store)] == [42]
    manifest = read_manifest(store)
    assert manifest.metadata == {"made for": "tests/test_checkpoint_golden.py"}
    assert verify(store, manifest).is_sound

    restored = Workspace("w0")
    stage = restored.stage()
    restored.restore(load_workspace(store, read_index(store, manifest, "w0"), allocate=stage.allocate), stage)
    expected = filled_workspace()
    assert restored.specs() == expected.specs()
    for ours, theirs in ((expected, restored), (expected.child("inner/most"), restored.child("inner/most"))):
        for name in ours.local_blobs():
            if name != "never written":
                np.testing.assert_array_equal(theirs.fetch_blob(name), ours.fetch_blob(name))
    restored.run_net("draw")
    expected.run_net("draw")
    np.testing.assert_array_equal(restored.fetch_blob("drawn"), expected.fetch_blob("drawn"))
