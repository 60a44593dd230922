"""The HTTP server of the control API: requests on a Unix socket become calls on the forwarder.

Owns the limits of connections, the routing of requests, body limits and the format of the answers
(docs/control.md). Does not depend on how routes are stored or how packets are forwarded. Threading:
control loop only. This module collects a large body but does not parse it, and sends a large answer
in pieces.

Import this module only after traffic flows, because the import of aiohttp takes much of a second.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import socket
from contextlib import aclosing, asynccontextmanager, contextmanager, suppress
from mmap import mmap
from traceback import clear_frames
from typing import TYPE_CHECKING, Any, cast

from aiohttp import web

from ..errors import ControlError, DeviceError, FieldError, UdptunError
from ..model import (
    MAX_MTU,
    MIN_TUN_MTU,
    Endpoint,
    Route,
    as_endpoint,
    parse_address,
    parse_destination,
    parse_number,
)
from ..text import counted
from ..wait import FILE_CHECK_SECONDS, until_removed
from . import protocol
from .capture import counts_record, end_record, parse_filter
from .events import Event, EventHub, Reader
from .served import Connection, Manager
from .sockets import UnixListener, listen_unix, peer_ids

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
    from pathlib import Path

    from ..model import RouteDiff
    from .served import Handler
    from .surface import Captured, Controlled

log = logging.getLogger(__name__)

CONNECTIONS_MAX = 256  # limit of open connections, event streams included
REQUEST_SECONDS = 30.0  # limit for a client to send its first request, and for each request's body
ANSWER_SECONDS = 60.0  # limit for a client to read an answer, except an event stream
CLOSE_SECONDS = 1.0  # limit for unfinished answers when the server closes
CAPTURE_SECONDS = 0.02  # between two looks at the records of a capture
COUNTS_SECONDS = 1.0  # between two reports of how many packets were lost
LARGE_BODY = 1 << 20  # bytes; copying a larger body takes too long


class ControlServer:
    """Serves ``forwarder`` at the socket ``path`` from ``start`` to ``close``."""

    def __init__(self, forwarder: Controlled, path: Path) -> None:
        self.path = path
        self._forwarder = forwarder
        self._events: EventHub = forwarder.events
        self._readers: set[Reader] = set()  # of the open event streams
        self._captures: set[_Ended] = set()  # of the running captures
        self._running: _Running | None = None
        self._keeper: asyncio.Task[None] | None = None
        self._handlers: dict[str, dict[str, Handler]] = {
            protocol.STATUS: {"GET": self._get_status},
            protocol.PEERS: {"GET": self._get_peers},
            protocol.PROBE: {"POST": self._post_probe},
            protocol.STANDBY: {"POST": self._post_standby},
            protocol.DEVICE: {"PUT": self._put_device},
            protocol.DROPS: {"GET": self._get_drops},
            protocol.CAPTURE: {"POST": self._post_capture},
            protocol.ROUTES: {"GET": self._get_routes, "PUT": self._put_routes},
            protocol.TRACE: {"GET": self._get_trace},
            protocol.EVENTS: {"GET": self._get_events},
            protocol.STOP: {"POST": self._post_stop},
            protocol.HEALTHZ: {"GET": self._get_healthz},
            protocol.METRICS: {"GET": self._get_metrics},
        }
        self._route_handlers: dict[str, Handler] = {
            "DELETE": self._delete_route, "PUT": self._put_route,
        }

    @property
    def listener(self) -> UnixListener | None:
        return None if self._running is None else self._running.listener

    async def start(self, listener: UnixListener | None = None) -> None:
        """Start listening, or use the listening socket of an earlier server at the same path.

        Raises DeviceError if the path is in use or unusable.
        """
        listener = listener or await listen_unix(self.path, socket.SOCK_STREAM)
        manager = _Manager(self._handle, listener)
        try:
            loop = asyncio.get_running_loop()
            server = await loop.create_unix_server(manager, sock=listener.sock)
        except BaseException:
            listener.unlink()
            listener.sock.close()
            raise
        self._running = _Running(listener, manager, server)
        self._keeper = asyncio.create_task(self._keep(self._running))
        log.debug("control socket at %s", self.path)

    async def _keep(self, running: _Running) -> None:
        """Listen again each time the socket's file was removed. Open connections stay open."""
        loop, refused = asyncio.get_running_loop(), ""
        while True:
            await until_removed(self.path)
            try:
                listener = await listen_unix(self.path, socket.SOCK_STREAM)
            except DeviceError as exc:
                if refused != (refused := str(exc)):
                    log.error("the control socket was removed, and cannot be made again: %s", exc)
                await asyncio.sleep(FILE_CHECK_SECONDS)
                continue
            running.server.close()
            running.listener = running.manager.listener = listener
            running.server = await loop.create_unix_server(running.manager, sock=listener.sock)
            refused = ""
            log.warning("the control socket %s was removed; made it again", self.path)

    async def close(self) -> None:
        """Remove the socket file, wait CLOSE_SECONDS for unfinished answers, then close all."""
        running, self._running = self._running, None
        if running is None:
            return
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.wait({self._keeper})
        running.listener.unlink()
        running.server.close()
        for reader in self._readers:
            reader.end()
        for ended in self._captures:
            ended.end("the forwarder stops, or another one takes over from it")
        await asyncio.sleep(0)  # let requests that have just arrived reach their handler
        running.manager.pre_shutdown()
        await running.manager.shutdown(CLOSE_SECONDS)

    # Routing

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        connection = cast(_Connection, request.protocol)
        try:
            if not connection.allowed:
                raise ControlError(
                    "forbidden", f"only root and the group of {self.path} may use this socket"
                )
            with connection.busy(), _frames_cleared():
                return await self._find(request)(request)
        except ConnectionError:
            raise  # the client has disconnected
        except web.RequestPayloadError as exc:
            return _error("bad_request", f"the body is invalid: {exc}")
        except Exception as exc:
            return _error_of(exc, request)

    def _find(self, request: web.BaseRequest) -> Handler:
        path = request.rel_url.raw_path
        handlers = self._handlers.get(path)
        if handlers is None and protocol.parse_route_path(path) is not None:
            handlers = self._route_handlers
        if handlers is None:
            raise ControlError("not_found", f"{path} does not exist: see docs/control.md")
        handler = handlers.get(request.method)
        if handler is None:
            raise _MethodNotAllowed(path, request.method, tuple(handlers))
        return handler

    # Reading

    async def _get_status(self, request: web.BaseRequest) -> web.StreamResponse:
        with_peers = protocol.parse_flag("peers", request.query.get("peers"))
        return await _stream(request, self._forwarder.status_chunks(with_peers))

    async def _get_peers(self, request: web.BaseRequest) -> web.StreamResponse:
        return await _stream(request, self._forwarder.peer_chunks())

    async def _get_drops(self, request: web.BaseRequest) -> web.StreamResponse:
        return _answer({"drops": self._forwarder.drops()})

    async def _get_routes(self, request: web.BaseRequest) -> web.StreamResponse:
        return await _stream(request, self._forwarder.route_chunks())

    async def _get_trace(self, request: web.BaseRequest) -> web.StreamResponse:
        try:
            address = parse_address("address", request.query.get("address"))
        except FieldError as exc:
            raise ControlError("bad_request", str(exc)) from None
        return _answer(self._forwarder.trace(address))

    async def _get_healthz(self, request: web.BaseRequest) -> web.StreamResponse:
        return _answer({"status": "ok"})

    async def _get_metrics(self, request: web.BaseRequest) -> web.StreamResponse:
        body, content_type = await self._forwarder.metrics(request.headers.get("Accept", ""))
        return web.Response(body=body, headers={"Content-Type": content_type})

    async def _get_events(self, request: web.BaseRequest) -> web.StreamResponse:
        follow = protocol.parse_flag("follow", request.query.get("follow"))
        response = _stream_response(protocol.NDJSON_TYPE)
        response.headers["Cache-Control"] = "no-store"
        await response.prepare(request)
        hello = {"type": "hello", "generation": self._forwarder.generation}
        if follow and self._running is not None:
            await self._follow_events(request, response, hello)
        else:
            await _write_events(response, [hello, *self._events.recent])
        await response.write_eof()
        return response

    async def _follow_events(
        self, request: web.BaseRequest, response: web.StreamResponse, hello: Event
    ) -> None:
        connection = cast(_Connection, request.protocol)
        with self._events.subscribe() as reader:
            self._readers.add(reader)
            connection.on_lost = reader.end
            try:
                await _write_events(response, [hello])
                while events := await reader.take():
                    await _write_events(response, events)
            finally:
                connection.on_lost = None
                self._readers.discard(reader)

    # Capturing

    async def _post_capture(self, request: web.BaseRequest) -> web.StreamResponse:
        """Send records until the client closes the connection, the time is over, or the server
        closes. If the client does not read, the core drops records."""
        connection = cast(_Connection, request.protocol)
        if connection.uid not in (0, os.geteuid()):
            raise ControlError(
                "forbidden", "only root and the user of the forwarder may capture packets")
        try:
            wanted, seconds = parse_filter(_object(await _body(request, protocol.MAX_BODY)))
        except FieldError as exc:
            raise ControlError("bad_request", str(exc)) from None
        captured, ended = self._forwarder.capture(wanted), _Ended()
        self._captures.add(ended)
        connection.on_lost = ended.end_quietly
        timer = None if seconds is None else asyncio.get_running_loop().call_later(
            seconds, ended.end, "the time is over")
        try:
            response = _stream_response(protocol.CAPTURE_TYPE)
            response.headers["Cache-Control"] = "no-store"
            await response.prepare(request)
            await response.write(protocol.dump(captured.head))
            await _send_records(response, captured, ended)
            await response.write_eof()
        finally:
            captured.close()
            connection.on_lost = None
            self._captures.discard(ended)
            if timer is not None:
                timer.cancel()
        return response

    # Changing

    async def _put_routes(self, request: web.BaseRequest) -> web.StreamResponse:
        expect = protocol.parse_if_match(request.headers.get("If-Match"))
        body = await _table_body(request)
        if request.content_type == protocol.TEXT_TYPE:
            diff = await self._forwarder.replace_routes_text(body, expect)
        else:
            diff = await self._forwarder.replace_routes_json(body, expect)
        return _changed(diff)

    async def _put_route(self, request: web.BaseRequest) -> web.StreamResponse:
        only_add = protocol.parse_if_none_match(request.headers.get("If-None-Match"))
        dst = _destination(request)
        values = _loads(await _body(request, protocol.MAX_BODY))
        if not isinstance(values, dict):
            raise FieldError("route", values, "an object with the key via")
        route = Route.from_json({"dst": dst, **values})
        if route.dst != parse_destination("dst", dst):
            raise FieldError("dst", values["dst"], f"the prefix in the path ({dst}), or none")
        if only_add:
            return _changed(await self._forwarder.add_route(route))
        return _changed(await self._forwarder.put_route(route))

    async def _delete_route(self, request: web.BaseRequest) -> web.StreamResponse:
        dst = parse_destination("dst", _destination(request))
        return _changed(await self._forwarder.delete_route(dst))

    async def _post_probe(self, request: web.BaseRequest) -> web.StreamResponse:
        values = _loads(await _body(request, protocol.MAX_BODY))
        if not isinstance(values, dict) or not isinstance(values.get("endpoint"), str):
            raise ControlError("bad_request", "the body: expected an object with the key "
                               "endpoint, a string such as 192.0.2.2:8285")
        unknown = values.keys() - {"endpoint", "size", "timeout"}
        if unknown:
            raise ControlError("bad_request", f"{min(unknown)}: there is no such field")
        try:
            endpoint = Endpoint.parse(values["endpoint"])
            return _answer(await self._forwarder.probe(
                endpoint, values.get("size"), values.get("timeout")))
        except FieldError as exc:
            raise ControlError("bad_request", str(exc)) from None

    async def _post_standby(self, request: web.BaseRequest) -> web.StreamResponse:
        values = _loads(await _body(request, protocol.MAX_BODY))
        if not isinstance(values, dict) or values.keys() != {"endpoints", "standby"}:
            raise ControlError("bad_request", "the body: expected an object with the keys "
                               "endpoints and standby")
        texts, standby = values["endpoints"], values["standby"]
        if not isinstance(texts, list) or len(texts) > protocol.MAX_STANDBY or \
                not all(isinstance(one, str) for one in texts):
            raise ControlError("bad_request", f"endpoints: expected a list of at most "
                               f"{protocol.MAX_STANDBY} strings")
        if not isinstance(standby, bool):
            raise ControlError("bad_request", f"standby: {standby!r} is not true or false")
        try:
            self._forwarder.set_standby([*map(Endpoint.parse, texts)], standby)
        except FieldError as exc:
            raise ControlError("bad_request", str(exc)) from None
        return _answer({"standby": standby})

    async def _put_device(self, request: web.BaseRequest) -> web.StreamResponse:
        values = _loads(await _body(request, protocol.MAX_BODY))
        if not isinstance(values, dict) or not values or values.keys() - {"mtu", "listen"}:
            raise ControlError("bad_request", "the body: expected an object with the key "
                               "mtu, listen, or both")
        mtu, listen = values.get("mtu"), values.get("listen")
        try:
            if "mtu" in values:
                mtu = parse_number("mtu", mtu, MIN_TUN_MTU, MAX_MTU)
            if "listen" in values:
                if not isinstance(listen, list) or not all(isinstance(one, str) for one in listen):
                    raise FieldError("listen", listen, "a list of ADDRESS:PORT")
                listen = [as_endpoint(one, field="listen") for one in listen]
            return _answer(await self._forwarder.change_device(mtu, listen))
        except (FieldError, DeviceError) as exc:
            raise ControlError("bad_request", str(exc)) from None

    async def _post_stop(self, request: web.BaseRequest) -> web.StreamResponse:
        response = _answer({"stopping": True}, status=202)
        await response.prepare(request)
        await response.write_eof()  # sent before the server closes
        log.info("stop requested at %s", self.path)
        self._forwarder.request_stop()
        return response


