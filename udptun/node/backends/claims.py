"""Which addresses of the overlay's networks are in use by leases, to find leases that overlap.

Owns: the sorted list of the subnets that have paths, and the public addresses that are within the
overlay's networks. The subnets in the list do not overlap. Does not decide which lease has the
addresses (``plan``). Pure, no I/O; one thread.
"""

from __future__ import annotations

import ipaddress
from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterable, Iterator

from ...leases.base import Lease
from ...model import IPAddress, IPNetwork


def addresses_of(lease: Lease) -> Iterator[IPAddress]:
    both = (lease.attributes.public_ip, lease.attributes.public_ipv6)
    return (one for one in both if one is not None)


def claims_of(lease: Lease) -> Iterator[IPNetwork]:
    """Yield the subnets of a lease, and its public addresses as prefixes."""
    yield from lease.subnets
    yield from map(ipaddress.ip_network, addresses_of(lease))


class Claims:
    def __init__(self) -> None:
        # By IP version: the first addresses in ascending order, and the prefix by first address.
        self._order: dict[int, list[int]] = {4: [], 6: []}
        self._subnets: dict[int, dict[int, IPNetwork]] = {4: {}, 6: {}}
        # Usually empty, because public addresses are outside of the overlay's networks.
        self._public: dict[IPAddress, dict[str, Lease]] = {}  # by address, then by lease key
        self._public_of: dict[str, list[IPAddress]] = {}
        self._released: list[IPNetwork] = []

    def take_released(self) -> list[IPNetwork]:
        """Return the prefixes that were removed since the last call."""
        released, self._released = self._released, []
        return released

    # -- subnets ----------------------------------------------------------------------------------

    def add_subnet(self, subnet: IPNetwork) -> None:
        first = int(subnet.network_address)
        insort(self._order[subnet.version], first)
        self._subnets[subnet.version][first] = subnet

    def remove_subnet(self, subnet: IPNetwork) -> None:
        order, first = self._order[subnet.version], int(subnet.network_address)
        del order[bisect_left(order, first)]
        del self._subnets[subnet.version][first]
        self._released.append(subnet)

    def overlapping(self, network: IPNetwork) -> list[IPNetwork]:
        """Return the subnets in the list that overlap a prefix."""
        order, subnets = self._order[network.version], self._subnets[network.version]
        first, last = int(network.network_address), int(network.broadcast_address)
        at = bisect_right(order, first)
        found = []
        if at and int(subnets[order[at - 1]].broadcast_address) >= first:
            found.append(subnets[order[at - 1]])
        while at < len(order) and order[at] <= last:
            found.append(subnets[order[at]])
            at += 1
        return found

    def subnet_of(self, address: IPAddress) -> IPNetwork | None:
        """Return the subnet in the list that has the address."""
        found = self.overlapping(ipaddress.ip_network(address))
        return found[0] if found else None

    # -- public addresses within the overlay's networks -------------------------------------------

    def add_addresses(self, lease: Lease, addresses: Iterable[IPAddress]) -> None:
        for address in addresses:
            self._public.setdefault(address, {})[lease.key] = lease
            self._public_of.setdefault(lease.key, []).append(address)

    def remove_addresses(self, key: str) -> None:
        for address in self._public_of.pop(key, ()):
            leases = self._public[address]
            del leases[key]
            if not leases:
                del self._public[address]
            self._released.append(ipaddress.ip_network(address))

    def leases_inside(self, subnet: IPNetwork) -> list[Lease]:
        """Return the leases whose public address is in the subnet."""
        return [lease for address, leases in self._public.items() if address in subnet
                for lease in leases.values()]
