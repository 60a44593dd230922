"""The client connections of a server of aiohttp: counted, limited, and closed if they are silent.

Owns how aiohttp's connections fit ``connections.py``. Does not depend on the requests. Threading:
the server's loop. The import of aiohttp takes much of a second.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, cast

from aiohttp import web

from ..connections import Connections

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    Handler = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]

log = logging.getLogger(__name__)


class Manager(web.Server):
    """Makes a connection object for each client. The base class closes these at the end.

    connections_max  limit of open connections
    request_seconds  limit for a client to send its first request
    """

    def __init__(self, handler: Handler, connections_max: int, request_seconds: float) -> None:
        super().__init__(handler)
        self.request_seconds = request_seconds
        self.open = Connections[Connection](
            connections_max, Connection.abort, Connection.abort)


class Connection(web.RequestHandler):
    """One client connection, counted in ``open``."""

    __slots__ = ("_request_seconds", "open")

    def __init__(self, manager: Manager) -> None:
        super().__init__(
            manager, loop=asyncio.get_running_loop(), logger=log,
            access_log=cast(logging.Logger, None),  # no access log; aiohttp's type omits None
            tcp_keepalive=False, auto_decompress=False)
        self._request_seconds = manager.request_seconds
        self.open = manager.open

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.open.add(self)
        asyncio.get_running_loop().call_later(
            self._request_seconds, self.open.close_if_silent, self)

    def abort(self) -> None:
        """Close this connection at once, even if the client does not read its answer."""
        if self.transport is not None:
            self.transport.abort()

    def connection_lost(self, exc: BaseException | None) -> None:
        self.open.remove(self)
        super().connection_lost(exc)
