"""Which peers have metrics of their own, and the sum of all others.

A label with one value per peer makes the number of time series grow with the cluster. So at most a
given number of peers gets series of their own; the others are one series, "other". A peer keeps its
series until it leaves. A free place goes to the peer with the most bytes. Owns this choice. Pure
data, one thread.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping

OTHER = "other"

Counters = tuple[int, int, int, int]  # sent packets and bytes, received packets and bytes


class PeerSeries:
    def __init__(self, limit: int) -> None:
        self._limit = limit
        self.shown: set[str] = set()
        self._rest: dict[str, Counters] = {}  # the last counters of the other peers
        self._other: Counters = (0, 0, 0, 0)

    def update(self, counters: Mapping[str, Counters]) -> dict[str, Counters]:
        """Return the counters by label. They never decrease, except when a peer starts again.

        counters  of all peers
        """
        self.shown &= counters.keys()
        free = self._limit - len(self.shown)
        if free > 0:
            rest = counters.keys() - self.shown
            self.shown |= set(heapq.nlargest(
                free, sorted(rest), key=lambda name: counters[name][1] + counters[name][3]))
        before, self._rest = self._rest, {}
        for name, now in counters.items():
            if name not in self.shown:
                self._rest[name] = now
                self._add(before.get(name, (0, 0, 0, 0)), now)
        found = {name: counters[name] for name in sorted(self.shown)}
        if self._rest or any(self._other):
            found[OTHER] = self._other
        return found

    def _add(self, before: Counters, now: Counters) -> None:
        """Add what a peer has counted since ``before``."""
        if any(new < old for new, old in zip(now, before, strict=True)):
            before = (0, 0, 0, 0)  # the peer had left, and has come back
        a, b, c, d = (total + new - old
                      for total, new, old in zip(self._other, now, before, strict=True))
        self._other = a, b, c, d
