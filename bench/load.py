"""udpload and a bulk stream between the ends of a road.

Owns: their command lines, and the reading of what they print. Refuses to know: what is compared.
"""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from udptun.lab import Host, LabError, Process, wait_for

from .contenders import Road
from .tools import program

PORT = 7700
_BULK_PORT = 5301
_runs = itertools.count(1)


def udpload(host: Host, what: str, address: object, *options: object, port: int = PORT) -> Process:
    argv = [str(program("udpload")), what, str(address), str(port), *map(str, options)]
    return host.start(argv, name=f"udpload-{what}")


def answer(process: Process, seconds: float) -> dict[str, Any]:
    """The JSON it printed at its end."""
    code = process.wait(seconds)
    lines = process.text().splitlines()
    if code != 0 or not lines:
        raise LabError(f"{process} ended with {code}: {process.text().strip()}")
    result: dict[str, Any] = json.loads(lines[-1])
    return result


@contextlib.contextmanager
def echo(road: Road) -> Iterator[None]:
    """An echo for UDP and TCP on host b."""
    process = udpload(road.b, "echo", road.at_b)
    try:
        process.wait_for_output("ready")
        yield
    finally:
        process.kill()


def round_trips(
    road: Road, *, seconds: float, tcp: bool = False, interval_us: int = 0, size: int = 64
) -> dict[str, Any]:
    options = ["--seconds", seconds, "--size", size]
    if interval_us:
        options += ["--interval-us", interval_us]
    if tcp:
        options.append("--tcp")
    return answer(udpload(road.a, "ping", road.at_b, *options), seconds + 20)


@contextlib.contextmanager
def bulk(road: Road, seconds: float, congestion: str | None = None) -> Iterator[None]:
    """One TCP stream from a to b, as fast as it goes, for at most ``seconds``."""
    argv = ["iperf3", "-s", "-1", "-B", str(road.at_b), "-p", str(_BULK_PORT), "--forceflush"]
    server = road.b.start(argv, name="bulk-server")
    try:
        server.wait_for_output("Server listening")
        argv = ["iperf3", "-c", str(road.at_b), "-p", str(_BULK_PORT), "-t", str(int(seconds) + 1)]
        argv += ["--forceflush", "-i", "0.2", *(["-C", congestion] if congestion else [])]
        client = road.a.start(argv, name="bulk-client")
        try:
            # The second line of figures: past the slow start.
            wait_for(lambda: client.text().count("bits/sec") > 1, "the bulk stream to flow")
            yield
            if not client.alive:
                raise LabError(f"the bulk stream ended early: {client.text().strip()}")
        finally:
            client.kill()
    finally:
        server.kill()


def stream(
    road: Road, *, seconds: float, rate: int = 0, size: int = 64, spread: int = 1,
    address: object = None, listen: object = None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Datagrams from a to b: what the sender said, and what the receiver said of the same run."""
    receiver, run = start_receiver(road, seconds + 10, address=listen)
    try:
        sender = start_sender(
            road, run, seconds=seconds, rate=rate, size=size, spread=spread, address=address
        )
        sent = answer(sender, seconds + 20)
        received = answer(receiver, 20)
    finally:
        receiver.kill()
    return sent, received


def start_receiver(
    road: Road, seconds: float, record: Path | None = None, address: object = None
) -> tuple[Process, int]:
    """One that is ready, and the number of its run."""
    run = next(_runs)
    options: list[object] = ["--run", run, "--seconds", seconds]
    if record:
        options += ["--record", record]
    receiver = udpload(road.b, "receive", address or road.at_b, *options)
    receiver.wait_for_output("ready")
    return receiver, run


def start_sender(
    road: Road, run: int, *, seconds: float, rate: int = 0, size: int = 64, spread: int = 1,
    address: object = None,
) -> Process:
    options: list[object] = ["--run", run, "--seconds", seconds, "--size", size]
    if rate:
        options += ["--rate", rate]
    if spread > 1:
        options += ["--spread", spread]
    return udpload(road.a, "send", address or road.at_b, *options)
