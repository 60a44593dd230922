"""The daemon's HTTP end for probes and scrapes; flannel's paths, and Kubernetes' manner.

Owns: /healthz and /livez (the loop turns: 200), /readyz (503 until ready; ``?verbose`` says why;
/readyz/NAME is one check), /metrics (ours, then the forwarder's). Reads the report, changes
nothing. Refuses to judge what it reads (``readiness.py``). Plain asyncio, the daemon's loop; the
forwarder is asked in a helper thread. Import it only where a port was given: aiohttp is megabytes.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, cast

from aiohttp import web

from ..control.client import ControlClient
from ..errors import DeviceError, UdptunError
from .readiness import CHECKS, Check, State, is_ready, judge

if TYPE_CHECKING:
    from pathlib import Path

    from ..model import IPAddress
    from .metrics import Metrics
    from .report import NodeReport

log = logging.getLogger(__name__)

TEXT = "text/plain; charset=utf-8"
METRICS = "text/plain; version=0.0.4; charset=utf-8"
KEEPALIVE_SECONDS = 75.0  # longer than scrapes are apart
CLOSE_SECONDS = 1.0  # for answers under way
FORWARDER_SECONDS = 2.0  # for its metrics, so that a scrape ends in time without it


class HealthServer:
    """Answers on ``address`` and ``port`` from ``start`` to ``aclose``; port 0 is one of its own.

    control  the forwarder's socket, asked for its metrics
    """

    def __init__(
        self, report: NodeReport, address: IPAddress, port: int, control: Path
    ) -> None:
        self.address, self.port = address, port
        self._report = report
        self._control = control
        self._metrics: Metrics | None = None
        self._manager: web.Server | None = None
        self._listener: asyncio.Server | None = None

    async def start(self) -> None:
        """DeviceError when the address cannot be had."""
        manager = web.Server(
            self._answer,
            access_log=cast(logging.Logger, None),  # none is asked for; aiohttp's type lacks it
            keepalive_timeout=KEEPALIVE_SECONDS,
        )
        try:
            self._listener = await asyncio.get_running_loop().create_server(
                manager, str(self.address), self.port, reuse_address=True
            )
        except OSError as exc:
            where = f"{self.address} port {self.port}"
            raise DeviceError(
                exc.errno, f"answering for health on {where}: {exc.strerror}"
            ) from exc
        self._manager = manager
        self.port = self._listener.sockets[0].getsockname()[1]
        log.info("answering for health on %s port %d", self.address, self.port)

    async def aclose(self) -> None:
        if self._listener is None or self._manager is None:
            return
        self._listener.close()
        await self._manager.shutdown(CLOSE_SECONDS)
        await self._listener.wait_closed()
        self._listener = self._manager = None

    async def _answer(self, request: web.BaseRequest) -> web.StreamResponse:
        path = request.path.rstrip("/")
        if request.method not in ("GET", "HEAD"):
            return _text("only GET and HEAD are understood here\n", 405, Allow="GET, HEAD")
        if path in ("/healthz", "/livez"):
            return _text("ok\n")
        if path == "/readyz":
            return self._readyz("verbose" in request.query)
        if path.startswith("/readyz/"):
            return self._one_check(path.removeprefix("/readyz/"))
        if path == "/metrics":
            return web.Response(body=await self._render(), headers={"Content-Type": METRICS})
        return _text("not found: there are /healthz, /livez, /readyz and /metrics\n", 404)

    def _readyz(self, verbose: bool) -> web.Response:
        """Without ``verbose`` a ready node says ok, one that is not says what has failed."""
        checks = judge(self._report)
        ready = is_ready(checks)
        if ready and not verbose:
            return _text("ok\n")
        told = checks if verbose else [one for one in checks if one.state is State.FAILED]
        verdict = "readyz check passed" if ready else "readyz check failed"
        return _text("\n".join([*map(str, told), verdict, ""]), 200 if ready else 503)

    def _one_check(self, name: str) -> web.Response:
        """Stricter: what is degraded has not passed, for those whom this one thing concerns."""
        found: list[Check] = [check for check in judge(self._report) if check.name == name]
        if not found:
            return _text(f"no such check: there are {', '.join(CHECKS)}\n", 404)
        return _text(f"{found[0]}\n", 200 if found[0].state is State.OK else 503)

    async def _render(self) -> bytes:
        if self._metrics is None:
            self._metrics = (await asyncio.to_thread(_load_metrics))(self._report)
        theirs = await asyncio.to_thread(self._forwarder_metrics)
        return self._metrics.render() + theirs.encode()

    def _forwarder_metrics(self) -> str:
        """Whether it answers at all stands in our own part, so that nothing here is not told."""
        try:
            with ControlClient(str(self._control), FORWARDER_SECONDS) as client:
                return client.metrics()
        except UdptunError as exc:
            log.debug("the forwarder's metrics are left out: %s", exc)
            return ""


def _text(text: str, status: int = 200, **headers: str) -> web.Response:
    return web.Response(
        body=text.encode(), status=status,
        headers={"Content-Type": TEXT, "Cache-Control": "no-store", "Server": "udptun", **headers},
    )


def _load_metrics() -> type[Metrics]:
    from .metrics import Metrics

    return Metrics
