"""Which way leads to each peer: VXLAN, our UDP data path, both, or none and why.

Owns the choice, from what we are and what a peer's lease says, and the sum of all choices: the
forwarder's table, the VXLAN peers, who is unreachable. Refuses to know stores, processes and
netlink. Pure, no I/O; one thread.

A peer that speaks UDP has its routes in the forwarder also while VXLAN reaches it: the host's
routes, which are more specific than the TUN's, choose VXLAN, and a peer that has just lost its own
VXLAN, and sends by UDP, is not refused. What a lease says is never trusted to be sound: one that
cannot be used costs its own peer alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import FieldError
from ..leases.advert import Advert, read
from ..leases.base import Attributes, Change, Lease, Subnets
from ..model import MIN_MTU6, IPAddress, IPNetwork, Route
from ..net.vxlan import VxlanPeer

UDP_BACKENDS = ("", "udp")  # flannel's own UDP backend leaves the type out


@dataclass(frozen=True, slots=True)
class Here:
    """What this node is and can do.

    key, subnets  of our lease
    networks      the overlay's, one per family that is enabled
    public        our addresses as peers know them
    outer         the IP versions we can send UDP over
    udp_port      where our forwarder listens, and peers that name no port; None: we have no UDP
    vxlan         the IP versions we have a VXLAN device for
    vni           of these
    direct        VXLAN peers on our link are routed to without encapsulation
    """

    key: str
    subnets: Subnets
    networks: tuple[IPNetwork, ...]
    public: tuple[IPAddress, ...]
    outer: tuple[int, ...]
    udp_port: int | None
    vxlan: tuple[int, ...] = ()
    vni: int = 1
    direct: bool = False


@dataclass(frozen=True, slots=True)
class Reach:
    """How one peer is reached; at most one route and one VXLAN peer per family.

    why  a family that cannot be reached, in a sentence; ""
    """

    routes: tuple[Route, ...] = ()
    peers: tuple[VxlanPeer, ...] = ()
    why: str = ""

    @property
    def subnets(self) -> set[IPNetwork]:
        return {route.dst for route in self.routes} | {peer.subnet for peer in self.peers}


class _NoWay(Exception):
    """The sentence that says why."""


def reach(here: Here, lease: Lease) -> Reach:
    """How ``lease``'s node is reached from here. Never raises."""
    advert = read(lease.attributes)
    routes: list[Route] = []
    peers: list[VxlanPeer] = []
    whys: list[str] = []
    for subnet in lease.subnets:
        network = next((net for net in here.networks if net.version == subnet.version), None)
        if network is None:
            continue  # a family that this network does not have is nobody's loss
        try:
            _check(here, lease, subnet, network)
            peer = _vxlan(here, lease, subnet)
            route = _udp(here, lease, subnet, advert)
            if peer is None and route is None:
                raise _NoWay(_no_common_backend(here, lease, advert))
        except _NoWay as exc:
            whys.append(str(exc))
            continue
        if peer is not None:
            peers.append(peer)
        if route is not None:
            routes.append(route)
    return Reach(tuple(routes), tuple(peers), "; ".join(dict.fromkeys(whys)))


def _check(here: Here, lease: Lease, subnet: IPNetwork, network: IPNetwork) -> None:
    if not subnet.subnet_of(network):  # type: ignore[arg-type]  # both are of one version
        raise _NoWay(f"its subnet {subnet} is not within {network}")
    for own in here.subnets:
        if own.version == subnet.version and own.overlaps(subnet):
            raise _NoWay(f"its subnet {subnet} overlaps our own {own}")
    public = _public(lease.attributes)
    if not public:
        raise _NoWay("its lease has no public address")
    for address in public.values():
        if address in here.public:
            raise _NoWay(f"its public address {address} is ours: a former lease of this node")
        if not _sound(address):
            raise _NoWay(f"its public address {address} is not that of a host")


def _public(attributes: Attributes) -> dict[int, IPAddress]:
    both = (attributes.public_ip, attributes.public_ipv6)
    return {address.version: address for address in both if address is not None}


def _sound(address: IPAddress) -> bool:
    """As ``model.parse_next_hop``, for an address that is one already."""
    if address.version == 4:
        return 0 < address.packed[0] < 224
    return not (address.is_unspecified or address.is_multicast or address.ipv4_mapped)


def _vxlan(here: Here, lease: Lease, subnet: IPNetwork) -> VxlanPeer | None:
    said = lease.attributes
    endpoint = _public(said).get(subnet.version)
    if subnet.version not in here.vxlan or said.backend_type != "vxlan" or endpoint is None:
        return None
    data: Any = said.backend_data if subnet.version == 4 else said.backend_v6_data
    if not isinstance(data, Mapping) or not isinstance(data.get("VtepMAC"), str):
        return None
    if data.get("VNI", here.vni) != here.vni:
        return None
    try:
        return VxlanPeer(subnet, data["VtepMAC"], endpoint, here.direct)
    except FieldError:
        return None


