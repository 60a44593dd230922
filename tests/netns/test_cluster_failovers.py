"""VXLAN fails and returns under TCP, many times in a row.

Prints how long each switch takes, and checks that nothing is left over afterwards:

    UDPTUN_FAILOVERS=24 python -m pytest -m slow tests/netns/test_cluster_failovers.py

The nodes take VXLAN back after one second (``short_hold``), because the wait normally doubles.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from itertools import cycle
from pathlib import Path

import pytest

from tests.netns.cluster_traffic import SteadyTransfer, all_reach_all
from tests.netns.test_cluster_paths import (
    RETURN_SECONDS,
    SWITCH_SECONDS,
    VXLAN,
    VXLAN_PORT,
    block,
    measured,
    switched,
    unblock,
)
from udptun.lab import wait_for
from udptun.lab.cluster import Cluster, Member, etcd_obstacle

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(etcd_obstacle() is not None, reason=str(etcd_obstacle())),
]

FAILOVERS_N = int(os.environ.get("UDPTUN_FAILOVERS", "6"))
FAULTS = ("both ways", "one way", "large only")


class Quick(Member):
    """A node that takes a path back after one second."""

    def argv(self, *more: str) -> list[str]:
        words = super().argv(*more)
        return ["tests.netns.short_hold" if word == "udptun" else word for word in words]


@pytest.mark.timeout(300 + 60 * FAILOVERS_N)
def test_many_failures_of_vxlan_leave_no_stale_entries(lab, capsys):
    cluster = Cluster(lab, 2, config=VXLAN, options=["--backend=auto"])
    cluster.members = [Quick(one.host, one.store, one.options) for one in cluster.members]
    a, b = cluster.members
    pairs = [(a, b), (b, a)]
    cluster.start()
    all_reach_all(cluster.members)
    for member in cluster.members:
        wait_for(lambda m=member: measured(m, 1), f"{member.host.name} to measure")
    before = [kept(member) for member in cluster.members]
    files = [open_files(member) for member in cluster.members]
    took: dict[str, list[float]] = {fault: [] for fault in FAULTS}
    stalls: dict[str, list[float]] = {fault: [] for fault in FAULTS}
    for _, fault in zip(range(FAILOVERS_N), cycle(FAULTS), strict=False):
        transfer = SteadyTransfer(a.pod, b.pod, b.pod_v4)
        from_a, from_b = (f"ip saddr {one.host.v4} udp dport {VXLAN_PORT}" for one in (a, b))
        block(b, f"{from_a} meta length > 1000" if fault == "large only" else from_a)
        if fault == "both ways":
            block(a, from_b)
        blocked = time.monotonic()
        switched(SWITCH_SECONDS, pairs, "udptun0")
        took[fault].append(time.monotonic() - blocked)
        unblock(b)
        if fault == "both ways":
            unblock(a)
        switched(RETURN_SECONDS, pairs, "flannel.1")
        assert transfer.finish() > 0
        stalls[fault].append(transfer.stall)
    for member in cluster.members:
        wait_for(lambda m=member: measured(m, 1), f"{member.host.name} to measure")
        wait_for(lambda m=member: changes(m) == (FAILOVERS_N, FAILOVERS_N), "all changes")
        carriers = [event["path"] for event in member.ask_node()["events"]
                    if event["type"] == "path_changed"]
        assert carriers == (["udp", "vxlan"] * FAILOVERS_N)[-len(carriers):]
        lines = [line for line in member.daemon.text().splitlines() if " now use " in line]
        assert len(lines) == 2 * FAILOVERS_N
    assert [kept(member) for member in cluster.members] == before
    more = [open_files(member) - was for member, was in zip(cluster.members, files, strict=True)]
    assert max(more) <= 2, more  # a connection to the store that was opened again
    with capsys.disabled():
        print(f"\nload average {os.getloadavg()[0]:.1f}")
        for fault in FAULTS:
            print(f"{fault}: {summary('until both nodes use UDP', took[fault])}; "
                  f"{summary('longest stall of TCP', stalls[fault])}")


def summary(what: str, seconds: list[float]) -> str:
    if not seconds:
        return f"{what}: -"
    return (f"{what}, {len(seconds)} times: median {statistics.median(seconds):.1f} s, "
            f"longest {max(seconds):.1f} s")


def kept(member: Member) -> dict[str, object]:
    """Return what the kernel and the forwarder have for the peers."""
    host = member.host

    def lines(command: str) -> list[str]:
        return sorted(host.run(command.split()).stdout.splitlines())

    def routes(version: int) -> list[str]:
        shown = json.loads(host.run(["ip", f"-{version}", "-j", "route", "show",
                                     "table", "all"]).stdout)
        return sorted(f"{one['dst']} {one.get('gateway')} {one.get('dev')} {one.get('table')}"
                      for one in shown)

    return {
        "routes": routes(4) + routes(6),
        "rules": lines("ip rule show"),
        "neighbours": lines("ip neigh show nud permanent"),
        "fdb": lines("bridge fdb show dev flannel.1"),
        "tables": lines("nft list tables"),
        "forwarder": sorted(member.routes()),
        "devices": sorted(one["ifname"] for one in json.loads(
            host.run(["ip", "-j", "link", "show"]).stdout)),
    }


def changes(member: Member) -> tuple[int, int]:
    """Return how often the daemon has moved a pair to UDP, and to VXLAN."""
    found = {}
    for line in member.metrics().splitlines():
        if line.startswith("udptun_node_path_changes_total{"):
            name, _, value = line.rpartition(" ")
            found[name.partition('path="')[2].rstrip('"}')] = int(float(value))
    return found["udp"], found["vxlan"]


def open_files(member: Member) -> int:
    return sum(1 for _ in Path(f"/proc/{member.daemon.pid}/fd").iterdir())
