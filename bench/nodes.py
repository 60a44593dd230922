"""The cost of one node in a cluster of N nodes, with a real node daemon, forwarder and etcd.

    python -m bench nodes [--nodes 10 --nodes 1000 ...] [--backend udp] [--out FILE]

The other nodes do not exist: their leases are written to etcd, and one program in its own namespace
answers the probes to all their addresses. The measurement has these parts: the start, the memory,
the CPU time and the traffic at rest, one change in the store, and a constant rate of changes
(churn). Owns: the leases, the measurement and its table. Main thread only, like udptun.lab.
"""

from __future__ import annotations

import ipaddress
import json
import os
import re
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from udptun.control.client import ControlClient
from udptun.control.protocol import NODE_SOCKET
from udptun.lab import Interface, Lab, LabError, wait_for
from udptun.lab.cluster import PREFIX, Cluster, Member

SIZES = (10, 1000, 10_000, 100_000)
BACKENDS = ("udp", "vxlan", "auto")
NETWORK = ipaddress.IPv4Network("10.0.0.0/8")
SUBNET_LEN = 26  # 262,144 subnets: enough for the largest size
UNDERLAY = ipaddress.IPv4Network("172.16.0.0/12")
MAX_NODES = 200_000
START_SECONDS = 600.0
CHANGE_SECONDS = 60.0
STATUS_SECONDS = 120.0
_TXN = 128  # the maximum number of operations that etcd accepts in one transaction
_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Cost:
    """The figures for one number of nodes: bytes, seconds, and shares of one core."""

    nodes: int
    start_s: float
    start_cpu_s: float
    start_store_bytes: int
    daemon_bytes: int
    daemon_peak_bytes: int
    forwarder_bytes: int
    disk_bytes: int
    rest_daemon_cpu: float
    rest_forwarder_cpu: float
    rest_packets_s: float
    rest_store_bytes_s: float
    change_p50_s: float
    change_p99_s: float
    change_cpu_s: float
    change_store_bytes: float
    churn_per_s: float
    churn_cpu: float
    restart_s: float


def subnet(n: int) -> ipaddress.IPv4Network:
    step = NETWORK.max_prefixlen - SUBNET_LEN
    return ipaddress.IPv4Network((int(NETWORK.network_address) + (n << step), SUBNET_LEN))


def lease(n: int, backend: str, moved: int = 0, *, probe: bool = True) -> tuple[str, str]:
    """Return key and value of the nth node's lease. ``moved`` gives the node another address.

    probe  whether the node answers probes
    """
    value: dict[str, object] = {
        "PublicIP": str(UNDERLAY[(1 + n + moved * MAX_NODES) % UNDERLAY.num_addresses]),
        "PublicIPv6": None,
    }
    advert = {"port": 8285, "mtu": 1450, "v": 1, "features": ["probe"] if probe else []}
    if backend == "udp":
        value["BackendData"] = {"udptun": advert}
    else:  # a node with VXLAN only advertises too: it answers probes
        mac = ":".join(f"{byte:02x}" for byte in (0x0E, moved & 255, *n.to_bytes(4, "big")))
        data = {"VNI": 1, "VtepMAC": mac, "udptun": advert}
        value |= {"BackendType": "vxlan", "BackendData": data}
    return f"{PREFIX}/subnets/{str(subnet(n)).replace('/', '-')}", json.dumps(value)


class Unmeasured(Member):
    """A node that does not measure its paths."""

    def argv(self, *more: str) -> list[str]:
        return ["bench.unmeasured" if word == "udptun" else word for word in super().argv(*more)]


