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

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

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


class Way(NamedTuple):
    """How one subnet of a peer is reached: by either, or by both. ``key``: of the peer's lease."""

    key: str
    subnet: IPNetwork
    route: Route | None
    peer: VxlanPeer | None


class _NoWay(Exception):
    """The sentence that says why."""


_Public = Mapping[int, IPAddress]  # by IP version


def reach(here: Here, lease: Lease) -> tuple[list[Way], str]:
    """How ``lease``'s node is reached from here, at most one way per family; and why a family of
    it cannot be, in a sentence, "" where all can. Never raises."""
    said = lease.attributes
    advert = read(said)
    public: _Public = {address.version: address for address in (said.public_ip, said.public_ipv6)
                       if address is not None}
    ways: list[Way] = []
    why = ""
    for subnet in lease.subnets:
        network = next((net for net in here.networks if net.version == subnet.version), None)
        if network is None:
            continue  # a family that this network does not have is nobody's loss
        try:
            _check(here, subnet, network, public)
            peer = _vxlan(here, said, subnet, public)
            route = _udp(here, said, subnet, public, advert)
            if peer is None and route is None:
                raise _NoWay(_no_common_backend(here, said, advert))
            ways.append(Way(lease.key, subnet, route, peer))
        except _NoWay as exc:
            why = "; ".join(dict.fromkeys(filter(None, (why, str(exc)))))
    return ways, why


def _check(here: Here, subnet: IPNetwork, network: IPNetwork, public: _Public) -> None:
    if subnet.prefixlen < network.prefixlen or not _overlap(subnet, network):
        raise _NoWay(f"its subnet {subnet} is not within {network}")
    for own in here.subnets:
        if own.version == subnet.version and _overlap(own, subnet):
            raise _NoWay(f"its subnet {subnet} overlaps our own {own}")
    if not public:
        raise _NoWay("its lease has no public address")
    for address in public.values():
        if address in here.public:
            raise _NoWay(f"its public address {address} is ours: a former lease of this node")
        if not _sound(address):
            raise _NoWay(f"its public address {address} is not that of a host")


def _overlap(one: IPNetwork, other: IPNetwork) -> bool:
    """Of one version. As ``ipaddress`` has it, at a tenth of the time: this is done per lease."""
    shift = one.max_prefixlen - min(one.prefixlen, other.prefixlen)
    return (int(one.network_address) ^ int(other.network_address)) >> shift == 0


def _sound(address: IPAddress) -> bool:
    """As ``model.parse_next_hop``, for an address that is one already."""
    if address.version == 4:
        return 0 < address.packed[0] < 224
    return not (address.is_unspecified or address.is_multicast or address.ipv4_mapped)


def _vxlan(
    here: Here, said: Attributes, subnet: IPNetwork, public: _Public
) -> VxlanPeer | None:
    endpoint = public.get(subnet.version)
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


def _udp(
    here: Here, said: Attributes, subnet: IPNetwork, public: _Public, advert: Advert | None
) -> Route | None:
    if here.udp_port is None:
        return None
    port, mtu = here.udp_port, None
    if advert is not None:
        port, mtu = advert.port, advert.mtu
        if mtu is not None and subnet.version == 6 and mtu < MIN_MTU6:
            return None
    elif said.backend_type not in UDP_BACKENDS or subnet.version == 6:
        return None  # flannel's own UDP backend takes IPv4 and would spoil IPv6
    # Both ends choose alike, since each takes packets only from where it would send them: the
    # inner packet's own version, or else the one there is.
    for version in (subnet.version, 10 - subnet.version):
        if version in here.outer and version in public:
            return Route(subnet, public[version], port, mtu)
    return None


