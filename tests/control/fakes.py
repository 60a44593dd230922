"""A fake forwarder without a data plane. The control server, the loop and the socket are real.

The tests of the control API and of the command line use this fake forwarder. The conftest.py of
each directory with such tests imports the fixtures at the end.
"""

from __future__ import annotations

import asyncio
import errno
import json
import os
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Iterator
from concurrent.futures import Future
from mmap import mmap
from pathlib import Path
from typing import Any, ClassVar

import pytest
import uvloop

from tests.reference import Record, build_record
from udptun.build import build_id
from udptun.control.events import EventHub
from udptun.control.metrics import Metrics
from udptun.drops import DROP_REASONS
from udptun.errors import DeviceError, FieldError, GenerationMismatch, RouteExists
from udptun.forwarder.express import TOTALS as EXPRESS_TOTALS
from udptun.model import CaptureFilter, Endpoint, IPAddress, IPNetwork, Route, RouteDiff

VERSION = "0.1.0"
WORKER = {
    "index": 0, "turns": 8, "loop_returns": 9, "queued": 1, "icmp_sent": 3, "icmp_suppressed": 4,
    "own_sockets": 2, "own_sockets_given": 3, "probes_lost": 0, "icmp_floods": 0,
    "ecn_marked": 5, "ecn_unexpected": 6,
    "cpu_seconds": 1.25,
    "syscalls": {"read": 5, "write": 6, "send": 7, "receive": 8, "wait": 9},
}


PING = bytes.fromhex("4500001c000040004001 0000 0af40107 0af40205 0800 f7ff 00000000")
CAPTURED = b"".join(map(build_record, (
    Record(1_000, 0, 28, 1, 0, 8285, 2, "", False, 0, bytes((192, 0, 2, 2)), PING),
    Record(2_000, 3, 9000, 7, 1400, 8285, 2, "too_big", False, 0, bytes((192, 0, 2, 2)), PING),
)))


class FakeCapture:
    """Has two packets, then none."""

    head: ClassVar[dict[str, Any]] = {
        "version": VERSION, "device": "udptun0", "mtu": 1472, "clock_offset_ns": 10**18,
        "reasons": [reason.name for reason in DROP_REASONS], "snaplen": 65536, "sample": 1,
    }

    def __init__(self) -> None:
        self.left = CAPTURED
        self.closed = False

    def take(self) -> bytes:
        taken, self.left = self.left, b""
        return taken

    def counts(self) -> tuple[int, int]:
        return 5, 3

    def close(self) -> None:
        self.closed = True


