"""The daemon's report as Prometheus text, read at scrape: nothing is counted here.

Owns the names and labels of the daemon's metrics: all begin with ``udptun_node_``, so that the
forwarder's own can follow in the same answer. No label grows with the cluster. Imported at the
first scrape, since prometheus_client is megabytes. Rendering runs on the daemon's loop.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector

from ..._version import __version__
from .readiness import State, is_ready, judge

if TYPE_CHECKING:
    from .report import NodeReport


def _gauge(name: str, text: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"udptun_node_{name}", text, value)


def _counter(name: str, text: str, value: float) -> CounterMetricFamily:
    return CounterMetricFamily(f"udptun_node_{name}", text, value)


class ReportCollector(Collector):
    def __init__(self, report: NodeReport) -> None:
        self._report = report

    def collect(self) -> Iterator[Metric]:
        report = self._report
        yield InfoMetricFamily(
            "udptun_node_build", "The running version and the store of leases it uses.",
            {"version": __version__, "store": report.store},
        )
        yield _gauge("start_time_seconds", "When the daemon started, in Unix time.",
                     report.started)
        yield from self._readiness()
        yield from self._leases()
        yield from self._routes()

    def _readiness(self) -> Iterator[Metric]:
        checks = judge(self._report)
        yield _gauge("ready", "1 if /readyz says so.", is_ready(checks))
        ok = GaugeMetricFamily(
            "udptun_node_check_ok", "1 if this check of /readyz finds nothing to complain of.",
            labels=("check",),
        )
        for check in checks:
            ok.add_metric((check.name,), check.state is State.OK)
        yield ok

    def _leases(self) -> Iterator[Metric]:
        report, source = self._report, self._report.source
        yield _gauge("store_up", "1 if the store answers and its watch is in order.",
                     source.connected)
        if source.last_contact is not None:
            yield _gauge("store_silence_seconds", "Since the store last gave a sign of life.",
                         time.monotonic() - source.last_contact)
        yield _counter("store_errors", "Failed exchanges with the store.", source.errors_n)
        yield _counter("store_relists", "Times all leases were listed again, as the watch broke.",
                       source.relists_n)
        yield _gauge("leases", "Leases known, our own included.", report.leases_n)
        yield _gauge("leases_skipped", "Entries in the store that cannot be used.",
                     len(source.skipped))
        yield _gauge("leases_stale", "1 if the leases in force are those kept on disk.",
                     report.stale)
        yield _gauge("lease_held", "1 if our own lease is ours.", source.lease == "held")
        if source.lease_expires is not None:
            yield _gauge("lease_expiry_time_seconds", "When our lease runs out, in Unix time, if "
                         "it is not renewed.", source.lease_expires)

    def _routes(self) -> Iterator[Metric]:
        report, forwarder, peers = self._report, self._report.forwarder, self._report.peers
        yield _gauge("watch_lag_seconds", "From the store's word of the last change to its being "
                     "in force.", report.lag)
        if report.applied is not None:
            yield _gauge("applied_age_seconds", "Since leases were last put in force.",
                         time.monotonic() - report.applied)
        changes = CounterMetricFamily(
            "udptun_node_route_changes", "Routes added, changed or removed.", labels=("path",)
        )
        for path, count in report.route_changes_n.items():
            changes.add_metric((path,), count)
        yield changes
        reached = GaugeMetricFamily(
            "udptun_node_peers", "Other nodes, by the path chosen.", labels=("path",)
        )
        for path, count in (
            ("udp", peers.udp_n), ("vxlan", peers.vxlan_n), ("none", len(peers.unreachable)),
        ):
            reached.add_metric((path,), count)
        yield reached
        yield _gauge("peers_refused", "Other nodes that the kernel or the forwarder would not "
                     "take.", len(peers.refused))
        yield _gauge("mtu_bytes", "MTU of the inner packets.", report.mtu)
        yield _gauge("forwarder_up", "1 if the forwarder answers and is what it should be.",
                     forwarder.connected)
        yield _gauge("forwarder_in_step", "1 if its routes are those of the leases.",
                     forwarder.in_step)
        yield _gauge("forwarder_routes", "Routes the daemon has given it.", forwarder.routes_n)
        yield _counter("forwarder_starts", "Forwarders that the daemon has started.",
                       forwarder.starts_n)
        yield _counter("forwarder_table_replaces", "Times its whole table was put.",
                       forwarder.replaces_n)


class Metrics:
    """The daemon's part of /metrics, in Prometheus's text format 0.0.4, as the forwarder's is."""

    def __init__(self, report: NodeReport) -> None:
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(ReportCollector(report))

    def render(self) -> bytes:
        return generate_latest(self._registry)
