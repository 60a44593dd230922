"""Cutting super-packets, on both implementations: RFC 9293, RFC 3168, RFC 768, virtio_net.h."""

import struct

import pytest

from tests.reference import Dropped
from tests.wire import craft
from tests.wire.craft import (
    ACK,
    CWR,
    DESTINATION_OPTIONS,
    ECE,
    FIN,
    HOP_BY_HOP,
    NEEDS_CSUM,
    PLAIN,
    PSH,
    ROUTING,
    RST,
    SYN,
    TCPV4,
    TCPV6,
    TIMESTAMPS,
    UDP,
    UDP_L4,
    URG,
    Flow,
    check_valid,
    vnet_hdr,
)

BOTH = pytest.mark.parametrize("version", [4, 6])
PAYLOAD = bytes(range(256)) * 12


def dropped(impl, frame):
    with pytest.raises(Dropped) as caught:
        impl.cut(frame)
    return caught.value.reason


def patch(data, at, new):
    return data[:at] + new + data[at + len(new) :]


# --- plain packets ---


@BOTH
def test_plain_packet_comes_back_untouched(impl, version):
    packet = Flow(version, ttl=1).tcp(b"hello", flags=ACK | PSH)
    assert impl.cut(PLAIN + packet) == [packet]


def test_plain_packet_with_wrong_checksums_is_not_repaired(impl):
    packet = patch(patch(Flow().udp(b"hello"), 10, b"\xba\xad"), 26, b"\xba\xad")
    assert impl.cut(PLAIN + packet) == [packet]


def test_udp_checksum_zero_is_not_fixed(impl):
    """RFC 768: 0 means that the sender computed no checksum."""
    packet = Flow().udp(b"hello", no_checksum=True)
    assert impl.cut(PLAIN + packet) == [packet]


def test_padding_behind_the_packet_is_removed(impl):
    packet = Flow().udp(b"hello")
    assert impl.cut(PLAIN + packet + bytes(7)) == [packet]


@BOTH
@pytest.mark.parametrize("length", [0, 1, 2, 3, 1399])
def test_incomplete_checksum_is_completed(impl, version, length):
    flow = Flow(version)
    for packet, offset in (
        (flow.tcp(PAYLOAD[:length]), 16),
        (flow.udp(PAYLOAD[:length]), 6),
    ):
        start = craft.ip_len(packet)
        l4_len = len(packet) - start
        total = craft.ones_sum(
            craft.pseudo(flow.source, flow.destination, 6 if offset == 16 else 17, l4_len)
        )
        partial = patch(packet, start + offset, total.to_bytes(2, "big"))
        vnet = vnet_hdr(flags=NEEDS_CSUM, csum_start=start, csum_offset=offset)
        assert impl.cut(vnet + partial) == [packet]


def udp_payload_whose_checksum_is_zero(flow):
    first = flow.udp(b"\0\0")
    field = int.from_bytes(craft.transport(first)[6:8], "big")
    return field.to_bytes(2, "big")


@BOTH
def test_computed_udp_zero_is_sent_as_ffff(impl, version):
    flow = Flow(version)
    payload = udp_payload_whose_checksum_is_zero(flow)
    packet = flow.udp(payload)
    assert craft.transport(packet)[6:8] == b"\xff\xff"
    total = craft.ones_sum(craft.pseudo(flow.source, flow.destination, UDP, 10))
    partial = patch(packet, craft.ip_len(packet) + 6, total.to_bytes(2, "big"))
    vnet = vnet_hdr(flags=NEEDS_CSUM, csum_start=flow.ip_len, csum_offset=6)
    assert impl.cut(vnet + partial) == [packet]
    segments = impl.cut(flow.udp_super(payload * 3, 2))
    assert [craft.transport(s)[6:8] for s in segments] == [b"\xff\xff"] * 3


