"""A forwarder without sockets: it returns the output for one frame or datagram, and counts.

Owns: the order of the steps in each direction, the source check, and the destination of ICMP
errors. Does not depend on system calls, batches, merging or rate limits. One thread.
"""

import ipaddress
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from udptun.drops import DECAP, DIRECTIONS, ENCAP
from udptun.model import Endpoint, IPAddress, IPNetwork, Route

from .cut import cut, cut_unfinished
from .ecn import take_ecn, traffic_class
from .finish import finish_checksum, is_unfinished
from .fragment import fragment
from .icmp import icmp_error
from .packet import (
    FRAGMENT,
    IP_MAX,
    IPV4_OFFSET,
    PROTO_UDP,
    Dropped,
    check_packet,
    decrement_hop_limit,
    parse_header,
)
from .probe import REPLY, REQUEST, Probe, build_probe, parse_probe

Datagram = tuple[Endpoint, bytes]  # destination and UDP payload

UDP_LEN = 8
OUTER_LEN = {4: 20 + UDP_LEN, 6: 40 + UDP_LEN}


@dataclass
class Encapsulated:
    """The output for one frame from the TUN."""

    datagrams: list[Datagram] = field(default_factory=list)
    icmp: list[bytes] = field(default_factory=list)  # IP packets to write to our own TUN


@dataclass
class Decapsulated:
    """The output for one datagram from the socket."""

    packets: list[bytes] = field(default_factory=list)  # to write to the TUN
    icmp: list[Datagram] = field(default_factory=list)  # errors to send back to the inner sender
    probe: Probe | None = None  # a probe, which is consumed
    replies: list[Datagram] = field(default_factory=list)  # at most one reply to a probe


@dataclass
class Counts:
    """Counters of one direction, in inner IP packets and probes:
    read + generated = delivered + consumed + drops."""

    read: int = 0
    generated: int = 0
    delivered: int = 0
    consumed: int = 0


