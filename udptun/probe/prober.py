"""The paths of one kind (UDP tunnel, VXLAN, echo) to all peers: their schedule and their changes.

Owns the paths, their schedule and the budget. The caller sends the probes that ``run`` yields,
reports what it receives, and calls ``run`` again at ``next_at``. Does not do I/O. Threading: one
thread.

The budget: at most IDLE_PER_SECOND probes a second to idle and unreachable peers, and at most
URGENT_PER_SECOND to pairs with traffic and to paths on which an answer is missing. If more probes
are due, they wait in order: with N idle peers, each is probed every max(10 s, N/100 s). A standby
path carries no packets, so with many peers it is probed less often: every max(10 s, N/25 s).
"""

from __future__ import annotations

import heapq
import math
import random
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from typing import Generic, NamedTuple, TypeVar

from .message import KernelRandom, new_token
from .schedule import Budget, Schedule
from .state import IDLE_JITTER, IDLE_SECONDS, PathState, next_batch

K = TypeVar("K", bound=Hashable)

IDLE_PER_SECOND = 100.0
URGENT_PER_SECOND = 400.0
HINTS_PER_SECOND = 20.0
BURST_SECONDS = 0.25  # a bucket holds the tokens of this time
ACTIVE_JITTER = 0.1
# The interval is multiplied by one of these. All paths share these numbers, which saves memory.
ACTIVE_FACTORS, IDLE_FACTORS = (
    tuple(1 + share * step / 32 for step in range(-32, 33))
    for share in (ACTIVE_JITTER, IDLE_JITTER))
STANDBY_PER_SECOND = 25.0  # probes to N idle standby paths
RETRY_SECONDS = 0.02  # shortest wait for the budget: probes are sent in small batches


class Request(NamedTuple, Generic[K]):
    """A probe to send now. It is recorded as sent."""

    key: K
    token: int
    size: int
    last_heard: float | None  # when the peer's last probe was received


