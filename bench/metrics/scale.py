"""Scaling: 64-byte packets per second at 0.5 % loss, with 1..100,000 routes or 1..100 peers.

Consecutive packets go to different addresses, one address per route. Variant "N routes": all routes
have host b as next hop. Variant "N peers": the routes have N addresses of host b as next hops. Host
b has one tunnel; an nft rule on b sends the datagrams of all N addresses to it. The rule also
exists for N = 1, so that all variants have the same cost. Needs a contender whose routes can be
set: udptun or onepacket.
"""

from __future__ import annotations

import contextlib
import ipaddress
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from udptun.lab.tunnels import PORT

from ..blocks import Job, Refused, Series, SlotResult
from ..contenders import PathUnderTest
from ..tables import consecutive
from .metric import Metric, Plan
from .pps import THRESHOLDS, Search, Streams

VARIANTS = (
    "1 routes", "100 routes", "10000 routes", "100000 routes", "1 peers", "10 peers", "100 peers",
)
_TEST_PREFIX = ipaddress.IPv4Network("10.64.0.0/10")
_FIRST_PEER = 101
_SIZE = 64
_TRIAL_SHARE = 0.5
_TRIALS = 13  # the expected number of trials of one slot


@contextlib.contextmanager
def test_routes(path: PathUnderTest) -> Iterator[None]:
    """Route the test prefix into the tunnel on host a; make all its addresses local on host b."""
    path.a.ip(f"route replace {_TEST_PREFIX} dev {path.device} src {path.at_a}")
    path.b.ip(f"route replace local {_TEST_PREFIX} dev lo")
    try:
        yield
    finally:
        path.a.ip(f"route del {_TEST_PREFIX} dev {path.device}")
        path.b.ip(f"route del local {_TEST_PREFIX} dev lo")


@contextlib.contextmanager
def peers(path: PathUnderTest, n: int) -> Iterator[list[str]]:
    """Add ``n`` addresses to host b. The tunnel of b also receives datagrams to these addresses."""
    underlay = path.b.interfaces[0]
    net = underlay.v4.network
    addresses = [str(net[_FIRST_PEER + i]) for i in range(n)]
    # Not by NAT: it would change the source ports, to tell the connections apart. Then udptun would
    # drop the datagrams.
    rule = f"ip daddr {net} udp dport {PORT} ip daddr set {underlay.v4.ip}"
    chain = f"chain c {{\n type filter hook prerouting priority raw;\n {rule}\n }}"
    with contextlib.ExitStack() as made:
        for address in addresses:
            path.b.ip(f"address add {address}/{net.prefixlen} dev {underlay.name}")
            made.callback(path.b.ip, f"address del {address}/{net.prefixlen} dev {underlay.name}")
        path.b.nft(f"table ip bench_peers {{\n {chain}\n}}\n")
        made.callback(path.b.nft, "delete table ip bench_peers\n")
        yield addresses


@dataclass(frozen=True)
class Spread:
    """One slot: one measurement of one contender (see ``bench.blocks``)."""

    n: int
    kind: str  # "routes" or "peers"
    seconds: float

    def __call__(self, path: PathUnderTest) -> SlotResult:
        if path.set_routes is None:
            raise Refused(f"the routes of {path.name} cannot be set")
        with contextlib.ExitStack() as made:
            made.enter_context(test_routes(path))
            hops = [str(path.b.v4)]
            if self.kind == "peers":
                hops = made.enter_context(peers(path, self.n))
            made.callback(path.set_routes, ())
            # ``udpload send --spread`` sends to the first address of each prefix.
            prefixes = consecutive(str(_TEST_PREFIX.network_address), self.n)
            path.set_routes(list(zip(prefixes, itertools.cycle(hops), strict=False)))
            return self._search(path)

    def _search(self, path: PathUnderTest) -> SlotResult:
        streams = Streams(path, self.seconds, _SIZE, {
            "spread": self.n, "address": _TEST_PREFIX.network_address, "listen": "0.0.0.0",
        })
        value = Search(streams.send).highest(THRESHOLDS["pps_at_half_percent"])
        if not value:
            raise Refused("more than 0.5 % loss at every rate")
        return SlotResult({"pps_at_half_percent": value}, (streams.received_bytes, 0))


def jobs(plan: Plan) -> Iterator[Job]:
    for variant in plan.variants or VARIANTS:
        for profile in plan.profiles:
            n, kind = variant.split()
            trial = plan.seconds * _TRIAL_SHARE
            yield Job(
                Series("scale", profile, variant), plan.contenders,
                Spread(int(n), kind, trial), blocks=plan.blocks, slot_seconds=_TRIALS * trial,
                mirrored=False,
            )


METRIC = Metric(
    "scale", "small packets with many routes or many peers", jobs, VARIANTS,
    "N routes (N: 1..1000000) or N peers (N: 1..100)", r"(?P<n>\d+) (?P<unit>routes|peers)",
    {"routes": (1, 1_000_000), "peers": (1, 100)}, programs=("udptun", "onepacket"),
)
