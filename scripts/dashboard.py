"""Write the Grafana dashboard: ``python scripts/dashboard.py``.

PANELS is the only source of deploy/monitoring/dashboard.json.
"""

import json
from typing import Any

from release import ROOT

FILE = ROOT / "deploy" / "monitoring" / "dashboard.json"
WIDTH, HEIGHT, PER_ROW = 24, 8, 3  # Grafana's grid has 24 columns
CHOSEN = '{instance=~"$instance"'
SOURCE = {"type": "prometheus", "uid": "$datasource"}

# Row -> panels: title, unit, and for each curve the query and its legend. CHOSEN is added to the
# labels of each metric.
PANELS: dict[str, list[tuple[str, str, dict[str, str]]]] = {
    "Nodes": [
        ("Nodes that are ready", "short", {
            "sum(udptun_node_ready{})": "ready",
            "count(udptun_node_ready{})": "all"}),
        ("Checks that fail or are degraded", "short", {
            "(1 - udptun_node_check_ok{}) > 0": "{{instance}} {{check}}"}),
        ("Peers by the path to them", "short", {
            "sum by (path) (udptun_node_peers{})": "{{path}}"}),
    ],
    "Traffic": [
        ("To other nodes", "Bps", {
            'sum by (instance, path) (rate(udptun_node_device_bytes_total{direction="encap"}[5m]))':
                "{{instance}} by {{path}}"}),
        ("From other nodes", "Bps", {
            'sum by (instance, path) (rate(udptun_node_device_bytes_total{direction="decap"}[5m]))':
                "{{instance}} by {{path}}"}),
        ("UDP payload of the forwarders", "Bps", {
            "sum by (instance, direction) (rate(udptun_bytes_total{}[5m]))":
                "{{instance}} {{direction}}"}),
        ("Inner packets of the forwarders", "pps", {
            'sum by (instance, direction) (rate(udptun_packets_total{state="delivered"}[5m]))':
                "{{instance}} {{direction}}"}),
        ("Share of the packets that pass in the kernel", "percentunit", {
            'sum by (instance) (rate(udptun_express_packets_total{state="passed"}[5m])) / '
            'sum by (instance) (rate(udptun_packets_total{state="delivered"}[5m]))':
                "{{instance}}"}),
        ("CPU time of the workers", "percentunit", {
            "rate(udptun_worker_cpu_seconds_total{}[5m])": "{{instance}} worker {{worker}}"}),
        ("Packets that wait to be sent", "short", {
            "sum by (instance) (udptun_queued_packets{})": "{{instance}}"}),
    ],
    "Paths": [
        ("Subnets by the state of their path", "short", {
            "sum by (state) (udptun_node_paths{})": "{{state}}"}),
        ("Round trips: maximum over the peers", "s", {
            'udptun_node_round_trip_seconds{quantile="1"}': "{{instance}} by {{path}}",
            'udptun_round_trip_seconds{quantile="1"}': "{{instance}} forwarder"}),
        ("Loss of probes: maximum over the peers", "percentunit", {
            'udptun_node_probe_loss_ratio{quantile="1"}': "{{instance}} by {{path}}",
            'udptun_probe_loss_ratio{quantile="1"}': "{{instance}} forwarder"}),
        ("Subnets moved to another path", "short", {
            "sum by (instance, path) (increase(udptun_node_path_changes_total{}[5m]))":
                "{{instance}} to {{path}}",
            "sum by (instance) (udptun_node_paths_moved{})": "{{instance}} moved now"}),
        ("Probed peers of the forwarders", "short", {
            "sum by (state) (udptun_probed_peers{})": "{{state}}"}),
        ("Peers with metrics of their own (--metrics-peers)", "Bps", {
            "sum by (instance, peer) (rate(udptun_node_peer_bytes_total{}[5m]))":
                "{{instance}} with {{peer}}"}),
    ],
    "Losses": [
        ("Dropped packets by reason", "pps", {
            "sum by (direction, reason) (rate(udptun_drops_total{}[5m])) > 0":
                "{{reason}} {{direction}}"}),
        ("Refused sends by errno", "pps", {
            "sum by (instance, errno) (rate(udptun_send_errors_total{}[5m]))":
                "{{instance}} {{errno}}"}),
        ("Errors and drops of the devices", "pps", {
            "sum by (instance, device) (rate(udptun_node_device_errors_total{}[5m]))":
                "{{instance}} {{device}} errors",
            "sum by (instance, device) (rate(udptun_node_device_drops_total{}[5m]))":
                "{{instance}} {{device}} drops"}),
        ("ICMP errors", "pps", {
            'sum by (instance) (rate(udptun_peer_errors_total{reason="icmp"}[5m]))':
                "{{instance}} received",
            "sum by (instance, state) (rate(udptun_icmp_total{}[5m]))":
                "{{instance}} to pods, {{state}}"}),
    ],
    "Control": [
        ("Store: time since its last answer", "s", {
            "udptun_node_store_silence_seconds{}": "{{instance}}"}),
        ("Lease: time until it expires", "s", {
            "udptun_node_lease_expiry_time_seconds{} - time()": "{{instance}}"}),
        ("Changes of routes", "short", {
            "sum by (instance, path) (increase(udptun_node_route_changes_total{}[5m]))":
                "{{instance}} {{path}}"}),
        ("Take-overs and starts", "short", {
            "increase(udptun_takeovers_total{}[1h])": "{{instance}} take-overs",
            "increase(udptun_node_forwarder_starts_total{}[1h])": "{{instance}} forwarder starts"}),
        ("Versions", "short", {
            "count by (version, build) (udptun_build_info{})": "{{version}} build {{build}}"}),
    ],
}


