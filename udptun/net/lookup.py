"""Ask the kernel which route packets to many destinations take.

Owns the questions and answers of RTM_GETROUTE, many per system call, and the list of the main
table's routes within a network. Does not decide whether a route is correct. Threading: call from
any asyncio loop; the work runs in the thread of the given ``Netlink``.
"""

from __future__ import annotations

import fcntl
import ipaddress
import os
import socket
import struct
import sys
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from ..model import IPAddress, IPNetwork
from .batch import ATTRIBUTE, Refusal, RouteSocket, attributes
from .changes import RTA_DST, RTA_OIF, RTMSG
from .netlink import Netlink

# linux/rtnetlink.h
RTM_GETROUTE = 26
RTA_SRC, RTA_GATEWAY, RTA_TABLE, RTA_MARK = 2, 5, 15, 16
RT_TABLE_MAIN = 254
IFF_UP = 0x1  # linux/if.h
SIOCGIFFLAGS, IFREQ = 0x8913, struct.Struct("16sH22x")  # linux/sockios.h, linux/if.h
# Routes that drop packets. ip(8) has the same names.
ROUTE_KINDS = {6: "blackhole ", 7: "unreachable ", 8: "prohibit "}
RTM_F_LOOKUP_TABLE, RTM_F_FIB_MATCH = 0x1000, 0x2000
# The flags of a request for the selected route and its table. With IPv6, the answer always has the
# table, and the kernel refuses the other flag.
FIB_MATCH = {4: RTM_F_LOOKUP_TABLE | RTM_F_FIB_MATCH, 6: RTM_F_FIB_MATCH}

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Question:
    """A packet: its destination, and its source address if it is known; else the kernel selects it.

    mark  the mark of the packet (SO_MARK), which rules can match; 0: no mark
    """

    to: IPAddress
    source: IPAddress | None = None
    mark: int = 0


@dataclass(frozen=True, slots=True)
class Way:
    """The kernel's answer for one packet.

    device   index of the outgoing interface; 0: the packet is not sent
    gateway  next hop; None: the destination is on the link, or is this host
    error    the kernel's reason if there is no route; "" if there is one
    """

    device: int = 0
    gateway: IPAddress | None = None
    error: str = ""


async def look_up(netlink: Netlink, questions: Sequence[Question]) -> list[Way]:
    """Return the kernel's route for each packet. Raises DeviceError."""
    async def ask(_: Any) -> list[Way]:
        with RouteSocket() as kernel:
            return ask_ways(kernel, questions)

    return await netlink.work("looking up routes", ask)


def ask_ways(kernel: RouteSocket, questions: Sequence[Question]) -> list[Way]:
    """Return the kernel's route for each packet. Raises OSError."""
    return [_way(answer) for answer in
            kernel.ask(RTM_GETROUTE, [_request(one, 0) for one in questions])]


async def matched_routes(netlink: Netlink, questions: Sequence[Question]) -> list[str]:
    """Return the route that the kernel selects for each packet, as text such as
    "10.0.0.0/8 dev eth0 table 7"; "" if the kernel does not report it. Raises DeviceError."""
    return [text or "" for text in await _selected(netlink, questions, _route_text)]


@dataclass(frozen=True, slots=True)
class Match:
    """The route that the kernel selects for one packet.

    length   its prefix length
    device   index of the outgoing interface; 0: several, or none
    gateway  next hop; None: the destination is on the link, or is this host
    table    number of the routing table
    """

    length: int
    device: int
    gateway: IPAddress | None
    table: int


async def matches(netlink: Netlink, addresses: Sequence[IPAddress]) -> list[Match | None]:
    """Return the route that the kernel selects for each address; None: there is no route. Raises
    DeviceError."""
    return await _selected(netlink, [Question(one) for one in addresses], _match)


async def _selected(
    netlink: Netlink, questions: Sequence[Question], read: Callable[[memoryview], T]
) -> list[T | None]:
    """Return what ``read`` finds in the route that the kernel selects for each packet; None: the
    kernel reports no route. Raises DeviceError."""
    async def ask(_: Any) -> list[T | None]:
        with RouteSocket() as kernel:
            requests = [_request(one, FIB_MATCH[one.to.version]) for one in questions]
            return [None if isinstance(answer, Refusal) else read(answer)
                    for answer in kernel.ask(RTM_GETROUTE, requests)]

    return await netlink.work("reading the routes of packets", ask) if questions else []


def _match(answer: memoryview) -> Match:
    _, length, _, _, table, *_ = RTMSG.unpack_from(answer)
    way, about = _way(answer), attributes(answer, RTMSG.size)
    return Match(length, way.device, way.gateway, number(about.get(RTA_TABLE)) or table)


