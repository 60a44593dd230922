"""Settings of the C library's allocator that keep the daemon's memory small.

Owns: these settings, for glibc; other C libraries are left as they are. The daemon has a few
threads that each allocate in bursts (a table is read, a table is sent). With one arena per thread
each arena would stay as large as its largest burst.
"""

from __future__ import annotations

import contextlib
import ctypes

_M_ARENA_MAX = -8  # malloc.h


def use_one_arena() -> None:
    """Let all threads allocate from one arena. Call it before there are other threads."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 1)


def return_free_memory() -> None:
    """Return free memory to the kernel. Of use after the largest burst: the first snapshot."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
