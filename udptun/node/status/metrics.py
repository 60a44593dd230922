"""The daemon's report as Prometheus text. Each scrape reads the report; this module counts nothing.

Owns: the names and labels of the daemon's metrics. All names begin with ``udptun_node_``, so that
the forwarder's metrics can follow in the same response without a conflict of names. Without
--metrics-peers, no label has one value per peer. The module is imported at the first scrape,
because prometheus_client needs megabytes of memory. Rendering runs on the daemon's loop.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector

from ..._version import __version__
from ...build import build_id
from ...control.families import quantile_gauge, transfer_counters
from ...control.peer_series import Counters, PeerSeries
from ..backends import BACKENDS, FORWARDERS
from .readiness import State, is_ready, judge
from .report import STATES

if TYPE_CHECKING:
    from .report import DeviceCount, NodeReport, PathMeasurement


def _gauge(name: str, text: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"udptun_node_{name}", text, value)


def _counter(name: str, text: str, value: float) -> CounterMetricFamily:
    return CounterMetricFamily(f"udptun_node_{name}", text, value)


class ReportCollector(Collector):
    """The metrics of one daemon.

    peers_n  how many peers get metrics of their own
    devices, measured, transferred  the data that was read from the kernel and the forwarder for
                                    this scrape; ``transferred``: by subnet
    """

    def __init__(self, report: NodeReport, peers_n: int = 0) -> None:
        self._report = report
        self._series = PeerSeries(peers_n) if peers_n else None
        self.devices: Sequence[DeviceCount] = ()
        self.measured: Sequence[PathMeasurement] = ()
        self.transferred: Mapping[str, Counters] = {}

    def collect(self) -> Iterator[Metric]:
        report = self._report
        yield InfoMetricFamily(
            "udptun_node_build", "The running version and the store of leases it uses.",
            {"version": __version__, "build": build_id(), "store": report.store},
        )
        yield _gauge("start_time_seconds", "When the daemon started, in Unix time.",
                     report.started)
        yield from self._readiness()
        yield from self._leases()
        yield from self._routes()
        yield from self._traffic()
        yield from self._probes()
        if self._series is not None:
            yield from self._of_peers(self._series)

    def _readiness(self) -> Iterator[Metric]:
        checks = judge(self._report)
        yield _gauge("ready", "1 if /readyz answers 200.", is_ready(checks))
        ok = GaugeMetricFamily(
            "udptun_node_check_ok", "1 if this check of /readyz has neither failed nor degraded.",
            labels=("check",),
        )
        for check in checks:
            ok.add_metric((check.name,), check.state is State.OK)
        yield ok

    def _leases(self) -> Iterator[Metric]:
        report, source = self._report, self._report.source
        yield _gauge("store_up", "1 if the store answers and its watch works.",
                     source.connected)
        if source.last_contact is not None:
            yield _gauge("store_silence_seconds", "Seconds since the last answer of the store.",
                         time.monotonic() - source.last_contact)
        yield _counter("store_errors", "Failed requests to the store.", source.errors_n)
        yield _counter("store_relists", "Times all leases were listed again because the "
                       "watch broke.", source.relists_n)
        yield _gauge("leases", "Leases known, our own included.", report.leases_n)
        yield _gauge("leases_skipped", "Entries in the store that cannot be used.",
                     len(source.skipped))
        yield _gauge("leases_stale", "1 if the active leases are cached ones.",
                     report.stale)
        yield _gauge("lease_held", "1 if this node holds its own lease.", source.lease == "held")
        if source.lease_renewed is not None:
            yield _gauge("lease_renewal_time_seconds", "When our lease was last acquired "
                         "or renewed, in Unix time.", source.lease_renewed)
        if source.lease_expires is not None:
            yield _gauge("lease_expiry_time_seconds", "When our lease expires unless it is "
                         "renewed, in Unix time.", source.lease_expires)

    def _routes(self) -> Iterator[Metric]:
        report, forwarder, peers = self._report, self._report.forwarder, self._report.peers
        yield _gauge("watch_lag_seconds", "Seconds from the last change in the store until the "
                     "paths that follow from it were active.", report.lag)
        if report.applied is not None:
            yield _gauge("applied_age_seconds", "Seconds since paths were last applied.",
                         time.monotonic() - report.applied)
        changes = CounterMetricFamily(
            "udptun_node_route_changes", "Routes added, changed or removed.", labels=("path",)
        )
        for path, count in report.route_changes_n.items():
            changes.add_metric((path,), count)
        yield changes
        reached = GaugeMetricFamily(
            "udptun_node_peers", "Other nodes, by the backend that carries their packets.",
            labels=("path",),
        )
        for path, count in (*peers.carried_n.items(), ("none", len(peers.unreachable))):
            reached.add_metric((path,), count)
        yield reached
        yield _gauge("peers_refused", "Other nodes whose path the kernel or the forwarder "
                     "refused.", len(peers.refused))
        states = GaugeMetricFamily(
            "udptun_node_paths", "Subnets of other nodes, by what was measured on the path that "
            "carries the packets.", labels=("state",))
        for state in STATES:
            states.add_metric((state,), len(report.in_state(state)))
        yield states
        moved = CounterMetricFamily(
            "udptun_node_path_changes", "Times a subnet was moved to this backend, because of what "
            "was measured.", labels=("path",))
        for path, count in report.path_changes_n.items():
            moved.add_metric((path,), count)
        yield moved
        yield _gauge("paths_moved", "Subnets that are not carried by the preferred backend.",
                     sum(bool(pair.why) for pair in report.pairs.values()))
        yield _gauge("mtu_bytes", "MTU of the inner packets.", report.mtu)
        yield _gauge("forwarder_up", "1 if the forwarder answers and has the right options.",
                     forwarder.connected)
        yield _gauge("forwarder_in_step", "1 if the forwarder's routes match the leases.",
                     forwarder.synced)
        yield _gauge("forwarder_routes", "Routes that the daemon has given to the forwarder.",
                     forwarder.routes_n)
        yield _counter("forwarder_starts", "Forwarders started by the daemon.",
                       forwarder.starts_n)
        yield _counter("forwarder_table_replaces", "Times the forwarder's whole table was "
                       "replaced.", forwarder.replaces_n)

    def _traffic(self) -> Iterator[Metric]:
        """The kernel's counters. The kernel does not count by peer on a VXLAN device."""
        for name, text, of in (
            ("bytes", "Bytes of inner packets through the devices of the overlay.", "bytes"),
            ("packets", "Inner packets through the devices of the overlay. The kernel counts a "
             "super-packet as one packet.", "packets"),
            ("errors", "Packets that a device could not send or receive.", "errors"),
            ("drops", "Packets that the kernel dropped at a device.", "dropped"),
        ):
            family = CounterMetricFamily(
                f"udptun_node_device_{name}", text, labels=("path", "device", "direction"))
            for count in self.devices:
                family.add_metric((count.path, count.device, count.direction), getattr(count, of))
            yield family

    def _probes(self) -> Iterator[Metric]:
        by_path = {path: [one for one in self.measured if one.path == path] for path in BACKENDS}
        states = GaugeMetricFamily(
            "udptun_node_measured_paths", "Paths to subnets of other nodes by measured state, also "
            "paths that carry no packets at present.", labels=("path", "state"))
        for path, measured in by_path.items():
            for state in STATES:
                states.add_metric((path, state), sum(one.state == state for one in measured))
        yield states
        yield quantile_gauge(
            "udptun_node_round_trip_seconds", "Round trips of probes: quantiles over the peers.",
            ["path"], (((path,), [one.round_trip for one in measured])
                       for path, measured in by_path.items()))
        yield quantile_gauge(
            "udptun_node_probe_loss_ratio", "Share of the last 32 probes that was not answered: "
            "quantiles over the peers.",
            ["path"], (((path,), [one.loss for one in measured])
                       for path, measured in by_path.items()))

    def _of_peers(self, series: PeerSeries) -> Iterator[Metric]:
        keys = {str(subnet): pair.key for subnet, pair in self._report.pairs.items()}
        nothing: Counters = (0, 0, 0, 0)
        sums: dict[str, Counters] = dict.fromkeys(keys.values(), nothing)
        for subnet, counts in self.transferred.items():
            if (key := keys.get(subnet)) is not None:
                a, b, c, d = (x + y for x, y in zip(sums[key], counts, strict=True))
                sums[key] = a, b, c, d
        yield from transfer_counters("udptun_node", {"path": FORWARDERS}, series.update(sums))
        reachable = GaugeMetricFamily(
            "udptun_node_peer_reachable", "1 if the path that carries the packets to the peer "
            "works, 0 if not; no sample if it is not known.", labels=("peer",))
        known: dict[str, bool] = {}
        for pair in self._report.pairs.values():
            if pair.key in series.shown and pair.state != "unknown":
                known[pair.key] = known.get(pair.key, True) and pair.state != "unreachable"
        for key in sorted(known):
            reachable.add_metric((key,), known[key])
        yield reachable
        trips = GaugeMetricFamily("udptun_node_peer_round_trip_seconds",
                                  "Round trip of probes to the peer.", labels=("peer", "path"))
        losses = GaugeMetricFamily(
            "udptun_node_peer_probe_loss_ratio", "Share of the last 32 probes to the peer that was "
            "not answered.", labels=("peer", "path"))
        seen = set()  # a peer with two subnets: the first one
        for one in self.measured:
            labels = one.key, one.path
            if one.key not in series.shown or labels in seen:
                continue
            seen.add(labels)
            for family, value in ((trips, one.round_trip), (losses, one.loss)):
                if value is not None:
                    family.add_metric(labels, value)
        yield trips
        yield losses


class Metrics:
    """The daemon's part of /metrics.

    The format is Prometheus's text format 0.0.4, the same as that of the forwarder's part.
    """

    def __init__(self, report: NodeReport, peers_n: int = 0) -> None:
        self._collector = ReportCollector(report, peers_n)
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self._collector)

    def render(
        self, devices: Sequence[DeviceCount] = (), measured: Sequence[PathMeasurement] = (),
        transferred: Mapping[str, Counters] = MappingProxyType({}),
    ) -> bytes:
        """Return the text. The arguments are those of ``ReportCollector``."""
        collector = self._collector
        collector.devices, collector.measured = devices, measured
        collector.transferred = transferred
        return generate_latest(self._registry)
