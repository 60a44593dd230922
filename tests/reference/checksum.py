"""The Internet checksum, and the pseudo-header that transports put before it.

Owns: RFC 1071 arithmetic. Refuses to know: where in a packet a checksum lies. Pure functions.
"""

import struct


def checksum(data: bytes, initial: int = 0) -> int:
    """Ones-complement sum of the 16-bit big-endian words of data, folded, not inverted.

    data     any length; an odd last byte counts as the high byte of a word whose low byte is 0
    initial  0..65535: the sum of what comes before data, which must be of even length
    returns  0..65535. What goes into a checksum field is the complement, 0xFFFF - sum. Data that
             holds its own right checksum sums to 0xFFFF. 0 comes only from data of zeros.
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
    """The value of a checksum field whose covered bytes sum to total (field taken as 0)."""
    return 0xFFFF - total


def pseudo_header(source: bytes, destination: bytes, protocol: int, length: int) -> bytes:
    """What TCP, UDP and ICMPv6 sum before their own bytes.

    source, destination  4 bytes each (RFC 9293 3.1, RFC 768) or 16 bytes each (RFC 8200 8.1)
    length               bytes of transport header and payload
    """
    if len(source) == 4:
        return source + destination + struct.pack("!BBH", 0, protocol, length)
    return source + destination + struct.pack("!II", length, protocol)


def transport_sum(source: bytes, destination: bytes, protocol: int, segment: bytes) -> int:
    """Folded sum of pseudo-header and segment. 0xFFFF: the checksum in the segment is right."""
    return checksum(segment, checksum(pseudo_header(source, destination, protocol, len(segment))))
