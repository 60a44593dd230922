"""The reference forwarder: the order of its steps, ICMP errors, source checks and counters."""

import ipaddress
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.reference import Probe, ReferenceForwarder, build_probe, fragment, icmp_error
from tests.wire import craft, strategies
from tests.wire.craft import A4, A6, B4, PLAIN, UDP, Flow, addr, ip4, ip6
from udptun.drops import DECAP, DIRECTIONS, DROP_REASONS, ENCAP
from udptun.model import Endpoint, Route

PEER = Endpoint.parse("192.0.2.2:8285")
OTHER = Endpoint.parse("192.0.2.3:9000")
PEER6 = Endpoint.parse("[2001:db8::2]:8285")
OUTSIDER = Endpoint.parse("203.0.113.66:8285")
NAT = Endpoint.parse("192.0.2.5:4000")  # one route lets this peer send from this port
ROUTES = [
    Route.make("10.244.0.0/16", "192.0.2.3", 9000),
    Route.make("10.244.2.0/24", "192.0.2.2", probe=True),
    Route.make("10.244.3.0/24", "192.0.2.2", mtu=1000),
    Route.make("10.244.5.0/24", "192.0.2.5", source_port=4000),
    Route.make("10.244.6.0/24", "192.0.2.5"),
    Route.make("fd00:2::/64", "192.0.2.2"),
    Route.make("fd00:3::/64", "2001:db8::2", probe=True),
]
OURS = [ipaddress.ip_address(a) for a in ("10.244.1.0", "fd00:1::", "192.0.2.1")]
DATA = bytes(3000)


def make(**changes):
    arguments = {"own_addresses": OURS, "tun_addresses": OURS[:2], **changes}
    return ReferenceForwarder(ROUTES, **arguments)


def check_invariant(forwarder):
    for direction in DIRECTIONS:
        counts = forwarder.counts[direction]
        drops = sum(n for (_, way), n in forwarder.drops.items() if way == direction)
        assert counts.read + counts.generated == counts.delivered + counts.consumed + drops
    known = {(reason.name, way) for reason in DROP_REASONS for way in reason.directions}
    assert set(forwarder.drops) <= known


def lowered(packet, hops=1):
    at = 8 if packet[0] >> 4 == 4 else 7
    if at == 7:
        return packet[:7] + bytes([packet[7] - hops]) + packet[8:]
    header = packet[:8] + bytes([packet[8] - hops]) + packet[9 : craft.ip_len(packet)]
    return craft.set_checksum(header, 10) + packet[craft.ip_len(packet) :]


# --- TUN to UDP ---


def test_a_packet_goes_to_the_longest_prefix():
    forwarder = make()
    for dst, endpoint in (("10.244.2.9", PEER), ("10.244.9.9", OTHER), ("10.244.3.1", PEER)):
        packet = ip4(b"x" * 9, UDP, A4, dst)
        assert forwarder.encap(PLAIN + packet).datagrams == [(endpoint, lowered(packet))]
    packet = ip6(b"x" * 9, UDP, A6, "fd00:3::1")
    assert forwarder.encap(PLAIN + packet).datagrams == [(PEER6, lowered(packet))]
    assert forwarder.counts[ENCAP].delivered == 4
    check_invariant(forwarder)


@pytest.mark.parametrize(("version", "dst"), [(4, "198.51.100.1"), (6, "2001:db8:9::1")])
def test_no_route(version, dst):
    forwarder = make()
    packet = Flow(version, dst=addr(dst), ttl=1).udp(b"x")
    result = forwarder.encap(PLAIN + packet)
    assert not result.datagrams
    ours = addr("10.244.1.0" if version == 4 else "fd00:1::")
    assert result.icmp == [icmp_error(packet, "no_route", ours)]
    assert forwarder.drops == {("no_route", ENCAP): 1}
    check_invariant(forwarder)


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("kind", ["tcp", "udp"])
@pytest.mark.parametrize("ttl", [0, 1])
def test_super_packet_with_an_exceeded_hop_limit(version, kind, ttl):
    """Every segment is dropped; the sender gets one error, about the first."""
    forwarder = make()
    flow = Flow(version, ttl=ttl)
    frame = flow.tcp_super(DATA, 1000) if kind == "tcp" else flow.udp_super(DATA, 1000)
    first = flow.tcp(DATA[:1000]) if kind == "tcp" else flow.udp(DATA[:1000])
    result = forwarder.encap(frame)
    assert not result.datagrams
    ours = addr("10.244.1.0" if version == 4 else "fd00:1::")
    assert result.icmp == [icmp_error(first, "ttl_exceeded", ours)]
    assert forwarder.drops == {("ttl_exceeded", ENCAP): 3}
    assert forwarder.counts[ENCAP].read == 3
    assert forwarder.counts[DECAP].generated == 1
    check_invariant(forwarder)


