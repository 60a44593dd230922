"""RFC 791 fragmentation, on both implementations."""

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from tests.reference import Dropped
from tests.wire import craft
from tests.wire.craft import UDP, ip4, ip6, ones_sum

DF, MF = 0x4000, 0x2000
DATA = bytes(range(256)) * 16


def dropped(impl, packet, mtu):
    with pytest.raises(Dropped) as caught:
        impl.fragment(packet, mtu)
    return caught.value.reason


def word(packet):
    return int.from_bytes(packet[6:8], "big")


def reassemble(fragments):
    """Reassemble the payload; each byte must be present exactly once."""
    whole = b""
    for one in fragments:
        assert (word(one) & 0x1FFF) * 8 == len(whole)
        whole += one[craft.ip_len(one) :]
    return whole


def test_rfc791_example(impl):
    """RFC 791 appendix A, example 2: 472 bytes of data, MTU 280: 256 + 216, offsets 0 and 32."""
    packet = ip4(DATA[:452], 6, "1.2.3.4", "5.6.7.8", ttl=123, ident=111, flags=0)
    assert len(packet) == 472
    first, second = impl.fragment(packet, 280)
    assert first == ip4(
        DATA[:256], 6, "1.2.3.4", "5.6.7.8", ttl=123, ident=111, flags=MF
    )
    assert second == ip4(
        DATA[256:452], 6, "1.2.3.4", "5.6.7.8", ttl=123, ident=111, flags=32
    )


@pytest.mark.parametrize("mtu", [40, 41, 1500, 65535])
def test_a_packet_that_fits_is_unchanged(impl, mtu):
    for flags in (0, DF, MF, 7):
        packet = ip4(DATA[:20], UDP, flags=flags)
        wrong = packet[:10] + b"\xba\xad" + packet[12:]
        assert impl.fragment(packet, mtu) == [packet]
        assert impl.fragment(wrong, mtu) == [wrong]
        assert impl.fragment(packet + b"padding", mtu) == [packet]
    six = ip6(b"", UDP)
    assert impl.fragment(six, mtu) == [six]


def test_df_and_ipv6_may_not_be_fragmented(impl):
    assert dropped(impl, ip4(DATA[:100], UDP, flags=DF), 119) == "too_big"
    assert dropped(impl, ip4(DATA[:100], UDP, flags=DF | MF), 119) == "too_big"
    assert dropped(impl, ip6(DATA[:100], UDP), 139) == "too_big"


@pytest.mark.parametrize("options", [b"", b"\x01" * 4, b"\x01" * 40])
def test_mtu_must_hold_eight_bytes_of_payload(impl, options):
    packet = ip4(DATA[:100], UDP, flags=0, options=options)
    header = 20 + len(options)
    for mtu in (0, 1, 8, 19, 20, header, header + 7):
        assert dropped(impl, packet, mtu) == "too_big"
    assert len(impl.fragment(packet, header + 8)) == 13


@pytest.mark.parametrize("mtu", [28, 68, 69, 75, 76, 576, 1471, 1472])
@pytest.mark.parametrize("length", [1, 7, 8, 9, 1399, 1480, 4000])
def test_pieces(impl, mtu, length):
    packet = ip4(DATA[:length], UDP, flags=0, ident=77, tos=0x10, ttl=3)
    pieces = impl.fragment(packet, mtu)
    assert reassemble(pieces) == DATA[:length]
    assert all(len(piece) <= mtu for piece in pieces)
    if len(pieces) > 1:
        assert [bool(word(piece) & MF) for piece in pieces] == [True] * (len(pieces) - 1) + [False]
        for piece in pieces:
            craft.check_valid(piece)
            assert (piece[1], piece[8], piece[9], craft.ident(piece)) == (0x10, 3, UDP, 77)
            assert piece[12:20] == packet[12:20]
        assert len(pieces[0]) > mtu - 8


def test_reserved_bit_stays(impl):
    pieces = impl.fragment(ip4(DATA[:100], UDP, flags=0x8000), 68)
    assert all(word(piece) & 0x8000 for piece in pieces)


@pytest.mark.parametrize("more", [0, MF])
def test_a_fragment_again(impl, more):
    """Offsets continue from its own, and its More-Fragments flag stays on the last piece."""
    packet = ip4(DATA[:96], UDP, flags=more | 100)
    pieces = impl.fragment(packet, 60)
    assert [word(piece) for piece in pieces] == [MF | 100, MF | 105, more | 110]
    assert b"".join(piece[20:] for piece in pieces) == DATA[:96]