async def routes_within(
    netlink: Netlink, networks: Iterable[IPNetwork], except_devices: Collection[int]
) -> list[tuple[IPNetwork, Way, str]]:
    """Return the prefix, the way and a text for each route of the main table to a part of a
    network, except the routes through these devices. Raises DeviceError."""
    wanted = list(networks)

    async def read(_: Any) -> list[tuple[IPNetwork, Way, str]]:
        found = []
        with RouteSocket() as kernel:
            for network in wanted:
                request = RTMSG.pack(_family(network.version), 0, 0, 0, RT_TABLE_MAIN, 0, 0, 0, 0)
                size = network.max_prefixlen // 8
                base, shift = int(network.network_address), size * 8 - network.prefixlen
                for body in kernel.dump(RTM_GETROUTE, request):
                    _, length, _, _, table, *_ = RTMSG.unpack_from(body)
                    if table != RT_TABLE_MAIN or length <= network.prefixlen:
                        continue
                    about = attributes(body, RTMSG.size)
                    if number(about.get(RTA_OIF)) in except_devices:
                        continue
                    packed = bytes(about[RTA_DST])
                    if (int.from_bytes(packed) ^ base) >> shift == 0:
                        prefix = ipaddress.ip_network((packed, length))
                        found.append((prefix, _way(body), _route_text(body)))
        return found

    return await netlink.work("reading the routes within the overlay", read)


async def has_route(netlink: Netlink, device: int) -> bool:
    """Return whether the main table has a route through this device to other hosts.

    Routes to one address do not count: the kernel adds one for an IPv6 address of the device. Nor
    do link-local ones. Raises DeviceError.
    """
    async def read(_: Any) -> bool:
        with RouteSocket() as kernel:
            return any(_is_through(body, device) for version in (4, 6) for body in kernel.dump(
                RTM_GETROUTE, RTMSG.pack(_family(version), 0, 0, 0, RT_TABLE_MAIN, 0, 0, 0, 0)))

    return await netlink.work("reading the routes of a device", read)


def _is_through(body: memoryview, device: int) -> bool:
    family, length, _, _, table, *_ = RTMSG.unpack_from(body)
    about = attributes(body, RTMSG.size)
    size = 4 if family == socket.AF_INET else 16
    to = ipaddress.ip_address(bytes(about.get(RTA_DST, bytes(size))))
    return table == RT_TABLE_MAIN and number(about.get(RTA_OIF)) == device and \
        length < size * 8 and not to.is_link_local


def _request(question: Question, flags: int) -> bytes:
    bits = question.to.max_prefixlen
    source = question.source
    body = RTMSG.pack(_family(question.to.version), bits, 0 if source is None else bits,
                      0, 0, 0, 0, 0, flags)
    body += ATTRIBUTE.pack(ATTRIBUTE.size + bits // 8, RTA_DST) + question.to.packed
    if source is not None:
        body += ATTRIBUTE.pack(ATTRIBUTE.size + bits // 8, RTA_SRC) + source.packed
    if question.mark:
        body += numeric_attribute(RTA_MARK, question.mark)
    return body


def numeric_attribute(kind: int, value: int) -> bytes:
    return ATTRIBUTE.pack(ATTRIBUTE.size + 4, kind) + value.to_bytes(4, sys.byteorder)


def _way(answer: memoryview | Refusal) -> Way:
    if isinstance(answer, Refusal):
        return Way(error=os.strerror(answer.number))
    about = attributes(answer, RTMSG.size)
    gateway = about.get(RTA_GATEWAY)
    return Way(number(about.get(RTA_OIF)),
               None if gateway is None else ipaddress.ip_address(bytes(gateway)))


def _route_text(body: memoryview) -> str:
    family, length, _, _, _, _, _, kind, _ = RTMSG.unpack_from(body)
    about = attributes(body, RTMSG.size)
    size = 4 if family == socket.AF_INET else 16
    text = ROUTE_KINDS.get(kind, "")
    text += f"{ipaddress.ip_address(bytes(about.get(RTA_DST, bytes(size))))}/{length}"
    if (gateway := about.get(RTA_GATEWAY)) is not None:
        text += f" via {ipaddress.ip_address(bytes(gateway))}"
    if index := number(about.get(RTA_OIF)):
        text += f" dev {device_name(index)}"
    if (table := number(about.get(RTA_TABLE))) not in (0, RT_TABLE_MAIN):
        text += f" table {table}"
    return text


def device_index(name: str) -> int:
    """Return the index of a device; 0: there is no such device."""
    try:
        return socket.if_nametoindex(name)
    except OSError:
        return 0


def is_up(name: str) -> bool:
    """Return whether there is a device with this name, and the administrator has set it up."""
    # sysfs shows the namespace in which it was mounted.
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            answer = fcntl.ioctl(sock, SIOCGIFFLAGS, IFREQ.pack(name.encode(), 0))
        except OSError:
            return False
    return bool(IFREQ.unpack(answer)[1] & IFF_UP)


def device_name(index: int) -> str:
    try:
        return socket.if_indextoname(index)
    except OSError:
        return "a device that is gone"


def number(value: memoryview | None) -> int:
    return 0 if value is None else int.from_bytes(value, sys.byteorder)


def _family(version: int) -> int:
    return socket.AF_INET6 if version == 6 else socket.AF_INET
