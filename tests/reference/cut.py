"""Cut a frame from a TUN with offloads into IP packets with correct checksums.

Owns: the interpretation of virtio_net_hdr in frames read from the TUN. Does not depend on hop
limits, routes or MTUs. Pure functions.
"""

import struct

from .checksum import checksum, complement, transport_sum
from .finish import finish_checksum
from .packet import (
    DESTINATION_OPTIONS,
    EXTENSION_HEADERS,
    EXTENSION_HEADERS_MAX,
    HOP_BY_HOP,
    IP_MAX,
    IPV6_LEN,
    PROTO_TCP,
    PROTO_UDP,
    ROUTING,
    Dropped,
    IPHeader,
    check_packet,
    parse_header,
    with_ipv4_checksum,
)

# linux/virtio_net.h: flags, gso_type, hdr_len, gso_size, csum_start, csum_offset; host order
VNET_HDR = struct.Struct("=BBHHHH")
NEEDS_CSUM = 1
GSO_NONE = 0
GSO_TCPV4 = 1
GSO_TCPV6 = 4
GSO_UDP_L4 = 5
GSO_ECN = 0x80  # a flag that is combined with the TCP types

TCP_FIN, TCP_SYN, TCP_RST, TCP_PSH, TCP_ACK, TCP_URG, TCP_ECE, TCP_CWR = (1 << i for i in range(8))
TCP_CSUM_OFFSET = 16
UDP_CSUM_OFFSET = 6
IPV6_MTU_MIN = 1280
HEADERS_MAX = 120  # maximum for one segment: IPv4 and TCP headers, both with all options


def cut(frame: bytes) -> list[bytes]:
    """Return the IP packets in one frame read from a TUN with IFF_VNET_HDR.

    frame    10 bytes virtio_net_hdr in host order, then an IP packet. If a GSO type is set, the
             packet is a super-packet of at most 65535 bytes. Its IP and UDP length fields are
             ignored. hdr_len is ignored, because the kernel sets a wrong value on forwarded
             packets. csum_start and csum_offset are valid only with NEEDS_CSUM.
    returns  whole packets in stream order, without padding behind the declared length. The hop
             limit is unchanged. Segments get new checksums. If the packet is not a super-packet,
             its checksum is completed with NEEDS_CSUM, and unchanged without.
    drops    as check_packet (for a super-packet: as parse_header);
             bad_gso: unknown type; type does not match version or protocol; gso_size 0; a fragment;
             over 65535 bytes; checksum offsets that do not match the headers, are inside the IP
             header or outside the packet;
             bad_l4_header: the TCP or UDP header is truncated or has an impossible length, or the
             IPv6 extension headers before it cannot be parsed (``_behind_extensions``); more than
             120 bytes of headers
    source   linux/virtio_net.h, RFC 9293 3.1, RFC 3168 6.1.2, RFC 768, RFC 6864, RFC 8200 4, 8.1
    """
    if len(frame) < VNET_HDR.size:
        raise Dropped("short_packet")
    flags, gso_type, _, gso_size, csum_start, csum_offset = VNET_HDR.unpack_from(frame)
    packet = frame[VNET_HDR.size :]
    if gso_type == GSO_NONE:
        packet = packet[: check_packet(packet)]
        if flags & NEEDS_CSUM:
            if csum_start < parse_header(packet).header_len:
                raise Dropped("bad_gso")
            packet = _complete_checksum(packet, csum_start, csum_offset)
        return [packet]

    header = parse_header(packet)
    protocol = _protocol_of(gso_type, header.version)
    found, transport_at = header.protocol, header.header_len
    if header.version == 6:
        found, transport_at = _behind_extensions(packet, header.protocol)
    if found != protocol:
        raise Dropped("bad_gso")
    transport = packet[transport_at:]
    transport_len = _transport_header_len(protocol, transport)
    if transport_at + transport_len > HEADERS_MAX:
        raise Dropped("bad_l4_header")
    field = TCP_CSUM_OFFSET if protocol == PROTO_TCP else UDP_CSUM_OFFSET
    if gso_size == 0 or header.is_fragment or len(packet) > IP_MAX:
        raise Dropped("bad_gso")
    if flags & NEEDS_CSUM and (csum_start, csum_offset) != (transport_at, field):
        raise Dropped("bad_gso")

    payload = transport[transport_len:]
    pieces = [payload[at : at + gso_size] for at in range(0, len(payload), gso_size)] or [b""]
    segments = []
    for index, piece in enumerate(pieces):
        if protocol == PROTO_TCP:
            first, last = index == 0, index == len(pieces) - 1
            segment = _tcp_segment(transport[:transport_len], index * gso_size, first, last)
        else:
            segment = transport[:4] + struct.pack("!HH", transport_len + len(piece), 0)
        segment = _with_checksum(header, protocol, segment + piece, field)
        ip = _ip_header(packet[:transport_at], header.version, index, len(segment))
        segments.append(ip + segment)
    return segments


