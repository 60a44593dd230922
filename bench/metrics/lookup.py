"""The look-up alone, in the compiled core: ns for each of 65,536 addresses.

Variants: family, which addresses, how many routes; see bench/tables.py. What a look-up answers is
compared with the same table's answers one by one: the sum of all.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from functools import cache

from udptun._steps import Lpm

from .. import tables
from ..blocks import Measured, Refused, Series, record_alone
from ..session import Session
from .plan import Plan

VARIANTS = ("v4 random 100000", "v4 hit 100000", "v6 random 100000", "v6 hit 100000")
_ROUNDS = 8


@cache
def _table(n: int, family: int) -> Lpm:
    return Lpm(tables.text(n, family))


@dataclass(frozen=True)
class LookUps:
    """The slot, which needs no road."""

    variant: str
    seconds: float
    family: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "family", int(self.variant[1]))

    def __call__(self) -> Measured:
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
                raise Refused("the look-ups answered something else")
        return Measured({"lookup_ns": best}, facts={"table_bytes": table.sizeof()})


def run(s: Session, plan: Plan) -> None:
    for variant in plan.variants or VARIANTS:
        record_alone(
            s, Series("lookup", "-", variant), LookUps(variant, plan.seconds), blocks=plan.blocks
        )
