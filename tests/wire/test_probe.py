"""The probe message: its bytes, and what is refused."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.reference import Dropped, Probe
from tests.wire import strategies
from tests.wire.test_compiled_and_reference import same

REQUEST = bytes.fromhex(
    "75747031" "01" "01" "0000" "0123456789abcdef" "000004d2" "001e" "0000" "000000000000"
)


def test_the_layout_is_that_of_the_wire(impl):
    probe = Probe(1, 0x0123456789ABCDEF, 1234, 30)
    assert impl.build_probe(probe) == REQUEST
    assert impl.parse_probe(REQUEST) == probe


@given(strategies.probes())
def test_what_is_built_is_parsed(impl, probe):
    message = impl.build_probe(probe)
    assert len(message) == probe.size
    assert message[0] >> 4 not in (4, 6)
    assert impl.parse_probe(message) == probe


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (REQUEST[:23], "short_packet"),
        (REQUEST[:4], "short_packet"),
        (REQUEST[:29], "bad_total_len"),
        (REQUEST + b"\0", "bad_total_len"),
        (REQUEST[:20] + b"\0\0" + REQUEST[22:], "bad_total_len"),
        (REQUEST[:4] + b"\0" + REQUEST[5:], "bad_version"),
        (REQUEST[:4] + b"\3" + REQUEST[5:], "bad_version"),
        (REQUEST[:5] + b"\2" + REQUEST[6:], "bad_version"),
    ],
)
def test_a_malformed_probe_is_refused(impl, message, reason):
    with pytest.raises(Dropped, match=f"^{reason}$"):
        impl.parse_probe(message)


@pytest.mark.parametrize("message", [b"", b"utp", b"utp2" + REQUEST[4:], b"\x45" + REQUEST[1:]])
def test_other_bytes_are_no_probe(impl, message):
    assert impl.parse_probe(message) is None


def test_bytes_between_the_fields_are_ignored(impl):
    marked = bytearray(REQUEST)
    marked[6:8] = marked[22:24] = marked[28:30] = b"\xff\xff"
    assert impl.parse_probe(bytes(marked)) == impl.parse_probe(REQUEST)


@given(st.one_of(strategies.probe_bytes(), strategies.mutated(strategies.probe_bytes())))
def test_compiled_and_reference_agree(compiled, message):
    same(compiled, "parse_probe", message)
