"""Decide the path MTU of each peer (RFC 8899).

A report about a path MTU is an ICMP error, which can be forged. If the peer answers probes, the
report is a hint: ``probes`` then tests the present size, and only the answers count. If the peer
answers no probes, the reported path MTU is used for REPORT_SECONDS, but not below FLOOR: datagrams
that can exceed a smaller reported path MTU are sent without DF, so that routers can fragment them.

Owns the reported path MTUs of peers without probes, and the events about path MTUs. Does not depend
on how a report arrives (the compiled core) or how a size is tested (``udptun/probe``). Threading:
control loop only. Only ``update`` looks at all peers, which takes half a millisecond for 5,000.
"""

from __future__ import annotations

import ipaddress
import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from .. import _core
from ..control.events import EventHub
from ..model import MIN_MTU, MIN_MTU6, OVERHEAD, Endpoint, Peer
from .probes import LINK_MTU, Key, Probes

log = logging.getLogger(__name__)

REPORT_SECONDS = 60.0
FLOOR = MIN_MTU6  # all common links carry this
UNKNOWN_MTU = {4: 576, 6: MIN_MTU6}  # if the router reports none (RFC 1191 5, RFC 8201)


@dataclass(frozen=True, slots=True)
class Reported:
    """A reported path MTU that is in use, of a peer that answers no probes.

    source  "icmp" or "device"
    until   monotonic time until which it is used
    """

    source: str
    until: float


class PathMtus:
    """The path MTUs of one forwarder.

    trust_icmp6  called with whether the IPv6 socket should accept path MTUs from ICMPv6 errors
    """

    def __init__(
        self, core: _core.Core, probes: Probes, events: EventHub,
        trust_icmp6: Callable[[bool], None],
    ) -> None:
        self._core = core
        self._probes = probes
        self._events = events
        self._trust_icmp6 = trust_icmp6
        self._trusts_icmp6: bool | None = None
        self._reported: dict[Key, Reported] = {}

    def inherit(self, peers: Iterable[Peer]) -> None:
        """Use the path MTUs that were reported to an earlier process for REPORT_SECONDS more."""
        self._core.inherit_path_mtus(peers)
        until = time.monotonic() + REPORT_SECONDS
        for peer in peers:
            self._reported[peer.address, peer.port] = Reported("icmp", until)

    def update(self) -> None:
        """Apply new reports, discard old ones, and emit events about changes.

        Called once a second, and when a worker has a report.
        """
        now = time.monotonic()
        self._choose_icmp6()
        for address, port, device, mtu in self._core.take_mtu_hints():
            self._take((address, port), device, mtu, now)
        for key in [key for key, reported in self._reported.items() if now >= reported.until]:
            del self._reported[key]
            if not self._probes.answers(key):
                self._core.set_path_mtu(*key, LINK_MTU, 0)
        for address, port, path_mtu in self._core.path_mtu_changes():
            endpoint = str(Endpoint(ipaddress.ip_address(address), port))
            log.info("path MTU to %s is %d", endpoint, path_mtu)
            self._events.emit("peer_mtu", endpoint=endpoint, path_mtu=path_mtu)

    def _choose_icmp6(self) -> None:
        """Let the IPv6 socket accept ICMPv6 errors only while they are needed.

        An accepted error also changes the path MTU that the kernel stores for all programs. Over
        IPv4, the core receives the errors without this effect (src_ext/path/own_socket.pxd).
        """
        trust = self._core.needs_icmp6()
        if trust != self._trusts_icmp6:
            self._trusts_icmp6 = trust
            self._trust_icmp6(trust)

    def sockets_changed(self) -> None:
        """Other sockets receive now. They have the initial setting."""
        self._trusts_icmp6 = None

    def report(self, address: bytes, port: int) -> dict[str, Any]:
        """Return where the path MTU of a peer comes from. docs/control.md describes the fields."""
        reported = self._reported.get((address, port))
        if self._probes.answers((address, port)) and self._probes.has_measured((address, port)):
            return {"path_mtu_source": "probe", "path_mtu_seconds": None}
        if reported is None:
            return {"path_mtu_source": "device", "path_mtu_seconds": None}
        seconds = max(round(reported.until - time.monotonic(), 1), 0.0)
        return {"path_mtu_source": reported.source, "path_mtu_seconds": seconds}

    def _take(self, key: Key, device: bool, mtu: int, now: float) -> None:
        version = 4 if len(key[0]) == 4 else 6
        mtu = max(mtu or UNKNOWN_MTU[version], MIN_MTU + OVERHEAD[version])
        if self._probes.answers(key):
            self._probes.hint(key, mtu - OVERHEAD[version])
            return
        self._reported[key] = Reported("device" if device else "icmp", now + REPORT_SECONDS)
        if not device:  # the worker has already applied what the device reports
            self._core.set_path_mtu(*key, max(mtu, FLOOR), mtu)
