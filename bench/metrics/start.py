"""Start-up: from the start of the ``udptun forward`` process to the first packet that arrives.

Host a sends a datagram every millisecond to b's address in the overlay, which host a has no way
to before its forwarder is there. The arrival is stamped by b's kernel. Included are the few
milliseconds of ``ip netns exec``; b's forwarder is up all the time.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from ..blocks import Measured, Refused, Series, run_blocks
from ..contenders import Road
from ..load import answer, start_receiver, start_sender
from ..session import Session
from .gap import rows
from .plan import Plan

_RATE_PPS = 1000
_BEFORE_SECONDS = 0.1


@dataclass(frozen=True)
class Start:
    """The slot."""

    seconds: int

    def __call__(self, road: Road) -> Measured:
        if road.restart is None:
            raise Refused("only udptun can be started anew here")
        road.forwarders[0].stop()
        record = Path(road.a.lab.folder) / "start.bin"
        receiver, run = start_receiver(road, self.seconds + 30, record)
        try:
            sender = start_sender(road, run, seconds=self.seconds + 1, rate=_RATE_PPS)
            time.sleep(_BEFORE_SECONDS)
            begin = time.time_ns()
            forwarder = road.restart()
            road.forwarders = (forwarder, *road.forwarders[1:])
            sent = answer(sender, self.seconds + 20)
            received = answer(receiver, 20)
        finally:
            receiver.kill()
        forwarder.wait_ready()
        recorded = rows(record.read_bytes())
        if not sent["refused"]:
            raise Refused("there was a way before the start")
        if not recorded or recorded[0][2] < begin:
            raise Refused(f"no packet arrived within {self.seconds} s: {sent} {received}")
        first = recorded[0][2] - begin
        return Measured({"start_ns": float(first)}, (received["bytes"], 0), {"sent": sent})


def run(s: Session, plan: Plan) -> None:
    for profile in plan.profiles:
        run_blocks(
            s, Series("start", profile, ""), plan.contenders, Start(plan.seconds),
            blocks=plan.blocks, slot_seconds=plan.seconds + 1.5, mirrored=False,
        )
