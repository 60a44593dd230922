"""Finishing the checksum of a packet that the kernel of a peer has left unfinished."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.wire import strategies
from tests.wire.craft import ICMP, TCP, UDP, ip4, ones_sum, pseudo, set_checksum, unfinished

PAYLOAD = bytes(range(256)) * 3


@given(strategies.packets())
def test_an_unfinished_packet_becomes_the_one_that_was_meant(impl, packet):
    if packet[0] == 0x45 or packet[0] >> 4 == 6:
        assert impl.finish_checksum(unfinished(packet)) in (packet, unfinished(packet))


def udp(payload: bytes, checksum: bytes | None = None) -> bytes:
    head = b"\x30\x39\x00\x35" + (8 + len(payload)).to_bytes(2, "big")
    segment = head + (checksum or b"\0\0") + payload
    if checksum is None:
        before = pseudo(b"\x0a\xf4\x01\x07", b"\x0a\xf4\x02\x09", UDP, len(segment))
        segment = set_checksum(segment, 6, before, zero=0xFFFF)
    return ip4(segment, UDP)


def test_udp_is_finished(impl):
    packet = udp(PAYLOAD)
    assert unfinished(packet) != packet
    assert impl.finish_checksum(unfinished(packet)) == packet


def test_a_sum_of_zero_is_sent_as_all_ones(impl):
    """RFC 768. The last word of the payload is chosen so that the sum is 0."""
    blank = unfinished(udp(PAYLOAD + b"\0\0"))
    rest = 0xFFFF - ones_sum(blank[20:])
    packet = unfinished(udp(PAYLOAD + rest.to_bytes(2, "big")))
    assert impl.finish_checksum(packet)[26:28] == b"\xff\xff"


def test_bytes_after_the_declared_length_do_not_count(impl):
    packet = udp(PAYLOAD)
    assert impl.finish_checksum(unfinished(packet) + b"padding") == packet + b"padding"


@pytest.mark.parametrize("packet", [
    udp(PAYLOAD),
    udp(PAYLOAD, b"\0\0"),  # no checksum
    udp(PAYLOAD, b"\x12\x34"),  # a wrong checksum stays wrong
    unfinished(ip4(bytes(7), UDP)), unfinished(ip4(bytes(19), TCP)),  # too short for a header
    ip4(PAYLOAD, ICMP),
    unfinished(udp(PAYLOAD))[:6] + b"\x20\x00" + unfinished(udp(PAYLOAD))[8:],  # a fragment
    unfinished(udp(PAYLOAD))[:6] + b"\x00\x07" + unfinished(udp(PAYLOAD))[8:],
])
def test_other_packets_are_not_changed(impl, packet):
    assert impl.finish_checksum(packet) == packet


@given(st.integers(0, 0xFFFF))
def test_a_right_checksum_that_equals_the_sum_of_the_pseudo_header_is_kept(impl, word):
    """Such a packet is rare, but must not be changed."""
    packet = unfinished(udp(PAYLOAD + word.to_bytes(2, "big") + b"\0\0"))
    before = pseudo(packet[12:16], packet[16:20], UDP, len(packet) - 20)
    rest = 0xFFFF - ones_sum(before + packet[20:])
    packet = packet[:-2] + rest.to_bytes(2, "big")
    assert impl.finish_checksum(packet) == packet
