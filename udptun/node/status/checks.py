"""Report each change of a check of /readyz as an event.

Owns the last state of each check. The check of the peers is left out, because each change of a peer
is an event of its own. Runs on the daemon's loop.
"""

from __future__ import annotations

from .readiness import CHECKS, State
from .report import NodeReport

PEERS = "peers"
KINDS = {State.OK: "check_ok", State.DEGRADED: "check_degraded", State.FAILED: "check_failed"}


class CheckEvents:
    def __init__(self, report: NodeReport) -> None:
        self._report = report
        self._last: dict[str, State] = {}

    def look(self) -> None:
        """Compare the checks with the last call. The first call reports those that are not OK."""
        for name, check in CHECKS.items():
            if name == PEERS:
                continue
            state, text, _ = check(self._report)
            if state is not self._last.get(name, State.OK):
                self._report.event(KINDS[state], check=name,
                                   reason="" if state is State.OK else "; ".join(text))
            self._last[name] = state
