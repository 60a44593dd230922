"""Packets for the tests, built without the code under test: own layouts, own checksum.

The checksum is arithmetic of another kind than RFC 1071's loop: 2**16 is 1 modulo 0xFFFF, so the
ones-complement sum of 16-bit words is the whole byte string, read as one number, modulo 0xFFFF.
"""

import ipaddress
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

FIN, SYN, RST, PSH, ACK, URG, ECE, CWR = (1 << i for i in range(8))
TCP, UDP, ICMP, ICMP6 = 6, 17, 1, 58
NEEDS_CSUM = 1
TCPV4, TCPV6, UDP_L4, ECN = 1, 4, 5, 0x80
HOP_BY_HOP, ROUTING, DESTINATION_OPTIONS = 0, 43, 60
A4, B4 = "10.244.1.7", "10.244.2.9"
A6, B6 = "fd00:1::7", "fd00:2::9"
TIMESTAMPS = bytes.fromhex("0101080a0000000100000002")  # NOP NOP, kind 8: value 1, echo 2


def ones_sum(data: bytes) -> int:
    """Folded ones-complement sum: 0 for zeros only, else 1..65535."""
    number = int.from_bytes(data + bytes(len(data) % 2), "big")
    return number % 0xFFFF or (0xFFFF if number else 0)


def set_checksum(data: bytes, at: int, covered_before: bytes = b"", zero: int = 0) -> bytes:
    """data with the checksum of covered_before + data at offset `at`; zero: what stands for 0."""
    blank = data[:at] + b"\0\0" + data[at + 2 :]
    value = 0xFFFF - ones_sum(covered_before + blank) or zero
    return blank[:at] + value.to_bytes(2, "big") + blank[at + 2 :]


def addr(text: str) -> bytes:
    return ipaddress.ip_address(text).packed


def pseudo(src: bytes, dst: bytes, proto: int, length: int) -> bytes:
    return src + dst + struct.pack("!II", length, proto)  # sums to the same in both families


def ip4(
    payload: bytes, proto: int, src: str | bytes = A4, dst: str | bytes = B4, *, ttl: int = 64,
    tos: int = 0, ident: int = 0x1234, flags: int = 0x4000, options: bytes = b"",
    total_len: int | None = None,
) -> bytes:
    """flags: the whole 16-bit word of reserved bit, DF, MF and offset."""
    src, dst = (a if isinstance(a, bytes) else addr(a) for a in (src, dst))
    header_len = 20 + len(options)
    length = header_len + len(payload) if total_len is None else total_len
    header = struct.pack(
        "!BBHHHBBH", 0x40 | header_len // 4, tos, length & 0xFFFF, ident, flags, ttl, proto, 0
    ) + src + dst + options
    return set_checksum(header, 10) + payload


def ip6(
    payload: bytes, proto: int, src: str | bytes = A6, dst: str | bytes = B6, *, ttl: int = 64,
    tos: int = 0, label: int = 0x12345, payload_len: int | None = None,
) -> bytes:
    src, dst = (a if isinstance(a, bytes) else addr(a) for a in (src, dst))
    length = len(payload) if payload_len is None else payload_len
    start = struct.pack("!IHBB", 6 << 28 | tos << 20 | label, length, proto, ttl)
    return start + src + dst + payload


