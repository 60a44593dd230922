"""Statistics: medians, quantiles, ratios within blocks, bootstrap intervals, noise.

Owns: the formulas. Pure: the resampling has a fixed seed, so the same input gives the same output.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median

RESAMPLES = 4000
CONFIDENCE = 0.95
_SEED = 8285


@dataclass(frozen=True)
class Estimate:
    """A median with its 95 % interval. Both are computed from ``n`` blocks."""

    median: float
    low: float
    high: float
    n: int

    def scaled(self, factor: float) -> Estimate:
        return Estimate(self.median * factor, self.low * factor, self.high * factor, self.n)


def quantile(values: Sequence[float], q: float) -> float:
    """Return a quantile, interpolated linearly; ``q`` is 0..1, ``values`` is not empty."""
    ordered = sorted(values)
    at = q * (len(ordered) - 1)
    below = int(at)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (at - below)


def estimate(
    values: Sequence[float], statistic: Callable[[Sequence[float]], float] = median,
    resamples: int = RESAMPLES,
) -> Estimate | None:
    """Return the statistic with its percentile bootstrap interval; None if ``values`` is empty.

    If there is only one value, both ends of the interval are this value. ``n`` = 1 shows this case
    to the reader.
    """
    if not values:
        return None
    rng = random.Random(_SEED)
    drawn = [statistic(rng.choices(values, k=len(values))) for _ in range(resamples)]
    tail = (1 - CONFIDENCE) / 2
    return Estimate(
        statistic(values), quantile(drawn, tail), quantile(drawn, 1 - tail), len(values)
    )


Block = Mapping[str, Sequence[float]]  # contender -> the values of its slots in a block


def levels(blocks: Sequence[Block], name: str) -> list[float]:
    """Return the mean of the slots of ``name`` in each block. The mean cancels a steady drift."""
    return [fmean(block[name]) for block in blocks if block.get(name)]


def ratios(blocks: Sequence[Block], name: str, against: str) -> list[float]:
    """Return the ratio of ``name`` to ``against`` in each block that has values of both."""
    return [
        fmean(block[name]) / fmean(block[against])
        for block in blocks
        if block.get(name) and block.get(against) and fmean(block[against])
    ]


def noise(blocks: Sequence[Block]) -> Estimate | None:
    """Return the A/A noise: the relative difference of two slots of one contender in a block.

    The result is the median of ``|second / first - 1|`` over all contenders and blocks. A
    difference between two contenders is not significant if it is smaller than this noise.
    """
    apart = [
        abs(values[1] / values[0] - 1)
        for block in blocks
        for values in block.values()
        if len(values) == 2 and values[0]
    ]
    return estimate(apart)


def drift(values: Sequence[float]) -> float:
    """Return (largest value / smallest value) - 1; 0 if there are fewer than two values."""
    return max(values) / min(values) - 1 if len(values) > 1 and min(values) > 0 else 0.0
