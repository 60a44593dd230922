"""One scrape of a node: the daemon's metrics, then the forwarder's.

Owns the order, and what is asked before the text is made: the kernel's counters, the measurements,
and the forwarder, each at every scrape. If the forwarder does not answer, its metrics are left out;
the daemon's metrics report that. Runs on the daemon's loop; the forwarder is asked in a thread.
"""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...control.client import ControlClient
from ...control.peer_series import Counters
from ...errors import UdptunError
from .report import NodeReport

if TYPE_CHECKING:
    from .metrics import Metrics

log = logging.getLogger(__name__)

FORWARDER_SECONDS = 2.0  # limit for the forwarder's metrics; after this, a scrape omits them


class NodeScrape:
    """control: the forwarder's socket. peers_n: how many peers get metrics of their own."""

    def __init__(self, report: NodeReport, control: Path, peers_n: int = 0) -> None:
        self._report, self._control, self._peers_n = report, control, peers_n
        self._metrics: Metrics | None = None

    async def render(self) -> bytes:
        """Return the metrics as Prometheus's text, format 0.0.4."""
        if self._metrics is None:
            loaded = await asyncio.to_thread(_load_metrics)
            self._metrics = self._metrics or loaded(self._report, self._peers_n)
        text, peers = await asyncio.to_thread(self._ask_forwarder)
        return self._metrics.render(
            await self._report.count_devices(), await self._report.measurements(), peers
        ) + text.encode()

    def _ask_forwarder(self) -> tuple[str, dict[str, Counters]]:
        """Return the forwarder's metrics, and what it has counted for each of its peers' subnets:
        the whole count of a peer under its first subnet."""
        peers: dict[str, Counters] = {}
        try:
            with ControlClient(str(self._control), FORWARDER_SECONDS) as client:
                if self._peers_n:
                    client.peers(lambda value: _keep(value, peers))
                return client.metrics(), peers
        except UdptunError as exc:
            log.debug("the forwarder's metrics are left out: %s", exc)
            return "", {}


def _keep(value: dict[str, Any], peers: dict[str, Counters]) -> Any:
    """Keep little of each object: the whole answer would take much memory."""
    if "encap" in value and value["subnets"]:
        encap, decap = value["encap"], value["decap"]
        peers[value["subnets"][0]] = (
            encap["packets"], encap["bytes"], decap["packets"], decap["bytes"])
        return None
    return value


def _load_metrics() -> type[Metrics]:
    from .metrics import Metrics

    return Metrics
