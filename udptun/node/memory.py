"""Keep the daemon small: what the C library holds back for speed that is not needed here.

Owns: the allocator's settings, of glibc; elsewhere nothing is done. A daemon has a few threads that
each allocate in bursts (a table read, a table sent). With an arena for each thread every one of
them keeps the most that it ever needed.
"""

from __future__ import annotations

import contextlib
import ctypes

_M_ARENA_MAX = -8  # malloc.h


def one_arena() -> None:
    """All threads allocate from one arena. To be called before there are any."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 1)


def give_back() -> None:
    """Return what is free to the kernel: after the largest burst, which the first snapshot is."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
