"""Golden packets: written out by field from the RFCs, with checksums worked out apart from the code
under test.

RFC 791 (IPv4), RFC 8200 (IPv6), RFC 9293 (TCP), RFC 768 (UDP), RFC 792 and 4443 (ICMP). The
addresses are documentation's: 192.0.2.1, 198.51.100.2, 2001:db8::1, 2001:db8::2.
"""

import pytest

from tests.wire.craft import NEEDS_CSUM, PLAIN, check_valid, vnet_hdr


def wire(text):
    """Bytes of a packet written as lines of hex with ``#`` comments."""
    return bytes.fromhex("".join(line.partition("#")[0] for line in text.splitlines()))


# A super-packet of 10 bytes in segments of 4: CWR, ACK, PSH; id and sequence number about to wrap.
TCP4_SUPER = vnet_hdr(
    flags=NEEDS_CSUM, gso_type=0x81, hdr_len=40, gso_size=4, csum_start=20, csum_offset=16
) + wire("""
    45 00 0032 ffff 4000    # version 4, 5 words; TOS 0; 50 bytes; id; DF, offset 0
    40 06 4e8f              # TTL 64, TCP, header checksum
    c0000201 c6336402       # 192.0.2.1 -> 198.51.100.2
    c001 0050               # ports 49153 -> 80
    fffffffe 00000001       # sequence number, acknowledgment
    50 98 ffff              # 5 words; CWR ACK PSH; window
    ec5b 0000               # sum of the pseudo-header for 30 bytes; no urgent data
    6162 6364 6566 6768 696a
""")
TCP4_SEGMENTS = [
    wire("""
        45 00 002c ffff 4000 40 06 4e95 c0000201 c6336402
        c001 0050 fffffffe 00000001
        50 90 ffff              # CWR ACK
        3e01 0000
        6162 6364
    """),
    wire("""
        45 00 002c 0000 4000 40 06 4e95 c0000201 c6336402   # the id has wrapped
        c001 0050 00000002 00000001                         # and so has the sequence number
        50 10 ffff              # ACK
        3676 0000
        6566 6768
    """),
    wire("""
        45 00 002a 0001 4000 40 06 4e96 c0000201 c6336402
        c001 0050 00000006 00000001
        50 18 ffff              # ACK PSH
        99d0 0000
        696a
    """),
]

# Without CWR the same segments merge back: nothing with CWR is merged.
TCP4_SUPER_NO_CWR = vnet_hdr(
    flags=NEEDS_CSUM, gso_type=1, hdr_len=40, gso_size=4, csum_start=20, csum_offset=16
) + wire("""
    45 00 0032 ffff 4000 40 06 4e8f c0000201 c6336402
    c001 0050 fffffffe 00000001 50 18 ffff ec5b 0000
    6162 6364 6566 6768 696a
""")
TCP4_FIRST_NO_CWR = wire("""
    45 00 002c ffff 4000 40 06 4e95 c0000201 c6336402
    c001 0050 fffffffe 00000001
    50 10 ffff                  # ACK: 0x80 less than with CWR,
    3e81 0000                   # so the checksum is 0x80 more
    6162 6364
""")

# IPv6, UDP, five bytes in datagrams of two: the last payload is odd.
UDP6_SUPER = vnet_hdr(
    flags=NEEDS_CSUM, gso_type=5, hdr_len=48, gso_size=2, csum_start=40, csum_offset=6
) + wire("""
    60000000 000d 11 40         # version 6, class 0, label 0; 13 bytes; UDP; hop limit 64
    20010db8 00000000 00000000 00000001
    20010db8 00000000 00000000 00000002
    c001 0035 000d 5b93         # ports 49153 -> 53; 13 bytes; sum of the pseudo-header
    6162 6364 65
""")
IPV6_TO_DNS = """
    20010db8 00000000 00000000 00000001 20010db8 00000000 00000000 00000002 c001 0035
"""
UDP6_SEGMENTS = [
    wire("60000000 000a 11 40" + IPV6_TO_DNS + "000a 82cc 6162"),
    wire("60000000 000a 11 40" + IPV6_TO_DNS + "000a 80ca 6364"),
    wire("60000000 0009 11 40" + IPV6_TO_DNS + "0009 7f30 65"),
]

