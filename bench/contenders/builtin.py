"""The contenders that come with this repository or the kernel.

Owns: how each is set up between two linked hosts, with the largest MTU it may have.
"""

from __future__ import annotations

import ipaddress
import socket
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from udptun.lab import Forwarder, Host, Lab, LabError, Link, Node, OnePacket, node, vxlan
from udptun.lab.tunnels import NETWORK, NETWORK6, PORT

from ..tools import program
from .base import Contender, Extra, Road

_LINK_MTU = 1500
_IP_UDP = 28  # an IPv4 and a UDP header
_VNET = 10  # the virtio-net header that copylimit sends along


def _direct(lab: Lab, a: Host, b: Host, link: Link) -> Road:
    return Road("direct", a, b, link, a.v4, b.v4, "meta l4proto { tcp, udp }", _LINK_MTU)


def _vxlan(lab: Lab, a: Host, b: Host, link: Link) -> Road:
    mtu = _LINK_MTU - 50  # IPv4, UDP, VXLAN, Ethernet
    at_a, at_b = vxlan(a, b, mtu)
    return Road("vxlan", a, b, link, at_a, at_b, "udp dport 4789", mtu)


def udptun(words: str, checkout: str, options: list[str]) -> Contender:
    env = None
    if checkout:
        folder = Path(checkout).resolve()
        if not list((folder / "udptun").glob("_core.*.so")):
            raise ValueError(f"no built udptun in {folder}")
        env = {"PYTHONPATH": str(folder), "PYTHONSAFEPATH": "1"}

    def start(here: Host, plan: Node, there: Host, other: Node) -> Forwarder:
        return Forwarder.start(
            here, addresses=[plan.v4, plan.v6], networks=[NETWORK, NETWORK6],
            routes=[f"{subnet} via {there.v4}" for subnet in (other.subnet, other.subnet6)],
            extra=options, env=env, wait=False,
        )

    def lay(lab: Lab, a: Host, b: Host, link: Link) -> Road:
        plans = node(1), node(2)
        forwarders = start(a, plans[0], b, plans[1]), start(b, plans[1], a, plans[0])
        for forwarder in forwarders:
            forwarder.wait_ready()
        status = forwarders[0].status()
        road = Road(
            words, a, b, link, plans[0].v4, plans[1].v4, f"udp dport {PORT}",
            status["device"]["mtu"], "udptun0", forwarders,
            restart=lambda: start(a, plans[0], b, plans[1]),
        )
        own = forwarders[0].routes_file.read_text()

        def set_routes(routes: Sequence[Extra]) -> None:
            text = own + "".join(f"{prefix} via {via}\n" for prefix, via in routes)
            put_routes(road.forwarders[0], text.encode(), "text/plain")

        road.set_routes = set_routes
        road.facts = {
            "version": status["version"], "in_use": status["capabilities"]["in_use"],
            "off": status["capabilities"]["off"], "workers": len(status["workers"]),
        }
        return road

    return Contender(words, lay)


def put_routes(forwarder: Forwarder, body: bytes, kind: str) -> dict[str, Any]:
    """The whole table anew; its answer: generation, added, changed, removed."""
    status, answer = forwarder.request("PUT", "/v1/routes", body, {"Content-Type": kind})
    if status != 200:
        raise LabError(f"PUT /v1/routes: {status} {answer}")
    result: dict[str, Any] = answer
    return result


def _onepacket(lab: Lab, a: Host, b: Host, link: Link) -> Road:
    plans, mtu = (node(1), node(2)), _LINK_MTU - _IP_UDP
    programs = [
        OnePacket.start(
            here, program("onepacket"), address=plan.v4, mtu=mtu,
            routes=[f"{other.subnet}={there.v4}:{PORT}"],
        )
        for here, plan, there, other in ((a, plans[0], b, plans[1]), (b, plans[1], a, plans[0]))
    ]
    given: list[Extra] = []

    def set_routes(routes: Sequence[Extra]) -> None:
        _command(programs[0].control, _DELETE, given[::-1])
        _command(programs[0].control, _SET, routes)
        given[:] = routes

    return Road(
        "onepacket", a, b, link, plans[0].v4, plans[1].v4, f"udp dport {PORT}", mtu, "flannel0",
        set_routes=set_routes,
    )


_SET, _DELETE = 1, 2


def _command(control: Path, command: int, routes: Sequence[Extra]) -> None:
    """flannel's control messages: 20 bytes each, host order but for the addresses."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as s:
        s.settimeout(30)
        s.connect(str(control))
        for prefix, via in routes:
            network, hop = ipaddress.IPv4Network(prefix), ipaddress.IPv4Address(via)
            net = network.network_address.packed
            s.send(struct.pack("=i4si4sh2x", command, net, network.prefixlen, hop.packed, PORT))


def _copylimit(lab: Lab, a: Host, b: Host, link: Link) -> Road:
    plans, mtu = (node(1), node(2)), _LINK_MTU - _IP_UDP - _VNET
    for here, plan, there in ((a, plans[0], b), (b, plans[1], a)):
        process = here.start([
            *(str(program("copylimit")), "--tun", "copylimit0", "--listen", f"{here.v4}:{PORT}"),
            *("--peer", f"{there.v4}:{PORT}", "--slice", str(_LINK_MTU - _IP_UDP)),
        ])
        process.wait_for_output("ready")
        here.ip(
            f"link set copylimit0 mtu {mtu} txqueuelen 10000 up",
            f"address add {plan.v4}/32 dev copylimit0",
            f"route add {NETWORK} dev copylimit0 src {plan.v4}",
        )
    return Road(
        "copylimit", a, b, link, plans[0].v4, plans[1].v4, f"udp dport {PORT}", mtu, "copylimit0"
    )


CONTENDERS = {
    "direct": Contender("direct", _direct),
    "vxlan": Contender("vxlan", _vxlan),
    "onepacket": Contender("onepacket", _onepacket),
    # On P2 and P3 the slices are not joined again as they were cut: it cannot work there.
    "copylimit": Contender("copylimit", _copylimit, ("P1",)),
}
