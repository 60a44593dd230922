"""The IP header: parse it from untrusted bytes, and decrement the hop limit.

Owns: the layout of the IP header, and ``Dropped``. Does not depend on what follows the IP header.
Pure functions. All fields are big-endian.
"""

import struct
from typing import NamedTuple

from udptun.drops import DROP_REASONS

from .checksum import checksum, complement

PROTO_ICMP = 1
PROTO_TCP = 6
PROTO_UDP = 17
PROTO_ICMP6 = 58

HOP_BY_HOP = 0
ROUTING = 43
FRAGMENT = 44
ESP = 50
AUTHENTICATION = 51
DESTINATION_OPTIONS = 60
# IPv6 extension headers (RFC 8200 4): a TCP or UDP header may hide behind them.
EXTENSION_HEADERS = frozenset(
    {HOP_BY_HOP, ROUTING, FRAGMENT, ESP, AUTHENTICATION, DESTINATION_OPTIONS}
)
EXTENSION_HEADERS_MAX = 8  # a packet with more of them is treated as an attack

IPV4_MIN = 20
IPV6_LEN = 40
IPV4_DF = 0x4000
IPV4_MF = 0x2000
IPV4_OFFSET = 0x1FFF  # in units of 8 bytes
IP_MAX = 65535

_REASONS = frozenset(reason.name for reason in DROP_REASONS)


class Dropped(Exception):
    """A step drops the packet; ``reason`` is a name from ``udptun.drops``."""

    def __init__(self, reason: str) -> None:
        if reason not in _REASONS:
            raise ValueError(f"{reason!r} is not in udptun.drops")
        self.reason = reason
        super().__init__(reason)


class IPHeader(NamedTuple):
    """The fields of an IPv4 or IPv6 header. Lengths in bytes, addresses in network order."""

    version: int  # 4 or 6
    header_len: int  # with IPv4 options, without IPv6 extension headers
    total_len: int  # the declared length, header included; not checked
    protocol: int  # IPv6: the first next header
    hop_limit: int
    fragment_word: int  # IPv4: reserved, DF, MF and offset; IPv6: DF
    source: bytes
    destination: bytes

    @property
    def dont_fragment(self) -> bool:
        return bool(self.fragment_word & IPV4_DF)

    @property
    def is_fragment(self) -> bool:
        """Whether the packet is an IPv4 fragment. The first fragment counts too."""
        return bool(self.fragment_word & (IPV4_MF | IPV4_OFFSET))


def parse_header(packet: bytes) -> IPHeader:
    """Parse the IP header from untrusted bytes.

    drops   short_packet: no bytes, or fewer than 20 (IPv4) or 40 (IPv6); bad_version;
            bad_header_len: the IPv4 header length is below 20 or exceeds the packet
    source  RFC 791 3.1, RFC 8200 3
    """
    if not packet:
        raise Dropped("short_packet")
    version = packet[0] >> 4
    if version == 4:
        if len(packet) < IPV4_MIN:
            raise Dropped("short_packet")
        header_len = (packet[0] & 0x0F) * 4
        if header_len < IPV4_MIN or header_len > len(packet):
            raise Dropped("bad_header_len")
        total_len, _, fragment_word, hop_limit, protocol = struct.unpack_from("!HHHBB", packet, 2)
        return IPHeader(
            4, header_len, total_len, protocol, hop_limit, fragment_word,
            packet[12:16], packet[16:20],
        )
    if version == 6:
        if len(packet) < IPV6_LEN:
            raise Dropped("short_packet")
        payload_len, next_header, hop_limit = struct.unpack_from("!HBB", packet, 4)
        return IPHeader(
            6, IPV6_LEN, IPV6_LEN + payload_len, next_header, hop_limit, IPV4_DF,
            packet[8:24], packet[24:40],
        )
    raise Dropped("bad_version")


def check_packet(packet: bytes) -> int:
    """Return the declared total length of an IP packet, 20..len(packet); the rest is padding.

    drops   short_packet, bad_version, bad_header_len; bad_total_len: the declared length is below
            the header's length or above len(packet)
    source  RFC 791 3.1, RFC 8200 3, RFC 1812 5.2.2 (the router's checks)

    The IPv4 header checksum is not verified. Later steps keep a wrong checksum wrong, and the
    receiving kernel drops the packet.
    """
    header = parse_header(packet)
    if header.total_len < header.header_len or header.total_len > len(packet):
        raise Dropped("bad_total_len")
    return header.total_len


def decrement_hop_limit(packet: bytes) -> bytes:
    """Return the packet with TTL or hop limit decremented.

    packet  from the IP header on; only the header is parsed (reasons as ``parse_header``)
    drops   ttl_exceeded: the TTL or hop limit is 0 or 1 already
    source  RFC 791 3.2, RFC 8200 3; RFC 1624 eqn 3: HC' = ~(~HC + ~m + m'), where m is the 16-bit
            word of TTL and protocol. A wrong checksum stays wrong by the same amount.
    """
    header = parse_header(packet)
    if header.hop_limit <= 1:
        raise Dropped("ttl_exceeded")
    out = bytearray(packet)
    if header.version == 6:
        out[7] -= 1
        return bytes(out)
    old_word = packet[8:10]
    out[8] -= 1
    new_word = bytes(out[8:10])
    old_checksum = int.from_bytes(packet[10:12], "big")
    inverted = bytes(0xFF - byte for byte in old_word)
    total = checksum(inverted + new_word, complement(old_checksum))
    out[10:12] = complement(total).to_bytes(2, "big")
    return bytes(out)


def with_ipv4_checksum(header: bytes) -> bytes:
    """Return an IPv4 header, options included, with a correct checksum."""
    blank = header[:10] + b"\0\0" + header[12:]
    return blank[:10] + complement(checksum(blank)).to_bytes(2, "big") + blank[12:]
