"""Start-up: ns from the start of the ``udptun forward`` process to the first forwarded packet.

Host a sends one datagram per millisecond to b's overlay address. Host a has no route to this
address until the forwarder on a has started. The forwarder on b runs all the time. The kernel of b
timestamps the first arrival. The time includes ``ip netns exec``, which takes a few milliseconds.
Needs udptun on both hosts.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..blocks import Job, Refused, Series, SlotResult
from ..contenders import PathUnderTest
from ..contenders.base import NOTHING
from ..load import json_result, start_receiver, start_sender
from .gap import arrivals
from .metric import Metric, Plan

_RATE_PPS = 1000
_SEND_AHEAD_SECONDS = 0.1


@dataclass(frozen=True)
class Start:
    """One slot: one measurement of one contender (see ``bench.blocks``)."""

    seconds: int

    def __call__(self, path: PathUnderTest) -> SlotResult:
        if path.restart is None:
            raise Refused(f"{path.name} cannot be restarted; this metric needs udptun")
        path.forwarders[0].stop()
        record = Path(path.a.lab.folder) / "start.bin"
        receiver, run = start_receiver(path, self.seconds + 30, record)
        try:
            sender = start_sender(path, run, seconds=self.seconds + 1, rate=_RATE_PPS)
            time.sleep(_SEND_AHEAD_SECONDS)
            begin = time.time_ns()
            forwarder = path.restart(NOTHING)
            path.forwarders = (forwarder, *path.forwarders[1:])
            sent = json_result(sender, self.seconds + 20)
            received = json_result(receiver, 20)
        finally:
            receiver.kill()
        path.wait_forwarding()
        recorded = arrivals(record.read_bytes())
        send_errors = sent["refused"]  # failed sends; expected, because there is no route yet
        if not send_errors:
            raise Refused("host a had a route to b before the forwarder started")
        if not recorded:
            raise Refused(f"no packet arrived within {self.seconds} s: {sent} {received}")
        if recorded[0][2] < begin:
            raise Refused(f"a packet arrived before the forwarder started: {sent} {received}")
        first = recorded[0][2] - begin
        return SlotResult({"start_ns": float(first)}, (received["bytes"], 0), {"sent": sent})


def jobs(plan: Plan) -> Iterator[Job]:
    for profile in plan.profiles:
        yield Job(
            Series("start", profile, ""), plan.contenders, Start(plan.seconds),
            blocks=plan.blocks, slot_seconds=plan.seconds + 1.2, mirrored=False,
        )


METRIC = Metric(
    "start", "time from the start of udptun forward to the first forwarded packet", jobs,
    programs=("udptun",),
)
