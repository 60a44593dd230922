"""Small packets: the highest rate without loss, at 0.5 % loss, and what gets through at full rate.

Each datagram of udpload is a packet of its own, there is no UDP_SEGMENT at the sender and no
UDP_GRO at the receiver; loss is told by sequence numbers. The rate is searched by bisection. A
rate that fails is asked for a second time: a hiccup of the machine should not end the search.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

from ..blocks import Measured, Refused, Series, run_blocks
from ..contenders import Road
from ..load import stream
from ..session import Session
from .plan import Plan

VARIANTS = ("64 bytes", "256 bytes", "512 bytes", "1400 bytes")
THRESHOLDS = {"pps_without_loss": 0.0, "pps_at_half_percent": 0.005}
LEAST_PPS = 1000.0
_STEP = 1.05  # the search ends when it knows the rate to 5 %
_TRIAL_SHARE = 0.5  # of the plan's seconds


@dataclass(frozen=True)
class Trial:
    """``offered``: what was really sent a second; ``full``: as fast as it goes."""

    offered: float
    loss: float
    full: bool = False
    late: int = 0


@dataclass
class Search:
    """Bisection over the rate; ``trials`` are shared by all thresholds."""

    ask: Callable[[float], Trial]  # rate 0: as fast as it goes
    trials: list[Trial] = field(default_factory=list)

    def _passes(self, rate: float, threshold: float) -> Trial | None:
        for _ in range(2):
            trial = self.ask(rate)
            self.trials.append(trial)
            if trial.loss <= threshold:
                return trial
        return None

    def highest(self, threshold: float) -> float:
        """The highest rate offered that lost no more; 0 when even the least rate did."""
        if not self.trials:
            self.trials.append(self.ask(0))
        passed = [t for t in self.trials if t.loss <= threshold]
        low = max((t.offered for t in passed), default=0.0)
        failed = [t.offered for t in self.trials if t.loss > threshold and t.offered > low]
        high = min(failed, default=0.0)
        if not high:
            return low  # as fast as the sender goes
        if not low:
            least = self._passes(min(LEAST_PPS, high / 2), threshold)
            if least is None:
                return 0.0
            low = least.offered
        while high / low > _STEP:
            rate = math.sqrt(low * high)
            trial = self._passes(rate, threshold)
            if trial is None:
                high = rate
            elif trial.offered <= low:
                break  # the sender does not go faster
            else:
                low = trial.offered
        return low


@dataclass(frozen=True)
class Rate:
    """The slot."""

    size: int
    seconds: float

    def __call__(self, road: Road) -> Measured:
        received_bytes = 0

        def ask(rate: float) -> Trial:
            nonlocal received_bytes
            sent, received = stream(
                road, seconds=self.seconds, rate=round(rate), size=self.size
            )
            if not sent["sent"]:
                raise Refused(f"nothing was sent: {sent}")
            received_bytes += received["bytes"]
            return Trial(
                sent["sent"] / sent["seconds"], 1 - received["received"] / sent["sent"],
                full=not rate, late=received["late"],
            )

        search = Search(ask)
        values = {name: search.highest(limit) for name, limit in THRESHOLDS.items()}
        full = next(t for t in search.trials if t.full)
        values["pps_delivered"] = full.offered * (1 - full.loss)
        if not values["pps_at_half_percent"]:
            raise Refused(f"more than 0.5 % lost even at {LEAST_PPS:.0f} packets a second")
        trials = [asdict(t) for t in search.trials]
        return Measured(values, (received_bytes, 0), {"trials": trials})


def run(s: Session, plan: Plan) -> None:
    for variant in plan.variants or VARIANTS:
        for profile in plan.profiles:
            size, trial = int(variant.split()[0]), plan.seconds * _TRIAL_SHARE
            run_blocks(
                s, Series("pps", profile, variant), plan.contenders, Rate(size, trial),
                blocks=plan.blocks, slot_seconds=20 * trial, mirrored=False,
            )
