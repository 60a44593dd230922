"""Settings of the C library's allocator that keep the daemon's memory small.

Owns: these settings, for glibc. With another C library the functions do nothing. The daemon has a
few threads that each allocate much memory for a short time, for example to read or to send a table.
If each thread had its own arena, each arena would stay as large as the largest of these
allocations.
"""

from __future__ import annotations

import contextlib
import ctypes

_M_ARENA_MAX = -8  # malloc.h


def use_one_arena() -> None:
    """Let all threads allocate from one arena. Call it before other threads are started."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 1)


def return_free_memory() -> None:
    """Return free memory to the kernel.

    Call it after the first snapshot is applied, because the first snapshot needs the most memory.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
