"""The paths to each peer, through all active backends.

Owns: the checks that do not depend on a backend, the paths to all peers, which backend carries the
packets to a peer, and which peers are unreachable for which reason. Does not depend on stores,
processes, netlink or any single backend. No I/O; one thread.

A peer has a path in each backend that reaches the peer, not only in the backend that carries the
packets. If a peer loses one backend and sends through another one, this node therefore still
accepts the peer's packets. A lease is untrusted: an unusable lease makes only its own peer
unreachable. If two leases claim the same addresses, the older lease is used for them. The order in
which the leases arrive does not matter.
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
from ..host.interface import Needed
from . import BACKENDS, FLANNEL_DEFAULT
from .base import PeerNode, Reach
from .claims import Claims, Rejected


@dataclass(frozen=True, slots=True)
class LocalNode:
    """This node's identity, addresses and active backends.

    key, subnets  the key and the subnets of our lease
    networks      the overlay's networks, one per enabled IP version
    public        our public addresses
    port          our UDP port; other nodes behind the same NAT have another one
    reaches       the ``Reach`` of each active backend, in the order of ``BACKENDS``
    needed        the addresses that this host must reach without the overlay
    broadcasts    the broadcast addresses of the underlay's links
    """

    key: str
    subnets: Subnets
    networks: tuple[IPNetwork, ...]
    public: tuple[IPAddress, ...]
    reaches: tuple[Reach[Any], ...]
    port: int = DEFAULT_PORT
    needed: tuple[Needed, ...] = ()
    broadcasts: tuple[IPAddress, ...] = ()


class SubnetPaths(NamedTuple):
    """The paths to one subnet of a peer.

    key    the key of the peer's lease
    paths   one entry per entry of ``LocalNode.reaches``; None: this backend has no path. At least
            one entry is not None.
    advert  the peer's advert; None: the peer is not a udptun node, or has no advert
    shares_address  the peer has our public address: both nodes are behind one NAT
    lease   the peer's lease
    """

    key: str
    subnet: IPNetwork
    paths: tuple[Any | None, ...]
    advert: Advert | None = None
    shares_address: bool = False
    lease: Lease | None = None

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
            _check_subnet(local, subnet, network)
            _check_addresses(local, lease, peer, advert)
            paths = _paths(local, peer, subnet)
            found.append(SubnetPaths(
                lease.key, subnet, paths, advert, _shares_address(local, peer), lease))
        except _Unusable as exc:
            reasons[str(exc)] = None
    return found, "; ".join(reasons)


def _check_subnet(local: LocalNode, subnet: IPNetwork, network: IPNetwork) -> None:
    if subnet.prefixlen < network.prefixlen or not _overlap(subnet, network):
        raise _Unusable(f"its subnet {subnet} is not within {network}")
    for own in local.subnets:
        if own.version == subnet.version and _overlap(own, subnet):
            raise _Unusable(f"its subnet {subnet} overlaps this node's subnet {own}")
    for taken in local.public:
        if taken in subnet:
            raise _Unusable(f"its subnet {subnet} has this node's public address {taken}")
    for one in local.needed:
        if one.is_in(subnet):
            raise _Unusable(
                f"its subnet {subnet} would divert packets to {one.address}, {one.what}")


def _check_addresses(
    local: LocalNode, lease: Lease, peer: PeerNode, advert: Advert | None
) -> None:
    if not peer.public:
        raise _Unusable("its lease has no public address")
    for address in peer.public.values():
        if address in local.public and (advert is None or advert.port == local.port):
            raise _Unusable(
                f"its public address {address} is ours: this is an old lease of this node, or"
                " another node behind the same address; such nodes need a hosts file, in which each"
                " of them has a port of its own"
            )
        if not is_unicast(address) or address in local.broadcasts:
            raise _Unusable(f"its public address {address} is not a unicast address")
        if address.is_loopback or (address.version == 6 and address.is_link_local):
            raise _Unusable(f"its public address {address} cannot be reached from another host")
        for inner in (*lease.subnets, *local.subnets):
            if address in inner:
                raise _Unusable(
                    f"its public address {address} is in the subnet {inner} of the overlay")


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
    carriers     by subnet: the backend that carries the packets. Without an entry, or without a
                 path by this backend, the last active backend that has a path carries them
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
        self._claims = Claims(local.networks)
        self._rejected = Rejected()  # leases that claim addresses of another lease
        for lease in sorted(leases, key=lambda one: one.age):
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
        wanted = {change.key: change.new for change in changes}
        # The leases that overlap are removed too. Then all of them are added in the order of their
        # age, so that the result does not depend on the order in which they have arrived.
        wanted |= self._connected(wanted)
        for key in wanted:
            self._remove(key, before)
        for lease in sorted(filter(None, wanted.values()), key=lambda one: one.age):
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

    def _connected(self, wanted: Mapping[str, Lease | None]) -> dict[str, Lease]:
        """Return, by key, all other leases that overlap these leases, directly or through further
        leases that overlap."""
        found: dict[str, Lease] = {}
        old = (self._lease_of(key) for key in wanted)
        left = [lease for lease in (*wanted.values(), *old) if lease is not None]
        asked: set[IPNetwork] = set()
        seen: set[IPNetwork] = set()
        while left:
            for claim in self._claims.of(left.pop()):
                if claim in asked:
                    continue  # otherwise many leases with one claim would take very long
                asked.add(claim)
                for lease in (*self._holders(claim), *self._rejected.overlapping(claim, seen)):
                    if lease.key not in found and lease.key not in wanted:
                        found[lease.key] = lease
                        left.append(lease)
        return found

    def _lease_of(self, key: str) -> Lease | None:
        found = self._by_key.get(key)
        return self._rejected.get(key) if found is None else found[0].lease

    def _holders(self, claim: IPNetwork) -> list[Lease]:
        """Return the leases that have addresses of the prefix."""
        subnets = (self._by_subnet[net].lease for net in self._claims.overlapping(claim))
        return [lease for lease in (*subnets, *self._claims.leases_inside(claim))
                if lease is not None]

    def _remove(self, key: str, before: dict[IPNetwork, SubnetPaths | None]) -> None:
        self.unreachable.pop(key, None)
        self._rejected.remove(key)
        removed = self._by_key.pop(key, ())
        self._count(removed, -1)
        for found in removed:
            before.setdefault(found.subnet, found)
            del self._by_subnet[found.subnet]
            self._claims.remove_subnet(found.subnet)
        self._claims.remove_addresses(key)

    def _add(
        self, lease: Lease, before: dict[IPNetwork, SubnetPaths | None] | None = None
    ) -> None:
        if lease.key == self.local.key:
            return
        paths, why = reach(self.local, lease)
        if why:
            self.unreachable[lease.key] = why
        added: list[SubnetPaths] = []
        rejected = False
        refused = self._claim_addresses(lease) if paths else ""
        for found in paths:
            if why := refused or self._claim_subnet(lease, found.subnet):
                self.unreachable[lease.key] = why
                rejected = True
                continue
            added.append(found)
            self._by_subnet[found.subnet] = found
            if before is not None:
                before.setdefault(found.subnet, None)
        if rejected:
            self._rejected.add(lease, self._claims.of(lease))
        if added:
            self._by_key[lease.key] = added
            self._count(added, 1)

    def _claim_addresses(self, lease: Lease) -> str:
        """Claim the lease's public addresses that are in the overlay's networks. Return the reason
        why an older lease prevents this, or "".

        A public address in a subnet of the overlay cannot be reached: packets to it go into the
        overlay again.
        """
        inside = self._claims.addresses_inside(lease)
        for address in inside:
            for subnet in self._claims.overlapping(address):
                return (f"its public address {address.network_address} is in the subnet {subnet} "
                        f"of {self._by_subnet[subnet].key}, whose lease is older")
        self._claims.add_addresses(lease, inside)
        return ""

    def _claim_subnet(self, lease: Lease, subnet: IPNetwork) -> str:
        """Claim a subnet. Return the reason why an older lease prevents this, or ""."""
        for held in self._claims.overlapping(subnet):
            relation = "already belongs to" if held == subnet else f"overlaps the subnet {held} of"
            return f"its subnet {subnet} {relation} {self._by_subnet[held].key}, whose lease is " \
                "older"
        for other in self._claims.leases_inside(subnet):
            if other.key != lease.key:
                return (f"its subnet {subnet} has the public address of {other.key}, whose lease "
                        f"is older")
        self._claims.add_subnet(subnet)
        return ""

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
