"""The HTTP server of the control API, on a real socket and loop, with a fake forwarder."""

import http.client
import itertools
import json
import logging
import os
import re
import shutil
import socket
import stat
import subprocess
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.control.fakes import VERSION, LoopThread, Served, status_of
from udptun.build import build_id
from udptun.connections import Connections
from udptun.control import events, protocol, server, sockets
from udptun.errors import DeviceError, UdptunError
from udptun.lab import wait_for


class Http(http.client.HTTPConnection):
    """An HTTP client that does not use udptun's code."""

    def __init__(self, path: Path) -> None:
        super().__init__("localhost")
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(str(self._path))  # waits while the backlog is full
        self.sock.settimeout(60)

    def ask(
        self, method: str, path: str, body: Any = None, **headers: str
    ) -> tuple[int, Any, http.client.HTTPResponse]:
        if isinstance(body, dict):
            body = json.dumps(body)
        self.request(method, path, body, {k.replace("_", "-"): v for k, v in headers.items()})
        response = self.getresponse()
        text = response.read()
        kind = response.headers["Content-Type"].partition(";")[0]
        return response.status, json.loads(text) if kind == protocol.JSON_TYPE else text, response


@pytest.fixture
def http_(served: Served) -> Iterator[Http]:
    connection = Http(served.path)
    yield connection
    connection.close()


def ask_once(
    served: Served, method: str, path: str, body: Any = None
) -> tuple[int, Any, http.client.HTTPResponse]:
    connection = Http(served.path)
    try:
        return connection.ask(method, path, body)
    finally:
        connection.close()