class FakeForwarder:
    """Has the methods that the control servers call. The routes are in a dict."""

    def __init__(self) -> None:
        self.generation = 1
        self.table: dict[IPNetwork, Route] = {}
        self.stopped = asyncio.Event()
        self.fail_with: Exception | None = None
        self.standby: dict[str, bool] = {}
        self.device: dict[str, Any] = {}
        self.more_peers: list[dict[str, Any]] = []
        self.other_status: dict[str, Any] = {}
        self.bodies: list[bytes] = []
        self.calls: list[str] = []
        self.metrics_peers = 0
        self.events = EventHub()
        self.captures: list[tuple[CaptureFilter, FakeCapture]] = []

    # routes

    async def add_route(self, route: Route) -> RouteDiff:
        self._call(f"add {route}")
        present = self.table.get(route.dst)
        if present not in (None, route):
            raise RouteExists(f"There is a route already: {present}.")
        return self._change({**self.table, route.dst: route})

    async def put_route(self, route: Route) -> RouteDiff:
        self._call(f"put {route}")
        return self._change({**self.table, route.dst: route})

    async def delete_route(self, dst: IPNetwork) -> RouteDiff:
        self._call(f"delete {dst}")
        return self._change({d: r for d, r in self.table.items() if d != dst})

    async def replace_routes_json(
        self, body: bytes | mmap, expect_generation: int | None = None
    ) -> RouteDiff:
        self.bodies.append(bytes(body))
        try:
            rows = json.loads(bytes(body))["routes"]
        except ValueError:
            raise FieldError("body", body[:20], "a JSON object with routes") from None
        return self._replace(
            [Route.from_json(row, f"routes[{i}]") for i, row in enumerate(rows)], expect_generation
        )

    async def replace_routes_text(
        self, body: bytes | mmap, expect_generation: int | None = None
    ) -> RouteDiff:
        self.bodies.append(bytes(body))
        lines = [line.partition("#")[0].split() for line in bytes(body).decode().splitlines()]
        return self._replace(
            [Route.from_words(w, f"line {i}") for i, w in enumerate(lines, 1) if w],
            expect_generation,
        )

    def _replace(self, routes: list[Route], expect: int | None) -> RouteDiff:
        self._call("replace")
        if expect not in (None, self.generation):
            raise GenerationMismatch(f"the table is at generation {self.generation}, not {expect}")
        return self._change({route.dst: route for route in routes})

    def _change(self, table: dict[IPNetwork, Route]) -> RouteDiff:
        added = table.keys() - self.table.keys()
        removed = self.table.keys() - table.keys()
        changed = {d for d in table.keys() & self.table.keys() if table[d] != self.table[d]}
        self.table = table
        if added or removed or changed:
            self.generation += 1
        for dst in sorted(added, key=str):
            self.emit({"time": "2026-11-23T12:00:00.000+00:00", "type": "route_added",
                       **table[dst].to_json()})
        return RouteDiff(self.generation, len(added), len(changed), len(removed))

    def _call(self, what: str) -> None:
        self.calls.append(what)
        if self.fail_with is not None:
            raise self.fail_with

    # reading

    async def route_chunks(self) -> AsyncGenerator[bytes, None]:
        yield b'{"generation":%d,"routes":[' % self.generation
        for i, route in enumerate(self.table.values()):
            yield (b"," if i else b"") + json.dumps(route.to_json()).encode()
            if self.fail_with is not None:
                raise self.fail_with
        yield b"]}"

    async def status_chunks(self, with_peers: bool = True) -> AsyncGenerator[bytes, None]:
        if self.fail_with is not None:
            raise self.fail_with
        status = status_of(self.generation, len(self.table)) | self.other_status
        text = json.dumps(status if with_peers else status | {"peers": []}).encode()
        for start in range(0, len(text), 100):
            yield text[start : start + 100]

    async def peer_chunks(self) -> AsyncGenerator[bytes, None]:
        yield json.dumps({"peers": [*status_of(1, 0)["peers"], *self.more_peers]}).encode()

    def set_standby(self, endpoints: Iterable[Endpoint], standby: bool) -> None:
        for endpoint in endpoints:
            self.standby[str(endpoint)] = standby

    async def change_device(
        self, mtu: int | None = None, listen: Iterable[Endpoint] | None = None
    ) -> dict[str, Any]:
        if mtu == 1300:
            raise DeviceError(errno.EADDRNOTAVAIL, "opening the UDP socket")
        self.device = {"mtu": mtu, "listen": None if listen is None else [*map(str, listen)]}
        return self.device

    async def probe(
        self, endpoint: Endpoint, size: int | None = None, timeout: float | None = None
    ) -> dict[str, Any]:
        if str(endpoint) != "192.0.2.2:8285":
            raise FieldError("endpoint", str(endpoint), "a peer that has a route with `probe`")
        return {"answered": True, "rtt_us": 412, "size": size or 24, "heard_seconds": 0.001,
                "peer_heard_seconds": 0.001, "from_peer": True, "to_peer": True}

    def drops(self) -> list[dict[str, Any]]:
        last = [{
            "id": "0-1", "time": "2026-11-23T13:05:24.921+00:00", "packets": 1, "length": 84,
            "endpoint": None, "src": "10.244.1.7", "dst": "10.244.9.9", "protocol": "udp",
            "src_port": 40000, "dst_port": 53,
        }]
        return [
            {"reason": r.name, "direction": d, "packets": 7 * (r.name == "no_route"),
             "last": last if r.name == "no_route" else []}
            for r in DROP_REASONS for d in r.directions
        ]

    def capture(self, wanted: CaptureFilter) -> FakeCapture:
        self._call("capture")
        self.captures.append((wanted, FakeCapture()))
        return self.captures[-1][1]

    def trace(self, address: IPAddress) -> dict[str, Any]:
        for dst, route in self.table.items():
            if address in dst:
                return {"address": str(address), "verdict": "forward", "reason": None,
                        "route": route.to_json(), "peer": f"{route.via}:{route.port}", "mtu": 1472}
        return {"address": str(address), "verdict": "drop", "reason": "no_route", "route": None,
                "peer": None, "mtu": None}

    def counters(self) -> dict[str, Any]:
        return {
            "build": build_id(), "started": 1e9, "takeovers_n": 2,
            "transferred": {"encap": {"packets": 8, "bytes": 900},
                            "decap": {"packets": 7, "bytes": 800}},
            "send_errors": {"EPERM": 4, "ENOBUFS": 2},
            "packets": status_of(1, 0)["packets"], "drops": self.drops(), "peers_n": 1,
            "routes_n": len(self.table), "generation": self.generation,
            "icmp": {"sent": 3, "suppressed": 4},
            "express": {
                "active": True, "receives": True, "peers_n": 1, "marked": 0,
                "packets": {"encap": {"passed": 3, "dropped": 1},
                            "decap": {"passed": 4, "dropped": 0}},
                "left": {direction: {
                    name.removeprefix(prefix): 5 * (name == "send_flow") for name in EXPRESS_TOTALS
                    if name.startswith(prefix) and not name.endswith(("_dropped", "_marked"))
                } for direction, prefix in (("encap", "send_"), ("decap", "receive_"))}},
            "ecn": {"marked": 5, "unexpected": 6}, "peer_errors": {"icmp": 5, "send": 6},
            "syscalls": WORKER["syscalls"],
            "workers": [WORKER],
            "probes": {
                "states": {"reachable": 1, "unreachable": 0, "unknown": 0},
                "probes": {"sent": 9, "refused": 1, "answered": 7, "received": 5},
                "round_trips": [0.001, None, 0.003], "losses": [0.0, 0.5, None],
            },
        }

    def peer_counters(self) -> dict[str, dict[str, Any]]:
        return {
            f"192.0.2.{n}:8285": {
                "transferred": (n, 100 * n, 2 * n, 200 * n), "round_trip": n / 1000, "loss": None}
            for n in range(1, 5)
        }

    async def metrics(self, accept: str = "") -> tuple[bytes, str]:
        return Metrics(self, self.metrics_peers).render(accept)

    # events and stop

    def emit(self, event: dict[str, Any]) -> None:
        self.events.publish(event)

    def request_stop(self) -> None:
        self.stopped.set()


