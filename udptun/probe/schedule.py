"""The schedule of the paths, and the limit of probes per second.

Owns a heap of times, and token buckets. A change of a time pushes a new entry. The old entry stays
in the heap, and is skipped when its time has come. So no operation scans all paths. Times are
seconds of the monotonic clock. Threading: one thread.
"""

from __future__ import annotations

import heapq
from collections.abc import Hashable, Iterator
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)

STALE_MIN = 64  # the heap is rebuilt when it has this many more entries than twice the keys


class Schedule(Generic[K]):
    """Keys with a time each."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, K]] = []
        self._entry: dict[K, tuple[float, int, K]] = {}  # the valid entry of each key
        self._order = 0  # keys with equal times keep the order of ``set``

    def __len__(self) -> int:
        return len(self._entry)

    def set(self, key: K, at: float) -> None:
        """Set the time of a key. Replaces its former time."""
        former = self._entry.get(key)
        if former is not None and former[0] == at:
            return
        self._order += 1
        entry = self._entry[key] = at, self._order, key
        heapq.heappush(self._heap, entry)
        if len(self._heap) > 2 * len(self._entry) + STALE_MIN:
            self._heap = list(self._entry.values())
            heapq.heapify(self._heap)

    def remove(self, key: K) -> None:
        self._entry.pop(key, None)

    def take(self, now: float) -> Iterator[K]:
        """Yield the keys whose time has come, earliest first. A yielded key has no time any more.

        A time that is set while this runs is not yielded before the next call, unless it is earlier
        than ``now``.
        """
        while self._heap and self._heap[0][0] <= now:
            entry = heapq.heappop(self._heap)
            key = entry[2]
            if self._entry.get(key) is entry:
                del self._entry[key]
                yield key

    def next_at(self) -> float | None:
        """Return the earliest time; None if there is no key."""
        while self._heap:
            entry = self._heap[0]
            if self._entry.get(entry[2]) is entry:
                return entry[0]
            heapq.heappop(self._heap)
        return None


class Budget:
    """A token bucket: ``per_second`` on average, at most ``burst`` at once."""

    def __init__(self, per_second: float, burst: float, now: float) -> None:
        self.per_second = per_second
        self._burst = burst
        self._tokens = burst
        self._at = now

    def take(self, now: float, n: int = 1) -> bool:
        """Take ``n`` tokens if the bucket has them; return whether it had. If ``n`` is more than
        ``burst``, a full bucket is enough."""
        self._tokens = min(self._burst, self._tokens + (now - self._at) * self.per_second)
        self._at = now
        if self._tokens < min(n, self._burst):
            return False
        self._tokens -= n
        return True

    def spent(self, now: float) -> bool:
        """Return whether the bucket has less than one token."""
        return self._tokens + (now - self._at) * self.per_second < 1

    def ready_at(self, now: float, n: int = 1) -> float:
        """Return the time at which ``take`` will succeed."""
        missing = min(n, self._burst) - self._tokens - (now - self._at) * self.per_second
        return now + max(missing, 0.0) / self.per_second
