"""The traffic class of the outer header: DSCP and ECN (TOS in IPv4).

Owns: the tables of RFC 6040. Does not depend on sockets or peers. Pure functions.
"""

from typing import NamedTuple

from .checksum import checksum, complement
from .packet import Dropped, check_packet, parse_header

NOT_ECT, ECT1, ECT0, CE = range(4)  # the ECN field: the low two bits of the traffic class

DROP = None
# RFC 6040 4.2: the ECN field of the packet after decapsulation, by its present value (row) and the
# value of the outer header (column: NOT_ECT, ECT1, ECT0, CE).
DECAPSULATED: dict[int, tuple[int | None, ...]] = {
    NOT_ECT: (NOT_ECT, NOT_ECT, NOT_ECT, DROP),
    ECT0: (ECT0, ECT1, ECT0, CE),
    ECT1: (ECT1, ECT1, ECT1, CE),
    CE: (CE, CE, CE, CE),
}
# The combinations of (packet, outer header) that are marked "(!!!)" or "(!)" in this table, except
# the one that is dropped.
UNEXPECTED = {(NOT_ECT, ECT0), (NOT_ECT, ECT1), (ECT1, ECT0), (CE, ECT1)}


class Taken(NamedTuple):
    """A packet after decapsulation.

    marked      it got CE from its datagram
    unexpected  the combination is in UNEXPECTED
    """

    packet: bytes
    marked: bool
    unexpected: bool


def traffic_class(packet: bytes) -> int:
    """Return the traffic class of an IPv6 packet, or the TOS of an IPv4 packet."""
    if parse_header(packet).version == 4:
        return packet[1]
    return int.from_bytes(packet[:2], "big") >> 4 & 0xFF


def take_ecn(packet: bytes, outer: int) -> Taken:
    """Return the packet with the ECN field that it has after decapsulation.

    outer   the ECN field of the datagram
    drops   as check_packet; congestion: CE, but the sender of the packet does not use ECN
    source  RFC 6040 4.2, RFC 1624 (a wrong header checksum stays wrong)
    """
    check_packet(packet)
    inner = traffic_class(packet) & 3
    result = DECAPSULATED[inner][outer]
    if result is None:
        raise Dropped("congestion")
    unexpected = (inner, outer) in UNEXPECTED
    if result == inner:
        return Taken(packet, False, unexpected)
    if packet[0] >> 4 == 6:
        changed = packet[:1] + bytes([packet[1] & 0xCF | result << 4]) + packet[2:]
        return Taken(changed, result == CE, unexpected)
    old_word, new_word = packet[:2], bytes([packet[0], packet[1] & 0xFC | result])
    inverted = bytes(0xFF - byte for byte in old_word)
    total = checksum(inverted + new_word, complement(int.from_bytes(packet[10:12], "big")))
    changed = new_word + packet[2:10] + complement(total).to_bytes(2, "big") + packet[12:]
    return Taken(changed, result == CE, unexpected)
