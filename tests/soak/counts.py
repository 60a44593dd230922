"""What is read of each node, and the conditions that must hold. Main thread only.

The functions that decide have no side effects, so the tests can show that each finds its fault.
"""

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from udptun.lab import Host, LabError
from udptun.lab.cluster import Member

from .traffic import socket_drops

SETTLE_SECONDS = 20.0  # limit for a forwarder to become idle when the traffic pauses
WARM_UP = 0.2  # this share of the samples is not judged
# A process may grow by this in the whole run, and by this in each hour. Python's allocator
# and the libraries keep some memory that they have used once.
GROWTH_KIB, GROWTH_KIB_PER_HOUR = 3 * 1024, 8 * 1024
MORE_FDS = 3
MIN_SAMPLES = 12  # with fewer, a third of them is one or two: connections to etcd come and go
# Drops that explain a lost datagram: a queue was full. Other reasons would be faults.
CONGESTION = ("no_buffer", "slow_peer")


@dataclass
class Series:
    """Samples of one process: time, KiB of memory, open descriptors."""

    at: list[float] = field(default_factory=list)
    rss: list[float] = field(default_factory=list)
    fds: list[float] = field(default_factory=list)

    def add(self, pid: int) -> None:
        with suppress(OSError, IndexError):  # it ended just now
            status = Path(f"/proc/{pid}/status").read_text()
            fds = len([*Path(f"/proc/{pid}/fd").iterdir()])
            self.rss.append(int(status.split("VmRSS:")[1].split()[0]))
            self.fds.append(fds)
            self.at.append(time.monotonic())


def growth(values: Sequence[float]) -> float:
    """Return by how much the last third of the values is larger than the first, by the medians. The
    first WARM_UP of them do not count."""
    rest = values[int(len(values) * WARM_UP):]
    third = len(rest) // 3
    if third == 0:
        return 0.0
    return median(rest[-third:]) - median(rest[:third])


def grown(name: str, series: Series) -> list[str]:
    """Return what has grown beyond its bound."""
    if len(series.at) < MIN_SAMPLES:
        return []
    hours = (series.at[-1] - series.at[0]) / 3600
    bound = GROWTH_KIB + GROWTH_KIB_PER_HOUR * hours
    wrong = []
    if (more := growth(series.rss)) > bound:
        wrong.append(f"{name}: its memory has grown by {more:.0f} KiB, the bound is {bound:.0f}")
    if (more := growth(series.fds)) > MORE_FDS:
        samples = " ".join(f"{n:g}" for n in series.fds)
        wrong.append(f"{name}: it has {more:g} more descriptors, the bound is {MORE_FDS}; "
                     f"the samples: {samples}")
    return wrong


def unbalanced(packets: Mapping[str, Mapping[str, int]], drops: Mapping[str, int]) -> list[str]:
    """Return the directions whose counters do not add up, or whose drops by reason do not.

    drops  dropped packets by direction, summed over the reasons
    """
    wrong = []
    for direction, n in packets.items():
        came = n["read"] + n["generated"]
        went = n["delivered"] + n["consumed"] + n["dropped"] + n["queued"]
        if came != went or drops.get(direction, 0) != n["dropped"]:
            wrong.append(f"{direction}: {dict(n)}, by reason {drops.get(direction, 0)}")
    return wrong


@dataclass(frozen=True)
class Interval:
    """While a node is down because of ``why``, datagrams from and to it may be lost."""

    node: str
    begin: float
    end: float
    why: str


def unexplained(
    lost: Sequence[tuple[tuple[str, str], float]], intervals: Sequence[Interval],
) -> tuple[Counter[str], list[tuple[tuple[str, str], float]]]:
    """Return the lost datagrams by the reason of an interval, and those in no interval.

    lost  the nodes of sender and receiver, and the time at which it was sent
    """
    by_reason: Counter[str] = Counter()
    rest = []
    for names, at in lost:
        why = next((one.why for one in intervals
                    if one.node in names and one.begin <= at <= one.end), None)
        if why is None:
            rest.append((names, at))
        else:
            by_reason[why] += 1
    return by_reason, rest


