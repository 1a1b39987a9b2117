"""A Ray of our own on this machine, for as long as a ``with`` block."""

from __future__ import annotations

import logging
import os
from collections.abc import Generator
from contextlib import contextmanager

import ray

from ..coordinator import NAMESPACE

_OBJECT_STORE_BYTES = 200 * 2**20


@contextmanager
def local_ray() -> Generator[dict[str, str]]:
    """Start Ray, connect this process, and stop it at the end.

    Yields:
        The environment with which child processes find this Ray.
    """
    ray.init(
        "local",
        namespace=NAMESPACE,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        object_store_memory=_OBJECT_STORE_BYTES,
    )
    try:
        # Starting local Ray may have switched tokens on, in this process's environment; a client that is given an
        # address switches them neither on nor off by itself, so it must be told which of both.
        yield {
            **os.environ,
            "RAY_ADDRESS": ray.get_runtime_context().gcs_address,
            "RAY_AUTH_MODE": os.environ.get("RAY_AUTH_MODE", "disabled"),
        }
    finally:
        ray.shutdown()
