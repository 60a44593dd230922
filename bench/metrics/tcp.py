"""TCP throughput in bit/s (iperf3), and its cost in CPU seconds of the whole system per gigabyte.

A variant is the number of streams and the direction: "there" (a to b), "back" (b to a) or "both"
(both directions at once). "busy" after it: an endless loop runs on each CPU core beside it, as on
a host with other work. To compare contenders, use the ratios of the variant "1 there" (one stream
from a to b). Works with every contender.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

from udptun.lab import iperf3

from ..blocks import Job, Refused, Series, SlotResult
from ..contenders import PathUnderTest
from ..load import busy
from .metric import Metric, Plan

VARIANTS = ("1 there", "4 there", "16 there", "1 back", "1 both")


@dataclass(frozen=True)
class Tcp:
    """One slot: one measurement of one contender (see ``bench.blocks``)."""

    streams: int
    direction: str
    seconds: int
    congestion: str | None = None
    beside_work: bool = False

    def __call__(self, path: PathUnderTest) -> SlotResult:
        with busy(path) if self.beside_work else contextlib.nullcontext():
            result = iperf3(
                path.b, path.a, path.at_b, seconds=self.seconds, streams=self.streams,
                reverse=self.direction == "back", both=self.direction == "both",
                congestion=self.congestion,
            )
        expected = {"there": (True, False), "back": (False, True), "both": (True, True)}
        for got, wanted in zip(result.received_bytes, expected[self.direction], strict=True):
            if wanted and not got:
                raise Refused("iperf3 received nothing")
        # The CPU time of the loops is not that of the traffic.
        cpu = {} if self.beside_work else {"cpu_seconds": 0.0}
        return SlotResult(
            {"bits_per_second": result.bits_per_second} | cpu,
            result.received_bytes, {"retransmits": result.retransmits},
        )


def jobs(plan: Plan) -> Iterator[Job]:
    for variant in plan.variants or VARIANTS:
        for profile in plan.profiles:
            streams, direction, *work = variant.split()
            yield Job(
                Series("tcp", profile, variant, None if work else "bits_per_second"),
                plan.contenders,
                Tcp(int(streams), direction, plan.seconds, plan.congestion, bool(work)),
                plan.blocks, slot_seconds=plan.seconds,
            )


METRIC = Metric(
    "tcp", "TCP throughput, and CPU time of the whole system per gigabyte", jobs, VARIANTS,
    "N there, N back or N both (N: 1..128 streams; from a to b, from b to a, in both directions), "
    "then optionally busy (an endless loop on each CPU core)",
    r"(?P<n>\d+) (there|back|both)( busy)?", {"": (1, 128)},
)
