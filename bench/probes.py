"""What probes cost one node: CPU time, packets and memory of daemon and forwarder, N idle peers.

    python -m bench probes [--peers 5000] [--seconds 120] [--backend auto ...]

A real node daemon, forwarder and etcd (``Simulation`` of bench/nodes.py); one process answers the
probes to all peers, and probes the node as that many peers do. The node runs twice with the same
leases: the first time the daemon does not measure (bench/unmeasured.py) and no peer answers probes,
the second time it runs as usual. The difference is the cost.

CPU time is that of all threads (/proc/PID/stat). It includes the kernel's time for sending, but not
that for the delivery to the other host: a thread of the kernel does that. It does not include
softirqs, unless they interrupt a thread.
Memory is VmRSS at the end.

At first each path is probed twice (a small and a large probe), as fast as the budget allows. Later
it is probed once per interval, and one probe serves both sides. The measurement begins after this
first round. The CPU time of the first round is reported separately.

Needs root and etcd. Main thread only, like udptun.lab.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from udptun.lab import Lab
from udptun.probe.prober import IDLE_PER_SECOND, STANDBY_PER_SECOND
from udptun.probe.state import IDLE_JITTER, IDLE_SECONDS

from . import nodes, system

SETTLE_SECONDS = 15.0
FIRST_N = 2  # probes of each path in the first round
SAY_SECONDS = 60.0  # between two lines about the progress


@dataclass(frozen=True)
class Cost:
    """The figures of one run. CPU: share of one core; memory: bytes.

    first_cpu  daemon and forwarder together, while each path is probed for the first time
    """

    daemon_cpu: float
    forwarder_cpu: float
    sent_per_second: float
    daemon_bytes: int
    forwarder_bytes: int
    reachable: int
    first_cpu: float = 0.0

    @property
    def cpu(self) -> float:
        return self.daemon_cpu + self.forwarder_cpu

    @property
    def memory(self) -> int:
        return self.daemon_bytes + self.forwarder_bytes


def run(peers: int, seconds: float, backends: Sequence[str]) -> str:
    """Measure each backend without and with probes. Return the text for the terminal."""
    waits = [wait_seconds(peers, backend, probe) + seconds
             for backend in backends for probe in (False, True)]
    _say(f"{len(waits)} runs, about {sum(waits) / 60:.0f} minutes in total, plus the starts")
    lines = [f"{peers} idle peers, {seconds:g} s, kernel {system.facts()['kernel']}"]
    for backend in backends:
        loads = [os.getloadavg()[0]]
        without = measure(peers, seconds, backend, probe=False)
        with_ = measure(peers, seconds, backend, probe=True)
        loads.append(os.getloadavg()[0])
        lines += ["", f"{backend}; load average {loads[0]:.1f} before, {loads[1]:.1f} after",
                  *table(without, with_)]
    return "\n".join(lines)


def table(without: Cost, with_: Cost) -> list[str]:
    rows = [
        ("node daemon, % of a core", without.daemon_cpu * 100, with_.daemon_cpu * 100, 2),
        ("forwarder, % of a core", without.forwarder_cpu * 100, with_.forwarder_cpu * 100, 2),
        ("both, % of a core", without.cpu * 100, with_.cpu * 100, 2),
        ("both, first round, % of a core", without.first_cpu * 100, with_.first_cpu * 100, 2),
        ("packets sent per second", without.sent_per_second, with_.sent_per_second, 1),
        ("node daemon, MB", without.daemon_bytes / 1e6, with_.daemon_bytes / 1e6, 1),
        ("forwarder, MB", without.forwarder_bytes / 1e6, with_.forwarder_bytes / 1e6, 1),
        ("both, MB", without.memory / 1e6, with_.memory / 1e6, 1),
    ]
    lines = [f"{'':32}{'without':>10}{'with':>10}{'cost':>10}"]
    lines += [f"{name:32}{left:>10.{digits}f}{right:>10.{digits}f}{right - left:>10.{digits}f}"
              for name, left, right, digits in rows]
    return [*lines, f"{'peers reachable':32}{'-':>10}{with_.reachable:>10}"]


def first_round_seconds(peers: int) -> float:
    return FIRST_N * peers / IDLE_PER_SECOND


def wait_seconds(peers: int, backend: str, probe: bool) -> float:
    """Return the seconds from the start until every path is probed once per interval."""
    if not probe:
        return SETTLE_SECONDS
    slowest = STANDBY_PER_SECOND if backend == "auto" else IDLE_PER_SECOND
    interval = max(IDLE_SECONDS, peers / slowest) * (1 + IDLE_JITTER)
    return SETTLE_SECONDS + first_round_seconds(peers) + interval


def measure(peers: int, seconds: float, backend: str, *, probe: bool) -> Cost:
    def say(text: str) -> None:
        _say(f"{backend}, {'with' if probe else 'without'} probes: {text}")

    with Lab() as lab:
        node = nodes.Simulation(lab, peers, backend, say, probe=probe,
                                program="bench.probe_peers")
        say(f"starting with {peers} peers")
        say(f"all paths active after {node.start():.1f} s")
        # To ask for the state of all peers would cost the daemon memory.
        wait = wait_seconds(peers, backend, probe)
        first = min(first_round_seconds(peers), wait)
        cpu, began = node.cpu(), time.monotonic()
        _sleep(first, say, "first round of probes" if probe else "settling")
        first_cpu = (sum(node.cpu()) - sum(cpu)) / (time.monotonic() - began)
        _sleep(wait - first, say, "until each path is probed once per interval")
        cpu, sent, began = node.cpu(), node.sent(), time.monotonic()
        _sleep(seconds, say, "measuring")  # nothing happens in this time
        took = time.monotonic() - began
        after, sent = node.cpu(), node.sent() - sent
        memory = [*(now for now, _ in node.memory()), 0]
        return Cost((after[0] - cpu[0]) / took, (after[1] - cpu[1]) / took, sent / took,
                    memory[0], memory[1], node.states().get("reachable", 0) if probe else 0,
                    first_cpu)


def _sleep(seconds: float, say: Callable[[str], None], why: str) -> None:
    """Sleep, and report the remaining time regularly."""
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        say(f"{why}: {left:.0f} s left")
        time.sleep(min(left, SAY_SECONDS))


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
