"""The IP header, on both implementations: validation, and the hop limit."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.reference import Dropped
from tests.wire.craft import A4, B4, UDP, Flow, check_valid, ip4, ip6, ones_sum

P4 = ip4(b"payload", UDP)
P6 = ip6(b"payload", UDP)


def dropped(function, *args):
    with pytest.raises(Dropped) as caught:
        function(*args)
    return caught.value.reason


def test_dropped_names_only_known_reasons():
    with pytest.raises(ValueError, match="not in udptun"):
        Dropped("bad_weather")


@pytest.mark.parametrize("packet", [P4, P6], ids=["ipv4", "ipv6"])
def test_declared_length(impl, packet):
    assert impl.check_packet(packet) == len(packet)
    assert impl.check_packet(packet + b"padding") == len(packet)


def test_header_alone_is_a_packet(impl):
    assert impl.check_packet(ip4(b"", UDP)) == 20
    assert impl.check_packet(ip6(b"", UDP)) == 40
    assert impl.check_packet(ip4(b"", UDP, options=b"\x01" * 40)) == 60


@pytest.mark.parametrize("length", range(20))
def test_ipv4_under_20_bytes_is_short(impl, length):
    """Keepalives towards a flannel peer are 1 to 19 bytes: they must be dropped."""
    assert dropped(impl.check_packet, P4[:length]) == "short_packet"


@pytest.mark.parametrize("length", [0, 1, 20, 39])
def test_ipv6_under_40_bytes_is_short(impl, length):
    assert dropped(impl.check_packet, P6[:length]) == "short_packet"


@pytest.mark.parametrize("version", [v for v in range(16) if v not in (4, 6)])
def test_other_versions(impl, version):
    assert dropped(impl.check_packet, bytes([version << 4 | 5]) + P4[1:]) == "bad_version"
    assert dropped(impl.check_packet, bytes([version << 4])) == "bad_version"


@pytest.mark.parametrize("words", range(5))
def test_ipv4_header_under_20(impl, words):
    assert dropped(impl.check_packet, bytes([0x40 | words]) + P4[1:]) == "bad_header_len"


def test_ipv4_header_beyond_the_packet(impl):
    assert dropped(impl.check_packet, b"\x4f" + P4[1:]) == "bad_header_len"


def test_ipv4_length_under_its_header(impl):
    assert dropped(impl.check_packet, ip4(b"x" * 20, UDP, total_len=19)) == "bad_total_len"
    with_options = ip4(b"x" * 20, UDP, total_len=23, options=b"\x01" * 4)
    assert dropped(impl.check_packet, with_options) == "bad_total_len"


def test_length_beyond_the_packet(impl):
    assert dropped(impl.check_packet, P4[:-1]) == "bad_total_len"
    assert dropped(impl.check_packet, P6[:-1]) == "bad_total_len"


def test_wrong_ipv4_checksum_is_accepted(impl):
    packet = P4[:10] + b"\xde\xad" + P4[12:]
    assert impl.check_packet(packet) == len(packet)


# --- hop limit ---


@pytest.mark.parametrize("ttl", [2, 3, 64, 128, 255])
@pytest.mark.parametrize("version", [4, 6])
def test_one_hop_less(impl, version, ttl):
    before = Flow(version, ttl=ttl).udp(b"payload")
    after = impl.decrement_hop_limit(before)
    assert after == Flow(version, ttl=ttl - 1).udp(b"payload")
    check_valid(after)


@pytest.mark.parametrize("ttl", [0, 1])
@pytest.mark.parametrize("version", [4, 6])
def test_no_hop_left(impl, version, ttl):
    """A packet that arrives with 0 must not wrap to 255, as it does in flannel's UDP backend."""
    packet = Flow(version, ttl=ttl).udp(b"payload")
    assert dropped(impl.decrement_hop_limit, packet) == "ttl_exceeded"


def test_checksum_that_becomes_zero(impl):
    """RFC 1624 section 3: eqn 3 gives 0x0000 where eqn 2 of RFC 1141 would give 0xFFFF."""
    for ident in range(0x10000):
        packet = ip4(b"", UDP, ident=ident)
        if packet[10:12] == b"\xfe\xff":
            break
    else:
        pytest.fail("no header with checksum feff found")
    assert impl.decrement_hop_limit(packet)[10:12] == b"\x00\x00"
    assert ones_sum(impl.decrement_hop_limit(packet)) == 0xFFFF


def test_rfc1624_by_hand(impl):
    # the header of test_checksum's known packet: TTL 64 -> 63, b861 -> b961
    before = bytes.fromhex("4500001400004000401100000a0000010a000002")
    before = before[:10] + (0xFFFF - ones_sum(before)).to_bytes(2, "big") + before[12:]
    after = impl.decrement_hop_limit(before)
    assert after[8] == 63
    assert int.from_bytes(after[10:12], "big") == int.from_bytes(before[10:12], "big") + 0x100


@given(
    st.integers(0, 0xFFFF), st.integers(2, 255), st.integers(0, 255), st.integers(0, 0xFFFF)
)
def test_a_wrong_checksum_stays_wrong(impl, ident, ttl, proto, error):
    right = ip4(b"", proto, A4, B4, ident=ident, ttl=ttl)
    field = ones_sum(right[10:12] + error.to_bytes(2, "big"))
    wrong = right[:10] + field.to_bytes(2, "big") + right[12:]
    after = impl.decrement_hop_limit(wrong)
    assert ones_sum(after) % 0xFFFF == ones_sum(wrong) % 0xFFFF
    assert after[8] == ttl - 1
    assert after[:8] + after[9:10] + after[12:] == wrong[:8] + wrong[9:10] + wrong[12:]


def test_hop_limit_of_an_invalid_packet(impl):
    assert dropped(impl.decrement_hop_limit, b"") == "short_packet"
    assert dropped(impl.decrement_hop_limit, P4[:19]) == "short_packet"
    assert dropped(impl.decrement_hop_limit, b"\x50" + P4[1:]) == "bad_version"
    assert dropped(impl.decrement_hop_limit, b"\x44" + P4[1:]) == "bad_header_len"
