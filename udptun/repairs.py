"""Limit and log the repairs of settings that other programs change. A leaf.

If another program undoes each repair, the pause between two repairs grows up to LAST_PAUSE, so that
the two programs do not use the whole CPU. The first of several equal repairs is logged. The others
are counted, and logged as one line per SUMMARY_SECONDS.

Owns the pauses and the log lines. Does not depend on what is repaired. One thread.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

FIRST_PAUSE, LAST_PAUSE = 0.5, 8.0  # seconds between two repairs
CALM_SECONDS = 30.0  # an equal repair after this time is made at once
SUMMARY_SECONDS = 60.0


@dataclass(slots=True)
class _Logged:
    at: float
    more_n: int = 0  # equal repairs since the last log line


class Repairs:
    """The repairs of one part of the program.

    say    called with each log line
    clock  returns monotonic seconds
    """

    def __init__(
        self, say: Callable[[str], None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._say = say
        self._clock = clock
        self._last: float | None = None
        self._pause = 0.0
        self._tried: dict[str, float] = {}  # {repair: time of the last try}
        self._logged: dict[str, _Logged] = {}

    def pause(self) -> float:
        """Return the seconds until the next repair may be made; 0 if it may be made now."""
        if self._last is None:
            return 0.0
        return max(0.0, self._last + self._pause - self._clock())

    def begin(self, what: str) -> None:
        """Record that a repair is tried. This sets the pause until the next one: it grows only if
        the same repair was tried a short time ago."""
        now = self._clock()
        repeated = now - self._tried.get(what, -math.inf) < CALM_SECONDS
        self._pause = min(max(2 * self._pause, FIRST_PAUSE), LAST_PAUSE) if repeated else 0.0
        self._last = now
        self._tried = {key: at for key, at in self._tried.items() if now - at < CALM_SECONDS}
        self._tried[what] = now

    def done(self, what: str) -> None:
        """Record a repair that has succeeded. ``what`` is the sentence for the log."""
        if (logged := self._logged.get(what)) is not None:
            logged.more_n += 1
        else:
            self._logged[what] = _Logged(self._clock())
            self._say(what)

    def summarise(self) -> None:
        """Log the counted repairs that are due. Call this at regular intervals."""
        now = self._clock()
        for what, logged in [*self._logged.items()]:
            seconds = now - logged.at
            if seconds < SUMMARY_SECONDS:
                continue
            if logged.more_n:
                self._say(f"{what} ({logged.more_n} more times in {seconds:.0f} s: probably another"
                          " program undoes this repair)")
                self._logged[what] = _Logged(now)
            else:
                del self._logged[what]
