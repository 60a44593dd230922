"""The contenders of this repository and of the kernel.

Owns: the set-up of each contender on two linked hosts, with the largest MTU that the wire allows.
Main thread only, like udptun.lab.
"""

from __future__ import annotations

import ipaddress
import socket
import struct
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import click

from udptun.cli import cli
from udptun.cli.forward import forward
from udptun.device.tun import VNET_LEN
from udptun.lab import Forwarder, Host, Lab, LabError, Link, Node, OnePacket, node, vxlan
from udptun.lab.tunnels import NETWORK, NETWORK6, PORT
from udptun.model import OVERHEAD
from udptun.takeover.kept import variable

from ..tools import program
from .base import NOTHING, Contender, ExtraRoute, PathUnderTest

_LINK_MTU = 1500
_IP_UDP = OVERHEAD[4]


def _direct(lab: Lab, a: Host, b: Host, link: Link) -> PathUnderTest:
    return PathUnderTest("direct", a, b, link, a.v4, b.v4, "meta l4proto { icmp, tcp, udp }",
                         _LINK_MTU)


def _vxlan(lab: Lab, a: Host, b: Host, link: Link) -> PathUnderTest:
    mtu = _LINK_MTU - 50  # IPv4, UDP, VXLAN, Ethernet
    at_a, at_b = vxlan(a, b, mtu)
    return PathUnderTest("vxlan", a, b, link, at_a, at_b, "udp dport 4789", mtu, "vxlan0")


def udptun(spec: str, checkout: str, options: list[str]) -> Contender:
    """Return udptun with these options of ``udptun forward``.

    checkout  the path of the udptun checkout to measure; "" for the checkout with this file
    ValueError if an option or its value is wrong. The options of another checkout are not checked
    here, because they may differ.
    """
    env = None
    if not checkout:
        _check_options(spec, options)
    if checkout:
        folder = Path(checkout).resolve()
        if not list((folder / "udptun").glob("_core.*.so")):
            raise ValueError(
                f"contender {spec!r}: no built udptun in {folder}; run make build there first"
            )
        env = {"PYTHONPATH": str(folder), "PYTHONSAFEPATH": "1"}

    express = " express" if "auto" in _values(options, "--accelerate") else ""

    def start(
        host: Host, plan: Node, peer: Host, other: Node, kept: Mapping[str, int] = NOTHING,
    ) -> Forwarder:
        """``kept``: the descriptors that an ended forwarder has left."""
        return Forwarder.start(
            host, addresses=[plan.v4, plan.v6], networks=[NETWORK, NETWORK6],
            routes=[f"{subnet} via {peer.v4}{express}" for subnet in (other.subnet, other.subnet6)],
            extra=options, pass_fds=tuple(kept.values()), wait=False,
            env={**(env or {}), **(variable(dict(kept)) if kept else {})},
        )

    def build(lab: Lab, a: Host, b: Host, link: Link) -> PathUnderTest:
        plans = node(1), node(2)
        forwarders = start(a, plans[0], b, plans[1]), start(b, plans[1], a, plans[0])
        for forwarder in forwarders:
            forwarder.wait_ready()
        status = forwarders[0].status()
        path = PathUnderTest(
            spec, a, b, link, plans[0].v4, plans[1].v4, f"udp dport {PORT}",
            status["device"]["mtu"], "udptun0", forwarders,
            restart=lambda kept: start(a, plans[0], b, plans[1], kept),
            redirected=bool(express),
        )
        path.wait_forwarding()
        own = forwarders[0].routes_file.read_text()

        def set_routes(routes: Sequence[ExtraRoute]) -> None:
            text = own + "".join(f"{prefix} via {via}{express}\n" for prefix, via in routes)
            replace_routes(path.forwarders[0], text.encode(), "text/plain")

        def in_kernel() -> tuple[int, int]:
            status = path.forwarders[0].status()
            return status["accelerate"]["packets"]["sent"], status["packets"]["encap"]["delivered"]

        path.set_routes = set_routes
        if express:
            path.in_kernel = in_kernel
        path.facts = {
            "version": status["version"], "in_use": status["capabilities"]["in_use"],
            "off": status["capabilities"]["off"], "workers": len(status["workers"]),
        }
        return path

    return Contender(spec, build)


