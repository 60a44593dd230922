"""Lost packets when the forwarder is killed with SIGKILL and no other forwarder takes its place.

Host a sends 10,000 datagrams of 64 bytes per second to host b. In the middle, the forwarder of a is
killed. This program holds copies of its descriptors, as the node daemon does, so its TUN and its
programs stay. The express path then carries the packets alone until the sender ends. Afterwards a
new forwarder starts with the copies. Without the express path, all packets after the kill are lost.
Needs udptun on both hosts.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from dataclasses import dataclass

from udptun.takeover.channel import close_all

from ..blocks import Job, Refused, Series, SlotResult
from ..contenders import PathUnderTest
from ..load import json_result, start_receiver, start_sender
from ..takeover import copies
from .metric import Metric, Plan

_RATE_PPS = 10_000


@dataclass(frozen=True)
class Kill:
    """One slot: one measurement of one contender (see ``bench.blocks``)."""

    seconds: int

    def __call__(self, path: PathUnderTest) -> SlotResult:
        if path.restart is None:
            raise Refused(f"{path.name} cannot be restarted; this metric needs udptun")
        killed = path.forwarders[0]
        kept = asyncio.run(copies(killed))
        try:
            receiver, run = start_receiver(path, self.seconds + 30)
            try:
                sender = start_sender(path, run, seconds=self.seconds, rate=_RATE_PPS)
                time.sleep(self.seconds / 2)
                killed.process.kill()
                if not sender.alive:
                    raise Refused("the sender ended before the forwarder was killed")
                sent = json_result(sender, self.seconds + 20)
                received = json_result(receiver, 30)
            finally:
                receiver.kill()
                if not killed.process.alive:  # also after an error: the next slot needs the path
                    path.forwarders = (path.restart(kept), *path.forwarders[1:])
                    path.wait_forwarding()
        finally:
            close_all(kept)
        lost = float(sent["sent"] - received["received"])
        return SlotResult({"lost_packets": lost}, (received["bytes"], 0),
                          {"sent": sent, "returned": received["received"]})


def jobs(plan: Plan) -> Iterator[Job]:
    for profile in plan.profiles:
        yield Job(
            Series("kill", profile, ""), plan.contenders, Kill(plan.seconds), plan.blocks,
            slot_seconds=plan.seconds + 1.2, mirrored=False,
        )


METRIC = Metric(
    "kill", "lost packets when the forwarder is killed and nothing takes its place", jobs,
    programs=("udptun",),
)
