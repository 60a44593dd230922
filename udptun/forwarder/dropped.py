"""Describe the last dropped packets.

Owns the JSON of one dropped packet (docs/control.md). The bytes are untrusted and may be no IP
packet. Pure functions, any thread.
"""

from __future__ import annotations

import ipaddress
import time
from datetime import UTC, datetime
from typing import Any

from ..flows import flow
from ..model import DroppedPacket, Endpoint


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
