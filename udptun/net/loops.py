"""Find the peers whose datagrams the kernel would route into our own TUN.

Owns one question to the kernel: through which device a datagram of the forwarder to an address
leaves. If the device is our TUN, the datagram returns to the forwarder. Prefixes are not compared:
an address within the overlay's networks is usable if the host has a more specific route to it, or a
rule for the forwarder's source or mark. Does not decide what happens to a route. Threading: call
from any asyncio loop; the work runs in the thread of the given ``Netlink``.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Collection, Iterable
from typing import Any

from ..model import IPAddress, Mark
from .batch import RouteSocket, attributes
from .changes import RTA_DST, RTA_OIF, RTMSG
from .lookup import RTM_GETROUTE, Question, ask_ways, device_index, number, numeric_attribute
from .netlink import Netlink

FEW = 64  # addresses; of more, only those that a route through the TUN covers are looked up
FAMILY = {4: socket.AF_INET, 16: socket.AF_INET6}  # by bytes of a packed address


async def routed_into(
    netlink: Netlink, device: str, addresses: Collection[bytes], sources: Iterable[IPAddress],
    mark: Mark | None = None,
) -> set[bytes]:
    """Return the packed addresses to which the kernel would send our datagrams through ``device``.

    sources  the addresses from which the forwarder sends, at most one per IP version
    mark     the mark of its datagrams
    An address without a route, or of a version without a source, is not returned. Raises
    DeviceError.
    """
    source_of = {len(source.packed): source for source in sources}
    value = 0 if mark is None else mark.value

    async def ask(_: Any) -> set[bytes]:
        index = device_index(device)
        if index == 0:  # the device was deleted, so nothing is routed into it
            return set()
        with RouteSocket() as kernel:
            packed = [one for one in addresses if len(one) in source_of]
            if len(packed) > FEW:
                packed = _covered(kernel, index, packed)
            questions = [Question(ipaddress.ip_address(one), source_of[len(one)], value)
                         for one in packed]
            ways = ask_ways(kernel, questions)
            return {one for one, way in zip(packed, ways, strict=True) if way.device == index}

    return await netlink.work(f"looking for endpoints behind {device}", ask) if addresses else set()


def _covered(kernel: RouteSocket, index: int, addresses: list[bytes]) -> list[bytes]:
    """Return the addresses that a route through the device covers, in any routing table."""
    found = []
    for size in {len(one) for one in addresses}:
        prefixes = _prefixes(kernel, index, size)
        for one in addresses:
            if len(one) == size:
                value = int.from_bytes(one)
                if any((value ^ base) >> shift == 0 for base, shift in prefixes):
                    found.append(one)
    return found


def _prefixes(kernel: RouteSocket, index: int, size: int) -> set[tuple[int, int]]:
    """Return the base address and the number of host bits of each route through the device.

    A kernel that does not filter by device returns all routes. A route with several next hops is
    returned too: it has no single device.
    """
    request = RTMSG.pack(FAMILY[size], 0, 0, 0, 0, 0, 0, 0, 0) + numeric_attribute(RTA_OIF, index)
    prefixes = set()
    for body in kernel.dump(RTM_GETROUTE, request):
        length = RTMSG.unpack_from(body)[1]
        about = attributes(body, RTMSG.size)
        if number(about.get(RTA_OIF)) in (index, 0):
            base = int.from_bytes(bytes(about.get(RTA_DST, bytes(size))))
            prefixes.add((base, size * 8 - length))
    return prefixes
