"""RFC 1071 on both implementations."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.wire.craft import ones_sum


def test_rfc1071_example(impl):
    # RFC 1071 section 3: 0001 f203 f4f5 f6f7 sum to 2ddf0, which folds to ddf2
    assert impl.checksum(bytes.fromhex("0001f203f4f5f6f7")) == 0xDDF2


def test_known_ipv4_header(impl):
    # total length 115, DF, TTL 64, UDP, 192.168.0.1 -> 192.168.0.199, checksum b861
    header = bytes.fromhex("45000073000040004011 b861 c0a80001c0a800c7".replace(" ", ""))
    assert impl.checksum(header) == 0xFFFF
    assert impl.checksum(header[:10] + b"\0\0" + header[12:]) == 0xFFFF - 0xB861


def test_empty(impl):
    assert impl.checksum(b"") == 0
    assert impl.checksum(b"", 0xABCD) == 0xABCD


def test_the_sum_is_zero_only_if_all_bytes_are_zero(impl):
    assert impl.checksum(bytes(64)) == 0
    assert impl.checksum(b"\xff" * 64) == 0xFFFF
    assert impl.checksum(b"\xff\xff", 0xFFFF) == 0xFFFF


def test_odd_byte_is_the_high_half(impl):
    assert impl.checksum(b"\x12") == 0x1200
    assert impl.checksum(b"\x00\x01\x12") == 0x1201


@pytest.mark.parametrize("value", [0x00, 0x01, 0x7F, 0x80, 0xFF])
def test_every_length_to_300_of_one_value(impl, value):
    for length in range(301):
        data = bytes([value]) * length
        assert impl.checksum(data) == ones_sum(data), length


def test_every_length_to_300_of_noise(impl):
    noise = random.Random(1071).randbytes(300)
    for length in range(301):
        assert impl.checksum(noise[:length]) == ones_sum(noise[:length]), length


@pytest.mark.parametrize("start", range(16))
def test_alignment_of_the_buffer_does_not_matter(impl, start):
    noise = random.Random(3).randbytes(2048)
    view = memoryview(noise)[start:]
    assert impl.checksum(view) == ones_sum(noise[start:])


@pytest.mark.parametrize("length", [65535, 65534, 1 << 20, (1 << 20) + 1])
@pytest.mark.parametrize("kind", ["ones", "noise"])
def test_large_buffers(impl, length, kind):
    data = b"\xff" * length if kind == "ones" else random.Random(7).randbytes(length)
    assert impl.checksum(data) == ones_sum(data)


@pytest.mark.parametrize("initial", [0, 1, 0x00FF, 0xFF00, 0xFFFE, 0xFFFF])
@pytest.mark.parametrize("data", [b"", b"\x01", b"\xff\xff", b"\x00\x01", bytes(31), b"\xff" * 255])
def test_initial_carry(impl, initial, data):
    assert impl.checksum(data, initial) == ones_sum(initial.to_bytes(2, "big") + data)


@given(st.binary(max_size=500), st.integers(0, 0xFFFF))
def test_equals_arithmetic_modulo_ffff(impl, data, initial):
    assert impl.checksum(data, initial) == ones_sum(initial.to_bytes(2, "big") + data)


@given(st.binary(max_size=300), st.integers(0, 150))
def test_sum_of_parts(impl, data, half):
    at = 2 * half
    assert impl.checksum(data[at:], impl.checksum(data[:at])) == impl.checksum(data)
