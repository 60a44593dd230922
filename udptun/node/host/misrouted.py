"""Find peers whose packets the kernel does not route through the overlay.

Owns: what is wrong with a route, and the sentence about it. For each peer, the kernel must route
the peer's subnets to a device of the overlay, and the peer's own address to the underlay. Causes of
a wrong route are a more specific route of another program, a policy rule, or a peer's address
within the overlay. A peer's address may have a route through another interface, for example on a
host with several uplinks; so this is reported only while the peer does not answer, and no other
peer answers through this interface. Does not see rules for pods that depend on the incoming
interface or on a mark. Changes nothing on the host. Runs on the daemon's loop.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from ...leases.base import Lease
from ...model import IPAddress, IPNetwork
from ...net.lookup import (
    Question,
    Way,
    device_index,
    device_name,
    has_route,
    look_up,
    matched_routes,
    routes_within,
)
from ...net.netlink import Netlink

PEERS_N = 500  # peers per call of the kernel, and per look at a part of the peers


@dataclass(frozen=True, slots=True)
class Outer:
    """The datagrams of this node, and what was measured of them.

    device   index of the underlay's interface; 0: they may use any
    sources  their source address, by IP version
    mark     their mark; 0: none
    silent   the keys of the peers that do not answer
    answering  the keys of the peers that answer

    ``Misrouted`` sets the others:

    lost     the IP versions whose source address the host does not have
    used     the interfaces through which answering peers are reached
    """

    device: int = 0
    sources: Mapping[int, IPAddress] = field(default_factory=dict)
    mark: int = 0
    silent: Collection[str] = ()
    answering: Collection[str] = ()
    lost: Collection[int] = ()
    used: Collection[int] = ()


UNKNOWN = Outer()


@dataclass(frozen=True, slots=True)
class _Wrong:
    """A misrouted peer.

    text      the sentence about it, without the route
    question  the packet whose route completes the sentence; None: the sentence is complete
    """

    text: str
    question: Question | None = None


class Misrouted:
    """Looks at the peers: at all of them, or at some of them in turn.

    found  by lease key: a sentence about each misrouted peer
    """

    def __init__(self, netlink: Netlink) -> None:
        self.found: dict[str, str] = {}
        self._netlink = netlink
        self._next = 0

    async def look(
        self, peers: Sequence[Lease], own: Collection[IPNetwork], devices: Collection[int],
        networks: Collection[IPNetwork], *, direct: bool, everyone: bool, outer: Outer = UNKNOWN,
    ) -> None:
        """Ask the kernel about the peers. Raises DeviceError.

        own       this node's subnets; their first addresses are those of the overlay's devices
        devices   the interface indexes of the overlay's devices
        networks  the overlay's networks
        direct    a route whose gateway is the peer itself is right: DirectRouting is on
        everyone  ask about all peers; else about the next PEERS_N, and about those that are silent
                  or were found before
        """
        outer = await self._present(outer)
        foreign = [
            (prefix, way.gateway, text)
            for prefix, way, text in await routes_within(self._netlink, networks, devices)
            if not any(_overlap(prefix, one) for one in own)
        ]
        sources: dict[int, IPAddress] = {
            subnet.version: subnet.network_address for subnet in own}
        known = {lease.key for lease in peers}
        self.found = {key: why for key, why in self.found.items() if key in known}
        for _ in range(0, len(peers) if everyone else 1, PEERS_N):
            if self._next >= len(peers):
                self._next = 0
            part = peers[self._next : self._next + PEERS_N]
            self._next += PEERS_N
            if not everyone:
                asked = {lease.key for lease in part}
                again = {*outer.silent, *self.found} - asked
                part = [*part, *[lease for lease in peers if lease.key in again][:PEERS_N]]
            wrong = await self._look_at(part, sources, devices, networks, foreign, direct, outer)
            looked = {lease.key for lease in part}
            self.found = {
                key: why for key, why in self.found.items() if key not in looked} | wrong

    async def _present(self, outer: Outer) -> Outer:
        """Return ``outer`` without the addresses that the host has lost, and without a device that
        has no route, such as a dummy device with the node's address."""
        local = await self._netlink.local_addresses() if outer.sources else frozenset()
        device = outer.device
        if device and outer.silent and not await has_route(self._netlink, device):
            device = 0
        sources = {version: one for version, one in outer.sources.items() if one in local}
        return replace(outer, device=device, sources=sources,
                       lost=outer.sources.keys() - sources.keys())

    async def _look_at(
        self, peers: Sequence[Lease], sources: Mapping[int, IPAddress], devices: Collection[int],
        networks: Collection[IPNetwork],
        foreign: Sequence[tuple[IPNetwork, IPAddress | None, str]], direct: bool, outer: Outer,
    ) -> dict[str, str]:
        """Return the misrouted ones among these peers."""
        asked = [(lease, *item) for lease in peers
                 for item in _questions(lease, sources, networks, outer)]
        ways = await look_up(self._netlink, [question for _, question, _ in asked])
        outer = replace(outer, used={
            way.device for (lease, _, subnet), way in zip(asked, ways, strict=True)
            if subnet is None and lease.key in outer.answering})
        wrong: dict[str, _Wrong] = {}
        for (lease, question, subnet), way in zip(asked, ways, strict=True):
            if lease.key not in wrong and \
                    (fault := _fault(
                        lease, question, subnet, way, devices, foreign, direct,
                        outer)) is not None:
                wrong[lease.key] = fault
        questions = [one.question for one in wrong.values() if one.question is not None]
        routes = iter(await matched_routes(self._netlink, questions))
        return {key: one.text if one.question is None else f"{one.text} {next(routes)}"
                for key, one in wrong.items()}


