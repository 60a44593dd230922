"""The daemon's HTTP server for probes and scrapes, with flannel's paths and Kubernetes' format.

Owns these paths:
- /healthz and /livez: 200 while the daemon's loop runs
- /readyz: 503 until the node is ready; ``?verbose`` shows all checks
- /readyz/NAME: one check
- /metrics: the daemon's metrics, then the forwarder's metrics

Reads the report; ``readiness`` decides whether the node is ready. The server is the standard
library's HTTP server, because a larger server would need ten megabytes of memory on every node for
one request every ten seconds. Each request has a thread, which reads the request and writes the
response. The daemon's loop creates the response, so that a probe fails if the loop hangs. Each
connection is for one request.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from concurrent.futures import CancelledError
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlsplit

from ...connections import Connections
from ...control.client import ControlClient
from ...errors import DeviceError, UdptunError
from .readiness import CHECKS, Check, State, is_ready, judge

if TYPE_CHECKING:
    from pathlib import Path

    from ...model import IPAddress
    from .metrics import Metrics
    from .report import NodeReport

log = logging.getLogger(__name__)

TEXT = "text/plain; charset=utf-8"
METRICS = "text/plain; version=0.0.4; charset=utf-8"
REQUEST_SECONDS = 10.0  # limit for a client to send its request, and again to read the response
ANSWER_SECONDS = 10.0  # limit for the loop to create the response
ACCEPT_PAUSE = 0.5  # seconds to wait after a failed accept
CONNECTIONS_MAX = 64  # limit of connections; each has a thread
FORWARDER_SECONDS = 2.0  # limit for the forwarder's metrics; after this, a scrape omits them


@dataclass(frozen=True, slots=True)
class Answer:
    body: bytes
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


class HealthServer:
    """Answers HTTP requests from ``start`` until ``aclose``.

    address  the address to listen on
    port     the port to listen on; 0: any free port
    control  the forwarder's control socket, used to read the forwarder's metrics
    """

    def __init__(
        self, report: NodeReport, address: IPAddress, port: int, control: Path
    ) -> None:
        self.address, self.port = address, port
        self._report = report
        self._control = control
        self._metrics: Metrics | None = None
        self._http: _Http | None = None

    async def start(self) -> None:
        """Start to listen. Raises DeviceError if the address cannot be used."""
        loop = asyncio.get_running_loop()
        try:
            http = _Http(self, loop)
        except OSError as exc:
            where = f"{self.address} port {self.port}"
            raise DeviceError(
                exc.errno, f"listening for health checks on {where}: {exc.strerror}"
            ) from exc
        self._http = http
        self.port = http.server_address[1]
        http.watch()
        log.info("listening for health checks on %s port %d", self.address, self.port)

    async def aclose(self) -> None:
        if self._http is not None:
            asyncio.get_running_loop().remove_reader(self._http.fileno())
            self._http.server_close()
            self._http = None

    async def answer(self, method: str, target: str) -> Answer:
        url = urlsplit(target)
        path = url.path.rstrip("/")
        if method not in ("GET", "HEAD"):
            return _text("only GET and HEAD are supported\n", 405, Allow="GET, HEAD")
        if path in ("/healthz", "/livez"):
            return _text("ok\n")
        if path == "/readyz":
            return self._readyz("verbose" in parse_qs(url.query, keep_blank_values=True))
        if path.startswith("/readyz/"):
            return self._one_check(path.removeprefix("/readyz/"))
        if path == "/metrics":
            return Answer(await self._render(), headers={"Content-Type": METRICS})
        return _text("not found: there are /healthz, /livez, /readyz and /metrics\n", 404)

    def _readyz(self, verbose: bool) -> Answer:
        """Answer /readyz.

        verbose  True: show all checks; False: show "ok" if the node is ready, else show the failed
                 checks
        """
        checks = judge(self._report)
        ready = is_ready(checks)
        if ready and not verbose:
            return _text("ok\n")
        shown = checks if verbose else [one for one in checks if one.state is State.FAILED]
        verdict = "readyz check passed" if ready else "readyz check failed"
        return _text("\n".join([*map(str, shown), verdict, ""]), 200 if ready else 503)

    def _one_check(self, name: str) -> Answer:
        """Answer /readyz/NAME.

        The status is 503 also if the check is degraded, because the client asks only for this
        check.
        """
        found: list[Check] = [check for check in judge(self._report) if check.name == name]
        if not found:
            return _text(f"no such check: there are {', '.join(CHECKS)}\n", 404)
        return _text(f"{found[0]}\n", 200 if found[0].state is State.OK else 503)

    async def _render(self) -> bytes:
        if self._metrics is None:
            self._metrics = (await asyncio.to_thread(_load_metrics))(self._report)
        of_forwarder = await asyncio.to_thread(self._forwarder_metrics)
        return self._metrics.render() + of_forwarder.encode()

    def _forwarder_metrics(self) -> str:
        """Return the forwarder's metrics, or "" if the forwarder does not answer.

        The daemon's metrics report that the forwarder does not answer.
        """
        try:
            with ControlClient(str(self._control), FORWARDER_SECONDS) as client:
                return client.metrics()
        except UdptunError as exc:
            log.debug("the forwarder's metrics are left out: %s", exc)
            return ""


def _text(text: str, status: int = 200, **headers: str) -> Answer:
    plain = {"Content-Type": TEXT, "Cache-Control": "no-store"}
    return Answer(text.encode(), status, plain | headers)


def _load_metrics() -> type[Metrics]:
    from .metrics import Metrics

    return Metrics


class _Http(ThreadingHTTPServer):
    """The listening socket.

    ``handle_request`` accepts one connection and starts a thread for it.
    """

    timeout = 0  # handle_request is called only if a connection is waiting
    request_queue_size = 64

    def __init__(self, health: HealthServer, loop: asyncio.AbstractEventLoop) -> None:
        self.health, self.loop = health, loop
        self.connections = Connections[socket.socket](CONNECTIONS_MAX, _shut_down)
        v6 = health.address.version == 6
        self.address_family = socket.AF_INET6 if v6 else socket.AF_INET
        super().__init__((str(health.address), health.port), _Request)

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
        log.debug("a health request from %s failed", client_address, exc_info=True)


def _shut_down(request: socket.socket) -> None:
    """End the connection. The thread that waits for the request then closes it."""
    with contextlib.suppress(OSError):  # it is closed already
        request.shutdown(socket.SHUT_RDWR)


class _Request(BaseHTTPRequestHandler):
    server: _Http
    timeout = REQUEST_SECONDS

    def _answer(self) -> None:
        self.server.connections.request_begins(self.connection)
        coroutine = self.server.health.answer(self.command, self.path)
        try:
            future = asyncio.run_coroutine_threadsafe(coroutine, self.server.loop)
        except RuntimeError:  # the loop has ended
            coroutine.close()
            return
        with contextlib.suppress(RuntimeError, CancelledError):  # the loop ends meanwhile
            answer = future.result(ANSWER_SECONDS)
            # From here on, another client may take this one's place: it may read slowly.
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
