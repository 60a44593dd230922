"""The HTTP server of ``udptun web``: four files, for GET and HEAD only.

Owns the limits of connections and times, the check of the Host header, and the headers that tell
the browser what the page may do. Does not depend on what the page shows. Threading: one loop.

A page of another site can make a browser of this host send requests. It cannot read the answers:
the browser allows this only for the same origin. A site whose name points to our address (DNS
rebinding) is of the same origin, so a name that is not ours is refused.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

from aiohttp import web

from ...connections import LOCALHOST, is_accepted
from ...control.served import Connection, Manager
from ...errors import FieldError
from .page import Choice, page
from .watch import Watch

if TYPE_CHECKING:
    from ...model import Endpoint

log = logging.getLogger(__name__)

CONNECTIONS_MAX = 64
REQUEST_SECONDS = 10.0  # limit for a client to send its first request
ANSWER_SECONDS = 30.0  # limit for a client to read an answer
CLOSE_SECONDS = 1.0  # limit for unfinished answers at the end
QUERY_LEN = 2000
STATIC = Path(__file__).with_name("static")
FILES = {"/page.css": "text/css", "/page.js": "text/javascript", "/icon.svg": "image/svg+xml"}
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
                               "img-src 'self'; connect-src 'self'; form-action 'self'; "
                               "base-uri 'none'; frame-ancestors 'none'",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
    "Server": "udptun",
}


class WebServer:
    """Serves from ``start`` to ``close``.

    names  host names of this page, besides addresses and localhost
    port   the port that the server listens on
    """

    def __init__(self, watch: Watch, names: Sequence[str] = ()) -> None:
        self._watch = watch
        self._names = {*LOCALHOST, *(name.lower() for name in names)}
        self._files = {path: (STATIC / path[1:]).read_bytes() for path in FILES}
        self._manager: _Manager | None = None
        self._server: asyncio.Server | None = None
        self.port = 0

    async def start(self, listen: Endpoint) -> None:
        """Raises OSError."""
        await self.start_at(str(listen.address), listen.port)

    async def start_at(self, address: str, port: int) -> None:
        self._manager = _Manager(self._handle, CONNECTIONS_MAX, REQUEST_SECONDS)
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(self._manager, address, port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def close(self) -> None:
        if self._server is not None and self._manager is not None:
            self._server.close()
            self._manager.pre_shutdown()
            await self._manager.shutdown(CLOSE_SECONDS)
        self._watch.close()

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        connection = cast(_Connection, request.protocol)
        connection.open.request_begins(connection)
        try:
            response = await self._answer(request)
            for name, value in HEADERS.items():
                response.headers[name] = value
            try:
                async with asyncio.timeout(ANSWER_SECONDS):
                    await response.prepare(request)
                    await response.write_eof()
            except TimeoutError:
                connection.abort()
                raise ConnectionResetError("the client does not read its answer") from None
            return response
        finally:
            connection.open.request_ends(connection)

    async def _answer(self, request: web.BaseRequest) -> web.Response:
        if request.method not in ("GET", "HEAD"):
            response = _text("only GET and HEAD are supported", 405)
            response.headers["Allow"] = "GET, HEAD"
        elif request.body_exists:
            response = _text("a request with a body is not supported", 400)
        elif (why := self._refused(request.headers.getall("Host", []))):
            response = _text(why, 421)
        else:
            return await self._file(request)
        response.force_close()  # a body may follow
        return response

    def _refused(self, hosts: list[str]) -> str:
        """Return why the request is not for this page; "": it is."""
        if len(hosts) != 1:
            return "the request does not have exactly one Host header"
        if is_accepted(hosts[0], self._names):
            return ""
        return f"Host: {hosts[0][:100]!r} is not a name of this page: use its address or " \
            "localhost, or start `udptun web` with --host NAME"

    async def _file(self, request: web.BaseRequest) -> web.Response:
        path = request.rel_url.raw_path
        if path in FILES:
            return web.Response(body=self._files[path], content_type=FILES[path], charset="utf-8")
        if path != "/":
            return _text("not found: the page is at /", 404)
        if len(request.rel_url.raw_query_string) > QUERY_LEN:
            return _text(f"the query is longer than {QUERY_LEN} characters", 400)
        try:
            choice = Choice.parse(request.rel_url.query)
        except FieldError as exc:
            return _text(str(exc), 400)
        view = await self._watch.view()
        response = web.Response(body=page(view, choice), content_type="text/html", charset="utf-8")
        response.enable_compression()
        return response


def _text(text: str, status: int) -> web.Response:
    return web.Response(text=f"{text}\n", status=status)


class _Manager(Manager):
    def __call__(self) -> web.RequestHandler:
        return _Connection(self)


class _Connection(Connection):
    __slots__ = ()

    def handle_error(
        self, request: web.BaseRequest, status: int = 500, exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Answer a request that is not valid HTTP, or that failed here."""
        if status >= 500 and not isinstance(exc, ConnectionError):  # the client has gone
            log.error("a request failed", exc_info=exc)
        response = _text("the request is not valid HTTP" if status < 500 else
                         "the request failed; see the output of udptun web", status)
        response.headers.update(HEADERS)
        response.force_close()
        return response