class ReferenceForwarder:
    """The path of one packet, in both directions.

    routes            prefixes may overlap; the longest prefix that covers an address is used
    own_addresses     addresses of this host; they are refused as inner source addresses
    tun_addresses     addresses of the TUN, at most one per family; they are the source addresses
                      of our ICMP errors
    source_check      "strict": conditions 1 to 3; "peer": condition 1; "off": no condition.
                      1. The outer address belongs to a peer.
                      2. The outer port is that of a peer at this address, or one from which a route
                      to this address lets the peer send.
                      3. The inner source address is in a subnet routed to this address, and
                      condition 2 holds for this route; or it is the outer address itself.
    own_subnets       None: every inner destination is accepted; else only those in one of these
                      prefixes and ``tun_addresses``
    path_mtu          the largest outer packet in bytes, for the endpoints whose path MTU is known
    underlay_mtu      the largest outer packet in bytes for all other endpoints
    tun_mtu           MTU of the TUN. A longer TCP packet from a peer's kernel is a super-packet
    dscp              of the datagrams; None: that of the packet

    ``counts[direction]`` and ``drops[reason, direction]`` are updated immediately. A frame counts
    as its segments, or as 1 if the frame cannot be cut. Fragments after the first count as
    generated. An ICMP error counts as generated and delivered in the direction in which the error
    is sent.
    """

    def __init__(
        self,
        routes: Iterable[Route],
        *,
        own_addresses: Iterable[IPAddress] = (),
        tun_addresses: Iterable[IPAddress] = (),
        source_check: str = "strict",
        own_subnets: Iterable[IPNetwork] | None = None,
        path_mtu: Mapping[Endpoint, int] | None = None,
        underlay_mtu: int = 1500,
        tun_mtu: int = IP_MAX, all_express: bool = False,
        dscp: int | None = 0,
    ) -> None:
        self.routes = list(routes)
        self.own_addresses = frozenset(own_addresses)
        self.tun_addresses: dict[int, IPAddress] = {
            address.version: address for address in tun_addresses
        }
        self.source_check = source_check
        self.own_subnets = None if own_subnets is None else list(own_subnets)
        self.path_mtu = dict(path_mtu or {})
        self.underlay_mtu = underlay_mtu
        self.tun_mtu = tun_mtu
        self.dscp = dscp
        self.marked = self.unexpected = 0  # see Taken
        self.all_express = all_express
        self.counts = {direction: Counts() for direction in DIRECTIONS}
        self.drops: Counter[tuple[str, str]] = Counter()

    def encap(self, frame: bytes) -> Encapsulated:
        """TUN to UDP: cut a frame, look up the route, decrement the hop limit, fragment packets.

        frame  virtio_net_hdr and IP packet, as in ``cut``

        All dropped segments of a super-packet have the same drop reason. So at most one ICMP error
        is sent, about the first segment.
        """
        result = Encapsulated()
        counts = self.counts[ENCAP]
        try:
            packets = cut(frame)
        except Dropped as drop:
            counts.read += 1
            self.drops[drop.reason, ENCAP] += 1
            return result
        counts.read += len(packets)
        for packet in packets:
            route = self.look_up(parse_header(packet).destination)
            try:
                if route is None:
                    raise Dropped("no_route")
                if self._is_for_peer(packet):
                    raise Dropped("recursion")
                forwarded = decrement_hop_limit(packet)
                pieces = fragment(forwarded, self.inner_mtu(route))
            except Dropped as drop:
                self.drops[drop.reason, ENCAP] += 1
                mtu = self.inner_mtu(route) if route is not None else 0
                if not result.icmp:
                    result.icmp = self._icmp_to_tun(packet, drop.reason, mtu)
                continue
            counts.generated += len(pieces) - 1
            counts.delivered += len(pieces)
            result.datagrams += [(Endpoint(route.via, route.port), piece) for piece in pieces]
        return result

    def outer_class(self, to: Endpoint, packet: bytes) -> int:
        """Return the traffic class of the datagram that carries this packet."""
        inner = traffic_class(packet)
        ecn = any(route.ecn for route in self.routes if (route.via, route.port) == (
            to.address, to.port))
        dscp = inner >> 2 if self.dscp is None else self.dscp
        return dscp << 2 | (inner & 3 if ecn else 0)

    def decap(self, outer_source: Endpoint, datagram: bytes, ecn: int = 0) -> Decapsulated:
        """UDP to TUN: parse, check the sender and the inner source, copy the congestion
        mark, decrement the hop limit.

        datagram  the UDP payload: an IP packet or a probe. An empty payload is a keepalive
        ecn       the ECN field of the outer header
        """
        result = Decapsulated()
        counts = self.counts[DECAP]
        counts.read += 1
        try:
            result.probe = parse_probe(datagram)
            if result.probe is not None:
                self._admit_prober(outer_source)
                result.replies = self._reply(outer_source, result.probe)
                counts.consumed += 1
                return result
            packet = datagram[: check_packet(datagram)]
            self._admit_peer(outer_source)
            self._admit_source(outer_source, packet)
            self._admit_destination(packet)
            taken = take_ecn(packet, ecn)
            self.marked += taken.marked
            self.unexpected += taken.unexpected
            packet = taken.packet
            packet = decrement_hop_limit(packet)
            if not self._may_send_unfinished(outer_source):
                result.packets = [packet]
            elif is_unfinished(packet) and len(packet) > self.tun_mtu:
                result.packets = cut_unfinished(packet)
            else:
                result.packets = [finish_checksum(packet)]
        except Dropped as drop:
            self.drops[drop.reason, DECAP] += 1
            result.probe = None
            if drop.reason == "ttl_exceeded":
                result.icmp = self._icmp_to_peer(packet)
            return result
        counts.read += len(result.packets) - 1
        counts.delivered += len(result.packets)
        return result

    def _is_for_peer(self, packet: bytes) -> bool:
        """Return whether the packet is UDP from this host to the endpoint of a peer.

        Of a fragment other than the first, only the addresses are known.
        """
        header = parse_header(packet)
        payload = packet[header.header_len :]
        protocol, offset = header.protocol, header.fragment_word & IPV4_OFFSET
        if header.version == 6:
            offset = 0
            if protocol == FRAGMENT and len(payload) >= 8:
                protocol, offset = payload[0], int.from_bytes(payload[2:4], "big") >> 3
                payload = payload[8:]
        if protocol != PROTO_UDP or ipaddress.ip_address(header.source) not in self.own_addresses:
            return False
        ports = {
            route.port for route in self.routes if route.via.packed == header.destination
        }
        if offset:
            return bool(ports)
        return len(payload) >= UDP_LEN and int.from_bytes(payload[2:4], "big") in ports

    def look_up(self, address: bytes) -> Route | None:
        """Return the route with the longest prefix that covers ``address`` (4 or 16 bytes)."""
        wanted = ipaddress.ip_address(address)
        covering = [
            route for route in self.routes
            if route.dst.version == wanted.version and wanted in route.dst
        ]
        return max(covering, key=lambda route: route.dst.prefixlen, default=None)

    def inner_mtu(self, route: Route) -> int:
        """Return the largest inner packet that the path and the MTU of this route allow."""
        outer = self.path_mtu.get(Endpoint(route.via, route.port), self.underlay_mtu)
        fits = outer - OUTER_LEN[route.via.version]
        return fits if route.mtu is None else min(fits, route.mtu)

    def _admit_peer(self, outer_source: Endpoint) -> None:
        if self.source_check == "off":
            return
        there = [route for route in self.routes if route.via == outer_source.address]
        if not there:
            raise Dropped("unknown_peer")
        if self.source_check == "peer" or outer_source.port in {route.port for route in there}:
            return
        named = [ports for route in there if (ports := route.source_port) is not None]
        if not named or not min(named)[0] <= outer_source.port <= max(last for _, last in named):
            raise Dropped("source_port")

    def _admit_prober(self, outer_source: Endpoint) -> None:
        """Accept probes only from peers that answer probes, in every mode."""
        self._admit_peer(outer_source)
        peers = sorted(
            (route.port, route.probe) for route in self.routes if route.via == outer_source.address
        )
        if not peers or outer_source.port == 0:
            raise Dropped("unknown_peer")
        ports = {port for port, _ in peers}
        port = outer_source.port if outer_source.port in ports else min(ports)
        if (port, True) not in peers:
            raise Dropped("bad_version")

    def _may_send_unfinished(self, outer_source: Endpoint) -> bool:
        """Return whether the packet may come from the kernel of the peer."""
        if self.all_express:
            return True
        peers = sorted({route.port for route in self.routes if route.via == outer_source.address})
        if not peers:
            return False
        port = outer_source.port if outer_source.port in peers else peers[0]
        return any(route.express for route in self.routes
                   if (route.via, route.port) == (outer_source.address, port))

    def _reply(self, sender: Endpoint, probe: Probe) -> list[Datagram]:
        if probe.kind != REQUEST:
            return []
        self.counts[ENCAP].generated += 1
        self.counts[ENCAP].delivered += 1
        return [(sender, build_probe(probe._replace(kind=REPLY, heard_ms=0)))]

    def _admit_source(self, outer_source: Endpoint, packet: bytes) -> None:
        source = parse_header(packet).source
        inner = ipaddress.ip_address(source)
        if inner in self.own_addresses:
            raise Dropped("own_source")
        if self.source_check != "strict" or inner == outer_source.address:
            return
        route = self.look_up(source)
        if route is None or route.via != outer_source.address:
            raise Dropped("source_not_routed")
        first, last = route.source_port or (route.port, route.port)
        if outer_source.port != route.port and not first <= outer_source.port <= last:
            raise Dropped("source_not_routed")

    def _admit_destination(self, packet: bytes) -> None:
        if self.own_subnets is None:
            return
        to = ipaddress.ip_address(parse_header(packet).destination)
        if to not in self.tun_addresses.values() and not any(to in net for net in self.own_subnets):
            raise Dropped("destination_not_own")

    def _icmp_about(self, packet: bytes, reason: str, mtu: int) -> bytes | None:
        """Return the ICMP error about a packet, or None if none may be sent.

        None also means that the TUN has no address of the packet's family.
        """
        source = self.tun_addresses.get(parse_header(packet).version)
        return None if source is None else icmp_error(packet, reason, source.packed, mtu)

    def _icmp_to_tun(self, packet: bytes, reason: str, mtu: int) -> list[bytes]:
        error = self._icmp_about(packet, reason, mtu)
        if error is None:
            return []
        self.counts[DECAP].generated += 1
        self.counts[DECAP].delivered += 1
        return [error]

    def _icmp_to_peer(self, packet: bytes) -> list[Datagram]:
        """Return a "time exceeded" error for the peer to which the inner source is routed.

        Return an empty list if no error may be sent, without a route, or if the error is too long.
        """
        error = self._icmp_about(packet, "ttl_exceeded", 0)
        route = self.look_up(parse_header(packet).source)
        if error is None or route is None or len(error) > self.inner_mtu(route):
            return []
        self.counts[ENCAP].generated += 1
        self.counts[ENCAP].delivered += 1
        return [(Endpoint(route.via, route.port), error)]
