"""The daemon's HTTP server for probes and scrapes, with flannel's paths and Kubernetes' format.

Owns these paths:
- /healthz and /livez: 200 while the daemon's loop runs
- /readyz: 503 until the node is ready; ``?verbose`` shows all checks
- /readyz/NAME: one check
- /metrics: the metrics of ``scrape``

Reads the report; ``readiness`` decides whether the node is ready. ``control.http`` has the server.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING
from urllib.parse import parse_qs, urlsplit

from ...control.http import Answer, HttpServer, metrics_answer, text_answer
from .readiness import CHECKS, Check, State, is_ready, judge

if TYPE_CHECKING:
    from ...model import IPAddress
    from .report import NodeReport


class HealthServer(HttpServer):
    """Answers HTTP requests from ``start`` until ``aclose``.

    address  the address to listen on
    port     the port to listen on; 0: any free port
    render   returns the metrics as Prometheus's text
    """

    def __init__(
        self, report: NodeReport, address: IPAddress, port: int,
        render: Callable[[], Awaitable[bytes]],
    ) -> None:
        super().__init__("health checks", address, port, self._find)
        self._report = report
        self._render = render

    async def _find(self, method: str, target: str) -> Answer:
        url = urlsplit(target)
        path = url.path.rstrip("/")
        if path in ("/healthz", "/livez"):
            return text_answer("ok\n")
        if path == "/readyz":
            return self._readyz("verbose" in parse_qs(url.query, keep_blank_values=True))
        if path.startswith("/readyz/"):
            return self._one_check(path.removeprefix("/readyz/"))
        if path == "/metrics":
            return metrics_answer(await self._render())
        return text_answer("not found: there are /healthz, /livez, /readyz and /metrics\n", 404)

    def _readyz(self, verbose: bool) -> Answer:
        """Answer /readyz.

        verbose  True: show all checks; False: show "ok" if the node is ready, else show the failed
                 checks
        """
        checks = judge(self._report)
        ready = is_ready(checks)
        if ready and not verbose:
            return text_answer("ok\n")
        shown = checks if verbose else [one for one in checks if one.state is State.FAILED]
        verdict = "readyz check passed" if ready else "readyz check failed"
        return text_answer("\n".join([*map(str, shown), verdict, ""]), 200 if ready else 503)

    def _one_check(self, name: str) -> Answer:
        """Answer /readyz/NAME.

        The status is 503 also if the check is degraded, because the client asks only for this
        check.
        """
        found: list[Check] = [check for check in judge(self._report) if check.name == name]
        if not found:
            return text_answer(f"no such check: there are {', '.join(CHECKS)}\n", 404)
        return text_answer(f"{found[0]}\n", 200 if found[0].state is State.OK else 503)
