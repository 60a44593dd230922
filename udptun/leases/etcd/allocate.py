"""Chooses a node's subnet from a listing of all leases, as flannel does.

Owns: the order of preference, and which subnets are free. ``keeper`` writes the choice to the
store, and handles the case that another node writes first. Pure functions: no I/O, no clock; any
thread.

source  flannel's AcquireLease
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...model import IPNetwork
from ..base import Attributes, StoreRefused, Subnets

if TYPE_CHECKING:
    from ..netconf import NetConfig

# One subnet is chosen at random from at most this many free subnets. So nodes that start together
# rarely choose the same subnet.
CANDIDATES_MAX = 100


@dataclass(frozen=True, slots=True)
class Entry:
    """One key of a listing. The key's subnets are in use even if the key's value is invalid."""

    key: str
    subnets: Subnets
    attributes: Attributes | None  # None: the value is invalid
    mod_revision: int
    lease_id: int  # the ID of the key's etcd lease; 0: no etcd lease, so the key is a reservation
    create_revision: int = 0  # 0: not known

    @property
    def reserved(self) -> bool:
        return self.lease_id == 0


def same_node(published: Attributes | None, own: Attributes) -> bool:
    """Return whether this node published the lease with the attributes ``published``.

    This is the case if the lease has our public address: our IPv4 address if we have one, else our
    IPv6 address.
    """
    if published is None:
        return False
    if own.public_ip is not None:
        return published.public_ip == own.public_ip
    return own.public_ipv6 is not None and published.public_ipv6 == own.public_ipv6


def fits(subnets: Subnets, network: NetConfig) -> bool:
    """Return whether the network's present configuration allows these subnets."""
    return _fits(
        subnets.v4, network.network, network.subnet_len, network.subnet_min, network.subnet_max
    ) and _fits(
        subnets.v6, network.network6, network.subnet6_len, network.subnet6_min, network.subnet6_max
    )


def own_entries(entries: Iterable[Entry], own: Attributes, former: Subnets) -> list[Entry]:
    """Return our existing leases, sorted by preference.

    Reservations come before other leases. In each of these two groups, the lease with the former
    subnets comes first.
    """
    found = [entry for entry in entries if same_node(entry.attributes, own)]
    return sorted(found, key=lambda entry: (not entry.reserved, entry.subnets != former))


def choose(
    network: NetConfig, entries: Sequence[Entry], former: Subnets,
    draw: Callable[[Sequence[int]], int],
) -> Subnets:
    """Return the former subnets if they are free and allowed.

    Else return free subnets that ``draw`` selects. Raises StoreRefused if no subnet is free.
    """
    used = [subnet for entry in entries for subnet in entry.subnets]
    if former.v4 is not None and fits(former, network) and not any(
        subnet.overlaps(other)
        for subnet in former for other in used if subnet.version == other.version
    ):
        return former
    chosen: list[Any] = []
    families: tuple[tuple[Any, int, Any, Any], ...] = (
        (network.network, network.subnet_len, network.subnet_min, network.subnet_max),
        (network.network6, network.subnet6_len, network.subnet6_min, network.subnet6_max),
    )
    for whole, length, low, high in families:
        if whole is None:
            chosen.append(None)
            continue
        bits = whole.max_prefixlen
        same_family = (subnet for subnet in used if subnet.version == whole.version)
        free = free_subnets(int(low), int(high), 1 << (bits - length), same_family)
        if not free:
            raise StoreRefused(f"all /{length} subnets from {low} to {high} are in use")
        chosen.append(type(whole)((draw(free), length)))
    return Subnets(*chosen)


def free_subnets(
    low: int, high: int, size: int, used: Iterable[IPNetwork], limit: int = CANDIDATES_MAX
) -> list[int]:
    """Return the base addresses of the free subnets, in ascending order.

    The possible base addresses are ``low`` to ``high``, in steps of ``size``.

    limit  the largest number of base addresses in the result
    """
    spans = sorted((int(net.network_address), int(net.broadcast_address)) for net in used)
    spans.append((high + size, high + size))
    found: list[int] = []
    base = low
    for first, last in spans:
        while base + size <= first and base <= high:
            found.append(base)
            if len(found) == limit:
                return found
            base += size
        if last >= base:  # continue with the first base after this span
            base += ((last - base) // size + 1) * size
    return found


def _fits(subnet: Any, whole: Any, length: int, low: Any, high: Any) -> bool:
    if subnet is None or whole is None:
        return subnet is whole
    return bool(subnet.prefixlen == length and low <= subnet.network_address <= high)
