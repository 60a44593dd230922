"""Finds addresses that this host could no longer reach because of the overlay's routes.

Owns: the list of addresses that this host must reach without the overlay (those of the underlay's
link, of the gateway and of the store), and the decision whether the route to a network of the
overlay would divert the packets to one of them. Does not depend on how the routes are set.

A network may contain such an address: 10.0.0.0/8 may contain the underlay, as with flannel. The
kernel uses the route with the longest prefix. So packets to an address are diverted only if the
present route to the address has a prefix that is not longer than that of the overlay's route. Only
routes of the main table count, because routes of other tables do not compete with ours.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Collection, Iterable
from contextlib import suppress
from ipaddress import ip_address

from ...errors import FieldError
from ...model import IPAddress, IPNetwork
from ...net.local import INTERNET
from ...net.lookup import RT_TABLE_MAIN, device_index, matches
from ...net.netlink import Netlink
from ...net.underlay import links_of
from .interface import LOOPBACK, Needed, Underlay

RESOLVE_SECONDS = 2.0

log = logging.getLogger(__name__)


class Taken:
    """The check of one host.

    broadcasts  the broadcast addresses of the underlay's links, as of the last call of ``needed``
    """

    def __init__(self, netlink: Netlink) -> None:
        self.broadcasts: tuple[IPAddress, ...] = ()
        self._netlink = netlink
        self._resolved: dict[str, tuple[IPAddress, ...]] = {}

    async def needed(
        self, underlay: Underlay, store_hosts: Iterable[str], own_devices: Collection[str]
    ) -> tuple[Needed, ...]:
        """Return the addresses that this host must reach without the overlay.

        store_hosts  names and addresses of the store
        own_devices  names of the overlay's devices
        Raises DeviceError.
        """
        links = await links_of(self._netlink, underlay.index)
        self.broadcasts = tuple(link.broadcast_address for link in links
                                if link.version == 4 and link.prefixlen < 31)
        found = [
            Needed(address, f"the underlay's address on {underlay.name}", link.prefixlen)
            for address in underlay.bound for link in links
            if address in link and link.prefixlen < link.max_prefixlen
        ]
        found += await self._without_link(underlay, links)
        own = {device_index(name) for name in own_devices} - {0}
        routes = await matches(self._netlink, [*INTERNET.values()])
        wanted = {route.gateway: "the gateway of this host" for route in routes
                  if route is not None and route.gateway is not None and route.device not in own}
        for host in store_hosts:
            what = f"the address of the store ({host})"
            wanted |= dict.fromkeys(await self._resolve(host), what)
        routes = await matches(self._netlink, [*wanted])
        found += [
            Needed(address, what, route.length)
            for (address, what), route in zip(wanted.items(), routes, strict=True)
            if route is not None and route.table == RT_TABLE_MAIN
        ]
        return tuple(found)

    async def _without_link(
        self, underlay: Underlay, links: Iterable[IPNetwork]
    ) -> list[Needed]:
        """Return the underlay's addresses that are alone on their link, such as 10.128.0.2/32.

        Clouds give such addresses. The hosts around it, often the other nodes, are behind the
        gateway. So the length is that of the route to them.
        """
        # A routing protocol announces an address of the loopback, and has the routes to the other
        # nodes.
        if underlay.name == LOOPBACK:
            return []
        alone = [address for address in underlay.bound
                 if not any(address in link and link.prefixlen < link.max_prefixlen
                            for link in links)]
        # A neighbour: the question about our own address would show the table "local".
        around = [ip_address(int(address) ^ 1) if address.version == 4 else
                  ip_address((int(address) ^ 1).to_bytes(16)) for address in alone]
        routes = await matches(self._netlink, around)
        return [Needed(address, f"the underlay's address on {underlay.name}", route.length)
                for address, route in zip(alone, routes, strict=True)
                if route is not None and route.table == RT_TABLE_MAIN]

    async def _resolve(self, host: str) -> tuple[IPAddress, ...]:
        """Return the addresses of a host; none if its name cannot be resolved now."""
        with suppress(ValueError):
            return (ip_address(host),)
        if host not in self._resolved:
            try:
                async with asyncio.timeout(RESOLVE_SECONDS):
                    answers = await asyncio.get_running_loop().getaddrinfo(
                        host, None, type=socket.SOCK_STREAM)
            except (OSError, TimeoutError, UnicodeError):
                log.debug("the name of the store, %s, cannot be resolved now", host)
                return ()
            self._resolved[host] = tuple({ip_address(answer[4][0]) for answer in answers})
        return self._resolved[host]


def refuse_taken(networks: Iterable[IPNetwork], needed: Iterable[Needed]) -> None:
    """Raise FieldError if the route to a network would divert the packets to a needed address."""
    wanted = [*needed]
    for network in networks:
        for one in wanted:
            if one.is_in(network):
                raise FieldError(
                    "Network" if network.version == 4 else "IPv6Network", str(network),
                    f"a network whose route does not divert packets to {one.address}, {one.what}")
