"""Decide which of several paths carries the packets to one subnet, from their measured health.

Owns the rule and its times:
- If the measured health of another path is better than that of the current path, the packets move
  to the other path at once.
- The packets return to the preferred path when this path has been good for ``hold`` seconds. The
  hold doubles each time when the path fails soon after the return. So an unstable path causes few
  changes.
- If no state is known, or all paths are equally bad, the choice does not change.

Does not depend on how health is measured, or on how a choice is applied. The functions have no side
effects. Times are seconds of the monotonic clock.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

FIRST_HOLD_SECONDS = 10.0
LAST_HOLD_SECONDS = 600.0
# If the preferred path stays good for this time after the return, the next hold is the first one.
TRUST_SECONDS = 600.0


class Health(IntEnum):
    """Which packets pass on a path, according to the measurement. A larger value is better."""

    LOST = 0  # nothing
    SMALL = 1  # small packets, but not the largest ones
    GOOD = 2  # packets of all sizes


@dataclass(frozen=True, slots=True)
class Measured:
    """The health of one path.

    health  None: not measured yet, or not measurable
    since   when the path entered this health
    why     the reason of a health that is not GOOD, in a few words
    """

    health: Health | None
    since: float
    why: str = ""


@dataclass(frozen=True, slots=True)
class Choice:
    """The path that carries the packets.

    at        its position in the list of paths
    since     when it was chosen
    why       why it is not the preferred path; "" if it is
    hold      seconds for which the preferred path must be good before the packets return to it
    returned  when the packets last returned to the preferred path; None: they never did
    """

    at: int
    since: float
    why: str = ""
    hold: float = FIRST_HOLD_SECONDS
    returned: float | None = None


def decide(choice: Choice, paths: Sequence[Measured | None], now: float) -> Choice:
    """Return the choice that follows, which is ``choice`` itself if nothing changes.

    paths  one entry per path, the preferred one last; None: there is no such path. At least one
           entry is not None
    """
    usable = [at for at, path in enumerate(paths) if path is not None]
    preferred = usable[-1]
    carrying = paths[choice.at] if choice.at < len(paths) else None
    if carrying is None:
        return Choice(preferred, now)
    best = max(usable, key=lambda at: (_rank(paths[at]), at))
    if carrying.health is not None and _rank(paths[best]) > carrying.health:
        if best == preferred:
            return _return_to(choice, preferred, now)
        return _leave(choice, best, carrying.why, now)
    if choice.at != preferred and _is_held(paths[preferred], choice.hold, now):
        return _return_to(choice, preferred, now)
    return choice


def next_decision_time(choice: Choice, paths: Sequence[Measured | None]) -> float | None:
    """Return the time at which the result of ``decide`` changes if no path's health changes. None:
    there is no such time."""
    preferred = max(at for at, path in enumerate(paths) if path is not None)
    path = paths[preferred]
    if choice.at == preferred or path is None or path.health is not Health.GOOD:
        return None
    return path.since + choice.hold


def _rank(path: Measured | None) -> int:
    return -1 if path is None or path.health is None else path.health


def _is_held(path: Measured | None, hold: float, now: float) -> bool:
    return path is not None and path.health is Health.GOOD and now >= path.since + hold


def _return_to(choice: Choice, preferred: int, now: float) -> Choice:
    return Choice(preferred, now, "", choice.hold, now)


def _leave(choice: Choice, at: int, why: str, now: float) -> Choice:
    again = choice.returned is not None and now - choice.returned < TRUST_SECONDS
    hold = min(2 * choice.hold, LAST_HOLD_SECONDS) if again else FIRST_HOLD_SECONDS
    return Choice(at, now, why, hold, choice.returned)
