"""The schedule of the paths, and the limit of probes per second.

Owns the lists of the keys that are due together, and token buckets. A time is rounded up to 1/64 s,
and all keys with the same time share one list. A change of a time adds the key to another list. The
old entry stays, and is skipped when its time has come. So no operation scans all paths. Times are
seconds of the monotonic clock. Threading: one thread.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Hashable, Iterator
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)

PER_SECOND = 64  # a power of two, so that multiplying and dividing times is exact
STALE_MIN = 64  # old entries are removed if the entries exceed twice the keys by this number


class Schedule(Generic[K]):
    """Keys with a time each."""

    def __init__(self) -> None:
        self._due: dict[int, list[K]] = {}  # by time, in units of 1/PER_SECOND
        self._times: list[int] = []  # a heap: the keys of _due
        self._of: dict[K, list[K]] = {}  # the list with the valid entry of each key
        self._entries_n = 0

    def __len__(self) -> int:
        return len(self._of)

    def set(self, key: K, at: float) -> None:
        """Set the time of a key. Replaces its former time."""
        time = math.ceil(at * PER_SECOND)
        due = self._due.get(time)
        if due is None:
            due = self._due[time] = []
            heapq.heappush(self._times, time)
        elif self._of.get(key) is due:
            return
        due.append(key)
        self._of[key] = due
        self._entries_n += 1
        if self._entries_n > 2 * len(self._of) + STALE_MIN:
            self._remove_stale()

    def remove(self, key: K) -> None:
        self._of.pop(key, None)

    def take(self, now: float) -> Iterator[K]:
        """Yield the keys whose time has come, those of the earliest time first. A yielded key has
        no time any more.

        If a time is set while this runs, this call yields its key only if the time is not after
        ``now``. If the caller stops early, the next call continues.
        """
        while self._times and self._times[0] <= now * PER_SECOND:
            due = self._due[self._times[0]]
            if not due:
                self._drop_first()
                continue
            key = due.pop()
            self._entries_n -= 1
            if self._of.get(key) is due:
                del self._of[key]
                yield key

    def next_at(self) -> float | None:
        """Return the earliest time; None if there is no key."""
        while self._times:
            due = self._due[self._times[0]]
            while due:
                if self._of.get(due[-1]) is due:
                    return self._times[0] / PER_SECOND
                due.pop()
                self._entries_n -= 1
            self._drop_first()
        return None

    def is_empty_before(self, at: float) -> bool:
        """Return whether no key has an earlier time. False also if only old entries are earlier."""
        return not self._times or self._times[0] >= at * PER_SECOND

    def _drop_first(self) -> None:
        del self._due[heapq.heappop(self._times)]

    def _remove_stale(self) -> None:
        for time, due in [*self._due.items()]:
            left = [key for key in dict.fromkeys(due) if self._of.get(key) is due]
            due[:] = left
            if not left:
                del self._due[time]
        self._times = [*self._due]
        heapq.heapify(self._times)
        self._entries_n = len(self._of)


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
