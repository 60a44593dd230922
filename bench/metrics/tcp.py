"""TCP throughput by iperf3, and what it costs in CPU seconds of the whole system per gigabyte.

Variants: "N streams", and the direction: "there" (a to b), "back" (iperf3 -R), "both" at once.
One stream and one direction is what the ratios are about.
"""

from __future__ import annotations

from dataclasses import dataclass

from udptun.lab import iperf3

from ..blocks import Measured, Refused, Series, run_blocks
from ..contenders import Road
from ..session import Session
from .plan import Plan

VARIANTS = ("1 there", "4 there", "16 there", "1 back", "1 both")


@dataclass(frozen=True)
class Tcp:
    """The slot."""

    streams: int
    direction: str
    seconds: int
    congestion: str | None = None

    def __call__(self, road: Road) -> Measured:
        result = iperf3(
            road.b, road.a, road.at_b, seconds=self.seconds, streams=self.streams,
            reverse=self.direction == "back", both=self.direction == "both",
            congestion=self.congestion,
        )
        expected = {"there": (True, False), "back": (False, True), "both": (True, True)}
        for got, wanted in zip(result.received_bytes, expected[self.direction], strict=True):
            if wanted and not got:
                raise Refused("iperf3 received nothing")
        return Measured(
            {"bits_per_second": result.bits_per_second, "cpu_seconds": 0.0},
            result.received_bytes, {"retransmits": result.retransmits},
        )


def run(s: Session, plan: Plan) -> None:
    for variant in plan.variants or VARIANTS:
        for profile in plan.profiles:
            streams, direction = variant.split()
            run_blocks(
                s, Series("tcp", profile, variant, "bits_per_second"), plan.contenders,
                Tcp(int(streams), direction, plan.seconds, plan.congestion), blocks=plan.blocks,
                slot_seconds=plan.seconds,
            )
