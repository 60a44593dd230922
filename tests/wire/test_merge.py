"""Merging received packets, on both implementations: which packets are merged, which end a flow's
output, and the frames written."""

import struct
from dataclasses import replace

import pytest

from tests.reference import Dropped
from tests.wire import craft
from tests.wire.craft import (
    ACK,
    CWR,
    ECE,
    FIN,
    PLAIN,
    PSH,
    RST,
    SYN,
    TIMESTAMPS,
    URG,
    Flow,
    ip4,
    ip6,
    ones_sum,
)

BOTH = pytest.mark.parametrize("version", [4, 6])
DATA = bytes(range(256)) * 12


def patch(data, at, new):
    return data[:at] + new + data[at + len(new) :]


def train(flow, n, size=100, seq=1000, ident=1, **fields):
    """n adjacent TCP segments."""
    return [
        flow.tcp(DATA[i : i + size], seq=seq + i * size, ident=ident + i, **fields)
        for i in range(n)
    ]


def volley(flow, n, size=100, ident=1):
    """n UDP datagrams of one size."""
    return [flow.udp(DATA[i : i + size], ident=ident + i) for i in range(n)]


def alone(packets):
    return [PLAIN + packet for packet in packets]


def shape(frames):
    """How many segments each frame holds."""
    counts = []
    for frame in frames:
        hdr_len, gso_size = struct.unpack_from("=HH", frame, 2)
        counts.append(-(-(len(frame) - 10 - hdr_len) // gso_size) if gso_size else 1)
    return counts


# --- what is written ---


def test_nothing(impl):
    assert impl.merge([]) == []


@BOTH
def test_single_packet_is_verbatim(impl, version):
    packet = Flow(version).tcp(b"hello")
    assert impl.merge([packet]) == [PLAIN + packet]


@BOTH
def test_tcp_frame(impl, version):
    flow = Flow(version, tos=2, ttl=63, label=7)
    packets = [
        flow.tcp(DATA[0:100], seq=1, options=TIMESTAMPS, ident=9),
        flow.tcp(DATA[100:200], seq=101, options=TIMESTAMPS, ident=10),
        flow.tcp(DATA[200:233], seq=201, options=TIMESTAMPS, ident=11, flags=ACK | PSH),
    ]
    want = flow.tcp_super(
        DATA[:233], 100, seq=1, options=TIMESTAMPS, ident=9, flags=ACK | PSH
    )
    assert impl.merge(packets) == [want]


@BOTH
def test_udp_frame(impl, version):
    flow = Flow(version, tos=0xB8)
    packets = [flow.udp(DATA[at : min(at + 99, 250)], ident=5 + at // 99) for at in (0, 99, 198)]
    assert impl.merge(packets) == [flow.udp_super(DATA[:250], 99, ident=5)]


@BOTH
@pytest.mark.parametrize("size", [1, 2, 3, 1399])
def test_odd_and_even_payloads(impl, version, size):
    """Odd lengths: the second payload starts at an odd offset of the whole."""
    flow = Flow(version)
    assert shape(impl.merge(train(flow, 3, size))) == [3]
    assert shape(impl.merge(volley(flow, 3, size))) == [3]


@BOTH
def test_switches(impl, version):
    """UDP merging can be turned off, because an inner tunnel may suffer from it."""
    tcp, udp = train(Flow(version), 2), volley(Flow(version), 2)
    assert shape(impl.merge(tcp + udp)) == [2, 2]
    assert shape(impl.merge(tcp + udp, udp=False)) == [2, 1, 1]
    assert shape(impl.merge(tcp + udp, tcp=False)) == [1, 1, 2]
    assert impl.merge(tcp + udp, tcp=False, udp=False) == alone(tcp + udp)


def test_singles_between_carry_no_stale_header(impl):
    """A super-packet and then a single packet use the same slot."""
    flow, other = Flow(), Flow(sport=9)
    third = replace(flow, sport=5)
    packets = [*train(flow, 2), other.udp(b"x"), *train(third, 2), other.udp(b"yy")]
    frames = impl.merge(packets)
    assert frames[1] == PLAIN + packets[2]
    assert frames[3] == PLAIN + packets[5]


# --- bounds ---


@BOTH
def test_no_more_than_65535_bytes(impl, version):
    """The 65535-byte edge."""
    flow = Flow(version)
    size = 1000
    room = 65535 - flow.ip_len - 20
    n = room // size
    packets = train(flow, n, size)
    filler = room - n * size
    fits = flow.tcp(DATA[:filler], seq=1000 + n * size, ident=1 + n)
    beyond = flow.tcp(DATA[: filler + 1], seq=1000 + n * size, ident=1 + n)
    frame = impl.merge([*packets, fits])
    assert len(frame) == 1
    assert len(frame[0]) == 10 + 65535
    assert shape(impl.merge([*packets, beyond])) == [n, 1]


def test_udp_at_most_64_segments(impl):
    assert shape(impl.merge(volley(Flow(), 129, 10))) == [64, 64, 1]


def test_tcp_is_bound_by_length_only(impl):
    assert shape(impl.merge(train(Flow(), 1500, 10))) == [1500]


@BOTH
def test_sequence_wraps(impl, version):
    packets = train(Flow(version), 3, 100, seq=2**32 - 150)
    assert shape(impl.merge(packets)) == [3]


def test_ident_wraps(impl):
    assert shape(impl.merge(train(Flow(flags=0), 3, ident=0xFFFE))) == [3]
    assert shape(impl.merge(volley(Flow(flags=0), 3, ident=0xFFFE))) == [3]


# --- TCP: packets that are not merged ---


@BOTH
@pytest.mark.parametrize(
    "flags",
    [0, SYN, ACK | SYN, ACK | FIN, ACK | RST, ACK | URG, ACK | ECE, ACK | CWR, ACK | ECE | CWR,
     PSH, ACK | PSH | FIN, ACK | PSH | ECE],
)
def test_flags_other_than_ack_and_psh(impl, version, flags):
    """ECN, CWR, FIN, URG, SYN: written alone, in order; later packets do not join earlier."""
    a, b, c, d = train(Flow(version), 4)
    odd = Flow(version).tcp(DATA[2:102], seq=1200, ident=3, flags=flags)
    assert impl.merge([a, b, odd, d])[1:] == alone([odd, d])
    assert shape(impl.merge([a, b, c, d])) == [4]


@BOTH
@pytest.mark.parametrize("reserved", [1, 2, 4, 8])
def test_reserved_bits_are_flags_too(impl, version, reserved):
    """AccECN: AE is the lowest of these bits."""
    packets = train(Flow(version), 3, reserved=reserved)
    assert impl.merge(packets) == alone(packets)


@BOTH
def test_psh_closes(impl, version):
    flow = Flow(version)
    a, _, c, d = train(flow, 4)
    pushed = flow.tcp(DATA[1:101], seq=1100, ident=2, flags=ACK | PSH)
    frames = impl.merge([a, pushed, c, d])
    assert shape(frames) == [2, 2]
    assert craft.tcp_flags(frames[0][10:]) == ACK | PSH
    assert craft.tcp_flags(frames[1][10:]) == ACK
    first = flow.tcp(DATA[:100], seq=1000, ident=1, flags=ACK | PSH)
    assert shape(impl.merge([first, pushed, c])) == [1, 1, 1]


@BOTH
def test_shorter_closes_and_larger_never_follows(impl, version):
    flow = Flow(version)
    a, b = train(flow, 2)
    short = flow.tcp(DATA[2:52], seq=1200, ident=3)
    after = flow.tcp(DATA[2:52], seq=1250, ident=4)
    assert shape(impl.merge([a, b, short, after])) == [3, 1]
    small = flow.tcp(DATA[:50], seq=1000, ident=1)
    large = flow.tcp(DATA[:51], seq=1050, ident=2)
    assert shape(impl.merge([small, large])) == [1, 1]


@BOTH
@pytest.mark.parametrize("seq", [1099, 1101, 1000, 1200, 900, 1100 + 2**31])
def test_sequence_not_adjacent(impl, version, seq):
    flow = Flow(version)
    packets = [flow.tcp(DATA[:100], seq=1000, ident=1), flow.tcp(DATA[:100], seq=seq, ident=2)]
    assert impl.merge(packets) == alone(packets)


@BOTH
@pytest.mark.parametrize(
    "other",
    [{"ack": 78}, {"window": 503}, {"urgent": 1}, {"options": TIMESTAMPS},
     {"options": b"\x01" * 4}],
    ids=str,
)
def test_tcp_fields_that_differ(impl, version, other):
    flow = Flow(version)
    packets = [
        flow.tcp(DATA[:100], seq=1000, ident=1),
        flow.tcp(DATA[:100], seq=1100, ident=2, **other),
        flow.tcp(DATA[:100], seq=1200, ident=3, **other),
    ]
    assert shape(impl.merge(packets)) == [1, 2]


@BOTH
def test_changing_timestamps(impl, version):
    """Options of equal length with different bytes."""
    flow = Flow(version)
    later = patch(TIMESTAMPS, 7, b"\x02")
    packets = [
        flow.tcp(DATA[:100], seq=1000, ident=1, options=TIMESTAMPS),
        flow.tcp(DATA[:100], seq=1100, ident=2, options=later),
    ]
    assert impl.merge(packets) == alone(packets)


# --- IP: packets that are not merged ---


@BOTH
@pytest.mark.parametrize("kind", ["tcp", "udp"])
@pytest.mark.parametrize("other", [{"tos": 1}, {"tos": 0x80}, {"ttl": 63}], ids=str)
def test_tos_and_ttl_that_differ(impl, version, kind, other):
    """TTLs are compared; congestion marks must not be lost."""
    flow = Flow(version)
    make = train if kind == "tcp" else volley
    a, b, c = make(flow, 3)[0], *make(replace(flow, **other), 3)[1:]
    assert shape(impl.merge([a, b, c])) == [1, 2]


@pytest.mark.parametrize("make", [train, volley])
def test_flow_labels_that_differ(impl, make):
    a, b = make(Flow(6), 2)[0], make(Flow(6, label=1), 2)[1]
    assert impl.merge([a, b]) == alone([a, b])


@pytest.mark.parametrize("make", [train, volley])
@pytest.mark.parametrize("words", [(0x4000, 0), (0, 0x4000), (0x4000, 0xC000), (0, 0x8000)])
def test_df_and_reserved_bit_that_differ(impl, make, words):
    a, b = make(Flow(flags=words[0]), 2)[0], make(Flow(flags=words[1]), 2)[1]
    assert impl.merge([a, b]) == alone([a, b])


@pytest.mark.parametrize("kind", ["tcp", "udp"])
@pytest.mark.parametrize("ident", [1, 0, 3, 0x8002])
def test_ids_without_df_must_follow(impl, kind, ident):
    packets = []
    for flow in (Flow(flags=0), Flow()):
        if kind == "tcp":
            packets = [flow.tcp(b"aa", seq=1, ident=1), flow.tcp(b"bb", seq=3, ident=ident)]
        else:
            packets = [flow.udp(b"aa", ident=1), flow.udp(b"bb", ident=ident)]
        assert shape(impl.merge(packets)) == ([1, 1] if flow.flags == 0 else [2])


@pytest.mark.parametrize("make", [train, volley])
def test_ipv4_options(impl, make):
    packets = make(Flow(ip_options=b"\x94\x04\0\0"), 3)
    assert impl.merge(packets) == alone(packets)


@pytest.mark.parametrize("make", [train, volley])
@pytest.mark.parametrize("at", [0, 1])
def test_wrong_ipv4_checksum(impl, make, at):
    packets = make(Flow(), 3)
    packets[at] = patch(packets[at], 10, b"\xba\xad")
    want = [1, 2] if at == 0 else [1, 1, 1]
    frames = impl.merge(packets)
    assert shape(frames) == want
    assert frames[at] == PLAIN + packets[at]


@BOTH
@pytest.mark.parametrize("make", [train, volley])
@pytest.mark.parametrize("at", [0, 1, 2])
def test_a_wrong_transport_checksum_is_not_corrected(impl, version, make, at):
    """The kernel does not verify merged packets: one with a bad checksum is written unchanged."""
    packets = make(Flow(version), 4)
    packets[at] = packets[at][:-1] + bytes([packets[at][-1] ^ 1])
    frames = impl.merge(packets)
    assert shape(frames) == {0: [1, 3], 1: [1, 1, 2], 2: [2, 1, 1]}[at]
    assert PLAIN + packets[at] in frames


@BOTH
@pytest.mark.parametrize("make", [train, volley])
def test_wrong_packet_alone(impl, version, make):
    packet = make(Flow(version), 1)[0]
    wrong = packet[:-1] + bytes([packet[-1] ^ 1])
    assert impl.merge([wrong, wrong]) == alone([wrong, wrong])


@BOTH
@pytest.mark.parametrize("make", [train, volley])
def test_padding_behind_the_declared_length(impl, version, make):
    packets = make(Flow(version), 3)
    packets[1] += b"\0"
    assert impl.merge(packets) == alone(packets)


# --- UDP ---


def test_udp_checksum_zero(impl):
    """0 means no checksum; merging would claim a verified one."""
    flow = Flow()
    packets = [flow.udp(b"abcd", ident=i, no_checksum=True) for i in range(3)]
    assert impl.merge(packets) == alone(packets)
    mixed = [flow.udp(b"abcd", ident=0), packets[1], flow.udp(b"abcd", ident=2)]
    assert impl.merge(mixed) == alone(mixed)


@BOTH
def test_udp_checksum_zero_that_would_verify(impl, version):
    """The bytes sum to 0xFFFF with a field of 0: 0 still means that there is no checksum."""
    flow = Flow(version)
    field = craft.transport(flow.udp(b"\0\0"))[6:8]
    right = flow.udp(field)
    assert craft.transport(right)[6:8] == b"\xff\xff"
    packets = [patch(right, flow.ip_len + 6, b"\0\0")] * 3
    assert impl.merge(packets) == alone(packets)
    assert shape(impl.merge([right] * 3)) == [3]


@BOTH
def test_udp_shorter_last(impl, version):
    flow = Flow(version)
    sizes = [100, 100, 40, 100, 100, 101, 100]
    packets = [flow.udp(DATA[:size], ident=i) for i, size in enumerate(sizes)]
    assert shape(impl.merge(packets)) == [3, 2, 2]


@BOTH
def test_udp_without_payload(impl, version):
    """A super-packet cannot represent an empty datagram at its end."""
    flow = Flow(version)
    packets = [flow.udp(b"aa", ident=1), flow.udp(b"", ident=2), flow.udp(b"aa", ident=3)]
    assert impl.merge(packets) == alone(packets)


@BOTH
@pytest.mark.parametrize("length", [0, 7, 107, 109, 65535])
def test_wrong_udp_length_is_not_merged(impl, version, length):
    flow = Flow(version)
    packets = volley(flow, 3)
    at = flow.ip_len + 4
    packets[1] = patch(packets[1], at, length.to_bytes(2, "big"))
    assert impl.merge(packets) == alone(packets)


# --- flows ---


@BOTH
@pytest.mark.parametrize("make", [train, volley])
def test_interleaved_flows(impl, version, make):
    flows = [Flow(version), Flow(version, sport=1), Flow(version, dport=1)]
    trains = [make(flow, 3) for flow in flows]
    packets = [trains[f][i] for i in range(3) for f in range(3)]
    frames = impl.merge(packets)
    assert shape(frames) == [3, 3, 3]
    for frame, one in zip(frames, trains, strict=True):
        assert impl.cut(frame) == one


@BOTH
def test_addresses_make_a_flow(impl, version):
    flow = Flow(version)
    other = replace(flow, dst=flow.destination[:-1] + b"\x63")
    back = replace(flow, src=flow.destination, dst=flow.source, sport=80, dport=4321)
    a, b, c = train(flow, 2)[0], train(other, 2)[1], train(back, 2)[1]
    assert impl.merge([a, b, c]) == alone([a, b, c])


@BOTH
def test_tcp_and_udp_on_the_same_ports(impl, version):
    flow = Flow(version)
    tcp, udp = train(flow, 2), volley(flow, 2)
    assert shape(impl.merge([tcp[0], udp[0], tcp[1], udp[1]])) == [2, 2]


def test_ipv4_and_ipv6_with_the_same_bytes(impl):
    """IPv4 and IPv6: addresses that begin with equal bytes, same ports, and IPv4
    transport bytes that continue as the IPv6 addresses would."""
    four = Flow(4, src=b"\xfd\0\0\1", dst=b"\xfd\0\0\2")
    six = Flow(6, src=b"\xfd\0\0\1" * 4, dst=b"\xfd\0\0\2" * 4)
    mapped = Flow(6, src=bytes(10) + b"\xff\xff" + four.src, dst=bytes(10) + b"\xff\xff" + four.dst)
    trains = [train(flow, 2) for flow in (four, six, mapped)]
    packets = [one[i] for i in range(2) for one in trains]
    frames = impl.merge(packets)
    assert shape(frames) == [2, 2, 2]
    assert [impl.cut(frame) for frame in frames] == trains


# --- order and sealing ---


@BOTH
def test_pure_ack_ships_alone_and_does_not_seal(impl, version):
    flow = Flow(version)
    a, b, c = train(flow, 3)
    ack = flow.tcp(b"", seq=1200, ack=99)
    frames = impl.merge([a, b, ack, c])
    assert shape(frames) == [3, 1]
    assert frames[1] == PLAIN + ack
    assert impl.merge([ack, ack, a]) == alone([ack, ack, a])


@BOTH
@pytest.mark.parametrize("flags", [ACK | FIN, ACK | RST, SYN, ACK | ECE, ACK | PSH])
def test_other_packets_without_payload_seal(impl, version, flags):
    flow = Flow(version)
    a, b, c = train(flow, 3)
    control = flow.tcp(b"", seq=1200, flags=flags)
    assert shape(impl.merge([a, b, control, c])) == [2, 1, 1]


@BOTH
def test_out_of_order_keeps_the_order_of_arrival(impl, version):
    a, b, c, d = train(Flow(version), 4)
    frames = impl.merge([a, c, d, b])
    assert shape(frames) == [1, 2, 1]
    assert [p for frame in frames for p in impl.cut(frame)] == [a, c, d, b]


@BOTH
def test_a_packet_that_is_not_merged_seals_only_its_own_flow(impl, version):
    flow, other = Flow(version), Flow(version, sport=1)
    a, b = train(flow, 2)
    fin = other.tcp(b"x", flags=ACK | FIN)
    frames = impl.merge([a, fin, b])
    assert shape(frames) == [2, 1]


@pytest.mark.parametrize("flags", [0x2000, 0x0001, 0x2001])
@pytest.mark.parametrize("proto", [craft.TCP, craft.UDP])
def test_fragments_seal_all_flows(impl, flags, proto):
    """A later fragment has no ports; it may belong to any flow."""
    tcp, udp, tcp6 = train(Flow(), 2), volley(Flow(), 2), train(Flow(6), 2)
    fragment = ip4(b"x" * 64, proto, flags=flags)
    packets = [tcp[0], udp[0], tcp6[0], fragment, tcp[1], udp[1], tcp6[1]]
    assert impl.merge(packets) == alone(packets)


@pytest.mark.parametrize("flags", [0x2000, 0x0001, 0x6000])
def test_fragments_are_not_merged(impl, flags):
    packets = train(Flow(flags=flags), 3)
    assert impl.merge(packets) == alone(packets)


@pytest.mark.parametrize("next_header", [0, 43, 44, 50, 51, 60])
def test_extension_headers_seal_all_flows(impl, next_header):
    a, b = train(Flow(6), 2)
    hidden = ip6(b"\x06" + bytes(63), next_header)
    assert impl.merge([a, hidden, b]) == alone([a, hidden, b])


@BOTH
@pytest.mark.parametrize("proto", [craft.TCP, craft.UDP])
def test_transport_too_short_seals_all_flows(impl, version, proto):
    a, b = train(Flow(version), 2)
    short = (ip4 if version == 4 else ip6)(b"x" * (19 if proto == craft.TCP else 7), proto)
    assert impl.merge([a, short, b]) == alone([a, short, b])


@BOTH
@pytest.mark.parametrize("words", [0, 4, 15])
def test_impossible_tcp_header_length_seals_its_flow(impl, version, words):
    flow = Flow(version)
    other = train(Flow(version, sport=7), 2)
    a, b, c = train(flow, 3, 20)
    bad = patch(b, flow.ip_len + 12, bytes([words << 4]))
    frames = impl.merge([a, other[0], bad, other[1], c])
    assert shape(frames) == [1, 2, 1, 1]


@pytest.mark.parametrize("proto", [craft.ICMP, 47, 132])
def test_other_protocols_seal_no_output(impl, proto):
    a, b = train(Flow(), 2)
    other = ip4(b"x" * 64, proto)
    assert shape(impl.merge([a, other, b])) == [2, 1]
    a, b = train(Flow(6), 2)
    assert shape(impl.merge([a, ip6(b"x" * 64, craft.ICMP6), b])) == [2, 1]


# --- hostile ---


@pytest.mark.parametrize("packet", [b"", b"\x45", bytes(40), b"\x50" * 40, ip4(b"x", 6)[:-1]])
def test_packets_that_check_packet_refuses_are_refused(impl, packet):
    with pytest.raises(Dropped) as merged:
        impl.merge([Flow().udp(b"x"), packet])
    with pytest.raises(Dropped) as checked:
        impl.check_packet(packet)
    assert merged.value.reason == checked.value.reason


@BOTH
def test_pseudo_header_sum_is_what_the_kernel_expects(impl, version):
    """virtio_net.h: the field holds the sum of the pseudo-header, not inverted."""
    flow = Flow(version)
    frame = impl.merge(train(flow, 2))[0]
    segment = craft.transport(frame[10:])
    want = ones_sum(craft.pseudo(flow.source, flow.destination, 6, len(segment)))
    assert int.from_bytes(segment[16:18], "big") == want
