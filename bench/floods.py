"""What a flood of forged ICMP errors costs: lost packets of the flooded node.

    python -m bench floods [--rate PPS] [--seconds N]

Two nodes with a forwarder each. Datagrams of 64 bytes go from the flooded node to the other node,
and then in the other direction. The other node sends ICMP errors that quote the tunnel's datagrams
(bench/icmpflood.c). The rate of the datagrams is the highest of RATES at which CONTROL_RUNS runs
without a flood lose no datagram. Needs root. Main thread only, like udptun.lab.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

from udptun.lab import Lab, LabError, pair
from udptun.lab.pair import Side

from . import system
from .load import json_result, udpload
from .tools import program

RATES = (100_000, 70_000, 50_000, 30_000, 20_000, 10_000, 5_000, 2_000)
CONTROL_RUNS = 3
SIZE = 64
TUNNEL_PORT = 8285
PORT = 7700


def run(flood_rate: int, seconds: float) -> Iterator[str]:
    """Measure. Yield each line for the terminal when it is known."""
    yield f"kernel {system.facts()['kernel']}, load average {os.getloadavg()[0]:.1f}"
    with Lab() as lab:
        a, b = pair(lab).sides
        for name, source, target in (("sends", a, b), ("receives", b, a)):
            rate = _highest_rate(source, target, seconds)
            flood = b.host.start([
                str(program("icmpflood")), str(a.outer), str(b.outer), str(TUNNEL_PORT),
                str(flood_rate), str(seconds + 2),
            ], name="icmpflood")
            sent, received = _stream(source, target, rate, seconds)
            if flood.wait(seconds + 60) != 0:
                raise LabError(f"icmpflood failed: {flood.text().strip()}")
            errors = int(flood.text().split()[-1])
            (worker,) = a.forwarder.status()["workers"]
            yield (
                f"the flooded node {name:8} {rate:,}/s: {sent - received} of {sent:,} lost; "
                f"{errors / (seconds + 2):,.0f} ICMP errors/s, {CONTROL_RUNS} runs without them "
                f"lost 0; floods noticed so far: {worker.get('icmp_floods')}"
            )
    yield f"load average {os.getloadavg()[0]:.1f} at the end"


def _highest_rate(source: Side, target: Side, seconds: float) -> int:
    for rate in RATES:
        for _ in range(CONTROL_RUNS):
            sent, received = _stream(source, target, rate, seconds)
            if sent != received:
                break
        else:
            return rate
    raise LabError(f"even at {RATES[-1]} datagrams a second, some are lost without a flood")


def _stream(source: Side, target: Side, rate: int, seconds: float) -> tuple[int, int]:
    """Send for some seconds. Return the numbers of sent and of received datagrams."""
    receiver = udpload(target.host, "receive", target.v4, "--run", 1, "--seconds", seconds + 30,
                       port=PORT)
    receiver.wait_for_output("ready")
    try:
        sender = udpload(source.host, "send", target.v4, "--run", 1, "--seconds", seconds,
                         "--size", SIZE, "--rate", rate, port=PORT)
        sent = json_result(sender, seconds + 30)
        received = json_result(receiver, seconds + 30)
    finally:
        receiver.kill()
    return int(sent["sent"]), int(received["received"])
