"""The UDP sockets of this network namespace, as /proc/net shows them. Any thread."""

from __future__ import annotations

import ipaddress
import sys
from dataclasses import dataclass
from pathlib import Path

from ..model import IPAddress

NET = Path("/proc/thread-self/net")


@dataclass(frozen=True, slots=True)
class UdpSocket:
    """A UDP socket. ``inode`` is 0 for a socket of the kernel itself, for example of VXLAN."""

    address: IPAddress
    port: int
    inode: int
    drops: int


def udp_sockets() -> list[UdpSocket]:
    found = []
    for name in ("udp", "udp6"):
        try:
            lines = (NET / name).read_text().splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            fields = line.split()
            host, _, port = fields[1].partition(":")
            found.append(UdpSocket(_address(host), int(port, 16), int(fields[9]), int(fields[12])))
    return found


def _address(text: str) -> IPAddress:
    """Parse the kernel's notation: 32-bit words in the byte order of this machine. An IPv6 socket
    that is bound to an IPv4 address has an address like ::ffff:192.0.2.1."""
    data = b"".join(int(text[at:at + 8], 16).to_bytes(4, sys.byteorder)
                    for at in range(0, len(text), 8))
    found = ipaddress.ip_address(data)
    mapped = found.ipv4_mapped if found.version == 6 else None
    return found if mapped is None else mapped
