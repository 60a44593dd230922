"""The daemon's socket /run/NAME/node.sock: HTTP requests for the whole state of the node, and for
its hand-over to another daemon.

Owns the path ``/v1/node`` and its JSON (docs/node.md), which ``udptun status`` reads, and the path
``/v1/events``, which ``udptun events`` reads. Does not depend on how
the state is measured: it formats the report. Runs on the daemon's loop; a long list of peers is
formatted in slices, so that other work is not delayed.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import socket
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..._version import __version__
from ...connections import Connections
from ...control.events import Event
from ...control.protocol import (
    EVENTS,
    HAND_OVER,
    JSON_TYPE,
    NDJSON_TYPE,
    NODE,
    NODE_SOCKET,
    NODE_WITHOUT_PEERS,
    dump,
)
from ...control.sockets import UnixListener, listen_unix, peer_ids
from ...errors import DeviceError
from ...wait import FILE_CHECK_SECONDS, until_removed
from .readiness import Problem, State, is_ready, judge
from .report import DeviceCount, NodeReport, PairReport, iso_time

log = logging.getLogger(__name__)

REQUEST_SECONDS = 5.0  # limit for a client to send its request
ANSWER_SECONDS = 30.0  # limit for a client to read the answer
CONNECTIONS_MAX = 32
HEAD_LEN = 8192
PEERS_SLICE = 100  # peers that are formatted at a time


async def node_json(
    report: NodeReport, with_peers: bool = True, devices: Sequence[DeviceCount] = ()
) -> AsyncIterator[bytes]:
    """Yield the JSON text of the report, with the counters of the devices."""
    checks = judge(report)
    lease, underlay = report.lease, report.underlay
    head = {
        "version": __version__,
        "started": iso_time(report.started),
        "clock_step_seconds": round(report.clock_step(), 3),
        "store": report.store,
        "files": dict(report.files),
        "ready": is_ready(checks),
        "waiting": report.waiting,
        "key": None if lease is None else lease.key,
        "subnets": [] if lease is None else [str(subnet) for subnet in lease.subnets],
        "interface": None if underlay is None else underlay.name,
        "public": [] if underlay is None else [
            str(one) for one in (underlay.public, underlay.public6) if one is not None],
        "backend": report.backend,
        "unavailable": dict(report.unavailable),
        "mtu": report.mtu,
        "checks": [
            {"name": check.name, "state": _CHECK_STATES[check.state], "text": list(check.text)}
            for check in checks],
        "problems": [_problem(one) for check in checks for one in check.problems],
        "no_path": dict(report.peers.unreachable),
        "refused": dict(report.peers.refused),
        "events": list(report.events.recent),
        "devices": [asdict(count) for count in devices],
    }
    yield json.dumps(head)[:-1].encode() + b', "peers": ['
    for at, pair in enumerate([*report.pairs.values()] if with_peers else ()):
        text = json.dumps(_peer(report, pair)).encode()
        yield b", " + text if at else text
        if at % PEERS_SLICE == PEERS_SLICE - 1:
            await asyncio.sleep(0)
    yield b"]}\n"


def _problem(found: Problem) -> dict[str, Any]:
    since = None if found.since is None else iso_time(found.since)
    return {"check": found.check, "text": found.text, "remedy": found.remedy, "since": since,
            "peer": found.peer, "setting": found.setting}


def _peer(report: NodeReport, pair: PairReport) -> dict[str, Any]:
    return {
        "key": pair.key,
        "subnet": str(pair.subnet),
        "state": pair.state,
        "since": iso_time(pair.changed),
        "reason": pair.trouble,
        "path": pair.path,
        "path_since": iso_time(pair.since),
        "path_reason": pair.why,
        "preferred": pair.preferred,
        "return_seconds": pair.hold,
        "return_at": None if pair.returns is None else iso_time(pair.returns),
        "paths": report.describe_paths(pair.subnet),
    }


_CHECK_STATES = {State.OK: "ok", State.DEGRADED: "degraded", State.FAILED: "failed"}


class NodeSocket:
    """Answers requests on the socket from ``start`` until ``aclose``.

    control  the forwarder's control socket; ours is next to it
    hand_over  called when another daemon asks for the node; None: it is refused
    """

    def __init__(
        self, report: NodeReport, control: Path, hand_over: Callable[[], None] | None = None
    ) -> None:
        self._hand_over = hand_over
        self._report, self._path = report, control.with_name(NODE_SOCKET)
        self._listener: UnixListener | None = None
        self._server: asyncio.Server | None = None
        self._open = Connections[asyncio.StreamWriter](CONNECTIONS_MAX, _abort, _abort)

    async def serve(self) -> None:
        """Answer requests until cancelled. If the socket's file is removed, make it again.

        A failure is logged, and the socket is tried again: paths and routes do not depend on it.
        """
        refused = ""
        try:
            while True:
                try:
                    await self.start()
                except DeviceError as exc:
                    if refused != (refused := str(exc)):
                        log.error("no status for `udptun status`: %s", exc)
                    self._report.set_trouble("status", f"no status for `udptun status`: {exc}")
                    await asyncio.sleep(FILE_CHECK_SECONDS)
                    continue
                refused = ""
                self._report.set_trouble("status", "")
                await until_removed(self._path)
                log.warning("the socket %s was removed; making it again", self._path)
                await self.aclose()
        finally:
            await self.aclose()

    async def start(self) -> None:
        """Raises DeviceError if the socket cannot be used."""
        self._listener = await listen_unix(self._path, socket.SOCK_STREAM)
        self._server = await asyncio.start_unix_server(
            self._connected, sock=self._listener.sock, limit=HEAD_LEN)

    async def aclose(self) -> None:
        if self._listener is not None and self._server is not None:
            self._listener.unlink()
            self._server.close()
            self._listener = self._server = None

    async def _connected(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        try:
            if self._open.add(writer) and self._may_connect(writer):
                await self._serve(reader, writer)
        except (OSError, TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            log.debug("a request on %s failed", self._path, exc_info=True)
        finally:
            self._open.remove(writer)
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    def _may_connect(self, writer: asyncio.StreamWriter) -> bool:
        peer = writer.get_extra_info("socket")
        return self._listener is not None and self._listener.may_connect(peer)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async with asyncio.timeout(REQUEST_SECONDS):
            head = await reader.readuntil(b"\r\n\r\n")
        self._open.request_begins(writer)
        method, target, *_ = [*head.split(b"\r\n", 1)[0].split(b" "), b"", b""]
        path, _, query = target.partition(b"?")
        if (method, path) == (b"GET", EVENTS.encode()):
            await self._serve_events(reader, writer, follow=query != b"follow=0")
            return
        async with asyncio.timeout(ANSWER_SECONDS):
            if (method, target) == (b"POST", HAND_OVER.encode()) and self._hand_over is not None:
                await self._give(writer, self._hand_over)
                return
            if method != b"GET" or target.decode("latin-1") not in (NODE, NODE_WITHOUT_PEERS):
                await _answer(writer, "404 Not Found", _error(
                    f"not found: there are GET {NODE} and GET {EVENTS}"))
                return
            with_peers = target == NODE.encode()
            devices: list[DeviceCount] = []
            if with_peers:
                await self._report.freshen_paths()
                devices = await self._report.count_devices()
            body = b"".join([
                piece async for piece in node_json(self._report, with_peers, devices)])
            await _answer(writer, "200 OK", body)

    async def _serve_events(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, follow: bool
    ) -> None:
        """Send the recent events, or with ``follow`` the new ones until the client disconnects."""
        events = self._report.events
        writer.write(_head("200 OK", NDJSON_TYPE, "Transfer-Encoding: chunked"))
        hello: Event = {"type": "hello"}
        if not follow:
            await _send(writer, [hello, *events.recent])
        else:
            with events.subscribe() as new:
                await _send(writer, [hello])  # from here on, no event is missed
                gone = asyncio.ensure_future(reader.read(1))
                gone.add_done_callback(lambda _: new.end())
                try:
                    while taken := await new.take():
                        await _send(writer, taken)
                finally:
                    gone.cancel()
        writer.write(b"0\r\n\r\n")
        await writer.drain()

    async def _give(
        self, writer: asyncio.StreamWriter, hand_over: Callable[[], None]
    ) -> None:
        uid, _ = peer_ids(writer.get_extra_info("socket"))
        if uid not in (0, os.geteuid()):
            await _answer(writer, "403 Forbidden",
                          _error("only root and the daemon's user may take over", "forbidden"))
            return
        await _answer(writer, "200 OK", json.dumps({"pid": os.getpid()}).encode() + b"\n")
        hand_over()


def _abort(writer: asyncio.StreamWriter) -> None:
    writer.transport.abort()


def _error(message: str, code: str = "not_found") -> bytes:
    return json.dumps({"error": {"code": code, "message": message}}).encode() + b"\n"


async def _send(writer: asyncio.StreamWriter, events: Iterable[Event]) -> None:
    """Send a chunk with a line for each event."""
    text = b"".join(map(dump, events))
    writer.write(b"%x\r\n%s\r\n" % (len(text), text))
    async with asyncio.timeout(ANSWER_SECONDS):
        await writer.drain()


def _head(status: str, content_type: str, *more: str) -> bytes:
    lines = [f"HTTP/1.1 {status}", f"Content-Type: {content_type}", *more]
    return "\r\n".join([*lines, "", ""]).encode()


async def _answer(writer: asyncio.StreamWriter, status: str, body: bytes) -> None:
    head = _head(status, JSON_TYPE, f"Content-Length: {len(body)}", "Connection: close")
    writer.write(head + body)
    await writer.drain()
