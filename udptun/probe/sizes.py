"""Find the largest message that passes a path.

Owns the bounds of the search. Does not depend on timeouts or on the sender: the caller reports
which sizes passed and which did not. Normally each large probe has the full size. If the full size
fails while small probes are answered, a binary search finds the largest size that passes.
Afterwards the full size is tried again regularly. Threading: one thread.
"""

from __future__ import annotations

from .message import HEADER_SIZE

SMALL_SIZE = HEADER_SIZE
STEP = 8  # bytes; the search ends when the bounds differ by this or less
MISSES = 3  # a size fails after this number of unanswered probes; a lossy path may lose two
# Time between two tries of the full size, also during a search: a repair is found in this time.
RECHECK_SECONDS = 10.0
RESEARCH_SECONDS = 600.0  # after this time, a limit is measured again (RFC 1191 6.3)


class SizeSearch:
    """The sizes of one path.

    full     size of a message that is as large as the largest data packet
    largest  largest size that passed since the last failure; None: none has passed yet
    """

    __slots__ = (
        "_ceiling", "_limited_at", "_missed_at", "_misses_n", "_recheck_at", "_smaller_at", "full",
        "largest",
    )

    def __init__(self, full: int) -> None:
        if full <= SMALL_SIZE:
            raise ValueError(f"full: {full} is not over {SMALL_SIZE}")
        self.full = full
        self.largest: int | None = None
        self._ceiling: int | None = None  # smallest size that failed
        self._limited_at = 0.0  # when the search began
        self._recheck_at = 0.0  # when the full size is tried again, if there is a limit
        self._forget_misses()

    @property
    def full_passes(self) -> bool | None:
        """Whether the full size passes; None: not known."""
        if self._ceiling is not None:
            return False
        return True if self.largest == self.full else None

    @property
    def searching(self) -> bool:
        return self._ceiling is not None and self._ceiling - self._low() > STEP

    @property
    def suspect(self) -> bool:
        """Whether the full size passed before and was not answered the last time."""
        return self._misses_n > 0 and self._ceiling is None

    def measured(self) -> tuple[int | None, int | None]:
        """Return the largest size that passed, and the smallest that failed; None: no such size."""
        return self.largest, self._ceiling

    def inherit(self, largest: int | None, failed: int | None, now: float) -> None:
        """Continue with the result of ``measured`` of an earlier process."""
        self.largest, self._ceiling = largest, failed
        self._limited_at, self._recheck_at = now, now + RECHECK_SECONDS

    def uncertain(self, size: int) -> bool:
        """Return whether a search runs and this size is not yet known to pass."""
        return self._ceiling is not None and size > self._low()

    def resize(self, full: int) -> None:
        """Change the full size, and discard the measurements for the old one."""
        if full != self.full:
            self.__init__(full)  # type: ignore[misc]

    def target(self, now: float) -> int:
        """Return the size of the next large probe."""
        if self._ceiling is None:
            return self.full
        if now >= self._limited_at + RESEARCH_SECONDS:
            self._limited_at = now
            self._ceiling = self.full
        if now >= self._recheck_at:
            self._recheck_at = now + RECHECK_SECONDS
            return self.full
        return (self._low() + self._ceiling) // 2 if self.searching else self._low()

    def passed(self, size: int, sent_at: float) -> None:
        """Record that a message of this size, sent at this time, was answered."""
        self.largest = max(size, self._low())
        if self._ceiling is not None and size >= self._ceiling:
            self._ceiling = None  # the limit is gone
        if self._misses_n and size >= self._missing_size():
            self._forget_misses()
        else:
            self._smaller_at = sent_at
            self._judge()

    def missed(self, size: int, sent_at: float) -> None:
        """Record that a large message of this size, sent at this time, was not answered."""
        if size != self._missing_size():
            return  # a new try of the full size, or a probe of an earlier step
        if not self._misses_n:
            self._missed_at = sent_at
        self._misses_n += 1
        self._judge()

    def refused(self, size: int, now: float) -> None:
        """Record that our own kernel refused to send this size (EMSGSIZE)."""
        self._fail(size, now)

    def path_lost(self) -> None:
        """Record that the path is down. No size passes, so the misses do not count for a size."""
        self._forget_misses()

    # -- inside -----------------------------------------------------------------------------------

    def _low(self) -> int:
        return self.largest or SMALL_SIZE

    def _missing_size(self) -> int:
        """Return the size of which misses are counted."""
        if self._ceiling is None:
            return self.full
        return (self._low() + self._ceiling) // 2 if self.searching else self._low()

    def _judge(self) -> None:
        """Record a size as failed if its probes were unanswered several times, although a later
        probe of a smaller size was answered."""
        if self._misses_n >= MISSES and self._smaller_at >= self._missed_at:
            self._fail(self._missing_size(), self._smaller_at)

    def _fail(self, size: int, now: float) -> None:
        if self._ceiling is None:
            self._limited_at = now
        if self._ceiling is None or size < self._ceiling:
            self._ceiling = size
        if self.largest is not None and self.largest >= size:
            self.largest = SMALL_SIZE
        self._recheck_at = now + RECHECK_SECONDS
        self._forget_misses()

    def _forget_misses(self) -> None:
        self._misses_n = 0
        self._missed_at = 0.0
        self._smaller_at = -1.0
