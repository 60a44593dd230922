"""Small packets: packets per second without loss, at 0.5 % loss, and delivered at full rate.

bench/udpload sends each datagram as its own packet, without UDP_SEGMENT, and receives without
UDP_GRO. A missing sequence number is a lost packet. For each loss limit, a bisection finds the
highest rate that keeps the limit. A rate that exceeds the limit is tried a second time, because the
cause can be a short disturbance of the machine. A variant is the UDP payload in bytes. Works with
every contender.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from ..blocks import Job, Refused, Series, SlotResult
from ..contenders import PathUnderTest
from ..load import stream
from .metric import Metric, Plan

VARIANTS = ("64 bytes", "256 bytes", "512 bytes", "1400 bytes")
THRESHOLDS = {"pps_without_loss": 0.0, "pps_at_half_percent": 0.005}
MIN_PPS = 1000.0
_PRECISION = 1.05  # the search ends when the bounds of the rate differ by at most 5 %
_TRIALS = 10  # the expected number of trials of one slot
_TRIAL_SHARE = 0.5  # the duration of a trial, relative to the plan's seconds


@dataclass(frozen=True)
class Trial:
    """One stream of packets.

    offered  the packets per second that the sender sent
    loss     the share of the sent packets that did not arrive, 0..1
    full     True if the sender sent at full rate
    late     the number of packets that arrived out of order
    """

    offered: float
    loss: float
    full: bool = False
    late: int = 0


@dataclass
class Search:
    """A bisection over the rate. The search for a loss limit uses the trials of earlier limits."""

    send: Callable[[float], Trial]  # the argument is packets per second; 0: full rate
    trials: list[Trial] = field(default_factory=list)

    def _passes(self, rate: float, threshold: float) -> Trial | None:
        for _ in range(2):
            trial = self.send(rate)
            self.trials.append(trial)
            if trial.loss <= threshold:
                return trial
        return None

    def highest(self, threshold: float) -> float:
        """Return the highest rate with at most this loss; 0 if the loss at MIN_PPS is higher."""
        if not self.trials:
            self.trials.append(self.send(0))
        passed = [t for t in self.trials if t.loss <= threshold]
        low = max((t.offered for t in passed), default=0.0)
        failed = [t.offered for t in self.trials if t.loss > threshold and t.offered > low]
        high = min(failed, default=0.0)
        if not high:
            return low  # the full rate of the sender
        if not low:
            slowest = self._passes(min(MIN_PPS, high / 2), threshold)
            if slowest is None:
                return 0.0
            low = slowest.offered
        while high / low > _PRECISION:
            rate = math.sqrt(low * high)
            trial = self._passes(rate, threshold)
            if trial is None:
                high = rate
            elif trial.offered <= low:
                break  # the sender cannot send faster
            else:
                low = trial.offered
        return low


@dataclass
class Streams:
    """Sends one stream of packets per trial from a to b. load.stream gets the ``options``."""

    path: PathUnderTest
    seconds: float
    size: int
    options: dict[str, Any] = field(default_factory=dict)
    received_bytes: int = 0

    def send(self, rate: float) -> Trial:
        sent, received = stream(
            self.path, seconds=self.seconds, rate=round(rate), size=self.size, **self.options
        )
        if not sent["sent"]:
            raise Refused(f"the sender sent no packet: {sent}")
        self.received_bytes += received["bytes"]
        return Trial(
            sent["sent"] / sent["seconds"], 1 - received["received"] / sent["sent"],
            full=not rate, late=received["late"],
        )


@dataclass(frozen=True)
class Rate:
    """One slot: one measurement of one contender (see ``bench.blocks``)."""

    size: int
    seconds: float

    def __call__(self, path: PathUnderTest) -> SlotResult:
        streams = Streams(path, self.seconds, self.size)
        search = Search(streams.send)
        values = {name: search.highest(limit) for name, limit in THRESHOLDS.items()}
        full = next(t for t in search.trials if t.full)
        values["pps_delivered"] = full.offered * (1 - full.loss)
        if not values["pps_at_half_percent"]:
            raise Refused(f"more than 0.5 % loss at {MIN_PPS:.0f} packets per second")
        trials = [asdict(t) for t in search.trials]
        return SlotResult(values, (streams.received_bytes, 0), {"trials": trials})


def jobs(plan: Plan) -> Iterator[Job]:
    for variant in plan.variants or VARIANTS:
        for profile in plan.profiles:
            size, trial = int(variant.split()[0]), plan.seconds * _TRIAL_SHARE
            yield Job(
                Series("pps", profile, variant), plan.contenders, Rate(size, trial),
                blocks=plan.blocks, slot_seconds=_TRIALS * trial, mirrored=False,
            )


METRIC = Metric(
    "pps", "small packets: rate without loss, at 0.5 % loss, and delivered at full rate", jobs,
    VARIANTS, "N bytes (N: 16..1400 bytes of UDP payload)", r"(?P<n>\d+) bytes", {"": (16, 1400)},
)
