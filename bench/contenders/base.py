"""A contender, the road it lays, and the look-up of contenders by their words.

Owns: what every contender has in common. Refuses to know: how each of them is started.
"""

from __future__ import annotations

import ipaddress
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from udptun.lab import Forwarder, Host, Lab, Link, ping, wait_for

PROFILES = ("P1", "P2", "P3")
_FIND_EACH_OTHER_SECONDS = 30.0

Extra = tuple[str, str]  # a prefix and its next hop


@dataclass(eq=False)
class Road:
    """Two hosts, and one contender between them, running.

    at_a, at_b   the addresses to measure between
    carries      nft expression of what its bytes look like on the wire
    inner_mtu    the largest packet it takes
    device       the tunnel's, the same on both hosts; "" for none
    forwarders   udptun's, of hosts a and b; empty for the others
    restart      starts udptun's forwarder on host a again, without waiting for it
    set_routes   gives host a routes beside its own, instead of those given before
    """

    name: str
    a: Host
    b: Host
    link: Link
    at_a: ipaddress.IPv4Address
    at_b: ipaddress.IPv4Address
    carries: str
    inner_mtu: int
    device: str = ""
    forwarders: tuple[Forwarder, ...] = ()
    restart: Callable[[], Forwarder] | None = None
    set_routes: Callable[[Sequence[Extra]], None] | None = None
    settle_seconds: float = 0
    facts: dict[str, object] = field(default_factory=dict)

    def check(self) -> None:
        """Pings pass, at the latest when both ends have found each other; and ARP is over."""
        wait_for(
            lambda: ping(self.a, self.at_b, count=2, wait=0.5).received,
            f"a ping to come through {self.name}", _FIND_EACH_OTHER_SECONDS,
        )
        if self.settle_seconds:
            every = 0.05
            size = self.inner_mtu - 28
            ping(self.a, self.at_b, count=int(self.settle_seconds / every), interval=every,
                 size=size)

    def forget_ended(self) -> None:
        """Drop the processes that have ended: the lab need not end thousands of them again."""
        for host in (self.a, self.b):
            host.processes[:] = [p for p in host.processes if p.alive]


@dataclass(frozen=True)
class Contender:
    """``lay`` makes its road in a lab, of the two hosts given; may raise Unavailable."""

    name: str
    lay: Callable[[Lab, Host, Host, Link], Road]
    profiles: tuple[str, ...] = PROFILES

    def road(self, lab: Lab) -> Road:
        n = next(lab.numbers)
        a, b = lab.host(f"r{n}a"), lab.host(f"r{n}b")
        road = self.lay(lab, a, b, lab.link(a, b))
        road.check()
        return road


def find(words: str) -> Contender:
    """The contender that goes by these words; ValueError when there is none."""
    from . import builtin, external

    name, *options = shlex.split(words)
    if name.partition("@")[0] == "udptun":
        return builtin.udptun(words, name.partition("@")[2], options)
    if options:
        raise ValueError(f"{name} takes no options: {words!r}")
    if name in builtin.CONTENDERS:
        return builtin.CONTENDERS[name]
    if name in external.names():
        return external.load(name)
    known = ", ".join(["udptun", *builtin.CONTENDERS, *external.names()])
    raise ValueError(f"no contender goes by {name!r}; there are {known}")
