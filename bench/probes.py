"""The cost of probes for a forwarder: CPU time, probes per second and memory, with N idle peers.

    python -m bench probes [--peers 5000] [--seconds 120]

There are two namespaces. One has the forwarder. The other has a process that acts as all peers
(bench/probe_peers.py): it answers all probes, and probes the forwarder as real peers do. The
forwarder runs twice with the same routes, first without ``probe`` and then with ``probe``. The
difference is the cost.

CPU time is the time on a CPU of all threads of the forwarder (/proc/PID/task/*/schedstat). The time
that the kernel spends on received packets in softirqs is not part of it, unless it interrupts the
forwarder. Memory is VmRSS at the end. Needs root. Main thread only, like udptun.lab.
"""

from __future__ import annotations

import ipaddress
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from udptun.control.client import ControlClient
from udptun.lab import Forwarder, Lab, wait_for
from udptun.lab.hosts import Host
from udptun.lab.tunnels import PORT
from udptun.probe.prober import IDLE_PER_SECOND

from . import system
from .tables import consecutive

# RFC 2544: addresses for benchmarks. The lab uses 198.18.0.0/16.
FIRST = ipaddress.IPv4Address("198.19.0.1")
PEERS_NET = "198.19.0.0/16"
SETTLE_SECONDS = 5.0


@dataclass(frozen=True)
class Cost:
    cpu_share: float  # of one core
    sent_per_second: float
    answered_per_second: float
    asked_per_second: float  # requests of the peers
    reachable: int
    rss_kib: int


def run(peers: int, seconds: float) -> str:
    """Measure without and with probes. Return the text for the terminal."""
    with Lab() as lab:
        node, others = lab.host("node"), lab.host("peers")
        lab.link(node, others)
        others.ip(f"route add local {PEERS_NET} dev lo")
        node.ip(f"route add {PEERS_NET} via {others.v4}")
        without = _measure(node, peers, seconds, probe=False)
        actor = others.start([
            sys.executable, "-m", "bench.probe_peers", str(FIRST), str(peers),
            f"{node.v4}:{PORT}",
        ])
        actor.wait_for_output("ready")
        with_ = _measure(node, peers, seconds, probe=True)
        actor.stop()
    machine = system.facts()
    rows = [
        ("peers", f"{peers}", f"{peers}"),
        ("CPU, share of one core", f"{without.cpu_share:.2%}", f"{with_.cpu_share:.2%}"),
        ("requests sent per second", "0", f"{with_.sent_per_second:.1f}"),
        ("answers per second", "0", f"{with_.answered_per_second:.1f}"),
        ("requests received per second", "0", f"{with_.asked_per_second:.1f}"),
        ("peers reachable", "-", f"{with_.reachable}"),
        ("VmRSS, MiB", f"{without.rss_kib / 1024:.1f}", f"{with_.rss_kib / 1024:.1f}"),
    ]
    lines = [f"{peers} idle peers, {seconds:.0f} s, kernel {machine['kernel']}", "",
             f"{'':32}{'without':>12}{'with probes':>14}"]
    lines += [f"{name:32}{left:>12}{right:>14}" for name, left, right in rows]
    lines.append(f"{'cost':32}{with_.cpu_share - without.cpu_share:>12.2%} of a core, "
                 f"{(with_.rss_kib - without.rss_kib) / 1024:.1f} MiB")
    return "\n".join(lines)


def _measure(node: Host, peers: int, seconds: float, *, probe: bool) -> Cost:
    word = " probe" if probe else ""
    routes = [
        f"{prefix} via {FIRST + n}{word}"
        for n, prefix in enumerate(consecutive("10.64.0.0", peers))
    ]
    forwarder = Forwarder.start(node, routes=routes, networks=["10.64.0.0/10"])
    try:
        if probe:
            wait_for(lambda: _states(forwarder)["unknown"] == 0, "a verdict on each peer",
                     SETTLE_SECONDS + 2 * peers / IDLE_PER_SECOND)
        time.sleep(SETTLE_SECONDS)
        before, began, cpu = _counts(forwarder), time.monotonic(), _cpu_seconds(forwarder)
        _progress(seconds)
        cpu = _cpu_seconds(forwarder) - cpu
        took = time.monotonic() - began
        after = _counts(forwarder)
        return Cost(
            cpu / took, (after["sent"] - before["sent"]) / took,
            (after["answered"] - before["answered"]) / took,
            (after["received"] - before["received"]) / took,
            _states(forwarder)["reachable"], forwarder.rss_kib(),
        )
    finally:
        forwarder.stop()


def _progress(seconds: float) -> None:
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        print(f"measuring, {left:.0f} s left", file=sys.stderr, flush=True)
        time.sleep(min(left, 15.0))


def _cpu_seconds(forwarder: Forwarder) -> float:
    tasks = Path(f"/proc/{forwarder.process.pid}/task").iterdir()
    return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9


def _metrics(forwarder: Forwarder, name: str) -> dict[str, int]:
    """Return the values of a metric that has one label, by the label's value."""
    with ControlClient(str(forwarder.control)) as client:
        text = client.metrics()
    found = {}
    for line in text.splitlines():
        if line.startswith(f"{name}{{"):
            label, _, value = line.partition("} ")
            found[label.split('"')[1]] = int(float(value))
    return found


def _states(forwarder: Forwarder) -> dict[str, int]:
    return _metrics(forwarder, "udptun_probed_peers")


def _counts(forwarder: Forwarder) -> dict[str, int]:
    return _metrics(forwarder, "udptun_probes_total")
