import pytest
from hypothesis import given
from hypothesis import strategies as st

from udptun.probe.message import (
    HEADER_SIZE,
    MAX_SIZE,
    NEVER_HEARD,
    REPLY,
    REQUEST,
    UDP_PATH,
    VXLAN_PATH,
    KernelRandom,
    Probe,
    decode,
    half,
    heard_field,
    new_token,
    proves,
)

GOLDEN = bytes.fromhex("75747031 01 02 0000 0123456789abcdef 000003e8 001a 0000 0000")
PROBE = Probe(REQUEST, VXLAN_PATH, 0x0123456789ABCDEF, 1000, 26)


def test_the_bytes_of_a_known_message():
    assert PROBE.encode() == GOLDEN
    assert decode(GOLDEN) == PROBE


def test_a_probe_is_not_an_ip_packet():
    assert PROBE.encode()[0] >> 4 == 7


probes = st.builds(
    Probe, st.sampled_from([REQUEST, REPLY]), st.sampled_from([UDP_PATH, VXLAN_PATH]),
    st.integers(0, 2**64 - 1), st.integers(0, 2**32 - 1), st.integers(HEADER_SIZE, 9000),
)


@given(probes)
def test_decode_returns_what_was_encoded(probe):
    message = probe.encode()
    assert len(message) == probe.size
    assert decode(message) == probe


@given(probes, st.integers(0, 9100))
def test_a_message_of_another_length_is_no_probe(probe, length):
    message = probe.encode().ljust(length, b"\0")[:length]
    assert (decode(message) is not None) == (length == probe.size)


@given(st.binary(max_size=100))
def test_any_bytes_are_decoded_or_refused(message):
    probe = decode(message)
    assert probe is None or probe.encode()[:6] == message[:6]


@pytest.mark.parametrize("at", range(6))
def test_a_wrong_magic_kind_or_path_is_no_probe(at):
    message = bytearray(GOLDEN)
    message[at] ^= 0x70
    assert decode(bytes(message)) is None


def test_bytes_that_a_later_version_may_use_are_ignored():
    message = bytearray(GOLDEN)
    message[6] = message[22] = message[25] = 0xFF
    assert decode(bytes(message)) == PROBE


def test_a_reply_has_the_token_the_path_and_the_size_of_the_request():
    reply = PROBE.reply(7)
    assert reply == Probe(REPLY, PROBE.path, PROBE.token, 7, PROBE.size)


@pytest.mark.parametrize("size", [0, HEADER_SIZE - 1, MAX_SIZE + 1])
def test_a_size_that_no_message_can_have_is_refused(size):
    with pytest.raises(ValueError, match="size"):
        Probe(REQUEST, UDP_PATH, 1, 0, size).encode()


def test_the_field_heard():
    assert heard_field(None, 5.0) == NEVER_HEARD
    assert heard_field(3.5, 5.0) == 1500
    assert heard_field(6.0, 5.0) == 0
    assert heard_field(0.0, 1e9) == NEVER_HEARD - 1


def test_random_bits_do_not_repeat():
    rng = KernelRandom()
    for bits in (1, 7, 32, 64, 9000):
        assert {rng.getrandbits(bits).bit_length() <= bits for _ in range(200)} == {True}
    assert len({rng.getrandbits(32) for _ in range(2000)}) > 1990
    assert len({KernelRandom().getrandbits(64) for _ in range(50)}) == 50


def test_a_token_proves_that_the_last_request_was_received():
    rng = KernelRandom()
    ours = new_token(rng, 0)
    theirs = new_token(rng, half(ours))
    assert proves(theirs, half(ours))
    assert not proves(new_token(rng, half(new_token(rng, 0))), half(ours))
    assert not proves(theirs & 0xFFFFFFFF00000000, 0)
