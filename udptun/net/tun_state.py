"""Read the kernel's configuration of one device: flags, addresses and routes.

Owns the reading only; ``netlink.configure_tun`` sets the configuration. Threading: call from any
asyncio loop; the work runs in the thread of the given ``Netlink``.

Since Linux 4.20 the kernel filters the dumps by interface, so the cost does not grow with the
host's other routes. Older kernels send all entries, and this module filters them.
"""

from __future__ import annotations

import errno
import ipaddress
import socket
import struct
import sys
from dataclasses import dataclass
from typing import Any

from ..model import IPAddress, IPNetwork
from .batch import ATTRIBUTE, RouteSocket, attributes
from .netlink import IFF_UP, Netlink
from .underlay import (
    IFA_ADDRESS,
    IFA_LOCAL,
    IFADDRMSG,
    IFINFOMSG,
    RT_TABLE_MAIN,
    RTA_OIF,
    RTA_TABLE,
    RTM_GETADDR,
    RTM_GETLINK,
    RTM_GETROUTE,
    RTMSG,
)

RTA_DST = 1  # linux/rtnetlink.h
FAMILIES = {socket.AF_INET: 32, socket.AF_INET6: 128}  # family: bits of an address


@dataclass(frozen=True, slots=True)
class TunState:
    """The state of one device.

    up         the device is up (IFF_UP)
    addresses  addresses of the device, both families
    networks   destinations of the main table's routes through the device
    """

    up: bool
    addresses: frozenset[IPAddress]
    networks: frozenset[IPNetwork]


async def tun_state(netlink: Netlink, index: int) -> TunState | None:
    """Return the state of the device with this interface index, or None if it does not exist.
    Raises DeviceError."""
    async def read(_: Any) -> TunState | None:
        with RouteSocket() as kernel:
            up = _is_up(kernel, index)
            if up is None:
                return None
            return TunState(
                up, frozenset(_addresses(kernel, index)), frozenset(_networks(kernel, index))
            )

    return await netlink.work("reading the TUN device's state", read)


def _is_up(kernel: RouteSocket, index: int) -> bool | None:
    for message in kernel.dump(RTM_GETLINK, IFINFOMSG.pack(socket.AF_UNSPEC, 0, 0, 0, 0)):
        _, _, found, flags, _ = IFINFOMSG.unpack_from(message)
        if found == index:
            return bool(flags & IFF_UP)
    return None


def _addresses(kernel: RouteSocket, index: int) -> list[IPAddress]:
    found: list[IPAddress] = []
    for message in kernel.dump(RTM_GETADDR, IFADDRMSG.pack(socket.AF_UNSPEC, 0, 0, 0, 0)):
        if IFADDRMSG.unpack_from(message)[4] == index:
            values = attributes(message, IFADDRMSG.size)
            # On a point-to-point link IFA_ADDRESS is the other end.
            packed = values.get(IFA_LOCAL, values.get(IFA_ADDRESS))
            if packed is not None:
                found.append(ipaddress.ip_address(bytes(packed)))
    return found


def _networks(kernel: RouteSocket, index: int) -> list[IPNetwork]:
    found: list[IPNetwork] = []
    for family, bits in FAMILIES.items():
        request = RTMSG.pack(family, 0, 0, 0, RT_TABLE_MAIN, 0, 0, 0, 0)
        request += ATTRIBUTE.pack(ATTRIBUTE.size + 4, RTA_OIF) + struct.pack("=I", index)
        try:
            messages = kernel.dump(RTM_GETROUTE, request)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.EOPNOTSUPP, errno.ENODEV):
                raise
            continue  # no main table yet, or no IPv6 on this host, or no such device
        for message in messages:
            prefix_len = RTMSG.unpack_from(message)[1]
            values = attributes(message, RTMSG.size)
            if _u32(values.get(RTA_OIF)) == index and _u32(values.get(RTA_TABLE)) == RT_TABLE_MAIN:
                packed = bytes(values.get(RTA_DST, bytes(bits // 8)))
                found.append(ipaddress.ip_network((packed, prefix_len)))
    return found


def _u32(attribute: memoryview | None) -> int:
    return int.from_bytes(attribute or b"", sys.byteorder)