class Prober(Generic[K]):
    """The paths by key.

    clock  returns the monotonic time in seconds
    """

    def __init__(self, clock: Callable[[], float], rng: random.Random | None = None) -> None:
        now = clock()
        self._clock = clock
        self._rng = rng or KernelRandom()
        self._jitter = rng or random.Random()
        self._paths: dict[K, PathState] = {}
        self._max_interval: dict[K, float] = {}
        self._standby: set[K] = set()
        self._idle_seconds = self._standby_seconds = IDLE_SECONDS  # the intervals
        self._schedule: Schedule[K] = Schedule()
        # The paths that wait for the budget, by urgency, in order.
        self._waiting: dict[bool, OrderedDict[K, None]] = {
            True: OrderedDict(), False: OrderedDict()
        }
        self._budget = {
            True: Budget(URGENT_PER_SECOND, URGENT_PER_SECOND * BURST_SECONDS, now),
            False: Budget(IDLE_PER_SECOND, IDLE_PER_SECOND * BURST_SECONDS, now),
        }
        self._hints = Budget(HINTS_PER_SECOND, HINTS_PER_SECOND, now)
        self._hinted: dict[K, int] = {}  # the reports that wait for this budget, see ``hint``
        # A heap: whether the path is idle, last use of a report, number of the entry, path.
        self._hint_order: list[tuple[bool, float, int, K]] = []
        self._hints_n = 0
        self._changed: dict[K, str] = {}  # in order: the state before the first change

    def __len__(self) -> int:
        return len(self._paths)

    def __contains__(self, key: K) -> bool:
        return key in self._paths

    def __iter__(self) -> Iterator[K]:
        return iter(self._paths)

    def __getitem__(self, key: K) -> PathState:
        return self._paths[key]

    def get(self, key: K) -> PathState | None:
        return self._paths.get(key)

    # -- the set of paths -------------------------------------------------------------------------

    def add(
        self, key: K, full_size: int, *, data_proves: bool = False,
        max_interval: float | None = None,
    ) -> None:
        """Probe a path from now on. A known path keeps its measurements.

        full_size     size of a message that is as large as the largest data packet
        data_proves   the peer does not have to answer probes: its data show that it is reachable
        max_interval  longest time between two probes, for a NAT on the path that deletes the
                      entries of idle peers
        """
        path = self._paths.get(key)
        if max_interval is None:
            self._max_interval.pop(key, None)
        else:
            self._max_interval[key] = max_interval
        if path is not None:
            path.resize(full_size)
            return
        self._paths[key] = PathState(self._clock(), full_size, data_proves)
        self._set_intervals()
        self._schedule.set(key, self._clock())

    def remove(self, key: K) -> None:
        self._paths.pop(key, None)
        self._set_intervals()
        self._max_interval.pop(key, None)
        self._standby.discard(key)
        self._schedule.remove(key)
        self._hinted.pop(key, None)
        self._changed.pop(key, None)

    def set_standby(self, key: K, standby: bool) -> None:
        """Set whether another path carries the packets to this peer at present."""
        if standby == (key in self._standby):
            return
        if (path := self._paths.get(key)) is not None:
            (self._standby.add if standby else self._standby.discard)(key)
            self._plan(key, path)

    # -- events -----------------------------------------------------------------------------------

    def answered(self, key: K, token: int, size: int, at: float) -> bool:
        """Record a reply. Return whether it answers a probe of this path."""
        path = self._paths.get(key)
        if path is None:
            return False
        before = _verdict(path)
        found = path.answered(at, token, size)
        if found:
            self._note(key, path, before)
            self._plan(key, path)
        return found

    def heard(
        self, key: K, at: float, token: int, heard_seconds: float | None = None
    ) -> None:
        """Record a request with this token. Its sender claims to be the peer, and to have received
        a probe from us ``heard_seconds`` ago."""
        path = self._paths.get(key)
        if path is not None:
            path.heard(at, token, heard_seconds, self._interval(key))
            self._plan(key, path)

    def data_received(self, key: K, at: float) -> None:
        path = self._paths.get(key)
        if path is not None:
            before = _verdict(path)
            path.data_received(at)
            if _verdict(path) != before:
                self._note(key, path, before)
                self._plan(key, path)

    def hint(self, key: K, size: int) -> None:
        """Record a report that only packets up to this size pass. Anybody can forge reports, so
        at most HINTS_PER_SECOND paths per second are probed because of them.

        If there are more reports, paths with traffic are first, and of these the path whose last
        report was used longest ago. So forged reports about some peers do not delay a true one
        about another peer for long.
        """
        path = self._paths.get(key)
        if path is None:
            return
        if key not in self._hinted:
            self._hints_n += 1  # makes the entries of the heap comparable
            heapq.heappush(
                self._hint_order, (not path.active, path.sizes.hinted_at, self._hints_n, key))
        self._hinted[key] = size
        self._use_hints()

    def _use_hints(self) -> None:
        now = self._clock()
        while self._hint_order and not self._hints.spent(now):
            *_, key = heapq.heappop(self._hint_order)
            size, path = self._hinted.pop(key, None), self._paths.get(key)
            if size is not None and path is not None and path.hint(now, size):
                self._hints.take(now)
                self._plan(key, path)

    def traffic(self, key: K) -> None:
        """Record that the pair has traffic. Call this about once a second while there is traffic.
        """
        path = self._paths.get(key)
        if path is not None:
            due = path.next_due(self._interval(key))
            path.traffic(self._clock())
            if path.next_due(self._interval(key)) < due:
                self._plan(key, path)

    def send_failed(self, request: Request[K], error: int) -> None:
        """Record that the kernel refused to send this probe, with this errno."""
        path = self._paths.get(request.key)
        if path is not None:
            before = _verdict(path)
            path.send_failed(self._clock(), request.token, error)
            self._note(request.key, path, before)
            self._plan(request.key, path)

    # -- probes and results -----------------------------------------------------------------------

    def run(self) -> Iterator[Request[K]]:
        """Yield the probes that are due and within the budget. Send each before the next one."""
        self._use_hints()
        for urgent, waiting in self._waiting.items():
            while waiting and not self._budget[urgent].spent(self._clock()):
                key, _ = waiting.popitem(last=False)
                yield from self._look(key)
                if key in waiting:  # the budget is used up
                    waiting.move_to_end(key, last=False)
                    break
            if not waiting:
                waiting.clear()  # frees the memory of a time when many paths waited
        for key in self._schedule.take(self._clock()):
            yield from self._look(key)

    def request(self, key: K, size: int) -> Request[K]:
        """Return an extra probe of one path, outside the schedule and the budget."""
        path = self._paths[key]
        request = self._sent(key, path, size, decisive=True)
        self._plan(key, path)
        return request

    def next_at(self) -> float | None:
        """Return the time at which to call ``run``; None if there is no path."""
        times = [self._schedule.next_at()]
        now = self._clock()
        for urgent, waiting in self._waiting.items():
            if waiting:
                at = max(self._budget[urgent].ready_at(now), now + RETRY_SECONDS)
                times.append(at if urgent else next_batch(at))
        if self._hint_order:
            times.append(max(self._hints.ready_at(now), now + RETRY_SECONDS))
        return min((at for at in times if at is not None), default=None)

    def has_nothing_before(self, at: float) -> bool:
        """Return whether ``next_at()`` certainly returns no time before ``at``. The result is valid
        only if that was true when ``run`` ended. This is faster than ``next_at``."""
        return not self._hint_order and self._schedule.is_empty_before(at)

    def take_changes(self) -> dict[K, str]:
        """Return the paths whose state or whose result for the sizes has changed since the last
        call, and the state that each had before."""
        if not self._changed:
            return {}
        changed, self._changed = self._changed, {}
        return changed

    def states(self) -> dict[str, int]:
        """Return the number of paths in each state."""
        counts: dict[str, int] = {}
        for path in self._paths.values():
            counts[path.state] = counts.get(path.state, 0) + 1
        return counts

    # -- inside -----------------------------------------------------------------------------------

    def _set_intervals(self) -> None:
        n = len(self._paths)
        self._idle_seconds = max(IDLE_SECONDS, n / IDLE_PER_SECOND)
        self._standby_seconds = max(IDLE_SECONDS, n / STANDBY_PER_SECOND)

    def _interval(self, key: K) -> float:
        """Return the interval at which this path is probed while it is idle."""
        interval = self._standby_seconds if key in self._standby else self._idle_seconds
        if self._max_interval and (limit := self._max_interval.get(key)) is not None:
            return min(interval, limit)
        return interval

    def _plan(self, key: K, path: PathState) -> None:
        self._schedule.set(key, min(path.next_due(self._interval(key)), path.next_expiry()))

    def _note(self, key: K, path: PathState, before: _Verdict) -> None:
        if _verdict(path) != before:
            self._changed.setdefault(key, before[0])

    def _look(self, key: K) -> Iterator[Request[K]]:
        """Count the unanswered probes, and yield the probes that are due."""
        path = self._paths.get(key)
        if path is None:
            return  # removed while it waited for the budget
        now = self._clock()
        if now >= path.next_expiry():
            before = _verdict(path)
            path.expire(now)
            self._note(key, path, before)
        if now < path.next_due(self._interval(key)):
            self._plan(key, path)
            return
        sizes = path.next_sizes(now)
        urgent = path.active or path.suspect
        if self._budget[urgent].take(now, len(sizes)):
            for index, size in enumerate(sizes, start=1):
                yield self._sent(key, path, size, decisive=index == len(sizes))
            self._plan(key, path)
            return
        self._waiting[urgent][key] = None
        if path.next_expiry() < math.inf:
            self._schedule.set(key, path.next_expiry())

    def _sent(self, key: K, path: PathState, size: int, decisive: bool) -> Request[K]:
        now = self._clock()
        spread = ACTIVE_FACTORS if path.active else IDLE_FACTORS
        token = new_token(self._rng, path.peer_half)
        path.sent(now, token, size, decisive, spread[int(self._jitter.random() * len(spread))])
        return Request(key, token, size, path.last_probe)


_Verdict = tuple[str, bool | None, bool, int | None]


def _verdict(path: PathState) -> _Verdict:
    """Return the values whose change is reported."""
    return path.state, path.sizes.full_passes, path.sizes.searching, path.sizes.limit
