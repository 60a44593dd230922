"""The counters as Prometheus text, read at each scrape.

Owns the names and labels of the metrics, but counts nothing. A helper thread imports this module at
the first scrape, because the import of prometheus_client is slow. Rendering runs on the control
loop.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from .._version import __version__
from .families import quantile_gauge, transfer_counters
from .peer_series import PeerSeries

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from prometheus_client import Metric

    from .surface import Controlled

PACKET_STATES = ("read", "generated", "delivered", "consumed", "dropped")


class CounterCollector(Collector):
    """peers_n: how many peers get metrics of their own."""

    def __init__(self, forwarder: Controlled, peers_n: int = 0) -> None:
        self._forwarder = forwarder
        self._series = PeerSeries(peers_n) if peers_n else None

    def collect(self) -> Iterator[Metric]:
        counters = self._forwarder.counters()
        yield InfoMetricFamily("udptun_build", "The running version, and the build of its files.",
                               {"version": __version__, "build": counters["build"]})
        yield GaugeMetricFamily("udptun_start_time_seconds",
                                "When the process started, in Unix time.", counters["started"])
        yield CounterMetricFamily(
            "udptun_takeovers", "Take-overs since a forwarder was last started in the usual way.",
            counters["takeovers_n"])

        yield from self._traffic(counters)
        yield from self._failures(counters)
        yield from self._workers(counters)
        yield from self._express(counters["express"])
        yield from self._probes(counters["probes"])
        if self._series is not None:
            yield from self._of_peers(self._series)
        yield GaugeMetricFamily("udptun_peers", "Peers with a route.", counters["peers_n"])
        yield GaugeMetricFamily("udptun_routes", "Routes in the table.", counters["routes_n"])
        yield GaugeMetricFamily(
            "udptun_route_generation", "Increases by one with each change of the route table.",
            counters["generation"],
        )

    def _traffic(self, counters: Mapping[str, Any]) -> Iterator[Metric]:
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

        size = CounterMetricFamily(
            "udptun_bytes", "UDP payload of the packets that were sent to peers (encap) or came "
            "from them (decap).", labels=("direction",)
        )
        for direction, sums in counters["transferred"].items():
            size.add_metric((direction,), sums["bytes"])
        yield size

    def _failures(self, counters: Mapping[str, Any]) -> Iterator[Metric]:
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

        ecn = CounterMetricFamily(
            "udptun_ecn",
            "Received packets that got the congestion mark of their datagram (marked), or whose "
            "ECN field does not fit the ECN field of their datagram (unexpected).",
            labels=("state",),
        )
        for state, count in counters["ecn"].items():
            ecn.add_metric((state,), count)
        yield ecn

        errors = CounterMetricFamily(
            "udptun_peer_errors",
            "Errors about datagrams to peers: ICMP errors, and sends that the kernel refused.",
            labels=("reason",),
        )
        for reason, count in counters["peer_errors"].items():
            errors.add_metric((reason,), count)
        yield errors

        refused = CounterMetricFamily(
            "udptun_send_errors", "Datagrams to peers that the kernel refused, by the errno.",
            labels=("errno",),
        )
        for name, count in counters["send_errors"].items():
            refused.add_metric((name,), count)
        yield refused

    def _workers(self, counters: Mapping[str, Any]) -> Iterator[Metric]:
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
        cpu = CounterMetricFamily(
            "udptun_worker_cpu_seconds", "CPU time of each worker.", labels=("worker",)
        )
        for worker in counters["workers"]:
            cpu.add_metric((str(worker["index"]),), worker["cpu_seconds"])
            turns.add_metric((str(worker["index"]),), worker["turns"])
            returns.add_metric((str(worker["index"]),), worker["loop_returns"])
            own_sockets.add_metric((str(worker["index"]),), worker["own_sockets"])
        yield turns
        yield returns
        yield own_sockets
        yield cpu

    def _express(self, counters: Mapping[str, Any]) -> Iterator[Metric]:
        yield GaugeMetricFamily(
            "udptun_express_active", "1 if packets may pass in the kernel, to or from any peer.",
            counters["active"])
        yield GaugeMetricFamily(
            "udptun_express_receives", "1 if the kernel has the programs for received packets.",
            counters["receives"])
        yield GaugeMetricFamily(
            "udptun_express_peers", "Peers to and from which packets may pass in the kernel.",
            counters["peers_n"])
        packets = CounterMetricFamily(
            "udptun_express_packets", "Inner packets that passed in the kernel, or were dropped "
            "there. udptun_packets_total contains them.", labels=("direction", "state"))
        left = CounterMetricFamily(
            "udptun_express_left", "Inner packets that the programs in the kernel left to the "
            "workers.", labels=("direction", "reason"))
        for direction, states in counters["packets"].items():
            for state, count in states.items():
                packets.add_metric((direction, state), count)
            for reason, count in counters["left"][direction].items():
                left.add_metric((direction, reason), count)
        yield packets
        yield left

    def _probes(self, counters: Mapping[str, Any]) -> Iterator[Metric]:
        probed = GaugeMetricFamily(
            "udptun_probed_peers", "Peers that are probed, by the state of the path.",
            labels=("state",),
        )
        for state, count in counters["states"].items():
            probed.add_metric((state,), count)
        yield probed
        probes = CounterMetricFamily(
            "udptun_probes", "Requests sent, requests that the kernel refused to send, answers, "
            "and requests received.", labels=("state",),
        )
        for state, count in counters["probes"].items():
            probes.add_metric((state,), count)
        yield probes
        yield quantile_gauge(
            "udptun_round_trip_seconds", "Round trips of probes to peers: quantiles over the "
            "peers.", (), [((), counters["round_trips"])])
        yield quantile_gauge(
            "udptun_probe_loss_ratio", "Share of the last 32 probes that was not answered: "
            "quantiles over the peers.", (), [((), counters["losses"])])

    def _of_peers(self, series: PeerSeries) -> Iterator[Metric]:
        peers = self._forwarder.peer_counters()
        yield from transfer_counters("udptun", {}, series.update(
            {peer: of_peer["transferred"] for peer, of_peer in peers.items()}))
        trips = GaugeMetricFamily("udptun_peer_round_trip_seconds",
                                  "Round trip of probes to the peer.", labels=("peer",))
        losses = GaugeMetricFamily(
            "udptun_peer_probe_loss_ratio", "Share of the last 32 probes to the peer that was not "
            "answered.", labels=("peer",))
        for peer in sorted(series.shown):
            for family, name in ((trips, "round_trip"), (losses, "loss")):
                if (value := peers[peer][name]) is not None:
                    family.add_metric((peer,), value)
        yield trips
        yield losses


class Metrics:
    def __init__(self, forwarder: Controlled, peers_n: int = 0) -> None:
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(CounterCollector(forwarder, peers_n))

    def render(self, accept: str) -> tuple[bytes, str]:
        """Return the text and its content type. ``accept`` selects the format."""
        encode, content_type = choose_encoder(accept)
        return encode(self._registry), content_type