class NodeCounts:
    """What is read of one node.

    express  whether the node should have the express path
    """

    def __init__(self, member: Member, express: bool = False) -> None:
        self.member, self.express = member, express
        self.kernel: Counter[str] = Counter()  # packets of the express path, over all forwarders
        self.active = self.idle = 0  # samples with and without the express path
        self._kernel_before: dict[str, int] = {}
        self.name = member.host.name
        self.daemon, self.forwarder = Series(), Series()
        self.drops: Counter[str] = Counter()  # since the start, over all forwarders
        self._before: dict[str, int] = {}

    def sample(self) -> list[str]:
        """Read everything while no traffic moves. Return what is wrong."""
        self.daemon.add(self.member.daemon.pid)
        wrong: list[str] = ["the forwarder does not answer"]
        end = time.monotonic() + SETTLE_SECONDS
        while wrong and time.monotonic() < end:
            wrong = self._look()
            time.sleep(0.05)
        with suppress(OSError, LabError):
            self.forwarder.add(self.member.forwarder_pid())
            self._look_at_express(self.member.ask("/v1/status")["accelerate"])
        return [f"{self.name}: {text}" for text in wrong]

    def _look(self) -> list[str]:
        try:
            before = self.member.ask("/v1/status")["packets"]
            rows = self.member.ask("/v1/drops")["drops"]
            packets = self.member.ask("/v1/status")["packets"]
        except (OSError, LabError) as error:
            return [str(error)]
        if before != packets:
            return ["packets move"]
        directions: Counter[str] = Counter()
        for row in rows:
            directions[row["direction"]] += row["packets"]
        wrong = unbalanced(packets, directions)
        if not wrong:
            self._count({row["reason"]: 0 for row in rows}, rows)
        return wrong

    def _count(self, total: dict[str, int], rows: Sequence[Mapping]) -> None:
        for row in rows:
            total[row["reason"]] += row["packets"]
        if any(n < self._before.get(reason, 0) for reason, n in total.items()):
            self._before = {}  # a new forwarder counts from 0
        for reason, n in total.items():
            if n > self._before.get(reason, 0):
                self.drops[reason] += n - self._before.get(reason, 0)
        self._before = total

    def _look_at_express(self, report: Mapping) -> None:
        if report["active"]:
            self.active += 1
        else:
            self.idle += 1
        total = report["packets"]
        if any(total[name] < n for name, n in self._kernel_before.items()):
            self._kernel_before = {}  # a new forwarder counts from 0
        for name, n in total.items():
            self.kernel[name] += n - self._kernel_before.get(name, 0)
        self._kernel_before = total

    def kernel_drops(self) -> Counter[str]:
        """Return what the kernel has dropped on this node, by place."""
        found: Counter[str] = Counter()
        host, pod = self.member.host, self.member.pod
        found["sockets of the forwarder"] = socket_drops(host)
        found["sockets of the pod"] = socket_drops(pod)
        for where in (host, pod):
            found["devices"] += device_drops(where)
        return found


def device_drops(host: Host) -> int:
    """Return what the host's devices have dropped."""
    total = 0
    with host.inside():
        for line in Path("/proc/thread-self/net/dev").read_text().splitlines()[2:]:
            fields = line.partition(":")[2].split()
            total += int(fields[3]) + int(fields[11])
    return total


def unaccelerated(node: NodeCounts) -> list[str]:
    """Return what is wrong with the express path of a node, at the end of the run."""
    moved = node.kernel["sent"], node.kernel["received"]
    if not node.express:
        return [f"{node.name}: the express path is off, but moved {moved}"] if any(moved) else []
    if node.daemon.rss and not all(moved):
        return [f"{node.name}: the express path sent {moved[0]} packets and received {moved[1]}"]
    return []
