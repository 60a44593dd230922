"""Describe the last dropped packets: addresses, protocol and ports from their first bytes.

Owns the JSON of one dropped packet (docs/control.md). The bytes are untrusted and may be no IP
packet. Pure functions, any thread.
"""

from __future__ import annotations

import ipaddress
import time
from datetime import UTC, datetime
from typing import Any

from ..model import DroppedPacket, Endpoint

PROTOCOLS = {
    1: "icmp", 2: "igmp", 4: "ipip", 6: "tcp", 17: "udp", 41: "ipv6", 47: "gre", 50: "esp",
    51: "ah", 58: "icmp6", 89: "ospf", 103: "pim", 132: "sctp",
}
WITH_PORTS = (6, 17, 132)
UNKNOWN = {"src": None, "dst": None, "protocol": None, "src_port": None, "dst_port": None}


class Clock:
    """Converts monotonic times into wall clock times, always with the same difference: so the time
    of one packet does not change from call to call."""

    def __init__(self) -> None:
        self._offset = time.time_ns() - time.monotonic_ns()

    def iso(self, monotonic_ns: int) -> str:
        moment = datetime.fromtimestamp((monotonic_ns + self._offset) / 1e9, UTC)
        return moment.isoformat(timespec="milliseconds")


def to_json(packet: DroppedPacket, clock: Clock) -> dict[str, Any]:
    endpoint = None
    if packet.address:
        endpoint = str(Endpoint(ipaddress.ip_address(packet.address), max(packet.port, 1)))
    return {
        "id": f"{packet.worker}-{packet.number}", "time": clock.iso(packet.time_ns),
        "packets": packet.packets, "length": packet.length, "endpoint": endpoint,
        **flow(packet.head),
    }


def flow(head: bytes) -> dict[str, Any]:
    """Return source, destination, protocol and ports; None for what the bytes do not show."""
    if len(head) >= 20 and head[0] >> 4 == 4:
        start, fragment = 4 * (head[0] & 15), int.from_bytes(head[6:8]) & 0x1FFF
        return _flow(head, (12, 4), head[9], len(head) if fragment else start)
    if len(head) >= 40 and head[0] >> 4 == 6:
        return _flow(head, (8, 16), head[6], 40)
    return dict(UNKNOWN)


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