def status_of(generation: int, route_count: int) -> dict[str, Any]:
    side = {"read": 10, "generated": 1, "delivered": 8, "consumed": 0, "dropped": 2,
            "queued": 1}
    return {
        "version": VERSION, "build": build_id(), "pid": os.getpid(),
        "uptime_seconds": 3723.5,
        "generation": generation, "route_count": route_count, "source_check": "strict",
        "admit": "any", "mark": None, "dscp": "0",
        "accelerate": {
            "mode": "off", "active": False, "reason": "--accelerate off", "receives": False,
            "generation": 3,
            "kernel_generation": None, "devices": [],
            "packets": dict.fromkeys(EXPRESS_TOTALS, 0),
        },
        "device": {
            "name": "udptun0", "mtu": 1472, "addresses": ["10.244.1.0"],
            "networks": ["10.244.0.0/16"], "subnets": [], "listen": ["192.0.2.1:8285"],
        },
        "capabilities": {
            "found": ["tun-gso", "udp-gso"], "in_use": ["tun-gso", "udp-gso", "batch"],
            "off": {"udp-merge": "asked"},
        },
        "workers": [WORKER],
        "peers": [
            {
                "endpoint": "192.0.2.2:8285", "subnets": ["10.244.2.0/24"],
                "encap": {"packets": 12, "bytes": 1536}, "decap": {"packets": 3, "bytes": 999},
                "path_mtu": 1500, "path_mtu_source": "probe", "path_mtu_seconds": None,
                "last_seen_seconds": 3.4, "errors": 2,
                "last_error": {
                    "errno": "ECONNREFUSED", "origin": "icmp", "type": 3, "code": 3,
                    "reporter": "192.0.2.2", "seconds_ago": 61.2,
                    "text": "connection refused: nothing listens on 192.0.2.2:8285 "
                            "(ICMP port unreachable from 192.0.2.2)",
                },
                "probe": {
                    "state": "reachable", "since": "2026-11-23T13:05:24.921+00:00", "reason": "",
                    "rtt_us": 412, "loss": 0.03125,
                    "last_answer": "2026-11-23T13:06:01.004+00:00", "largest_size": 1472,
                    "full_size_passes": True,
                },
                "express": {"active": False, "reason": "--accelerate off"},
            },
            {
                "endpoint": "[2001:db8::3]:8285", "subnets": [],
                "encap": {"packets": 0, "bytes": 0}, "decap": {"packets": 0, "bytes": 0},
                "path_mtu": 1280, "path_mtu_source": "icmp", "path_mtu_seconds": 41.7,
                "last_seen_seconds": None, "errors": 0, "last_error": None,
                "probe": None,
                "express": {"active": False, "reason": "--accelerate off"},
            },
        ],
        "packets": {"encap": side, "decap": dict(side, read=20, delivered=18)},
    }


