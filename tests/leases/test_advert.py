"""What a node advertises beyond flannel: written so that flannel passes over it, read warily."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from udptun.leases.advert import Advert, embed, read
from udptun.leases.base import Attributes

VTEP = {"VNI": 1, "VtepMAC": "aa:bb:cc:dd:ee:ff"}
ANY_JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
                        lambda item: st.lists(item) | st.dictionaries(st.text(), item),
                        max_leaves=5)


def read_data(data):
    return read(Attributes(backend_data=data))


def test_on_its_own():
    data = embed(None, Advert(8285, 1450))
    assert json.dumps(data) == '{"udptun": {"port": 8285, "mtu": 1450}}'
    assert read_data(data) == Advert(8285, 1450)


def test_beside_what_flannel_writes():
    data = embed(VTEP, Advert(8285))
    assert json.dumps(data) == (
        '{"VNI": 1, "VtepMAC": "aa:bb:cc:dd:ee:ff", "udptun": {"port": 8285}}'
    )
    assert read_data(data) == Advert(8285, None)
    assert "udptun" not in VTEP


def test_a_new_one_replaces_the_old_one():
    assert embed(embed(VTEP, Advert(1)), Advert(2)) == embed(VTEP, Advert(2))


def test_what_the_extension_backend_carries_as_a_string():
    assert read_data(json.dumps(embed(None, Advert(9000, 1400)))) == Advert(9000, 1400)


def test_a_later_version_may_say_more():
    assert read_data({"udptun": {"port": 1, "mtu": None, "cipher": "x"}}) == Advert(1, None)


@pytest.mark.parametrize(
    "data",
    [
        None, VTEP, 5, [], "", "no JSON", "[" * 100000, "5",
        {"udptun": None}, {"udptun": 8285}, {"udptun": {}},
        {"udptun": {"mtu": 1450}},
        {"udptun": {"port": 0}}, {"udptun": {"port": 65536}}, {"udptun": {"port": "8285"}},
        {"udptun": {"port": True}}, {"udptun": {"port": 8285.0}},
        {"udptun": {"port": 8285, "mtu": 67}}, {"udptun": {"port": 8285, "mtu": 65536}},
        {"udptun": {"port": 8285, "mtu": "1450"}}, {"udptun": {"port": 8285, "mtu": False}},
    ],
)
def test_what_cannot_be_used_is_none(data):
    assert read_data(data) is None


@given(ANY_JSON, ANY_JSON, ANY_JSON)
def test_no_peer_can_stop_us(data, port, mtu):
    for written in (data, {"udptun": data}, {"udptun": {"port": port, "mtu": mtu}}):
        advert = read_data(written)
        assert advert is None or (0 < advert.port < 65536 and (advert.mtu or 68) >= 68)
