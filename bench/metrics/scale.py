"""Scaling: 64-byte packets at 0.5 % loss with 1..100,000 routes, in turn to an address of each.

The addresses are all host b's, and the routes lead there: what differs is the look-up alone.
"""

from __future__ import annotations

import contextlib
import ipaddress
from collections.abc import Iterator
from dataclasses import dataclass

from ..blocks import Measured, Refused, Series, run_blocks
from ..contenders import Road
from ..load import stream
from ..session import Session
from .plan import Plan
from .pps import THRESHOLDS, Search, Trial

VARIANTS = ("1 routes", "100 routes", "10000 routes", "100000 routes")
_AREA = ipaddress.IPv4Network("10.64.0.0/10")
_SIZE = 64
_TRIAL_SHARE = 0.5


def prefixes(n: int) -> list[str]:
    """A /30 each, one after another: what ``udpload send --spread`` sends to."""
    first = int(_AREA.network_address)
    return [f"{ipaddress.IPv4Address(first + 4 * i)}/30" for i in range(n)]


@contextlib.contextmanager
def way(road: Road) -> Iterator[None]:
    """Host a sends the area into the tunnel, host b takes any address in it for its own."""
    road.a.ip(f"route replace {_AREA} dev {road.device} src {road.at_a}")
    road.b.ip(f"route replace local {_AREA} dev lo")
    try:
        yield
    finally:
        road.a.ip(f"route del {_AREA} dev {road.device}")
        road.b.ip(f"route del local {_AREA} dev lo")


@dataclass(frozen=True)
class Spread:
    """The slot."""

    routes: int
    seconds: float

    def __call__(self, road: Road) -> Measured:
        if road.set_routes is None:
            raise Refused("its routes cannot be set from here")
        received_bytes = 0

        def ask(rate: float) -> Trial:
            nonlocal received_bytes
            sent, received = stream(
                road, seconds=self.seconds, rate=round(rate), size=_SIZE, spread=self.routes,
                address=_AREA.network_address, listen="0.0.0.0",
            )
            if not sent["sent"]:
                raise Refused(f"nothing was sent: {sent}")
            received_bytes += received["bytes"]
            return Trial(
                sent["sent"] / sent["seconds"], 1 - received["received"] / sent["sent"],
                full=not rate, late=received["late"],
            )

        with way(road):
            road.set_routes(prefixes(self.routes))
            try:
                search = Search(ask)
                value = search.highest(THRESHOLDS["pps_at_half_percent"])
            finally:
                road.set_routes(())
        if not value:
            raise Refused("more than 0.5 % lost at any rate")
        return Measured({"pps_at_half_percent": value}, (received_bytes, 0))


def run(s: Session, plan: Plan) -> None:
    for variant in plan.variants or VARIANTS:
        for profile in plan.profiles:
            trial = plan.seconds * _TRIAL_SHARE
            run_blocks(
                s, Series("scale", profile, variant), plan.contenders,
                Spread(int(variant.split()[0]), trial), blocks=plan.blocks,
                slot_seconds=14 * trial, mirrored=False,
            )
