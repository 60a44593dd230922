"""The state of one path to one peer, measured with probes and with received packets.

Owns the verdict (reachable, unreachable, unknown), the round trip, the loss, the largest size that
passes, and the time of the next probe. Does not depend on sockets, on how a probe is encoded, or on
other paths. Times are seconds of the monotonic clock, given by the caller. Threading: one thread.

A path is reachable when a probe is answered: the answer proves both directions. It is unreachable
after LOST_AFTER unanswered probes in a row. Received data prove only one direction. Exception: if
a peer does not have to answer probes (``data_proves``), its data also make the path reachable.
"""

from __future__ import annotations

import errno
import math
from collections.abc import Mapping
from typing import Any, Final

from ..text import errno_reason
from . import message
from .sizes import SMALL_SIZE, SizeSearch

REACHABLE: Final = "reachable"
UNREACHABLE: Final = "unreachable"
UNKNOWN: Final = "unknown"

# Unanswered probes in a row until a path is unreachable. With a loss of 5 %, this happens by chance
# once in 8,000 probes.
LOST_AFTER = 3
ANSWER_SECONDS = 1.0  # a probe counts as unanswered after this time, or after 3 round trips
ANSWER_MAX_SECONDS = 3.0
SUSPECT_SECONDS = 0.5  # after this time, or 2 round trips, without an answer the next one is sent
ACTIVE_SECONDS = 1.0  # time between probes of a pair with traffic: a verdict takes at most 4 s
ACTIVE_LINGER_SECONDS = 3.0  # a pair counts as active for this time after its last traffic
# Time between probes of an idle pair. With 20 % jitter, and 2.1 s to the verdict, the loss of a
# peer is detected within 15 s.
IDLE_SECONDS = 10.0
# The probes of idle pairs are sent in batches, this many per second: with many peers, each wake-up
# costs more than the probes.
IDLE_BATCHES_PER_SECOND = 5
ROUND_SECONDS = 0.1  # time between two rounds of probes that search for the largest size
LARGE_EVERY_ACTIVE = 2  # on a pair with traffic, every second probe is large
# On an idle pair, every fourth probe is large: large probes cost bandwidth, and an idle pair sends
# no large packets.
LARGE_EVERY_IDLE = 4
IDLE_JITTER = 0.2  # the interval of an idle path varies by this share, to spread the probes
# On an idle pair, a probe of either side serves both sides. But each side sends a probe of its own
# at least once in this number of intervals.
OWN_EVERY = 4
LOSS_WINDOW = 32  # probes
RTT_GAIN = 1 / 8  # RFC 6298
LATE_N = 8  # number of unanswered probes that are kept, because a late answer also proves the path

# Errors of a send that do not depend on the path.
_TRANSIENT = frozenset({errno.EAGAIN, errno.ENOBUFS, errno.ENOMEM})


class _Sent:
    """One probe that is not answered yet.

    decisive  whether its loss counts for the verdict. False for a large probe that is sent just
              before a small one
    """

    __slots__ = ("at", "decisive", "size", "token")

    def __init__(self, token: int, size: int, at: float, decisive: bool) -> None:
        self.token, self.size, self.at, self.decisive = token, size, at, decisive


