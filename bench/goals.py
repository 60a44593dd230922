"""The performance goals of udptun: for each figure a required value and a target.

Owns: the list of goals, and the comparison of a run with them. Pure. The measured median decides;
the report also prints its interval, which shows close results. The profiles P1 to P3 are described
in ``profiles``.
"""

from __future__ import annotations

from dataclasses import dataclass

from .stats import Estimate
from .summary import Run

SUBJECT = "udptun"


@dataclass(frozen=True)
class Goal:
    """One figure of udptun with its limits.

    against   the contender to compare with: the figure is the ratio of udptun to this contender.
              None if the figure is the value of udptun itself
    required  the limit that every release must reach
    target    the limit that development aims at
    at_least  True if larger is better
    unit      the unit of both limits; ``factor`` converts a raw value to this unit
    """

    row: str
    metric: str
    profile: str
    variant: str
    value: str
    against: str | None
    required: float
    target: float
    at_least: bool = True
    unit: str = "x"
    factor: float = 1.0

    def measured(self, run: Run) -> Estimate | None:
        """Return the figure of this run, or None if the run did not measure the figure."""
        figures = run.get(self.metric, self.profile, self.variant, self.value)
        if figures is None:
            return None
        if self.against is not None:
            return figures.ratio(SUBJECT, self.against)
        level = figures.level(SUBJECT)
        return level and level.scaled(self.factor)

    def reaches(self, value: float, limit: float) -> bool:
        return value >= limit if self.at_least else value <= limit


def _tcp(profile: str, against: str, title: str, required: float, target: float) -> Goal:
    return Goal(
        f"TCP 1 stream, {profile}, vs {title}", "tcp", profile, "1 there", "bits_per_second",
        against, required, target,
    )


GOALS = (
    _tcp("P1", "vxlan", "kernel VXLAN", 0.65, 0.85),
    _tcp("P2", "vxlan", "kernel VXLAN", 0.85, 1.10),
    _tcp("P3", "vxlan", "kernel VXLAN", 0.70, 1.00),
    _tcp("P1", "onepacket", "bench/onepacket", 11, 14),
    _tcp("P2", "onepacket", "bench/onepacket", 7, 9),
    _tcp("P3", "onepacket", "bench/onepacket", 4.5, 6),
    _tcp("P1", "copylimit", "the copy limit", 0.90, 0.97),
    Goal("64-byte UDP, rate at 0.5 % loss, P1, vs bench/onepacket", "pps", "P1", "64 bytes",
          "pps_at_half_percent", "onepacket", 3, 6),
    Goal("CPU-seconds per GB, P1, vs bench/onepacket", "tcp", "P1", "1 there",
          "cpu_seconds_per_gb", "onepacket", 1 / 8, 1 / 12, at_least=False),
    Goal("round trip p50 idle, P1, vs bench/onepacket", "rtt", "P1", "udp idle", "p50_ns",
          "onepacket", 1.30, 0.95, at_least=False),
    Goal("round trip p99 under bulk load, P1, vs kernel VXLAN", "rtt", "P1", "udp bulk", "p99_ns",
          "vxlan", 4, 1.5, at_least=False),
    Goal("look-up, random, 100,000 routes", "lookup", "-", "v4 random 100000", "lookup_ns", None,
          25, 8, at_least=False, unit="ns"),
    Goal("100,000 routes replaced under load: longest gap", "gap", "P1", "100000 routes",
          "gap_ns", None, 2, 0.2, at_least=False, unit="ms", factor=1e-6),
    Goal("memory, 10,000 routes, under load", "memory", "P1", "10000 routes", "rss_bytes", None,
          64, 40, at_least=False, unit="MB", factor=1e-6),
    Goal("start to the first forwarded packet", "start", "P1", "", "start_ns", None, 800, 250,
          at_least=False, unit="ms", factor=1e-6),
)


@dataclass(frozen=True)
class Verdict:
    """A goal and the result of a run; each answer is None if the run did not measure the figure."""

    goal: Goal
    measured: Estimate | None

    @property
    def meets_required(self) -> bool | None:
        return self._reaches(self.goal.required)

    @property
    def meets_target(self) -> bool | None:
        return self._reaches(self.goal.target)

    def _reaches(self, limit: float) -> bool | None:
        return None if self.measured is None else self.goal.reaches(self.measured.median, limit)


def verdicts(run: Run) -> list[Verdict]:
    return [Verdict(goal, goal.measured(run)) for goal in GOALS]
