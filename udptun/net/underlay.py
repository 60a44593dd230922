"""Read what the host has beneath the overlay: interfaces, their addresses, routes.

Owns the reading, in the kernel's terms. Refuses to choose: which interface carries the overlay is
``node/interface.py``'s matter. Threading rule: call from any asyncio loop; what touches pyroute2
runs in the thread of the ``Netlink`` that is given.
"""

from __future__ import annotations

import ipaddress
import socket
from dataclasses import dataclass
from typing import Any, cast

from ..model import IPAddress
from .netlink import DUMP_TRIES, IFF_UP, Netlink

# linux/if_addr.h
IFA_F_TEMPORARY, IFA_F_DADFAILED, IFA_F_DEPRECATED, IFA_F_TENTATIVE = 0x01, 0x08, 0x20, 0x40
RT_TABLE_MAIN = 254  # linux/rtnetlink.h
RTN_UNICAST = 1


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
    async def read(ipr: Any) -> tuple[int, ...]:
        return await _default_routes(ipr, version)

    return await netlink.work(f"reading the IPv{version} routes", read)


async def route_to(netlink: Netlink, address: IPAddress) -> RouteTo:
    """The kernel's answer for one destination. DeviceError: ENETUNREACH where there is no way."""
    async def ask(ipr: Any) -> RouteTo:
        (message,) = [item async for item in await ipr.route(
            "get", family=_family(address.version), dst=str(address))]
        return RouteTo(_out_interface(message), _address(message.get_attr("RTA_PREFSRC")),
                       _address(message.get_attr("RTA_GATEWAY")))

    return await netlink.work(f"asking for the route to {address}", ask)


# -- in the netlink thread ------------------------------------------------------------------------


async def _dump(ipr: Any, kind: str, **what: Any) -> list[Any]:
    """All messages of a dump; one that changes under way is taken again, as the kernel asks."""
    from pyroute2 import NetlinkDumpInterrupted

    for last in range(DUMP_TRIES - 1, -1, -1):
        try:
            return [message async for message in await getattr(ipr, kind)("dump", **what)]
        except NetlinkDumpInterrupted:
            if not last:
                raise
    raise AssertionError


async def _interfaces(ipr: Any) -> tuple[Interface, ...]:
    addresses: dict[int, list[tuple[int, IPAddress]]] = {}
    for message in await _dump(ipr, "addr"):
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
        for message in await _dump(ipr, "link")
    ]
    return tuple(sorted(found, key=lambda interface: interface.index))


def _rank(address: IPAddress, flags: int) -> int:
    """How good an address is to be found at, 0 best; the kernel's order decides between equals.

    Worse is what goes away (temporary, deprecated), cannot be used yet (tentative) or is known on
    one link only. The flag of a temporary address is that of a secondary one in IPv4.
    """
    passing = IFA_F_DEPRECATED | IFA_F_TENTATIVE
    if address.version == 6:
        passing |= IFA_F_TEMPORARY
    return 2 * address.is_link_local + bool(flags & passing)


async def _default_routes(ipr: Any, version: int) -> tuple[int, ...]:
    routes = [
        (message.get_attr("RTA_PRIORITY") or 0, _out_interface(message))
        for message in await _dump(ipr, "route", family=_family(version), table=RT_TABLE_MAIN)
        if message["dst_len"] == 0 and message["type"] == RTN_UNICAST
    ]
    routes.sort(key=lambda route: route[0])  # the kernel prefers the lowest metric
    return tuple(index for _, index in routes)


def _out_interface(message: Any) -> int:
    """The interface of a route, or of the first of its next hops."""
    index = message.get_attr("RTA_OIF")
    if index is None:
        hops = message.get_attr("RTA_MULTIPATH") or ()
        index = next((hop["oif"] for hop in hops), 0)
    return cast(int, index)


def _family(version: int) -> int:
    return socket.AF_INET6 if version == 6 else socket.AF_INET


def _address(text: str | None) -> IPAddress | None:
    return ipaddress.ip_address(text) if text else None
