"""The performance goals of udptun: for each figure a required value and a target.

Owns: the list of goals, and the comparison of a run with them. Pure. The measured median decides;
the report also prints its interval, which shows close results. The profiles P1 to P4 are described
in ``profiles``.

Most goals compare udptun with the kernel's VXLAN, once without and once with the express path. A
metric with limits of one of the two only has None for the other.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from . import stats
from .stats import Estimate
from .summary import Run

WORKERS, EXPRESS = "udptun", "udptun --accelerate auto"

Limits = tuple[float, float]  # required, target


@dataclass(frozen=True)
class Goal:
    """One figure of udptun with its limits.

    row        the name of the figure
    subject    the contender that has to reach the limits
    against    the contender to compare with: the figure is the ratio of ``subject`` to this
               contender. None if the figure is the value of ``subject`` itself
    relative   the variant to compare with: the figure is the ratio of ``variant`` to this variant,
               both of ``subject``. "" for none
    required   the limit that every release must reach
    target     the limit that development aims at
    at_least   True if larger is better
    unit       the unit of both limits; ``factor`` converts a raw value to this unit
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
    subject: str = WORKERS
    relative: str = ""

    @property
    def compared(self) -> str:
        """Return what the figure is a ratio to; "-": nothing."""
        return self.relative or self.against or "-"

    def measured(self, run: Run) -> Estimate | None:
        """Return the figure of this run, or None if the run did not measure the figure."""
        figures = run.get(self.metric, self.profile, self.variant, self.value)
        if figures is None:
            return None
        if self.relative:
            return self._ratio_of_variants(run)
        if self.against is not None:
            return figures.ratio(self.subject, self.against)
        level = figures.level(self.subject)
        return level and level.scaled(self.factor)

    def _ratio_of_variants(self, run: Run) -> Estimate | None:
        """Divide the first block of one variant by the first of the other, and so on. The two are
        not measured at the same time, as the contenders of a block are."""
        both = [run.get(self.metric, self.profile, variant, self.value)
                for variant in (self.variant, self.relative)]
        levels = [stats.levels(figures.blocks, self.subject) if figures else [] for figures in both]
        return stats.estimate([a / b for a, b in zip(*levels, strict=False) if b])

    def reaches(self, value: float, limit: float) -> bool:
        return value >= limit if self.at_least else value <= limit


def _both(
    row: str, metric: str, profile: str, variant: str, value: str,
    workers: Limits | None, express: Limits | None, at_least: bool = True,
    against: str | None = "vxlan", relative: str = "",
) -> Iterator[Goal]:
    """Yield the goal without and the goal with the express path; None: it has no limits."""
    for subject, limits in ((WORKERS, workers), (EXPRESS, express)):
        if limits is not None:
            yield Goal(f"{row}, {profile}", metric, profile, variant, value, against, *limits,
                       at_least=at_least, subject=subject, relative=relative)


def _throughput(
    row: str, variant: str, limits: dict[str, tuple[Limits, Limits]]
) -> Iterator[Goal]:
    for profile, (workers, express) in limits.items():
        yield from _both(row, "tcp", profile, variant, "bits_per_second", workers, express)


def _round_trip(
    row: str, variant: str, profile: str, workers: Limits | None, express: Limits,
    value: str = "p50_ns",
) -> Iterator[Goal]:
    return _both(row, "rtt", profile, variant, value, workers, express, at_least=False)


def _against(
    title: str, against: str, metric: str, profile: str, variant: str, value: str, required: float,
    target: float, at_least: bool = True,
) -> Goal:
    return Goal(title, metric, profile, variant, value, against, required, target, at_least)


def _own(
    title: str, metric: str, profile: str, variant: str, value: str, required: float, target: float,
    unit: str = "", factor: float = 1.0, subject: str = WORKERS,
) -> Goal:
    return Goal(title, metric, profile, variant, value, None, required, target, at_least=False,
                unit=unit, factor=factor, subject=subject)


