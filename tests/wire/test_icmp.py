"""ICMP errors, on both implementations: RFC 792, 1122, 1191, 1812, 4443."""

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.wire import craft
from tests.wire.craft import A4, A6, ICMP, ICMP6, TCP, UDP, addr, check_valid, ip4, ip6

OURS4, OURS6 = addr("10.244.1.0"), addr("fd00:1::")
KINDS = ["no_route", "ttl_exceeded", "too_big"]
DATA = bytes(range(256)) * 8
EACH_KIND = pytest.mark.parametrize("kind", KINDS)


def error(impl, packet, kind="no_route", mtu=0):
    return impl.icmp_error(packet, kind, OURS4 if packet[:1] < b"\x60" else OURS6, mtu)


# --- the error ---


@pytest.mark.parametrize(
    ("kind", "type_", "code", "word"),
    [("no_route", 3, 0, 0), ("ttl_exceeded", 11, 0, 0), ("too_big", 3, 4, 1400)],
)
def test_icmpv4(impl, kind, type_, code, word):
    packet = ip4(b"q" * 30, UDP, ttl=1, tos=0x2E)
    body = struct.pack("!BBHHH", type_, code, 0, 0, word) + packet
    want = ip4(
        craft.set_checksum(body, 2), ICMP, OURS4, A4, ttl=64, tos=0xC0, ident=0, flags=0
    )
    assert error(impl, packet, kind, 1400) == want


@pytest.mark.parametrize(
    ("kind", "type_", "word"), [("no_route", 1, 0), ("ttl_exceeded", 3, 0), ("too_big", 2, 1400)]
)
def test_icmpv6(impl, kind, type_, word):
    packet = ip6(b"q" * 30, UDP, ttl=1)
    body = struct.pack("!BBHI", type_, 0, 0, word) + packet
    body = craft.set_checksum(body, 2, craft.pseudo(OURS6, addr(A6), ICMP6, len(body)))
    assert error(impl, packet, kind, 1400) == ip6(body, ICMP6, OURS6, A6, ttl=64, label=0)


@pytest.mark.parametrize("length", [0, 8, 527, 528, 529, 1480])
def test_ipv4_quote_stays_within_576(impl, length):
    packet = ip4(DATA[:length], UDP)
    answer = error(impl, packet)
    assert answer[28:] == packet[:548]
    assert len(answer) == min(28 + len(packet), 576)
    check_valid(answer)


@pytest.mark.parametrize("length", [0, 8, 1191, 1192, 1193, 1460])
def test_ipv6_quote_stays_within_1280(impl, length):
    packet = ip6(DATA[:length], UDP)
    answer = error(impl, packet)
    assert answer[48:] == packet[:1232]
    assert len(answer) == min(48 + len(packet), 1280)
    check_valid(answer)


def test_quote_ends_with_the_packet(impl):
    for packet in (ip4(b"q" * 9, UDP), ip6(b"q" * 9, UDP)):
        assert error(impl, packet + b"padding") == error(impl, packet)


def test_quote_of_a_truncated_packet(impl):
    """The header is enough: the declared length may exceed the bytes that are given."""
    for packet in (ip4(b"q" * 900, UDP), ip6(b"q" * 1400, UDP)):
        answer = error(impl, packet[:100])
        assert answer.endswith(packet[:100])
        check_valid(answer)


def test_ipv4_options_are_quoted(impl):
    packet = ip4(b"q" * 9, UDP, options=b"\x94\x04\0\0")
    assert error(impl, packet)[28:] == packet


@pytest.mark.parametrize(
    ("mtu", "said"), [(0, 68), (67, 68), (68, 68), (1400, 1400), (65535, 65535), (70000, 65535)]
)
def test_ipv4_mtu(impl, mtu, said):
    answer = error(impl, ip4(b"", UDP), "too_big", mtu)
    assert answer[24:28] == struct.pack("!HH", 0, said)


