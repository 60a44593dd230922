"""Find peers whose packets the kernel does not route through the overlay.

Owns: what is wrong with a route, and the sentence about it. For each peer the kernel must route the
peer's subnets to a device of the overlay, and the peer's own address to the underlay. Another
program's more specific route, a policy rule, or a peer's address within the overlay make it differ.
Does not see rules that depend on the incoming interface or on a mark. Changes nothing on the host.
Runs on the daemon's loop.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from ...leases.base import Lease
from ...model import IPAddress, IPNetwork
from ...net.lookup import Question, Way, device_name, look_up, matched_route, routes_within
from ...net.netlink import Netlink

PEERS_N = 500  # peers per look; the next look continues with the others


class Misrouted:
    """Looks at the peers in turn.

    found  by lease key: a sentence about each misrouted peer
    """

    def __init__(self, netlink: Netlink) -> None:
        self.found: dict[str, str] = {}
        self._netlink = netlink
        self._next = 0

    async def look(
        self, peers: Sequence[Lease], own: Collection[IPNetwork], devices: Collection[int],
        networks: Collection[IPNetwork],
    ) -> None:
        """Ask the kernel about the next PEERS_N peers. Raises DeviceError.

        own       this node's subnets; their first addresses are those of the overlay's devices
        devices   the interface indexes of the overlay's devices
        networks  the overlay's networks
        """
        if self._next >= len(peers):
            self._next = 0
        part = peers[self._next : self._next + PEERS_N]
        self._next += PEERS_N
        foreign = [
            (prefix, way.gateway, text)
            for prefix, way, text in await routes_within(self._netlink, networks, devices)
            if not any(_overlap(prefix, one) for one in own)
        ]
        sources: dict[int, IPAddress] = {
            subnet.version: subnet.network_address for subnet in own}
        asked = [(lease, *item) for lease in part for item in _questions(lease, sources, networks)]
        ways = await look_up(self._netlink, [question for _, question, _ in asked])
        wrong: dict[str, str] = {}
        for (lease, question, subnet), way in zip(asked, ways, strict=True):
            if lease.key in wrong:
                continue
            if text := await self._fault(lease, question, subnet, way, devices, foreign):
                wrong[lease.key] = text
        known = {lease.key for lease in peers}
        looked = {lease.key for lease in part}
        kept = {key: why for key, why in self.found.items() if key in known and key not in looked}
        self.found = kept | wrong

    async def _fault(
        self, lease: Lease, question: Question, subnet: IPNetwork | None, way: Way,
        devices: Collection[int], foreign: Sequence[tuple[IPNetwork, IPAddress | None, str]],
    ) -> str:
        if subnet is None:  # the question is about the peer's own address
            if way.device in devices:
                route = await matched_route(self._netlink, question)
                return (f"packets to its address {question.to} enter {device_name(way.device)}"
                        f" and so the overlay itself, by the route {route}")
            return f"there is no route to its address {question.to}: {way.error}" \
                if way.error else ""
        public = _public(lease)
        for prefix, gateway, text in foreign:
            if prefix.prefixlen >= subnet.prefixlen and gateway not in public and \
                    _overlap(prefix, subnet):
                return f"packets to {prefix} do not enter the overlay: they take the route {text}"
        if way.device in devices or way.gateway in public:  # a direct route has such a gateway
            return ""
        route = way.error or f"they take the route {await matched_route(self._netlink, question)}"
        return f"packets to {subnet} do not enter the overlay: {route}"


def _questions(
    lease: Lease, sources: dict[int, IPAddress], networks: Collection[IPNetwork]
) -> Iterator[tuple[Question, IPNetwork | None]]:
    """Yield the questions about one peer. Each has the subnet, or None for the peer's address."""
    for subnet in lease.subnets:
        if any(net.version == subnet.version for net in networks) and subnet.num_addresses > 1:
            yield Question(subnet[1], sources.get(subnet.version)), subnet
    for address in _public(lease):
        yield Question(address), None


def _public(lease: Lease) -> list[IPAddress]:
    attributes = lease.attributes
    return [one for one in (attributes.public_ip, attributes.public_ipv6) if one is not None]


def _overlap(one: IPNetwork, other: IPNetwork) -> bool:
    return one.version == other.version and one.overlaps(other)
