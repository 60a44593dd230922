"""Messages and documents of a take-over: versions, unknown fields, missing fields."""

import json

import pytest

from udptun.model import Peer, PeerError
from udptun.takeover import message
from udptun.takeover.document import (
    CountersDocument,
    StateDocument,
    drops_of,
    dump,
    load,
    packets_of,
    peer_from_json,
    peer_to_json,
)
from udptun.takeover.message import (
    Descriptors,
    Done,
    Hello,
    State,
    TakeOverError,
    agree,
    decode,
    encode,
)


@pytest.mark.parametrize("each", [
    Hello("everything", 1, 2, "9.9", 7, 42, {"tun": "udptun0"}), State(2, "9.9", 7, 10),
    Descriptors(["tun-0"], True), Done(["control"]),
])
def test_a_message_survives_the_way(each):
    assert decode(encode(each)) == each


def test_unknown_fields_are_ignored_and_missing_ones_have_their_default():
    text = json.dumps({"type": "hello", "pid": 3, "of-a-later-version": [1]}).encode()
    assert decode(text) == Hello(pid=3)
    assert decode(b'{"type": "of-a-later-version"}') is None
    assert load(StateDocument, b'{"mtu": 1400, "later": {}}') == StateDocument(mtu=1400)
    assert load(CountersDocument, b"{}") == CountersDocument()


@pytest.mark.parametrize("text", [
    b"", b"[]", b"{}", b"\xff", b'{"type": []}', b'{"type": "hello", "pid": "3"}',
    b'{"type": "state", "size": true}', b'{"type": "state", "size": -1}',
    b'{"type": "descriptors", "names": [1]}', b'{"type": "hello", "program": "\\ud800"}',
    b'{"type": "state", "size": 18446744073709551616}', b"[" * 100_000,
])
def test_a_wrong_message_is_refused(text):
    with pytest.raises(TakeOverError):
        decode(text)


@pytest.mark.parametrize("text", [
    b"", b"[]", b'{"mtu": "x"}', b'{"generation": -1}', b'{"off": {"vnet": 1}}', b'{"peers": [1]}',
    b'{"sockets": [[]]}', b'{"routes": "\\udc00"}', b'{"mtu": ' + b"[" * 100_000,
])
def test_a_wrong_document_is_refused(text):
    with pytest.raises(TakeOverError):
        load(StateDocument, text)


@pytest.mark.parametrize("values", [
    {"packets": {"encap": 1}}, {"packets": {"encap": {"read": "1"}}},
    {"probe_counts": {"sent": []}}, {"probes": {"192.0.2.1:8285": None}}, {"drops": [1]},
    {"peer_errors": {"sent": 1.5}},
])
def test_wrong_counters_are_refused(values):
    with pytest.raises(TakeOverError, match=next(iter(values))):
        load(CountersDocument, json.dumps(values).encode())


@pytest.mark.parametrize("row", [[], ["no_route", "encap"], ["no_route", "encap", -1], [1, "x", 1]])
def test_a_wrong_row_of_drops_is_refused(row):
    with pytest.raises(TakeOverError, match="drops"):
        drops_of(CountersDocument(drops=[["no_route", "encap", 1], row]))
    rows = [["no_route", "encap", 1, "later"]]
    assert drops_of(CountersDocument(drops=rows)) == [("no_route", "encap", 1)]


def test_the_newest_common_version_is_used(monkeypatch):
    monkeypatch.setattr(message, "OLDEST", 2)
    monkeypatch.setattr(message, "VERSION", 4)
    assert [agree(1, 2), agree(3, 3), agree(3, 9), agree(1, 4)] == [2, 3, 4, 4]
    for oldest, newest in ((1, 1), (5, 9)):
        with pytest.raises(TakeOverError, match=f"{oldest} to {newest} .* 2 to 4"):
            agree(oldest, newest)


def test_a_peer_survives_the_way():
    error = PeerError(111, "icmp", 3, 1, bytes([192, 0, 2, 1]), 55)
    peer = Peer(bytes(16), 8285, 1400, 1, 2, 3, 4, None, False, 66, 77, 1200, 5, error)
    assert peer_from_json(json.loads(json.dumps(peer_to_json(peer)))) == peer
    assert peer_from_json(peer_to_json(peer) | {"later": 1}) == peer


PEER = {"address": "c0000201"}


@pytest.mark.parametrize(("field", "values"), [
    ("address", {}), ("address", {"address": "x"}), ("address", {"address": "c00002"}),
    ("address", {"address": None}), ("port", PEER | {"port": 65536}),
    ("encap_bytes", PEER | {"encap_bytes": float("inf")}),
    ("decap_packets", PEER | {"decap_packets": "3"}), ("path_mtu", PEER | {"path_mtu": 1 << 32}),
    ("last_rx_ns", PEER | {"last_rx_ns": -1}), ("last_error", PEER | {"last_error": []}),
    ("errno", PEER | {"last_error": {"errno": -1}}), ("code", PEER | {"last_error": {"code": 256}}),
    ("origin", PEER | {"last_error": {"origin": 1}}),
    # the core copies the reporter to a field of 16 bytes
    ("reporter", PEER | {"last_error": {"reporter": "00" * 17}}),
])
def test_a_wrong_peer_is_refused(field, values):
    with pytest.raises(TakeOverError, match=f" {field}: .*expected"):
        peer_from_json(values)


def test_counters_that_this_version_does_not_have_are_left_out():
    packets = {"encap": {"read": 3, "x": 1}, "y": {"read": 1}}
    counted = load(CountersDocument, dump(CountersDocument(packets=packets)))
    assert packets_of(counted, {"encap": {"read": 0, "generated": 0}}) == {"encap": {"read": 3}}