@pytest.mark.parametrize(("mtu", "said"), [(0, 1280), (1279, 1280), (1280, 1280), (1452, 1452)])
def test_ipv6_mtu(impl, mtu, said):
    answer = error(impl, ip6(b"", UDP), "too_big", mtu)
    assert answer[44:48] == struct.pack("!I", said)


# --- when no error is sent ---


@EACH_KIND
def test_ipv4_never_about_icmp_errors(impl, kind):
    silent = {
        type_ for type_ in range(256)
        if error(impl, ip4(bytes([type_]) + bytes(7), ICMP), kind) is None
    }
    assert silent == {3, 4, 5, 11, 12}


@EACH_KIND
def test_ipv6_never_about_icmp_errors(impl, kind):
    silent = {
        type_ for type_ in range(256)
        if error(impl, ip6(bytes([type_]) + bytes(7), ICMP6), kind) is None
    }
    assert silent == {*range(128), 137}


def test_icmp_without_its_type(impl):
    assert error(impl, ip4(b"", ICMP)) is None
    assert error(impl, ip6(b"", ICMP6)) is None
    echo = ip4(b"\x08" + bytes(7), ICMP)
    assert error(impl, echo[:20]) is None
    assert error(impl, echo[:21]) is not None


def test_icmp_error_behind_ipv4_options(impl):
    packet = ip4(b"\x03" + bytes(7), ICMP, options=b"\x08" * 4)
    assert error(impl, packet) is None


@EACH_KIND
def test_never_about_a_later_fragment(impl, kind):
    assert error(impl, ip4(b"x" * 8, UDP, flags=0x2000), kind) is not None  # the first
    for word in (0x0001, 0x2001, 0x1FFF, 0x1000, 0x0100):
        assert error(impl, ip4(b"x" * 8, UDP, flags=word), kind) is None


@EACH_KIND
@pytest.mark.parametrize("dst", ["224.0.0.1", "239.255.255.255", "255.255.255.255"])
def test_ipv4_never_about_many_receivers(impl, dst, kind):
    assert error(impl, ip4(b"x" * 8, UDP, A4, dst), kind) is None


@pytest.mark.parametrize("dst", ["223.255.255.255", "240.0.0.1", "255.255.255.254"])
def test_ipv4_other_destinations(impl, dst):
    assert error(impl, ip4(b"x" * 8, UDP, A4, dst)) is not None


@EACH_KIND
@pytest.mark.parametrize(
    "src",
    ["0.0.0.0", "0.1.2.3", "127.0.0.1", "127.255.255.255", "224.0.0.1", "239.1.1.1", "240.0.0.1",
     "255.255.255.255"],
)
def test_ipv4_never_to_a_source_that_is_not_unicast(impl, src, kind):
    assert error(impl, ip4(b"x" * 8, UDP, src), kind) is None


@pytest.mark.parametrize("src", ["1.0.0.0", "126.255.255.255", "128.0.0.1", "223.255.255.255"])
def test_ipv4_sources_at_the_edges(impl, src):
    answer = error(impl, ip4(b"x" * 8, UDP, src))
    assert answer[16:20] == addr(src)


@EACH_KIND
@pytest.mark.parametrize("src", ["::", "::1", "ff02::1", "ff00::"])
def test_ipv6_never_to_a_source_that_is_not_unicast(impl, src, kind):
    assert error(impl, ip6(b"x" * 8, UDP, src), kind) is None


@pytest.mark.parametrize("src", ["::2", "1::", "fe80::1", "2001:db8::1", "feff::1"])
def test_ipv6_sources_at_the_edges(impl, src):
    assert error(impl, ip6(b"x" * 8, UDP, src))[24:40] == addr(src)


def test_ipv6_multicast_only_too_big(impl):
    """RFC 4443 2.4 (e.3): path MTU discovery works for multicast."""
    packet = ip6(b"x" * 8, UDP, A6, "ff0e::1")
    assert error(impl, packet, "too_big", 1400) is not None
    assert error(impl, packet, "no_route") is None
    assert error(impl, packet, "ttl_exceeded") is None


