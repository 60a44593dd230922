"""Longest gap in forwarding while the routes are replaced under load, in ns.

Load: host a sends 20,000 evenly paced datagrams per second to host b. During the load, a PUT
request (JSON) on the control socket of host a's forwarder replaces N routes by N other routes.

A gap belongs to two datagrams that arrive at b one after the other. The gap is the time between the
two arrivals (timestamps of the kernel) minus the time between the two transmissions at a. The
sender shares the CPU cores with the tunnel, so it may pause. The subtraction removes such a pause
from the gap.

The window begins with the request. It ends with the reply: then the new table is active. The
baseline is the longest gap in a window of the same length directly before the request: the machine
causes this gap without a change of routes. Needs udptun on both hosts. The reply must confirm that
all routes were replaced.
"""

from __future__ import annotations

import itertools
import json
import time
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from udptun.lab import LabError

from ..blocks import Job, Refused, Series, SlotResult
from ..contenders import PathUnderTest
from ..contenders.builtin import replace_routes
from ..load import json_result, start_receiver, start_sender
from ..tables import consecutive
from .metric import Metric, Plan

VARIANTS = ("100000 routes",)
RATE_PPS = 20000
_SETTLE_SECONDS = 0.3

Arrival = tuple[int, int, int]  # sequence number, sent (ns), arrived (ns)


def arrivals(data: bytes) -> list[Arrival]:
    """Parse the file of ``udpload receive --record``; the result is in the order of arrival."""
    numbers = array("q", data)
    return list(zip(numbers[0::3], numbers[1::3], numbers[2::3], strict=True))


def longest_gap(recorded: Sequence[Arrival], begin_ns: int, end_ns: int) -> int:
    """Return the longest gap. A gap counts if it ends in the window, or if it ends at the first
    arrival after the window.

    A negative number means that there is no such gap.
    """
    longest = -1
    for before, after in itertools.pairwise(recorded):
        if after[2] < begin_ns:
            continue
        longest = max(longest, (after[2] - before[2]) - (after[1] - before[1]))
        if after[2] > end_ns:
            break
    return longest


def table(path: PathUnderTest, n: int, second: bool) -> bytes:
    """Return JSON with the present routes of host a and ``n`` more routes.

    second  use the second set of prefixes for the ``n`` routes; the two sets have no common prefix
    """
    own = path.forwarders[0].get("/v1/routes")["routes"]
    prefixes = consecutive("10.128.0.0" if second else "10.64.0.0", n)
    more = [{"dst": prefix, "via": str(path.b.v4)} for prefix in prefixes]
    return json.dumps({"routes": [*own, *more]}).encode()


@dataclass(frozen=True)
class Replace:
    """One slot: one measurement of one contender (see ``bench.blocks``)."""

    routes: int
    seconds: int

    def __call__(self, path: PathUnderTest) -> SlotResult:
        if not path.forwarders:
            raise Refused(f"{path.name} has no control socket; this metric needs udptun")
        forwarder = path.forwarders[0]
        first = table(path, self.routes, second=False)
        second = table(path, self.routes, second=True)
        replace_routes(forwarder, first, "application/json")
        try:
            return self._replace(path, second)
        finally:
            assert path.set_routes is not None
            path.set_routes(())

    def _replace(self, path: PathUnderTest, body: bytes) -> SlotResult:
        forwarder = path.forwarders[0]
        record = Path(path.a.lab.folder) / "gap.bin"
        receiver, run = start_receiver(path, self.seconds + 30, record)
        try:
            sender = start_sender(path, run, seconds=self.seconds, rate=RATE_PPS)
            time.sleep(self.seconds / 2)
            begin = time.time_ns()
            reply = replace_routes(forwarder, body, "application/json")
            end = time.time_ns()
            if not sender.alive:
                raise LabError("the sender ended before the routes were replaced")
            sent = json_result(sender, self.seconds + 20)
            received = json_result(receiver, 20)
        finally:
            receiver.kill()
        if reply["added"] < self.routes or reply["removed"] < self.routes:
            raise Refused(f"not all {self.routes} routes were replaced: {reply}")
        if received["received"] < 0.95 * sent["sent"]:
            raise Refused(f"only {received['received']} of {sent['sent']} packets arrived")
        recorded = arrivals(record.read_bytes())
        started = recorded[0][2] + int(_SETTLE_SECONDS * 1e9)
        gap = longest_gap(recorded, begin, end)
        quiet = longest_gap(recorded, max(started, begin - (end - begin)), begin)
        if gap < 0 or quiet < 0:
            raise Refused("no packet arrived in the window")
        values = {"gap_ns": float(gap), "quiet_gap_ns": float(quiet),
                  "apply_ns": float(end - begin)}
        facts = {"answer": reply, "sent": sent, "returned": received["received"]}
        return SlotResult(values, (received["bytes"], 0), facts)


def jobs(plan: Plan) -> Iterator[Job]:
    for variant in plan.variants or VARIANTS:
        for profile in plan.profiles:
            yield Job(
                Series("gap", profile, variant), plan.contenders,
                Replace(int(variant.split()[0]), plan.seconds), blocks=plan.blocks,
                slot_seconds=plan.seconds + 0.6, mirrored=False,
            )


METRIC = Metric(
    "gap", "longest gap in forwarding while the routes are replaced", jobs, VARIANTS,
    "N routes (N: 1..1000000)", r"(?P<n>\d+) routes", {"": (1, 1_000_000)}, programs=("udptun",),
)
