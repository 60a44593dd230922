"""Read what the host has beneath the overlay: interfaces, their addresses, routes.

Owns the reading, in the kernel's terms. Refuses to choose: which interface carries the overlay is
``node/interface.py``'s matter. Threading rule: call from any asyncio loop; what touches pyroute2
runs in the thread of the ``Netlink`` that is given.
"""

from __future__ import annotations

import ipaddress
import socket
import struct
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from ..model import IPAddress
from .dump import attributes, dump
from .netlink import DUMP_TRIES, IFF_UP, Netlink

# linux/if_addr.h
IFA_F_TEMPORARY, IFA_F_DADFAILED, IFA_F_DEPRECATED, IFA_F_TENTATIVE = 0x01, 0x08, 0x20, 0x40
# linux/rtnetlink.h
RTM_GETROUTE = 26
RT_TABLE_MAIN, RTN_UNICAST = 254, 1
RTA_OIF, RTA_PRIORITY, RTA_MULTIPATH, RTA_TABLE = 4, 6, 9, 15
RTMSG = struct.Struct("=8BI")  # family, dst_len, src_len, tos, table, protocol, scope, type, flags
RTNEXTHOP = struct.Struct("=HBBi")  # length, flags, hops, interface number


@dataclass(frozen=True, slots=True)
class Interface:
    """One network interface.

    mtu        bytes; 0 where the device has none
    up         set up by the administrator, with a carrier or without
    addresses  its own, both families, best first: see ``_rank``
    """

    index: int
    name: str
    mtu: int
    up: bool
    addresses: tuple[IPAddress, ...]


@dataclass(frozen=True, slots=True)
class RouteTo:
    """Where the kernel would send a packet.

    index    the interface's number
    source   the address it would be sent from, None where the route names none
    gateway  the next hop, None where the destination is on the link (or is this host)
    """

    index: int
    source: IPAddress | None
    gateway: IPAddress | None


async def interfaces(netlink: Netlink) -> tuple[Interface, ...]:
    """All interfaces of this network namespace, by number. DeviceError."""
    return await netlink.work("reading the interfaces", _interfaces)


async def default_routes(netlink: Netlink, version: int) -> tuple[int, ...]:
    """The interface numbers of the main table's default routes, the preferred one first.

    version  4 or 6. A route over several next hops counts with its first. DeviceError
    """
    async def read(_: Any) -> tuple[int, ...]:
        return _default_routes(version)

    return await netlink.work(f"reading the IPv{version} routes", read)


async def route_to(netlink: Netlink, address: IPAddress) -> RouteTo:
    """The kernel's answer for one destination. DeviceError: ENETUNREACH where there is no way."""
    async def ask(ipr: Any) -> RouteTo:
        (message,) = await ipr.route("get", family=_family(address.version), dst=str(address))
        return RouteTo(message.get_attr("RTA_OIF"), _address(message.get_attr("RTA_PREFSRC")),
                       _address(message.get_attr("RTA_GATEWAY")))

    return await netlink.work(f"asking for the route to {address}", ask)


# -- in the netlink thread ------------------------------------------------------------------------


async def _all(ipr: Any, kind: str) -> list[Any]:
    """All messages of a dump; one that changes under way is taken again, as the kernel asks."""
    from pyroute2 import NetlinkDumpInterrupted

    for last in range(DUMP_TRIES - 1, -1, -1):
        try:
            return [message async for message in await getattr(ipr, kind)("dump")]
        except NetlinkDumpInterrupted:
            if not last:
                raise
    raise AssertionError


async def _interfaces(ipr: Any) -> tuple[Interface, ...]:
    addresses: dict[int, list[tuple[int, IPAddress]]] = {}
    for message in await _all(ipr, "addr"):
        # On a point-to-point link IFA_ADDRESS is the other end. IPv6 has no IFA_LOCAL there.
        address = _address(message.get_attr("IFA_LOCAL") or message.get_attr("IFA_ADDRESS"))
        flags = message.get_attr("IFA_FLAGS") or message["flags"]
        if address is not None and not flags & IFA_F_DADFAILED:
            addresses.setdefault(message["index"], []).append((_rank(address, flags), address))
    found = [
        Interface(
            message["index"], message.get_attr("IFLA_IFNAME"), message.get_attr("IFLA_MTU") or 0,
            bool(message["flags"] & IFF_UP),
            tuple(address for _, address in
                  sorted(addresses.get(message["index"], ()), key=lambda item: item[0])),
        )
        for message in await _all(ipr, "link")
    ]
    return tuple(sorted(found, key=lambda interface: interface.index))


def _rank(address: IPAddress, flags: int) -> int:
    """How good an address is to be found at, 0 best; the kernel's order decides between equals.

    From worst to best: known on one link only; on its way out; gone tomorrow (temporary); not
    checked yet for being somebody else's.
    """
    # In IPv4 that flag marks a second address of a subnet, which is as good as the first.
    temporary = flags & IFA_F_TEMPORARY and address.version == 6
    return (8 * bool(address.is_link_local) + 4 * bool(flags & IFA_F_DEPRECATED)
            + 2 * bool(temporary) + bool(flags & IFA_F_TENTATIVE))


def _default_routes(version: int) -> tuple[int, ...]:
    family = _family(version)
    asked = RTMSG.pack(family, 0, 0, 0, RT_TABLE_MAIN, 0, 0, RTN_UNICAST, 0)
    routes = []
    for message in dump(RTM_GETROUTE, asked):
        # Of the overlay's thousands no more than this is read.
        _, dst_len, _, _, _, _, _, kind, _ = RTMSG.unpack_from(message)
        if dst_len == 0 and kind == RTN_UNICAST:
            about = attributes(message[RTMSG.size:])
            if _number(about.get(RTA_TABLE)) == RT_TABLE_MAIN:
                routes.append((_number(about.get(RTA_PRIORITY)), _out_interface(about)))
    routes.sort(key=lambda route: route[0])  # the kernel prefers the lowest metric
    return tuple(index for _, index in routes)


def _out_interface(route: Mapping[int, memoryview]) -> int:
    """The interface of a route, or of the first of its next hops."""
    if RTA_OIF not in route and RTA_MULTIPATH in route:
        return cast(int, RTNEXTHOP.unpack_from(route[RTA_MULTIPATH])[3])
    return _number(route.get(RTA_OIF))


def _number(attribute: memoryview | None) -> int:
    """A u32 in host order; 0 where there is none."""
    return int.from_bytes(attribute or b"", sys.byteorder)


def _family(version: int) -> int:
    return socket.AF_INET6 if version == 6 else socket.AF_INET


def _address(text: str | None) -> IPAddress | None:
    return ipaddress.ip_address(text) if text else None
