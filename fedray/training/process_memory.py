"""Memory that is used again and again: Python's garbage collector is kept away from what never becomes garbage, and
the C library from giving back what the next step takes again."""

import ctypes
import gc
import os
from typing import Any

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
"""glibc's numbers of what `mallopt` sets (malloc.h)."""

KEPT_BYTES = 1 << 30
"""So much may lie free at the end of the main heap."""
LARGEST_KEPT = 1 << 25
"""ResultBatcher of more bytes are given back all the same: glibc's own limit."""


def freeze_heap() -> None:
    """Collect what is garbage, and leave everything else out of all later collections.

    What torch and its kin import are a million objects that live as long as the process, and a collection that a
    thousand clients' messages set off would go through all of them.
    """
    gc.unfreeze()  # of an earlier call, some may be garbage by now
    gc.collect()
    gc.freeze()


def keep_freed_memory() -> None:
    """Let this process keep memory that is freed for whoever needs it next.

    A training step frees what it has allocated. glibc gives it back to the system by and by, and the next step takes it
    again, 4 KB a page fault, which costs more than writing to them. Afterwards the process keeps what its largest step
    took. Nothing is done where the environment says what to keep (`MALLOC_TRIM_THRESHOLD_`, `MALLOC_MMAP_THRESHOLD_`,
    `GLIBC_TUNABLES`), or for another C library.
    """
    told = any(f"MALLOC_{name}_THRESHOLD_" in os.environ for name in ("TRIM", "MMAP"))
    if told or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return
    if (mallopt := c_function("mallopt")) is not None:
        mallopt(TRIM_THRESHOLD, KEPT_BYTES)
        mallopt(MMAP_THRESHOLD, LARGEST_KEPT)


def c_function(name: str) -> Any:
    """Return a function of this process's C library; None where it has none of that name."""
    try:
        return getattr(ctypes.CDLL(None), name, None)
    except (OSError, TypeError):  # nothing is linked dynamically; Windows
        return None
