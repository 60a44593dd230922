"""Cut an IPv4 packet into fragments.

Owns: the fragmentation of RFC 791. Does not depend on path MTUs or ICMP errors. Pure functions.
"""

import struct

from .packet import (
    IPV4_MF,
    IPV4_MIN,
    IPV4_OFFSET,
    Dropped,
    check_packet,
    parse_header,
    with_ipv4_checksum,
)

_END_OF_LIST = 0
_NO_OPERATION = 1
_COPIED = 0x80


def fragment(packet: bytes, mtu: int) -> list[bytes]:
    """Return an IP packet as fragments of at most mtu bytes each.

    packet   one IP packet; padding behind the declared length is removed
    returns  the unchanged packet if it fits, with any DF and version; else fragments in order. The
             first fragment has the whole header. Later fragments have only the options with the
             copied flag. All fragments except the last have the same payload length: the largest
             multiple of 8 that fits behind the whole header. If the packet itself is a fragment,
             its offset is added to each offset, and the last fragment keeps its MF flag.
    drops    as check_packet; too_big: DF is set, or IPv6, or mtu is below the header plus 8 bytes
    source   RFC 791 3.1 (options), 3.2 (fragmentation); RFC 8200 4.5 (no IPv6 router fragments)

    If an offset is above the maximum, the packet would reassemble to more than 65535 bytes. The
    offset is then set to the maximum, so that every receiver refuses the fragment.
    """
    packet = packet[: check_packet(packet)]
    header = parse_header(packet)
    if len(packet) <= mtu:
        return [packet]
    room = (mtu - header.header_len) // 8 * 8
    if header.dont_fragment or room < 8:
        raise Dropped("too_big")

    first_header = packet[: header.header_len]
    options = _copied_options(first_header[IPV4_MIN:])
    later_header = first_header[:IPV4_MIN] + options
    payload = packet[header.header_len :]
    pieces = []
    at = 0
    while at < len(payload):
        left = len(payload) - at
        last = left <= mtu - header.header_len
        size = left if last else room
        offset = min((header.fragment_word & IPV4_OFFSET) + at // 8, IPV4_OFFSET)
        word = (header.fragment_word & ~IPV4_OFFSET) | offset
        if not last:
            word |= IPV4_MF
        base = first_header if at == 0 else later_header
        pieces.append(_fragment_header(base, size, word) + payload[at : at + size])
        at += size
    return pieces


def _fragment_header(base: bytes, payload_len: int, fragment_word: int) -> bytes:
    """Return a copy of the header ``base`` with the length and fragment fields of one fragment."""
    start = struct.pack("!BBH", 0x40 | len(base) // 4, base[1], len(base) + payload_len)
    return with_ipv4_checksum(start + base[4:6] + fragment_word.to_bytes(2, "big") + base[8:])


def _copied_options(options: bytes) -> bytes:
    """Return the options that every fragment carries, padded with end-of-list to 4-byte words.

    An option with an impossible length ends the list. No-operation options are left out.
    """
    kept = b""
    at = 0
    while at < len(options) and options[at] != _END_OF_LIST:
        if options[at] == _NO_OPERATION:
            at += 1
            continue
        length = options[at + 1] if at + 1 < len(options) else 0
        if length < 2 or at + length > len(options):
            break
        if options[at] & _COPIED:
            kept += options[at : at + length]
        at += length
    return kept + bytes(-len(kept) % 4)