def _udp(here: Here, lease: Lease, subnet: IPNetwork, advert: Advert | None) -> Route | None:
    said = lease.attributes
    if here.udp_port is None:
        return None
    if advert is None:
        if said.backend_type not in UDP_BACKENDS or subnet.version == 6:
            return None  # flannel's own UDP backend takes IPv4 and would spoil IPv6
        advert = Advert(here.udp_port)
    if advert.mtu is not None and subnet.version == 6 and advert.mtu < MIN_MTU6:
        return None
    # Both ends choose alike, since each takes packets only from where it would send them: the
    # inner packet's own version, or else the one there is.
    public = _public(said)
    order = sorted(here.outer, key=lambda version: version != subnet.version)
    via = next((public[version] for version in order if version in public), None)
    return None if via is None else Route(subnet, via, advert.port, advert.mtu)


def _no_common_backend(here: Here, lease: Lease, advert: Advert | None) -> str:
    kind = lease.attributes.backend_type
    if advert is None and kind in UDP_BACKENDS and here.udp_port is not None:
        return "it is a stock flannel, whose udp backend carries IPv4 over IPv4 only"
    if kind == "vxlan" and here.vxlan:
        return "the VXLAN data in its lease do not fit ours, and it does not say that it has UDP"
    if kind == "vxlan" and advert is None:
        return "its vxlan backend ignores a node that has only UDP, as this one"
    if here.udp_port is None:
        return "this node has only VXLAN, and it has none that fits"
    if advert is None:
        return f"its backend is {kind}, which is none of ours"
    return "we have no underlay address of a family that it has"


@dataclass(slots=True)
class Delta:
    """What one set of changes did; ``None`` for what is gone. Empty where nothing differs."""

    routes: dict[IPNetwork, Route | None] = field(default_factory=dict)
    peers: dict[IPNetwork, VxlanPeer | None] = field(default_factory=dict)


class Plan:
    """How every peer is reached.

    routes, peers  the forwarder's table and VXLAN's, by subnet
    unreachable    by lease key, why in a sentence
    """

    def __init__(self, here: Here, leases: Iterable[Lease] = ()) -> None:
        self.here = here
        self.routes: dict[IPNetwork, Route] = {}
        self.peers: dict[IPNetwork, VxlanPeer] = {}
        self.unreachable: dict[str, str] = {}
        self._reach: dict[str, Reach] = {}
        self._holder: dict[IPNetwork, str] = {}
        self._losers: dict[str, Lease] = {}  # they claim a subnet that another one has
        for lease in leases:
            self._admit(lease)

    @property
    def vxlan_n(self) -> int:
        return sum(1 for found in self._reach.values() if found.peers)

    @property
    def udp_n(self) -> int:
        return sum(1 for found in self._reach.values() if found.routes and not found.peers)

    def key_of(self, subnet: IPNetwork) -> str:
        """Whose it is; the subnet itself, in words, when nobody's."""
        return self._holder.get(subnet, str(subnet))

    def change(self, changes: Iterable[Change]) -> Delta:
        """Take changes in, in their order; what is different afterwards."""
        before = Delta()
        for change in changes:
            self._withdraw(change.key, before)
            if change.new is not None:
                self._admit(change.new, before)
        if self._losers:  # the subnet that one wants may be free by now
            losers, self._losers = self._losers, {}
            for lease in losers.values():
                self._withdraw(lease.key, before)
                self._admit(lease, before)
        return Delta(
            {subnet: self.routes.get(subnet) for subnet, was in before.routes.items()
             if self.routes.get(subnet) != was},
            {subnet: self.peers.get(subnet) for subnet, was in before.peers.items()
             if self.peers.get(subnet) != was},
        )

    def _withdraw(self, key: str, before: Delta) -> None:
        self.unreachable.pop(key, None)
        self._losers.pop(key, None)
        found = self._reach.pop(key, None)
        for subnet in found.subnets if found is not None else ():
            _note(before, self, subnet)
            del self._holder[subnet]
            self.routes.pop(subnet, None)
            self.peers.pop(subnet, None)

    def _admit(self, lease: Lease, before: Delta | None = None) -> None:
        if lease.key == self.here.key:
            return
        found = reach(self.here, lease)
        if found.why:
            self.unreachable[lease.key] = found.why
        for subnet in found.subnets:
            if (holder := self._holder.get(subnet)) is not None:
                self.unreachable[lease.key] = f"its subnet {subnet} is {holder}'s already"
                self._losers[lease.key] = lease
                return
        self._reach[lease.key] = found
        for subnet in found.subnets:
            if before is not None:
                _note(before, self, subnet)
            self._holder[subnet] = lease.key
        self.routes.update((route.dst, route) for route in found.routes)
        self.peers.update((peer.subnet, peer) for peer in found.peers)


def _note(before: Delta, plan: Plan, subnet: IPNetwork) -> None:
    """What was there for this subnet before the first of the changes."""
    before.routes.setdefault(subnet, plan.routes.get(subnet))
    before.peers.setdefault(subnet, plan.peers.get(subnet))
