"""Properties of every packet, on both implementations."""

import struct
from collections import Counter, defaultdict

from hypothesis import given
from hypothesis import strategies as st

from tests.reference import Dropped
from tests.wire import craft, strategies
from tests.wire.craft import ACK, PLAIN, TCP, UDP, check_valid


def flow_of(packet):
    size = 8 if packet[0] >> 4 == 4 else 32
    at = 12 if packet[0] >> 4 == 4 else 8
    proto, _ = craft.upper(packet)
    return packet[0] >> 4, proto, packet[at : at + size], craft.transport(packet)[:4]


def is_pure_ack(packet):
    proto = packet[9] if packet[0] >> 4 == 4 else packet[6]
    segment = craft.transport(packet)
    return (
        proto == TCP and len(segment) >= 20 and segment[13] == ACK
        and (segment[12] >> 4) * 4 == len(segment)
    )


def without_free_id(packet):
    """Return the packet without the IPv4 id if DF is set: then the id has no meaning (RFC 6864
    4.1), so a merge need not keep it, and a cut increments it."""
    if packet[0] >> 4 == 4 and packet[6] & 0x40:
        return packet[:4] + b"\0\0" + packet[6:10] + b"\0\0" + packet[12:]
    return packet


def cut_again(impl, frames):
    """Return the packets in frames; single packets unchanged, because they may be invalid."""
    return [
        packet
        for frame in frames
        for packet in ([frame[10:]] if frame[:10] == PLAIN else impl.cut(frame))
    ]


def check_nothing_lost(impl, packets, frames):
    """Merge, then cut: the same packets, and each flow in order, except for pure ACKs."""
    again = [without_free_id(packet) for packet in cut_again(impl, frames)]
    came = [without_free_id(packet) for packet in packets]
    assert Counter(again) == Counter(came)
    for one in (again, came):
        one[:] = [packet for packet in one if not is_pure_ack(packet)]
    by_flow = defaultdict(list), defaultdict(list)
    for order, one in zip(by_flow, (again, came), strict=True):
        for packet in one:
            order[flow_of(packet)].append(packet)
    assert by_flow[0] == by_flow[1]


def check_fragments_keep_their_place(packets, frames):
    """A packet with hidden ports may belong to any flow: no packet may overtake it."""
    def hides(packet):
        if packet[0] >> 4 == 6:
            return packet[6] in (0, 43, 44, 50, 51, 60)
        return packet[9] in (TCP, UDP) and bool(int.from_bytes(packet[6:8], "big") & 0x3FFF)

    def segments(frame):
        if frame[:10] == PLAIN:
            return 1
        hdr_len, size = struct.unpack_from("=HH", frame, 2)
        return -(-(len(frame) - 10 - hdr_len) // size)

    def places(ones, hidden, count):
        seen, found = 0, []
        for one in ones:
            if hidden(one):
                found.append(seen)
            seen += count(one)
        return found

    assert places(packets, hides, lambda _: 1) == places(
        frames, lambda f: f[:10] == PLAIN and hides(f[10:]), segments
    )


@given(strategies.mergeable_frames())
def test_cut_then_merge_is_the_identity(impl, frame):
    packets = impl.cut(frame)
    if frame[1] == craft.UDP_L4 and len(packets) > 64:
        return
    assert impl.merge(packets) == [frame]


@given(strategies.arrivals(), st.booleans(), st.booleans())
def test_merge_then_cut_gives_the_packets_back(impl, packets, tcp, udp):
    frames = impl.merge(packets, tcp, udp)
    check_nothing_lost(impl, packets, frames)
    check_fragments_keep_their_place(packets, frames)


@given(strategies.super_frames())
def test_every_segment_is_valid(impl, frame):
    packets = impl.cut(frame)
    for packet in packets:
        check_valid(packet)
    headers = craft.ip_len(packets[0])
    kind = TCP if frame[1] & 0x7F != craft.UDP_L4 else UDP
    payload = craft.tcp_payload if kind == TCP else craft.udp_payload
    whole = b"".join(payload(packet) for packet in packets)
    assert frame.endswith(whole)
    assert len(frame) - 10 - headers - len(whole) == len(packets[0]) - headers - len(
        payload(packets[0])
    )


@given(strategies.arrivals())
def test_every_packet_out_of_a_merge_is_as_valid_as_it_came(impl, packets):
    for frame in impl.merge(packets):
        if frame[:10] != PLAIN:
            for packet in impl.cut(frame):
                check_valid(packet)
        else:
            assert frame[10:] in packets


@given(st.lists(strategies.mutated(strategies.packets()), max_size=20), strategies.arrivals())
def test_merging_keeps_hostile_packets_unchanged(impl, hostile, valid):
    packets = []
    for packet in [*valid[::2], *hostile, *valid[1::2]]:
        try:
            impl.check_packet(packet)
        except Dropped:
            continue
        packets.append(packet)
    frames = impl.merge(packets)
    again = [without_free_id(packet) for packet in cut_again(impl, frames)]
    assert Counter(again) == Counter(without_free_id(packet) for packet in packets)


@given(strategies.packets(), st.integers(1, 300))
def test_hop_limit_runs_out(impl, packet, hops):
    at = 8 if packet[0] >> 4 == 4 else 7
    left = packet[at]
    for _ in range(hops):
        try:
            packet = impl.decrement_hop_limit(packet)
        except Dropped as drop:
            assert drop.reason == "ttl_exceeded"
            assert packet[at] <= 1
            break
        left -= 1
        assert packet[at] == left
        check_valid(packet)


def call(function, *args):
    try:
        return function(*args)
    except Dropped as drop:
        return drop.reason


@given(st.one_of(
    strategies.noise, strategies.noisy_frames, strategies.mutated(strategies.frames),
    st.binary(max_size=2000),
))
def test_arbitrary_bytes_never_crash(impl, data):
    """A result or a named drop, nothing else."""
    for packet in (data, data[10:]):
        call(impl.cut, packet)
        call(impl.check_packet, packet)
        call(impl.decrement_hop_limit, packet)
        call(impl.fragment, packet, 68)
        call(impl.merge, [packet, packet])
        impl.checksum(packet)
        for kind in ("no_route", "ttl_exceeded", "too_big"):
            impl.icmp_error(packet, kind, bytes(4 if packet[:1] < b"\x50" else 16), 1400)
