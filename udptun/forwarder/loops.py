"""The routes of a table whose endpoint the host routes into our own TUN.

Owns: which next hops of a table the kernel is asked about, and with which source address and mark.
Does not decide what happens to such a route (``routes``). Threading: control loop only.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Collection

from .. import _core
from ..model import IPAddress, Route
from ..net.loops import routed_into
from ..net.netlink import Netlink
from .config import ForwarderConfig

SLICE = 500  # routes processed at a time: well under a millisecond of the GIL


class Loops:
    """Asks the kernel of this host.

    device  the name of the TUN
    """

    def __init__(self, netlink: Netlink, device: str, config: ForwarderConfig) -> None:
        self.device = device
        self._netlink = netlink
        self._config = config

    @property
    def _sources(self) -> list[IPAddress]:
        """The addresses from which the forwarder sends."""
        return [endpoint.address for endpoint in self._config.listen]

    @property
    def versions(self) -> frozenset[int]:
        """The IP versions of the endpoints from which the forwarder sends."""
        return frozenset(address.version for address in self._sources)

    async def among(self, addresses: Collection[bytes]) -> set[bytes]:
        """Return the packed addresses that the host routes into the TUN. Raises DeviceError."""
        return await routed_into(
            self._netlink, self.device, addresses, self._sources, self._config.mark)

    async def find(self, table: _core.RouteTable) -> AsyncIterator[Route]:
        """Yield the routes whose endpoint the host routes into the TUN. Raises DeviceError."""
        next_hops: set[bytes] = set()
        for start in range(0, len(table), SLICE):
            next_hops |= table.next_hops(start, SLICE)
            await asyncio.sleep(0)
        looping = await self.among(next_hops)
        for start in range(0, len(table) if looping else 0, SLICE):
            if not looping.isdisjoint(table.next_hops(start, SLICE)):
                for at in range(start, min(start + SLICE, len(table))):
                    route = table.route_at(at)
                    if route.via.packed in looping:
                        yield route
            await asyncio.sleep(0)
