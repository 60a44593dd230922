"""Endpoints, routes and peers: values, limits, text form and JSON form.

A leaf: imports only ``errors``. Objects are frozen and validated here. Owns the grammar of a route
as users write it (``ROUTE_WORDS``, or a JSON object), and the limits of ports and MTUs. The
compiled core has a second parser of this grammar. It parses whole tables without the interpreter.
Tests compare the two parsers. Threading: any thread.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from .errors import FieldError

DEFAULT_PORT = 8285
MAX_PORT = 65535
MIN_MTU = 68  # RFC 791: every IPv4 router forwards 68 octets without fragmentation
MIN_MTU6 = 1280  # RFC 8200 section 5: the MTU of an IPv6 link is at least this
MAX_MTU = 65535
MAX_UDP_PAYLOAD = 65507  # over IPv4 (RFC 791, RFC 768)
MAX_MARK = 0xFFFFFFFF
MAX_DSCP = 63
INHERIT = "inherit"  # as a DSCP: that of the packet
DEFAULT_DSCP = "0"  # as text
MAX_SNAPLEN = 65536
MAX_SAMPLE = 1_000_000
MIN_TUN_MTU = 576  # RFC 791: every host accepts datagrams of 576 octets

SOURCE_CHECKS = ("strict", "peer", "off")  # the default first
ADMITS = ("any", "own")  # the default first
ACCELERATES = ("off", "auto")  # the default first
# Why no packet passes in the kernel although nothing is wrong: the peers do not have the path.
NO_EXPRESS_PEER = "no peer can receive in the kernel"
NO_EXPRESS_WORD = "its route has no `express`"
OVERHEAD = {4: 28, 6: 48}  # bytes of the outer IP and UDP headers, by IP version
PROBE_REQUEST, PROBE_REPLY = 1, 2  # ProbeRecord.kind
NEVER_HEARD = 0xFFFFFFFF
ROUTE_FLAGS = ("probe", "express", "ecn")  # each is a field of Route
ROUTE_WORDS = "DST via IP [port P] [mtu M] [source-port P] [probe] [express] [ecn]"
ANY_PORT = (1, MAX_PORT)  # as Route.source_port

IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address
IPNetwork = ipaddress.IPv4Network | ipaddress.IPv6Network


def parse_address(field: str, value: object, where: str = "") -> IPAddress:
    if isinstance(value, IPAddress):
        return value
    try:
        if not isinstance(value, str) or "%" in value:
            raise ValueError
        return ipaddress.ip_address(value)
    except ValueError:
        raise FieldError(field, value, "an IPv4 or IPv6 address", where) from None


def is_unicast(address: IPAddress) -> bool:
    """Return whether the address can be the destination of a datagram to a single host."""
    if isinstance(address, ipaddress.IPv4Address):
        return 0 < address.packed[0] < 224
    return not (address.is_unspecified or address.is_multicast or address.ipv4_mapped)


# Packets to these addresses must not be routed into the overlay.
RESERVED: tuple[tuple[IPNetwork, str], ...] = tuple(
    (ipaddress.ip_network(prefix), name) for prefix, name in (
        ("0.0.0.0/8", "this host"), ("127.0.0.0/8", "loopback"), ("169.254.0.0/16", "link-local"),
        ("224.0.0.0/4", "multicast"), ("255.255.255.255/32", "broadcast"),
        ("::/96", "unspecified and loopback"), ("::ffff:0:0/96", "IPv4-mapped"),
        ("fe80::/10", "link-local"), ("ff00::/8", "multicast"),
    ))


def parse_next_hop(field: str, value: object, where: str = "") -> IPAddress:
    """Parse a unicast address to which a datagram can be sent."""
    address = parse_address(field, value, where)
    if not is_unicast(address):
        raise FieldError(field, value, "a unicast address", where)
    return address


def parse_prefix(field: str, value: object, where: str = "") -> IPNetwork:
    """Parse the prefix of a network, in CIDR form with its length.

    Host bits must be 0, because 10.0.0.1/8 is usually a typing error. The length is required,
    because 10.244.0.0 without a length usually is one too: ip(8) reads it as 10.244.0.0/32.
    """
    if isinstance(value, str) and "/" not in value:
        expected = "a prefix with its length, such as 10.244.0.0/16"
        raise FieldError(field, value, expected, where)
    return parse_destination(field, value, where)


def parse_destination(field: str, value: object, where: str = "") -> IPNetwork:
    """Parse the destination of a route: a prefix, or one address. Host bits must be 0."""
    if isinstance(value, IPNetwork):
        return value
    try:
        if not isinstance(value, str) or "%" in value:
            raise ValueError
        _, slash, length = value.partition("/")
        if slash and not (length.isascii() and length.isdigit()):
            raise ValueError
        interface = ipaddress.ip_interface(value)
    except ValueError:
        raise FieldError(field, value, "a prefix such as 10.244.2.0/24", where) from None
    if interface.ip != interface.network.network_address:
        expected = f"a prefix without host bits ({interface.network})"
        raise FieldError(field, value, expected, where)
    return interface.network


def parse_number(field: str, value: object, low: int, high: int, where: str = "") -> int:
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) <= 9:
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise FieldError(field, value, f"a whole number from {low} to {high}", where)
    return value


def parse_dscp(value: object, field: str = "dscp") -> int | None:
    """Parse ``inherit``, which is None, or a DSCP. None is accepted too."""
    if value is None or value == INHERIT:
        return None
    try:
        return parse_number(field, value, 0, MAX_DSCP)
    except FieldError:
        raise FieldError(field, value, f"{INHERIT}, or a DSCP from 0 to {MAX_DSCP}") from None


def dscp_text(dscp: int | None) -> str:
    return INHERIT if dscp is None else str(dscp)


def parse_source_port(value: object, where: str = "") -> tuple[int, int]:
    """Parse ``any``, a port, or the first and the last port as ``P-Q``."""
    if value == "any":
        return ANY_PORT
    first, dash, last = value.partition("-") if isinstance(value, str) else (value, "", "")
    try:
        low = parse_number("source_port", first, 1, MAX_PORT, where)
        return low, parse_number("source_port", last, low, MAX_PORT, where) if dash else low
    except FieldError:
        expected = f"any, a port from 1 to {MAX_PORT}, or the first and last port, such as 100-115"
        raise FieldError("source_port", value, expected, where) from None


def source_port_json(ports: tuple[int, int]) -> int | str:
    """Return the JSON form of Route.source_port. It is also the text form."""
    if ports == ANY_PORT:
        return "any"
    first, last = ports
    return first if first == last else f"{first}-{last}"


@dataclass(frozen=True, slots=True)
class Mark:
    """A mark of packets (SO_MARK). A packet has it if its mark has ``value`` in the bits of
    ``mask``. Text: ``0x1000/0x1000``; without a mask, all bits count."""

    value: int
    mask: int

    @classmethod
    def parse(cls, text: str, field: str = "mark") -> Mark:
        expected = "VALUE/MASK, such as 0x1000/0x1000: a value that is not 0, within the mask"
        if not isinstance(text, str):
            raise FieldError(field, text, expected)
        try:
            value, slash, mask = text.partition("/")
            mark = cls(int(value, 0), int(mask, 0) if slash else MAX_MARK)
            if not 0 < mark.mask <= MAX_MARK or not 0 < mark.value & mark.mask == mark.value:
                raise ValueError
        except ValueError:
            raise FieldError(field, text, expected) from None
        return mark

    def __str__(self) -> str:
        return f"{self.value:#x}/{self.mask:#x}"


@dataclass(frozen=True, slots=True)
class Endpoint:
    """An address and UDP port on the underlay. Text: ``192.0.2.1:8285``, ``[2001:db8::1]:8285``."""

    address: IPAddress
    port: int = DEFAULT_PORT

    @classmethod
    def parse(
        cls, text: str, field: str = "endpoint", default_port: int = DEFAULT_PORT
    ) -> Endpoint:
        if not isinstance(text, str):
            raise FieldError(field, text, "ADDRESS, ADDRESS:PORT or [IPV6]:PORT")
        host, port = text, str(default_port)
        if text.startswith("["):
            host, bracket, rest = text[1:].partition("]")
            if not bracket or (rest and not rest.startswith(":")):
                raise FieldError(field, text, "ADDRESS, ADDRESS:PORT or [IPV6]:PORT")
            port = rest[1:] if rest else port
        elif text.count(":") == 1:
            host, _, port = text.partition(":")
        return cls(parse_address(field, host), parse_number(f"{field} port", port, 1, MAX_PORT))

    def __str__(self) -> str:
        host = f"[{self.address}]" if self.address.version == 6 else str(self.address)
        return f"{host}:{self.port}"


@dataclass(frozen=True, slots=True)
class Route:
    """Packets to ``dst`` are sent to the peer at ``via``:``port``.

    mtu    largest inner packet for this route, in bytes; None: only the path limits the size
    probe  the peer answers probes, so the forwarder may measure the path to it
    source_port  first and last of the further ports from which the peer may send under
                 the source check strict; None: no other port
    express  the peer can receive in the kernel, and may send from there
    ecn  the peer copies the congestion marks of the path to the packets (RFC 6040)
    """

    dst: IPNetwork
    via: IPAddress
    port: int = DEFAULT_PORT
    mtu: int | None = None
    probe: bool = False
    source_port: tuple[int, int] | None = None
    express: bool = False
    ecn: bool = False

    @classmethod
    def make(
        cls, dst: object, via: object, port: object = DEFAULT_PORT, mtu: object = None,
        probe: object = False, source_port: object = None, express: object = False,
        ecn: object = False, *, where: str = "",
    ) -> Route:
        """Build a route from untrusted values. Raises FieldError, which names the field."""
        prefix = parse_destination("dst", dst, where)
        next_hop = parse_next_hop("via", via, where)
        port_number = parse_number("port", port, 1, MAX_PORT, where)
        low = MIN_MTU if prefix.version == 4 else MIN_MTU6
        limit = None if mtu is None else parse_number("mtu", mtu, low, MAX_MTU, where)
        flags = {"probe": probe, "express": express, "ecn": ecn}
        for name, value in flags.items():
            if not isinstance(value, bool):
                raise FieldError(name, value, "true or false", where)
        sources = None if source_port is None else parse_source_port(source_port, where)
        return cls(
            prefix, next_hop, port_number, limit, bool(probe), sources, bool(express), bool(ecn))

    @classmethod
    def parse(cls, text: str, where: str = "") -> Route:
        """Parse the text of a route, as in a route file: ``ROUTE_WORDS``."""
        if not isinstance(text, str):
            raise FieldError("route", text, f"a Route, or {ROUTE_WORDS}", where)
        return cls.from_words(text.split(), where)

    @classmethod
    def from_words(cls, words: Sequence[str], where: str = "") -> Route:
        """Parse ``ROUTE_WORDS``, split on blanks."""
        if len(words) < 3 or words[1] != "via":
            raise FieldError("route", " ".join(words), ROUTE_WORDS, where)
        values: dict[str, object] = {}
        rest = iter(words[3:])
        for name in rest:
            key = name.replace("-", "_")
            if name not in ("port", "mtu", "source-port", *ROUTE_FLAGS) or key in values:
                expected = "port P, mtu M, source-port P, probe, express or ecn, each once"
                raise FieldError("route", name, expected, where)
            value = True if name in ROUTE_FLAGS else next(rest, None)
            if value is None:
                raise FieldError(name, "", f"a value after the word {name}", where)
            values[key] = value
        return cls.make(words[0], words[2], where=where, **values)

    @classmethod
    def from_json(cls, value: object, where: str = "") -> Route:
        """Parse ``{"dst", "via", "port"?, "mtu"?, "source_port"?, "probe"?, "express"?,
        "ecn"?}``. ``mtu`` and ``source_port`` may be null."""
        if not isinstance(value, Mapping):
            raise FieldError("route", value, "an object with dst and via", where)
        for name in value:
            if name not in ("dst", "via", "port", "mtu", "source_port", *ROUTE_FLAGS):
                expected = "only dst, via, port, mtu, source_port, probe, express and ecn"
                raise FieldError("route", name, expected, where)
        for name in ("dst", "via"):
            if name not in value:
                raise FieldError(name, None, "a value (it is required)", where)
        return cls.make(**value, where=where)

    def to_json(self) -> dict[str, object]:
        """Return the JSON object. It has ``source_port`` only if it is set, and those of
        ``ROUTE_FLAGS`` that are true."""
        values: dict[str, object] = {
            "dst": str(self.dst), "via": str(self.via), "port": self.port, "mtu": self.mtu,
        }
        if self.source_port is not None:
            values["source_port"] = source_port_json(self.source_port)
        return values | dict.fromkeys(self.flags, True)

    @property
    def flags(self) -> list[str]:
        """The words of ``ROUTE_FLAGS`` that the route has."""
        return [name for name in ROUTE_FLAGS if getattr(self, name)]

    def __str__(self) -> str:
        mtu = "" if self.mtu is None else f" mtu {self.mtu}"
        ports = self.source_port
        source = "" if ports is None else f" source-port {source_port_json(ports)}"
        flags = "".join(f" {name}" for name in self.flags)
        return f"{self.dst} via {self.via} port {self.port}{mtu}{source}{flags}"


def as_endpoint(value: Endpoint | str, field: str = "endpoint") -> Endpoint:
    return value if isinstance(value, Endpoint) else Endpoint.parse(value, field)


def as_route(value: Route | str) -> Route:
    return value if isinstance(value, Route) else Route.parse(value)


class PeerError(NamedTuple):
    """What the underlay reported about a datagram to a peer.

    origin    "icmp" or "icmp6": an ICMP error arrived; "local": this host's kernel reported it
              later; "send": the kernel refused the send
    type, code  of the ICMP error
    reporter  the sender of the ICMP error, in packed form; empty: not known
    time_ns   monotonic
    """

    errno: int
    origin: str
    type: int
    code: int
    reporter: bytes
    time_ns: int


class Peer(NamedTuple):
    """A peer and its counters, as the core reports them.

    address     address in packed form
    last_seen   seconds since the last accepted packet, probe or keepalive from the peer; None: none
                has arrived
    probe       whether a route to the peer has ``probe``
    last_rx_ns  monotonic time at which it arrived, in nanoseconds; 0: none has arrived
    path_mtu_ns  monotonic time at which the path MTU was learned; 0: it is that of the interface
    df_mtu       size of the largest datagram that is sent with DF; 0: all are sent with DF
    errors_n    number of errors so far that were stored as last_error
    """

    address: bytes
    port: int
    path_mtu: int
    encap_packets: int
    encap_bytes: int
    decap_packets: int
    decap_bytes: int
    last_seen: float | None
    probe: bool
    last_rx_ns: int
    path_mtu_ns: int
    df_mtu: int
    errors_n: int
    last_error: PeerError | None


class DroppedPacket(NamedTuple):
    """The first bytes of a dropped packet.

    worker   index of the worker that dropped it
    number   of the record: 1, 2, ... for each worker, direction and reason
    time_ns  monotonic
    packets  the number of packets that were dropped together with this one, itself included
    length   of the packet in bytes
    address  of the other end, in packed form: the sender of the datagram, or the peer; b"": none
    port     of the other end
    head     the first bytes of the packet, which may be no IP packet
    """

    worker: int
    number: int
    time_ns: int
    packets: int
    length: int
    address: bytes
    port: int
    head: bytes


@dataclass(frozen=True, slots=True)
class CaptureFilter:
    """Which packets a capture records. A packet matches if it matches each part that is not empty.

    direction  from this host to a peer (out), or the opposite (in)
    dropped    only dropped packets
    peers      one of these outer addresses; with a port that is not 0, also this port
    networks   the inner address on the peer's side is in one of these
    hosts      each of these is the inner source or destination
    ports      each of these is the inner source or destination port
    protocols  one of these numbers of transport protocols
    snaplen    the largest number of bytes of a packet that is recorded
    sample     record one of this number of matching packets
    """

    direction: str = "both"
    dropped: bool = False
    peers: tuple[tuple[IPAddress, int], ...] = ()
    networks: tuple[IPNetwork, ...] = ()
    hosts: tuple[IPAddress, ...] = ()
    ports: tuple[int, ...] = ()
    protocols: tuple[int, ...] = ()
    snaplen: int = MAX_SNAPLEN
    sample: int = 1


class RefusedSender(NamedTuple):
    """A refused sender, whose packets were dropped as ``unknown_peer`` or ``source_port``.

    address  in packed form
    port     of its last datagram
    packets  since the core last began to count this address: it keeps only a few addresses
    last_ns  time of the last one, monotonic
    reason   drop reason of the last one
    """

    address: bytes
    port: int
    packets: int
    last_ns: int
    reason: str


class ProbeRecord(NamedTuple):
    """A probe that has arrived over UDP, as the core reports it.

    kind         PROBE_REQUEST (the worker has answered it already) or PROBE_REPLY
    address      of the sender, in packed form
    heard_ms     milliseconds since the sender last received a probe from us; NEVER_HEARD: never
    size         bytes of the message
    received_ns  monotonic time of arrival
    """

    kind: int
    address: bytes
    port: int
    token: int
    heard_ms: int
    size: int
    received_ns: int


@dataclass(frozen=True, slots=True)
class RouteDiff:
    """The effect of a change: numbers of changed routes, and the generation after the change."""

    generation: int
    added: int = 0
    changed: int = 0
    removed: int = 0

    def to_json(self) -> dict[str, int]:
        return {
            "generation": self.generation, "added": self.added,
            "changed": self.changed, "removed": self.removed,
        }