def raw(path: Path, request: bytes) -> bytes:
    """Return everything that the server sends until it closes the connection."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(60)
        sock.connect(str(path))
        sock.sendall(request)
        answer = b""
        while piece := sock.recv(65536):
            answer += piece
        return answer


# Reading


def test_status(http_: Http) -> None:
    code, body, response = http_.ask("GET", "/v1/status")
    assert code == 200
    assert body == status_of(1, 0) | {"pid": body["pid"]}
    assert response.headers["Content-Type"] == "application/json"
    assert response.headers["Transfer-Encoding"] == "chunked"
    assert response.headers["Server"] == "udptun"


def test_status_without_peers(http_: Http) -> None:
    _, whole, _ = http_.ask("GET", "/v1/status")
    assert whole["peers"]
    assert http_.ask("GET", "/v1/status?peers=1")[1] == whole
    assert http_.ask("GET", "/v1/status?peers=0")[1] == whole | {"peers": []}
    code, body, _ = http_.ask("GET", "/v1/status?peers=no")
    assert (code, body["error"]["code"]) == (400, "bad_request")


def test_the_device_is_changed(http_: Http, served: Served) -> None:
    body = {"mtu": 1400, "listen": ["192.0.2.1", "[2001:db8::1]:9"]}
    want = {"mtu": 1400, "listen": ["192.0.2.1:8285", "[2001:db8::1]:9"]}
    assert http_.ask("PUT", "/v1/device", body)[:2] == (200, want)
    assert served.forwarder.device == want
    http_.ask("PUT", "/v1/device", {"mtu": 1500})
    assert served.forwarder.device == {"mtu": 1500, "listen": None}


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ({}, "an object with the key mtu, listen, or both"),
        ({"mtu": 1400, "tun": "x"}, "an object with the key mtu, listen, or both"),
        ({"mtu": "a"}, "mtu"), ({"mtu": True}, "mtu"), ({"mtu": 5}, "mtu"), ({"mtu": None}, "mtu"),
        ({"listen": "192.0.2.1"}, "a list of ADDRESS:PORT"),
        ({"listen": [5]}, "a list of ADDRESS:PORT"), ({"listen": ["x"]}, "listen"),
        ({"mtu": 1300}, "opening the UDP socket"),
    ],
)
def test_a_wrong_change_of_the_device_is_refused(http_: Http, body: Any, text: str) -> None:
    code, answer, _ = http_.ask("PUT", "/v1/device", body)
    assert (code, answer["error"]["code"]) == (400, "bad_request")
    assert text in answer["error"]["message"]


def test_peers(http_: Http) -> None:
    code, body, _ = http_.ask("GET", "/v1/peers")
    assert code == 200
    assert body == {"peers": http_.ask("GET", "/v1/status")[1]["peers"]}


def test_standby(http_: Http, served: Served) -> None:
    body = {"endpoints": ["192.0.2.2", "[2001:db8::2]:9"], "standby": True}
    code, answer, _ = http_.ask("POST", "/v1/standby", body)
    assert (code, answer) == (200, {"standby": True})
    assert served.forwarder.standby == {"192.0.2.2:8285": True, "[2001:db8::2]:9": True}
    http_.ask("POST", "/v1/standby", {"endpoints": ["192.0.2.2:8285"], "standby": False})
    assert served.forwarder.standby["192.0.2.2:8285"] is False


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ({"endpoints": []}, "expected an object with the keys endpoints and standby"),
        ({"endpoints": "192.0.2.2", "standby": True}, "a list of at most 500 strings"),
        ({"endpoints": ["192.0.2.2"] * 501, "standby": True}, "a list of at most 500 strings"),
        ({"endpoints": [5], "standby": True}, "a list of at most 500 strings"),
        ({"endpoints": ["192.0.2.2"], "standby": 1}, "standby: 1 is not true or false"),
        ({"endpoints": ["a"], "standby": True}, "'a'"),
    ],
)
def test_a_wrong_standby_request_is_refused(http_: Http, body: Any, text: str) -> None:
    code, answer, _ = http_.ask("POST", "/v1/standby", body)
    assert (code, answer["error"]["code"]) == (400, "bad_request")
    assert text in answer["error"]["message"]


def test_probe(http_: Http) -> None:
    code, body, _ = http_.ask("POST", "/v1/probe", {"endpoint": "192.0.2.2"})
    assert (code, body["answered"], body["rtt_us"], body["size"]) == (200, True, 412, 24)
    _, body, _ = http_.ask("POST", "/v1/probe", {"endpoint": "192.0.2.2:8285", "size": 1400})
    assert body["size"] == 1400


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ({}, "endpoint"),
        ({"endpoint": 7}, "endpoint"),
        ({"endpoint": "nowhere"}, "'nowhere'"),
        ({"endpoint": "192.0.2.9"}, "a peer that has a route with `probe`"),
        ({"endpoint": "192.0.2.2", "sizes": 24}, "sizes"),
    ],
)
def test_a_wrong_probe_request_is_refused(http_: Http, body: Any, text: str) -> None:
    code, answer, _ = http_.ask("POST", "/v1/probe", body)
    assert (code, answer["error"]["code"]) == (400, "bad_request")
    assert text in answer["error"]["message"]


def test_drops(http_: Http, served: Served) -> None:
    code, body, _ = http_.ask("GET", "/v1/drops")
    assert code == 200
    assert body == {"drops": served.forwarder.drops()}


def test_trace(http_: Http) -> None:
    http_.ask("PUT", "/v1/routes/10.244.2.0/24", {"via": "192.0.2.2"})
    _, body, _ = http_.ask("GET", "/v1/trace?address=10.244.2.9")
    assert (body["verdict"], body["peer"]) == ("forward", "192.0.2.2:8285")
    _, body, _ = http_.ask("GET", "/v1/trace?address=2001:db8::1")
    assert (body["verdict"], body["reason"]) == ("drop", "no_route")


@pytest.mark.parametrize("query", ["", "?address=", "?address=10.0.0.0/8", "?address=x"])
def test_trace_without_a_valid_address(http_: Http, query: str) -> None:
    code, body, _ = http_.ask("GET", f"/v1/trace{query}")
    assert (code, body["error"]["code"]) == (400, "bad_request")
    assert "address" in body["error"]["message"]


def test_healthz(http_: Http) -> None:
    assert http_.ask("GET", "/v1/healthz")[:2] == (200, {"status": "ok"})


def test_one_connection_serves_many_requests(http_: Http) -> None:
    sockets_seen = set()
    for _ in range(3):
        http_.ask("GET", "/v1/routes")
        http_.ask("GET", "/v1/nowhere")
        sockets_seen.add(http_.sock)
    assert len(sockets_seen) == 1


# Routes


def test_put_and_delete_of_single_routes(http_: Http) -> None:
    put = http_.ask("PUT", "/v1/routes/10.244.2.0%2F24", {"via": "192.0.2.2"})
    assert put[:2] == (200, {"generation": 2, "added": 1, "changed": 0, "removed": 0})
    same = http_.ask("PUT", "/v1/routes/10.244.2.0/24", {"via": "192.0.2.2", "port": 8285})
    assert same[:2] == (200, {"generation": 2, "added": 0, "changed": 0, "removed": 0})
    other = http_.ask("PUT", "/v1/routes/10.244.2.0/24", {"via": "192.0.2.3", "mtu": 1400})
    assert other[:2] == (200, {"generation": 3, "added": 0, "changed": 1, "removed": 0})
    v6 = http_.ask("PUT", "/v1/routes/2001:db8:5::%2F64", {"via": "2001:db8::1"})
    assert v6[0] == 200
    assert http_.ask("GET", "/v1/routes")[1] == {
        "generation": 4,
        "routes": [
            {"dst": "10.244.2.0/24", "via": "192.0.2.3", "port": 8285, "mtu": 1400},
            {"dst": "2001:db8:5::/64", "via": "2001:db8::1", "port": 8285, "mtu": None},
        ],
    }
    gone = http_.ask("DELETE", "/v1/routes/10.244.2.0/24")
    assert gone[:2] == (200, {"generation": 5, "added": 0, "changed": 0, "removed": 1})
    again = http_.ask("DELETE", "/v1/routes/10.244.2.0/24")
    assert again[:2] == (200, {"generation": 5, "added": 0, "changed": 0, "removed": 0})


def test_listed_route_can_be_put_again(http_: Http) -> None:
    http_.ask("PUT", "/v1/routes/10.244.2.0/24", {"via": "192.0.2.2"})
    (route,) = http_.ask("GET", "/v1/routes")[1]["routes"]
    assert http_.ask("PUT", "/v1/routes/10.244.2.0/24", route)[1]["changed"] == 0


def test_if_none_match_only_adds(http_: Http) -> None:
    path, add_only = "/v1/routes/10.244.2.0/24", {"If_None_Match": "*"}
    assert http_.ask("PUT", path, {"via": "192.0.2.2"}, **add_only)[0] == 200
    assert http_.ask("PUT", path, {"via": "192.0.2.2"}, **add_only)[0] == 200
    code, body, _ = http_.ask("PUT", path, {"via": "192.0.2.3"}, **add_only)
    assert (code, body["error"]["code"]) == (409, "route_exists")


@pytest.mark.parametrize(
    ("dst", "body", "code", "text"),
    [
        ("10.244.2.0/24", b"", "bad_json", "not JSON"),
        ("10.244.2.0/24", b"{", "bad_json", "not JSON"),
        ("10.244.2.0/24", b"[" * 60000, "bad_json", "not JSON"),
        ("10.244.2.0/24", b"\xff", "bad_json", "not JSON"),
        ("10.244.2.0/24", b"[]", "bad_route", "an object with the key via"),
        ("10.244.2.0/24", b"{}", "bad_route", "via"),
        ("10.244.2.0/24", b'{"via":"x"}', "bad_route", "via: 'x'"),
        ("10.244.2.0/24", b'{"via":"192.0.2.2","prot":1}', "bad_route", "'prot'"),
        ("10.244.2.0/24", b'{"via":"192.0.2.2","mtu":1}', "bad_route", "mtu: 1"),
        ("10.244.2.0/24", b'{"via":"192.0.2.2","dst":"10.0.0.0/8"}', "bad_route", "in the path"),
        ("10.244.2.1/24", b'{"via":"192.0.2.2"}', "bad_route", "without host bits"),
        ("nonsense", b'{"via":"192.0.2.2"}', "bad_route", "dst: 'nonsense'"),
    ],
)
def test_invalid_route_is_refused(
    served: Served, dst: str, body: bytes, code: str, text: str
) -> None:
    status, answer, _ = ask_once(served, "PUT", f"/v1/routes/{dst}", body)
    assert (status, answer["error"]["code"]) == (400, code)
    assert text in answer["error"]["message"]
    assert served.forwarder.calls == []


def test_replace_as_json_and_as_text(http_: Http, served: Served) -> None:
    table = {"routes": [{"dst": "10.1.0.0/16", "via": "192.0.2.1"}]}
    code, body, _ = http_.ask("PUT", "/v1/routes", table, Content_Type="application/json")
    assert (code, body) == (200, {"generation": 2, "added": 1, "changed": 0, "removed": 0})
    text = b"10.2.0.0/16 via 192.0.2.1  # two\n\n10.3.0.0/16 via 192.0.2.1\n"
    code, body, _ = http_.ask("PUT", "/v1/routes", text, Content_Type="text/plain; charset=utf-8")
    assert (code, body) == (200, {"generation": 3, "added": 2, "changed": 0, "removed": 1})
    assert served.forwarder.bodies == [json.dumps(table).encode(), text]


def test_replace_with_if_match(http_: Http) -> None:
    code, body, _ = http_.ask("PUT", "/v1/routes", {"routes": []}, If_Match='"9"')
    assert (code, body["error"]["code"]) == (409, "generation_mismatch")
    assert http_.ask("PUT", "/v1/routes", {"routes": []}, If_Match='"1"')[0] == 200
    code, body, _ = http_.ask("PUT", "/v1/routes", {"routes": []}, If_Match="1")
    assert (code, body["error"]["code"]) == (400, "bad_request")


def test_if_match_for_a_single_route_is_refused(http_: Http, served: Served) -> None:
    path = "/v1/routes/10.0.0.0/8"
    for method, body in (("PUT", {"via": "192.0.2.1"}), ("DELETE", None)):
        code, answer, _ = http_.ask(method, path, body, If_Match='"1"')
        assert (code, answer["error"]["code"]) == (400, "bad_request")
    assert served.forwarder.calls == []


def test_invalid_table_is_refused(http_: Http) -> None:
    code, body, _ = http_.ask("PUT", "/v1/routes", {"routes": [{"dst": "10.1.0.0/16"}]})
    assert (code, body["error"]["code"]) == (400, "bad_route")
    assert body["error"]["message"].startswith("routes[0]: via")
    code, body, _ = http_.ask("PUT", "/v1/routes", "10.1.0.0/16 to x", Content_Type="text/plain")
    assert (code, body["error"]["code"]) == (400, "bad_route")
    assert body["error"]["message"].startswith("line 1: route")
    code, body, _ = http_.ask("PUT", "/v1/routes", "{")
    assert (code, body["error"]["code"]) == (400, "bad_json")


def test_large_body_is_received_completely(http_: Http, served: Served) -> None:
    text = b"# %s\n" % (b"x" * 5_000_000) + b"10.1.0.0/16 via 192.0.2.1\n"
    code, body, _ = http_.ask("PUT", "/v1/routes", text, Content_Type="text/plain")
    assert (code, body["added"]) == (200, 1)
    assert served.forwarder.bodies == [text]
    code, body, _ = http_.ask("PUT", "/v1/routes", text + b"x", Content_Type="text/plain")
    assert (code, body["error"]["code"]) == (400, "bad_route")
    assert body["error"]["message"].startswith("line 3: route")


@pytest.mark.parametrize("comment", [0, 5_000_000])
def test_expect_100_continue_is_answered(served: Served, comment: int) -> None:
    """curl sends "Expect: 100-continue" before a body over 1 MB. curl waits up to one second for
    the answer."""
    text = b"#%s\n10.1.0.0/16 via 192.0.2.1\n" % (b"x" * comment)
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(60)
        sock.connect(str(served.path))
        sock.sendall(
            b"PUT /v1/routes HTTP/1.1\r\nHost: x\r\nContent-Type: text/plain\r\n"
            b"Expect: 100-continue\r\nContent-Length: %d\r\n\r\n" % len(text)
        )
        with sock.makefile("rb") as answer:
            assert answer.readline() == b"HTTP/1.1 100 Continue\r\n"
            assert answer.readline() == b"\r\n"
            sock.sendall(text)
            assert answer.readline() == b"HTTP/1.1 200 OK\r\n"
    assert served.forwarder.bodies == [text]


# Refused requests


def test_unknown_path(http_: Http) -> None:
    for path in ("/", "/v1", "/v1/nowhere", "/v1/routes/", "/v2/status", "//v1/status"):
        code, body, _ = http_.ask("GET", path)
        assert (code, body["error"]["code"]) == (404, "not_found"), path


@pytest.mark.parametrize(
    ("method", "path", "allow"),
    [
        ("POST", "/v1/status", "GET"),
        ("DELETE", "/v1/routes", "GET, PUT"),
        ("GET", "/v1/routes/10.0.0.0/8", "DELETE, PUT"),
        ("GET", "/v1/stop", "POST"),
        ("PATCH", "/metrics", "GET"),
    ],
)
def test_method_not_allowed(http_: Http, method: str, path: str, allow: str) -> None:
    code, body, response = http_.ask(method, path)
    assert (code, body["error"]["code"]) == (405, "method_not_allowed")
    assert response.headers["Allow"] == allow


@pytest.mark.parametrize(
    ("path", "limit"), [("/v1/routes/10.0.0.0/8", "MAX_BODY"), ("/v1/routes", "MAX_TABLE_BODY")]
)
@pytest.mark.parametrize("chunked", [False, True])
def test_body_over_the_limit_is_refused(
    http_: Http, monkeypatch: pytest.MonkeyPatch, path: str, limit: str, chunked: bool
) -> None:
    monkeypatch.setattr(protocol, limit, 1000)
    body = (b"x" * 1001) if not chunked else iter([b"x" * 600, b"x" * 401])
    code, answer, response = http_.ask("PUT", path, body)
    assert (code, answer["error"]["code"]) == (413, "too_large")
    assert "1000 bytes" in answer["error"]["message"]
    assert response.will_close


def test_413_is_sent_before_the_body_arrives(served: Served) -> None:
    head = (
        b"PUT /v1/routes HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
        b"Content-Length: %d\r\n\r\n" % (protocol.MAX_TABLE_BODY + 1)
    )
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(60)
        sock.connect(str(served.path))
        sock.sendall(head)
        assert sock.recv(65536).startswith(b"HTTP/1.1 413 ")


def test_body_with_a_content_encoding_is_refused(http_: Http, served: Served) -> None:
    code, body, _ = http_.ask("PUT", "/v1/routes", b"\x1f\x8b", Content_Encoding="gzip")
    assert (code, body["error"]["code"]) == (400, "bad_request")
    assert served.forwarder.bodies == []


@pytest.mark.parametrize(
    "request_",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n",
        b"GET /v1/status HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
        b"GET /v1/status HTTP/1.1\r\nX: " + b"y" * 20000 + b"\r\n\r\n",
        b"PUT /v1/routes HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    ],
    ids=["tls", "length", "header", "chunk"],
)
def test_malformed_http_gets_a_json_error(served: Served, request_: bytes) -> None:
    head, _, body = raw(served.path, request_).partition(b"\r\n\r\n")
    assert head.startswith((b"HTTP/1.0 400 ", b"HTTP/1.1 400 "))
    assert b"application/json" in head
    assert json.loads(body)["error"]["code"] == "bad_request"


def test_http_1_0_client(served: Served) -> None:
    head, _, body = raw(served.path, b"GET /v1/routes HTTP/1.0\r\n\r\n").partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.0 200")
    assert json.loads(body) == {"generation": 1, "routes": []}


def test_client_outside_the_group_gets_403_for_every_request(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sockets.UnixListener, "may_connect", lambda self, peer: False)
    for method, path in (("GET", "/v1/status"), ("POST", "/v1/stop"), ("GET", "/nowhere")):
        code, body, response = ask_once(served, method, path)
        assert (code, body["error"]["code"]) == (403, "forbidden")
        assert response.will_close
    assert not served.forwarder.stopped.is_set()


def test_unexpected_exception_is_internal_and_logged(
    http_: Http, served: Served, caplog: pytest.LogCaptureFixture
) -> None:
    served.forwarder.fail_with = ZeroDivisionError("private detail")
    code, body, _ = http_.ask("DELETE", "/v1/routes/10.0.0.0/8")
    assert (code, body["error"]["code"]) == (500, "internal")
    assert "private" not in body["error"]["message"]
    assert "ZeroDivisionError: private detail" in caplog.text
    served.forwarder.fail_with = UdptunError("the TUN device is gone")
    assert "TUN device is gone" in http_.ask("GET", "/v1/status")[1]["error"]["message"]


def test_client_detects_a_truncated_answer(
    http_: Http, served: Served, caplog: pytest.LogCaptureFixture
) -> None:
    http_.ask("PUT", "/v1/routes/10.244.2.0/24", {"via": "192.0.2.2"})
    served.forwarder.fail_with = ZeroDivisionError()
    with pytest.raises(http.client.IncompleteRead):
        http_.ask("GET", "/v1/routes")
    assert "the answer is incomplete" in caplog.text


# Events


class EventStream:
    def __init__(self, served: Served, query: str = "") -> None:
        self._http = Http(served.path)
        self._http.request("GET", f"/v1/events{query}")
        self.response = self._http.getresponse()

    def next(self) -> dict[str, Any]:
        line = self.response.readline()
        assert line.endswith(b"\n")
        event: dict[str, Any] = json.loads(line)
        return event

    def close(self) -> None:
        self.response.close()
        self._http.close()


def event(number: int) -> dict[str, Any]:
    return {"time": "2026-11-23T12:00:00.000+00:00", "type": "error", "message": f"no. {number}"}


def test_event_stream_begins_with_hello_and_new_events(served: Served, http_: Http) -> None:
    http_.ask("PUT", "/v1/routes/10.1.0.0/16", {"via": "192.0.2.1"})
    stream = EventStream(served)
    assert stream.response.headers["Content-Type"] == "application/x-ndjson"
    assert stream.response.headers["Cache-Control"] == "no-store"
    assert stream.next() == {"type": "hello", "generation": 2}
    http_.ask("PUT", "/v1/routes/10.2.0.0/16", {"via": "192.0.2.1"})
    added = stream.next()
    assert (added["type"], added["dst"], added["via"]) == (
        "route_added", "10.2.0.0/16", "192.0.2.1",
    )
    stream.close()


def test_recent_events_are_bounded(served: Served, http_: Http) -> None:
    follower = EventStream(served)
    follower.next()
    served.events(*map(event, range(150)))
    while follower.next() != event(149):
        pass
    lines = http_.ask("GET", "/v1/events?follow=0")[1].splitlines()
    assert [json.loads(line) for line in lines] == [
        {"type": "hello", "generation": 1}, *map(event, range(50, 150)),
    ]
    follower.close()


def test_invalid_follow_is_refused(http_: Http) -> None:
    code, body, _ = http_.ask("GET", "/v1/events?follow=maybe")
    assert (code, body["error"]["code"]) == (400, "bad_request")


def test_slow_reader_loses_oldest_events_and_gets_their_number(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The slow reader does not delay the forwarder or another reader."""
    monkeypatch.setattr(events, "QUEUE_N", 10)
    padded = [event(i) | {"padding": "x" * 60_000} for i in range(100)]
    slow, quick = EventStream(served), EventStream(served)
    quick.next()
    for one in padded:
        served.events(one)
        assert quick.next() == one
    slow.next()
    got = []
    while not got or got[-1] != padded[-1]:
        got.append(slow.next())
    (notice,) = [e for e in got if "lost" in e]
    read = [e for e in got if "lost" not in e]
    assert notice["type"] == "error"
    assert notice["message"].startswith(f"{notice['lost']} events were lost")
    assert notice["lost"] + len(read) == 100
    at = got.index(notice)
    assert read == padded[:at] + padded[at + notice["lost"] :]
    slow.close()
    quick.close()


