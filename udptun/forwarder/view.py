"""Build the control API's answers about a forwarder: status, peers, counters, drops, traces.

Owns the format of these answers (docs/control.md). Has no changing state. Threading: control loop
only. A long answer is built in pieces.
"""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import json
import logging
import os
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Any

from .. import _core
from .._version import __version__
from ..build import build_id
from ..device.offload import Capabilities
from ..model import Endpoint, IPAddress, dscp_text
from ..takeover.document import CountersDocument
from ..text import counted
from . import dropped, peer_errors
from .config import ForwarderConfig
from .express import Express
from .path_mtus import PathMtus
from .probes import Probes
from .routes import PeerRoutes, Routes
from .workers import Workers

log = logging.getLogger(__name__)

PEERS_SLICE = 64  # peers formatted at a time
LAST_N = 16  # dropped packets shown for each reason and direction


@dataclass
class View:
    """Builds the answers.

    tun_name, mtu  name and MTU of the device; the configuration can differ
    former         the counters of the forwarder from which this one has taken over
    """

    config: ForwarderConfig
    tun_name: str
    mtu: int
    capabilities: Capabilities
    core: _core.Core
    routes: Routes
    workers: Workers
    probes: Probes
    path_mtus: PathMtus
    express: Express
    former: CountersDocument | None
    build: str = field(default_factory=build_id)
    started: float = field(default_factory=time.monotonic)
    started_at: float = field(default_factory=time.time)
    clock: dropped.Clock = field(default_factory=dropped.Clock)

    async def status_chunks(self, with_peers: bool) -> AsyncGenerator[bytes, None]:
        """Yield the status as JSON text, in pieces. If not ``with_peers``, its ``peers`` is []."""
        self.express.read()
        peers: list[PeerRoutes] = []
        generation, route_count = self.routes.generation, len(self.routes)
        if with_peers:
            generation, route_count, peers = await self.routes.peers(self.core)
        head = {
            "version": __version__,
            "build": self.build,
            "pid": os.getpid(),
            "uptime_seconds": round(time.monotonic() - self.started, 3),
            "generation": generation,
            "route_count": route_count,
            "source_check": self.config.source_check,
            "admit": self.config.admit,
            "mark": None if self.config.mark is None else str(self.config.mark),
            "dscp": dscp_text(self.config.dscp),
            "accelerate": self.express.report(),
            "device": {
                "name": self.tun_name,
                "mtu": self.mtu,
                "addresses": [str(address) for address in self.config.addresses],
                "networks": [str(network) for network in self.config.networks],
                "subnets": [str(subnet) for subnet in self.config.subnets],
                "listen": [str(endpoint) for endpoint in self.config.listen],
            },
            "capabilities": self.capabilities.to_json(),
            "workers": self.workers.status(),
            "packets": self.core.packets(),
        }
        yield json.dumps(head)[:-1].encode() + b', "peers": '
        async for piece in self._peers_json(peers):
            yield piece
        yield b"}"

    async def peer_chunks(self) -> AsyncGenerator[bytes, None]:
        """Yield the peers as JSON text, in pieces."""
        self.express.read()
        _, _, peers = await self.routes.peers(self.core)
        yield b'{"peers": '
        async for piece in self._peers_json(peers):
            yield piece
        yield b"}"

    async def _peers_json(self, peers: list[PeerRoutes]) -> AsyncGenerator[bytes, None]:
        yield b"["
        for start in range(0, len(peers), PEERS_SLICE):
            answers = map(self._peer_json, peers[start : start + PEERS_SLICE])
            # One piece per slice: each piece is a system call, and wakes the reader.
            yield (b"," if start else b"") + ",".join(map(json.dumps, answers)).encode()
            await asyncio.sleep(0)
        yield b"]"

    def _peer_json(self, row: PeerRoutes) -> dict[str, Any]:
        key = row.peer.address, row.peer.port
        answer = _peer_json(row) | self.path_mtus.report(*key)
        answer["probe"] = self.probes.report(*key, row.peer.last_error)
        answer["express"] = self.express.report_peer(key)
        return answer

    def drops(self) -> list[dict[str, Any]]:
        """Return the count of each drop reason, for each direction in which the reason can occur.

        Counts of zero are included. Each row has the last dropped packets. The rows of
        ``unknown_peer`` and ``source_port`` also have the last few senders.
        """
        self.express.read()
        last = self.core.last_dropped()
        rows = self._drop_counts()
        for row in rows:
            packets = last.get((row["reason"], row["direction"]), [])
            row["last"] = [dropped.to_json(one, self.clock) for one in packets[-LAST_N:]]
            if row["reason"] in ("unknown_peer", "source_port"):
                row["sources"] = self._refused_senders(row["reason"])
        return rows

    def _drop_counts(self) -> list[dict[str, Any]]:
        return [
            {"reason": reason, "direction": direction, "packets": packets}
            for reason, direction, packets in self.core.drops()
        ]

    def _refused_senders(self, reason: str) -> list[dict[str, Any]]:
        """Return the last few senders whose last packet was dropped for this reason."""
        now = time.monotonic_ns()
        return [
            {
                "address": str(ipaddress.ip_address(sender.address)), "port": sender.port,
                "packets": sender.packets,
                "last_seen_seconds": round(max(0, now - sender.last_ns) / 1e9, 3),
            }
            for sender in self.core.refused_senders() if sender.reason == reason
        ]

    def counters(self) -> dict[str, Any]:
        """Return the counters for /metrics, without the counters of each peer."""
        workers = self.workers.counters()
        self.express.read()
        express = self.express.counters()
        figures = self.probes.figures().values()
        return {
            "build": self.build,
            "started": self.started_at,
            "takeovers_n": self.takeovers_n,
            "packets": self.core.packets(),
            "transferred": self.core.transferred(),
            "drops": self._drop_counts(),
            "peers_n": self.core.peers_n(),
            "routes_n": len(self.routes),
            "generation": self.routes.generation,
            "probes": self.probes.counters() | {
                "round_trips": [trip for trip, _ in figures],
                "losses": [loss for _, loss in figures],
            },
            "icmp": {
                "sent": sum(worker["icmp_sent"] for worker in workers),
                "suppressed": sum(worker["icmp_suppressed"] for worker in workers),
            },
            "ecn": {
                "marked": express["marked"] + sum(worker["ecn_marked"] for worker in workers),
                "unexpected": sum(worker["ecn_unexpected"] for worker in workers),
            },
            "express": express,
            "peer_errors": self.core.peer_errors(),
            "send_errors": self.send_errors(),
            "workers": workers,
            "syscalls": {
                name: sum(worker["syscalls"][name] for worker in workers)
                for name in workers[0]["syscalls"]
            },
        }

    @property
    def takeovers_n(self) -> int:
        """How often a forwarder has taken over since one started without a take-over."""
        return 0 if self.former is None else self.former.takeovers_n + 1

    def send_errors(self) -> dict[str, int]:
        """Return the number of datagrams that the kernel refused, by the name of the errno."""
        total = {} if self.former is None else dict(self.former.send_errors)
        for number, count in self.core.send_errors().items():
            name = errno.errorcode.get(number, "other")
            total[name] = total.get(name, 0) + count
        return total

    def peer_counters(self) -> dict[str, dict[str, Any]]:
        """Return, by endpoint: sent packets and bytes, received packets and bytes, the round trip
        in seconds and the loss of its probes. None: not measured."""
        figures, found = self.probes.figures(), {}
        for peer in self.core.peers():
            trip, loss = figures.get((peer.address, peer.port), (None, None))
            endpoint = Endpoint(ipaddress.ip_address(peer.address), peer.port)
            found[str(endpoint)] = {
                "transferred": (peer.encap_packets, peer.encap_bytes,
                                peer.decap_packets, peer.decap_bytes),
                "round_trip": trip, "loss": loss,
            }
        return found

    def trace(self, address: IPAddress) -> dict[str, Any]:
        """Return the verdict on a packet to this address, and the packet's route, peer and MTU."""
        found = self.core.trace(address.packed)
        if found is None:
            return {
                "address": str(address), "verdict": "drop", "reason": "no_route",
                "route": None, "peer": None, "mtu": None,
            }
        route, limit = found
        return {
            "address": str(address), "verdict": "forward", "reason": None,
            "route": route.to_json(),
            "peer": str(Endpoint(route.via, route.port)),
            "mtu": min(limit, self.mtu),
        }

    def log_state(self) -> None:
        """Write the most important counters to the log."""
        self.express.read()
        log.info("%s: generation %d, %s, %s", self.tun_name, self.routes.generation,
                 counted(len(self.routes), "route"), counted(self.core.peers_n(), "peer"))
        for direction, counts in self.core.packets().items():
            log.info("%s: %s", direction, " ".join(f"{k}={v}" for k, v in counts.items()))
        for drop in self._drop_counts():
            if drop["packets"]:
                log.info("dropped %(packets)d: %(reason)s, %(direction)s", drop)


def _peer_json(routes: PeerRoutes) -> dict[str, Any]:
    peer = routes.peer
    endpoint = Endpoint(ipaddress.ip_address(peer.address), peer.port)
    return {
        "endpoint": str(endpoint),
        "subnets": routes.prefixes,
        "encap": {"packets": peer.encap_packets, "bytes": peer.encap_bytes},
        "decap": {"packets": peer.decap_packets, "bytes": peer.decap_bytes},
        "path_mtu": peer.path_mtu,
        "last_seen_seconds": None if peer.last_seen is None else round(peer.last_seen, 3),
        "errors": peer.errors_n,
        "last_error": peer_errors.to_json(peer.last_error, endpoint),
    }
