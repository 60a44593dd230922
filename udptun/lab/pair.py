"""Two nodes, each with a forwarder and a pod: the topology of most tests and benchmarks.

Owns: the addresses and routes of the two nodes. Does not depend on the traffic between the nodes.
Main thread only, like the whole lab.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field
from typing import Any

from .hosts import Host, Lab, Link
from .tunnels import NETWORK, NETWORK6, Forwarder, Node, node


@dataclass(eq=False)
class Side:
    """One node of a pair.

    outer    the node's underlay address
    options  the options of the node's forwarder, as in Forwarder.start
    """

    host: Host
    node: Node
    pod: Host
    outer: ipaddress.IPv4Address | ipaddress.IPv6Address
    options: dict[str, Any]
    forwarder: Forwarder = field(init=False)

    @property
    def v4(self) -> ipaddress.IPv4Address:
        return self.node.v4

    @property
    def v6(self) -> ipaddress.IPv6Address:
        return self.node.v6

    @property
    def pod_v4(self) -> ipaddress.IPv4Address:
        return self.node.subnet[2]

    @property
    def pod_v6(self) -> ipaddress.IPv6Address:
        return self.node.subnet6[2]

    def start(self, **changes: Any) -> Forwarder:
        """Start a forwarder on the node. ``changes`` override single options.

        Also used to start the forwarder again after it has ended.
        """
        self.forwarder = Forwarder.start(self.host, **self.options | changes)
        return self.forwarder

    def routes_to(self, other: Side) -> list[str]:
        return [f"{subnet} via {other.outer}" for subnet in (other.node.subnet, other.node.subnet6)]


@dataclass(frozen=True)
class Pair:
    """Two nodes that are joined by ``link``. Node 1 is ``a``, node 2 is ``b``."""

    lab: Lab
    link: Link
    a: Side
    b: Side

    @property
    def sides(self) -> tuple[Side, Side]:
        return self.a, self.b


def pair(
    lab: Lab, *, outer: int = 4, middle_mtu: int | None = None, pod_mtu: int | None = None,
    start: bool = True, **options: Any,
) -> Pair:
    """Create two nodes. The tunnel between them routes IPv4 and IPv6.

    outer       the address family of the underlay, 4 or 6
    middle_mtu  as in Lab.link
    pod_mtu     the MTU of the links to the pods; None: 1472 if ``outer`` is 4, else 1452
    start       True: start the forwarders. False: the caller starts them with ``side.start()``
    options     the options of both forwarders, as in Forwarder.start
    """
    hosts = lab.host("a"), lab.host("b")
    link = lab.link(*hosts, middle_mtu=middle_mtu)
    pod_mtu = pod_mtu or (1472 if outer == 4 else 1452)
    sides = []
    for n, host in enumerate(hosts, start=1):
        plan = node(n)
        pod = host.pod(str(plan.subnet), str(plan.subnet6), mtu=pod_mtu)
        address = host.v4 if outer == 4 else host.v6
        own = {
            "listen": [address], "addresses": [plan.v4, plan.v6], "networks": [NETWORK, NETWORK6],
        }
        sides.append(Side(host, plan, pod, address, own | options))
    a, b = sides
    for side, other in ((a, b), (b, a)):
        side.options.setdefault("routes", side.routes_to(other))
    made = Pair(lab, link, a, b)
    if start:
        for side in made.sides:
            side.start(wait=False)
        for side in made.sides:
            side.forwarder.wait_ready()
    return made
