"""deploy/monitoring: rules and dashboard name only what a real node and its forwarder export."""

import json
import re
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from tests.scripts import script
from udptun.lab import ping, wait_for
from udptun.lab.cluster import Cluster, etcd_obstacle

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "deploy" / "monitoring"
NAME = re.compile(r"\budptun_[a-z_]+")
LABELS = re.compile(r"(udptun_[a-z_]+)\{([^}]*)\}")

promtool = pytest.mark.skipif(
    not shutil.which("promtool"), reason="promtool is missing: apt-get install prometheus")


def rules() -> list[dict[str, Any]]:
    (group,) = yaml.safe_load((FOLDER / "alerts.yaml").read_text())["groups"]
    found: list[dict[str, Any]] = group["rules"]
    return found


def queries() -> list[str]:
    """Return the queries of the rules and of the dashboard."""
    panels = json.loads((FOLDER / "dashboard.json").read_text())["panels"]
    return [rule["expr"] for rule in rules()] + [
        target["expr"] for panel in panels for target in panel.get("targets", ())]


def test_the_dashboard_is_written_from_its_list() -> None:
    have = (FOLDER / "dashboard.json").read_text()
    assert have == script("dashboard").text(), "run: python scripts/dashboard.py"


def test_each_query_of_the_dashboard_is_limited_to_the_chosen_instances() -> None:
    for row in script("dashboard").PANELS.values():
        for _, _, curves in row:
            for expr in curves:
                query = script("dashboard").query(expr)
                assert query.count('instance=~"$instance"') == len(NAME.findall(query)), query


@promtool
@pytest.mark.parametrize("argv", [
    ["check", "rules", "alerts.yaml"], ["test", "rules", "alerts_test.yaml"]])
def test_promtool_accepts_the_rules(argv: list[str]) -> None:
    done = subprocess.run(["promtool", *argv], cwd=FOLDER, capture_output=True, text=True,
                          check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_is_tested_and_explained() -> None:
    names = [rule["alert"] for rule in rules()]
    for test in yaml.safe_load((FOLDER / "alerts_test.yaml").read_text())["tests"]:
        assert [one["alertname"] for one in test["alert_rule_test"]] == names
    page = (ROOT / "docs" / "monitoring.md").read_text()
    assert re.findall(r"^\| `(Udptun\w+)` \|", page, re.MULTILINE) == names


@pytest.mark.skipif(etcd_obstacle() is not None, reason=str(etcd_obstacle()))
def test_names_and_labels_are_those_of_a_real_node(lab: Any) -> None:
    """Two real nodes with both paths and traffic; one scrape has daemon and forwarder."""
    cluster = Cluster(
        lab, 2, config={"Network": "10.244.0.0/16", "Backend": {"Type": "vxlan"}},
        options=["--metrics=9100", "--metrics-peers=1", "--backend=auto"])
    cluster.start()
    a, b = cluster.members
    have: dict[str, set[str]] = {}  # labels by name; families without a sample have none
    values: dict[tuple[str, ...], float] = {}

    def scrape() -> bool:
        text = a.host.run(["curl", "-sS", "http://127.0.0.1:9100/metrics"]).stdout
        for family in text_string_to_metric_families(text):
            total = f"{family.name}_total" if family.type == "counter" else family.name
            have.setdefault(total, set())
            for sample in family.samples:
                have.setdefault(sample.name, set()).update(sample.labels)
                values[sample.name, *sorted(sample.labels.values())] = sample.value
        return ("udptun_node_peer_round_trip_seconds", str(b.subnet).replace("/", "-"),
                "vxlan") in values

    wait_for(scrape, "the first measurement", 60)
    before = values["udptun_node_device_bytes_total", "encap", "flannel.1", "vxlan"]
    assert ping(a.pod, b.pod_v4, count=3, size=1000).received == 3
    scrape()
    # by VXLAN: 3 packets with headers; probes come in between
    assert values["udptun_node_device_bytes_total", "encap", "flannel.1", "vxlan"] - before >= 3000
    assert time.time() - values["udptun_node_lease_renewal_time_seconds",] < 600

    assert {name for query in queries() for name in NAME.findall(query)} <= have.keys()
    for query in queries():
        for name, labels in LABELS.findall(query):
            wanted = set(re.findall(r"(\w+)[=!]", labels)) - {"instance"}
            if have[name]:  # else no sample: for example, no send was refused
                assert wanted <= have[name], query
    of_forwarders = {f"udptun_peer_{name}" for name in (
        "packets_total", "bytes_total", "round_trip_seconds", "probe_loss_ratio")}
    for page in ("control", "node", "monitoring", "operations"):
        spans = re.findall(r"`(udptun_[a-z_]+)`", (ROOT / "docs" / f"{page}.md").read_text())
        assert set(spans) - of_forwarders <= have.keys(), page