def test_checksum_offsets_at_the_packets_end(impl):
    packet = Flow().udp(b"hello")  # 33 bytes
    last = vnet_hdr(flags=NEEDS_CSUM, csum_start=28, csum_offset=3)
    assert len(impl.cut(last + packet)[0]) == 33
    for start, offset in ((28, 4), (33, 0), (32, 0), (0, 32), (65535, 65535), (40000, 40000)):
        vnet = vnet_hdr(flags=NEEDS_CSUM, csum_start=start, csum_offset=offset)
        assert dropped(impl, vnet + packet) == "bad_gso"


@BOTH
def test_checksum_inside_the_ip_header(impl, version):
    """The write would change fields that are validated already, such as the length."""
    flow = Flow(version)
    for start in range(flow.ip_len):
        for offset in (0, 6):
            vnet = vnet_hdr(flags=NEEDS_CSUM, csum_start=start, csum_offset=offset)
            assert dropped(impl, vnet + flow.udp(b"hello")) == "bad_gso"


def test_gso_fields_without_a_type_are_ignored(impl):
    """Flags and gso_type decide whether the other fields are valid."""
    packet = Flow().udp(b"hello")
    vnet = vnet_hdr(gso_type=0, hdr_len=999, gso_size=3, csum_start=999, csum_offset=999)
    assert impl.cut(vnet + packet) == [packet]


# --- cutting ---


@BOTH
@pytest.mark.parametrize("gso_size", [1, 7, 100, 1399, 1400])
@pytest.mark.parametrize("length", [1, 1399, 1400, 1401, 2799, 2800, 2801])
def test_tcp_segments(impl, version, gso_size, length):
    flow = Flow(version, tos=3, ttl=9, label=0xABCDE)
    frame = flow.tcp_super(PAYLOAD[:length], gso_size, seq=5000, options=TIMESTAMPS, ident=600)
    want = [
        flow.tcp(
            PAYLOAD[at : min(at + gso_size, length)], seq=5000 + at, options=TIMESTAMPS,
            ident=600 + at // gso_size,
        )
        for at in range(0, length, gso_size)
    ]
    assert impl.cut(frame) == want


