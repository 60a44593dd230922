"""Scaling: 64-byte packets at 0.5 % loss over 1..100,000 routes, and to 1..100 peers.

Each packet goes to another address; there is one for each route. With "routes" they all lead to
host b. With "peers" they lead to as many addresses of host b, whose kernel hands what comes there
to its one tunnel (nft, destination NAT; with one peer, too, so that they can be compared).
"""

from __future__ import annotations

import contextlib
import ipaddress
from collections.abc import Iterator
from dataclasses import dataclass

from udptun.lab.tunnels import PORT

from ..blocks import Measured, Refused, Series, run_blocks
from ..contenders import Road
from ..load import stream
from ..session import Session
from .plan import Plan
from .pps import THRESHOLDS, Search, Trial

VARIANTS = (
    "1 routes", "100 routes", "10000 routes", "100000 routes", "1 peers", "10 peers", "100 peers",
)
_AREA = ipaddress.IPv4Network("10.64.0.0/10")
_FIRST_PEER = 101
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


@contextlib.contextmanager
def peers(road: Road, n: int) -> Iterator[list[str]]:
    """``n`` more addresses of host b's, where its tunnel is reached as well."""
    end = road.b.interfaces[0]
    net = end.v4.network
    addresses = [str(net[_FIRST_PEER + i]) for i in range(n)]
    rule = f"ip daddr {net} udp dport {PORT} dnat to {end.v4.ip}"
    chain = f"chain c {{\n type nat hook prerouting priority dstnat;\n {rule}\n }}"
    with contextlib.ExitStack() as made:
        for address in addresses:
            road.b.ip(f"address add {address}/{net.prefixlen} dev {end.name}")
            made.callback(road.b.ip, f"address del {address}/{net.prefixlen} dev {end.name}")
        road.b.nft(f"table ip bench_peers {{\n {chain}\n}}\n")
        made.callback(road.b.nft, "delete table ip bench_peers\n")
        yield addresses


@dataclass(frozen=True)
class Spread:
    """The slot."""

    n: int
    what: str
    seconds: float

    def __call__(self, road: Road) -> Measured:
        if road.set_routes is None:
            raise Refused("its routes cannot be set from here")
        with contextlib.ExitStack() as made:
            made.enter_context(way(road))
            hops = [str(road.b.v4)]
            if self.what == "peers":
                hops = made.enter_context(peers(road, self.n))
            made.callback(road.set_routes, ())
            road.set_routes([(p, hops[i % len(hops)]) for i, p in enumerate(prefixes(self.n))])
            return self._search(road)

    def _search(self, road: Road) -> Measured:
        received_bytes = 0

        def ask(rate: float) -> Trial:
            nonlocal received_bytes
            sent, received = stream(
                road, seconds=self.seconds, rate=round(rate), size=_SIZE, spread=self.n,
                address=_AREA.network_address, listen="0.0.0.0",
            )
            if not sent["sent"]:
                raise Refused(f"nothing was sent: {sent}")
            received_bytes += received["bytes"]
            return Trial(
                sent["sent"] / sent["seconds"], 1 - received["received"] / sent["sent"],
                full=not rate, late=received["late"],
            )

        value = Search(ask).highest(THRESHOLDS["pps_at_half_percent"])
        if not value:
            raise Refused("more than 0.5 % lost at any rate")
        return Measured({"pps_at_half_percent": value}, (received_bytes, 0))


def run(s: Session, plan: Plan) -> None:
    for variant in plan.variants or VARIANTS:
        for profile in plan.profiles:
            n, what = variant.split()
            trial = plan.seconds * _TRIAL_SHARE
            run_blocks(
                s, Series("scale", profile, variant), plan.contenders,
                Spread(int(n), what, trial), blocks=plan.blocks, slot_seconds=14 * trial,
                mirrored=False,
            )