def _fault(
    lease: Lease, question: Question, subnet: IPNetwork | None, way: Way,
    devices: Collection[int], foreign: Sequence[tuple[IPNetwork, IPAddress | None, str]],
    direct: bool, outer: Outer,
) -> _Wrong | None:
    """Return what is wrong with the kernel's answer ``way``; None: nothing."""
    if subnet is None:  # the question is about the peer's own address
        return _outer_fault(lease, question, way, devices, outer)
    public = _public(lease) if direct else ()
    for prefix, gateway, text in foreign:
        if prefix.prefixlen >= subnet.prefixlen and gateway not in public and \
                _overlap(prefix, subnet):
            return _Wrong(
                f"packets to {prefix} do not enter the overlay: they take the route {text}")
    if way.device in devices or way.gateway in public:
        return None
    text = f"packets to {subnet} do not enter the overlay:"
    return _Wrong(f"{text} {way.error}") if way.error else \
        _Wrong(f"{text} they take the route", question)


def _outer_fault(
    lease: Lease, question: Question, way: Way, devices: Collection[int], outer: Outer
) -> _Wrong | None:
    to = f"its address {question.to}"
    if way.device in devices:
        return _Wrong(f"packets to {to} enter {device_name(way.device)} and so the overlay itself,"
                      " by the route", question)
    if way.error and question.to.version in outer.lost:
        return None  # the kernel may have removed its routes too; the check of the interface tells
    if way.error:
        return _Wrong(f"there is no route to {to}: {way.error}")
    here = (0, outer.device, device_index("lo"), *outer.used)
    if not outer.device or way.device in here or lease.key not in outer.silent:
        return None
    return _Wrong(f"it does not answer, and packets to {to} leave through"
                  f" {device_name(way.device)} instead of {device_name(outer.device)},"
                  " by the route", question)


def _questions(
    lease: Lease, sources: Mapping[int, IPAddress], networks: Collection[IPNetwork], outer: Outer
) -> Iterator[tuple[Question, IPNetwork | None]]:
    """Yield the questions about one peer. Each has the subnet, or None for the peer's address."""
    for subnet in lease.subnets:
        if any(net.version == subnet.version for net in networks) and subnet.num_addresses > 1:
            yield Question(subnet[1], sources.get(subnet.version)), subnet
    for address in _public(lease):
        yield Question(address, outer.sources.get(address.version), outer.mark), None


def _public(lease: Lease) -> list[IPAddress]:
    attributes = lease.attributes
    return [one for one in (attributes.public_ip, attributes.public_ipv6) if one is not None]


def _overlap(one: IPNetwork, other: IPNetwork) -> bool:
    return one.version == other.version and one.overlaps(other)
