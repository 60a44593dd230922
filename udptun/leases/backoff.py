"""Exponential back-off with jitter. No clock and no I/O.

Threads: each Backoff is used by one task only.
"""

from __future__ import annotations

import random


class Backoff:
    """Delays in seconds that double from ``low`` to ``high``.

    Each delay is shortened at random, by up to a half. So nodes that lost the connection to the
    same store do not all reconnect at the same moment.
    """

    def __init__(self, low: float, high: float) -> None:
        self._low, self._high, self._next = low, high, low

    def reset(self) -> None:
        self._next = self._low

    def next(self) -> float:
        delay, self._next = self._next, min(self._next * 2, self._high)
        return delay * random.uniform(0.5, 1)
