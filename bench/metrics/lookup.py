"""Route look-up in the compiled core, without forwarding: ns per look-up.

A slot times several loops over 65,536 addresses. The result is the time of the fastest loop. A
variant has an address family, a kind of address and a number of routes (see bench/tables.py). The
sum of the look-up results must equal the sum of the results of 65,536 single look-ups. Needs no
hosts and no wire.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING

from udptun.lab import LabError

from .. import tables
from ..blocks import LocalJob, Refused, Series, SlotResult
from .metric import NO_PROFILE, Metric, Plan

if TYPE_CHECKING:
    from tests.steps import Lpm

VARIANTS = ("v4 random 100000", "v4 hit 100000", "v6 random 100000", "v6 hit 100000")
_ROUNDS = 8


@cache
def _table(n: int, family: int) -> Lpm:
    # tests.steps is compiled for tests and benchmarks only. No other metric needs this module.
    try:
        from tests.steps import Lpm
    except ImportError as e:
        raise LabError(f"needs the compiled steps: run make .venv/steps.stamp ({e})") from None
    return Lpm(tables.text(n, family))


@dataclass(frozen=True)
class LookUps:
    """One slot: one measurement (see ``bench.blocks``). The measurement runs in this process."""

    variant: str
    seconds: float
    family: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "family", int(self.variant[1]))

    def __call__(self) -> SlotResult:
        _, kind, n = self.variant.split()
        table, family = _table(int(n), self.family), self.family
        blob = tables.addresses(kind, int(n), family)
        size = tables.WIDTHS[family] // 8
        expected = sum(table.lookup(blob[i : i + size]) for i in range(0, len(blob), size))
        best, end = float("inf"), time.monotonic() + self.seconds
        while time.monotonic() < end:
            began = time.perf_counter_ns()
            total = table.bench(blob, family, _ROUNDS)
            best = min(best, (time.perf_counter_ns() - began) / (_ROUNDS * tables.ADDRESSES))
            if total != _ROUNDS * expected:
                raise Refused("the loop found other routes than single look-ups do")
        return SlotResult({"lookup_ns": best}, facts={"table_bytes": table.sizeof()})


def jobs(plan: Plan) -> Iterator[LocalJob]:
    for variant in plan.variants or VARIANTS:
        yield LocalJob(
            Series("lookup", NO_PROFILE, variant), LookUps(variant, plan.seconds), plan.blocks,
            plan.seconds,
        )


METRIC = Metric(
    "lookup", "time of one route look-up in the core", jobs, VARIANTS,
    "v4 or v6, then hit, miss or random, then 1..1000000 routes (v4 random 100000)",
    r"v[46] (hit|miss|random) (?P<n>\d+)", {"": (1, 1_000_000)}, programs=("udptun",),
)
