"""Report the measurements and the choice of paths: in the report, as log lines and as events.

Owns the texts, and the limits of the log: if another path carries the packets after a failure, this
is one line; if many peers change at the same time, only some are named. Each change is an event.
Does not measure or choose. Runs on the daemon's loop.
"""

from __future__ import annotations

import logging
import time

from ...model import IPNetwork
from ...text import counted
from ..backends import BACKENDS
from ..status.report import NodeReport
from .choice import Health, Measured
from .pair import STATES, Pair

log = logging.getLogger(__name__)

MAX_LOGGED = 10  # peers that are logged one by one per ``flush``
# If a pair has another path, its state is logged after this time: meanwhile, the other path may be
# measured and carry the packets. Then only the change of the path is logged.
SETTLE_SECONDS = 2.0
GOOD = STATES[Health.GOOD]
TROUBLES = (STATES[Health.LOST], STATES[Health.SMALL])


class Recorder:
    def __init__(self, report: NodeReport) -> None:
        self._report = report
        self._lines: list[tuple[int, str]] = []
        # By subnet: the pairs whose state has changed, and when it is logged.
        self._unsettled: dict[IPNetwork, tuple[float, Pair]] = {}
        self._logged: dict[IPNetwork, str] = {}  # the last state that was logged, if it is not good

    def measured(self, pair: Pair, carrying: Measured | None) -> None:
        """Report the measured state of the path that carries the packets."""
        report = pair.report
        health = None if carrying is None else carrying.health
        report.trouble = "" if carrying is None or not carrying.why else \
            f"{BACKENDS[report.path]}: {carrying.why}"
        before, report.state = report.state, STATES[health]
        if before == report.state:
            return
        report.changed = time.time()
        if health is None or (health is Health.GOOD and before not in TROUBLES):
            return
        at = time.monotonic() + (SETTLE_SECONDS if pair.chooses else 0.0)
        self._unsettled.setdefault(pair.subnet, (at, pair))
        self._report.event(f"peer_{report.state}", peer=report.key, subnet=str(pair.subnet),
                           path=report.path, reason=report.trouble)

    def moved(self, pair: Pair, path: str) -> None:
        """Report that the backend ``path`` carries the packets from now on."""
        report, choice = pair.report, pair.choice
        if report.path == path:
            return
        left, report.path, report.since = report.path, path, time.time()
        report.why = f"{BACKENDS[left]}: {choice.why}" if choice.why else ""
        reason = report.why or f"{BACKENDS[path]} works again"
        why = f" instead of {BACKENDS[left]}: {choice.why}" if choice.why else f": {reason}"
        self._unsettled.pop(pair.subnet, None)
        self._lines.append((
            logging.WARNING if choice.why else logging.INFO,
            f"{report.key}: packets to {pair.subnet} now use {BACKENDS[path]}{why}"))
        self._report.path_changes_n[path] += 1
        self._report.event("path_changed", peer=report.key, subnet=str(pair.subnet), path=path,
                           reason=reason)

    def forget(self, pair: Pair) -> None:
        """Delete the record of a peer that has left."""
        self._unsettled.pop(pair.subnet, None)
        self._logged.pop(pair.subnet, None)

    def flush(self) -> None:
        """Write the log lines that have come together."""
        now = time.monotonic()
        for subnet, (at, pair) in [*self._unsettled.items()]:
            if at <= now:
                del self._unsettled[subnet]
                self._log_state(pair)
        lines, self._lines = self._lines, []
        for level, line in lines[:MAX_LOGGED]:
            log.log(level, "%s", line)
        if len(lines) > MAX_LOGGED:
            log.warning("%s of paths: see `udptun events`",
                        counted(len(lines) - MAX_LOGGED, "more change"))

    def _log_state(self, pair: Pair) -> None:
        report = pair.report
        if report.state == self._logged.get(pair.subnet, GOOD):
            return  # it was in the other state only for a moment
        level = logging.WARNING
        if report.state in TROUBLES:
            self._logged[pair.subnet] = report.state
        else:
            level = logging.INFO
            self._logged.pop(pair.subnet, None)
            if report.state != GOOD:
                return
        text = f": {report.trouble}" if report.trouble else ""
        self._lines.append((level, f"{report.key}: {pair.subnet} is {report.state}{text}"))
