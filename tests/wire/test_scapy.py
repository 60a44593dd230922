"""The steps checked with scapy: it builds their input and parses their output."""

import logging
import warnings

import pytest

from tests.wire import craft
from tests.wire.craft import NEEDS_CSUM, vnet_hdr

logging.getLogger("scapy").setLevel(logging.ERROR)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # importing scapy prints deprecation warnings of other packages
    from scapy.layers.inet import ICMP, IP, TCP, UDP, IPerror, IPOption, TCPerror
    from scapy.layers.inet import fragment as scapy_fragment
    from scapy.layers.inet6 import (
        ICMPv6DestUnreach,
        ICMPv6PacketTooBig,
        ICMPv6TimeExceeded,
        IPv6,
        IPv6ExtHdrFragment,
        IPv6ExtHdrHopByHop,
    )
    from scapy.packet import Raw

DATA = bytes(range(256)) * 12
OURS6 = bytes.fromhex("20010db80000000000000000000000fe")
BOTH = pytest.mark.parametrize("version", [4, 6])


def ip(version, **fields):
    if version == 4:
        return IP(src="192.0.2.1", dst="198.51.100.2", flags="DF", id=7, ttl=9, **fields)
    return IPv6(src="2001:db8::1", dst="2001:db8::2", hlim=9, fl=0x54321, **fields)


def parse(packet):
    return IP(packet) if packet[0] >> 4 == 4 else IPv6(packet)


def recomputed(packet):
    """The packet as scapy builds it when it has to work out all lengths and checksums itself. The
    transport of a fragment is not whole, so it stays as it is."""
    parsed = parse(packet)
    fragment = IP in parsed and (parsed.flags.MF or parsed.frag)
    layer = parsed
    while layer:
        for name in ("chksum", "len", "plen", "ihl"):
            if name in layer.fields:
                layer.delfieldval(name)
        if fragment:
            break
        layer = layer.payload
    return bytes(parsed)


def super_packet(packet, gso_type, gso_size):
    """scapy's packet as a frame; its transport checksum, whole, stands where the kernel leaves the
    pseudo-header's sum: a cut must not look at it."""
    start = craft.ip_len(packet)
    offset = 6 if gso_type == craft.UDP_L4 else 16
    return vnet_hdr(
        flags=NEEDS_CSUM, gso_type=gso_type, gso_size=gso_size, csum_start=start,
        csum_offset=offset,
    ) + packet


@BOTH
@pytest.mark.parametrize("gso_size", [100, 537, 1399])
def test_tcp_segments(impl, version, gso_size):
    options = [("NOP", None), ("NOP", None), ("Timestamp", (1, 2))]
    tcp = TCP(sport=1, dport=2, seq=99, ack=5, flags="PA", window=7, options=options)
    packet = bytes(ip(version) / tcp / Raw(DATA))
    segments = impl.cut(super_packet(packet, 1 if version == 4 else 4, gso_size))
    whole = b""
    for index, segment in enumerate(segments):
        assert recomputed(segment) == segment
        parsed = parse(segment)
        assert parsed[TCP].seq == 99 + len(whole)
        assert parsed[TCP].options == options
        assert parsed[TCP].flags == ("PA" if index == len(segments) - 1 else "A")
        whole += bytes(parsed[TCP].payload)
    assert whole == DATA


@BOTH
@pytest.mark.parametrize("gso_size", [101, 536, 1399])
def test_udp_segments(impl, version, gso_size):
    packet = bytes(ip(version) / UDP(sport=1, dport=2) / Raw(DATA))
    segments = impl.cut(super_packet(packet, craft.UDP_L4, gso_size))
    assert [recomputed(segment) for segment in segments] == segments
    assert b"".join(bytes(parse(segment)[UDP].payload) for segment in segments) == DATA


