"""Load generators on a path under test: bench/udpload and a bulk TCP stream by iperf3.

Owns: the command lines of the generators, and the parsing of their output. Independent of the
contender. Main thread only, like udptun.lab.
"""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from udptun.lab import Host, LabError, Process, wait_for

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


@contextlib.contextmanager
def bulk(path: PathUnderTest, seconds: float, congestion: str | None = None) -> Iterator[None]:
    """Run one TCP stream from a to b at full rate, for at most ``seconds``."""
    argv = ["iperf3", "-s", "-1", "-B", str(path.at_b), "-p", str(_BULK_PORT), "--forceflush"]
    server = path.b.start(argv, name="bulk-server")
    try:
        server.wait_for_output("Server listening")
        argv = ["iperf3", "-c", str(path.at_b), "-p", str(_BULK_PORT), "-t", str(int(seconds) + 1)]
        argv += ["--forceflush", "-i", "0.2", *(["-C", congestion] if congestion else [])]
        client = path.a.start(argv, name="bulk-client")
        try:
            # When iperf3 has printed its second interval line, TCP slow start has ended.
            wait_for(lambda: client.text().count("bits/sec") > 1, "the bulk TCP stream to start")
            yield
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