def _values(options: list[str], name: str) -> list[str]:
    """Return the values of an option, in both ways to write it."""
    after = [value for key, value in pairwise(options) if key == name]
    return after + [one.partition("=")[2] for one in options if one.startswith(f"{name}=")]


def _check_options(spec: str, options: list[str]) -> None:
    # With its parent, as in the program: click keeps the names of the help option of the first use.
    parent = click.Context(cli, info_name="udptun", **cli.context_settings)
    try:
        forward.make_context("forward", ["--listen=192.0.2.1", *options], parent=parent)
    except click.ClickException as exc:
        raise ValueError(f"contender {spec!r}: {exc.format_message()}") from None


def replace_routes(forwarder: Forwarder, body: bytes, kind: str) -> dict[str, Any]:
    """Replace the whole route table; return the reply: generation, added, changed, removed."""
    status, reply = forwarder.request("PUT", "/v1/routes", body, {"Content-Type": kind})
    if status != 200:
        raise LabError(f"PUT /v1/routes: {status} {reply}")
    result: dict[str, Any] = reply
    return result


def _onepacket(lab: Lab, a: Host, b: Host, link: Link) -> PathUnderTest:
    plans, mtu = (node(1), node(2)), _LINK_MTU - _IP_UDP
    programs = [
        OnePacket.start(
            host, program("onepacket"), address=plan.v4, mtu=mtu,
            routes=[f"{other.subnet}={peer.v4}:{PORT}"],
        )
        for host, plan, peer, other in ((a, plans[0], b, plans[1]), (b, plans[1], a, plans[0]))
    ]
    installed: list[ExtraRoute] = []

    def set_routes(routes: Sequence[ExtraRoute]) -> None:
        _send_commands(programs[0].control, _DELETE, installed[::-1])
        _send_commands(programs[0].control, _SET, routes)
        installed[:] = routes

    return PathUnderTest(
        "onepacket", a, b, link, plans[0].v4, plans[1].v4, f"udp dport {PORT}", mtu, "flannel0",
        set_routes=set_routes,
    )


_SET, _DELETE = 1, 2


def _send_commands(control: Path, command: int, routes: Sequence[ExtraRoute]) -> None:
    """Send one control message per route, in flannel's format.

    A message has 20 bytes. The addresses are in network byte order, the other fields in host
    byte order.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as s:
        s.settimeout(30)
        s.connect(str(control))
        for prefix, via in routes:
            network, hop = ipaddress.IPv4Network(prefix), ipaddress.IPv4Address(via)
            net = network.network_address.packed
            s.send(struct.pack("=i4si4sh2x", command, net, network.prefixlen, hop.packed, PORT))


def _copylimit(lab: Lab, a: Host, b: Host, link: Link) -> PathUnderTest:
    # copylimit also sends the vnet header on the wire.
    plans, mtu = (node(1), node(2)), _LINK_MTU - _IP_UDP - VNET_LEN
    for host, plan, peer in ((a, plans[0], b), (b, plans[1], a)):
        process = host.start([
            *(str(program("copylimit")), "--tun", "copylimit0", "--listen", f"{host.v4}:{PORT}"),
            *("--peer", f"{peer.v4}:{PORT}", "--slice", str(_LINK_MTU - _IP_UDP)),
        ])
        process.wait_for_output("ready")
        host.ip(
            f"link set copylimit0 mtu {mtu} txqueuelen 10000 up",
            f"address add {plan.v4}/32 dev copylimit0",
            f"route add {NETWORK} dev copylimit0 src {plan.v4}",
        )
    return PathUnderTest(
        "copylimit", a, b, link, plans[0].v4, plans[1].v4, f"udp dport {PORT}", mtu, "copylimit0"
    )


CONTENDERS = {
    "direct": Contender("direct", _direct),
    "vxlan": Contender("vxlan", _vxlan),
    "onepacket": Contender("onepacket", _onepacket),
    # P1 only: on other profiles the receiver gets single slices and cannot rebuild super-packets.
    "copylimit": Contender("copylimit", _copylimit, ("P1",)),
}
