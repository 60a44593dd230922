"""The ICMP error about one packet, and the cases in which no error is allowed.

Owns: the rules of RFC 1122 3.2.2, RFC 1812 4.3.2 and RFC 4443 2.4. Does not depend on rate limits,
on routes, or on the destination of the error. Pure functions.
"""

import struct

from .checksum import checksum, complement, transport_sum
from .packet import (
    DESTINATION_OPTIONS,
    EXTENSION_HEADERS_MAX,
    FRAGMENT,
    HOP_BY_HOP,
    IPV4_OFFSET,
    IPV6_LEN,
    PROTO_ICMP,
    PROTO_ICMP6,
    ROUTING,
    Dropped,
    IPHeader,
    parse_header,
    with_ipv4_checksum,
)

# kind: (type, code)
ICMP4 = {"no_route": (3, 0), "ttl_exceeded": (11, 0), "too_big": (3, 4)}
ICMP6 = {"no_route": (1, 0), "ttl_exceeded": (3, 0), "too_big": (2, 0)}
ICMP4_ERRORS = frozenset({3, 4, 5, 11, 12})
ICMP6_FIRST_INFORMATIONAL = 128
ICMP6_REDIRECT = 137

HOP_LIMIT = 64
TOS = 0xC0  # internetwork control: RFC 1812 4.3.2.5
ICMP4_MAX = 576  # bytes of the whole error: RFC 1812 4.3.2.3
ICMP6_MAX = 1280  # RFC 4443 2.4 (c)
MTU4_MIN = 68  # RFC 791 3.2
MTU6_MIN = 1280  # RFC 8200 5


def icmp_error(packet: bytes, kind: str, source: bytes, mtu: int = 0) -> bytes | None:
    """Return the ICMP error for the sender of ``packet``, as an IP packet, or None.

    packet   untrusted bytes from the IP header on. The error quotes them up to the declared length,
             but has at most 576 (IPv4) or 1280 (IPv6) bytes
    kind     "no_route" (IPv4 type 3 code 0, IPv6 1/0), "ttl_exceeded" (11/0, 3/0),
             "too_big" (3/4, 2/0)
    source   our address in the packet's family, 4 or 16 bytes
    mtu      "too_big" only: the largest IP packet that fits, in bytes. The reported value is
             limited to 68..65535 (IPv4), or is at least 1280 (IPv6)
    returns  None if the packet's header does not parse or if the RFCs forbid an error. They forbid
             an error about
             - an ICMP error
             - a fragment other than the first
             - a packet to a multicast or broadcast destination; exception: IPv6 too_big, which
               path MTU discovery needs
             - a packet whose source is not a unicast address
    source   RFC 792, RFC 1191 4, RFC 1122 3.2.2, RFC 1812 4.3.2; RFC 4443 2.4, 3.1 to 3.3
    """
    try:
        header = parse_header(packet)
    except Dropped:
        return None
    if header.total_len < header.header_len:
        return None
    packet = packet[: header.total_len]
    if header.version == 4:
        return _icmp4(packet, header, kind, source, mtu) if _allowed4(packet, header) else None
    return _icmp6(packet, header, kind, source, mtu) if _allowed6(packet, header, kind) else None


def _icmp4(packet: bytes, header: IPHeader, kind: str, source: bytes, mtu: int) -> bytes:
    type_, code = ICMP4[kind]
    next_hop_mtu = min(max(mtu, MTU4_MIN), 0xFFFF) if kind == "too_big" else 0
    quote = packet[: ICMP4_MAX - 20 - 8]
    body = struct.pack("!BBHHH", type_, code, 0, 0, next_hop_mtu) + quote
    body = body[:2] + complement(checksum(body)).to_bytes(2, "big") + body[4:]
    start = struct.pack("!BBHHHBBH", 0x45, TOS, 20 + len(body), 0, 0, HOP_LIMIT, PROTO_ICMP, 0)
    return with_ipv4_checksum(start + source + header.source) + body


def _icmp6(packet: bytes, header: IPHeader, kind: str, source: bytes, mtu: int) -> bytes:
    type_, code = ICMP6[kind]
    word = max(mtu, MTU6_MIN) if kind == "too_big" else 0
    quote = packet[: ICMP6_MAX - 40 - 8]
    body = struct.pack("!BBHI", type_, code, 0, word) + quote
    value = complement(transport_sum(source, header.source, PROTO_ICMP6, body))
    body = body[:2] + value.to_bytes(2, "big") + body[4:]
    start = struct.pack("!IHBB", 6 << 28, len(body), PROTO_ICMP6, HOP_LIMIT)
    return start + source + header.source + body


def _allowed4(packet: bytes, header: IPHeader) -> bool:
    """Return whether RFC 1122 3.2.2 allows an error.

    A source in 0/8, 127/8, 224/4 (multicast) or 240/4 (reserved, broadcast) is not unicast.
    """
    if header.source[0] in (0, 127) or header.source[0] >= 224:
        return False
    if 224 <= header.destination[0] < 240 or header.destination == b"\xff" * 4:
        return False
    if header.fragment_word & IPV4_OFFSET:
        return False
    if header.protocol == PROTO_ICMP:
        message = packet[header.header_len :]
        return bool(message) and message[0] not in ICMP4_ERRORS
    return True


def _allowed6(packet: bytes, header: IPHeader, kind: str) -> bool:
    """Return whether RFC 4443 2.4 (e) allows an error.

    The extension headers must be parsed to find out whether the packet is an ICMPv6 error. If they
    cannot be parsed, no error is allowed.
    """
    if header.source[0] == 0xFF or header.source in (bytes(16), bytes(15) + b"\x01"):
        return False
    if header.destination[0] == 0xFF and kind != "too_big":
        return False
    found = _upper_layer(packet, header)
    if found is None:
        return False
    protocol, message = found
    if protocol != PROTO_ICMP6:
        return True
    return bool(message) and (
        message[0] >= ICMP6_FIRST_INFORMATIONAL and message[0] != ICMP6_REDIRECT
    )


def _upper_layer(packet: bytes, header: IPHeader) -> tuple[int, bytes] | None:
    """Return the protocol after the IPv6 extension headers, and the bytes from its header on.

    Return None if the chain of extension headers is truncated or too long, or if it shows that the
    packet is a fragment other than the first.
    """
    next_header, at = header.protocol, IPV6_LEN
    seen = 0
    while next_header in (HOP_BY_HOP, ROUTING, FRAGMENT, DESTINATION_OPTIONS):
        extension = packet[at : at + 8]
        if len(extension) < 8 or seen == EXTENSION_HEADERS_MAX:
            return None
        seen += 1
        if next_header == FRAGMENT:
            if int.from_bytes(extension[2:4], "big") & 0xFFF8:
                return None
            length = 8
        else:
            length = 8 + 8 * extension[1]
        if at + length > len(packet):
            return None
        next_header, at = extension[0], at + length
    return next_header, packet[at:]