def test_a_super_packet_is_as_many_packets_as_it_is_cut_into():
    forwarder = make()
    flow = Flow(ttl=2)
    result = forwarder.encap(flow.tcp_super(DATA, 1000, ident=3))
    assert result.datagrams == [
        (PEER, lowered(flow.tcp(DATA[at : at + 1000], seq=1000 + at, ident=3 + at // 1000)))
        for at in (0, 1000, 2000)
    ]
    assert forwarder.counts[ENCAP].read == forwarder.counts[ENCAP].delivered == 3
    check_invariant(forwarder)


@pytest.mark.parametrize(
    ("dst", "mtu"), [("10.244.2.9", 1472), ("10.244.3.9", 1000)], ids=["path", "route"]
)
def test_too_big_with_df(dst, mtu):
    forwarder = make()
    fits = ip4(DATA[: mtu - 20], UDP, A4, dst)
    over = ip4(DATA[: mtu - 19], UDP, A4, dst)
    assert len(forwarder.encap(PLAIN + fits).datagrams) == 1
    result = forwarder.encap(PLAIN + over)
    assert not result.datagrams
    assert result.icmp == [icmp_error(over, "too_big", addr("10.244.1.0"), mtu)]
    assert forwarder.drops == {("too_big", ENCAP): 1}
    check_invariant(forwarder)


def test_too_big_ipv6():
    forwarder = make()
    over = ip6(DATA[: 1472 - 39], UDP, A6, "fd00:2::1")
    assert forwarder.encap(PLAIN + over).icmp == [
        icmp_error(over, "too_big", addr("fd00:1::"), 1472)
    ]
    over = ip6(DATA[: 1452 - 39], UDP, A6, "fd00:3::1")
    assert forwarder.encap(PLAIN + over).icmp == [
        icmp_error(over, "too_big", addr("fd00:1::"), 1452)
    ]


def test_path_mtu_of_one_endpoint():
    forwarder = make(path_mtu={PEER: 1300})
    packet = ip4(DATA[:1300], UDP, A4, B4)
    assert forwarder.encap(PLAIN + packet).icmp == [
        icmp_error(packet, "too_big", addr("10.244.1.0"), 1272)
    ]
    assert forwarder.encap(PLAIN + ip4(DATA[:1300], UDP, A4, "10.244.9.9")).datagrams


def test_without_df_it_is_fragmented():
    forwarder = make()
    packet = ip4(DATA, UDP, A4, B4, flags=0)
    result = forwarder.encap(PLAIN + packet)
    assert result.datagrams == [(PEER, piece) for piece in fragment(lowered(packet), 1472)]
    assert not result.icmp
    counts = forwarder.counts[ENCAP]
    assert (counts.read, counts.generated, counts.delivered) == (1, 2, 3)
    check_invariant(forwarder)


def test_a_frame_that_cannot_be_cut_is_one_packet():
    forwarder = make()
    forwarder.encap(Flow().tcp_super(DATA, 0))
    forwarder.encap(b"")
    assert forwarder.drops == {("bad_gso", ENCAP): 1, ("short_packet", ENCAP): 1}
    assert forwarder.counts[ENCAP].read == 2
    check_invariant(forwarder)


def test_no_address_of_the_family_no_icmp():
    forwarder = make(tun_addresses=OURS[:1])
    assert not forwarder.encap(PLAIN + ip6(b"x", UDP, A6, "2001:db8::9")).icmp
    assert forwarder.counts[DECAP].generated == 0
    check_invariant(forwarder)


def test_icmp_errors_are_never_answered():
    forwarder = make()
    error = icmp_error(ip4(b"x" * 8, UDP, "198.51.100.7", B4), "no_route", addr(A4))
    result = forwarder.encap(PLAIN + error)
    assert forwarder.drops == {("no_route", ENCAP): 1}
    assert not result.icmp


# --- UDP to TUN ---


def test_from_a_peer():
    forwarder = make()
    packet = ip4(b"x" * 9, UDP, B4, A4)
    result = forwarder.decap(PEER, packet + b"padding")
    assert (result.packets, result.icmp) == ([lowered(packet)], [])
    check_invariant(forwarder)


@pytest.mark.parametrize(
    ("outer", "inner", "strict", "peer", "off"),
    [
        (PEER, "10.244.2.9", None, None, None),
        (Endpoint.parse("192.0.2.2:1"), "10.244.2.9", "source_port", None, None),
        (Endpoint.parse("192.0.2.2:1"), "192.0.2.2", "source_port", None, None),
        (Endpoint.parse("192.0.2.2:1"), "10.244.1.0", "source_port", "own_source", "own_source"),
        (Endpoint.parse("192.0.2.3:8285"), "10.244.9.9", "source_port", None, None),
        (NAT, "10.244.5.9", None, None, None),
        (NAT, "192.0.2.5", None, None, None),  # the peer itself
        (NAT, "10.244.6.9", "source_not_routed", None, None),  # that route names no other port
        (Endpoint.parse("192.0.2.5:8285"), "10.244.6.9", None, None, None),
        (Endpoint.parse("192.0.2.5:8285"), "10.244.5.9", None, None, None),
        (Endpoint.parse("192.0.2.5:3999"), "10.244.5.9", "source_port", None, None),
        (Endpoint.parse("192.0.2.5:4001"), "10.244.5.9", "source_port", None, None),
        (PEER, "192.0.2.2", None, None, None),  # the peer itself
        (PEER, "10.244.9.9", "source_not_routed", None, None),  # the other peer's
        (OTHER, "10.244.2.9", "source_not_routed", None, None),  # a longer prefix is PEER's
        (OTHER, "192.0.2.2", "source_not_routed", None, None),
        (PEER, "198.51.100.1", "source_not_routed", None, None),
        (OUTSIDER, "10.244.2.9", "unknown_peer", "unknown_peer", None),
        (OUTSIDER, "203.0.113.66", "unknown_peer", "unknown_peer", None),
        (PEER, "10.244.1.0", "own_source", "own_source", "own_source"),
        (PEER, "192.0.2.1", "own_source", "own_source", "own_source"),
        (OUTSIDER, "10.244.1.0", "unknown_peer", "unknown_peer", "own_source"),
        (PEER, "fd00:2::5", None, None, None),
        (PEER6, "fd00:3::5", None, None, None),
        (PEER6, "fd00:2::5", "source_not_routed", None, None),
        (PEER6, "2001:db8::2", None, None, None),
        (PEER, "fd00:1::", "own_source", "own_source", "own_source"),
    ],
)
def test_who_may_send(outer, inner, strict, peer, off):
    for mode, reason in (("strict", strict), ("peer", peer), ("off", off)):
        forwarder = make(source_check=mode)
        packet = ip6(b"", UDP, inner, A6) if ":" in inner else ip4(b"", UDP, inner, A4)
        result = forwarder.decap(outer, packet)
        if reason is None:
            assert result.packets == [lowered(packet)], mode
            assert not forwarder.drops
        else:
            assert result.packets == [], mode
            assert forwarder.drops == {(reason, DECAP): 1}
        check_invariant(forwarder)


@pytest.mark.parametrize(
    ("inner", "admitted"),
    [
        ("10.244.1.0", True),  # the TUN's address, which is in no own subnet here
        ("10.244.1.8", True), ("10.244.1.15", True), ("10.244.1.16", False), ("10.244.7.8", False),
        ("192.0.2.1", False), ("127.0.0.1", False), ("224.0.0.1", False),
        ("255.255.255.255", False), ("198.51.100.1", False),
        ("fd00:1::", True), ("fd00:1::8", True), ("fd00:1::7", False), ("fd00:1::10", False),
        ("2001:db8::1", False), ("ff02::1", False), ("fe80::1", False),
    ],
)
def test_what_may_be_reached(inner, admitted):
    packet = ip6(b"", UDP, "fd00:2::5", inner) if ":" in inner else ip4(b"", UDP, B4, inner)
    for subnets in (None, [ipaddress.ip_network("10.244.1.8/29"), ipaddress.ip_network(
            "fd00:1::8/125")]):
        forwarder = make(own_subnets=subnets)
        result = forwarder.decap(PEER, packet)
        refused = subnets is not None and not admitted
        assert result.packets == ([] if refused else [lowered(packet)])
        assert not result.icmp
        assert forwarder.drops == ({("destination_not_own", DECAP): 1} if refused else {})
        check_invariant(forwarder)


@pytest.mark.parametrize(
    ("datagram", "reason"),
    [
        (b"", "short_packet"),
        (b"\x45" * 19, "short_packet"),  # a keepalive
        (b"\x00" * 40, "bad_version"),
        (b"\x44" + bytes(40), "bad_header_len"),
        (ip4(b"x" * 9, UDP, B4, A4)[:-1], "bad_total_len"),
    ],
)
def test_malformed_datagrams(datagram, reason):
    forwarder = make(source_check="off")
    assert forwarder.decap(OUTSIDER, datagram).packets == []
    assert forwarder.drops == {(reason, DECAP): 1}
    check_invariant(forwarder)


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("ttl", [0, 1])
def test_time_exceeded_is_sent_through_the_tunnel(version, ttl):
    forwarder = make()
    flow = Flow(version, ttl=ttl)
    back = Flow(version, src=flow.destination, dst=flow.source, ttl=ttl)
    packet = back.udp(b"x" * 9)
    result = forwarder.decap(PEER, packet)
    assert result.packets == []
    ours = addr("10.244.1.0" if version == 4 else "fd00:1::")
    assert result.icmp == [(PEER, icmp_error(packet, "ttl_exceeded", ours))]
    assert forwarder.drops == {("ttl_exceeded", DECAP): 1}
    assert forwarder.counts[ENCAP].generated == forwarder.counts[ENCAP].delivered == 1
    check_invariant(forwarder)


def test_no_route_for_the_error():
    forwarder = make(source_check="off")
    packet = ip4(b"x", UDP, "198.51.100.7", A4, ttl=1)
    assert not forwarder.decap(OUTSIDER, packet).icmp
    check_invariant(forwarder)


def test_two_forwarders_in_a_row():
    """One delivers what the other sends, with the hop limit reduced by two."""
    here = make()
    there = ReferenceForwarder(
        [Route.make("10.244.1.0/24", "192.0.2.1"), Route.make("fd00:1::/64", "192.0.2.1")],
        own_addresses=[PEER.address],
    )
    for version in (4, 6):
        flow = Flow(version, ttl=64)
        result = here.encap(flow.tcp_super(DATA, 999, ident=1))
        delivered = [
            packet for _, datagram in result.datagrams
            for packet in there.decap(Endpoint.parse("192.0.2.1:8285"), datagram).packets
        ]
        assert delivered == [
            lowered(flow.tcp(DATA[at : at + 999], seq=1000 + at, ident=1 + at // 999), 2)
            for at in range(0, 3000, 999)
        ]
    check_invariant(here)
    check_invariant(there)


# --- probes ---

REQUEST, REPLY = (Probe(kind, 7, 8, 100) for kind in (1, 2))


@pytest.mark.parametrize("source_check", ["strict", "peer", "off"])
@pytest.mark.parametrize(
    ("sender", "reason"),
    [
        (PEER, None), (PEER6, None),
        (OTHER, "bad_version"),  # a peer whose routes have no ``probe``
        (OUTSIDER, "unknown_peer"),
    ],
)
def test_who_is_answered(sender, reason, source_check):
    forwarder = make(source_check=source_check)
    for probe in (REQUEST, REPLY):
        result = forwarder.decap(sender, build_probe(probe))
        assert result.packets == []
        assert result.probe == (None if reason else probe)
        answered = probe is REQUEST and reason is None
        assert result.replies == (
            [(sender, build_probe(Probe(2, 7, 0, 100)))] if answered else []
        )
    assert forwarder.drops == ({(reason, DECAP): 2} if reason else {})
    assert forwarder.counts[DECAP].consumed == (0 if reason else 2)
    assert forwarder.counts[ENCAP].generated == (0 if reason else 1)
    check_invariant(forwarder)


# --- the invariant, for any input ---


@given(
    st.lists(st.one_of(
        strategies.frames, strategies.mutated(strategies.frames), strategies.noisy_frames,
        st.builds(lambda f, d: f.tcp_super(d, 700), st.sampled_from(strategies.FLOWS),
                  strategies.payloads()),
    ), max_size=5),
    st.lists(st.tuples(
        st.sampled_from([PEER, OTHER, PEER6, OUTSIDER]),
        st.one_of(
            strategies.packets(), strategies.mutated(strategies.packets()), strategies.noise,
            strategies.probe_bytes(), strategies.mutated(strategies.probe_bytes()),
        ),
    ), max_size=5),
    st.sampled_from(["strict", "peer", "off"]),
    st.integers(576, 1500),
)
def test_every_packet_is_counted(frames, datagrams, source_check, underlay_mtu):
    forwarder = make(source_check=source_check, underlay_mtu=underlay_mtu)
    out = Counter()
    for frame in frames:
        result = forwarder.encap(frame)
        out[ENCAP] += len(result.datagrams)
        out[DECAP] += len(result.icmp)
        for endpoint, datagram in result.datagrams:
            overhead = 28 if endpoint.address.version == 4 else 48
            assert len(datagram) + overhead <= underlay_mtu
    for source, datagram in datagrams:
        result = forwarder.decap(source, datagram)
        out[DECAP] += len(result.packets)
        out[ENCAP] += len(result.icmp) + len(result.replies)
    for direction in DIRECTIONS:
        assert forwarder.counts[direction].delivered == out[direction]
    assert forwarder.counts[DECAP].read == len(datagrams)
    check_invariant(forwarder)
