"""The Internet checksum, and the pseudo-header of transport protocols.

Owns: the arithmetic of RFC 1071. Does not depend on the place of a checksum in a packet. Pure
functions.
"""

import struct


def checksum(data: bytes, initial: int = 0) -> int:
    """Return the ones-complement sum of the 16-bit big-endian words of data, folded, not inverted.

    data     any length; an odd last byte counts as the high byte of a word whose low byte is 0
    initial  0..65535: the sum of the bytes before data, which must be of even length
    returns  0..65535. A checksum field holds the complement, 0xFFFF - sum. Data that contains its
             own correct checksum sums to 0xFFFF. Only data of zeros sums to 0.
    source   RFC 1071 section 1, RFC 791 3.1
    """
    total = initial
    for offset in range(0, len(data), 2):
        high = data[offset]
        low = data[offset + 1] if offset + 1 < len(data) else 0
        total += high << 8 | low
    while total > 0xFFFF:
        total = (total & 0xFFFF) + (total >> 16)
    return total


def complement(total: int) -> int:
    """Return the value for a checksum field.

    total  the sum of the covered bytes, in which the field itself is 0
    """
    return 0xFFFF - total


def pseudo_header(source: bytes, destination: bytes, protocol: int, length: int) -> bytes:
    """Return the pseudo-header, which TCP, UDP and ICMPv6 add to the sum before their own bytes.

    source, destination  4 bytes each (RFC 9293 3.1, RFC 768) or 16 bytes each (RFC 8200 8.1)
    length               bytes of transport header and payload
    """
    if len(source) == 4:
        return source + destination + struct.pack("!BBH", 0, protocol, length)
    return source + destination + struct.pack("!II", length, protocol)


def transport_sum(source: bytes, destination: bytes, protocol: int, segment: bytes) -> int:
    """Return the folded sum of pseudo-header and segment.

    The sum is 0xFFFF if the segment contains its correct checksum.
    """
    return checksum(segment, checksum(pseudo_header(source, destination, protocol, len(segment))))
