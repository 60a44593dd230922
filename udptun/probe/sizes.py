"""Find the largest message that passes a path (RFC 8899), with and without reports of routers.

Owns the bounds of the search, and the limit that data packets should keep. Does not depend on
timeouts or on the sender: the caller reports which sizes passed and which did not. Normally each
large probe has the full size. If it fails while smaller probes are answered, a search finds the
largest size that passes. Afterwards the next larger size and the full size are tried again
regularly.

A report that only a smaller size passes (an ICMP error) can be forged. So it is only a hint: the
present size is tested at once. If the present size fails, a search begins with the reported size.
Threading: one thread.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .message import HEADER_SIZE

SMALL_SIZE = HEADER_SIZE
STEP = 8  # bytes; the search ends when the bounds differ by this or less
MISSES = 3  # a size fails after this number of unanswered probes; a lossy path may lose two
SEARCH_MISSES = 2  # the same, during a search: a wrong step is corrected by the next retry
RETRY_SECONDS = 4.0  # time between two tries of larger sizes: a repair is found in this time
PUBLISH_SECONDS = 2.0  # a search that takes longer sets a limit before its end
HINT_SECONDS = 1.0  # shortest time between two hints; others are ignored
# How much smaller than the full size the limit often is: PPPoE, IP in IP, VXLAN, WireGuard, a link
# of 1400, 1280 or 1200 bytes, a link of 1500 bytes after one of 9000.
COMMON = (8, 20, 28, 50, 80, 100, 150, 220, 300, 7500)


class SizeSearch:
    """The sizes of one path.

    full     size of a message that is as large as the largest data packet
    largest  largest size that passed since the last failure; None: none has passed yet
    limit    largest data packet that should be sent; None: there is no limit below ``full``
    hinted_at  when a hint was used the last time
    """

    __slots__ = (
        "_ceiling", "_failed_at", "_hint", "_last_missed_at", "_missed_at", "_misses_n",
        "_retry_at", "_smaller", "_smaller_at", "_testing", "full", "hinted_at", "largest", "limit",
    )

    def __init__(self, full: int) -> None:
        if full <= SMALL_SIZE:
            raise ValueError(f"full: {full} is not over {SMALL_SIZE}")
        self.full = full
        self.largest: int | None = None
        self.limit: int | None = None
        self._ceiling: int | None = None  # smallest size that failed
        self._failed_at = 0.0  # when the present size failed the last time
        self._retry_at = 0.0  # when larger sizes are tried again, if there is a limit
        self._hint: int | None = None
        self.hinted_at = -HINT_SECONDS
        self._testing = False  # a hint arrived, and the present size has not been judged since
        self._misses_n = 0
        self._missed_at = self._last_missed_at = 0.0  # when the first and the last one were sent
        self._smaller_at = -1.0  # send time of the last smaller message that was answered
        self._smaller = SMALL_SIZE  # the largest smaller size that passed since the first miss

    @property
    def full_passes(self) -> bool | None:
        """Whether the full size passes; None: not known."""
        if self._ceiling is not None:
            return False
        return True if self.largest == self.full else None

    @property
    def present(self) -> int:
        """The size of the largest data packets that are sent at present."""
        return self.limit or self.full

    @property
    def searching(self) -> bool:
        return self._ceiling is not None and self._ceiling - self._low() > STEP

    @property
    def suspect(self) -> bool:
        """Whether the present data packets may have become too large."""
        return not self.searching and (self._testing or self._misses_n > 0)

    @property
    def urgent(self) -> bool:
        """Whether the next probes should be sent as soon as possible."""
        if self._ceiling is None:  # the usual case; this runs several times per probe
            return self._testing or self._misses_n > 0
        return self.searching or self.suspect

    def measured(self) -> dict[str, int | None]:
        """Return the result, as JSON: ``largest``, ``limit``, and the smallest size that failed."""
        return {"largest": self.largest, "failed": self._ceiling, "limit": self.limit}

    def inherit(self, had: Mapping[str, Any], now: float) -> None:
        """Continue with the result of ``measured`` of an earlier process."""
        self.largest, self._ceiling = had.get("largest"), had.get("failed")
        self.limit = had.get("limit", self.largest) if self._ceiling is not None else None
        self._failed_at, self._retry_at = now, now + RETRY_SECONDS

    def uncertain(self, size: int) -> bool:
        """Return whether the path has a limit and this size is not known to be within it."""
        return self._ceiling is not None and size > self._low()

    def targets(self, now: float) -> tuple[int, ...]:
        """Return the sizes of the next large probes, the largest first."""
        if self._ceiling is not None and now >= self._retry_at and not self.suspect:
            self._retry_at = now + RETRY_SECONDS
            return tuple(sorted({self.full, self._ceiling}, reverse=True))
        judged = self._judged_size()
        if self._testing and self._hint is not None and SMALL_SIZE < self._hint < judged:
            return judged, self._hint
        return (judged,)

    def hint(self, size: int, now: float) -> bool:
        """Record a report that only packets up to this size pass. Return whether to test it now."""
        if now < self.hinted_at + HINT_SECONDS or size >= self.present:
            return False
        self.hinted_at = now
        self._hint = size
        self._testing = not self.searching
        return True

    def passed(self, size: int, sent_at: float) -> None:
        """Record that a message of this size, sent at this time, was answered."""
        judged = self._judged_size()
        self.largest = max(size, self._low())
        if size == self.full:
            self._ceiling = None
        elif self._ceiling is not None and size >= self._ceiling:
            self._ceiling = self.full  # the limit has risen: search again
        if size >= judged:
            self._testing = False
            self._forget_misses()
        else:
            if self._misses_n and sent_at >= self._missed_at:
                self._smaller = max(self._smaller, size)
            self._smaller_at = max(self._smaller_at, sent_at)
            self._judge()
        self._publish(sent_at)

    def missed(self, size: int, sent_at: float) -> None:
        """Record that a large message of this size, sent at this time, was not answered."""
        if size != self._judged_size():
            return  # a new try of a larger size, or a probe of an earlier step
        if not self._misses_n:
            self._missed_at = sent_at
        self._misses_n += 1
        self._last_missed_at = sent_at
        self._judge()
        self._publish(sent_at)

    def refused(self, size: int, now: float) -> None:
        """Record that our own kernel refused to send this size (EMSGSIZE)."""
        self._fail(size, now)
        self._publish(now)

    def path_lost(self) -> None:
        """Record that the path is down. No size passes, so the misses do not count for a size."""
        self._testing = False
        self._forget_misses()

    # -- inside -----------------------------------------------------------------------------------

    def _low(self) -> int:
        return self.largest or SMALL_SIZE

    def _judged_size(self) -> int:
        """Return the size of which misses are counted: the present size of data packets, or the
        next step of the search."""
        if self._ceiling is None:
            return self.full
        if not self.searching:
            return self._low()
        low, ceiling = self._low(), self._ceiling
        if self._hint is not None and low < self._hint < ceiling:
            return self._hint
        common = [self.full - less for less in COMMON if low < self.full - less < ceiling]
        return common[len(common) // 2] if common else (low + ceiling) // 2

    def _judge(self) -> None:
        """Record a size as failed if several of its probes were not answered, but a smaller probe,
        sent after the last of them, was answered. Without this answer, the whole path may be
        down."""
        enough = SEARCH_MISSES if self.searching else MISSES
        if self._misses_n >= enough and self._smaller_at >= self._last_missed_at:
            self._fail(self._judged_size(), self._smaller_at)

    def _fail(self, size: int, now: float) -> None:
        if not self.searching:
            self._failed_at = now
        if self._ceiling is None or size < self._ceiling:
            self._ceiling = size
        if self.largest is not None and self.largest >= size:
            self.largest = self._smaller
        self._retry_at = now + RETRY_SECONDS
        self._testing = False
        self._forget_misses()

    def _publish(self, now: float) -> None:
        """Set the limit: at the end of a search, or earlier if the reported size has passed or the
        search takes long. An inner sender keeps a small path MTU for minutes, so a limit is not set
        before it is known."""
        if self._ceiling is None:
            self.limit = None
            if not self._testing:
                self._hint = None
            return
        hinted = self._hint is not None and self._low() >= self._hint
        late = now >= self._failed_at + PUBLISH_SECONDS and self._low() > SMALL_SIZE
        if hinted or late or not self.searching:
            self.limit = self._low()
        if not self.searching:
            self._hint = None

    def _forget_misses(self) -> None:
        self._misses_n = 0
        self._missed_at = self._last_missed_at = 0.0
        self._smaller_at = -1.0
        self._smaller = SMALL_SIZE
