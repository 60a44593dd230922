"""The paths to each peer, through all active backends.

Owns: the checks that do not depend on a backend, the paths to all peers, which backend carries the
packets to a peer, and which peers are unreachable for which reason. Does not depend on stores,
processes, netlink or any single backend. Pure, no I/O; one thread.

A peer has a path in each backend that reaches the peer, not only in the backend that carries the
packets. If a peer loses one backend and sends through another one, this node therefore still
accepts the peer's packets. A lease is untrusted: an unusable lease makes only its own peer
unreachable.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ...leases.advert import PROBE, Advert
from ...leases.advert import read as read_advert
from ...leases.base import Change, Lease, Subnets
from ...model import DEFAULT_PORT, IPAddress, IPNetwork, is_unicast
from ...text import printable
from . import BACKENDS, FLANNEL_DEFAULT
from .base import PeerNode, Reach


@dataclass(frozen=True, slots=True)
class LocalNode:
    """This node's identity, addresses and active backends.

    key, subnets  the key and the subnets of our lease
    networks      the overlay's networks, one per enabled IP version
    public        our public addresses
    port          our UDP port; other nodes behind the same NAT have another one
    reaches       the ``Reach`` of each active backend, in the order of ``BACKENDS``
    """

    key: str
    subnets: Subnets
    networks: tuple[IPNetwork, ...]
    public: tuple[IPAddress, ...]
    reaches: tuple[Reach[Any], ...]
    port: int = DEFAULT_PORT


class SubnetPaths(NamedTuple):
    """The paths to one subnet of a peer.

    key    the key of the peer's lease
    paths   one entry per entry of ``LocalNode.reaches``; None: this backend has no path. At least
            one entry is not None.
    advert  the peer's advert; None: the peer is not a udptun node, or has no advert
    shares_address  the peer has our public address: both nodes are behind one NAT
    """

    key: str
    subnet: IPNetwork
    paths: tuple[Any | None, ...]
    advert: Advert | None = None
    shares_address: bool = False

    @property
    def answers_probes(self) -> bool:
        return self.advert is not None and PROBE in self.advert.features


class _Unusable(Exception):
    """A lease cannot be used. The text is the reason."""


def reach(local: LocalNode, lease: Lease) -> tuple[list[SubnetPaths], str]:
    """Return the paths to the subnets of ``lease``, and the reason why a subnet has no path.

    The reason is a sentence. The reason is "" if every subnet of an enabled IP version has a path.
    Never raises.
    """
    attributes = lease.attributes
    peer = PeerNode(attributes, {
        address.version: address for address in (attributes.public_ip, attributes.public_ipv6)
        if address is not None
    })
    advert = read_advert(attributes.backend_data)
    found: list[SubnetPaths] = []
    reasons: dict[str, None] = {}  # an ordered set: both subnets may have the same reason
    for subnet in lease.subnets:
        network = next((net for net in local.networks if net.version == subnet.version), None)
        if network is None:
            continue  # the overlay does not use this IP version, so no path is missing
        try:
            _check(local, subnet, network, peer, advert)
            paths = _paths(local, peer, subnet)
            found.append(SubnetPaths(
                lease.key, subnet, paths, advert, _shares_address(local, peer)))
        except _Unusable as exc:
            reasons[str(exc)] = None
    return found, "; ".join(reasons)


def _check(
    local: LocalNode, subnet: IPNetwork, network: IPNetwork, peer: PeerNode, advert: Advert | None
) -> None:
    if subnet.prefixlen < network.prefixlen or not _overlap(subnet, network):
        raise _Unusable(f"its subnet {subnet} is not within {network}")
    for own in local.subnets:
        if own.version == subnet.version and _overlap(own, subnet):
            raise _Unusable(f"its subnet {subnet} overlaps this node's subnet {own}")
    if not peer.public:
        raise _Unusable("its lease has no public address")
    for address in peer.public.values():
        if address in local.public and (advert is None or advert.port == local.port):
            raise _Unusable(
                f"its public address {address} is ours: this is an old lease of this node, or"
                " another node behind the same address, which then needs a UDP port of its own"
            )
        if not is_unicast(address):
            raise _Unusable(f"its public address {address} is not a unicast address")


def _shares_address(local: LocalNode, peer: PeerNode) -> bool:
    return not {*peer.public.values()}.isdisjoint(local.public)


def _overlap(one: IPNetwork, other: IPNetwork) -> bool:
    """Return the same as ``one.overlaps(other)``, but ten times faster.

    Both networks must have the same IP version.
    """
    shift = one.max_prefixlen - min(one.prefixlen, other.prefixlen)
    return (int(one.network_address) ^ int(other.network_address)) >> shift == 0


def _paths(local: LocalNode, peer: PeerNode, subnet: IPNetwork) -> tuple[Any | None, ...]:
    shares = _shares_address(local, peer)
    results = [
        f"{BACKENDS[backend.name]} cannot tell apart nodes with one public address"
        if shares and not backend.has_ports else backend.path(peer, subnet)
        for backend in local.reaches
    ]
    reasons = [result for result in results if isinstance(result, str)]
    if len(reasons) < len(results):
        return tuple(None if isinstance(result, str) else result for result in results)
    raise _Unusable("; ".join(filter(None, (_inactive(local, peer), *reasons))))


def _inactive(local: LocalNode, peer: PeerNode) -> str:
    """Return why the peer's backend prevents the peer from reaching this node.

    Return "" if the peer's backend is active on this node too.
    """
    kind = peer.attributes.backend_type or FLANNEL_DEFAULT
    active = [backend.name for backend in local.reaches]
    if kind in active:
        return ""
    if kind in BACKENDS:
        only = " and ".join(BACKENDS[name] for name in active)
        return (f"this node has only {only}, and the peer's {kind} backend ignores nodes "
                f"without {BACKENDS[kind]}")
    return f"the peer's backend is {printable(kind, 40)}, which udptun does not have"


@dataclass(slots=True)
class Delta:
    """The effect of one set of changes.

    paths    by backend, then by subnet: the new path; None: the path was removed
    subnets  the subnets of all leases that were added, changed or removed
    """

    paths: dict[str, dict[IPNetwork, Any | None]] = field(default_factory=dict)
    subnets: frozenset[IPNetwork] = frozenset()

    def of(self, backend: str) -> dict[IPNetwork, Any | None]:
        return self.paths.get(backend, {})


class Plan:
    """The paths to all peers.

    unreachable  by lease key: the reason why the peer, or one of its subnets, has no path
    carried_n    by active backend: the number of peers to which the backend carries the packets
    carriers     by subnet: the backend that carries the packets, if it is not the last one in the
                 list that has a path. A subnet without such a path is ignored
    """

    def __init__(
        self, local: LocalNode, leases: Iterable[Lease] = (),
        carriers: Mapping[IPNetwork, str] | None = None,
    ) -> None:
        self.local = local
        self.carriers = dict(carriers or {})
        self.unreachable: dict[str, str] = {}
        self.carried_n = dict.fromkeys((backend.name for backend in local.reaches), 0)
        self._by_subnet: dict[IPNetwork, SubnetPaths] = {}
        self._by_key: dict[str, list[SubnetPaths]] = {}
        self._rejected: dict[str, Lease] = {}  # leases that claim another lease's subnet
        for lease in leases:
            self._add(lease)

    def paths(self, backend: str) -> dict[IPNetwork, Any]:
        """Return all paths of one backend, by subnet."""
        for at, active in enumerate(self.local.reaches):
            if active.name == backend:
                return {subnet: found.paths[at] for subnet, found in self._by_subnet.items()
                        if found.paths[at] is not None}
        return {}

    def key_of(self, subnet: IPNetwork) -> str:
        """Return the key of the lease that has the subnet. If none has it, return the subnet as
        text."""
        found = self._by_subnet.get(subnet)
        return str(subnet) if found is None else found.key

    def __iter__(self) -> Iterator[SubnetPaths]:
        return iter(self._by_subnet.values())

    def get(self, subnet: IPNetwork) -> SubnetPaths | None:
        return self._by_subnet.get(subnet)

    def carry(self, subnet: IPNetwork, backend: str | None) -> None:
        """Set the backend that carries the packets to the subnet. None: the last backend in the
        list that has a path."""
        found = self._by_subnet.get(subnet)
        peer = () if found is None else self._by_key[found.key]
        self._count(peer, -1)
        if backend is None:
            self.carriers.pop(subnet, None)
        else:
            self.carriers[subnet] = backend
        self._count(peer, 1)

    def change(self, changes: Iterable[Change]) -> Delta:
        """Apply the changes in their order, and return the paths that differ afterwards."""
        before: dict[IPNetwork, SubnetPaths | None] = {}
        for change in changes:
            self._remove(change.key, before)
            if change.new is not None:
                self._add(change.new, before)
        if self._rejected:  # the subnet that a rejected lease claims may be free now
            for lease in [*self._rejected.values()]:
                self._remove(lease.key, before)
                self._add(lease, before)
        delta = Delta(subnets=frozenset(before))
        none = (None,) * len(self.local.reaches)
        for subnet, was in before.items():
            now = self._by_subnet.get(subnet)
            old, new = was.paths if was else none, now.paths if now else none
            for at, backend in enumerate(self.local.reaches):
                if old[at] != new[at]:
                    delta.paths.setdefault(backend.name, {})[subnet] = new[at]
        return delta

    def _remove(self, key: str, before: dict[IPNetwork, SubnetPaths | None]) -> None:
        self.unreachable.pop(key, None)
        self._rejected.pop(key, None)
        removed = self._by_key.pop(key, ())
        self._count(removed, -1)
        for found in removed:
            before.setdefault(found.subnet, found)
            del self._by_subnet[found.subnet]

    def _add(
        self, lease: Lease, before: dict[IPNetwork, SubnetPaths | None] | None = None
    ) -> None:
        if lease.key == self.local.key:
            return
        paths, why = reach(self.local, lease)
        if why:
            self.unreachable[lease.key] = why
        added: list[SubnetPaths] = []
        for found in paths:
            holder = self._by_subnet.setdefault(found.subnet, found)
            if holder is not found:
                self.unreachable[lease.key] = \
                    f"its subnet {found.subnet} already belongs to {holder.key}"
                self._rejected[lease.key] = lease
                continue
            added.append(found)
            if before is not None:
                before.setdefault(found.subnet, None)
        if added:
            self._by_key[lease.key] = added
            self._count(added, 1)

    def _count(self, peer: Sequence[SubnetPaths], by: int) -> None:
        """Add ``by`` to the count of the backend that carries the packets to the peer.

        If the peer's subnets have different carriers, the last one in the list counts.
        """
        if peer:
            at = max(self._carrier(found) for found in peer)
            self.carried_n[self.local.reaches[at].name] += by

    def _carrier(self, found: SubnetPaths) -> int:
        """Return the position in ``LocalNode.reaches`` of the backend that carries the packets."""
        usable = [at for at, path in enumerate(found.paths) if path is not None]
        chosen = self.carriers.get(found.subnet)
        return next((at for at in usable if self.local.reaches[at].name == chosen), usable[-1])
