"""Captures over the control socket: the request, the answer, and how it ends."""

import os

import pytest

from tests.control.fakes import CAPTURED, FakeCapture, Served
from udptun.control.capture import counts_record, end_record, parse_filter
from udptun.control.client import ControlClient
from udptun.errors import ControlError, FieldError
from udptun.lab import wait_for
from udptun.model import CaptureFilter, parse_address, parse_destination

END = counts_record(5, 3) + end_record("the time is over")


def test_the_answer_is_a_head_and_records(served: Served) -> None:
    with ControlClient(str(served.path)) as client, client.capture({"seconds": 1}) as (head, rest):
        assert head == FakeCapture.head
        assert b"".join(rest) == CAPTURED + END
    [(wanted, capture)] = served.forwarder.captures
    assert wanted == CaptureFilter()
    wait_for(lambda: capture.closed, "the end of the capture")


def test_a_capture_ends_with_the_connection_of_its_client(served: Served) -> None:
    with ControlClient(str(served.path)) as client, client.capture({}) as (_, rest):
        assert next(rest) == CAPTURED
        [(_, capture)] = served.forwarder.captures
        assert not capture.closed
    wait_for(lambda: capture.closed, "the end of the capture")


def test_a_capture_says_that_the_forwarder_stops(served: Served) -> None:
    with ControlClient(str(served.path)) as client, client.capture({}) as (_, rest):
        assert next(rest) == CAPTURED
        served.close()
        assert b"".join(rest) == counts_record(5, 3) + end_record(
            "the forwarder stops, or another one takes over from it")


def test_only_root_and_the_forwarders_user_may_capture(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("udptun.control.server.peer_ids", lambda peer: (4242, os.getegid()))
    with ControlClient(str(served.path)) as client:
        assert client.status()
        with pytest.raises(ControlError, match="only root and the user of the forwarder") as found:
            client.capture({}).__enter__()
        assert found.value.code == "forbidden"
    assert served.forwarder.captures == []


def test_a_wrong_request_names_the_field(served: Served) -> None:
    with ControlClient(str(served.path)) as client:
        for wanted in ({"port": 1}, {"peers": ["192.0.2.2:x"]}, ["ports"]):
            with pytest.raises(ControlError, match=r"field|peers|the body") as found:
                client.capture(wanted).__enter__()  # type: ignore[arg-type]
            assert found.value.code == "bad_request"


def test_every_field_of_a_filter() -> None:
    wanted, seconds = parse_filter({
        "direction": "in", "dropped": True,
        "peers": ["192.0.2.2", "192.0.2.2:8285", "[2001:db8::2]:1", "2001:db8::2"],
        "routes": ["10.244.2.0/24", "fd00::/16"], "hosts": ["10.244.1.7", "fd00:1::7"],
        "ports": [53, 0], "protocol": "icmp", "snaplen": 96, "sample": 100, "seconds": 5,
    })
    v4, v6 = parse_address("", "192.0.2.2"), parse_address("", "2001:db8::2")
    assert seconds == 5
    assert wanted == CaptureFilter(
        direction="in", dropped=True, peers=((v4, 0), (v4, 8285), (v6, 1), (v6, 0)),
        networks=(parse_destination("", "10.244.2.0/24"), parse_destination("", "fd00::/16")),
        hosts=(parse_address("", "10.244.1.7"), parse_address("", "fd00:1::7")), ports=(53, 0),
        protocols=(1, 58), snaplen=96, sample=100,
    )
    assert parse_filter({}) == (CaptureFilter(), None)
    assert parse_filter({"protocol": "47"})[0].protocols == (47,)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("direction", "up"), ("direction", []), ("dropped", 1), ("peers", "192.0.2.2"),
        ("peers", ["192.0.2.2"] * 9), ("peers", ["192.0.2.2:0"]), ("peers", ["::1:"]),
        ("peers", ["2001:db8::2]:1"]), ("peers", [7]), ("peers", ["n2"]),
        ("routes", ["10.0.0.1/8"]), ("routes", {}), ("hosts", ["10.0.0.0/8"]),
        ("hosts", ["10.0.0.1"] * 3), ("ports", [-1]), ("ports", [1, 2, 3]), ("ports", [65536]),
        ("protocol", "quic"), ("protocol", 256), ("protocol", True), ("snaplen", 0),
        ("snaplen", 65537), ("sample", 0), ("sample", 1.5), ("seconds", 0), ("seconds", "long"),
    ],
)
def test_a_wrong_value_is_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(FieldError) as found:
        parse_filter({field: value})
    assert found.value.field == field
    assert "expected" in str(found.value)