def _no_common_backend(here: Here, said: Attributes, advert: Advert | None) -> str:
    kind = said.backend_type
    if here.udp_port is None:
        return "this node has only VXLAN, and the peer has none that fits"
    if advert is not None:
        return "we have no underlay address of a family that it has, or its MTU is too small"
    if kind in UDP_BACKENDS:
        return "it is a stock flannel, whose udp backend carries IPv4 over IPv4 only"
    if kind == "vxlan" and here.vxlan:
        return "the VXLAN data in its lease do not fit ours, and it does not say that it has UDP"
    if kind == "vxlan":
        return "its vxlan backend ignores a node that has only UDP, as this one"
    return f"its backend is {kind}, which is none of ours"


@dataclass(slots=True)
class Delta:
    """What one set of changes did; ``None`` for what is gone. Empty where nothing differs."""

    routes: dict[IPNetwork, Route | None] = field(default_factory=dict)
    peers: dict[IPNetwork, VxlanPeer | None] = field(default_factory=dict)


class Plan:
    """How every peer is reached.

    unreachable    by lease key, why in a sentence
    udp_n          peers that UDP alone leads to
    vxlan_n        peers that VXLAN leads to
    """

    def __init__(self, here: Here, leases: Iterable[Lease] = ()) -> None:
        self.here = here
        self.unreachable: dict[str, str] = {}
        self.udp_n = self.vxlan_n = 0
        self._ways: dict[IPNetwork, Way] = {}
        self._reached: dict[str, list[Way]] = {}
        self._losers: dict[str, Lease] = {}  # they claim a subnet that another one has
        for lease in leases:
            self._admit(lease)

    @property
    def routes(self) -> dict[IPNetwork, Route]:
        """The forwarder's table, by subnet."""
        return {net: way.route for net, way in self._ways.items() if way.route is not None}

    @property
    def peers(self) -> dict[IPNetwork, VxlanPeer]:
        """VXLAN's, by subnet."""
        return {net: way.peer for net, way in self._ways.items() if way.peer is not None}

    def key_of(self, subnet: IPNetwork) -> str:
        """Whose it is; the subnet itself, in words, when nobody's."""
        way = self._ways.get(subnet)
        return str(subnet) if way is None else way.key

    def change(self, changes: Iterable[Change]) -> Delta:
        """Take changes in, in their order; what is different afterwards."""
        before: dict[IPNetwork, Way | None] = {}
        for change in changes:
            self._withdraw(change.key, before)
            if change.new is not None:
                self._admit(change.new, before)
        if self._losers:  # the subnet that one wants may be free by now
            for lease in [*self._losers.values()]:
                self._withdraw(lease.key, before)
                self._admit(lease, before)
        delta = Delta()
        for subnet, was in before.items():
            now = self._ways.get(subnet)
            if (route := now and now.route) != (was and was.route):
                delta.routes[subnet] = route
            if (peer := now and now.peer) != (was and was.peer):
                delta.peers[subnet] = peer
        return delta

    def _withdraw(self, key: str, before: dict[IPNetwork, Way | None]) -> None:
        self.unreachable.pop(key, None)
        self._losers.pop(key, None)
        ways = self._reached.pop(key, ())
        self._count(ways, -1)
        for way in ways:
            before.setdefault(way.subnet, way)
            del self._ways[way.subnet]

    def _admit(self, lease: Lease, before: dict[IPNetwork, Way | None] | None = None) -> None:
        if lease.key == self.here.key:
            return
        ways, why = reach(self.here, lease)
        if why:
            self.unreachable[lease.key] = why
        had: list[Way] = []
        for way in ways:
            holder = self._ways.setdefault(way.subnet, way)
            if holder is not way:
                self.unreachable[lease.key] = f"its subnet {way.subnet} is {holder.key}'s already"
                self._losers[lease.key] = lease
                continue
            had.append(way)
            if before is not None:
                before.setdefault(way.subnet, None)
        if had:
            self._reached[lease.key] = had
            self._count(had, 1)

    def _count(self, ways: Sequence[Way], by: int) -> None:
        if any(way.peer is not None for way in ways):
            self.vxlan_n += by
        elif ways:
            self.udp_n += by
