"""A network with a clock of its own: a prober probes peers over it. Nothing sleeps."""

import heapq
import random

from udptun.probe.prober import Prober
from udptun.probe.state import UNKNOWN

FULL = 1400
ROUND_TRIP = 0.002


class Simulation:
    """A prober and its peers.

    passes(key, size, now)  whether a probe and its reply pass; replaced by a test
    verdicts                (time, key, state, whether the full size passes), in order
    """

    def __init__(self, seed=1, full=FULL, round_trip=ROUND_TRIP):
        self.now = 1000.0
        self.full, self.round_trip = full, round_trip
        self.prober = Prober(lambda: self.now, random.Random(seed))
        self.passes = lambda key, size, now: True
        self.with_traffic = set()
        self.sent = []  # (time, key, size)
        self.verdicts = []
        self._replies = []  # heap of (time, order, key, token, size)
        self._traffic_at = self.now

    def add(self, *keys, **options):
        for key in keys:
            self.prober.add(key, self.full, **options)

    def run(self, seconds):
        """Let this time pass."""
        end = self.now + seconds
        while True:
            times = [end, self._traffic_at]
            if self._replies:
                times.append(self._replies[0][0])
            if (due := self.prober.next_at()) is not None:
                times.append(due)
            self.now = max(self.now, min(times))
            self._step()
            if self.now >= end:
                return self

    def _step(self):
        while self._replies and self._replies[0][0] <= self.now:
            at, _, key, token, size = heapq.heappop(self._replies)
            self.prober.answered(key, token, size, at)
        if self.now >= self._traffic_at:
            self._traffic_at = self.now + 1.0
            for key in self.with_traffic:
                self.prober.traffic(key)
        for request in self.prober.run():
            self.sent.append((self.now, request.key, request.size))
            if self.passes(request.key, request.size, self.now):
                entry = (self.now + self.round_trip, len(self.sent), request.key, request.token,
                         request.size)
                heapq.heappush(self._replies, entry)
        for key in self.prober.take_changes():
            path = self.prober[key]
            self.verdicts.append((self.now, key, path.state, path.sizes.full_passes))

    # -- asking -----------------------------------------------------------------------------------

    def state(self, key):
        path = self.prober.get(key)
        return UNKNOWN if path is None else path.state

    def sent_since(self, since, key=None):
        return [row for row in self.sent if row[0] >= since and key in (None, row[1])]

    def first(self, key, state, since, full=...):
        """Return after how many seconds the key first got this verdict; None: not at all."""
        for at, of, verdict, passes in self.verdicts:
            if at >= since and of == key and verdict == state and full in (..., passes):
                return at - since
        return None


class Two:
    """Two nodes that probe each other.

    passes(sender, now)  whether a datagram of this node, 0 or 1, arrives; replaced by a test
    """

    def __init__(self, seed=1):
        self.now = 1000.0
        rng = random.Random(seed)
        self.probers = [Prober(lambda: self.now, rng) for _ in range(2)]
        for prober in self.probers:
            prober.add("other", FULL)
        self.passes = lambda sender, now: True
        self.sent = []  # (time, sender)
        self._flying = []  # heap of (time, order, receiver, kind, token, size, heard)

    def run(self, seconds):
        end = self.now + seconds
        while self.now < end:
            times = [end, *(prober.next_at() for prober in self.probers)]
            times += [row[0] for row in self._flying[:1]]
            self.now = max(self.now, min(times))
            while self._flying and self._flying[0][0] <= self.now:
                self._receive(*heapq.heappop(self._flying)[2:])
            for node, prober in enumerate(self.probers):
                for request in prober.run():
                    self.sent.append((self.now, node))
                    heard = request.last_heard
                    heard = None if heard is None else self.now - heard
                    self._fly(node, "request", request.token, request.size, heard)
        return self

    def _fly(self, sender, kind, token, size, heard):
        if self.passes(sender, self.now):
            self._order = getattr(self, "_order", 0) + 1
            row = (self.now + ROUND_TRIP / 2, self._order, 1 - sender, kind, token, size, heard)
            heapq.heappush(self._flying, row)

    def _receive(self, node, kind, token, size, heard):
        if kind == "reply":
            self.probers[node].answered("other", token, size, self.now)
        else:
            self.probers[node].heard("other", self.now, token, heard)
            self._fly(node, "reply", token, size, 0.0)

    def states(self):
        return [prober["other"].state for prober in self.probers]
