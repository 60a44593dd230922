"""The advert: its encoding, which flannel ignores, and the validation of a peer's advert."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from udptun.leases.advert import PROBE, Advert, embed, read

VTEP = {"VNI": 1, "VtepMAC": "aa:bb:cc:dd:ee:ff"}
ANY_JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
                        lambda item: st.lists(item) | st.dictionaries(st.text(), item),
                        max_leaves=5)


def read_data(data):
    return read(data)


def test_advert_without_backend_data():
    data = embed(None, Advert(8285, 1450))
    assert json.dumps(data) == '{"udptun": {"port": 8285, "mtu": 1450}}'
    assert read_data(data) == Advert(8285, 1450)


def test_advert_with_features():
    advert = Advert(8285, 1450, frozenset({PROBE}))
    data = embed(None, advert)
    assert json.dumps(data) == (
        '{"udptun": {"port": 8285, "mtu": 1450, "v": 1, "features": ["probe"]}}')
    assert read_data(data) == advert


@pytest.mark.parametrize("features", [
    None, "probe", {"probe": True}, ["quic"], [["probe"]], [1, None, "Probe"]])
def test_unknown_features_and_versions_are_ignored(features):
    fields = {"port": 1, "v": 2, "features": features}
    assert read_data({"udptun": fields}) == Advert(1)
    if isinstance(features, list):
        fields["features"] = [*features, "probe"]
        assert read_data({"udptun": fields}) == Advert(1, None, frozenset({PROBE}))


def test_source_ports():
    advert = Advert(8285, None, frozenset(), (9000, 9015))
    data = embed(None, advert)
    assert json.dumps(data) == '{"udptun": {"port": 8285, "source_ports": [9000, 9015]}}'
    assert read_data(data) == advert


@pytest.mark.parametrize("ports", [
    None, "any", 9000, [], [9000], [0, 1], [2, 1], [1, 65536], [1, 2, 3], ["1", "2"], [1.0, 2],
    [True, True], {"first": 1, "last": 2}])
def test_invalid_source_ports_admit_no_other_port(ports):
    assert read_data({"udptun": {"port": 8285, "source_ports": ports}}) == Advert(8285)


def test_advert_next_to_flannels_fields():
    data = embed(VTEP, Advert(8285))
    assert json.dumps(data) == (
        '{"VNI": 1, "VtepMAC": "aa:bb:cc:dd:ee:ff", "udptun": {"port": 8285}}'
    )
    assert read_data(data) == Advert(8285, None)
    assert "udptun" not in VTEP


def test_a_new_advert_replaces_the_old_one():
    assert embed(embed(VTEP, Advert(1)), Advert(2)) == embed(VTEP, Advert(2))


def test_backend_data_that_is_a_string():
    assert read_data(json.dumps(embed(None, Advert(9000, 1400)))) == Advert(9000, 1400)


def test_unknown_keys_are_ignored():
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
def test_an_invalid_advert_is_none(data):
    assert read_data(data) is None


@given(ANY_JSON, ANY_JSON, ANY_JSON)
def test_read_never_raises(data, port, mtu):
    for written in (data, {"udptun": data}, {"udptun": {"port": port, "mtu": mtu}}):
        advert = read_data(written)
        assert advert is None or (0 < advert.port < 65536 and (advert.mtu or 68) >= 68)
