"""Read the host's interfaces, addresses and routes.

Returns what the kernel reports; ``node/host`` chooses the interface for the overlay.
Threading: call from any asyncio loop; the work runs in the thread of the given ``Netlink``.

Tables are parsed from bytes. pyroute2 makes an object of each message, which takes almost a second
for the routes of 5,000 peers. The list of interfaces can be long too: a node has one per pod.
"""

from __future__ import annotations

import ipaddress
import os
import socket
import struct
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from ..model import IPAddress, IPNetwork
from .batch import RouteSocket, attributes
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
from .netlink import IFF_UP, Netlink

RTM_GETROUTE = 26  # linux/rtnetlink.h
RT_TABLE_MAIN, RTN_UNICAST = 254, 1
RTA_OIF, RTA_MULTIPATH, RTA_TABLE = 4, 9, 15
RTMSG = struct.Struct("=8BI")  # family, dst_len, src_len, tos, table, protocol, scope, type, flags
RTNEXTHOP = struct.Struct("=HBBi")  # length, flags, hops, interface index
# linux/if_addr.h
IFA_FLAGS, IFA_PROTO = 8, 11
IFA_F_TEMPORARY, IFA_F_NODAD, IFA_F_DADFAILED = 0x01, 0x02, 0x08
IFA_F_DEPRECATED, IFA_F_TENTATIVE = 0x20, 0x40
IFF_LOOPBACK = 0x8  # linux/if.h
RTPROT_KEEPALIVED = 18  # linux/rtnetlink.h


@dataclass(frozen=True, slots=True)
class Interface:
    """One network interface.

    mtu        bytes; 0 if the device has none
    loopback   a loopback device; its MTU does not limit paths to other hosts
    up         IFF_UP is set by the administrator; the carrier does not matter
    addresses  local addresses of both families, best first (see ``_rank``)
    """

    index: int
    name: str
    mtu: int
    up: bool
    loopback: bool
    addresses: tuple[IPAddress, ...]


@dataclass(frozen=True, slots=True)
class RouteTo:
    """The kernel's route for a packet.

    index    index of the outgoing interface
    source   preferred source address; None if the route does not have one
    gateway  next hop; None if the destination is on the link (or is this host)
    """

    index: int
    source: IPAddress | None
    gateway: IPAddress | None


async def interfaces(netlink: Netlink) -> tuple[Interface, ...]:
    """Return all interfaces of this network namespace, by index. Raises DeviceError."""
    async def read(_: Any) -> tuple[Interface, ...]:
        return _interfaces()

    return await netlink.work("reading the interfaces", read)


async def links_of(netlink: Netlink, index: int) -> tuple[IPNetwork, ...]:
    """Return the prefix of each address of an interface. Raises DeviceError."""
    async def read(_: Any) -> tuple[IPNetwork, ...]:
        found = []
        with RouteSocket() as kernel:
            for message in kernel.dump(
                RTM_GETADDR, IFADDRMSG.pack(socket.AF_UNSPEC, 0, 0, 0, 0)
            ):
                _, length, _, _, owner = IFADDRMSG.unpack_from(message)
                about = attributes(message, IFADDRMSG.size)
                address = _address(about.get(IFA_LOCAL, about.get(IFA_ADDRESS)))
                if owner == index and address is not None:
                    found.append(ipaddress.ip_network((address, length), strict=False))
        return tuple(found)

    return await netlink.work("reading the addresses of an interface", read)


async def default_routes(netlink: Netlink, version: int) -> tuple[int, ...]:
    """Return the interface index of each default route in the main table, preferred route first.

    A multipath route yields the interface of its first next hop. Raises DeviceError.

    version  4 or 6
    """
    async def read(_: Any) -> tuple[int, ...]:
        return _default_routes(version)

    return await netlink.work(f"reading the IPv{version} routes", read)


async def route_to(netlink: Netlink, address: IPAddress) -> RouteTo:
    """Return the kernel's route to one destination. Raises DeviceError (no route: ENETUNREACH)."""
    async def ask(ipr: Any) -> RouteTo:
        (message,) = await ipr.route("get", family=_family(address.version), dst=str(address))
        source, gateway = (message.get_attr(name) for name in ("RTA_PREFSRC", "RTA_GATEWAY"))
        return RouteTo(
            message.get_attr("RTA_OIF"), ipaddress.ip_address(source) if source else None,
            ipaddress.ip_address(gateway) if gateway else None,
        )

    return await netlink.work(f"looking up the route to {address}", ask)


