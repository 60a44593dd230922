"""Routes replaced under load: the longest gap in forwarding meanwhile.

Load: 20,000 datagrams a second from a to b, at a steady pace. Host a's forwarder is told over its
control socket, in JSON, to replace N routes by N others. A gap is how much longer b waited between
two arrivals (stamped by the kernel) than a paused between sending the two: the pauses of the
sender, which shares the cores, are not the tunnel's. The window begins with the request and ends
with its answer, when the new table is in force. A window as long just before it, with nothing to
do, tells what the machine adds by itself. The table that answers is checked.
"""

from __future__ import annotations

import itertools
import json
import time
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from udptun.lab import LabError

from ..blocks import Measured, Refused, Series, run_blocks
from ..contenders import Road
from ..contenders.builtin import put_routes
from ..load import answer, start_receiver, start_sender
from ..session import Session
from .plan import Plan

VARIANTS = ("100000 routes",)
RATE_PPS = 20000
_SETTLE_SECONDS = 0.3

Row = tuple[int, int, int]  # sequence, sent, arrived (ns)


def rows(data: bytes) -> list[Row]:
    """What udpload recorded, in the order of arrival."""
    numbers = array("q", data)
    return list(zip(numbers[0::3], numbers[1::3], numbers[2::3], strict=True))


def longest_gap(recorded: Sequence[Row], begin_ns: int, end_ns: int) -> int:
    """Of the arrivals in the window, and the first one after it; negative without any."""
    longest = -1
    for before, after in itertools.pairwise(recorded):
        if after[2] < begin_ns:
            continue
        longest = max(longest, (after[2] - before[2]) - (after[1] - before[1]))
        if after[2] > end_ns:
            break
    return longest


def table(road: Road, n: int, second: bool) -> bytes:
    """JSON of road a's own routes and ``n`` more; the ``second`` set shares none with the first."""
    base = (10 << 24) + ((128 if second else 64) << 16)
    own = road.forwarders[0].get("/v1/routes")["routes"]
    own = [r for r in own if not r["dst"].startswith("10.") or r["dst"].startswith("10.244.")]
    others = [
        {"dst": f"{x >> 24}.{x >> 16 & 255}.{x >> 8 & 255}.{x & 255}/30", "via": str(road.b.v4)}
        for x in range(base, base + 4 * n, 4)
    ]
    return json.dumps({"routes": [*own, *others]}).encode()


@dataclass(frozen=True)
class Replace:
    """The slot."""

    routes: int
    seconds: int

    def __call__(self, road: Road) -> Measured:
        if not road.forwarders:
            raise Refused("only udptun's control socket is known here")
        forwarder = road.forwarders[0]
        first, second = (table(road, self.routes, which) for which in (False, True))
        put_routes(forwarder, first, "application/json")
        try:
            return self._replace(road, second)
        finally:
            assert road.set_routes is not None
            road.set_routes(())

    def _replace(self, road: Road, body: bytes) -> Measured:
        forwarder = road.forwarders[0]
        record = Path(road.a.lab.folder) / "gap.bin"
        receiver, run = start_receiver(road, self.seconds + 30, record)
        try:
            sender = start_sender(road, run, seconds=self.seconds, rate=RATE_PPS)
            time.sleep(self.seconds / 2)
            begin = time.time_ns()
            said = put_routes(forwarder, body, "application/json")
            end = time.time_ns()
            if not sender.alive:
                raise LabError("the load ended before the routes were replaced")
            sent = answer(sender, self.seconds + 20)
            received = answer(receiver, 20)
        finally:
            receiver.kill()
        if said["added"] < self.routes or said["removed"] < self.routes:
            raise Refused(f"not all {self.routes} routes were replaced: {said}")
        if received["received"] < 0.95 * sent["sent"]:
            raise Refused(f"{received['received']} of {sent['sent']} packets came through")
        recorded = rows(record.read_bytes())
        started = recorded[0][2] + int(_SETTLE_SECONDS * 1e9)
        gap = longest_gap(recorded, begin, end)
        quiet = longest_gap(recorded, max(started, begin - (end - begin)), begin)
        if gap < 0 or quiet < 0:
            raise Refused("no packet arrived in the window")
        values = {"gap_ns": float(gap), "quiet_gap_ns": float(quiet),
                  "apply_ns": float(end - begin)}
        facts = {"answer": said, "sent": sent, "returned": received["received"]}
        return Measured(values, (received["bytes"], 0), facts)


def run(s: Session, plan: Plan) -> None:
    for variant in plan.variants or VARIANTS:
        for profile in plan.profiles:
            run_blocks(
                s, Series("gap", profile, variant), plan.contenders,
                Replace(int(variant.split()[0]), plan.seconds), blocks=plan.blocks,
                slot_seconds=plan.seconds + 2, mirrored=False,
            )
