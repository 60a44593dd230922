"""Notices that another machine writes our lease, and limits how often we write our data again.

Owns: the time at which our data may be written again, and the report in the source's health. Does
not depend on a store. Asyncio, one loop.

Two machines write one lease if one is a copy of the other, or if both have the same name or public
address. Each machine sees the writes of the other one. If each wrote its own data again at once,
the lease would change all the time, and all nodes would apply each change. So a machine writes
again at once only after the first write of the other machine, and later after increasing delays.
"""

from __future__ import annotations

import time

from .base import SourceHealth

# The longest delay before our data are written again. A contest is over when the other machine has
# not written for twice this time.
QUIET_SECONDS = 600.0
FIRST_DELAY_SECONDS = 5.0
MAX_DOUBLINGS = 7  # of the delay; more would exceed QUIET_SECONDS anyway


class Contest:
    """A contest: another machine writes our lease too. ``health.contested`` describes it; "" if
    there is no contest."""

    def __init__(self, health: SourceHealth) -> None:
        self._health = health
        self._seen: object = None
        self._writes_n = 0  # number of writes of the other machine since the contest began
        self._last = 0.0  # time.monotonic() of the last write of the other machine
        self._not_before = 0.0

    def may_write(self, version: object, text: str) -> bool:
        """Return whether our data may be written over the data of another machine now.

        version  differs for each write of the other machine
        text     a sentence about the write of the other machine, for ``health.contested``
        """
        now = time.monotonic()
        if version != self._seen:
            self.end_if_quiet()
            self._seen = version
            self._writes_n += 1
            self._last = now
            self._not_before = now + self._delay_after(self._writes_n)
            self._health.contested = text
        return now >= self._not_before

    @staticmethod
    def _delay_after(writes_n: int) -> float:
        if writes_n < 2:
            return 0.0
        doublings = min(writes_n - 2, MAX_DOUBLINGS)
        return min(FIRST_DELAY_SECONDS * 2.0**doublings, QUIET_SECONDS)

    @property
    def delay(self) -> float:
        """Seconds until our data may be written."""
        return max(0.0, self._not_before - time.monotonic())

    def end_if_quiet(self) -> None:
        if self._writes_n and time.monotonic() - self._last > 2 * QUIET_SECONDS:
            self._writes_n = 0
            self._health.contested = ""