def chain(extensions: Sequence[tuple[int, bytes]], proto: int) -> tuple[int, bytes]:
    """The first next header, and IPv6 extension headers that lead to proto. Each is given as its
    number and what follows next header and length: 6 bytes, or 8 more, or 16 more ..."""
    packed = b""
    for number, body in reversed(extensions):
        packed = bytes([proto, (len(body) - 6) // 8]) + body + packed
        proto = number
    return proto, packed


@dataclass(frozen=True)
class Flow:
    """Addresses, ports and IP header fields shared by the packets of a flow."""

    version: int = 4
    src: bytes = b""
    dst: bytes = b""
    sport: int = 4321
    dport: int = 80
    tos: int = 0
    ttl: int = 64
    label: int = 0
    flags: int = 0x4000
    ip_options: bytes = b""
    extensions: tuple[tuple[int, bytes], ...] = ()  # IPv6: see ``chain``

    @property
    def source(self) -> bytes:
        return self.src or addr(A4 if self.version == 4 else A6)

    @property
    def destination(self) -> bytes:
        return self.dst or addr(B4 if self.version == 4 else B6)

    @property
    def ip_len(self) -> int:
        if self.version == 6:
            return 40 + len(chain(self.extensions, 0)[1])
        return 20 + len(self.ip_options)

    def ip(self, transport: bytes, proto: int, ident: int = 0x1234) -> bytes:
        if self.version == 6:
            first, packed = chain(self.extensions, proto)
            return ip6(
                packed + transport, first, self.source, self.destination,
                ttl=self.ttl, tos=self.tos, label=self.label,
            )
        return ip4(
            transport, proto, self.source, self.destination, ttl=self.ttl, tos=self.tos,
            ident=ident % 65536, flags=self.flags, options=self.ip_options,
        )

    def tcp(self, payload: bytes = b"", *, ident: int = 0x1234, **fields: Any) -> bytes:
        """fields: those of ``tcp_header``."""
        segment = tcp_header(self.sport, self.dport, **fields) + payload
        before = pseudo(self.source, self.destination, TCP, len(segment))
        return self.ip(set_checksum(segment, 16, before), TCP, ident)

    def udp(self, payload: bytes = b"", *, ident: int = 0x1234, no_checksum: bool = False) -> bytes:
        datagram = struct.pack("!HHHH", self.sport, self.dport, 8 + len(payload), 0) + payload
        if not no_checksum:
            before = pseudo(self.source, self.destination, UDP, len(datagram))
            datagram = set_checksum(datagram, 6, before, zero=0xFFFF)
        return self.ip(datagram, UDP, ident)

    def tcp_super(
        self, payload: bytes, gso_size: int, *, ident: int = 0x1234, ecn: bool = False,
        **fields: Any,
    ) -> bytes:
        """A frame as the kernel delivers it: the checksum field holds the pseudo-header's sum."""
        header = tcp_header(self.sport, self.dport, **fields)
        length = len(header) + len(payload)
        total = ones_sum(pseudo(self.source, self.destination, TCP, length))
        header = header[:16] + total.to_bytes(2, "big") + header[18:]
        vnet = vnet_hdr(
            flags=NEEDS_CSUM,
            gso_type=(TCPV4 if self.version == 4 else TCPV6) | (ECN if ecn else 0),
            hdr_len=self.ip_len + len(header),
            gso_size=gso_size,
            csum_start=self.ip_len,
            csum_offset=16,
        )
        return vnet + self.ip(header + payload, TCP, ident)

    def udp_super(self, payload: bytes, gso_size: int, *, ident: int = 0x1234) -> bytes:
        length = 8 + len(payload)
        total = ones_sum(pseudo(self.source, self.destination, UDP, length))
        header = struct.pack("!HHHH", self.sport, self.dport, length, total)
        vnet = vnet_hdr(
            flags=NEEDS_CSUM,
            gso_type=UDP_L4,
            hdr_len=self.ip_len + 8,
            gso_size=gso_size,
            csum_start=self.ip_len,
            csum_offset=6,
        )
        return vnet + self.ip(header + payload, UDP, ident)


def tcp_header(
    sport: int, dport: int, *, seq: int = 1000, ack: int = 77, flags: int = ACK, window: int = 502,
    urgent: int = 0, options: bytes = b"", reserved: int = 0,
) -> bytes:
    """Checksum 0. reserved: the low four bits of the data-offset byte (the last of them is AE)."""
    offset = (20 + len(options)) // 4 << 4 | reserved
    return struct.pack(
        "!HHIIBBHHH", sport, dport, seq % 2**32, ack, offset, flags, window, 0, urgent
    ) + options


def vnet_hdr(
    *, flags: int = 0, gso_type: int = 0, hdr_len: int = 0, gso_size: int = 0, csum_start: int = 0,
    csum_offset: int = 0,
) -> bytes:
    return struct.pack("=BBHHHH", flags, gso_type, hdr_len, gso_size, csum_start, csum_offset)


PLAIN = vnet_hdr()


def transport(packet: bytes) -> bytes:
    return packet[ip_len(packet) :]


def ip_len(packet: bytes) -> int:
    """With IPv6 extension headers, as far as they lie in the packet."""
    return upper(packet)[1]


def upper(packet: bytes) -> tuple[int, int]:
    """The protocol behind the IP header and its options or extension headers, and where."""
    if packet[0] >> 4 == 4:
        return packet[9], (packet[0] & 15) * 4
    proto, at = packet[6], 40
    while proto in (HOP_BY_HOP, ROUTING, DESTINATION_OPTIONS):
        after = at + 8 + 8 * packet[at + 1] if at + 1 < len(packet) else len(packet) + 1
        if after > len(packet):
            break
        proto, at = packet[at], after
    return proto, at


def tcp_seq(packet: bytes) -> int:
    return int.from_bytes(transport(packet)[4:8], "big")


def tcp_flags(packet: bytes) -> int:
    return transport(packet)[13]


def tcp_payload(packet: bytes) -> bytes:
    segment = transport(packet)
    return segment[(segment[12] >> 4) * 4 :]


def udp_payload(packet: bytes) -> bytes:
    return transport(packet)[8:]


def ident(packet: bytes) -> int:
    return int.from_bytes(packet[4:6], "big")


def check_valid(packet: bytes) -> None:
    """Lengths agree with the bytes, and every checksum in an unfragmented packet is right."""
    if packet[0] >> 4 == 4:
        header = packet[: ip_len(packet)]
        src, dst = packet[12:16], packet[16:20]
        assert int.from_bytes(packet[2:4], "big") == len(packet)
        assert ones_sum(header) == 0xFFFF
        fragment = bool(int.from_bytes(packet[6:8], "big") & 0x3FFF)
    else:
        src, dst, fragment = packet[8:24], packet[24:40], False
        assert packet[0] >> 4 == 6
        assert int.from_bytes(packet[4:6], "big") == len(packet) - 40
    proto, segment = upper(packet)[0], transport(packet)
    if proto == UDP and not fragment:
        assert int.from_bytes(segment[4:6], "big") == len(segment)
        assert segment[6:8] != b"\0\0"
    if proto in (TCP, UDP, ICMP6) and not fragment:
        assert ones_sum(pseudo(src, dst, proto, len(segment)) + segment) == 0xFFFF
    if proto == ICMP and not fragment:
        assert ones_sum(segment) == 0xFFFF


def unfinished(packet: bytes) -> bytes:
    """Return the packet as a kernel sends it that leaves the transport checksum to the device: the
    field has the sum of the pseudo-header. Other packets than TCP and UDP are not changed."""
    version = packet[0] >> 4 if packet else 0
    header_len = 40 if version == 6 else 20
    if version not in (4, 6) or len(packet) < header_len + 20:
        return packet
    proto = packet[6] if version == 6 else packet[9]
    if proto not in (TCP, UDP):
        return packet
    addresses = packet[8:40] if version == 6 else packet[12:20]
    size = len(addresses) // 2
    before = pseudo(addresses[:size], addresses[size:], proto, len(packet) - header_len)
    at = header_len + (16 if proto == TCP else 6)
    return packet[:at] + ones_sum(before).to_bytes(2, "big") + packet[at + 2 :]
