"""The contract of a contender, and the path that a contender sets up.

Owns: the parts that all contenders have in common. Independent of how a contender is started.
Main thread only, like udptun.lab.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from udptun.lab import Forwarder, Host, Lab, Link, ping, wait_for

from .. import profiles

_READY_SECONDS = 30.0
_WARM_UP_INTERVAL_SECONDS = 0.05
_PING_OVERHEAD = 28  # IPv4 and ICMP header

ExtraRoute = tuple[str, str]  # (prefix, next hop)
NOTHING: Mapping[str, int] = {}


@dataclass(eq=False)
class PathUnderTest:
    """Two linked hosts, a and b, and one running contender between them.

    at_a, at_b      the addresses of the measured traffic on host a and on host b
    carries         an nft expression that matches the contender's packets on the wire
    inner_mtu       the largest inner packet, in bytes
    device          the name of the tunnel device on both hosts; "" if there is no device
    forwarders      udptun's forwarders of hosts a and b; empty for other contenders
    restart         starts udptun's forwarder on host a again, and does not wait until it is ready;
                    the argument has descriptors that the ended forwarder has left, or is NOTHING
    in_kernel       returns the numbers of packets that host a has sent: those of the express path,
                    and all; None if the contender has no express path
    set_routes      replaces the extra routes of host a
    warm_up_seconds the contender needs traffic for this time before it reaches its full rate
    redirected      tc redirects the contender's packets, so that they skip netfilter's egress hook
    facts           details for the report
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
    restart: Callable[[Mapping[str, int]], Forwarder] | None = None
    set_routes: Callable[[Sequence[ExtraRoute]], None] | None = None
    warm_up_seconds: float = 0
    redirected: bool = False
    in_kernel: Callable[[], tuple[int, int]] | None = None
    facts: dict[str, object] = field(default_factory=dict)

    def wait_ready(self) -> None:
        """Wait until pings pass, then let the contender warm up. The pings also complete ARP."""
        wait_for(
            lambda: ping(self.a, self.at_b, count=2, wait=0.5).received,
            f"a ping through {self.name}", _READY_SECONDS,
        )
        if self.warm_up_seconds:
            ping(
                self.a, self.at_b, count=int(self.warm_up_seconds / _WARM_UP_INTERVAL_SECONDS),
                interval=_WARM_UP_INTERVAL_SECONDS, size=self.inner_mtu - _PING_OVERHEAD,
            )

    def wait_forwarding(self) -> None:
        """Wait until udptun's forwarders answer, and forward as at the beginning."""
        for forwarder in self.forwarders:
            forwarder.wait_ready()
        if self.redirected:
            wait_for(lambda: all(map(_has_express, self.forwarders)), "the express path")

    def discard_ended_processes(self) -> None:
        """Remove ended processes from the hosts' lists, so that the lab does not end them again.

        A run starts thousands of processes.
        """
        for host in (self.a, self.b):
            host.processes[:] = [p for p in host.processes if p.alive]


def _has_express(forwarder: Forwarder) -> bool:
    report = forwarder.status()["accelerate"]
    return bool(report["active"] and report["receives"])


@dataclass(frozen=True)
class Contender:
    """A tunnel that can be measured.

    name      the specification of the contender, as given on the command line
    build     starts the contender between two linked hosts; raises Unavailable if this machine
              does not have the contender
    profiles  the profiles on which the contender works
    """

    name: str
    build: Callable[[Lab, Host, Host, Link], PathUnderTest]
    profiles: tuple[str, ...] = profiles.NAMES

    def set_up(self, lab: Lab) -> PathUnderTest:
        """Create two linked hosts, start the contender on them, and wait until it is ready."""
        n = next(lab.numbers)
        a, b = lab.host(f"r{n}a"), lab.host(f"r{n}b")
        path = self.build(lab, a, b, lab.link(a, b))
        path.wait_ready()
        return path
