"""Finish the transport checksum that the kernel of a peer has left unfinished.

Owns: which packets are unfinished. Does not depend on who sent the packet. Pure functions.
"""

from .checksum import checksum, complement, pseudo_header, transport_sum
from .packet import IPV4_MF, IPV4_OFFSET, PROTO_TCP, PROTO_UDP, check_packet, parse_header

# By protocol: the offset of the checksum, and the length of the shortest header.
TRANSPORTS = {PROTO_TCP: (16, 20), PROTO_UDP: (6, 8)}


def is_unfinished(packet: bytes) -> bool:
    """Return whether the field of the TCP or UDP checksum has the sum of the pseudo-header, not
    inverted (linux include/linux/skbuff.h, CHECKSUM_PARTIAL). This may be the right checksum, too.

    drops  as check_packet
    """
    total_len = check_packet(packet)
    header = parse_header(packet)
    fragment = header.version == 4 and header.fragment_word & (IPV4_MF | IPV4_OFFSET)
    if header.protocol not in TRANSPORTS or fragment:
        return False
    offset, shortest = TRANSPORTS[header.protocol]
    segment = packet[header.header_len : total_len]
    if len(segment) < shortest:
        return False
    field = int.from_bytes(segment[offset : offset + 2], "big")
    pseudo = checksum(pseudo_header(
        header.source, header.destination, header.protocol, len(segment)))
    return field == pseudo and not (header.protocol == PROTO_UDP and field == 0)


def finish_checksum(packet: bytes) -> bytes:
    """Return the packet with its TCP or UDP checksum finished, if it is unfinished.

    A packet with a right checksum is not changed, and nor is one whose field has another value.

    drops  as check_packet
    """
    if not is_unfinished(packet):
        return packet
    header = parse_header(packet)
    offset, _ = TRANSPORTS[header.protocol]
    segment = packet[header.header_len : check_packet(packet)]
    if transport_sum(header.source, header.destination, header.protocol, segment) == 0xFFFF:
        return packet
    value = complement(checksum(segment))
    if header.protocol == PROTO_UDP and value == 0:
        value = 0xFFFF  # RFC 768: 0 means that there is no checksum
    at = header.header_len + offset
    return packet[:at] + value.to_bytes(2, "big") + packet[at + 2 :]
