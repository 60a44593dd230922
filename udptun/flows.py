"""Addresses, protocol and ports of a packet, from its first bytes.

A leaf. The bytes are untrusted and may be no IP packet. Pure functions, any thread.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from typing import Any

PROTOCOLS = {
    1: "icmp", 2: "igmp", 4: "ipip", 6: "tcp", 17: "udp", 41: "ipv6", 47: "gre", 50: "esp",
    51: "ah", 58: "icmp6", 89: "ospf", 103: "pim", 132: "sctp",
}
WITH_PORTS = (6, 17, 132)
UNKNOWN = {"src": None, "dst": None, "protocol": None, "src_port": None, "dst_port": None}


def flow(head: bytes) -> dict[str, Any]:
    """Return source, destination, protocol and ports; None for what the bytes do not show."""
    if len(head) >= 20 and head[0] >> 4 == 4:
        start, fragment = 4 * (head[0] & 15), int.from_bytes(head[6:8]) & 0x1FFF
        return _flow(head, (12, 4), head[9], len(head) if fragment else start)
    if len(head) >= 40 and head[0] >> 4 == 6:
        return _flow(head, (8, 16), head[6], 40)
    return dict(UNKNOWN)


def flow_text(found: Mapping[str, Any]) -> str:
    """Return the result of ``flow`` as text: ``tcp 10.1.0.1:40000 > 10.2.0.1:80``."""
    if found["src"] is None:
        return "no IP packet"
    src, dst = (
        str(found[side]) if found[f"{side}_port"] is None else
        f"[{found[side]}]:{found[f'{side}_port']}" if ":" in found[side] else
        f"{found[side]}:{found[f'{side}_port']}" for side in ("src", "dst"))
    return f"{found['protocol']} {src} > {dst}"


def _flow(head: bytes, addresses: tuple[int, int], protocol: int, start: int) -> dict[str, Any]:
    at, length = addresses
    ports: list[int | None] = [None, None]
    if protocol in WITH_PORTS and start >= 20 and len(head) >= start + 4:
        ports = [int.from_bytes(head[start : start + 2]),
                 int.from_bytes(head[start + 2 : start + 4])]
    return {
        "src": str(ipaddress.ip_address(head[at : at + length])),
        "dst": str(ipaddress.ip_address(head[at + length : at + 2 * length])),
        "protocol": PROTOCOLS.get(protocol, str(protocol)),
        "src_port": ports[0], "dst_port": ports[1],
    }
