"""One subnet of a peer: its paths, their measured health, and the chosen one.

Owns the data and how a measured state becomes a health. No I/O; runs on the daemon's loop.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ...model import IPNetwork
from ...probe.state import REACHABLE, UNREACHABLE, PathState
from ..backends.plan import SubnetPaths
from ..status.report import PairReport, iso_time
from .choice import Choice, Health, Measured
from .meter import Meter

# The state in reports, by health.
STATES = {
    None: "unknown", Health.LOST: "unreachable", Health.SMALL: "limited", Health.GOOD: "reachable"}


@dataclass(slots=True, eq=False)
class Pair:
    """One subnet of a peer.

    found       its paths, as planned
    mtu         the largest inner packet that the forwarder sends to this peer, in bytes
    device_mtu  the largest inner packet that our VXLAN device sends to any peer: the kernel has no
                MTU for a single peer
    meters      per path: the meter of this daemon that measures it; None: the forwarder does, or
                there is no such path
    endpoints   per path: the endpoint under which the forwarder reports it; None: it does not
    errors_of   the endpoint whose errors may say why echoes are not answered; None: there is
                no such endpoint
    measured    per path: the health; None: there is no such path
    choice      the path to carry the packets; ``report`` has the one that carries them now
    asking      the forwarder probes its path now, and the choice waits for the result
    timer       looks again when the preferred path has been good for long enough
    """

    found: SubnetPaths
    mtu: int
    device_mtu: int
    meters: tuple[Meter | None, ...]
    endpoints: tuple[str | None, ...]
    measured: list[Measured | None]
    choice: Choice
    report: PairReport
    errors_of: str | None = None
    asking: bool = False
    timer: asyncio.TimerHandle | None = None
    preferred: int = field(init=False)  # the position of the preferred path

    @property
    def subnet(self) -> IPNetwork:
        return self.found.subnet

    def __post_init__(self) -> None:
        self.preferred = max(at for at, path in enumerate(self.found.paths) if path is not None)

    @property
    def chooses(self) -> bool:
        """Whether there is a choice: several paths, each measured by itself."""
        several = sum(path is not None for path in self.found.paths) > 1
        return several and not any(meter and meter.follows_route for meter in self.meters)


def health_of_state(
    state: PathState | None, overhead: int, now: float
) -> tuple[Health | None, str]:
    """Return the health of a path that this daemon measures, and the reason.

    overhead  bytes of the inner packet's headers before the message
    """
    if state is None or state.state not in (REACHABLE, UNREACHABLE):
        return None, ""
    if state.state == UNREACHABLE:
        return Health.LOST, state.reason(now)
    if state.sizes.full_passes is False:
        return Health.SMALL, _limit(_packet(state.sizes.largest, overhead))
    return Health.GOOD, ""


def health_of_report(probe: Mapping[str, Any] | None) -> tuple[Health | None, str]:
    """Return the health of a path that the forwarder measures, and the reason."""
    state = None if probe is None else probe.get("state")
    if probe is None or state not in (REACHABLE, UNREACHABLE):
        return None, ""
    if state == UNREACHABLE:
        return Health.LOST, str(probe.get("reason") or "no probe is answered")
    if probe.get("full_size_passes") is False:
        return Health.SMALL, _limit(probe.get("largest_size"))
    return Health.GOOD, ""


def _limit(largest: object) -> str:
    return f"packets over {largest} bytes do not pass"


def _packet(message: int | None, overhead: int) -> int | None:
    """Return the size of the inner packet that has a message of this size."""
    return None if message is None else message + overhead


def state_json(state: PathState, overhead: int) -> dict[str, Any]:
    """Return the measurements of a path as the forwarder reports its own: docs/control.md.

    overhead  as in ``health_of_state``
    """
    now, wall = time.monotonic(), time.time()

    def at(moment: float | None) -> str | None:
        return None if moment is None else iso_time(wall - now + moment)

    return {
        "since": at(state.since),
        "rtt_us": None if state.rtt is None else round(state.rtt * 1e6),
        "loss": None if state.loss is None else round(state.loss, 4),
        "last_answer": at(state.last_answer),
        "largest_size": _packet(state.sizes.largest, overhead),
        "full_size_passes": state.sizes.full_passes,
    }
