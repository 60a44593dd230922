"""Which addresses of the overlay's networks are in use by leases, to find leases that overlap.

Owns: the sorted list of the subnets that have paths, the public addresses that are within the
overlay's networks, and the index of the leases that were rejected. The subnets in the list do not
overlap; the claims of rejected leases do. Does not decide which lease has the addresses (``plan``).
No I/O; one thread.
"""

from __future__ import annotations

import ipaddress
from bisect import bisect_left, bisect_right, insort
from collections import Counter
from collections.abc import Iterable, Iterator

from ...leases.base import Lease
from ...model import IPNetwork


class _Prefixes:
    """A sorted set of prefixes of one IP version that do not overlap."""

    def __init__(self) -> None:
        self._order: list[int] = []  # the first address of each prefix
        self._by_first: dict[int, tuple[int, IPNetwork]] = {}  # the last address, and the prefix

    def add(self, prefix: IPNetwork) -> None:
        first, last = _span(prefix)
        insort(self._order, first)
        self._by_first[first] = last, prefix

    def remove(self, prefix: IPNetwork) -> None:
        first = int(prefix.network_address)
        del self._order[bisect_left(self._order, first)]
        del self._by_first[first]

    def overlapping(self, prefix: IPNetwork) -> list[IPNetwork]:
        """Return the prefixes in the set that overlap ``prefix``."""
        order = self._order
        if not order:
            return []
        first, last = _span(prefix)
        at = bisect_right(order, first)
        found = []
        if at:
            end, before = self._by_first[order[at - 1]]
            if end >= first:
                found.append(before)
        while at < len(order) and order[at] <= last:
            found.append(self._by_first[order[at]][1])
            at += 1
        return found


def _span(prefix: IPNetwork) -> tuple[int, int]:
    """Return the first and the last address."""
    first = int(prefix.network_address)
    return first, first | ((1 << (prefix.max_prefixlen - prefix.prefixlen)) - 1)


class Rejected:
    """Leases by the prefixes that they claim. The prefixes may overlap.

    Two prefixes overlap only if one contains the other. So the search needs one look-up for each
    prefix length in use, and the sorted list for the longer prefixes.
    """

    def __init__(self) -> None:
        self._claims: dict[str, list[IPNetwork]] = {}  # by lease key
        self._leases: dict[IPNetwork, dict[str, Lease]] = {}  # by claim, then by lease key
        self._order: dict[int, list[tuple[int, int]]] = {4: [], 6: []}  # first address, length
        self._lengths: dict[int, Counter[int]] = {4: Counter(), 6: Counter()}

    def get(self, key: str) -> Lease | None:
        claims = self._claims.get(key)
        return self._leases[claims[0]][key] if claims else None

    def add(self, lease: Lease, claims: list[IPNetwork]) -> None:
        """Add a lease that is not in the index. It has at least one claim."""
        self._claims[lease.key] = [*dict.fromkeys(claims)]
        for claim in self._claims[lease.key]:
            if claim not in self._leases:
                self._leases[claim] = {}
                self._lengths[claim.version][claim.prefixlen] += 1
                insort(self._order[claim.version], _place(claim))
            self._leases[claim][lease.key] = lease

    def remove(self, key: str) -> None:
        for claim in self._claims.pop(key, ()):
            del self._leases[claim][key]
            if self._leases[claim]:
                continue
            del self._leases[claim]
            order, lengths = self._order[claim.version], self._lengths[claim.version]
            del order[bisect_left(order, _place(claim))]
            lengths[claim.prefixlen] -= 1
            if not lengths[claim.prefixlen]:
                del lengths[claim.prefixlen]

    def overlapping(self, prefix: IPNetwork, seen: set[IPNetwork]) -> Iterator[Lease]:
        """Yield the leases whose claims overlap ``prefix``, except those of the claims in ``seen``.
        Add the claims to ``seen``."""
        for claim in self._overlapping(prefix):
            if claim not in seen:
                seen.add(claim)
                yield from self._leases[claim].values()

    def _overlapping(self, prefix: IPNetwork) -> Iterator[IPNetwork]:
        for length in self._lengths[prefix.version]:
            if length < prefix.prefixlen and \
                    (shorter := prefix.supernet(new_prefix=length)) in self._leases:
                yield shorter
        order, (first, last) = self._order[prefix.version], _span(prefix)
        at = bisect_left(order, (first, prefix.prefixlen))
        while at < len(order) and order[at][0] <= last:
            yield type(prefix)(order[at])
            at += 1


def _place(prefix: IPNetwork) -> tuple[int, int]:
    return int(prefix.network_address), prefix.prefixlen


class Claims:
    """The addresses in use.

    networks  the networks of the overlay
    """

    def __init__(self, networks: Iterable[IPNetwork]) -> None:
        self._networks = tuple(networks)
        self._subnets = {4: _Prefixes(), 6: _Prefixes()}
        # Usually empty, because public addresses are outside of the overlay's networks.
        self._public = {4: _Prefixes(), 6: _Prefixes()}
        self._leases_at: dict[IPNetwork, dict[str, Lease]] = {}  # by address, then by lease key
        self._public_of: dict[str, list[IPNetwork]] = {}

    # -- subnets ----------------------------------------------------------------------------------

    def add_subnet(self, subnet: IPNetwork) -> None:
        self._subnets[subnet.version].add(subnet)

    def remove_subnet(self, subnet: IPNetwork) -> None:
        self._subnets[subnet.version].remove(subnet)

    def overlapping(self, network: IPNetwork) -> list[IPNetwork]:
        """Return the subnets in the list that overlap a prefix."""
        return self._subnets[network.version].overlapping(network)

    # -- public addresses within the overlay's networks -------------------------------------------

    def addresses_inside(self, lease: Lease) -> list[IPNetwork]:
        """Return the public addresses of a lease that are in the overlay's networks."""
        both = (lease.attributes.public_ip, lease.attributes.public_ipv6)
        return [ipaddress.ip_network(address) for address in both if address is not None
                and any(address in network for network in self._networks)]

    def of(self, lease: Lease) -> list[IPNetwork]:
        """Return everything that a lease claims."""
        return [*lease.subnets, *self.addresses_inside(lease)]

    def add_addresses(self, lease: Lease, addresses: Iterable[IPNetwork]) -> None:
        for address in addresses:
            if address not in self._leases_at:
                self._public[address.version].add(address)
            self._leases_at.setdefault(address, {})[lease.key] = lease
            self._public_of.setdefault(lease.key, []).append(address)

    def remove_addresses(self, key: str) -> None:
        for address in self._public_of.pop(key, ()):
            leases = self._leases_at[address]
            del leases[key]
            if not leases:
                del self._leases_at[address]
                self._public[address.version].remove(address)

    def leases_inside(self, subnet: IPNetwork) -> list[Lease]:
        """Return the leases whose public address is in the subnet."""
        return [lease for address in self._public[subnet.version].overlapping(subnet)
                for lease in self._leases_at[address].values()]