@BOTH
def test_merge_of_scapys_segments(impl, version):
    packets = [
        bytes(ip(version) / TCP(sport=1, dport=2, seq=at, flags="A") / Raw(DATA[at : at + 500]))
        for at in range(0, 2500, 500)
    ]
    packets += [
        bytes(ip(version) / UDP(sport=1, dport=2) / Raw(DATA[at : at + 500]))
        for at in range(0, 2500, 500)
    ]
    tcp, udp = impl.merge(packets)
    for frame, layer in ((tcp, TCP), (udp, UDP)):
        parsed = parse(frame[10:])
        assert bytes(parsed[layer].payload) == DATA[:2500]
        again = parse(recomputed(frame[10:]))
        # Lengths and IPv4 checksum are those of the merged packet; the kernel computes the
        # transport checksum.
        if version == 4:
            assert (parsed.len, parsed.chksum) == (again.len, again.chksum)
        else:
            assert parsed.plen == again.plen
        if layer is UDP:
            assert parsed[UDP].len == again[UDP].len


@BOTH
def test_hop_limit(impl, version):
    packet = bytes(ip(version) / UDP() / Raw(b"x"))
    after = impl.decrement_hop_limit(packet)
    assert recomputed(after) == after
    assert (parse(after).ttl if version == 4 else parse(after).hlim) == 8


@pytest.mark.parametrize("fragsize", [8, 96, 560, 1480])
def test_fragments(impl, fragsize):
    packet = IP(src="192.0.2.1", dst="198.51.100.2", id=7) / UDP() / Raw(DATA)
    ours = impl.fragment(bytes(packet), 20 + fragsize)
    assert ours == [bytes(piece) for piece in scapy_fragment(packet, fragsize)]


def test_fragments_with_options(impl):
    options = [IPOption(b"\x94\x04\x00\x00"), IPOption(b"\x07\x07\x04\x00\x00\x00\x00")]
    packet = bytes(IP(src="192.0.2.1", dst="198.51.100.2", options=options) / UDP() / Raw(DATA))
    first, *later = impl.fragment(packet, 576)
    assert recomputed(first) == first
    assert len(parse(first).options) == 3  # with the end of list
    for piece in later:
        assert [option.option for option in parse(piece).options] == [20]  # router alert


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("no_route", {"type": "dest-unreach", "code": "network-unreachable"}),
        ("ttl_exceeded", {"type": "time-exceeded", "code": "ttl-zero-during-transit"}),
        ("too_big",
         {"type": "dest-unreach", "code": "fragmentation-needed", "nexthopmtu": 1400}),
    ],
)
def test_icmpv4(impl, kind, fields):
    packet = bytes(ip(4) / TCP(sport=1234, dport=80) / Raw(DATA))
    answer = impl.icmp_error(packet, kind, bytes([203, 0, 113, 9]), 1400)
    outer = IP(src="203.0.113.9", dst="192.0.2.1", ttl=64, tos=0xC0, id=0)
    assert answer == bytes(outer / ICMP(**fields) / Raw(packet[: 576 - 28]))
    parsed = parse(answer)
    assert parsed[IPerror].dst == "198.51.100.2"
    assert parsed[TCPerror].sport == 1234


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("no_route", ICMPv6DestUnreach(code=0)),
        ("ttl_exceeded", ICMPv6TimeExceeded(code=0)),
        ("too_big", ICMPv6PacketTooBig(mtu=1400)),
    ],
)
def test_icmpv6(impl, kind, message):
    packet = bytes(ip(6) / TCP(sport=1234, dport=80) / Raw(DATA))
    answer = impl.icmp_error(packet, kind, OURS6, 1400)
    outer = IPv6(src="2001:db8::fe", dst="2001:db8::1", hlim=64)
    assert answer == bytes(outer / message / Raw(packet[: 1280 - 48]))
    assert parse(answer)[TCPerror].sport == 1234


def test_icmpv6_error_behind_scapys_extension_headers(impl):
    for chain in (
        IPv6ExtHdrHopByHop(),
        IPv6ExtHdrHopByHop() / IPv6ExtHdrFragment(id=3, m=1),
    ):
        error = bytes(ip(6) / chain / ICMPv6TimeExceeded() / Raw(bytes(40)))
        assert impl.icmp_error(error, "no_route", OURS6) is None
        data = bytes(ip(6) / chain / UDP() / Raw(bytes(40)))
        assert impl.icmp_error(data, "no_route", OURS6) is not None
    later = bytes(ip(6) / IPv6ExtHdrFragment(id=3, offset=9, nh=17) / Raw(bytes(40)))
    assert impl.icmp_error(later, "no_route", OURS6) is None
