"""A small HTTP server on TCP, for probes and scrapes: GET and HEAD, one request per connection.

Owns the listening socket, the limits of connections and time, and the threads. The caller creates
the answers. The server is the standard library's, because a larger server would need ten megabytes
of memory for one request every ten seconds. Each request has a thread, which reads the request and
writes the answer. The loop creates the answer, so that a probe fails if the loop hangs. Threading:
call the methods on the loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Awaitable, Callable
from concurrent.futures import CancelledError
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from ..connections import Connections, is_accepted
from ..errors import DeviceError
from ..model import IPAddress
from ..text import os_reason

log = logging.getLogger(__name__)

TEXT = "text/plain; charset=utf-8"
METRICS = "text/plain; version=0.0.4; charset=utf-8"
REQUEST_SECONDS = 10.0  # limit for a client to send its request, and again to read the response
ANSWER_SECONDS = 10.0  # limit for the loop to create the response
RETRY_SECONDS = 5.0  # between two tries to listen
ACCEPT_PAUSE = 0.5  # seconds to wait after a failed accept
CONNECTIONS_MAX = 64  # limit of connections; each has a thread


@dataclass(frozen=True, slots=True)
class Answer:
    body: bytes
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


def text_answer(text: str, status: int = 200, **headers: str) -> Answer:
    plain = {"Content-Type": TEXT, "Cache-Control": "no-store"}
    return Answer(text.encode(), status, plain | headers)


def metrics_answer(body: bytes) -> Answer:
    return Answer(body, headers={"Content-Type": METRICS})


class HttpServer:
    """Answers requests from ``start`` until ``aclose``.

    what    what the server is for, for messages: "health checks"
    port    the port to listen on; 0: any free port
    answer  creates the answer to a method and a target, on the loop
    """

    def __init__(
        self, what: str, address: IPAddress, port: int,
        answer: Callable[[str, str], Awaitable[Answer]],
    ) -> None:
        self.address, self.port = address, port
        self._what = what
        self._answer = answer
        self._http: _Http | None = None

    @property
    def fd(self) -> int | None:
        """The listening socket; None: the server does not run."""
        return None if self._http is None else self._http.fileno()

    async def start(self, listening: socket.socket | None = None) -> None:
        """Start to listen. Raises DeviceError if the address cannot be used.

        listening  use this socket, which listens already
        """
        loop = asyncio.get_running_loop()
        try:
            http = _Http(self, loop, listening)
        except OSError as exc:
            where = f"{self.address} port {self.port}"
            raise DeviceError(
                exc.errno, f"listening for {self._what} on {where}: {os_reason(exc)}"
            ) from exc
        self._http = http
        self.port = http.server_address[1]
        http.watch()
        log.info("listening for %s on %s port %d", self._what, self.address, self.port)

    async def serve(
        self, failed: Callable[[str], object], listening: socket.socket | None = None
    ) -> None:
        """Listen and answer until cancelled. While the address cannot be used, try again.

        failed     called after each try: with the reason, or with "" when the server listens
        listening  use this socket first, which listens already
        """
        logged = ""
        try:
            while True:
                try:
                    await self.start(listening)
                    break
                except DeviceError as exc:
                    failed(str(exc))
                    if logged != (logged := str(exc)):
                        log.error("%s; trying again every %g s", exc, RETRY_SECONDS)
                listening = None
                await asyncio.sleep(RETRY_SECONDS)
            failed("")
            await asyncio.Event().wait()
        finally:
            await self.aclose()

    async def aclose(self) -> None:
        if self._http is not None:
            asyncio.get_running_loop().remove_reader(self._http.fileno())
            self._http.server_close()
            self._http = None

    def is_foreign(self, hosts: list[str]) -> bool:
        """Return whether a Host header has a name that does not belong to this server.

        Only a server on the loopback address is checked: others are scraped by names that they
        cannot know.
        """
        return self.address.is_loopback and not all(map(is_accepted, hosts))

    async def refuse(self) -> Answer:
        return text_answer("Host: use an IP address or localhost\n", 421)

    async def answer(self, method: str, target: str) -> Answer:
        if method not in ("GET", "HEAD"):
            return text_answer("only GET and HEAD are supported\n", 405, Allow="GET, HEAD")
        return await self._answer(method, target)


class _Http(ThreadingHTTPServer):
    """The listening socket.

    ``handle_request`` accepts one connection and starts a thread for it.
    """

    timeout = 0  # handle_request is called only if a connection is waiting
    request_queue_size = 64

    def __init__(
        self, owner: HttpServer, loop: asyncio.AbstractEventLoop, listening: socket.socket | None
    ) -> None:
        self.owner, self.loop = owner, loop
        self.connections = Connections[socket.socket](CONNECTIONS_MAX, _shut_down)
        self.address_family = socket.AF_INET6 if owner.address.version == 6 else socket.AF_INET
        super().__init__(
            (str(owner.address), owner.port), _Request, bind_and_activate=listening is None)
        if listening is not None:
            self.socket.close()
            self.socket = listening
            self.server_address = listening.getsockname()
        # During a take-over, another process accepts at the same socket.
        self.socket.setblocking(False)

    def server_bind(self) -> None:
        """Bind the socket.

        The base class would also look up our own host name, which may need a request to a name
        server.
        """
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()

    def watch(self) -> None:
        """Accept connections from now on, until the socket is closed."""
        if self.fileno() >= 0:
            self.loop.add_reader(self.fileno(), self.handle_request)

    def get_request(self) -> tuple[socket.socket, Any]:
        try:
            return super().get_request()
        except BlockingIOError:
            raise  # the client is gone, or another process has accepted it
        except OSError:
            # For example, no descriptor is left. The connection is still waiting, so the loop would
            # call again at once.
            self.loop.remove_reader(self.fileno())
            self.loop.call_later(ACCEPT_PAUSE, self.watch)
            raise  # the base class expects it

    def verify_request(self, request: Any, client_address: object) -> bool:
        """Return False to refuse the connection. Called in the loop."""
        if not self.connections.add(request):
            return False
        # A timeout of the socket would limit each read, so a client could send byte by byte.
        self.loop.call_later(REQUEST_SECONDS, self.connections.close_if_silent, request)
        return True

    def shutdown_request(self, request: Any) -> None:
        self.connections.remove(request)
        super().shutdown_request(request)

    def handle_error(self, request: object, client_address: object) -> None:
        log.debug("a request from %s failed", client_address, exc_info=True)


def _shut_down(request: socket.socket) -> None:
    """End the connection. The thread that waits for the request then closes it."""
    with contextlib.suppress(OSError):  # it is closed already
        request.shutdown(socket.SHUT_RDWR)


class _Request(BaseHTTPRequestHandler):
    server: _Http
    timeout = REQUEST_SECONDS

    def _answer(self) -> None:
        self.server.connections.request_begins(self.connection)
        owner, hosts = self.server.owner, self.headers.get_all("Host", [])
        coroutine = owner.refuse() if owner.is_foreign(hosts) else \
            owner.answer(self.command, self.path)
        try:
            future = asyncio.run_coroutine_threadsafe(coroutine, self.server.loop)
        except RuntimeError:  # the loop has ended
            coroutine.close()
            return
        with contextlib.suppress(RuntimeError, CancelledError):  # the loop ends meanwhile
            answer = future.result(ANSWER_SECONDS)
            # The client may read slowly, so this connection does not count for the limit now.
            self.server.connections.request_ends(self.connection)
            self.send_response(answer.status)
            self.send_header("Content-Length", str(len(answer.body)))
            for name, value in answer.headers.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(answer.body)

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = _answer

    def version_string(self) -> str:
        return "udptun"

    def log_message(self, format: str, *args: Any) -> None:
        log.debug(format, *args)
