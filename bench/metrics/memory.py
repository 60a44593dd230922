"""Memory of a forwarder: the most it had resident, with N routes, while TCP went through it.

The larger of the two forwarders; both have the routes. VmRSS of /proc, every 50 ms.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from ..blocks import Measured, Refused, Series, run_blocks
from ..contenders import Road
from ..contenders.builtin import put_routes
from ..load import bulk
from ..session import Session
from .plan import Plan

VARIANTS = ("10000 routes",)
_EVERY_SECONDS = 0.05


@dataclass(frozen=True)
class Resident:
    """The slot."""

    routes: int
    seconds: int

    def __call__(self, road: Road) -> Measured:
        if not road.forwarders:
            raise Refused("only udptun's process is known here")
        own = [forwarder.routes_file.read_text() for forwarder in road.forwarders]
        vias = road.b.v4, road.a.v4
        base = (10 << 24) + (64 << 16)
        try:
            for forwarder, text, via in zip(road.forwarders, own, vias, strict=True):
                more = (
                    f"{x >> 24}.{x >> 16 & 255}.{x >> 8 & 255}.{x & 255}/30 via {via}\n"
                    for x in range(base, base + 4 * self.routes, 4)
                )
                put_routes(forwarder, (text + "".join(more)).encode(), "text/plain")
                if forwarder.status()["route_count"] < self.routes:
                    raise Refused("the forwarder does not have the routes")
            return self._load(road)
        finally:
            for forwarder, text in zip(road.forwarders, own, strict=True):
                put_routes(forwarder, text.encode(), "text/plain")

    def _load(self, road: Road) -> Measured:
        most = 0
        with bulk(road, self.seconds + 2):
            end = time.monotonic() + self.seconds
            before = road.forwarders[0].status()["packets"]["encap"]["delivered"]
            while time.monotonic() < end:
                most = max(most, *(forwarder.rss_kib() for forwarder in road.forwarders))
                time.sleep(_EVERY_SECONDS)
            after = road.forwarders[0].status()["packets"]["encap"]["delivered"]
        if after - before < 1000 * self.seconds:
            raise Refused(f"{after - before} packets in {self.seconds} s are no load")
        return Measured({"rss_bytes": most * 1024.0}, facts={"packets": after - before})


def run(s: Session, plan: Plan) -> None:
    for variant in plan.variants or VARIANTS:
        for profile in plan.profiles:
            run_blocks(
                s, Series("memory", profile, variant), plan.contenders,
                Resident(int(variant.split()[0]), plan.seconds), blocks=plan.blocks,
                slot_seconds=plan.seconds + 3, mirrored=False,
            )
