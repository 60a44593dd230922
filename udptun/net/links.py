"""Read the links of this host, and their addresses, as records.

For a person who looks for a fault: one record has what `ip -d link` and `ip address` show. Reads
the kernel's own answer. Uses only the standard library, because a client command has to start
fast. Any thread; the answer is for the network namespace of the thread.
"""

from __future__ import annotations

import ipaddress
import socket
from dataclasses import dataclass

from ..device.fault import device_error
from ..model import IPAddress
from .batch import RouteSocket, attributes, number, text
from .local import (
    IFA_ADDRESS,
    IFA_LOCAL,
    IFADDRMSG,
    IFINFOMSG,
    IFLA_IFNAME,
    IFLA_MTU,
    RTM_GETADDR,
    RTM_GETLINK,
)

# linux/if_link.h
IFLA_ADDRESS, IFLA_LINKINFO, IFLA_CARRIER = 1, 18, 33
IFLA_INFO_KIND, IFLA_INFO_DATA = 1, 2
IFLA_VXLAN_ID = 1
IFF_UP = 0x1  # linux/if.h
# linux/if_addr.h
IFA_FLAGS = 8
IFA_F_DADFAILED, IFA_F_TENTATIVE = 0x08, 0x40


@dataclass(frozen=True, slots=True)
class Address:
    """An address of a link.

    duplicate  the kernel found that another host has it (IPv6)
    tentative  the kernel has not checked yet whether another host has it (IPv6)
    """

    address: IPAddress
    duplicate: bool
    tentative: bool


@dataclass(frozen=True, slots=True)
class Link:
    """One network interface.

    kind     the type of a virtual device, for example tun or vxlan; "" for a network card
    up       the administrator has set it up
    carrier  it has a link to the next device
    vni      of a VXLAN device; else 0
    mac      "" if it has none
    """

    index: int
    name: str
    kind: str
    mtu: int
    up: bool
    carrier: bool
    vni: int
    mac: str
    addresses: tuple[Address, ...]


def links() -> dict[str, Link]:
    """Return the links by name. Raises DeviceError."""
    try:
        with RouteSocket() as kernel:
            found = kernel.dump(RTM_GETLINK, IFINFOMSG.pack(socket.AF_UNSPEC, 0, 0, 0, 0))
            addresses = _addresses(kernel)
    except OSError as error:
        raise device_error(error.errno or 0, "reading the links") from None
    records = (_link(message, addresses) for message in found)
    return {link.name: link for link in records}


def _link(message: memoryview, addresses: dict[int, list[Address]]) -> Link:
    _, _, index, flags, _ = IFINFOMSG.unpack_from(message)
    about = attributes(message, IFINFOMSG.size)
    info = attributes(about.get(IFLA_LINKINFO, memoryview(b"")), 0)
    kind = text(info.get(IFLA_INFO_KIND))
    data = attributes(info.get(IFLA_INFO_DATA, memoryview(b"")), 0) if kind == "vxlan" else {}
    return Link(
        index, text(about.get(IFLA_IFNAME)), kind, number(about.get(IFLA_MTU)),
        bool(flags & IFF_UP), bool(number(about.get(IFLA_CARRIER))),
        number(data.get(IFLA_VXLAN_ID)),
        bytes(about.get(IFLA_ADDRESS, b"")).hex(":"), tuple(addresses.get(index, ())))


def _addresses(kernel: RouteSocket) -> dict[int, list[Address]]:
    found: dict[int, list[Address]] = {}
    for message in kernel.dump(RTM_GETADDR, IFADDRMSG.pack(socket.AF_UNSPEC, 0, 0, 0, 0)):
        _, _, flags, _, index = IFADDRMSG.unpack_from(message)
        about = attributes(message, IFADDRMSG.size)
        # On a point-to-point link IFA_ADDRESS is the other end.
        packed = about.get(IFA_LOCAL, about.get(IFA_ADDRESS))
        if packed is None:
            continue
        flags = number(about.get(IFA_FLAGS)) or flags
        found.setdefault(index, []).append(Address(
            ipaddress.ip_address(bytes(packed)), bool(flags & IFA_F_DADFAILED),
            bool(flags & IFA_F_TENTATIVE)))
    return found