@BOTH
@pytest.mark.parametrize("gso_size", [1, 7, 512, 1399, 1400])
@pytest.mark.parametrize("length", [1, 1399, 1400, 1401, 2801])
def test_udp_segments(impl, version, gso_size, length):
    flow = Flow(version)
    frame = flow.udp_super(PAYLOAD[:length], gso_size, ident=65535)
    want = [
        flow.udp(PAYLOAD[at : min(at + gso_size, length)], ident=65535 + at // gso_size)
        for at in range(0, length, gso_size)
    ]
    assert impl.cut(frame) == want


@BOTH
def test_gso_size_under_the_header_size(impl, version):
    """A payload may be shorter than the headers."""
    frame = Flow(version).tcp_super(PAYLOAD[:10], 3, options=bytes([1]) * 40)
    segments = impl.cut(frame)
    assert [craft.tcp_payload(s) for s in segments] == [
        PAYLOAD[0:3], PAYLOAD[3:6], PAYLOAD[6:9], PAYLOAD[9:10],
    ]
    for segment in segments:
        check_valid(segment)


@BOTH
def test_payload_within_gso_size_is_one_packet(impl, version):
    flow = Flow(version)
    for gso_size in (5, 6, 1400, 65535):
        assert impl.cut(flow.tcp_super(b"hello", gso_size)) == [flow.tcp(b"hello")]
        assert impl.cut(flow.udp_super(b"hello", gso_size)) == [flow.udp(b"hello")]


@BOTH
def test_empty_payload_is_one_packet(impl, version):
    flow = Flow(version)
    assert impl.cut(flow.tcp_super(b"", 1400)) == [flow.tcp(b"")]
    assert impl.cut(flow.udp_super(b"", 1400)) == [flow.udp(b"")]


@BOTH
def test_fin_and_psh_only_on_the_last(impl, version):
    frame = Flow(version).tcp_super(PAYLOAD[:30], 10, flags=ACK | PSH | FIN)
    assert [craft.tcp_flags(s) for s in impl.cut(frame)] == [ACK, ACK, ACK | PSH | FIN]


@BOTH
@pytest.mark.parametrize("ecn", [False, True])
def test_cwr_only_on_the_first(impl, version, ecn):
    """RFC 3168 6.1.2. ECE is an echo and stays on all segments."""
    frame = Flow(version).tcp_super(PAYLOAD[:30], 10, flags=ACK | CWR | ECE | PSH, ecn=ecn)
    flags = [craft.tcp_flags(s) for s in impl.cut(frame)]
    assert flags == [ACK | CWR | ECE, ACK | ECE, ACK | ECE | PSH]


@BOTH
def test_cwr_fin_psh_on_a_single_segment_stay(impl, version):
    frame = Flow(version).tcp_super(b"x", 10, flags=ACK | CWR | PSH | FIN, ecn=True)
    assert [craft.tcp_flags(s) for s in impl.cut(frame)] == [ACK | CWR | PSH | FIN]


@BOTH
def test_other_flags_reserved_bits_and_urgent_pointer_are_copied(impl, version):
    """URG, SYN and RST do not belong in a super-packet; a cut copies them, as the kernel's own
    segmentation does. AE (AccECN) is the lowest of the reserved bits."""
    frame = Flow(version).tcp_super(
        PAYLOAD[:20], 10, flags=ACK | URG | SYN | RST, urgent=3, reserved=1
    )
    for segment in impl.cut(frame):
        assert craft.tcp_flags(segment) == ACK | URG | SYN | RST
        assert craft.transport(segment)[18:20] == b"\x00\x03"
        assert craft.transport(segment)[12] & 0x0F == 1
        check_valid(segment)


def test_sequence_number_wraps(impl):
    segments = impl.cut(Flow().tcp_super(PAYLOAD[:30], 10, seq=2**32 - 15))
    assert [craft.tcp_seq(s) for s in segments] == [2**32 - 15, 2**32 - 5, 5]


def test_ipv4_id_wraps(impl):
    segments = impl.cut(Flow().tcp_super(PAYLOAD[:30], 10, ident=0xFFFE))
    assert [craft.ident(s) for s in segments] == [0xFFFE, 0xFFFF, 0]


def test_ipv4_options_are_on_every_segment(impl):
    flow = Flow(ip_options=bytes.fromhex("94040000"))  # router alert
    assert impl.cut(flow.tcp_super(PAYLOAD[:20], 10, ident=1)) == [
        flow.tcp(PAYLOAD[0:10], ident=1), flow.tcp(PAYLOAD[10:20], seq=1010, ident=2),
    ]
    assert impl.cut(flow.udp_super(PAYLOAD[:20], 10, ident=1)) == [
        flow.udp(PAYLOAD[0:10], ident=1), flow.udp(PAYLOAD[10:20], ident=2),
    ]


@BOTH
def test_ttl_is_not_touched(impl, version):
    """TTL 1 is the forwarder's decision: see test_reference_forwarder."""
    for segment in impl.cut(Flow(version, ttl=1).tcp_super(PAYLOAD[:20], 10)):
        assert segment[8 if version == 4 else 7] == 1


@BOTH
@pytest.mark.parametrize("hdr_len", [0, 1, 65535])
def test_hdr_len_is_only_a_hint(impl, version, hdr_len):
    """For a forwarded packet, hdr_len is the length of the whole first packet."""
    flow = Flow(version)
    frame = patch(flow.tcp_super(PAYLOAD[:20], 10), 2, struct.pack("=H", hdr_len))
    assert impl.cut(frame) == impl.cut(flow.tcp_super(PAYLOAD[:20], 10))


@BOTH
@pytest.mark.parametrize("length", [0, 1, 40, 65535])
def test_length_fields_of_a_super_packet_are_ignored(impl, version, length):
    flow = Flow(version)
    frame = flow.udp_super(PAYLOAD[:20], 10)
    want = impl.cut(frame)
    field = length.to_bytes(2, "big")
    assert impl.cut(patch(frame, 10 + (2 if version == 4 else 4), field)) == want
    assert impl.cut(patch(frame, 10 + flow.ip_len + 4, field)) == want


@BOTH
def test_checksum_fields_without_needs_csum_are_ignored(impl, version):
    flow = Flow(version)
    frame = flow.tcp_super(PAYLOAD[:20], 10)
    bare = patch(patch(frame, 0, b"\0"), 6, struct.pack("=HH", 999, 999))
    assert impl.cut(bare) == impl.cut(frame)


@BOTH
def test_the_largest_super_packet(impl, version):
    """The 65535-byte edge; 45 x 1472 > 65507, so a full super-packet needs more than one
    send, which does not matter to the cut."""
    flow = Flow(version)
    room = 65535 - flow.ip_len - 8
    data = (PAYLOAD * 22)[:room]
    frame = flow.udp_super(data, 1472 - 28)
    assert len(frame) == 10 + 65535
    segments = impl.cut(frame)
    assert sum(len(s) for s in segments) > 65507
    assert b"".join(craft.udp_payload(s) for s in segments) == data
    for segment in segments:
        check_valid(segment)


def test_more_than_an_ip_packet_can_be(impl):
    frame = Flow().udp_super(b"", 1400) + bytes(65536 - 28)
    assert dropped(impl, frame) == "bad_gso"
    assert len(impl.cut(frame[:-1])) == 47


# --- contradictory frames ---


@pytest.mark.parametrize("length", range(10))
def test_no_whole_vnet_header(impl, length):
    assert dropped(impl, bytes(length)) == "short_packet"


def test_vnet_header_alone(impl):
    assert dropped(impl, PLAIN) == "short_packet"
    assert dropped(impl, vnet_hdr(gso_type=TCPV4, gso_size=1)) == "short_packet"


def test_plain_packet_is_parsed(impl):
    packet = Flow().udp(b"hello")
    assert dropped(impl, PLAIN + packet[:-1]) == "bad_total_len"
    assert dropped(impl, PLAIN + b"\x41" + packet[1:]) == "bad_header_len"
    assert dropped(impl, PLAIN + b"\x75" + packet[1:]) == "bad_version"


@pytest.mark.parametrize("version", [4, 6])
def test_gso_size_zero(impl, version):
    assert dropped(impl, Flow(version).tcp_super(PAYLOAD[:20], 0)) == "bad_gso"
    assert dropped(impl, Flow(version).udp_super(PAYLOAD[:20], 0)) == "bad_gso"


@pytest.mark.parametrize("gso_type", [2, 3, 6, 7, 0x20, 0x40, 0x80, 0x85, 0xFF])
def test_unknown_gso_type(impl, gso_type):
    frame = Flow().tcp_super(PAYLOAD[:20], 10)
    assert dropped(impl, patch(frame, 1, bytes([gso_type]))) == "bad_gso"


def test_gso_type_that_contradicts_version_or_protocol(impl):
    """The GSO type names the other IP version, or the other protocol."""
    tcp4, tcp6 = (Flow(v).tcp_super(PAYLOAD[:20], 10) for v in (4, 6))
    udp4, udp6 = (Flow(v).udp_super(PAYLOAD[:20], 10) for v in (4, 6))
    for frame, wrong in (
        (tcp4, TCPV6), (tcp4, UDP_L4), (tcp6, TCPV4), (tcp6, UDP_L4),
        (udp4, TCPV4), (udp4, TCPV6), (udp6, TCPV4), (udp6, TCPV6),
    ):
        assert dropped(impl, patch(frame, 1, bytes([wrong]))) == "bad_gso"


@BOTH
def test_checksum_offsets_that_contradict_the_headers(impl, version):
    for frame in (Flow(version).tcp_super(b"x" * 20, 10), Flow(version).udp_super(b"x" * 20, 10)):
        start, offset = struct.unpack_from("=HH", frame, 6)
        for wrong in ((start + 4, offset), (start, offset + 2), (0, offset), (start, 65535)):
            assert dropped(impl, patch(frame, 6, struct.pack("=HH", *wrong))) == "bad_gso"


@pytest.mark.parametrize("word", [0x2000, 0x0001, 0x1FFF, 0x6000])
def test_super_packet_that_is_a_fragment(impl, word):
    assert dropped(impl, Flow(flags=word).tcp_super(PAYLOAD[:20], 10)) == "bad_gso"
    assert dropped(impl, Flow(flags=word).udp_super(PAYLOAD[:20], 10)) == "bad_gso"


@pytest.mark.parametrize("word", [0x0000, 0x4000, 0x8000, 0xC000])
def test_df_and_the_reserved_bit_are_no_fragment(impl, word):
    """Mask of a fragment: only 0x2000 and the offset make a fragment."""
    flow = Flow(flags=word)
    assert impl.cut(flow.udp_super(PAYLOAD[:4], 2, ident=1)) == [
        flow.udp(PAYLOAD[0:2], ident=1), flow.udp(PAYLOAD[2:4], ident=2),
    ]


@BOTH
def test_transport_header_cut_off(impl, version):
    flow = Flow(version)
    for l4_len in range(20):
        frame = flow.tcp_super(b"", 10)[: 10 + flow.ip_len + l4_len]
        assert dropped(impl, frame) == "bad_l4_header"
    for l4_len in range(8):
        frame = flow.udp_super(b"", 10)[: 10 + flow.ip_len + l4_len]
        assert dropped(impl, frame) == "bad_l4_header"


@BOTH
@pytest.mark.parametrize("words", [0, 1, 4, 11, 15])
def test_tcp_header_length_impossible(impl, version, words):
    flow = Flow(version)
    frame = flow.tcp_super(b"x" * 20, 10)  # 40 bytes: at most 10 words
    bad = patch(frame, 10 + flow.ip_len + 12, bytes([words << 4]))
    assert dropped(impl, bad) == "bad_l4_header"


def test_tcp_header_without_payload(impl):
    flow = Flow()
    frame = patch(flow.tcp_super(b"\x01" * 20, 10), 10 + 20 + 12, bytes([10 << 4]))
    assert impl.cut(frame) == [flow.tcp(b"", options=b"\x01" * 20)]


# --- IPv6 extension headers: a TCP super-packet has those of the socket's sticky options ---

OPTIONS = (DESTINATION_OPTIONS, bytes.fromhex("0104 0000 0000"))  # PadN
LONG_OPTIONS = (DESTINATION_OPTIONS, bytes.fromhex("0114") + bytes(20))
HOP_OPTIONS = (HOP_BY_HOP, bytes.fromhex("0104 0000 0000"))
ROUTE = (ROUTING, bytes([4, 0, 0, 0, 0, 0]) + bytes(range(16)))  # RFC 8754, no segments left
CHAINS = [
    (OPTIONS,), (LONG_OPTIONS,), (HOP_OPTIONS,), (ROUTE,), (HOP_OPTIONS, OPTIONS),
    (OPTIONS, ROUTE, OPTIONS),
]


@pytest.mark.parametrize("extensions", CHAINS)
def test_every_segment_has_the_extension_headers(impl, extensions):
    flow = Flow(6, extensions=extensions)
    data = PAYLOAD[:50]
    for frame, whole in ((flow.tcp_super(data, 20, seq=7), flow.tcp), (flow.udp_super(data, 20),
                                                                       flow.udp)):
        segments = impl.cut(frame)
        fields = [{"seq": 7 + at} if whole == flow.tcp else {} for at in (0, 20, 40)]
        assert segments == [
            whole(data[at : at + 20], **more) for at, more in zip((0, 20, 40), fields, strict=True)
        ]
        for segment in segments:
            check_valid(segment)


def test_checksum_start_is_behind_the_extension_headers(impl):
    flow = Flow(6, extensions=(HOP_OPTIONS, OPTIONS))
    for frame in (flow.tcp_super(PAYLOAD[:40], 10), flow.udp_super(PAYLOAD[:40], 10)):
        for wrong in (40, 48, 64):
            assert dropped(impl, patch(frame, 6, struct.pack("=H", wrong))) == "bad_gso"
        assert len(impl.cut(patch(frame, 6, struct.pack("=H", 56)))) == 4


def test_partial_checksum_behind_extension_headers_is_completed(impl):
    flow = Flow(6, extensions=(OPTIONS,))
    frame = flow.tcp_super(PAYLOAD[:40], 10)
    plain = patch(frame, 1, b"\0")  # as the kernel hands over what is no longer than a segment
    assert impl.cut(plain) == [flow.tcp(PAYLOAD[:40])]


@pytest.mark.parametrize("hiding", [44, 50, 51])
def test_extension_headers_that_hide_the_transport(impl, hiding):
    for extensions in (((hiding, bytes(6)),), (OPTIONS, (hiding, bytes(6))),
                       ((hiding, bytes(6)), OPTIONS)):
        flow = Flow(6, extensions=extensions)
        assert dropped(impl, flow.tcp_super(PAYLOAD[:40], 10)) == "bad_l4_header"
        assert dropped(impl, flow.udp_super(PAYLOAD[:40], 10)) == "bad_l4_header"


@pytest.mark.parametrize("kind", [0, 2, 3, 4, 253])
def test_a_routing_header_with_segments_left(impl, kind):
    """The checksum is over the route's last address, not over the header's (RFC 8200 8.1)."""
    for left in (1, 255):
        route = (ROUTING, bytes([kind, left]) + bytes(20))
        for extensions in ((route,), (ROUTE, route), (OPTIONS, route, OPTIONS)):
            frame = Flow(6, extensions=extensions).tcp_super(PAYLOAD[:40], 10)
            assert dropped(impl, frame) == "bad_l4_header"


def test_extension_headers_that_exceed_the_packet(impl):
    flow = Flow(6, extensions=(OPTIONS, HOP_OPTIONS))
    frame = flow.tcp_super(b"", 10)
    for length in range(40, 56):
        assert dropped(impl, frame[: 10 + length]) == "bad_l4_header"
    for at in (41, 49):
        for words in (100, 255):
            assert dropped(impl, patch(frame, 10 + at, bytes([words]))) == "bad_l4_header"
    # The last one takes all that there is: no byte is left for TCP.
    alone = Flow(6, extensions=(OPTIONS,)).tcp_super(b"xxxx", 10)
    assert dropped(impl, patch(alone, 10 + 41, b"\3")) == "bad_l4_header"


def test_at_most_eight_extension_headers(impl):
    flow = Flow(6, extensions=(OPTIONS,) * 8)
    assert impl.cut(flow.udp_super(b"abc", 2)) == [flow.udp(b"ab"), flow.udp(b"c")]
    flow = Flow(6, extensions=(OPTIONS,) * 9)
    assert dropped(impl, flow.udp_super(b"abc", 2)) == "bad_l4_header"


def test_at_most_120_bytes_of_headers(impl):
    """The header template has room for an IPv4 and a TCP header with all options: 120 bytes."""
    flow = Flow(6, extensions=(LONG_OPTIONS, LONG_OPTIONS, OPTIONS))
    fits, more = {"options": b"\1" * 4}, {"options": b"\1" * 8}
    assert impl.cut(flow.tcp_super(b"abc", 2, **fits)) == [
        flow.tcp(b"ab", seq=1000, **fits), flow.tcp(b"c", seq=1002, **fits),
    ]
    assert dropped(impl, flow.tcp_super(b"abc", 2, **more)) == "bad_l4_header"


def test_another_protocol_behind_the_extension_headers(impl):
    flow = Flow(6, extensions=(OPTIONS,))
    for frame in (flow.tcp_super(PAYLOAD[:40], 10), flow.udp_super(PAYLOAD[:40], 10)):
        for other in (58, 59, 135):
            assert dropped(impl, patch(frame, 10 + 40, bytes([other]))) == "bad_gso"
    assert dropped(impl, patch(flow.tcp_super(b"x" * 40, 10), 1, bytes([UDP_L4]))) == "bad_gso"


@pytest.mark.parametrize("protocol", [0, 43, 44, 50, 51, 60])
def test_ipv4_has_no_extension_headers(impl, protocol):
    frame = patch(Flow().tcp_super(PAYLOAD[:40], 10), 10 + 9, bytes([protocol]))
    assert dropped(impl, frame) == "bad_gso"