def test_offset_beyond_the_field(impl):
    """The reassembled packet would exceed 65535 bytes: the offsets stay at the maximum, where every
    receiver refuses the fragments, and never wrap to the start of another packet."""
    pieces = impl.fragment(ip4(DATA[:96], UDP, flags=0x1FFF), 60)
    assert [word(piece) for piece in pieces] == [MF | 0x1FFF, MF | 0x1FFF, 0x1FFF]


# --- options: type's top bit is the copied flag (RFC 791 3.1) ---

NOP, END = b"\x01", b"\x00"
ROUTER_ALERT = bytes.fromhex("94040000")  # copied
RECORD_ROUTE = bytes.fromhex("07070400000000")  # not copied
TIMESTAMP = bytes.fromhex("4408050000000000")  # not copied
SOURCE_ROUTE = bytes.fromhex("8307040a000001")  # copied


def padded(options):
    return options + bytes(-len(options) % 4)


@pytest.mark.parametrize(
    ("options", "later"),
    [
        (ROUTER_ALERT, ROUTER_ALERT),
        (TIMESTAMP, b""),
        (NOP + RECORD_ROUTE, b""),
        (NOP + SOURCE_ROUTE, SOURCE_ROUTE + END),
        (RECORD_ROUTE + NOP + ROUTER_ALERT, ROUTER_ALERT),
        (SOURCE_ROUTE + TIMESTAMP + NOP + ROUTER_ALERT, padded(SOURCE_ROUTE + ROUTER_ALERT)),
        (NOP * 4, b""),
        (END + ROUTER_ALERT[:3], b""),
        (ROUTER_ALERT + END + b"\x94\x04\0", ROUTER_ALERT),
        (b"\x94\x00\0\0", b""),  # length 0
        (b"\x94\x01\0\0", b""),  # length 1
        (b"\x94\x05\0\0", b""),  # runs over the header
        (ROUTER_ALERT + b"\x01\x01\x01\x94", ROUTER_ALERT),  # no room for a length
        (ROUTER_ALERT * 10, ROUTER_ALERT * 10),
    ],
)
def test_options(impl, options, later):
    """The first fragment has all options, the others those with the copied flag."""
    packet = ip4(DATA[:400], UDP, flags=0, options=options, ident=5)
    mtu = 20 + len(options) + 80
    pieces = impl.fragment(packet, mtu)
    assert pieces == [
        ip4(
            DATA[at : at + 80], UDP, ident=5, flags=(MF if at < 320 else 0) | at // 8,
            options=options if at == 0 else later,
        )
        for at in range(0, 400, 80)
    ]


def test_malformed_input(impl):
    packet = ip4(DATA[:100], UDP, flags=0)
    assert dropped(impl, b"", 68) == "short_packet"
    assert dropped(impl, packet[:19], 68) == "short_packet"
    assert dropped(impl, packet[:-1], 68) == "bad_total_len"
    assert dropped(impl, b"\x44" + packet[1:], 68) == "bad_header_len"
    assert dropped(impl, b"\x54" + packet[1:], 68) == "bad_version"


@given(
    length=st.integers(0, 3000), mtu=st.integers(68, 2000), options=st.binary(max_size=40),
    own_word=st.integers(0, 0x3FFF - 400),
)
def test_pieces_are_the_packet(impl, length, mtu, options, own_word):
    offset, more = own_word & 0x1FFF, bool(own_word & MF)
    assume(offset <= 0x1FFF - 400)
    packet = ip4(DATA[:length], UDP, flags=own_word, options=padded(options))
    pieces = impl.fragment(packet, mtu)
    at = 0
    for index, piece in enumerate(pieces):
        assert len(piece) <= mtu
        header_len = craft.ip_len(piece)
        assert ones_sum(piece[:header_len]) == 0xFFFF
        assert int.from_bytes(piece[2:4], "big") == len(piece)
        assert word(piece) & 0x1FFF == offset + at // 8
        assert bool(word(piece) & MF) == (more or index < len(pieces) - 1)
        at += len(piece) - header_len
    assert b"".join(piece[craft.ip_len(piece) :] for piece in pieces) == DATA[:length]
