"""Parse the kernel's notifications of changes on this host.

The receiver of a notification reads the kernel's state again. So a ``Change`` has only the kind and
the place of the change, not the new state. Pure functions; any thread.
"""

from __future__ import annotations

import struct
from collections.abc import Collection, Iterator
from enum import Enum, auto
from typing import NamedTuple

from .batch import HEADER, attributes
from .local import IFA_ADDRESS, IFA_LOCAL

# linux/rtnetlink.h: bits of the groups of notifications
RTMGRP_LINK, RTMGRP_NEIGH = 0x1, 0x4
RTMGRP_IPV4_IFADDR, RTMGRP_IPV4_ROUTE, RTMGRP_IPV4_RULE = 0x10, 0x40, 0x80
RTMGRP_IPV6_IFADDR, RTMGRP_IPV6_ROUTE, RTMGRP_IPV6_RULE = 0x100, 0x400, 1 << 18
RTMGRP_IPV4_NETCONF, RTMGRP_IPV6_NETCONF = 1 << 23, 1 << 24
GROUPS = (RTMGRP_LINK | RTMGRP_NEIGH | RTMGRP_IPV4_IFADDR | RTMGRP_IPV4_ROUTE | RTMGRP_IPV4_RULE
          | RTMGRP_IPV6_IFADDR | RTMGRP_IPV6_ROUTE | RTMGRP_IPV6_RULE | RTMGRP_IPV4_NETCONF
          | RTMGRP_IPV6_NETCONF)

INDEX = struct.Struct("=4xi")  # struct ifinfomsg, ifaddrmsg and ndmsg: the interface index
RTMSG = struct.Struct("=8BI")
RTM_F_CLONED = 0x200
RTA_DST, RTA_OIF, NETCONFA_IFINDEX = 1, 4, 1  # linux/rtnetlink.h, linux/netconf.h
NETCONF_LEN = 4  # struct netconfmsg, padded
NUMBER = struct.Struct("=i")


class Kind(Enum):
    """What has changed. ANY: messages were lost, or the watch has begun."""

    LINK = auto()
    ADDRESS = auto()
    ROUTE = auto()
    NEIGHBOUR = auto()
    RULE = auto()
    SETTING = auto()
    ANY = auto()


# The key is the message type for a new or changed object. The next number is the type for a deleted
# object.
KINDS = {16: Kind.LINK, 20: Kind.ADDRESS, 24: Kind.ROUTE, 28: Kind.NEIGHBOUR, 32: Kind.RULE,
         80: Kind.SETTING}
KINDS |= {number + 1: kind for number, kind in KINDS.items()}


class Change(NamedTuple):
    """A change on this host.

    device  the index of the interface; 0: none, or several
    prefix  ROUTE: the destination (address bytes, length in bits)
    address  ADDRESS: its bytes
    """

    kind: Kind
    device: int = 0
    prefix: tuple[bytes, int] | None = None
    address: bytes | None = None


ANYTHING = Change(Kind.ANY)


def parse_changes(messages: bytes, own_ports: Collection[int] = ()) -> Iterator[Change]:
    """Yield the changes in one netlink datagram.

    own_ports  ports of our own sockets; changes by these sockets are skipped
    """
    data = memoryview(messages)
    at = 0
    while at + HEADER.size <= len(data):
        length, number, _, _, port = HEADER.unpack_from(data, at)
        kind = KINDS.get(number)
        if kind is not None and (port == 0 or port not in own_ports):
            change = _change(kind, data[at + HEADER.size : at + length])
            if change is not None:
                yield change
        at += max(length + 3 & ~3, HEADER.size)


def _change(kind: Kind, body: memoryview) -> Change | None:
    if kind is Kind.ROUTE:
        *_, flags = head = RTMSG.unpack_from(body)
        if flags & RTM_F_CLONED:  # an entry of a cache
            return None
        found = attributes(body, RTMSG.size)
        return Change(kind, _number(found.get(RTA_OIF)), (bytes(found.get(RTA_DST, b"")), head[1]))
    if kind is Kind.RULE:
        return Change(kind)
    if kind is Kind.SETTING:
        index = _number(attributes(body, NETCONF_LEN).get(NETCONFA_IFINDEX))
        return Change(kind, max(index, 0))  # a negative number: the settings of all interfaces
    if kind is Kind.ADDRESS:
        found = attributes(body, INDEX.size)
        # On a point-to-point link IFA_ADDRESS is the other end.
        address = found.get(IFA_LOCAL, found.get(IFA_ADDRESS))
        return Change(kind, INDEX.unpack_from(body)[0],
                      address=None if address is None else bytes(address))
    return Change(kind, INDEX.unpack_from(body)[0])


def _number(value: memoryview | None) -> int:
    return 0 if value is None else int(NUMBER.unpack(value)[0])
