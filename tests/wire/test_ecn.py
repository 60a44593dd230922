"""The traffic class: what the ECN field of a datagram changes in its packet."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.reference import Dropped
from tests.wire import craft, strategies

NOT_ECT, ECT1, ECT0, CE = range(4)

# RFC 6040, figure 4: (field of the packet, field of the datagram): field afterwards, alarm
TABLE = {
    (NOT_ECT, NOT_ECT): (NOT_ECT, False), (NOT_ECT, ECT0): (NOT_ECT, True),
    (NOT_ECT, ECT1): (NOT_ECT, True),
    (ECT0, NOT_ECT): (ECT0, False), (ECT0, ECT0): (ECT0, False),
    (ECT0, ECT1): (ECT1, False), (ECT0, CE): (CE, False),
    (ECT1, NOT_ECT): (ECT1, False), (ECT1, ECT0): (ECT1, True),
    (ECT1, ECT1): (ECT1, False), (ECT1, CE): (CE, False),
    (CE, NOT_ECT): (CE, False), (CE, ECT0): (CE, False), (CE, ECT1): (CE, True),
    (CE, CE): (CE, False),
}


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("dscp", [0, 0b101010, 63])
@pytest.mark.parametrize(("inner", "outer"), TABLE)
def test_the_table_of_rfc_6040(impl, version, dscp, inner, outer):
    flow = craft.Flow(version, tos=dscp << 2 | inner, label=0xABCDE)
    field, alarm = TABLE[inner, outer]
    taken = impl.take_ecn(flow.tcp(b"data"), outer)
    assert taken.packet == replace(flow, tos=dscp << 2 | field).tcp(b"data")
    assert taken.unexpected == alarm
    assert taken.marked == (field == CE != inner)
    craft.check_valid(taken.packet)


@pytest.mark.parametrize("version", [4, 6])
def test_a_mark_for_a_sender_without_ecn_drops_the_packet(impl, version):
    with pytest.raises(Dropped, match="congestion"):
        impl.take_ecn(craft.Flow(version, tos=0xB8).tcp(b"data"), CE)


@given(strategies.flows(more_headers=True), st.integers(0, 3))
def test_only_the_field_and_the_checksum_change(impl, flow, outer):
    packet = flow.udp(b"data")
    if flow.tos & 3 == NOT_ECT and outer == CE:
        return
    field, _ = TABLE[flow.tos & 3, outer]
    changed = replace(flow, tos=flow.tos & 0xFC | field).udp(b"data")
    assert impl.take_ecn(packet, outer).packet == changed


def test_a_wrong_header_checksum_stays_wrong(impl):
    packet = craft.Flow(tos=ECT0).tcp(b"data")
    wrong = packet[:10] + bytes([packet[10] ^ 0x40]) + packet[11:]
    taken = impl.take_ecn(wrong, CE).packet
    assert craft.ones_sum(taken[:20]) == craft.ones_sum(wrong[:20]) != 0xFFFF
