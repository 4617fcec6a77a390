"""Reuse of memory: the garbage collector skips objects that never become garbage, and the C library keeps freed memory
for the next step."""

import ctypes
import gc
import os
from typing import Any

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
"""glibc's numbers of what `mallopt` sets (malloc.h)."""

KEPT_BYTES = 1 << 30
"""Free bytes that may remain at the end of the main heap."""
LARGEST_KEPT = 1 << 25
"""Blocks of more bytes are returned to the system all the same: glibc's own limit."""


def freeze_heap() -> None:
    """Collect garbage, and exclude everything else from all later collections. For a process of the runtime's own that
    has imported its libraries, and before it has a model: what is excluded is never freed if it is part of a cycle.

    torch and similar libraries import a million objects that live as long as the process, and every collection that
    messages trigger would visit all of them.
    """
    gc.collect()
    gc.freeze()


def keep_freed_memory() -> None:
    """Make the C library keep freed memory for later allocations of this process.

    A training step frees what it has allocated. By default, glibc returns it to the system, and the next step allocates
    it again with a page fault per 4 KB, which takes longer than writing to it. With this setting, the process keeps
    what its largest step took. Nothing is changed if the environment says what to keep (`MALLOC_TRIM_THRESHOLD_`,
    `MALLOC_MMAP_THRESHOLD_`, `GLIBC_TUNABLES`), or for another C library.
    """
    told = any(f"MALLOC_{name}_THRESHOLD_" in os.environ for name in ("TRIM", "MMAP"))
    if told or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return
    if (mallopt := c_function("mallopt")) is not None:
        mallopt(TRIM_THRESHOLD, KEPT_BYTES)
        mallopt(MMAP_THRESHOLD, LARGEST_KEPT)


def c_function(name: str) -> Any:
    """Return a function of this process's C library; None: it has none of that name."""
    try:
        return getattr(ctypes.CDLL(None), name, None)
    except (OSError, TypeError):  # nothing is linked dynamically; Windows
        return None
