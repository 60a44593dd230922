"""Read when packets were last sent to each peer of a VXLAN device.

The kernel looks up the FDB entry for each packet (or super-packet) that it sends to the peer, and
stores the time of this use in the entry. Owns the parsing of the FDB dump. The parsing must be
fast: a node may have thousands of entries, and the dump is read every few seconds. Threading: same
as ``RouteSocket``.
"""

from __future__ import annotations

import os

from .batch import RouteSocket, attributes
from .vxlan_entries import (
    AF_BRIDGE,
    NDA_IFINDEX,
    NDA_LLADDR,
    NDMSG,
    NUMBER_ATTRIBUTE,
    RTM_GETNEIGH,
)

NDA_CACHEINFO = 3  # linux/neighbour.h; four u32: confirmed, used, updated, references
USED = slice(4, 8)
TICKS = os.sysconf("SC_CLK_TCK")  # the unit of these times


def read_ages(netlink: RouteSocket, index: int) -> dict[bytes, float]:
    """Return {MAC: seconds since the last packet to it} of the device's FDB. Raises OSError."""
    request = NDMSG.pack(AF_BRIDGE, 0, 0, 0, 0) + NUMBER_ATTRIBUTE.pack(8, NDA_IFINDEX, index)
    ages: dict[bytes, float] = {}
    for body in netlink.dump(RTM_GETNEIGH, request):
        if NDMSG.unpack_from(body)[1] != index:
            continue  # an old kernel ignores the filter of the request
        found = attributes(body, NDMSG.size)
        if NDA_LLADDR in found and NDA_CACHEINFO in found:
            used = found[NDA_CACHEINFO][USED]
            ages[bytes(found[NDA_LLADDR])] = used.cast("I")[0] / TICKS
    return ages
