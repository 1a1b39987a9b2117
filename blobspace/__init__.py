"""blobspace: named workspaces, operators that run where the data is, and cluster-wide checkpoints.

The three layers are imported by name, lowest first:

* ``blobspace.ops``: what can be computed. No Ray, no files, no clock.
* ``blobspace.workspace_actors``: one process that owns blobs.
* ``blobspace.cluster``: many workspaces, the coordinator, checkpoints.

Importing this package, or any of its layers, has no effect and loads neither Ray nor CuPy.
"""

__version__ = "0.1.0"

__all__ = ["__version__"]