# --- IPv6 extension headers ---


def extension(next_header, words=0, first=0):
    return bytes([next_header, words, first, 0]) + bytes(4 + 8 * words)


def fragment_header(next_header, offset=0, more=1, id_=1):
    return struct.pack("!BBHI", next_header, 0, offset << 3 | more, id_)


ERROR6, ECHO6 = b"\x01" + bytes(7), b"\x80" + bytes(7)


@pytest.mark.parametrize("first", [0, 43, 60])
@pytest.mark.parametrize("words", [0, 1, 3])
def test_icmpv6_error_behind_an_extension_header(impl, first, words):
    assert error(impl, ip6(extension(ICMP6, words) + ERROR6, first)) is None
    assert error(impl, ip6(extension(ICMP6, words) + ECHO6, first)) is not None
    assert error(impl, ip6(extension(UDP, words) + ERROR6, first)) is not None


def test_icmpv6_behind_a_chain(impl):
    chain = extension(60) + extension(43, 1) + extension(44) + fragment_header(60)
    chain += extension(ICMP6)
    assert error(impl, ip6(chain + ERROR6, 0)) is None
    assert error(impl, ip6(chain + ECHO6, 0)) is not None


def test_ipv6_fragments(impl):
    assert error(impl, ip6(fragment_header(UDP) + bytes(8), 44)) is not None
    assert error(impl, ip6(fragment_header(ICMP6) + ERROR6, 44)) is None
    for offset in (1, 0x1000, 0x1FFF):
        assert error(impl, ip6(fragment_header(UDP, offset) + bytes(8), 44)) is None
    reserved = fragment_header(UDP)[:3] + b"\x06" + fragment_header(UDP)[4:]
    assert error(impl, ip6(reserved + bytes(8), 44)) is not None


@pytest.mark.parametrize("first", [0, 43, 44, 60])
@pytest.mark.parametrize("length", range(8))
def test_broken_chain(impl, first, length):
    assert error(impl, ip6(extension(UDP)[:length], first)) is None


def test_extension_header_that_runs_over_the_packet(impl):
    assert error(impl, ip6(extension(UDP, 2)[:-1], 0)) is None
    assert error(impl, ip6(bytes([UDP, 255]) + bytes(60), 0)) is None


def test_endless_chain(impl):
    assert error(impl, ip6(extension(60) * 7 + extension(UDP) + bytes(8), 60)) is not None
    assert error(impl, ip6(extension(60) * 8 + extension(UDP) + bytes(8), 60)) is None


def test_other_next_headers_end_the_walk(impl):
    for proto in (TCP, UDP, 50, 51, 59, 132, 255):
        assert error(impl, ip6(bytes(8), proto)) is not None


# --- malformed ---


@EACH_KIND
def test_malformed(impl, kind):
    four, six = ip4(b"x" * 8, UDP), ip6(b"x" * 8, UDP)
    bad = [
        b"", four[:19], b"\x44" + four[1:], b"\x4f" + four[1:], ip4(b"x", UDP, total_len=19),
        six[:39],
    ]
    for packet in bad:
        assert error(impl, packet, kind) is None


def test_unknown_ip_version(impl):
    four = ip4(b"x" * 8, UDP)
    assert impl.icmp_error(b"\x75" + four[1:], "no_route", OURS6) is None


# --- properties ---


@given(
    packet=st.one_of(st.binary(max_size=1600), st.builds(
        lambda version, rest: bytes([version]) + rest,
        st.sampled_from([0x45, 0x46, 0x60]), st.binary(max_size=1600),
    )),
    kind=st.sampled_from(KINDS), mtu=st.integers(0, 2**32 - 1),
)
def test_an_error_is_valid_bounded_and_never_answered(impl, packet, kind, mtu):
    answer = error(impl, packet, kind, mtu)
    if answer is None:
        return
    check_valid(answer)
    assert len(answer) <= (576 if answer[0] >> 4 == 4 else 1280)
    for other in KINDS:
        assert error(impl, answer, other) is None