def test_disconnected_reader_is_removed(thread: LoopThread, served: Served) -> None:
    stream = EventStream(served)
    stream.next()
    assert thread.call(lambda: served.forwarder.events.readers_n) == 1
    stream.close()
    wait_for(
        lambda: thread.call(lambda: served.forwarder.events.readers_n) == 0, "the reader to go"
    )


# Metrics


def samples(text: str) -> dict[tuple[str, tuple[str, ...]], float]:
    return {
        (sample.name, tuple(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_metrics(http_: Http, served: Served) -> None:
    http_.ask("PUT", "/v1/routes/10.244.2.0/24", {"via": "192.0.2.2"})
    code, body, response = http_.ask("GET", "/metrics")
    assert code == 200
    assert response.headers["Content-Type"].startswith("text/plain; version=")
    found = samples(body.decode())
    expected = {
        ("udptun_build_info", (build_id(), VERSION)): 1,
        ("udptun_start_time_seconds", ()): 1e9,
        ("udptun_takeovers_total", ()): 2,
        ("udptun_bytes_total", ("encap",)): 900,
        ("udptun_send_errors_total", ("EPERM",)): 4,
        ("udptun_worker_cpu_seconds_total", ("0",)): 1.25,
        ("udptun_round_trip_seconds", ("0.5",)): 0.001,
        ("udptun_round_trip_seconds", ("1",)): 0.003,
        ("udptun_probe_loss_ratio", ("0.95",)): 0.5,
        ("udptun_packets_total", ("encap", "read")): 10,
        ("udptun_packets_total", ("decap", "delivered")): 18,
        ("udptun_queued_packets", ("encap",)): 1,
        ("udptun_drops_total", ("encap", "no_route")): 7,
        ("udptun_drops_total", ("decap", "unknown_peer")): 0,
        ("udptun_probed_peers", ("reachable",)): 1,
        ("udptun_probes_total", ("answered",)): 7,
        ("udptun_icmp_total", ("sent",)): 3,
        ("udptun_icmp_total", ("suppressed",)): 4,
        ("udptun_ecn_total", ("marked",)): 5,
        ("udptun_ecn_total", ("unexpected",)): 6,
        ("udptun_express_active", ()): 1,
        ("udptun_express_receives", ()): 1,
        ("udptun_express_peers", ()): 1,
        ("udptun_express_packets_total", ("encap", "passed")): 3,
        ("udptun_express_packets_total", ("decap", "dropped")): 0,
        ("udptun_express_left_total", ("encap", "flow")): 5,
        ("udptun_syscalls_total", ("read",)): 5,
        ("udptun_worker_turns_total", ("0",)): 8,
        ("udptun_worker_loop_returns_total", ("0",)): 9,
        ("udptun_worker_own_sockets", ("0",)): 2,
        ("udptun_peers", ()): 1,
        ("udptun_routes", ()): 1,
        ("udptun_route_generation", ()): 2,
    }
    assert {key: found.get(key) for key in expected} == expected


def test_metrics_follow_the_naming_conventions(http_: Http) -> None:
    text = http_.ask("GET", "/metrics")[1].decode()
    for family in text_string_to_metric_families(text):
        assert re.fullmatch(r"udptun_[a-z0-9_]+", family.name)
        assert family.documentation.endswith(".")
        for sample in family.samples:
            assert (family.type == "counter") == sample.name.endswith("_total")
            assert set(sample.labels) <= {
                "direction", "state", "reason", "worker", "call", "version", "build", "errno",
                "quantile",
            }


def test_some_peers_have_metrics_of_their_own(http_: Http, served: Served) -> None:
    served.forwarder.metrics_peers = 2
    found = samples(http_.ask("GET", "/metrics")[1].decode())
    sizes = {key[1]: value for key, value in found.items() if key[0] == "udptun_peer_bytes_total"}
    assert sizes == {
        ("encap", "192.0.2.4:8285"): 400, ("decap", "192.0.2.4:8285"): 800,
        ("encap", "192.0.2.3:8285"): 300, ("decap", "192.0.2.3:8285"): 600,
        ("encap", "other"): 300, ("decap", "other"): 600,
    }
    assert found["udptun_peer_round_trip_seconds", ("192.0.2.4:8285",)] == 0.004
    assert not [key for key in found if key[0] == "udptun_peer_probe_loss_ratio"]  # not measured


def test_openmetrics_with_accept_header(http_: Http) -> None:
    accept = "application/openmetrics-text; version=1.0.0"
    _, body, response = http_.ask("GET", "/metrics", Accept=accept)
    assert response.headers["Content-Type"].startswith("application/openmetrics-text")
    assert body.endswith(b"# EOF\n")


# Start and stop


def test_stop_is_answered_before_the_server_stops(served: Served, http_: Http) -> None:
    assert http_.ask("POST", "/v1/stop")[:2] == (202, {"stopping": True})
    served._closing.result(10)
    assert not served.path.exists()


def test_close_ends_event_streams_and_idle_connections(served: Served, http_: Http) -> None:
    http_.ask("GET", "/v1/healthz")
    stream = EventStream(served)
    stream.next()
    served.close()
    assert stream.response.readline() == b""  # the stream ends without IncompleteRead
    assert http_.sock.recv(1) == b""
    stream.close()


def test_close_does_not_wait_for_a_stalled_reader(
    thread: LoopThread, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "CLOSE_SECONDS", 0.05)
    with Served(thread, tmp_path / "udptun.sock") as served:

        async def endless() -> AsyncGenerator[bytes, None]:
            while True:
                yield b" " * 65536

        served.forwarder.route_chunks = endless  # type: ignore[method-assign]
        stalled = Http(served.path)
        stalled.request("GET", "/v1/routes")
        assert stalled.sock.recv(10) == b"HTTP/1.1 2"
        served.close()
        stalled.close()


def test_start_again_after_close(thread: LoopThread, tmp_path: Path) -> None:
    for _ in range(2):
        with Served(thread, tmp_path / "udptun.sock") as served:
            assert ask_once(served, "GET", "/v1/healthz")[0] == 200
            stream = EventStream(served)
            stream.next()
            assert thread.call(lambda f=served.forwarder: f.events.readers_n) == 1
        stream.close()
        assert not served.path.exists()
        assert served.forwarder.events.readers_n == 0


def test_second_close_has_no_effect(thread: LoopThread, tmp_path: Path) -> None:
    with Served(thread, tmp_path / "udptun.sock") as served:
        served.close()
        thread.run(served.server.close)


def test_second_server_on_the_same_path_is_refused(served: Served, thread: LoopThread) -> None:
    second = server.ControlServer(served.forwarder, served.path)
    with pytest.raises(DeviceError, match=re.escape(str(served.path))):
        thread.run(second.start)
    thread.run(second.close)
    assert ask_once(served, "GET", "/v1/healthz")[0] == 200
    assert stat.S_IMODE(served.path.stat().st_mode) == 0o660


def test_event_that_is_not_json_closes_only_the_event_stream(
    thread: LoopThread, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.ERROR)
    with Served(thread, tmp_path / "udptun.sock") as served:
        stream = EventStream(served)
        stream.next()
        served.events({"type": "error", "message": object()})
        with pytest.raises(http.client.HTTPException):
            stream.response.read()
        stream.close()
        assert ask_once(served, "GET", "/v1/healthz")[0] == 200
    assert "an event is not JSON" in caplog.text


# docs/control.md


@pytest.fixture(scope="module")
def page(pytestconfig: pytest.Config) -> str:
    return (pytestconfig.rootpath / "docs" / "control.md").read_text()


def test_page_lists_all_codes_paths_and_metrics(page: str, http_: Http, served: Served) -> None:
    for code, status in protocol.STATUS_OF.items():
        assert f"| `{code}` | {status} |" in page
    for path, methods in served.server._handlers.items():
        for method in methods:
            assert f"`{method} {path}" in page
    for method in served.server._route_handlers:
        assert f"`{method} /v1/routes/DST`" in page
    for family in text_string_to_metric_families(http_.ask("GET", "/metrics")[1].decode()):
        for sample in family.samples:
            assert f"`{sample.name}`" in page


def test_curl_commands_of_the_page_work(page: str, served: Served, tmp_path: Path) -> None:
    blocks = re.findall(r"```sh\n(.*?)```", page, re.S)
    endless = "-N"
    commands = [
        command
        for block in blocks
        for command in re.findall(r"^curl .*?(?<!\\)$", block, re.S | re.M)
        if endless not in command
    ]
    assert len(commands) >= 10
    (tmp_path / "routes").write_text("10.9.0.0/16 via 192.0.2.9\n")
    for command in commands:
        quick = command.replace("curl ", "curl -sS --fail-with-body ", 1)
        done = subprocess.run(
            ["bash", "-c", quick], cwd=tmp_path, env={**os.environ, "SOCK": str(served.path)},
            capture_output=True, text=True, check=False,
        )
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        assert done.stdout
    assert commands[-1].endswith("/v1/stop")
    assert [str(dst) for dst in served.forwarder.table] == ["10.9.0.0/16"]


# Clients that send nothing, or too slowly


def is_closed(sock: socket.socket) -> bool:
    """Return whether the server has closed the connection. Does not wait."""
    sock.setblocking(False)
    try:
        return sock.recv(1) == b""
    except BlockingIOError:
        return False
    except ConnectionError:
        return True


@pytest.fixture
def idle(served: Served) -> Iterator[Callable[[], socket.socket]]:
    """Return a function that opens a connection and sends nothing."""
    with ExitStack() as stack:
        def connect() -> socket.socket:
            sock = stack.enter_context(socket.socket(socket.AF_UNIX))
            sock.connect(str(served.path))  # waits while the backlog is full
            sock.settimeout(60)
            return sock

        yield connect


def test_idle_connections_never_block_other_clients(
    served: Served, idle: Callable[[], socket.socket]
) -> None:
    watching = Http(served.path)
    watching.request("GET", "/v1/events?follow=1")
    stream = watching.getresponse()
    assert b"hello" in stream.readline()
    silent = [idle() for _ in range(server.CONNECTIONS_MAX + 20)]
    assert ask_once(served, "GET", "/v1/healthz")[0] == 200
    # the oldest are closed, the event stream is not idle
    assert silent[0].recv(1) == silent[20].recv(1) == b""
    assert not is_closed(silent[-1])
    served.events({"type": "error", "message": "still there"})
    assert b"still there" in stream.readline()
    stream.close()
    watching.close()


def test_a_server_full_of_event_streams_ends_the_oldest(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(open_connections(served), "_limit", 2)
    streams = []
    for _ in range(2):
        connection = Http(served.path)
        connection.request("GET", "/v1/events?follow=1")
        streams.append((connection.getresponse(), connection))
        assert streams[-1][0].readline()
    assert ask_once(served, "GET", "/v1/healthz")[0] == 200
    with pytest.raises((http.client.HTTPException, ConnectionError)):
        streams[0][0].read()
    served.events({"type": "error", "message": "still there"})
    assert b"still there" in streams[1][0].readline()
    for response, connection in streams:
        response.close()
        connection.close()


def test_an_answer_has_a_deadline(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    async def endless() -> AsyncGenerator[bytes, None]:
        while True:
            yield bytes(1 << 20)

    monkeypatch.setattr(server, "ANSWER_SECONDS", 0.2)
    monkeypatch.setattr(served.forwarder, "route_chunks", endless)
    connection = Http(served.path)
    connection.request("GET", "/v1/routes")  # and do not read the answer
    response = connection.getresponse()
    wait_for(lambda: not len(open_connections(served)), "the end of the connection")
    with pytest.raises((http.client.HTTPException, ConnectionError)):
        response.read()
    connection.close()


@pytest.mark.parametrize("length", [True, False])
def test_an_upload_that_is_broken_off_keeps_no_memory(served: Served, length: bool) -> None:
    size = 16 << 20
    head = f"Content-Length: {size}" if length else f"Transfer-Encoding: chunked\r\n\r\n{size:x}"
    head = f"PUT /v1/routes HTTP/1.1\r\nHost: udptun\r\n{head}\r\n"
    if length:
        head += "\r\n"
    before = resident_bytes()
    for _ in range(6):
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(60)
            sock.connect(str(served.path))
            sock.sendall(head.encode() + bytes(size - 1))
        wait_for(lambda: not len(open_connections(served)), "the end of the connection")
    assert resident_bytes() - before < 3 * size
    assert not served.forwarder.bodies


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def open_connections(served: Served) -> Connections[Any]:
    return served.server._running.manager.open  # type: ignore[union-attr]


def test_a_request_has_one_deadline(
    thread: LoopThread, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "REQUEST_SECONDS", 0.5)
    with Served(thread, tmp_path / "slow.sock") as slow, socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(0.05)
        sock.connect(str(slow.path))
        for byte in itertools.chain(b"GET /v1/healthz HTTP/1.1\r\nX-Slow: ", itertools.repeat(65)):
            try:
                sock.send(bytes([byte]))
                if sock.recv(1) == b"":
                    break
            except TimeoutError:
                continue
            except ConnectionError:
                break


def test_a_body_has_a_deadline(http_: Http, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "REQUEST_SECONDS", 0.5)
    for length in (10, server.LARGE_BODY):
        http_.putrequest("PUT", "/v1/routes")
        http_.putheader("Content-Length", str(length))
        http_.putheader("Content-Type", "application/json")
        http_.endheaders(b"{")
        response = http_.getresponse()
        assert response.status == 400
        assert b"the body is not complete after 0.5 s" in response.read()
        http_.close()


def test_a_removed_socket_is_made_again(
    thread: LoopThread, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "run" / "again.sock"
    with Served(thread, path):
        kept = Http(path)
        assert kept.ask("GET", "/v1/healthz")[0] == 200
        for _ in range(2):
            shutil.rmtree(path.parent)
            wait_for(path.exists, "the socket's file")
            fresh = Http(path)
            assert fresh.ask("GET", "/v1/healthz")[0] == 200
            fresh.close()
        assert kept.ask("GET", "/v1/healthz")[0] == 200  # open connections stay
        kept.close()
        assert stat.S_IMODE(path.stat().st_mode) == 0o660
        assert "was removed; made it again" in caplog.text
    assert not path.exists()


def test_if_a_socket_cannot_be_created_again_this_is_logged_once(
    thread: LoopThread, tmp_path: Path, caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(server, "FILE_CHECK_SECONDS", 0.01)
    folder = tmp_path / "run"
    with Served(thread, folder / "again.sock"):
        shutil.rmtree(folder)
        folder.write_text("in the way")
        wait_for(lambda: "cannot be made again" in caplog.text, "an error in the log")
        folder.unlink()
        wait_for((folder / "again.sock").exists, "the socket's file")
    assert caplog.text.count("cannot be made again") == 1
