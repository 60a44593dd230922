"""The daemon's metrics have the values of the report, and every metric is documented."""

import re
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from tests.node.node_reports import (
    DEVICES,
    MEASURED,
    TRANSFERRED,
    ready,
    starting,
    with_peers,
)
from udptun._version import __version__
from udptun.build import build_id
from udptun.node.status.metrics import Metrics
from udptun.node.status.readiness import CHECKS
from udptun.node.status.report import NodeReport

PAGE = Path(__file__).resolve().parents[3] / "docs" / "node.md"


def samples(report: NodeReport) -> dict[str, float]:
    """Return the samples by name and labels. The common prefix of the names is removed."""
    return parsed(Metrics(report).render())


def parsed(text: bytes) -> dict[str, float]:
    found = {}
    for family in text_string_to_metric_families(text.decode()):
        assert family.documentation.endswith(".")
        for sample in family.samples:
            labels = ",".join(value for _, value in sorted(sample.labels.items()))
            name = sample.name.removeprefix("udptun_node_")
            assert name != sample.name
            found[f"{name}{{{labels}}}" if labels else name] = sample.value
    return found


def test_the_values_are_those_of_the_report() -> None:
    have = samples(ready())
    for name, value in {
        f"build_info{{{build_id()},etcd,{__version__}}}": 1, "ready": 1, "check_ok{store}": 1,
        "store_up": 1, "store_errors_total": 4, "store_relists_total": 2, "leases": 8,
        "leases_skipped": 0, "leases_stale": 0, "lease_held": 1, "watch_lag_seconds": 0.25,
        "route_changes_total{udp}": 9, "route_changes_total{vxlan}": 6, "peers{udp}": 2,
        "peers{vxlan}": 5, "peers{none}": 0, "peers_refused": 0, "mtu_bytes": 1450,
        "forwarder_up": 1, "forwarder_in_step": 1, "forwarder_routes": 7,
        "forwarder_starts_total": 1, "forwarder_table_replaces_total": 3,
    }.items():
        assert have[name] == value, name
    assert have["store_silence_seconds"] >= 3
    assert have["applied_age_seconds"] >= 1
    assert have["lease_expiry_time_seconds"] > have["start_time_seconds"]
    assert {f"check_ok{{{name}}}" for name in CHECKS} <= set(have)


def test_problems_change_the_metrics() -> None:
    report = ready()
    report.source.connected, report.source.lease, report.stale = False, "lost", True
    report.source.skipped = {"a": "b"}
    report.forwarder.connected = False
    report.peers.unreachable, report.peers.refused = {"c": "d", "e": "f"}, {"g": "h"}
    have = samples(report)
    for name, value in {
        "ready": 0, "check_ok{store}": 0, "check_ok{peers}": 0, "check_ok{firewall}": 1,
        "store_up": 0, "lease_held": 0, "leases_stale": 1, "leases_skipped": 1,
        "forwarder_up": 0, "peers{none}": 2, "peers_refused": 1,
    }.items():
        assert have[name] == value, name


def test_unknown_values_are_omitted() -> None:
    have = samples(starting())
    assert have["ready"] == 0
    assert not {"store_silence_seconds", "applied_age_seconds", "lease_expiry_time_seconds"} & set(
        have
    )


def test_no_label_grows_with_the_cluster() -> None:
    report, before = ready(), len(samples(ready()))
    report.peers.unreachable = {str(n): "far" for n in range(1000)}
    report.source.skipped = {str(n): "bad" for n in range(1000)}
    assert len(samples(report)) == before


def test_what_was_asked_for_the_scrape_is_shown() -> None:
    have = parsed(Metrics(with_peers()).render(DEVICES, MEASURED, TRANSFERRED))
    for name, value in {
        "device_bytes_total{flannel.1,encap,vxlan}": 1000,
        "device_packets_total{udptun0,decap,udp}": 20,
        "device_errors_total{udptun0,decap,udp}": 3,
        "device_drops_total{flannel.1,encap,vxlan}": 2,
        "measured_paths{udp,reachable}": 2, "measured_paths{udp,unreachable}": 1,
        "measured_paths{vxlan,reachable}": 1, "measured_paths{vxlan,limited}": 0,
        "round_trip_seconds{udp,0.5}": 0.001, "round_trip_seconds{udp,1}": 0.004,
        "round_trip_seconds{vxlan,0.95}": 0.002,
        "probe_loss_ratio{udp,0.5}": 0.25, "probe_loss_ratio{udp,1}": 1,
    }.items():
        assert have[_sorted(name)] == value, name
    assert not [name for name in have if name.startswith(("peer_", "probe_loss_ratio{vxlan"))]


def _sorted(name: str) -> str:
    """``samples`` sorts the labels by their names: device, direction, path, quantile, state."""
    head, _, labels = name.rstrip("}").partition("{")
    words = labels.split(",")
    quantile = {"0.5", "0.95", "1"} & set(words)
    if quantile:
        words = [*(word for word in words if word not in quantile), *quantile]
    return f"{head}{{{','.join(words)}}}"


def test_some_peers_have_metrics_of_their_own() -> None:
    metrics = Metrics(with_peers(), 1)
    have = parsed(metrics.render(DEVICES, MEASURED, TRANSFERRED))
    assert {name: value for name, value in have.items() if name.startswith("peer_")} == {
        "peer_bytes_total{encap,udp,n3}": 500, "peer_bytes_total{decap,udp,n3}": 600,
        "peer_bytes_total{encap,udp,other}": 100, "peer_bytes_total{decap,udp,other}": 200,
        "peer_packets_total{encap,udp,n3}": 5, "peer_packets_total{decap,udp,n3}": 6,
        "peer_packets_total{encap,udp,other}": 1, "peer_packets_total{decap,udp,other}": 2,
        "peer_reachable{n3}": 1, "peer_round_trip_seconds{udp,n3}": 0.004,
        "peer_probe_loss_ratio{udp,n3}": 0.25,
    }


def test_every_metric_is_explained() -> None:
    text = Metrics(with_peers(), 1).render(DEVICES, MEASURED, TRANSFERRED).decode()
    have = set(re.findall(r"^# TYPE (\S+)", text, re.MULTILINE))
    assert set(re.findall(r"^\| `(udptun_node_\S+)`", PAGE.read_text(), re.MULTILINE)) == have
