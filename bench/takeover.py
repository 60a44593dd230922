"""What a take-over and a kill of the forwarder cost the traffic: lost datagrams and longest gaps.

    python -m bench takeover [--count 100] [--kills 100] [--rate PPS]

Two nodes with a forwarder each. Host a sends evenly paced datagrams of 64 bytes to host b.

- *take-over*: a new forwarder takes over on host a, then on host b, and so on. The rate is the
  highest of RATES at which CONTROL_RUNS runs without a take-over lose nothing.
- *bulk TCP*: few datagrams, and at the same time a TCP stream at full rate.
- *kill*: the forwarder of host a is killed with SIGKILL at KILL_RATE datagrams a second. This
  program has copies of its descriptors and a standby process, as the node daemon has. The standby
  process continues with them.
- *kill, new*: the same, but a new process is started with the copies, as systemd does.

A gap is defined as in bench/metrics/gap.py: the time between two arrivals, less the time between
the two transmissions. The window of an event is from its begin until the new forwarder is ready.
The control is the longest gap in a window of the same length before it, but at most PAUSE_SECONDS.
It ends MARGIN_NS earlier, so that the gap of the event is not counted in it too. Lost datagrams are
counted by the sender and the receiver. Needs root. Main thread only, like udptun.lab.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from udptun.lab import Forwarder, Lab, LabError, Pair, Process, Side, pair, wait_for
from udptun.lab.hosts import NETNS_DIR
from udptun.takeover import standby
from udptun.takeover.channel import Channel, close_all
from udptun.takeover.kept import variable
from udptun.takeover.message import DESCRIPTORS, Hello

from . import system
from .load import json_result, udpload
from .metrics.gap import arrivals, longest_gap

RATES = (200_000, 150_000, 100_000, 70_000, 50_000, 30_000, 20_000, 10_000, 5_000)
CONTROL_RUNS = 3
CONTROL_SECONDS = 3.0
BESIDE_TCP_RATE = 1000
KILL_RATE = 10_000
SIZE = 64
BATCH = 10  # events of one run of the generator
PAUSE_SECONDS = 0.5  # between two events
MARGIN_NS = 50_000_000
SETTLE_SECONDS = 0.5
PORT = 7700


@dataclass
class Result:
    """What was measured in all runs of one kind. Times in ns."""

    name: str
    rate: int
    sent: int = 0
    received: int = 0
    gaps: list[int] = field(default_factory=list)
    quiet: list[int] = field(default_factory=list)

    def line(self) -> str:
        gaps, quiet = sorted(self.gaps), sorted(self.quiet)
        return (
            f"{self.name:10} {len(gaps):4} at {self.rate:7,}/s: {self.sent - self.received} of "
            f"{self.sent:,} lost; gap p50 {_ms(gaps[len(gaps) // 2])} max {_ms(gaps[-1])} ms; "
            f"control p50 {_ms(quiet[len(quiet) // 2])} max {_ms(quiet[-1])} ms; longest gap over "
            f"its own control {_ms(max(g - q for g, q in zip(self.gaps, self.quiet, strict=True)))}"
            " ms"
        )


def run(count: int, kills: int, rate: int) -> Iterator[str]:
    """Measure. Yield each line for the terminal when it is known.

    rate  datagrams a second; 0: search it
    """
    yield f"kernel {system.facts()['kernel']}, load average {os.getloadavg()[0]:.1f}"
    with Lab() as lab:
        tunnel = pair(lab)
        bench = _Bench(tunnel)
        if count:
            rate = rate or bench.highest_rate()
            yield bench.take_overs("take-over", rate, count).line() + bench.lost_between()
            with _bulk(tunnel):
                line = bench.take_overs("bulk TCP", BESIDE_TCP_RATE, count).line()
            yield line + bench.lost_between()
        if kills:
            yield bench.kills("kill", _kill, kills).line()
            yield bench.kills("kill, new", _kill_without_standby, kills).line()
    yield f"load average {os.getloadavg()[0]:.1f} at the end"


class _Bench:
    def __init__(self, tunnel: Pair) -> None:
        self.tunnel = tunnel
        self._runs = iter(range(1, 1 << 30))
        self._record = tunnel.lab.folder / "takeover.bin"

    def highest_rate(self) -> int:
        for rate in RATES:
            for _ in range(CONTROL_RUNS):
                sent, received = self._stream(rate, lambda: time.sleep(CONTROL_SECONDS))
                if sent != received:
                    break
            else:
                return rate
        raise LabError(f"even {RATES[-1]} datagrams a second are lost without a take-over")

    def take_overs(self, name: str, rate: int, count: int) -> Result:
        sides = self.tunnel.sides

        def event(index: int) -> Callable[[], None]:
            return lambda: _take_over(sides[index % 2])

        return self._events(name, rate, count, event)

    def kills(
        self, name: str, kill: Callable[[Side], Callable[[], None]], count: int
    ) -> Result:
        return self._events(name, KILL_RATE, count, lambda _: kill(self.tunnel.a))

    def _events(
        self, name: str, rate: int, count: int, prepare: Callable[[int], Callable[[], None]]
    ) -> Result:
        """``prepare`` returns the event."""
        result = Result(name, rate)
        windows: list[tuple[int, int]] = []

        def batch() -> None:
            time.sleep(2.0)
            for _ in range(min(BATCH, count - len(result.gaps) - len(windows))):
                event = prepare(len(result.gaps) + len(windows))
                time.sleep(PAUSE_SECONDS)
                begin = time.time_ns()
                event()
                windows.append((begin, time.time_ns()))

        while len(result.gaps) < count:
            windows.clear()
            sent, received = self._stream(rate, batch)
            result.sent, result.received = result.sent + sent, result.received + received
            recorded = arrivals(self._record.read_bytes())
            for begin, end in windows:
                length = min(end - begin, int(PAUSE_SECONDS * 1e9) - MARGIN_NS)
                result.gaps.append(longest_gap(recorded, begin, end))
                quiet = begin - MARGIN_NS
                result.quiet.append(longest_gap(recorded, quiet - length, quiet))
        return result

    def _stream(self, rate: int, work: Callable[[], None]) -> tuple[int, int]:
        """Send while ``work`` runs. Return the numbers of sent and of received datagrams."""
        a, b, run_id = self.tunnel.a, self.tunnel.b, next(self._runs)
        receiver = udpload(b.host, "receive", b.v4, "--run", run_id, "--seconds", 600, "--record",
                           self._record, port=PORT)
        receiver.wait_for_output("ready")
        try:
            sender = udpload(a.host, "send", b.v4, "--run", run_id, "--seconds", 600, "--size",
                             SIZE, "--rate", rate, port=PORT)
            work()
            return self._end(sender, receiver)
        finally:
            receiver.kill()

    def _end(self, sender: Process, receiver: Process) -> tuple[int, int]:
        """End the sender with SIGTERM, after which it reports what it has sent."""
        sender.signal(15)
        sent = json_result(sender, 30)["sent"]
        return sent, json_result(receiver, 60)["received"]

    def lost_between(self) -> str:
        """Say how many packets the forwarder of host a has sent, and that of host b has not
        received, since the start. The counters continue over a take-over, but not over a kill."""
        def lost() -> int:
            a, b = (side.forwarder.status()["packets"] for side in self.tunnel.sides)
            return int(a["encap"]["delivered"]) - int(b["decap"]["read"])

        time.sleep(SETTLE_SECONDS)  # the last packets arrive
        return f"; {lost()} lost between the forwarders"


def _take_over(side: Side) -> None:
    old = side.forwarder
    new = Forwarder.start(
        side.host, **side.options | {"extra": ["--take-over"], "wait": False, "routes": None})
    wait_for(lambda: not (old.process.alive and new.process.alive), "the end of a forwarder")
    if old.process.alive or old.process.returncode:
        raise LabError(f"the take-over failed: {new.process.text()}\n{old.process.text()}")
    side.forwarder = new


def _kill(side: Side) -> Callable[[], None]:
    ours, theirs = standby.waiting_pair()
    with theirs:
        new = Forwarder.start(side.host, **side.options | {
            "extra": ["--standby", str(theirs.fileno())], "pass_fds": (theirs.fileno(),),
            "wait": False})
    standby.wait_loaded(ours)
    if not new.process.alive:
        raise LabError(f"the standby process has ended: {new.process.text()}")
    kept = asyncio.run(copies(side.forwarder))

    def event() -> None:
        side.forwarder.process.kill()
        with ours:
            standby.begin(ours, kept)
        close_all(kept)
        side.forwarder = new
        new.wait_ready()

    return event


def _kill_without_standby(side: Side) -> Callable[[], None]:
    kept = asyncio.run(copies(side.forwarder))

    def event() -> None:
        side.forwarder.process.kill()
        side.start(pass_fds=tuple(kept.values()), env=variable(kept))
        close_all(kept)

    return event


async def copies(forwarder: Forwarder) -> dict[str, int]:
    """Return copies of a forwarder's descriptors, as the node daemon has them."""
    control: Path = forwarder.control
    channel = await Channel.connect(control.with_name(f"{control.stem}.takeover.sock"))
    namespace = (NETNS_DIR / forwarder.host.namespace).stat().st_ino
    try:
        await channel.send(Hello(DESCRIPTORS, namespace=namespace))
        return await channel.receive_descriptors()
    finally:
        channel.close()


@contextlib.contextmanager
def _bulk(tunnel: Pair) -> Iterator[None]:
    a, b = tunnel.sides
    server = b.host.start(["iperf3", "-s", "-1", "-B", str(b.v4), "--forceflush"])
    server.wait_for_output("Server listening")
    client = a.host.start(["iperf3", "-c", str(b.v4), "-t", "3600", "--forceflush"])
    try:
        wait_for(lambda: "bits/sec" in client.text(), "the TCP stream")
        yield
        if not client.alive:
            raise LabError(f"the TCP stream ended: {client.text()}")
    finally:
        client.kill()
        server.kill()


def _ms(ns: int) -> str:
    return f"{ns / 1e6:.2f}"
