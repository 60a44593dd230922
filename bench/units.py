"""The values of the metrics: title, unit, and whether a larger or a smaller value is better.

Owns: the formatting of numbers. The functions have no side effects.
"""

from __future__ import annotations

from dataclasses import dataclass

from .stats import Estimate


@dataclass(frozen=True)
class Unit:
    """The unit of a value. ``factor`` converts a recorded raw value to ``unit``."""

    title: str
    unit: str
    factor: float
    more_is_better: bool


UNITS = {
    "bits_per_second": Unit("TCP throughput", "Gbit/s", 1e-9, True),
    "cpu_seconds_per_gb": Unit("CPU time of the whole system", "s/GB", 1, False),
    "p50_ns": Unit("round trip, p50", "us", 1e-3, False),
    "p99_ns": Unit("round trip, p99", "us", 1e-3, False),
    "p999_ns": Unit("round trip, p99.9", "us", 1e-3, False),
    "pps_without_loss": Unit("rate without loss", "kpps", 1e-3, True),
    "pps_at_half_percent": Unit("rate at 0.5 % loss", "kpps", 1e-3, True),
    "pps_delivered": Unit("delivered at full rate", "kpps", 1e-3, True),
    "gap_ns": Unit("longest gap while routes are replaced", "us", 1e-3, False),
    "quiet_gap_ns": Unit("longest gap just before", "us", 1e-3, False),
    "apply_ns": Unit("time until the new table is active", "ms", 1e-6, False),
    "delay_p50_ns": Unit("one-way delay, p50", "us", 1e-3, False),
    "delay_p99_ns": Unit("one-way delay, p99", "us", 1e-3, False),
    "delay_max_ns": Unit("longest one-way delay", "ms", 1e-6, False),
    "quiet_delay_p99_ns": Unit("one-way delay while quiet, p99", "us", 1e-3, False),
    "quiet_delay_max_ns": Unit("longest one-way delay while quiet", "ms", 1e-6, False),
    "lost_packets": Unit("lost packets", "packets", 1, False),
    "rss_bytes": Unit("resident memory", "MB", 1e-6, False),
    "start_ns": Unit("start to first forwarded packet", "ms", 1e-6, False),
    "lookup_ns": Unit("look-up", "ns", 1, False),
}


def number(value: float) -> str:
    """Format ``value`` with three significant digits."""
    if abs(value) >= 100:
        return f"{value:.0f}"
    if abs(value) >= 10:
        return f"{value:.1f}"
    return f"{value:.2f}" if abs(value) >= 1 else f"{value:.3g}"


def spread(estimate: Estimate | None, factor: float = 1.0) -> str:
    """Format as "8.12 (7.90..8.30)", with one block as "8.12", and None as "-"."""
    if estimate is None:
        return "-"
    scaled = estimate.scaled(factor)
    if estimate.n == 1:
        return number(scaled.median)
    return f"{number(scaled.median)} ({number(scaled.low)}..{number(scaled.high)})"
