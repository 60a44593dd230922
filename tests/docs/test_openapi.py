"""docs/openapi.yaml describes the servers as they are: every path, every key of every answer.

The document lets answers have further keys, because clients must ignore what they do not know. The
tests do not: a key that the document lacks is a mistake.
"""

from __future__ import annotations

import http.client
import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator
from openapi_spec_validator import validate

from tests.control.fakes import FakeForwarder
from tests.netns.hosts_file import two_nodes
from udptun.control import protocol
from udptun.control.client import _UnixConnection
from udptun.control.server import ControlServer
from udptun.lab import Lab, pair, ping, wait_for

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = yaml.safe_load((ROOT / "docs" / "openapi.yaml").read_text())


def closed(schema: Any) -> Any:
    """Return a schema whose objects have no further keys."""
    if isinstance(schema, list):
        return [closed(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    made = {name: closed(value) for name, value in schema.items()}
    if isinstance(schema.get("properties"), dict) and schema.get("type") == "object":
        made.setdefault("additionalProperties", False)
    return made


STRICT = closed(deepcopy(DOCUMENT["components"]["schemas"]))


def mistakes(path: str, method: str, status: int, answer: Any) -> list[str]:
    responses = DOCUMENT["paths"][path][method.lower()]["responses"]
    response = responses.get(str(status), responses["default"])
    if "$ref" in response:
        response = DOCUMENT["components"]["responses"][response["$ref"].rpartition("/")[2]]
    (content,) = response["content"].values()
    schema = {**closed(deepcopy(content["schema"])), "components": {"schemas": STRICT}}
    return [f"{error.json_path}: {error.message}"
            for error in Draft202012Validator(schema).iter_errors(answer)]


def ask(
    socket: Path, method: str, target: str, body: object = None, **headers: str
) -> tuple[int, bytes]:
    connection = _UnixConnection(str(socket), 60)
    try:
        data = None if body is None else json.dumps(body).encode()
        connection.request(method, target, data, headers)
        answer: http.client.HTTPResponse = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


@pytest.mark.unprivileged
def test_the_document_is_valid() -> None:
    validate(DOCUMENT)


@pytest.mark.unprivileged
def test_the_document_has_every_path_and_method(tmp_path: Path) -> None:
    server = ControlServer(FakeForwarder(), tmp_path / "s")
    have = {path: set(methods) for path, methods in server._handlers.items()}
    have[f"{protocol.ROUTES}/{{dst}}"] = set(server._route_handlers)
    have |= {protocol.NODE: {"GET"}, protocol.HAND_OVER: {"POST"}}
    assert have == {
        path: {method.upper() for method in methods if method not in ("parameters", "servers")}
        for path, methods in DOCUMENT["paths"].items()
    }


@pytest.mark.unprivileged
def test_the_document_has_every_error_code() -> None:
    error = DOCUMENT["components"]["schemas"]["Error"]["properties"]["error"]["properties"]
    assert error["code"]["enum"] == list(protocol.STATUS_OF)


def test_the_answers_of_a_forwarder(lab: Lab) -> None:
    tunnel = pair(lab, start=False)
    for side, other in (tunnel.sides, tunnel.sides[::-1]):
        side.options["routes"] = [f"{route} probe" for route in side.routes_to(other)]
        side.start()
    a, b = tunnel.sides
    ping(a.host, b.v4, count=1)
    for lost in ("10.244.77.1", "10.244.78.1"):
        ping(a.host, lost, count=1, wait=0.2)  # no_route
    peer = f"{b.outer}:8285"
    spare = "/v1/routes/10.244.9.0%2F24"
    requests: list[tuple[str, str, str, object, dict[str, str]]] = [
        ("/v1/peers", "GET", "/v1/peers", None, {}),
        ("/v1/status", "GET", "/v1/status", None, {}),
        ("/v1/probe", "POST", "/v1/probe", {"endpoint": peer}, {}),
        ("/v1/probe", "POST", "/v1/probe", {"endpoint": "192.0.2.77:1"}, {}),
        ("/v1/standby", "POST", "/v1/standby", {"endpoints": [peer], "standby": False}, {}),
        ("/v1/device", "PUT", "/v1/device", {"mtu": 1400}, {}),
        ("/v1/device", "PUT", "/v1/device", {"mtu": 1}, {}),
        ("/v1/drops", "GET", "/v1/drops", None, {}),
        ("/v1/trace", "GET", f"/v1/trace?address={b.v4}", None, {}),
        ("/v1/trace", "GET", "/v1/trace?address=10.244.77.1", None, {}),
        ("/v1/trace", "GET", "/v1/trace?address=x", None, {}),
        ("/v1/routes/{dst}", "PUT", spare,
         {"via": str(b.outer), "mtu": 1400, "source_port": "any", "probe": True}, {}),
        ("/v1/routes/{dst}", "PUT", spare, {"via": str(a.host.lab.next_subnets()[0][9])},
         {"If-None-Match": "*"}),
        ("/v1/routes", "GET", "/v1/routes", None, {}),
        ("/v1/routes/{dst}", "DELETE", spare, None, {}),
        ("/v1/routes", "PUT", "/v1/routes", {"routes": []}, {"If-Match": '"99"'}),
        ("/v1/healthz", "GET", "/v1/healthz", None, {}),
        ("/metrics", "GET", "/metrics", None, {}),
    ]
    wait_for(lambda: a.forwarder.status()["peers"][0]["probe"]["state"] == "reachable", "a probe")
    for path, method, target, body, headers in requests:
        status, text = ask(a.forwarder.control, method, target, body, **headers)
        answer = text.decode() if path == "/metrics" else json.loads(text)
        assert mistakes(path, method, status, answer) == [], (target, answer)
    _, drops = ask(a.forwarder.control, "GET", "/v1/drops")
    assert any(row["last"] for row in json.loads(drops)["drops"])
    b.forwarder.process.kill()
    ask(a.forwarder.control, "POST", "/v1/probe", {"endpoint": peer, "timeout": 0.2})
    _, lines = ask(a.forwarder.control, "GET", "/v1/events?follow=0")
    for event in map(json.loads, lines.splitlines()):
        assert mistakes("/v1/events", "GET", 200, event) == []
    for path, method in (("/v1/peers", "GET"), ("/v1/stop", "POST")):
        status, text = ask(a.forwarder.control, method, path)
        assert mistakes(path, method, status, json.loads(text)) == []


@pytest.mark.slow
def test_the_answers_of_a_node(lab: Lab) -> None:
    nodes = two_nodes(lab)
    for node in nodes:
        node.start()
    for node in nodes:
        node.wait_ready()
    socket = nodes[0].control.with_name(protocol.NODE_SOCKET)
    wait_for(lambda: json.loads(ask(socket, "GET", protocol.NODE)[1])["peers"], "a peer")
    for method, target in (
        ("GET", protocol.NODE), ("GET", protocol.NODE_WITHOUT_PEERS), ("POST", protocol.HAND_OVER),
    ):
        status, text = ask(socket, method, target)
        assert mistakes(target.partition("?")[0], method, status, json.loads(text)) == []
    _, text = ask(nodes[1].control.with_name(protocol.NODE_SOCKET), "GET", "/v1/nothing")
    assert mistakes(protocol.NODE, "GET", 404, json.loads(text)) == []


@pytest.mark.unprivileged
def test_an_undocumented_key_is_found() -> None:
    diff = {"generation": 1, "added": 0, "changed": 0, "removed": 0}
    assert mistakes("/v1/routes", "PUT", 200, diff) == []
    assert mistakes("/v1/routes", "PUT", 200, {**diff, "other": 1})
    assert mistakes("/v1/routes", "PUT", 200, {"generation": 1})
