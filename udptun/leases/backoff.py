"""How long to wait before another attempt."""

from __future__ import annotations

import random


class Backoff:
    """Seconds, doubling from ``low`` to ``high``, each shortened at random by up to a half, so that
    nodes which lost the same store do not come back all at once."""

    def __init__(self, low: float, high: float) -> None:
        self._low, self._high, self._next = low, high, low

    def reset(self) -> None:
        self._next = self._low

    def next(self) -> float:
        pause, self._next = self._next, min(self._next * 2, self._high)
        return pause * random.uniform(0.5, 1)
