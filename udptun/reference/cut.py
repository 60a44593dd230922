"""Cut what a TUN with offloads hands over into plain IP packets with right checksums.

Owns: the meaning of virtio_net_hdr on the way out. Refuses to know: hop limits, routes, MTUs.
Pure functions.
"""

import struct

from .checksum import checksum, complement, transport_sum
from .packet import (
    EXTENSION_HEADERS,
    IP_MAX,
    PROTO_TCP,
    PROTO_UDP,
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
GSO_ECN = 0x80  # or'ed to the TCP types

TCP_FIN, TCP_SYN, TCP_RST, TCP_PSH, TCP_ACK, TCP_URG, TCP_ECE, TCP_CWR = (1 << i for i in range(8))
TCP_CSUM_OFFSET = 16
UDP_CSUM_OFFSET = 6


def cut(frame: bytes) -> list[bytes]:
    """The IP packets in one frame read from a TUN with IFF_VNET_HDR.

    frame    10 bytes virtio_net_hdr in host order, then an IP packet; with a GSO type that is a
             super-packet of at most 65535 bytes whose IP and UDP length fields are not believed.
             hdr_len is a hint that the kernel gets wrong on forwarded packets: ignored.
             csum_start and csum_offset mean something only with NEEDS_CSUM.
    returns  whole packets in stream order, hop limit untouched, padding behind the declared length
             removed. Checksums: of segments made anew; of a plain packet completed if NEEDS_CSUM,
             else left as they came.
    drops    as check_packet (of a super-packet: as parse_header);
             bad_gso: unknown type; type at odds with version or protocol; gso_size 0; a fragment;
             over 65535 bytes; checksum offsets at odds with the headers or outside the packet;
             bad_l4_header: the TCP or UDP header is cut off or its length is impossible, or IPv6
             extension headers stand before it
    source   linux/virtio_net.h, RFC 9293 3.1, RFC 3168 6.1.2, RFC 768, RFC 6864
    """
    if len(frame) < VNET_HDR.size:
        raise Dropped("short_packet")
    flags, gso_type, _, gso_size, csum_start, csum_offset = VNET_HDR.unpack_from(frame)
    packet = frame[VNET_HDR.size :]
    if gso_type == GSO_NONE:
        packet = packet[: check_packet(packet)]
        if flags & NEEDS_CSUM:
            packet = _complete_checksum(packet, csum_start, csum_offset)
        return [packet]

    header = parse_header(packet)
    protocol = _protocol_of(gso_type, header)
    transport = packet[header.header_len :]
    transport_len = _transport_header_len(protocol, transport)
    field = TCP_CSUM_OFFSET if protocol == PROTO_TCP else UDP_CSUM_OFFSET
    if gso_size == 0 or header.is_fragment or len(packet) > IP_MAX:
        raise Dropped("bad_gso")
    if flags & NEEDS_CSUM and (csum_start, csum_offset) != (header.header_len, field):
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
        segments.append(_ip_header(packet, header, index, len(segment)) + segment)
    return segments


def _complete_checksum(packet: bytes, start: int, offset: int) -> bytes:
    """Finish what the kernel left: the field at start + offset holds the pseudo-header's sum; it
    becomes the complement of the sum of packet[start:]. For UDP (offset 6) 0 is sent as 0xFFFF."""
    field = start + offset
    if field + 2 > len(packet):
        raise Dropped("bad_gso")
    value = complement(checksum(packet[start:]))
    if value == 0 and offset == UDP_CSUM_OFFSET:
        value = 0xFFFF
    return packet[:field] + value.to_bytes(2, "big") + packet[field + 2 :]


def _protocol_of(gso_type: int, header: IPHeader) -> int:
    if gso_type & ~GSO_ECN in (GSO_TCPV4, GSO_TCPV6):
        protocol = PROTO_TCP
        if header.version != (4 if gso_type & ~GSO_ECN == GSO_TCPV4 else 6):
            raise Dropped("bad_gso")
    elif gso_type == GSO_UDP_L4:
        protocol = PROTO_UDP
    else:
        raise Dropped("bad_gso")
    if header.version == 6 and header.protocol in EXTENSION_HEADERS:
        raise Dropped("bad_l4_header")
    if header.protocol != protocol:
        raise Dropped("bad_gso")
    return protocol


def _transport_header_len(protocol: int, transport: bytes) -> int:
    """Bytes of TCP header with options, or of UDP header, at the start of transport."""
    fixed = 20 if protocol == PROTO_TCP else 8
    if len(transport) < fixed:
        raise Dropped("bad_l4_header")
    length = (transport[12] >> 4) * 4 if protocol == PROTO_TCP else fixed
    if not fixed <= length <= len(transport):
        raise Dropped("bad_l4_header")
    return length


def _tcp_segment(tcp: bytes, seq_offset: int, first: bool, last: bool) -> bytes:
    """The super-packet's TCP header for one segment, checksum 0: sequence number moved on; CWR only
    on the first (RFC 3168 6.1.2); FIN and PSH, which are about the last byte, only on the last."""
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
    """The segment, whose checksum field is 0, with the right one; UDP sends 0 as 0xFFFF."""
    value = complement(transport_sum(header.source, header.destination, protocol, segment))
    if value == 0 and protocol == PROTO_UDP:
        value = 0xFFFF
    return segment[:offset] + value.to_bytes(2, "big") + segment[offset + 2 :]


def _ip_header(packet: bytes, header: IPHeader, index: int, transport_len: int) -> bytes:
    """The super-packet's IP header for segment number index: own length, IPv4 id + index."""
    if header.version == 6:
        return packet[:4] + transport_len.to_bytes(2, "big") + packet[6:40]
    ident = (int.from_bytes(packet[4:6], "big") + index) % 2**16
    lengths = struct.pack("!HH", header.header_len + transport_len, ident)
    return with_ipv4_checksum(packet[:2] + lengths + packet[6 : header.header_len])