class _Ended(asyncio.Event):
    """Set when a capture ends."""

    def __init__(self) -> None:
        super().__init__()
        self.reason = ""

    def end(self, reason: str) -> None:
        self.reason = self.reason or reason
        self.set()

    def end_quietly(self) -> None:
        self.end("the client is gone")


class _Running:
    """The objects that exist between start and close."""

    def __init__(
        self, listener: UnixListener, manager: _Manager, server: asyncio.AbstractServer
    ) -> None:
        self.listener = listener
        self.manager = manager
        self.server = server


class _Manager(Manager):
    def __init__(self, handler: Handler, listener: UnixListener) -> None:
        super().__init__(handler, CONNECTIONS_MAX, REQUEST_SECONDS)
        self.listener = listener

    def __call__(self) -> web.RequestHandler:
        return _Connection(self)


class _Connection(Connection):
    """One client connection. Checks the client's permission, answers errors as JSON, and calls a
    callback when the connection is lost."""

    __slots__ = ("_listener", "allowed", "on_lost", "uid")

    def __init__(self, manager: _Manager) -> None:
        super().__init__(manager)
        self._listener = manager.listener
        self.allowed = False
        self.uid = -1  # of the client's process
        self.on_lost: Callable[[], None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        peer = transport.get_extra_info("socket")
        self.allowed = self._listener.may_connect(peer)
        self.uid, _ = peer_ids(peer)
        super().connection_made(transport)

    @contextmanager
    def busy(self) -> Iterator[None]:
        """Return the context in which a request is answered."""
        self.open.request_begins(self)
        try:
            yield
        finally:
            self.open.request_ends(self)

    def connection_lost(self, exc: BaseException | None) -> None:
        super().connection_lost(exc)
        if self.on_lost is not None:
            self.on_lost()

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Answer an error that reaches no handler: the request is not valid HTTP."""
        log.debug("bad request on %s: %s", self._listener.path, message)
        reason = (message or "").partition("\n")[0].rstrip(": ")
        response = _error("bad_request", f"the request is not valid HTTP: {reason}")
        response.force_close()
        return response


class _MethodNotAllowed(ControlError):
    def __init__(self, path: str, method: str, allowed: tuple[str, ...]) -> None:
        self.allow = ", ".join(allowed)
        super().__init__("method_not_allowed", f"{path} supports {self.allow}, not {method}")


# Answers

_NAME = {"Server": "udptun"}  # instead of aiohttp's value, which contains versions


def _answer(value: object, status: int = 200) -> web.Response:
    return web.Response(
        body=protocol.dump(value), status=status, content_type=protocol.JSON_TYPE, headers=_NAME
    )


def _changed(diff: RouteDiff) -> web.Response:
    return _answer(diff.to_json())


def _error(code: str, message: str) -> web.Response:
    return _answer({"error": {"code": code, "message": message}}, protocol.STATUS_OF[code])


def _error_of(exc: Exception, request: web.BaseRequest) -> web.Response:
    known = protocol.error_of(exc)
    if known is None:
        log.error("%s %s failed", request.method, request.rel_url.raw_path, exc_info=exc)
        reason = str(exc) if isinstance(exc, UdptunError) else "see the forwarder's log"
        return _error("internal", f"the request failed: {reason}")
    response = _error(known.code, known.message)
    if isinstance(exc, _MethodNotAllowed):
        response.headers["Allow"] = exc.allow
    if known.code in ("forbidden", "too_large"):
        response.force_close()
    return response


def _stream_response(content_type: str) -> web.StreamResponse:
    return web.StreamResponse(headers={"Content-Type": content_type, **_NAME})


async def _stream(
    request: web.BaseRequest, chunks: AsyncGenerator[bytes, None]
) -> web.StreamResponse:
    """Send JSON text in pieces. An error before the first piece becomes a JSON error answer."""
    async with aclosing(chunks):
        first = await anext(chunks, b"")
        response = _stream_response(protocol.JSON_TYPE)
        await response.prepare(request)
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                await response.write(first)
                async for chunk in chunks:
                    await response.write(chunk)
        except ConnectionError:
            raise
        except TimeoutError:
            cast(_Connection, request.protocol).abort()
            raise ConnectionResetError("the client does not read its answer") from None
        except Exception as exc:
            log.exception(
                "%s %s: the answer is incomplete", request.method, request.rel_url.raw_path
            )
            raise ConnectionResetError("the answer is incomplete") from exc  # without an end mark
        await response.write_eof(b"\n")
    return response


@contextmanager
def _frames_cleared() -> Iterator[None]:
    """If a request fails, free its local variables, for example the part of the body that arrived.

    If the client disconnects, aiohttp keeps the exception in a reference cycle. Its traceback keeps
    the variables of all functions that the exception has left.
    """
    try:
        yield
    except BaseException as exc:
        clear_frames(exc.__traceback__)
        raise


async def _write_events(response: web.StreamResponse, events: list[Event]) -> None:
    try:
        lines = b"".join(map(protocol.dump, events))
    except (TypeError, ValueError) as exc:
        log.exception("an event is not JSON: its stream ends")
        raise ConnectionResetError("the event stream is incomplete") from exc
    await response.write(lines)


async def _send_records(
    response: web.StreamResponse, captured: Captured, ended: _Ended
) -> None:
    """Send the records of a capture until it ends, then the reason."""
    loop = asyncio.get_running_loop()
    counts, due, over = (0, 0), loop.time() + COUNTS_SECONDS, False
    while not over:
        over = ended.is_set()
        records = captured.take()
        if over or loop.time() >= due:
            due = loop.time() + COUNTS_SECONDS
            if counts != (counts := captured.counts()) or over:
                records += counts_record(*counts)
        if over:
            records += end_record(ended.reason)
        if records:
            await response.write(records)
        with suppress(TimeoutError):
            await asyncio.wait_for(ended.wait(), CAPTURE_SECONDS)


# Requests


async def _accept_body(request: web.BaseRequest, limit: int) -> None:
    """Refuse a body that cannot be used. Otherwise send 100 Continue if the client waits for it.

    curl waits one second for 100 Continue before it sends a large body.
    """
    if request.headers.get("Content-Encoding", "identity") != "identity":
        raise ControlError("bad_request", "Content-Encoding: only identity is supported")
    if (request.content_length or 0) > limit:
        raise _too_large(limit)
    if request.headers.get("Expect", "").lower() == "100-continue":
        await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        request.writer.output_size = 0  # it shall count only the bytes of the answer


def _too_large(limit: int) -> ControlError:
    return ControlError("too_large", f"the body is over {limit} bytes")


async def _body(request: web.BaseRequest, limit: int) -> bytes:
    """Return the whole body. Pieces are joined, because joining releases the GIL and extending a
    bytearray does not."""
    await _accept_body(request, limit)
    parts, size = [], 0
    async with _deadline():
        async for part in request.content.iter_any():
            size += len(part)
            if size > limit:
                raise _too_large(limit)
            parts.append(part)
    return b"".join(parts)


@asynccontextmanager
async def _deadline() -> AsyncIterator[None]:
    """Limit the time in which a client sends a body."""
    try:
        async with asyncio.timeout(REQUEST_SECONDS):
            yield
    except TimeoutError:
        raise ControlError(
            "bad_request", f"the body is not complete after {REQUEST_SECONDS:g} s"
        ) from None


async def _table_body(request: web.BaseRequest) -> bytes | mmap:
    """Return the body of a route table.

    A large body of known length is copied in pieces into memory that the kernel allocates page by
    page. After each piece the CPU is yielded. Joining the pieces at the end would delay a worker on
    the same CPU by milliseconds.
    """
    length = request.content_length or 0
    if length < LARGE_BODY:
        return await _body(request, protocol.MAX_TABLE_BODY)
    await _accept_body(request, protocol.MAX_TABLE_BODY)
    body, at = mmap(-1, length), 0
    async with _deadline():
        async for part in request.content.iter_any():
            body[at : at + len(part)] = part
            at += len(part)
            os.sched_yield()
    if at != length:
        raise ControlError("bad_request",
                           f"the body has {counted(at, 'byte')}, not {length} (Content-Length)")
    return body


def _loads(body: bytes) -> Any:
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as exc:
        raise ControlError("bad_json", f"the body is not JSON: {exc}") from None


def _object(body: bytes) -> dict[str, Any]:
    values = _loads(body or b"{}")
    if not isinstance(values, dict):
        raise FieldError("the body", values, "a JSON object")
    return values


def _destination(request: web.BaseRequest) -> str:
    """Return the prefix in the path. Refuse If-Match, which single routes do not support."""
    if "If-Match" in request.headers:
        raise ControlError("bad_request", "If-Match: only for PUT /v1/routes")
    dst = protocol.parse_route_path(request.rel_url.raw_path)
    assert dst is not None  # checked by _find
    return dst
