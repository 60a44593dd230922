"""``--metrics``: serve /metrics over TCP, for a Prometheus that scrapes without a sidecar.

Owns the address and the tries to listen there. Forwarding does not depend on it: if the address
cannot be used, this is logged once, and tried again. Does not depend on what the metrics are.
Threading: on the loop.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Awaitable, Callable
from urllib.parse import urlsplit

from ..errors import DeviceError
from ..model import Endpoint
from .http import Answer, HttpServer, metrics_answer, text_answer
from .protocol import METRICS

log = logging.getLogger(__name__)

RETRY_SECONDS = 5.0  # between two tries to listen


class Scrape:
    """Serves /metrics during ``run``.

    render  returns the metrics as Prometheus's text
    """

    def __init__(self, listen: Endpoint, render: Callable[[], Awaitable[bytes]]) -> None:
        self._listen = listen
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
        said = ""
        try:
            while True:
                listening, self._inherited = self._inherited, None
                try:
                    await self._server.start(listening)
                    break
                except DeviceError as exc:
                    if said != (said := str(exc)):
                        log.error("no metrics are served: %s; trying again every %g s", exc,
                                  RETRY_SECONDS)
                await asyncio.sleep(RETRY_SECONDS)
            await asyncio.Event().wait()
        finally:
            await self._server.aclose()
            if self._inherited is not None:
                self._inherited.close()

    async def _answer(self, method: str, target: str) -> Answer:
        if urlsplit(target).path.rstrip("/") != METRICS:
            return text_answer(f"not found: there is {METRICS}\n", 404)
        return metrics_answer(await self._render())