class LoopThread:
    """Runs a uvloop loop in a thread, so that tests can use plain blocking clients."""

    def __enter__(self) -> LoopThread:
        ready: Future[asyncio.AbstractEventLoop] = Future()

        def run() -> None:
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                runner.run(self._main(ready))

        self._thread = threading.Thread(target=run)
        self._thread.start()
        self.loop = ready.result(10)
        return self

    async def _main(self, ready: Future[asyncio.AbstractEventLoop]) -> None:
        self._end = asyncio.Event()
        ready.set_result(asyncio.get_running_loop())
        await self._end.wait()

    def __exit__(self, *exc: object) -> None:
        self.loop.call_soon_threadsafe(self._end.set)
        self._thread.join(10)
        assert not self._thread.is_alive()

    def run(self, make: Callable[..., Awaitable[Any]], *args: Any) -> Any:
        """Await ``make(*args)`` on the loop of this thread."""

        async def on_loop() -> Any:
            return await make(*args)

        return asyncio.run_coroutine_threadsafe(on_loop(), self.loop).result(20)

    def call(self, work: Callable[..., Any], *args: Any) -> Any:
        """Call ``work(*args)`` on the loop of this thread."""

        async def on_loop() -> Any:
            return work(*args)

        return self.run(on_loop)


class Served:
    """A fake forwarder with a real control server. The server closes after a stop request."""

    forwarder: FakeForwarder

    def __init__(
        self, thread: LoopThread, path: Path, make: Callable[[], FakeForwarder] = FakeForwarder
    ) -> None:
        self.thread, self.path, self._make = thread, path, make

    def __enter__(self) -> Served:
        from udptun.control.server import ControlServer

        self.forwarder = self.thread.call(self._make)
        self.server = ControlServer(self.forwarder, self.path)
        self.thread.run(self.server.start)
        self._closing = asyncio.run_coroutine_threadsafe(self._close(), self.thread.loop)
        return self

    async def _close(self) -> None:
        await self.forwarder.stopped.wait()
        await self.server.close()

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        self.thread.call(self.forwarder.request_stop)
        self._closing.result(20)

    def events(self, *events: dict[str, Any]) -> None:
        """Emit all events in one callback of the loop. No reader runs between two of the events."""
        self.thread.call(lambda: [self.forwarder.emit(event) for event in events])


@pytest.fixture(scope="module")
def thread() -> Iterator[LoopThread]:
    with LoopThread() as running:
        yield running


@pytest.fixture
def served(thread: LoopThread, tmp_path: Path) -> Iterator[Served]:
    with Served(thread, tmp_path / "udptun.sock") as running:
        yield running