def query(text: str) -> str:
    """Limit the query to the chosen instances."""
    return text.replace("{", CHOSEN + ",").replace(",}", "}")


def _panel(at: int, y: int, title: str, unit: str, curves: dict[str, str]) -> dict[str, Any]:
    return {
        "type": "timeseries", "title": title, "datasource": SOURCE,
        "gridPos": {"x": at % PER_ROW * WIDTH // PER_ROW, "y": y + at // PER_ROW * HEIGHT,
                    "w": WIDTH // PER_ROW, "h": HEIGHT},
        "fieldConfig": {"defaults": {"unit": unit, "min": 0}, "overrides": []},
        "options": {"legend": {"displayMode": "list", "placement": "bottom"},
                    "tooltip": {"mode": "multi", "sort": "desc"}},
        "targets": [
            {"refId": chr(ord("A") + n), "expr": query(expr), "legendFormat": legend,
             "datasource": SOURCE}
            for n, (expr, legend) in enumerate(curves.items())],
    }


def dashboard() -> dict[str, Any]:
    panels: list[dict[str, Any]] = []
    y = 0
    for row, its_panels in PANELS.items():
        panels.append({"type": "row", "title": row, "collapsed": False, "panels": [],
                       "gridPos": {"x": 0, "y": y, "w": WIDTH, "h": 1}})
        y += 1
        panels += [_panel(at, y, *panel) for at, panel in enumerate(its_panels)]
        y += -(-len(its_panels) // PER_ROW) * HEIGHT
    for number, panel in enumerate(panels, 1):
        panel["id"] = number
    return {
        "title": "udptun", "uid": "udptun", "tags": ["udptun"], "schemaVersion": 36,
        "editable": True, "refresh": "30s", "time": {"from": "now-6h", "to": "now"},
        "templating": {"list": [
            {"name": "datasource", "type": "datasource", "query": "prometheus"},
            {"name": "instance", "type": "query", "datasource": SOURCE, "multi": True,
             "includeAll": True, "allValue": ".*", "refresh": 2, "sort": 1,
             "query": "label_values(udptun_build_info, instance)",
             "current": {"text": "All", "value": "$__all"}},
        ]},
        "panels": panels,
    }


def text() -> str:
    return json.dumps(dashboard(), indent=1) + "\n"


if __name__ == "__main__":
    FILE.write_text(text())