class Simulation:
    """One node among ``n`` nodes. The context of ``lab`` must be open.

    probe    False: the node does not measure its paths
    program  plays the other nodes
    """

    def __init__(
        self, lab: Lab, n: int, backend: str, say: Callable[[str], None], *, probe: bool = True,
        program: str = "bench.responder",
    ) -> None:
        self._n, self._backend, self._say, self._probe = n, backend, say, probe
        self._moved = 0
        kind = "udp" if backend == "udp" else "vxlan"
        config = {"Network": str(NETWORK), "SubnetLen": SUBNET_LEN, "Backend": {"Type": kind},
                  "SubnetMin": str(subnet(MAX_NODES)[0])}
        self._cluster = Cluster(lab, 1, config=config, options=[f"--backend={backend}"])
        self._node: Member = self._cluster.members[0]
        if not probe:
            self._node = Unmeasured(self._node.host, self._node.store, self._node.options)
        self._peers = lab.host("peers")
        self._link = lab.link(self._node.host, self._peers)
        self._node.host.ip(f"route add {UNDERLAY} via {self._link.b.v4.ip}")
        self._peers.ip(f"route add local {UNDERLAY} dev lo",
                       f"route add {self._node.host.v4} via {self._link.a.v4.ip}")
        _receive_in_a_thread(self._link.b)
        self._peers.start([sys.executable, "-m", program]).wait_for_output("ready")

    def start(self) -> float:
        """Publish the leases and start the node. Return the seconds until all paths are active."""
        self._publish()
        began = time.monotonic()
        self._node.start()
        self._node.wait_ready(START_SECONDS)
        self._wait_applied()
        return time.monotonic() - began

    def measure(self, changes: int, seconds: float, churn: float) -> Cost:
        start_s = self.start()
        start_cpu, start_bytes = sum(self.cpu()), self._from_store()
        self._say(f"{self._n} nodes: ready after {start_s:.1f} s")
        rest = self._rest(seconds)
        self._say(f"{self._n} nodes: at rest measured")
        times, change_cpu, change_bytes = self._change(changes, rest[0] + rest[1])
        self._say(f"{self._n} nodes: {changes} changes measured")
        churn_cpu = self._churn(churn, seconds)
        self._say(f"{self._n} nodes: {churn:g} changes per second measured")
        memory = [*self.memory(), (0, 0)]
        disk = sum(file.stat().st_size for file in (self._node.folder / "state").iterdir())
        return Cost(
            self._n, start_s, start_cpu, start_bytes, memory[0][0], memory[0][1], memory[1][0],
            disk, *rest, statistics.median(times), _percentile(times, 99), change_cpu,
            change_bytes, churn, churn_cpu, self._restart(),
        )

    def _publish(self) -> None:
        for start in range(0, self._n, _TXN):
            numbers = range(start, min(start + _TXN, self._n))
            self._cluster.etcd.put_together(
                lease(n, self._backend, probe=self._probe) for n in numbers)

    def _wait_applied(self) -> None:
        """Wait until the last peer has its path and the node reports all leases."""
        wait_for(lambda: self._has(self._n - 1, 0), "the last peer", START_SECONDS)

    def _has(self, n: int, moved: int) -> bool:
        """Return whether the data path has the nth peer at the address of ``moved``."""
        wanted = json.loads(lease(n, self._backend, moved)[1])
        if self._backend == "udp":
            route = self._node.ask(f"/v1/trace?address={subnet(n)[9]}")["route"]
            return bool(route) and route["via"] == wanted["PublicIP"]
        shown = self._node.host.run(
            ["ip", "neigh", "show", str(subnet(n)[0]), "dev", "flannel.1"]).stdout
        return wanted["BackendData"]["VtepMAC"] in shown

    def _pids(self) -> tuple[int, ...]:
        """Return the processes: the daemon, and the forwarder if the backend needs one."""
        daemon = self._node.daemon.pid
        return (daemon,) if self._backend == "vxlan" else (daemon, self._node.forwarder_pid())

    def cpu(self) -> tuple[float, float]:
        """Return the CPU seconds of daemon and forwarder since their start."""
        daemon, *forwarder = (_cpu_seconds(pid) for pid in self._pids())
        return daemon, sum(forwarder)

    def memory(self) -> list[tuple[int, int]]:
        """Return the resident memory of each process: now, and its peak."""
        return [_memory(pid) for pid in self._pids()]

    def states(self) -> dict[str, int]:
        """Return the number of peers in each measured state, as the daemon reports them."""
        control = self._node.control.with_name(NODE_SOCKET)
        with ControlClient(str(control), STATUS_SECONDS) as client:
            return dict(Counter(peer["state"] for peer in client.node()["peers"]))

    def _from_store(self) -> int:
        """Return the bytes that the node has received on its connections to etcd."""
        shown = self._node.host.run(["ss", "-tinH", "dst", str(self._cluster.etcd.host.v4)]).stdout
        return sum(int(count) for count in re.findall(r"bytes_received:(\d+)", shown))

    def sent(self) -> int:
        path = f"/sys/class/net/{self._link.a.name}/statistics/tx_packets"
        return int(self._node.host.run(["cat", path]).stdout)

    def _rest(self, seconds: float) -> tuple[float, float, float, float]:
        cpu, sent, received = self.cpu(), self.sent(), self._from_store()
        began = time.monotonic()
        time.sleep(seconds)  # the measured time, in which nothing happens
        took = time.monotonic() - began
        after = self.cpu()
        return ((after[0] - cpu[0]) / took, (after[1] - cpu[1]) / took,
                (self.sent() - sent) / took, (self._from_store() - received) / took)

    def _change(self, count: int, rest_cpu: float) -> tuple[list[float], float, float]:
        """Move ``count`` peers, one after the other. Return the time of each change until it is
        active in the data path, and the CPU time and the bytes from the store per change.

        rest_cpu  the CPU time of both processes at rest, as a share of a core; it is subtracted
        """
        cpu, received, times = sum(self.cpu()), self._from_store(), []
        start = time.monotonic()
        self._moved += 1
        for i in range(count):
            n = i * self._n // count
            self._cluster.etcd.put(*lease(n, self._backend, self._moved))
            began = time.monotonic()
            while not self._has(n, self._moved):
                if time.monotonic() > began + CHANGE_SECONDS:
                    raise LabError(f"peer {n} has not moved within {CHANGE_SECONDS:g} s")
            times.append(time.monotonic() - began)
        each = max(0.0, sum(self.cpu()) - cpu - rest_cpu * (time.monotonic() - start)) / count
        return times, each, (self._from_store() - received) / count

    def _churn(self, rate: float, seconds: float) -> float:
        """Move ``rate`` peers per second; return the CPU time of daemon and forwarder as a share of
        a core."""
        self._moved += 1
        cpu, began = sum(self.cpu()), time.monotonic()
        n = done = 0
        while (now := time.monotonic()) < began + seconds:
            if done < (now - began) * rate:
                n = done % self._n
                self._cluster.etcd.put(*lease(n, self._backend, self._moved + done // self._n))
                done += 1
            else:
                time.sleep(0.5 / rate)
        last = self._moved + (done - 1) // self._n
        wait_for(lambda: self._has(n, last), "the last change of the churn", CHANGE_SECONDS)
        took = time.monotonic() - began
        self._moved = last
        return (sum(self.cpu()) - cpu) / took

    def _restart(self) -> float:
        """Kill the daemon and start it again; return the time until it is ready."""
        self._node.daemon.kill()
        began = time.monotonic()
        self._node.start()
        self._node.wait_ready(START_SECONDS)
        return time.monotonic() - began


def _receive_in_a_thread(device: Interface) -> None:
    """Let a thread of the kernel receive on this end of a veth. Otherwise the process that sends
    pays for the delivery too, up to the receiver's socket."""
    try:
        device.offloads({"gro": "on"})  # then the veth uses NAPI
        device.host.run(["sh", "-c", f"echo 1 > /sys/class/net/{device.name}/threaded"])
    except LabError as error:
        print("the forwarder's CPU time contains the delivery to the peers, because this kernel is "
              f"older than 5.13: {error}", file=sys.stderr, flush=True)


def _memory(pid: int) -> tuple[int, int]:
    text = Path(f"/proc/{pid}/status").read_text()
    now, peak = (int(text.split(name)[1].split()[0]) * 1024 for name in ("VmRSS:", "VmHWM:"))
    return now, peak


def _cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


def _percentile(values: Sequence[float], percent: int) -> float:
    return statistics.quantiles(values, n=100)[percent - 1]


_ROWS: tuple[tuple[str, Callable[[Cost], str]], ...] = (
    ("start until all paths are active, s", lambda c: f"{c.start_s:.1f}"),
    ("CPU time of the start, s", lambda c: f"{c.start_cpu_s:.1f}"),
    ("read from the store at the start, MB", lambda c: f"{c.start_store_bytes / 1e6:.2f}"),
    ("restart of the daemon until ready, s", lambda c: f"{c.restart_s:.1f}"),
    ("memory of the daemon, MB", lambda c: f"{c.daemon_bytes / 1e6:.0f}"),
    ("its peak, MB", lambda c: f"{c.daemon_peak_bytes / 1e6:.0f}"),
    ("memory of the forwarder, MB", lambda c: f"{c.forwarder_bytes / 1e6:.0f}"),
    ("state on disk, MB", lambda c: f"{c.disk_bytes / 1e6:.2f}"),
    ("daemon at rest, % of a core", lambda c: f"{c.rest_daemon_cpu * 100:.2f}"),
    ("forwarder at rest, % of a core", lambda c: f"{c.rest_forwarder_cpu * 100:.2f}"),
    ("packets sent at rest, 1/s", lambda c: f"{c.rest_packets_s:.1f}"),
    ("read from the store at rest, B/s", lambda c: f"{c.rest_store_bytes_s:.0f}"),
    ("one change until active, median, ms", lambda c: f"{c.change_p50_s * 1000:.1f}"),
    ("one change until active, 99 %, ms", lambda c: f"{c.change_p99_s * 1000:.1f}"),
    ("CPU time of one change, ms", lambda c: f"{c.change_cpu_s * 1000:.1f}"),
    ("read from the store per change, B", lambda c: f"{c.change_store_bytes:.0f}"),
    ("churn: both at the given changes per second, % of a core",
     lambda c: f"{c.churn_cpu * 100:.0f} at {c.churn_per_s:g}"),
)


def table(costs: Sequence[Cost]) -> str:
    """Return the figures as a Markdown table, one column per size."""
    head = "| nodes | " + " | ".join(f"{cost.nodes:,}" for cost in costs) + " |"
    rows = [f"| {name} | " + " | ".join(text(cost) for cost in costs) + " |"
            for name, text in _ROWS]
    return "\n".join([head, "|---" + "|---:" * len(costs) + "|", *rows])


def run(
    sizes: Sequence[int], backend: str, changes: int, seconds: float, churn: float,
    out: Path | None,
) -> int:
    """Measure each size, print the table, and append the figures to ``out`` as JSON lines."""
    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    costs = []
    for size in sizes:
        with Lab() as lab:
            costs.append(Simulation(lab, size, backend, say).measure(changes, seconds, churn))
        if out is not None:
            with out.open("a") as file:
                file.write(json.dumps({"backend": backend, **asdict(costs[-1])}) + "\n")
    print(table(costs))
    return 0
