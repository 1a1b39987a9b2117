"""The operators that come with blobspace, one module per family. Importing this registers them."""

from . import (
    collective,
    elementwise,
    fill,
    inspection,
    linear,
    loss,
    optimizer,
    persistence,
    reduction,
    shape,
)

__all__ = [
    "collective",
    "elementwise",
    "fill",
    "inspection",
    "linear",
    "loss",
    "optimizer",
    "persistence",
    "reduction",
    "shape",
]
