"""Numbers from numbers: medians, quantiles, ratios within blocks, bootstrap intervals, noise.

Pure; knows nothing of what was measured. The same input gives the same output: the resampling has
a fixed seed.
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
    """A median with its 95 % interval, from ``n`` blocks."""

    median: float
    low: float
    high: float
    n: int

    def scaled(self, factor: float) -> Estimate:
        return Estimate(self.median * factor, self.low * factor, self.high * factor, self.n)


def quantile(values: Sequence[float], q: float) -> float:
    """Linear between the two nearest; ``q`` 0..1, ``values`` not empty."""
    ordered = sorted(values)
    at = q * (len(ordered) - 1)
    below = int(at)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (at - below)


def estimate(
    values: Sequence[float], statistic: Callable[[Sequence[float]], float] = median,
    resamples: int = RESAMPLES,
) -> Estimate | None:
    """The statistic with its percentile bootstrap interval; None of nothing.

    With one value the interval is that value: ``n`` says how little that means.
    """
    if not values:
        return None
    rng = random.Random(_SEED)
    drawn = [statistic(rng.choices(values, k=len(values))) for _ in range(resamples)]
    tail = (1 - CONFIDENCE) / 2
    return Estimate(
        statistic(values), quantile(drawn, tail), quantile(drawn, 1 - tail), len(values)
    )


Block = Mapping[str, Sequence[float]]  # contender -> the values of its slots in that block


def levels(blocks: Sequence[Block], name: str) -> list[float]:
    """One value a block: the mean of its slots, so that a steady drift cancels out."""
    return [fmean(block[name]) for block in blocks if block.get(name)]


def ratios(blocks: Sequence[Block], name: str, against: str) -> list[float]:
    """``name`` divided by ``against`` within each block that has both."""
    return [
        fmean(block[name]) / fmean(block[against])
        for block in blocks
        if block.get(name) and block.get(against) and fmean(block[against])
    ]


def noise(blocks: Sequence[Block]) -> Estimate | None:
    """The A/A noise floor: how far two slots of the same contender in a block are apart.

    The median over all contenders and blocks of ``|second / first - 1|``; what two contenders
    differ by below that is nothing.
    """
    apart = [
        abs(values[1] / values[0] - 1)
        for block in blocks
        for values in block.values()
        if len(values) == 2 and values[0]
    ]
    return estimate(apart)


def drift(values: Sequence[float]) -> float:
    """The largest of the values over the smallest, less 1; 0 for fewer than two."""
    return max(values) / min(values) - 1 if len(values) > 1 and min(values) > 0 else 0.0
