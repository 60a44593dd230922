"""Read the addresses of this host, and the interface that has one of them.

Does not need pyroute2, so a forwarder can use it before pyroute2 is imported. Threading: any
thread, in the network namespace of that thread. A call takes well under a millisecond.
"""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
import struct
import sys
from collections.abc import Iterator

from ..device.fault import device_error
from ..model import IPAddress
from .batch import Refusal, RouteSocket, attributes

RTM_GETLINK, RTM_GETADDR = 18, 22  # linux/rtnetlink.h
IFINFOMSG = struct.Struct("=BxHiII")  # family, kind of device, index, flags, change
IFLA_IFNAME, IFLA_MTU = 3, 4  # linux/if_link.h
IFADDRMSG = struct.Struct("=BBBBI")  # family, prefix length, flags, scope, interface index
IFA_ADDRESS, IFA_LOCAL = 1, 2  # linux/if_addr.h
IFF_LOOPBACK = 0x8  # linux/if.h
# The route to an address of the internet shows the gateway. No packet is sent.
INTERNET: dict[int, IPAddress] = {4: ipaddress.ip_address("1.1.1.1"),
                                  6: ipaddress.ip_address("2606:4700:4700::1111")}


def local_addresses() -> frozenset[IPAddress]:
    """Return all addresses of all interfaces. Raises DeviceError."""
    try:
        with RouteSocket() as kernel:
            return frozenset(address for address, _ in _addresses(kernel))
    except OSError as error:
        raise device_error(error.errno or errno.EIO, "reading all addresses") from None


def underlay_mtu(address: IPAddress) -> tuple[str, int]:
    """Return the interface that has this local address, and its MTU in bytes. Raises DeviceError.

    The loopback device can have an address that routers announce. Packets from it then leave
    through another interface: that of the default route.
    """
    doing = f"looking for the interface with the address {address}"
    try:
        with RouteSocket() as kernel:
            for local, index in _addresses(kernel):
                if local == address:
                    name, mtu, is_loopback = _link(kernel, index)
                    way = _default_way(kernel, address) if is_loopback else 0
                    return _link(kernel, way)[:2] if way else (name, mtu)
    except OSError as error:
        raise device_error(error.errno or errno.EIO, doing) from None
    hint = "a wildcard address has no single MTU" if address.is_unspecified else \
        "no interface has this address"
    raise device_error(errno.EADDRNOTAVAIL, doing, hint)


def _addresses(kernel: RouteSocket) -> Iterator[tuple[IPAddress, int]]:
    """Yield each address, with the index of its interface."""
    for message in kernel.dump(RTM_GETADDR, IFADDRMSG.pack(socket.AF_UNSPEC, 0, 0, 0, 0)):
        *_, index = IFADDRMSG.unpack_from(message)
        about = attributes(message, IFADDRMSG.size)
        # On a point-to-point link IFA_ADDRESS is the other end.
        packed = about.get(IFA_LOCAL, about.get(IFA_ADDRESS))
        if packed is not None:
            yield ipaddress.ip_address(bytes(packed)), index


def _default_way(kernel: RouteSocket, source: IPAddress) -> int:
    """Return the index of the interface of the default route; 0: there is none, or the address is
    only for this host."""
    from .lookup import Question, ask_ways  # not at the top: lookup imports this module

    if source.is_loopback:
        return 0
    [way] = ask_ways(kernel, [Question(INTERNET[source.version], source)])
    return way.device


def _link(kernel: RouteSocket, index: int) -> tuple[str, int, bool]:
    """Return the name, the MTU, and whether it is a loopback device."""
    [answer] = kernel.ask(RTM_GETLINK, [IFINFOMSG.pack(socket.AF_UNSPEC, 0, index, 0, 0)])
    if isinstance(answer, Refusal):
        raise OSError(answer.number, str(answer))
    about = attributes(answer, IFINFOMSG.size)
    flags = IFINFOMSG.unpack_from(answer)[3]
    return (os.fsdecode(bytes(about[IFLA_IFNAME]).rstrip(b"\0")),
            int.from_bytes(about[IFLA_MTU], sys.byteorder), bool(flags & IFF_LOOPBACK))
