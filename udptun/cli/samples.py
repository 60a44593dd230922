"""Samples of what the node daemon and the forwarder answer, and the rates between two samples.

Owns the computation of all rates that ``udptun status -w``, ``top`` and ``web`` show. A rate that
was not measured is None: at the first sample, and after a counter has begun again. Opens no
connection: the callers pass clients. Threading: as the clients.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Iterable, Mapping
from copy import copy
from typing import TYPE_CHECKING, Any

from ..errors import NoForwarder
from .answers import Answers, ask
from .mesh import Row

if TYPE_CHECKING:
    from ..control.client import ControlClient

HISTORY_SECONDS = 60.0

Pair = tuple[float | None, float | None]  # sent and received, per second
UNKNOWN: Pair = (None, None)


class Sample:
    """Everything that is shown, at one time.

    drops   the drop counts of the forwarder
    vxlan   bytes sent and received by each VXLAN device
    at      monotonic time
    wall    wall clock time
    """

    def __init__(self, answers: Answers, drops: list[dict[str, Any]]) -> None:
        self.node, self.forwarder, self.rows = answers.node, answers.forwarder, answers.rows
        self.drops, self.vxlan = drops, vxlan_bytes(answers.node)
        self.at, self.wall = time.monotonic(), time.time()

    @property
    def pid(self) -> int | None:
        """The process of the forwarder."""
        return None if self.forwarder is None else int(self.forwarder["pid"])


def host_name(sample: Sample | None) -> str:
    """Return the name of this host, with that of its lease if the two differ."""
    name = os.uname().nodename
    key = None if sample is None or sample.node is None else sample.node["key"]
    return name if key in (None, name) else f"{name} ({key})"


def take(node: ControlClient, forwarder: ControlClient) -> Sample:
    """Ask for everything. Raises NoForwarder if neither the daemon nor the forwarder answers."""
    answers, drops = ask(node, forwarder), list[dict[str, Any]]()
    if answers.forwarder is not None:
        try:
            drops = [*forwarder.drops()]
        except NoForwarder:  # it has ended since
            answers = Answers(answers.node, None)
    return Sample(answers, drops)


def vxlan_bytes(node: Mapping[str, Any] | None) -> dict[str, tuple[int, int]]:
    """Return the bytes sent and received by each VXLAN device, as the node daemon reports them."""
    found: dict[str, dict[str, int]] = {}
    for count in () if node is None else node.get("devices", ()):
        if count["path"] == "vxlan":
            found.setdefault(count["device"], {})[count["direction"]] = count["bytes"]
    return {device: (sides["encap"], sides["decap"]) for device, sides in found.items()}


class Change:
    """What happened between two samples.

    peers       bytes per second to and from each peer over UDP, by name
    total       the same for all peers together
    vxlan       bytes per second of each VXLAN device
    packets     packets per second, sent and received by the forwarder
    kernel      those of them that passed in the kernel
    batch       packets of the workers for each system call that sends, and for each that receives
    cpu         the share of a CPU that each worker used
    drops       packets per second, by reason and direction
    """

    def __init__(self, before: Sample | None, now: Sample) -> None:
        self.peers: dict[str, Pair] = {}
        self.total: Pair = UNKNOWN
        self.packets: Pair = UNKNOWN
        self.kernel: Pair = UNKNOWN
        self.batch: Pair = UNKNOWN
        self.vxlan: dict[str, Pair] = dict.fromkeys(now.vxlan, UNKNOWN)
        self.cpu: list[float | None] = []
        self.drops: dict[tuple[str, str], float | None] = {}
        if before is None or now.at <= before.at:
            return
        seconds = now.at - before.at
        self.peers = peer_rates(before.rows, now.rows, seconds)
        pairs = self.peers.values()
        self.total = total(out for out, _ in pairs), total(into for _, into in pairs)
        for device, counts in now.vxlan.items():
            self.vxlan[device] = _pair(before.vxlan.get(device), counts, seconds)
        if before.forwarder is not None and now.forwarder is not None:
            self._forwarder(before.forwarder, now.forwarder, seconds)
            self._drops(before, now, seconds)

    def _forwarder(
        self, before: Mapping[str, Any], now: Mapping[str, Any], seconds: float
    ) -> None:
        self.packets = _pair(_packets(before), _packets(now), seconds)
        calls = _pair(_calls(before), _calls(now), seconds)
        self.kernel = _pair(_in_kernel(before), _in_kernel(now), seconds)
        passed = _pair(_by_workers(before), _by_workers(now), seconds)
        self.batch = _share(passed[0], calls[0]), _share(passed[1], calls[1])
        same = before["pid"] == now["pid"]  # another process begins again at 0
        old = {worker["index"]: worker.get("cpu_seconds") for worker in before["workers"]}
        for worker in now["workers"]:
            had = old.get(worker["index"]) if same else None
            self.cpu.append(rate(had, worker.get("cpu_seconds"), seconds))

    def _drops(self, before: Sample, now: Sample, seconds: float) -> None:
        old = {(drop["reason"], drop["direction"]): drop["packets"] for drop in before.drops}
        self.drops = {
            (key := (drop["reason"], drop["direction"])): rate(
                old.get(key), drop["packets"], seconds)
            for drop in now.drops}


def peer_rates(before: list[Row], now: list[Row], seconds: float) -> dict[str, Pair]:
    """Return the bytes per second to and from each peer, by name."""
    former = {row["name"]: row for row in before}
    return {
        row["name"]: (_bytes(former[row["name"]]["sent"], row["sent"], seconds),
                      _bytes(former[row["name"]]["received"], row["received"], seconds))
        for row in now if row["name"] in former}


def rate(was: float | None, now: float | None, seconds: float) -> float | None:
    """None: not counted, or the counter began again."""
    return None if was is None or now is None or now < was else (now - was) / seconds


def _bytes(
    was: Mapping[str, int] | None, now: Mapping[str, int] | None, seconds: float
) -> float | None:
    return rate(was["bytes"] if was else None, now["bytes"] if now else None, seconds)


def _pair(was: tuple[int, int] | None, now: tuple[int, int], seconds: float) -> Pair:
    return UNKNOWN if was is None else (
        rate(was[0], now[0], seconds), rate(was[1], now[1], seconds))


def _share(number: float | None, calls: float | None) -> float | None:
    return number / calls if number is not None and calls else None


def total(rates: Iterable[float | None]) -> float | None:
    """Return the sum; None: no rate is known."""
    known = [rate for rate in rates if rate is not None]
    return sum(known) if known else None


def _packets(status: Mapping[str, Any]) -> tuple[int, int]:
    packets = status["packets"]
    return packets["encap"]["delivered"], packets["decap"]["read"]


def _by_workers(status: Mapping[str, Any]) -> tuple[int, int]:
    """Return the packets that passed the workers. The others passed in the kernel."""
    (sent, received), kernel = _packets(status), _in_kernel(status)
    return sent - kernel[0], received - kernel[1]


def _in_kernel(status: Mapping[str, Any]) -> tuple[int, int]:
    kernel = status.get("accelerate", {}).get("packets", {})
    return kernel.get("sent", 0), kernel.get("received", 0)


def _calls(status: Mapping[str, Any]) -> tuple[int, int]:
    calls = [worker["syscalls"] for worker in status["workers"]]
    return sum(one["send"] for one in calls), sum(one["receive"] for one in calls)


class History:
    """The last samples, and the rates of each peer in the last minute.

    interval  seconds between two samples
    length    the number of samples in a minute
    """

    def __init__(self, interval: float) -> None:
        self.sample: Sample | None = None
        self.change: Change | None = None
        self.length = max(int(HISTORY_SECONDS / interval), 1)
        self.peers: dict[str, deque[Pair]] = {}

    def add(self, sample: Sample | None) -> None:
        """Add the newest sample. None: nothing answered."""
        self.change = None if sample is None else Change(self.sample, sample)
        self.sample = sample
        rates = {} if self.change is None else self.change.peers
        for name in self.peers.keys() | rates.keys():
            kept = self.peers.setdefault(name, deque(maxlen=self.length))
            kept.append(rates.get(name, UNKNOWN))
            if all(pair == UNKNOWN for pair in kept):
                del self.peers[name]

    def copy(self) -> History:
        """Return a history that no longer changes."""
        same = copy(self)
        same.peers = {name: kept.copy() for name, kept in self.peers.items()}
        return same
