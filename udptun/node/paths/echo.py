"""Measure peers that answer no probes, such as stock flannel nodes, by ICMP echoes.

An echo request goes to the base address of the peer's subnet, which flannel and udptun assign to
the peer's overlay device. It takes the route that data packets take. So it measures the only path
of such a peer, but not two paths one by one. One raw socket per IP version. Runs on the daemon's
loop.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from typing import Any

from ...model import OVERHEAD, IPNetwork
from ...net.icmp import Echoes, open_raw
from ...probe.prober import Request
from .meter import Meter


class EchoMeter(Meter):
    """Echoes to peers of one IP version."""

    follows_route = True

    def __init__(self, version: int, changed: Callable[[list[IPNetwork]], None]) -> None:
        super().__init__(changed)
        self._version = version
        self._echoes = Echoes(version)

    def add(self, subnet: IPNetwork, mtu: int, data_proves: bool = True) -> None:
        """Send echoes to the peer of this subnet. mtu: of the inner packets.

        data_proves  packets from the peer count too, because the peer may drop ICMP
        """
        self._probe(subnet, mtu - OVERHEAD[self._version], data_proves=data_proves)

    # -- the socket -------------------------------------------------------------------------------

    def _opening(self) -> str:
        return "opening a raw socket for echoes"

    def _open(self) -> socket.socket:
        return open_raw(self._version, self._echoes.identifier)

    def _message(self, request: Request[str]) -> tuple[bytes, Any]:
        return self._echoes.request(request.token, request.size), (request.key, 0)

    def _received(self, message: bytes, source: Any) -> None:
        if source[0] in self.prober and (reply := self._echoes.reply(message)) is not None:
            self.prober.answered(source[0], *reply, time.monotonic())
