"""Load generators on a path under test: bench/udpload, ping, a bulk TCP stream, busy CPU cores.

Owns: the command lines of the generators, and the parsing of their output. Independent of the
contender. Main thread only, like udptun.lab.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from udptun.lab import Host, LabError, Process, wait_for

from . import stats
from .contenders import PathUnderTest
from .tools import program

PORT = 7700
_BULK_PORT = 5301
_runs = itertools.count(1)


def udpload(
    host: Host, command: str, address: object, *options: object, port: int = PORT
) -> Process:
    """Start udpload with one of its commands: echo, ping, receive or send."""
    argv = [str(program("udpload")), command, str(address), str(port), *map(str, options)]
    return host.start(argv, name=f"udpload-{command}")


def json_result(process: Process, seconds: float) -> dict[str, Any]:
    """Wait until the process ends, and return the JSON of its last line."""
    code = process.wait(seconds)
    lines = process.text().splitlines()
    if code != 0 or not lines:
        raise LabError(f"{process} exited with {code}: {process.text().strip()}")
    result: dict[str, Any] = json.loads(lines[-1])
    return result


@contextlib.contextmanager
def echo(path: PathUnderTest) -> Iterator[None]:
    """Run a UDP and TCP echo server on host b."""
    process = udpload(path.b, "echo", path.at_b)
    try:
        process.wait_for_output("ready")
        yield
    finally:
        process.kill()


def round_trips(
    path: PathUnderTest, *, seconds: float, tcp: bool = False, interval_us: int = 0, size: int = 64
) -> dict[str, Any]:
    """Send requests from a to the echo server on b; return udpload's round-trip quantiles.

    interval_us  the time between two requests; 0: each request waits for the previous reply
    """
    options = ["--seconds", seconds, "--size", size]
    if interval_us:
        options += ["--interval-us", interval_us]
    if tcp:
        options.append("--tcp")
    return json_result(udpload(path.a, "ping", path.at_b, *options), seconds + 20)


# The quantiles that udpload prints.
_QUANTILES = (0, .01, .05, .1, .2, .3, .4, .5, .6, .7, .8, .9, .95, .98, .99, .995, .999, 1)


def pings(path: PathUnderTest, *, seconds: float, interval_us: int, size: int) -> dict[str, Any]:
    """Ping b from a with ping(8), and return what ``round_trips`` returns.

    The kernel of b answers, so no program there has to be scheduled.
    """
    process = path.a.start([
        *("ping", "-n", "-i", f"{interval_us / 1e6:g}", "-c", f"{seconds * 1e6 / interval_us:.0f}"),
        *("-w", f"{seconds + 1:.0f}", "-W", "1", "-s", str(size), str(path.at_b)),
    ])
    process.wait(seconds + 30)
    return ping_result(process.text())


def ping_result(text: str) -> dict[str, Any]:
    """Parse the output of ping(8); LabError if ping has sent nothing."""
    counts = re.search(r"(\d+) packets transmitted, (\d+) received", text)
    if counts is None:
        raise LabError(f"ping: {text.strip()}")
    times = [float(ms) * 1e6 for ms in re.findall(r" time=([\d.]+) ms", text)]
    quantiles = [[q, stats.quantile(times, q)] for q in _QUANTILES] if times else []
    named = {f"p{name}_ns": stats.quantile(times, q)
             for name, q in (("50", .5), ("99", .99), ("999", .999)) if times}
    return {"sent": int(counts[1]), "received": int(counts[2]), "quantiles_ns": quantiles, **named}


class Bulk:
    """A running bulk stream; ``rate`` is what its receiver got since ``mark``."""

    def __init__(self, server: Process) -> None:
        self._server, self._marked = server, 0

    def _rates(self) -> list[float]:
        found = re.findall(r"sec .*? ([\d.]+) Kbits/sec *\n", self._server.text())
        return [float(kbits) * 1e3 for kbits in found]

    def mark(self) -> None:
        self._marked = len(self._rates())

    def rate(self) -> float:
        """Return the bits per second that arrived, from the intervals that iperf3 prints."""
        rates = self._rates()[self._marked:]
        if not rates:
            raise LabError(f"the bulk TCP stream has no interval: {self._server.text().strip()}")
        return statistics.fmean(rates)


@contextlib.contextmanager
def busy(path: PathUnderTest) -> Iterator[None]:
    """Run an endless loop on each CPU core, as other programs of a busy host do."""
    loops = [
        path.a.start(["taskset", "-c", str(cpu), "sh", "-c", "while :; do :; done"], name="busy")
        for cpu in sorted(os.sched_getaffinity(0))
    ]
    try:
        yield
        if not all(loop.alive for loop in loops):
            raise LabError(f"a busy loop has ended: {loops[0].text().strip()}")
    finally:
        for loop in loops:
            loop.kill()


@contextlib.contextmanager
def bulk(path: PathUnderTest, seconds: float, congestion: str | None = None) -> Iterator[Bulk]:
    """Run one TCP stream from a to b at full rate, for at most ``seconds``."""
    argv = ["iperf3", "-s", "-1", "-B", str(path.at_b), "-p", str(_BULK_PORT), "--forceflush"]
    argv += ["-i", "0.2", "-f", "k"]
    server = path.b.start(argv, name="bulk-server")
    try:
        server.wait_for_output("Server listening")
        argv = ["iperf3", "-c", str(path.at_b), "-p", str(_BULK_PORT), "-t", str(int(seconds) + 1)]
        argv += ["--forceflush", "-i", "0.2", *(["-C", congestion] if congestion else [])]
        client = path.a.start(argv, name="bulk-client")
        try:
            # When iperf3 has printed its second interval line, TCP slow start has ended.
            wait_for(lambda: client.text().count("bits/sec") > 1, "the bulk TCP stream to start")
            yield Bulk(server)
            if not client.alive:
                raise LabError(f"the bulk TCP stream ended early: {client.text().strip()}")
        finally:
            client.kill()
    finally:
        server.kill()


def stream(
    path: PathUnderTest, *, seconds: float, rate: int = 0, size: int = 64, spread: int = 1,
    address: object = None, listen: object = None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Send datagrams from a to b; return the sender's and the receiver's result.

    spread  number of destination addresses; ``address`` is the first of them
    """
    receiver, run = start_receiver(path, seconds + 10, address=listen)
    try:
        sender = start_sender(
            path, run, seconds=seconds, rate=rate, size=size, spread=spread, address=address
        )
        sent = json_result(sender, seconds + 20)
        received = json_result(receiver, 20)
    finally:
        receiver.kill()
    return sent, received


def start_receiver(
    path: PathUnderTest, seconds: float, record: Path | None = None, address: object = None
) -> tuple[Process, int]:
    """Start a receiver on b, wait until it is ready; return the receiver and its run number."""
    run = next(_runs)
    options: list[object] = ["--run", run, "--seconds", seconds]
    if record:
        options += ["--record", record]
    receiver = udpload(path.b, "receive", address or path.at_b, *options)
    receiver.wait_for_output("ready")
    return receiver, run


def start_sender(
    path: PathUnderTest, run: int, *, seconds: float, rate: int = 0, size: int = 64,
    spread: int = 1, address: object = None,
) -> Process:
    """Start a sender on a.

    rate    packets per second; 0: full rate
    spread  number of destination addresses; ``address`` is the first of them
    """
    options: list[object] = ["--run", run, "--seconds", seconds, "--size", size]
    if rate:
        options += ["--rate", rate]
    if spread > 1:
        options += ["--spread", spread]
    return udpload(path.a, "send", address or path.at_b, *options)
