"""The counters as Prometheus text, read at each scrape.

Owns the names and labels of the metrics, but counts nothing. A helper thread imports this module at
the first scrape, because the import of prometheus_client is slow. Rendering runs on the control
loop.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from .._version import __version__

if TYPE_CHECKING:
    from collections.abc import Iterator

    from prometheus_client import Metric

    from .surface import Controlled

PACKET_STATES = ("read", "generated", "delivered", "consumed", "dropped")


class CounterCollector(Collector):
    def __init__(self, forwarder: Controlled) -> None:
        self._forwarder = forwarder

    def collect(self) -> Iterator[Metric]:
        counters = self._forwarder.counters()
        yield InfoMetricFamily("udptun_build", "The running version.", {"version": __version__})

        packets = CounterMetricFamily(
            "udptun_packets",
            "Inner IP packets and probes: "
            "read + generated = delivered + consumed + dropped + queued.",
            labels=("direction", "state"),
        )
        queued = GaugeMetricFamily(
            "udptun_queued_packets", "Inner IP packets in the send queue.", labels=("direction",)
        )
        for direction, side in counters["packets"].items():
            for state in PACKET_STATES:
                packets.add_metric((direction, state), side[state])
            queued.add_metric((direction,), side["queued"])
        yield packets
        yield queued

        drops = CounterMetricFamily(
            "udptun_drops", "Dropped inner IP packets by reason.", labels=("direction", "reason")
        )
        for drop in counters["drops"]:
            drops.add_metric((drop["direction"], drop["reason"]), drop["packets"])
        yield drops

        icmp = CounterMetricFamily(
            "udptun_icmp", "ICMP errors to inner senders, sent and suppressed.", labels=("state",)
        )
        for state, count in counters["icmp"].items():
            icmp.add_metric((state,), count)
        yield icmp

        errors = CounterMetricFamily(
            "udptun_peer_errors",
            "Errors about datagrams to peers: ICMP errors, and sends that the kernel refused.",
            labels=("reason",),
        )
        for reason, count in counters["peer_errors"].items():
            errors.add_metric((reason,), count)
        yield errors

        syscalls = CounterMetricFamily(
            "udptun_syscalls", "System calls on the data path.", labels=("call",)
        )
        for call, count in counters["syscalls"].items():
            syscalls.add_metric((call,), count)
        yield syscalls

        turns = CounterMetricFamily(
            "udptun_worker_turns", "Turns of each worker: one bounded batch in each direction.",
            labels=("worker",),
        )
        returns = CounterMetricFamily(
            "udptun_worker_loop_returns", "Returns of each worker to its event loop.",
            labels=("worker",),
        )
        own_sockets = GaugeMetricFamily(
            "udptun_worker_own_sockets",
            "Slow or dead peers that have a socket of their own, for each worker.",
            labels=("worker",),
        )
        for worker in counters["workers"]:
            turns.add_metric((str(worker["index"]),), worker["turns"])
            returns.add_metric((str(worker["index"]),), worker["loop_returns"])
            own_sockets.add_metric((str(worker["index"]),), worker["own_sockets"])
        yield turns
        yield returns
        yield own_sockets

        probed = GaugeMetricFamily(
            "udptun_probed_peers", "Peers that are probed, by the state of the path.",
            labels=("state",),
        )
        for state, count in counters["probes"]["states"].items():
            probed.add_metric((state,), count)
        yield probed
        probes = CounterMetricFamily(
            "udptun_probes", "Requests sent, requests that the kernel refused to send, answers, "
            "and requests received.", labels=("state",),
        )
        for state, count in counters["probes"]["probes"].items():
            probes.add_metric((state,), count)
        yield probes

        yield GaugeMetricFamily("udptun_peers", "Peers with a route.", counters["peers_n"])
        yield GaugeMetricFamily("udptun_routes", "Routes in the table.", counters["routes_n"])
        yield GaugeMetricFamily(
            "udptun_route_generation", "Increases by one with each change of the route table.",
            counters["generation"],
        )


class Metrics:
    def __init__(self, forwarder: Controlled) -> None:
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(CounterCollector(forwarder))

    def render(self, accept: str) -> tuple[bytes, str]:
        """Return the text and its content type. ``accept`` selects the format."""
        encode, content_type = choose_encoder(accept)
        return encode(self._registry), content_type
