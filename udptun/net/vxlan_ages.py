"""Read when packets were last sent to each peer of a VXLAN device.

The kernel looks up the FDB entry for each packet (or super-packet) that it sends to the peer, and
stores the time of this use in the entry. Owns the parsing of the FDB dump. The parsing must be
fast: a node may have thousands of entries, and the dump is read every few seconds. The device's own
counter shows whether a dump is necessary. Threading: same as ``RouteSocket``.
"""

from __future__ import annotations

import math
import os
import socket
import struct
from collections.abc import Callable

from .batch import ATTRIBUTE, Refusal, RouteSocket, attributes
from .local import IFINFOMSG, RTM_GETLINK
from .vxlan_entries import (
    AF_BRIDGE,
    NDA_IFINDEX,
    NDA_LLADDR,
    NDMSG,
    NUMBER_ATTRIBUTE,
    RTM_GETNEIGH,
)

NDA_CACHEINFO = 3  # linux/neighbour.h; four u32: confirmed, used, updated, references
USED = struct.Struct("=4xI8x")
MAC_HEADER = ATTRIBUTE.pack(ATTRIBUTE.size + 6, NDA_LLADDR)
USED_HEADER = ATTRIBUTE.pack(ATTRIBUTE.size + USED.size, NDA_CACHEINFO)
TICKS = os.sysconf("SC_CLK_TCK")  # the unit of these times
IFLA_STATS64 = 23  # linux/if_link.h
# The start of struct rtnl_link_stats64: packets sent, errors and drops of the device's output.
OUTPUT = struct.Struct("=8xQ24xQ8xQ")
TRIES = 10  # to read the counters at a moment when the caller does not send


def output_n(netlink: RouteSocket, index: int) -> int:
    """Return the number of packets (or super-packets) that the device was to send, whether it has
    sent them or not. Raises OSError."""
    (link,) = netlink.ask(RTM_GETLINK, [IFINFOMSG.pack(socket.AF_UNSPEC, 0, index, 0, 0)])
    if isinstance(link, Refusal):
        raise OSError(link.number, str(link))
    counters: tuple[int, ...] = OUTPUT.unpack_from(attributes(link, IFINFOMSG.size)[IFLA_STATS64])
    return sum(counters)


def others_n(netlink: RouteSocket, index: int, own_n: Callable[[], int | None]) -> int | None:
    """Return how many packets other programs have sent through the device; None: not known. Raises
    OSError.

    own_n  returns how many packets the caller has sent, or None while it sends. Both counters must
           be from the same moment: a packet between two reads would look like that of another
           program
    """
    for _ in range(TRIES):
        own = own_n()
        output = output_n(netlink, index)
        if own is not None and own_n() == own:
            return output - own
    return None


def read_ages(
    netlink: RouteSocket, index: int, within: float = math.inf
) -> dict[bytes, float]:
    """Return {MAC: seconds since the last packet to it} of the device's FDB, for the entries that
    were used ``within`` these seconds. Raises OSError.
    """
    request = NDMSG.pack(AF_BRIDGE, 0, 0, 0, 0) + NUMBER_ATTRIBUTE.pack(8, NDA_IFINDEX, index)
    ages: dict[bytes, float] = {}
    mac_at = used_at = NDMSG.size
    for body in netlink.dump(RTM_GETNEIGH, request):
        if NDMSG.unpack_from(body)[1] != index:
            continue  # an old kernel ignores the filter of the request
        # Entries of one kind have the same layout, so each is tried with that of the one before.
        if not (_has(body, mac_at, MAC_HEADER) and _has(body, used_at, USED_HEADER)):
            places = _places(body)
            if NDA_LLADDR not in places or NDA_CACHEINFO not in places:
                continue
            mac_at, used_at = places[NDA_LLADDR], places[NDA_CACHEINFO]
        age = USED.unpack_from(body, used_at + ATTRIBUTE.size)[0] / TICKS
        if age <= within:
            ages[bytes(body[mac_at + ATTRIBUTE.size : mac_at + ATTRIBUTE.size + 6])] = age
    return ages


def _has(body: memoryview, at: int, header: bytes) -> bool:
    return body[at : at + ATTRIBUTE.size] == header


def _places(body: memoryview) -> dict[int, int]:
    """Return where each attribute begins, by type."""
    found, at = {}, NDMSG.size
    for kind, value in attributes(body, NDMSG.size).items():
        found[kind] = at
        at += ATTRIBUTE.size + len(value) + 3 & ~3
    return found