# -- in the netlink thread, which is in the caller's network namespace ----------------------------


def _interfaces() -> tuple[Interface, ...]:
    with RouteSocket() as kernel:
        addresses = kernel.dump(RTM_GETADDR, IFADDRMSG.pack(socket.AF_UNSPEC, 0, 0, 0, 0))
        links = kernel.dump(RTM_GETLINK, IFINFOMSG.pack(socket.AF_UNSPEC, 0, 0, 0, 0))
    ranked: dict[int, list[tuple[int, IPAddress]]] = {}
    for message in addresses:
        _, prefix_len, flags, _, index = IFADDRMSG.unpack_from(message)
        about = attributes(message, IFADDRMSG.size)
        # On a point-to-point link IFA_ADDRESS is the other end.
        address = _address(about.get(IFA_LOCAL, about.get(IFA_ADDRESS)))
        flags = _number(about.get(IFA_FLAGS)) or flags  # the header has only the low eight bits
        if address is not None and not flags & IFA_F_DADFAILED:
            is_vip = _number(about.get(IFA_PROTO)) == RTPROT_KEEPALIVED
            if prefix_len == address.max_prefixlen:
                is_vip |= address.version == 4 or bool(flags & IFA_F_NODAD)
            ranked.setdefault(index, []).append((_rank(address, flags, is_vip), address))
    found = []
    for message in links:
        _, _, index, flags, _ = IFINFOMSG.unpack_from(message)
        about = attributes(message, IFINFOMSG.size)
        best_first = sorted(ranked.get(index, ()), key=lambda item: item[0])
        found.append(Interface(
            index, os.fsdecode(bytes(about[IFLA_IFNAME]).rstrip(b"\0")),
            _number(about.get(IFLA_MTU)), bool(flags & IFF_UP), bool(flags & IFF_LOOPBACK),
            tuple(address for _, address in best_first),
        ))
    return tuple(sorted(found, key=lambda interface: interface.index))


def _rank(address: IPAddress, flags: int, is_vip: bool) -> int:
    """Rank an address as an endpoint for peers. 0 is best; a higher rank is worse.

    Best is an address with none of the following properties. From better to worse, they are:
    tentative (duplicate address detection is not complete); temporary (RFC 8981) or secondary;
    virtual (it moves between hosts); deprecated; link-local.

    is_vip  keepalived has added the address (the kernel reports this); or it is an IPv4 /32; or it
            is an IPv6 /128 without duplicate address detection, as older kernels report an address
            of keepalived. (A /128 alone is not enough: DHCPv6 addresses are /128 too.)
    """
    # One flag has two meanings: temporary in IPv6, secondary in IPv4.
    return (16 * bool(address.is_link_local) + 8 * bool(flags & IFA_F_DEPRECATED) + 4 * is_vip
            + 2 * bool(flags & IFA_F_TEMPORARY) + bool(flags & IFA_F_TENTATIVE))


def _default_routes(version: int) -> tuple[int, ...]:
    """Return the interface index of each default route, the route with the lowest metric first."""
    request = RTMSG.pack(_family(version), 0, 0, 0, RT_TABLE_MAIN, 0, 0, RTN_UNICAST, 0)
    with RouteSocket() as kernel:
        messages = kernel.dump(RTM_GETROUTE, request)
    found = []
    for message in messages:
        # Parse only the header first: the overlay can have thousands of routes.
        _, dst_len, _, _, _, _, _, kind, _ = RTMSG.unpack_from(message)
        if dst_len == 0 and kind == RTN_UNICAST:  # before Linux 4.20 a dump has all routes
            route = attributes(message, RTMSG.size)
            if _number(route.get(RTA_TABLE)) == RT_TABLE_MAIN:
                found.append(_out_interface(route))
    return tuple(found)


def _out_interface(route: Mapping[int, memoryview]) -> int:
    """Return the interface index of a route, or of its first next hop."""
    if RTA_OIF not in route and RTA_MULTIPATH in route:
        return cast(int, RTNEXTHOP.unpack_from(route[RTA_MULTIPATH])[3])
    return _number(route.get(RTA_OIF))


def _number(attribute: memoryview | None) -> int:
    """Read a u32 in host byte order. Return 0 if the attribute is absent."""
    return int.from_bytes(attribute or b"", sys.byteorder)


def _address(packed: memoryview | None) -> IPAddress | None:
    return None if packed is None else ipaddress.ip_address(bytes(packed))


def _family(version: int) -> int:
    return socket.AF_INET6 if version == 6 else socket.AF_INET
