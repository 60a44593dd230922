"""Read what the kernel has counted for network devices.

The kernel counts a super-packet as one packet. Threading: any thread, in the network namespace of
that thread. A call may wait for other netlink requests of the host.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from socket import AF_UNSPEC
from typing import NamedTuple

from .batch import Refusal, RouteSocket, attributes
from .local import IFINFOMSG, RTM_GETLINK
from .lookup import device_index
from .vxlan_ages import IFLA_STATS64

# The start of struct rtnl_link_stats64. Each counter has a received and a sent value: packets,
# bytes, errors, drops.
STATS = struct.Struct("=8Q")


class Counts(NamedTuple):
    """The counters of one device and one direction. ``bytes`` are those of inner packets."""

    packets: int
    bytes: int
    errors: int
    dropped: int


class DeviceCounts(NamedTuple):
    """What a device has sent (encap) and received (decap)."""

    encap: Counts
    decap: Counts


def device_counts(names: Iterable[str]) -> dict[str, DeviceCounts]:
    """Return the counters by device, for the devices that exist. Raises OSError."""
    found = {}
    by_index = {index: name for name in names if (index := device_index(name))}
    if not by_index:
        return {}
    with RouteSocket() as kernel:
        answers = kernel.ask(RTM_GETLINK, [
            IFINFOMSG.pack(AF_UNSPEC, 0, index, 0, 0) for index in by_index])
    for name, answer in zip(by_index.values(), answers, strict=True):
        if isinstance(answer, Refusal):
            continue  # it was removed just now
        values = STATS.unpack_from(attributes(answer, IFINFOMSG.size)[IFLA_STATS64])
        # On a TUN, the kernel sends what the forwarder reads.
        found[name] = DeviceCounts(Counts(*values[1::2]), Counts(*values[::2]))
    return found