def cut_unfinished(packet: bytes) -> list[bytes]:
    """Return the segments of a super-packet that a peer's kernel has sent whole.

    The size of the segments is unknown, so they are short enough for all links that carry IPv6
    (RFC 8200 5), whatever the length of their headers. Return the packet with a finished checksum
    if it is not TCP or its headers do not parse.
    """
    gso_type = GSO_TCPV4 if packet[0] >> 4 == 4 else GSO_TCPV6
    try:
        return cut(VNET_HDR.pack(0, gso_type, 0, IPV6_MTU_MIN - HEADERS_MAX, 0, 0) + packet)
    except Dropped:
        return [finish_checksum(packet)]


def _complete_checksum(packet: bytes, start: int, offset: int) -> bytes:
    """Complete a checksum that the kernel left to the device (NEEDS_CSUM).

    The field at start + offset contains the sum of the pseudo-header. The function replaces this
    value by the complement of the sum of packet[start:]. For UDP (offset 6), 0 is sent as 0xFFFF.
    """
    field = start + offset
    if field + 2 > len(packet):
        raise Dropped("bad_gso")
    value = complement(checksum(packet[start:]))
    if value == 0 and offset == UDP_CSUM_OFFSET:
        value = 0xFFFF
    return packet[:field] + value.to_bytes(2, "big") + packet[field + 2 :]


def _protocol_of(gso_type: int, version: int) -> int:
    if gso_type & ~GSO_ECN in (GSO_TCPV4, GSO_TCPV6):
        if version != (4 if gso_type & ~GSO_ECN == GSO_TCPV4 else 6):
            raise Dropped("bad_gso")
        return PROTO_TCP
    if gso_type == GSO_UDP_L4:
        return PROTO_UDP
    raise Dropped("bad_gso")


def _behind_extensions(packet: bytes, next_header: int) -> tuple[int, int]:
    """Return the protocol after the IPv6 extension headers, and the offset of its header.

    drops  bad_l4_header: the chain ends outside the packet or has more than 8 headers; a fragment,
           ESP or authentication header, because the headers of the segments would differ from those
           of the super-packet; a routing header with segments left, because the checksum then
           covers the last address of the route instead of the destination in the IP header
           (RFC 8200 8.1)
    """
    at = IPV6_LEN
    seen = 0
    while next_header in EXTENSION_HEADERS:
        if next_header not in (HOP_BY_HOP, ROUTING, DESTINATION_OPTIONS):
            raise Dropped("bad_l4_header")
        extension = packet[at : at + 8]
        if len(extension) < 8 or seen == EXTENSION_HEADERS_MAX:
            raise Dropped("bad_l4_header")
        if next_header == ROUTING and extension[3] != 0:
            raise Dropped("bad_l4_header")
        seen += 1
        next_header, at = extension[0], at + 8 + 8 * extension[1]
        if at > len(packet):
            raise Dropped("bad_l4_header")
    return next_header, at


def _transport_header_len(protocol: int, transport: bytes) -> int:
    """Return the length of the TCP header with options, or of the UDP header."""
    fixed = 20 if protocol == PROTO_TCP else 8
    if len(transport) < fixed:
        raise Dropped("bad_l4_header")
    length = (transport[12] >> 4) * 4 if protocol == PROTO_TCP else fixed
    if not fixed <= length <= len(transport):
        raise Dropped("bad_l4_header")
    return length


def _tcp_segment(tcp: bytes, seq_offset: int, first: bool, last: bool) -> bytes:
    """Return the TCP header of one segment, with checksum 0.

    The sequence number is increased by seq_offset. Only the first segment keeps CWR (RFC 3168
    6.1.2). Only the last segment keeps FIN and PSH, because they refer to the last byte.
    """
    seq = (int.from_bytes(tcp[4:8], "big") + seq_offset) % 2**32
    flags = tcp[13]
    if not first:
        flags &= ~TCP_CWR
    if not last:
        flags &= ~(TCP_FIN | TCP_PSH)
    return (
        tcp[:4] + seq.to_bytes(4, "big") + tcp[8:13] + bytes([flags]) + tcp[14:16] + b"\0\0"
        + tcp[18:]
    )


def _with_checksum(header: IPHeader, protocol: int, segment: bytes, offset: int) -> bytes:
    """Return the segment with its checksum set. For UDP, 0 is sent as 0xFFFF."""
    value = complement(transport_sum(header.source, header.destination, protocol, segment))
    if value == 0 and protocol == PROTO_UDP:
        value = 0xFFFF
    return segment[:offset] + value.to_bytes(2, "big") + segment[offset + 2 :]


def _ip_header(headers: bytes, version: int, index: int, transport_len: int) -> bytes:
    """Return the IP header of segment number ``index``, including IPv6 extension headers.

    The length field is that of the segment. The IPv4 id is the super-packet's id + index.
    """
    if version == 6:
        length = len(headers) - IPV6_LEN + transport_len
        return headers[:4] + length.to_bytes(2, "big") + headers[6:]
    ident = (int.from_bytes(headers[4:6], "big") + index) % 2**16
    lengths = struct.pack("!HH", len(headers) + transport_len, ident)
    return with_ipv4_checksum(headers[:2] + lengths + headers[6:])
