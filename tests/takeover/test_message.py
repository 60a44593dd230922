"""Messages and documents of a take-over: versions, unknown fields, missing fields."""

import json

import pytest

from udptun.model import Peer, PeerError
from udptun.takeover import message
from udptun.takeover.document import (
    Counted,
    Having,
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
    assert load(Having, b'{"mtu": 1400, "later": {}}') == Having(mtu=1400)
    assert load(Counted, b"{}") == Counted()


@pytest.mark.parametrize("text", [
    b"", b"[]", b"{}", b"\xff", b'{"type": []}', b'{"type": "hello", "pid": "3"}',
    b'{"type": "state", "size": true}',
])
def test_a_wrong_message_is_refused(text):
    with pytest.raises(TakeOverError):
        decode(text)


@pytest.mark.parametrize("text", [b"", b"[]", b'{"mtu": "x"}'])
def test_a_wrong_document_is_refused(text):
    with pytest.raises(TakeOverError):
        load(Having, text)


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
    with pytest.raises(TakeOverError):
        peer_from_json({"address": "x"})


def test_counters_that_this_version_does_not_have_are_left_out():
    counted = load(Counted, dump(Counted(packets={"encap": {"read": 3, "x": 1}, "y": {"read": 1}})))
    assert packets_of(counted, {"encap": {"read": 0, "generated": 0}}) == {"encap": {"read": 3}}