class PathState:
    """One path.

    state        REACHABLE, UNREACHABLE or UNKNOWN
    since        when the path entered its state
    rtt          smoothed round trip in seconds; None: no answer yet
    last_answer  when the last probe was answered; None: never
    last_probe   when the last probe (request or reply) from the peer was received; None: never
    last_data    when the last data packet was received; None: never or unknown
    peer_heard   when the peer last received a probe from us, as it has reported; None: never
    send_errno   error of the last probe if the kernel refused to send it, else 0
    peer_half    ``message.half`` of the token of the peer's last request; 0: none yet
    sizes        the largest size that passes
    """

    __slots__ = (
        "_active_until", "_answered_half", "_awaited_n", "_backoff_n", "_data_proves", "_history",
        "_history_n", "_jitter", "_late", "_missed_at", "_missed_n", "_pending", "_probes_n",
        "_replied_at", "_sent_at", "_soon", "last_answer", "last_data", "last_probe", "peer_half",
        "peer_heard", "rtt", "send_errno", "since", "sizes", "state",
    )

    def __init__(self, now: float, full_size: int, data_proves: bool = False) -> None:
        self.state: str = UNKNOWN
        self.since = now
        self.rtt: float | None = None
        self.last_answer: float | None = None
        self.last_probe: float | None = None
        self.last_data: float | None = None
        self.send_errno = 0
        self.sizes = SizeSearch(full_size)
        self._data_proves = data_proves
        # Tuples: they are empty most of the time, and all paths share one empty tuple.
        self._pending: tuple[_Sent, ...] = ()
        self._late: tuple[_Sent, ...] = ()
        self._awaited_n = 0  # decisive probes in _pending
        self._history = 0  # one bit per finished probe, the lowest bit is the last one; 1: lost
        self._history_n = 0
        self._missed_n = 0  # decisive probes in a row without an answer
        self._backoff_n = 0  # probes since the path became unreachable
        self._probes_n = 0
        self._sent_at = now
        self._jitter = 1.0
        self._missed_at = now  # when the first of the _missed_n probes was sent
        # The next probe is sent at once. It is large, unless the path is unreachable.
        self._soon = True
        self._active_until = now
        self._replied_at = 0.0  # when the last request of the peer was answered
        self.peer_heard: float | None = None
        # ``message.half`` of the token of our last request that was answered in time; 0: none
        self._answered_half = 0
        self.peer_half = 0

    # -- events -----------------------------------------------------------------------------------

    def sent(
        self, now: float, token: int, size: int, decisive: bool = True, jitter: float = 1.0
    ) -> None:
        """Record that a probe is sent now. ``jitter`` multiplies the time until the next one."""
        self._pending += (_Sent(token, size, now, decisive),)
        self._sent_at = now
        self._jitter = jitter
        self._soon = False
        self.send_errno = 0
        if decisive:
            self._awaited_n += 1
            self._probes_n += 1
            if self.state == UNREACHABLE:
                self._backoff_n += 1

    def send_failed(self, now: float, token: int, error: int) -> None:
        """Record that the kernel refused to send the probe, with this errno."""
        probe, self._pending = _take(self._pending, token)
        if probe is None:
            return
        self._awaited_n -= probe.decisive
        if error == errno.EMSGSIZE and probe.size > SMALL_SIZE:
            self.sizes.refused(probe.size, now)
        elif error not in _TRANSIENT:
            self.send_errno = error
            self._miss(probe, now)

    def answered(self, now: float, token: int, size: int) -> bool:
        """Record a reply. Return whether it answers a probe of this path."""
        earlier = self._pending
        probe, self._pending = _take(self._pending, token)
        if probe is not None:
            self._awaited_n -= probe.decisive
            self._late = ()  # the answers to earlier probes would prove nothing new
            self._answered_half = message.half(token)
            self._record(probe, lost=False)
        else:
            probe, self._late = _take(self._late, token)
        if probe is None or size != probe.size:
            return False
        sample = max(now - probe.at, 0.0)
        self.rtt = sample if self.rtt is None else self.rtt + RTT_GAIN * (sample - self.rtt)
        self.last_answer = self.last_probe = self.peer_heard = now
        self._overtake(earlier, probe, now)
        self.sizes.passed(size, probe.at)
        self._proved(now)
        return True

    def heard(
        self, now: float, token: int, heard_seconds: float | None, idle_seconds: float
    ) -> None:
        """Record a request of the peer. The peer claims that it received a probe from us
        ``heard_seconds`` ago (None: never). ``idle_seconds``: the interval of an idle path.

        The sender of a request can be forged. So the claim counts only if the token proves that the
        sender has received our last answered request. Then the claim has one of two effects:
        - If it shows that our answer to the peer's previous request has not arrived, the path is
          probed at once.
        - If it shows that the peer has heard us within an interval, both directions work, and the
          next probe of an idle path is postponed. Some probes are sent nevertheless, for the round
          trip, the loss and the sizes.

        A request that proves nothing has one effect: an unreachable path is probed, at most once
        per second, because the peer may be back.
        """
        replied_at, self._replied_at = self._replied_at, now
        self.last_probe = now
        self.peer_half = message.half(token)
        if self.state == UNREACHABLE and now - self._sent_at >= ACTIVE_SECONDS:
            self._soon = True
        if heard_seconds is None or not message.proves(token, self._answered_half):
            return
        self.peer_heard = now - heard_seconds
        if self.state != REACHABLE or self.suspect:
            return
        # An answer that was sent after this time may still arrive at the peer.
        quick = now - max(SUSPECT_SECONDS / 2, 2 * (self.rtt or 0.0))
        if 0 < replied_at < quick and self.peer_heard < replied_at:
            self._soon = True
        own = self.last_answer is not None and now - self.last_answer < OWN_EVERY * idle_seconds
        if heard_seconds <= idle_seconds * (1 + IDLE_JITTER) and own and \
                not (self.active or self._soon):
            self._sent_at = now

    def data_received(self, now: float) -> None:
        self.last_data = now
        if self._data_proves:
            self._proved(now)

    def traffic(self, now: float) -> None:
        """Record traffic of the pair: packets were sent to the peer, or received from it."""
        if now >= self._active_until:
            self._soon = True  # the last probe of an idle pair can be long ago
        self._active_until = now + ACTIVE_LINGER_SECONDS

    def hint(self, now: float, size: int) -> bool:
        """Record a report that only packets up to this size pass. Return whether to probe now."""
        if self.state != REACHABLE or not self.sizes.hint(size, now):
            return False
        self._soon = True
        return True

    def resize(self, full_size: int) -> None:
        """Change the size of the largest data packet."""
        if full_size != self.sizes.full:
            self.sizes = SizeSearch(full_size)
            self._soon = True

    def expire(self, now: float) -> None:
        """Count the probes that were not answered in time."""
        while self._pending and now >= self._pending[0].at + self._wait():
            probe, *pending = self._pending
            self._pending = tuple(pending)
            self._awaited_n -= probe.decisive
            self._late = (*self._late[1 - LATE_N :], probe)
            self._miss(probe, now)

    # -- another process continues ----------------------------------------------------------------

    def measured(self) -> dict[str, Any]:
        """Return what is known about the path, as JSON. Probes without an answer are left out."""
        return {
            "state": self.state, "since": self.since, "rtt": self.rtt,
            "last_answer": self.last_answer, "last_probe": self.last_probe,
            "last_data": self.last_data, "history": self._history, "history_n": self._history_n,
            "full": self.sizes.full, **self.sizes.measured(),
        }

    def inherit(self, had: Mapping[str, Any], now: float) -> None:
        """Continue with the result of ``measured`` of an earlier process, on the same clock.

        Missing values stay as they are. The next probe is sent soon, because the earlier process
        may have waited for an answer.
        """
        self.state, self.since = had.get("state", self.state), had.get("since", self.since)
        self.rtt = had.get("rtt")
        self.last_answer, self.last_probe = had.get("last_answer"), had.get("last_probe")
        self.last_data = had.get("last_data")
        self._history, self._history_n = had.get("history", 0), had.get("history_n", 0)
        if had.get("full") == self.sizes.full:
            self.sizes.inherit(had, now)
        self._missed_n = LOST_AFTER if self.state == UNREACHABLE else 0

    # -- probes and results -----------------------------------------------------------------------

    @property
    def active(self) -> bool:
        """Whether the pair had traffic when the last probe was sent, or has had traffic since."""
        return self._active_until > self._sent_at

    @property
    def suspect(self) -> bool:
        """Whether an answer is missing. A suspect path is probed often until there is a verdict."""
        if self.state == UNREACHABLE:
            return False
        return self._awaited_n > 0 or self._missed_n > 0 or self.sizes.urgent

    @property
    def missed(self) -> bool:
        """Whether the last probe was not answered in time."""
        return self._missed_n > 0

    @property
    def last_sent(self) -> float:
        """When the last probe was sent to the peer: a request, or a reply to the peer's request."""
        return max(self._sent_at, self._replied_at)

    @property
    def loss(self) -> float | None:
        """Share of the last LOSS_WINDOW probes without an answer in time; None: no probe yet."""
        return self._history.bit_count() / self._history_n if self._history_n else None

    def next_due(self, idle_seconds: float) -> float:
        """Return when the next probe is sent. ``idle_seconds`` is the interval of an idle path."""
        if self._soon:
            return self._sent_at
        if self.state == UNREACHABLE:
            wait = idle_seconds
            if self.active:
                wait = min(ACTIVE_SECONDS * 2.0 ** min(self._backoff_n, 10), idle_seconds)
        elif self._awaited_n or self._missed_n or self.sizes.urgent:  # as ``suspect``
            if self.sizes.urgent and not self._pending:
                return self._sent_at + ROUND_SECONDS
            return self._sent_at + max(SUSPECT_SECONDS, 2 * (self.rtt or 0.0))
        else:
            wait = ACTIVE_SECONDS if self.active else idle_seconds
        due = self._sent_at + wait * self._jitter
        return due if wait < idle_seconds else next_batch(due)

    def next_expiry(self) -> float:
        """Return when ``expire`` is due; infinite if no answer is awaited."""
        return self._pending[0].at + self._wait() if self._pending else math.inf

    def next_sizes(self, now: float) -> tuple[int, ...]:
        """Return the sizes to send now: a small one, large ones, or both.

        An answer to a large probe proves small sizes too. Both are sent together to distinguish a
        size limit from an outage. The small one is sent last: if only it is answered, the others
        are lost.
        """
        if self.state == UNREACHABLE or (self.suspect and not (self.active or self.sizes.urgent)):
            return (SMALL_SIZE,)
        every = LARGE_EVERY_ACTIVE if self.active else LARGE_EVERY_IDLE
        if not (self._soon or self.suspect or self._probes_n % every == 0):
            return (SMALL_SIZE,)
        large = self.sizes.targets(now)
        both = self.suspect or self.state == UNKNOWN or self.sizes.uncertain(large[0])
        return (*large, SMALL_SIZE) if both else large

    def waits_for(self, token: int) -> bool:
        """Return whether a reply with this token would answer a probe of this path."""
        return any(probe.token == token for probe in (*self._pending, *self._late))

    @property
    def last_heard(self) -> float | None:
        """When the last probe or data packet of the peer was received; None: never."""
        return max(self.last_probe or 0.0, self.last_data or 0.0) or None

    def heard_since_missed(self) -> bool:
        """Return whether anything from the peer arrived after the first of the missed probes."""
        return (self.last_heard or 0.0) >= self._missed_at + SUSPECT_SECONDS

    def directions(self) -> tuple[bool, bool | None]:
        """Return whether packets pass from the peer, and to the peer; None: unknown."""
        if not self._missed_n:
            return True, True
        if not self.heard_since_missed():
            return False, None  # the peer cannot report what it receives
        return True, None if self.peer_heard is None else self.peer_heard >= self._missed_at

    def reason(self, now: float) -> str:
        """Return the reason for the path's state, in a few words."""
        if self.state == REACHABLE:
            return "" if self.last_answer is not None else "data arrive; no probe was answered"
        if self.send_errno:
            return f"the kernel does not send: {errno_reason(self.send_errno)}"
        if self.state == UNKNOWN:
            return "not probed yet" if not self._history_n else "no answer yet"
        text = f"{self._missed_n} probes in a row were not answered"
        if self.heard_since_missed():
            text += "; packets from the peer arrive"
            if self.peer_heard is not None and self.peer_heard < self._missed_at:
                text += f", but it has received no probe for {now - self.peer_heard:.0f} s"
        if self.never_probed:
            text += "; the peer has never answered or sent a probe"
        return text

    @property
    def never_probed(self) -> bool:
        """Whether the peer has never answered or sent a probe: it may not use probes."""
        return self.last_answer is None and self.last_probe is None

    # -- inside -----------------------------------------------------------------------------------

    def _wait(self) -> float:
        """Return after how many seconds a probe counts as unanswered."""
        return min(max(ANSWER_SECONDS, 3 * (self.rtt or 0.0)), ANSWER_MAX_SECONDS)

    def _record(self, probe: _Sent, lost: bool) -> None:
        if self.sizes.uncertain(probe.size):
            return  # such a loss is a property of the size, not of the path
        self._history = (self._history << 1 | lost) & ((1 << LOSS_WINDOW) - 1)
        self._history_n = min(self._history_n + 1, LOSS_WINDOW)

    def _overtake(self, earlier: tuple[_Sent, ...], probe: _Sent, now: float) -> None:
        """Count the larger probes that were sent before this one as lost. They are in ``earlier``.

        The probes of a path stay in order. If a late answer arrives nevertheless, it is used.
        """
        if probe not in earlier:
            return
        for lost in earlier[: earlier.index(probe)]:
            if lost.size > probe.size:
                self._pending = tuple(each for each in self._pending if each is not lost)
                self._awaited_n -= lost.decisive
                self._late = (*self._late[1 - LATE_N :], lost)
                self._record(lost, lost=True)
                self.sizes.missed(lost.size, lost.at)

    def _proved(self, now: float) -> None:
        """Record that the path works."""
        self._missed_n = 0
        if self.state != REACHABLE:
            self._soon = self.state == UNREACHABLE  # measure the sizes again
            self.state, self.since = REACHABLE, now
            self._backoff_n = 0

    def _miss(self, probe: _Sent, now: float) -> None:
        self._record(probe, lost=True)
        if probe.size > SMALL_SIZE:
            self.sizes.missed(probe.size, probe.at)
        if not probe.decisive:
            return
        if not self._missed_n:
            self._missed_at = probe.at
        self._missed_n += 1
        if self._missed_n >= LOST_AFTER and self.state != UNREACHABLE:
            self.state, self.since = UNREACHABLE, now
            self._backoff_n = 0
            self.sizes.path_lost()


def next_batch(at: float) -> float:
    """Return the time of the next batch of probes to idle pairs, at ``at`` or later."""
    return math.ceil(at * IDLE_BATCHES_PER_SECOND) / IDLE_BATCHES_PER_SECOND


def _take(probes: tuple[_Sent, ...], token: int) -> tuple[_Sent | None, tuple[_Sent, ...]]:
    """Return the probe with this token, and the others."""
    for index, probe in enumerate(probes):
        if probe.token == token:
            return probe, probes[:index] + probes[index + 1 :]
    return None, probes
