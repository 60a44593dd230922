"""``--metrics``: serve /metrics over TCP, for a Prometheus that scrapes without a sidecar.

Owns the address. Forwarding does not depend on it: if the address cannot be used, the server logs
this once, and tries again. Does not depend on what the metrics are.
Threading: on the loop.
"""

from __future__ import annotations

import socket
from collections.abc import Awaitable, Callable
from urllib.parse import urlsplit

from ..model import Endpoint
from .http import Answer, HttpServer, metrics_answer, text_answer
from .protocol import METRICS


class Scrape:
    """Serves /metrics during ``run``.

    render  returns the metrics as Prometheus's text
    failed  called with the reason why the address cannot be used, and with "" when it is used
    """

    def __init__(
        self, listen: Endpoint, render: Callable[[], Awaitable[bytes]],
        failed: Callable[[str], object] = lambda _: None,
    ) -> None:
        self._listen = listen
        self._failed = failed
        self._render = render
        self._server = HttpServer("scrapes", listen.address, listen.port, self._answer)
        self._inherited: socket.socket | None = None

    @property
    def fd(self) -> int | None:
        """The listening socket; None: there is none at present."""
        return self._server.fd

    def inherit(self, fd: int) -> None:
        """Use the listening socket of an earlier process if it has our address."""
        sock = socket.socket(fileno=fd)
        if sock.getsockname()[:2] == (str(self._listen.address), self._listen.port):
            self._inherited = sock
        else:
            sock.close()

    async def run(self) -> None:
        """Listen and answer until cancelled."""
        listening, self._inherited = self._inherited, None
        await self._server.serve(self._failed, listening)

    async def _answer(self, method: str, target: str) -> Answer:
        if urlsplit(target).path.rstrip("/") != METRICS:
            return text_answer(f"not found: there is {METRICS}\n", 404)
        return metrics_answer(await self._render())