UDP4 = wire("""
    45 00 0020 0001 4000 40 11 4e95 c0000201 c6336402
    c001 0050 000c 5149         # 8 + 4 bytes
    0001 0203
""")


def test_golden_packets_are_valid():
    for packet in (*TCP4_SEGMENTS, TCP4_FIRST_NO_CWR, *UDP6_SEGMENTS, UDP4):
        check_valid(packet)


@pytest.mark.parametrize(
    ("frame", "packets"),
    [
        (TCP4_SUPER, TCP4_SEGMENTS),
        (TCP4_SUPER_NO_CWR, [TCP4_FIRST_NO_CWR, *TCP4_SEGMENTS[1:]]),
        (UDP6_SUPER, UDP6_SEGMENTS),
        (PLAIN + UDP4, [UDP4]),
    ],
    ids=["tcp4-cwr", "tcp4", "udp6", "udp4"],
)
def test_cut(impl, frame, packets):
    assert impl.cut(frame) == packets


@pytest.mark.parametrize(
    ("packets", "frames"),
    [
        ([TCP4_FIRST_NO_CWR, *TCP4_SEGMENTS[1:]], [TCP4_SUPER_NO_CWR]),
        (UDP6_SEGMENTS, [UDP6_SUPER]),
        ([UDP4], [PLAIN + UDP4]),
    ],
    ids=["tcp4", "udp6", "udp4"],
)
def test_merge(impl, packets, frames):
    assert impl.merge(packets) == frames


def test_cwr_ships_alone(impl):
    frames = impl.merge(TCP4_SEGMENTS)
    assert frames[0] == PLAIN + TCP4_SEGMENTS[0]
    assert len(frames) == 2


def test_hop_limit(impl):
    # RFC 1624: TTL 64 -> 63 takes 0x0100 from a word, so the checksum gains 0x0100: 4e95 -> 4f95
    assert impl.decrement_hop_limit(UDP4) == UDP4[:8] + b"\x3f\x11\x4f\x95" + UDP4[12:]
    six = UDP6_SEGMENTS[0]
    assert impl.decrement_hop_limit(six) == six[:7] + b"\x3f" + six[8:]


def test_fragments(impl):
    """28 bytes of payload for an MTU of 40: 16 + 12."""
    whole = wire("""
        45 00 0030 0001 0000 40 11 8e85 c0000201 c6336402
        c001 0050 001c 0000
        00010203 04050607 08090a0b 0c0d0e0f 10111213
    """)
    assert impl.fragment(whole, 40) == [
        wire("""
            45 00 0024 0001 2000 40 11 6e91 c0000201 c6336402   # 36 bytes, MF, offset 0
            c001 0050 001c 0000 00010203 04050607
        """),
        wire("""
            45 00 0020 0001 0002 40 11 8e93 c0000201 c6336402   # 32 bytes, offset 2 x 8
            08090a0b 0c0d0e0f 10111213
        """),
    ]


def test_fragmentation_needed(impl):
    assert impl.icmp_error(UDP4, "too_big", bytes([203, 0, 113, 1]), 1400) == wire("""
        45 c0 003c 0000 0000    # internetwork control; 60 bytes; id 0, DF clear
        40 01 7bfe              # TTL 64, ICMP
        cb007101 c0000201       # 203.0.113.1 -> 192.0.2.1
        03 04 e3d8 0000 0578    # destination unreachable, fragmentation needed; next-hop MTU 1400
    """) + UDP4


def test_packet_too_big(impl):
    packet = UDP6_SEGMENTS[0]
    ours = bytes.fromhex("20010db80000000000000000000000fe")
    assert impl.icmp_error(packet, "too_big", ours, 1400) == wire("""
        60000000 003a 3a 40     # 58 bytes, ICMPv6, hop limit 64
        20010db8 00000000 00000000 000000fe 20010db8 00000000 00000000 00000001
        02 00 2a73 00000578     # packet too big, MTU 1400
    """) + packet
