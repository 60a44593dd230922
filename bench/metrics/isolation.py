"""Delay and loss of one flow while host a also sends to slow or dead peers, in ns and packets.

Host a sends 1000 evenly paced datagrams per second to host b. In the second half, host a also
sends UDP super-packets to peers that the kernel cannot send to fast enough:

- *N dead*: N peers with addresses on the link that no host has. The kernel holds the datagrams
  until the resolution of the address fails.
- *N Mbit/s*: one peer behind a traffic class of this rate on a's interface.

The delay of a datagram is the time from the send at a to the kernel's timestamp at b. The first
half shows the delays that the machine causes. Needs udptun on both hosts.
"""

from __future__ import annotations

import contextlib
import itertools
import socket
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..blocks import Job, Refused, Series, SlotResult
from ..contenders import PathUnderTest
from ..load import json_result, start_receiver, start_sender
from ..tables import consecutive
from .gap import Arrival, arrivals
from .metric import Metric, Plan

VARIANTS = ("45 dead", "20 Mbit/s")
_RATE_PPS = 1000
_SEGMENT = 1200
_SUPER = bytes(16 * _SEGMENT)
_UDP_SEGMENT = 103  # linux/udp.h
_FLOOD_PER_STEP = 4  # super-packets
_STEP_SECONDS = 0.002
_MIN_ARRIVED = 100


def delays(recorded: Sequence[Arrival], begin_ns: int, end_ns: int) -> list[int]:
    """Return the delays of the datagrams sent in this time, the smallest first."""
    return sorted(at - sent for _, sent, at in recorded if begin_ns <= sent < end_ns)


@dataclass(frozen=True)
class Isolation:
    """One slot: one measurement of one contender (see ``bench.blocks``)."""

    n: int
    dead: bool
    seconds: int

    def __call__(self, path: PathUnderTest) -> SlotResult:
        if path.set_routes is None:
            raise Refused(f"{path.name} has no routes to set; this metric needs udptun")
        with self._slow_peers(path) as prefixes:
            return self._measure(path, prefixes)

    @contextlib.contextmanager
    def _slow_peers(self, path: PathUnderTest) -> Iterator[list[str]]:
        """Route one prefix to each slow or dead peer; yield the prefixes."""
        assert path.set_routes is not None
        network = path.link.a.v4.network
        peers = [network[100 + k] for k in range(self.n if self.dead else 1)]
        prefixes = consecutive("10.244.64.0", len(peers))
        if not self.dead:
            _shape(path, str(peers[0]), self.n)
        try:
            path.set_routes([(p, str(peer)) for p, peer in zip(prefixes, peers, strict=True)])
            yield prefixes
        finally:
            path.set_routes(())
            if not self.dead:
                path.a.run(["tc", "qdisc", "del", "dev", path.link.a.name, "root"], check=False)
                path.a.ip(f"neigh del {peers[0]} dev {path.link.a.name}")

    def _measure(self, path: PathUnderTest, prefixes: list[str]) -> SlotResult:
        record = Path(path.a.lab.folder) / "isolation.bin"
        receiver, run = start_receiver(path, 2 * self.seconds + 30, record)
        try:
            sender = start_sender(path, run, seconds=2 * self.seconds, rate=_RATE_PPS)
            quiet = time.time_ns()
            time.sleep(self.seconds)
            begin = time.time_ns()
            _flood(path, prefixes, self.seconds)
            sent = json_result(sender, 2 * self.seconds + 20)
            received = json_result(receiver, 2 * self.seconds + 60)
        finally:
            receiver.kill()
        recorded = arrivals(record.read_bytes())
        before = delays(recorded, quiet, begin)
        found = delays(recorded, begin, begin + self.seconds * 10**9)
        if len(before) < _MIN_ARRIVED or len(found) < _MIN_ARRIVED:
            raise Refused(f"only {len(before)} and {len(found)} packets arrived in the two halves")
        values = {
            "delay_p50_ns": float(found[len(found) // 2]),
            "delay_p99_ns": float(found[len(found) * 99 // 100]),
            "delay_max_ns": float(found[-1]),
            "quiet_delay_p99_ns": float(before[len(before) * 99 // 100]),
            "quiet_delay_max_ns": float(before[-1]),
            "lost_packets": float(sent["sent"] - received["received"]),
        }
        facts = {"sent": sent, "returned": received["received"]}
        return SlotResult(values, (received["bytes"], 0), facts)


def _shape(path: PathUnderTest, peer: str, mbit: int) -> None:
    """Limit the rate to one peer, whose link address is known."""
    device = path.link.a.name
    path.a.ip(f"neigh replace {peer} lladdr 02:00:00:00:00:01 dev {device}")
    for line in (
        f"qdisc add dev {device} root handle 1: htb default 10",
        f"class add dev {device} parent 1: classid 1:10 htb rate 100gbit quantum 60000",
        f"class add dev {device} parent 1: classid 1:20 htb rate {mbit}mbit quantum 60000",
        f"qdisc add dev {device} parent 1:20 pfifo limit 10000",
        f"filter add dev {device} parent 1: protocol ip u32 match ip dst {peer}/32 flowid 1:20",
    ):
        path.a.run(["tc", *line.split()])


def _flood(path: PathUnderTest, prefixes: Sequence[str], seconds: float) -> None:
    """Send super-packets from a to the first address of each prefix in turn."""
    targets = itertools.cycle(prefix.partition("/")[0] for prefix in prefixes)
    with path.a.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        sender.setsockopt(socket.IPPROTO_UDP, _UDP_SEGMENT, _SEGMENT)
        sender.setblocking(False)
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            for target in itertools.islice(targets, _FLOOD_PER_STEP):
                with contextlib.suppress(BlockingIOError):
                    sender.sendto(_SUPER, (target, 9))
            time.sleep(_STEP_SECONDS)


def jobs(plan: Plan) -> Iterator[Job]:
    for variant in plan.variants or VARIANTS:
        for profile in plan.profiles:
            n, kind = variant.split()
            yield Job(
                Series("isolation", profile, variant), plan.contenders,
                Isolation(int(n), kind == "dead", plan.seconds), blocks=plan.blocks,
                slot_seconds=2 * plan.seconds + 2, mirrored=False,
            )


METRIC = Metric(
    "isolation", "delay and loss of one flow while other peers are slow or dead", jobs, VARIANTS,
    "N dead (N: 1..150) or N Mbit/s (N: 1..10000)", r"(?P<n>\d+) (?P<unit>dead|Mbit/s)",
    {"dead": (1, 150), "Mbit/s": (1, 10000)}, programs=("udptun",),
)
