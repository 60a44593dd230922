"""Which subnet a node gets: flannel's choice, over a listing. Pure: no I/O, no clock.

Owns: the order of choice, and what is free. Refuses to know: how a choice is written, and that it
may be lost to another node (source: flannel's AcquireLease).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...model import IPNetwork
from ..base import Attributes, StoreRefused, Subnets

if TYPE_CHECKING:
    from ..netconf import NetConfig

CANDIDATES_MAX = 100  # of which one is drawn, so that nodes that start together seldom collide


@dataclass(frozen=True, slots=True)
class Entry:
    """One key of a listing. Its subnets are taken whether or not its value can be used."""

    key: str
    subnets: Subnets
    attributes: Attributes | None  # None: the value cannot be used
    mod_revision: int
    lease_id: int  # 0: put without a lease, a reservation

    @property
    def reserved(self) -> bool:
        return self.lease_id == 0


def is_mine(theirs: Attributes | None, mine: Attributes) -> bool:
    """Whether a lease was published by this node: it has our public address."""
    if theirs is None:
        return False
    if mine.public_ip is not None:
        return theirs.public_ip == mine.public_ip
    return mine.public_ipv6 is not None and theirs.public_ipv6 == mine.public_ipv6


def fits(subnets: Subnets, network: NetConfig) -> bool:
    """Whether the network's configuration, as it is now, could give these subnets."""
    return _fits(
        subnets.v4, network.network, network.subnet_len, network.subnet_min, network.subnet_max
    ) and _fits(
        subnets.v6, network.network6, network.subnet6_len, network.subnet6_min, network.subnet6_max
    )


def own_entries(entries: Iterable[Entry], mine: Attributes, former: Subnets) -> list[Entry]:
    """The leases that are ours already, best first: a reservation, then what we had last."""
    found = [entry for entry in entries if is_mine(entry.attributes, mine)]
    return sorted(found, key=lambda entry: (not entry.reserved, entry.subnets != former))


def choose(
    network: NetConfig, entries: Sequence[Entry], former: Subnets,
    draw: Callable[[Sequence[int]], int],
) -> Subnets:
    """Free subnets: those we had last if they are free and fit, else drawn. StoreRefused: none."""
    taken = [subnet for entry in entries for subnet in entry.subnets]
    if former.v4 is not None and fits(former, network) and not any(
        subnet.overlaps(other)
        for subnet in former for other in taken if subnet.version == other.version
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
        same = (subnet for subnet in taken if subnet.version == whole.version)
        free = free_subnets(int(low), int(high), 1 << (bits - length), same)
        if not free:
            raise StoreRefused(f"all subnets of /{length} from {low} to {high} are taken")
        chosen.append(type(whole)((draw(free), length)))
    return Subnets(*chosen)


def free_subnets(
    low: int, high: int, size: int, taken: Iterable[IPNetwork], limit: int = CANDIDATES_MAX
) -> list[int]:
    """The bases, from ``low`` to ``high`` in steps of ``size``, of the first free subnets."""
    spans = sorted((int(net.network_address), int(net.broadcast_address)) for net in taken)
    spans.append((high + size, high + size))
    found: list[int] = []
    base = low
    for first, last in spans:
        while base + size <= first and base <= high:
            found.append(base)
            if len(found) == limit:
                return found
            base += size
        if last >= base:  # the next base behind what is taken
            base += ((last - base) // size + 1) * size
    return found


def _fits(subnet: Any, whole: Any, length: int, low: Any, high: Any) -> bool:
    if subnet is None or whole is None:
        return subnet is whole
    return bool(subnet.prefixlen == length and low <= subnet.network_address <= high)
