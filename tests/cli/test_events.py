"""``udptun events``: the events of the node daemon and of the forwarder, in one stream."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from ipaddress import IPv4Network
from pathlib import Path
from typing import Any

import pytest

from tests.control.fakes import LoopThread, Served
from tests.node.node_reports import ready
from udptun.node.status.report import NodeReport, PairReport
from udptun.node.status.socket import NodeSocket

SUBNET = IPv4Network("10.244.2.0/24")
ENDPOINT = "192.0.2.2:8285"


class ServedNode:
    def __init__(self, thread: LoopThread, path: Path) -> None:
        self.thread = thread
        self.report: NodeReport = ready()
        self.report.pairs[SUBNET] = PairReport("n2", SUBNET, "udp")
        self.report.describe_paths = lambda _: {"udp": {"endpoint": ENDPOINT}}
        self._socket = NodeSocket(self.report, path)

    def __enter__(self) -> ServedNode:
        self.thread.run(self._socket.start)
        return self

    def __exit__(self, *exc: object) -> None:
        self.thread.run(self._socket.aclose)

    def event(self, kind: str, **fields: Any) -> None:
        self.thread.call(lambda: self.report.event(kind, **fields))


@pytest.fixture
def node(thread: LoopThread, served: Served) -> Iterator[ServedNode]:
    with ServedNode(thread, served.path) as running:
        yield running


def argv(path: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "udptun", "events", "--socket", str(path), *more]


def lines(path: Path, *more: str) -> list[str]:
    done = subprocess.run(argv(path, *more), capture_output=True, text=True, timeout=60, check=True)
    return done.stdout.splitlines()


def forwarder_event(**fields: Any) -> dict[str, Any]:
    return {"time": "2000-01-01T00:00:00.000+00:00", "type": "peer_reachable",
            "endpoint": ENDPOINT, **fields}


def test_recent_events_are_ordered_by_time_and_have_names(served: Served, node: ServedNode) -> None:
    node.event("path_changed", peer="n2", path="udp", reason="why")
    node.event("check_failed", check="store", reason="down")
    served.events(forwarder_event(), forwarder_event(time="2100-01-01T00:00:00.000+00:00"))
    found = [line.split("  ", 1)[1] for line in lines(served.path)]
    assert found == [
        f"forwarder  peer_reachable    n2 endpoint {ENDPOINT}",
        "node       path_changed      n2 path udp reason why",
        "node       check_failed      store reason down",
        f"forwarder  peer_reachable    n2 endpoint {ENDPOINT}",
    ]
    hello, *events = [json.loads(line) for line in lines(served.path, "-o", "json")]
    assert hello == {"type": "hello", "generation": 1}
    assert [event["source"] for event in events] == ["forwarder", "node", "node", "forwarder"]
    assert {event.get("peer") for event in events} == {"n2", None}


def test_a_node_without_a_forwarder_has_events(thread: LoopThread, tmp_path: Path) -> None:
    with ServedNode(thread, tmp_path / "udptun.sock") as node:
        node.event("started", message="udptun")
        assert [line.split("  ", 1)[1] for line in lines(tmp_path / "udptun.sock")] == [
            "node       started           udptun"]
        (hello, _) = lines(tmp_path / "udptun.sock", "-o", "json")
        assert json.loads(hello) == {"type": "hello"}


def test_new_events_of_both_come_as_they_happen(served: Served, node: ServedNode) -> None:
    watching = subprocess.Popen(
        argv(served.path, "-w", "-o", "json"), stdout=subprocess.PIPE, text=True)
    with watching:
        out = watching.stdout
        assert out is not None

        def read() -> dict[str, Any]:
            value: dict[str, Any] = json.loads(out.readline())
            return value

        assert read()["type"] == "hello"  # both have answered
        steps: list[tuple[Callable[[], None], str]] = [
            (lambda: node.event("path_changed", peer="n2"), "path_changed"),
            (lambda: served.events(forwarder_event()), "peer_reachable"),
            (lambda: node.event("no_path", peer="n3"), "no_path"),
        ]
        for act, kind in steps:
            act()
            event = read()
            assert event["type"] == kind
            assert event["source"] == ("forwarder" if kind == "peer_reachable" else "node")
        watching.kill()
