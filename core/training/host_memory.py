"""The host's heap over thousands of steps."""

from __future__ import annotations

import ctypes
import sys


def release_heap() -> None:
    """Give pages of the heap that are not in use back to the kernel (glibc's malloc_trim(3); elsewhere nothing).

    A heap of blocks of many sizes grows for thousands of steps although no more of it is in use than before: by 3 to
    7 MB per 1,000 steps of a small run, and by less than 1 MB when it is trimmed every 100 steps
    (`benchmarks/leaks.py`). It takes some milliseconds, and a fault for each page that is used again.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