# The first limits are those of the workers, the second those with the express path.
GOALS = (
    *_round_trip("round trip idle, p50", "udp idle", "P1", (1.45, 1.2), (1.15, 1.0)),
    *_round_trip("ping idle, p50", "ping idle", "P1", None, (1.3, 1.0)),
    *_round_trip("round trip beside bulk, p50", "udp bulk", "P1", (6, 3), (1.5, 1.1)),
    *_round_trip("ping beside bulk, p50", "ping bulk", "P1", None, (1.5, 1.1)),
    *_round_trip("ping beside bulk, p50", "ping bulk", "P2", None, (2, 1.1)),
    *_round_trip("round trip beside bulk, p99", "udp bulk", "P1", (1.5, 1.0), (1.3, 1.0), "p99_ns"),
    *_throughput("TCP 1 stream", "1 there", {
        "P1": ((0.80, 1.0), (0.80, 1.15)), "P2": ((1.15, 1.3), (1.15, 1.4)),
        "P3": ((1.0, 1.15), (1.05, 1.3)), "P4": ((1.6, 2), (1.6, 2)),
    }),
    *_throughput("TCP 4 streams", "4 there", {
        "P1": ((0.50, 0.6), (1.1, 1.35)), "P2": ((0.95, 1.1), (1.0, 1.1)),
        "P3": ((0.90, 1.05), (1.0, 1.1)), "P4": ((1.5, 2), (1.5, 2)),
    }),
    *_throughput("TCP in both directions", "1 both", {
        "P1": ((0.80, 1.0), (1.0, 1.2)), "P2": ((1.0, 1.15), (1.0, 1.15)),
        "P3": ((0.95, 1.05), (1.0, 1.1)),
    }),
    *_throughput("TCP 1 stream, busy cores", "1 there busy", {
        "P1": ((0.55, 0.8), (0.85, 1.0)), "P2": ((0.7, 1.0), (0.8, 1.0)),
        "P3": ((0.65, 0.9), (0.85, 1.0)),
    }),
    *(goal for profile, workers, express in (
        ("P1", (1.45, 1.2), (1.2, 1.0)), ("P2", (1.05, 0.9), (1.05, 0.9)),
        ("P3", (1.25, 1.0), (1.1, 1.0)),
    ) for goal in _both("CPU time per byte, 1 stream", "tcp", profile, "1 there",
                        "cpu_seconds_per_gb", workers, express, at_least=False)),
    *_both("64-byte packets at 0.5 % loss", "pps", "P1", "64 bytes", "pps_at_half_percent",
           (3.4, 4), (3.4, 4)),
    *_both("64-byte packets, 100 peers against 1 peer", "scale", "P1", "100 peers",
           "pps_at_half_percent", (0.6, 0.9), (0.6, 0.9), against=None, relative="1 peers"),
    _own("packets lost when the forwarder is killed", "kill", "P1", "", "lost_packets", 0, 0,
         "packets", subject=EXPRESS),
    _against("TCP 1 stream, P1", "onepacket", "tcp", "P1", "1 there",
             "bits_per_second", 11, 14),
    _against("TCP 1 stream, P2", "onepacket", "tcp", "P2", "1 there",
             "bits_per_second", 7, 9),
    _against("TCP 1 stream, P3", "onepacket", "tcp", "P3", "1 there",
             "bits_per_second", 4.5, 6),
    _against("TCP 1 stream, P1", "copylimit", "tcp", "P1", "1 there",
             "bits_per_second", 0.90, 0.97),
    _against("64-byte packets at 0.5 % loss, P1", "onepacket", "pps", "P1",
             "64 bytes", "pps_at_half_percent", 3, 6),
    _against("CPU time per byte, P1", "onepacket", "tcp", "P1", "1 there",
             "cpu_seconds_per_gb", 1 / 8, 1 / 12, at_least=False),
    _against("round trip idle, p50, P1", "onepacket", "rtt", "P1", "udp idle",
             "p50_ns", 1.30, 0.95, at_least=False),
    _own("look-up, random, 100,000 routes", "lookup", "-", "v4 random 100000", "lookup_ns", 25, 8,
         "ns"),
    _own("100,000 routes replaced under load: longest gap", "gap", "P1", "100000 routes", "gap_ns",
         2, 0.2, "ms", 1e-6),
    _own("memory, 10,000 routes, under load", "memory", "P1", "10000 routes", "rss_bytes", 64, 40,
         "MB", 1e-6),
    _own("start to the first forwarded packet", "start", "P1", "", "start_ns", 800, 250, "ms",
         1e-6),
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
