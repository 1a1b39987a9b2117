"""The two things that make disk and memory figures of a virtual machine depend on who ran before.

* A virtual machine may have handed free blocks of memory back to its host; the first to touch one pays for it.
  :func:`prewarm` takes and frees such memory before the clock starts.
* A file that was written is in the page cache. :func:`evict` throws it out, for a cold read.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

MIB = 2**20


def prewarm(byte_count: int, folder: Path) -> None:
    """Fill that much page cache through an unlinked file, and give it back unwritten."""
    block = b"\1" * (4 * MIB)
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        for _ in range(-(-byte_count // len(block))):
            file.write(block)


def evict(file: Path) -> None:
    """Drop a file's pages. They must be on the disk already."""
    opened = os.open(file, os.O_RDONLY)
    try:
        os.posix_fadvise(opened, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(opened)
