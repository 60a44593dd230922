"""Peak resident memory of a forwarder with N routes while it forwards one TCP stream, in bytes.

Both forwarders have the N routes. VmRSS is read from /proc every 50 ms for both; the result is the
larger peak of the two. Needs udptun on both hosts. udptun's counters must show that udptun
forwarded the stream.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

from ..blocks import Job, Refused, Series, SlotResult
from ..contenders import PathUnderTest
from ..contenders.builtin import replace_routes
from ..load import bulk
from ..tables import consecutive
from .metric import Metric, Plan

VARIANTS = ("10000 routes",)
_SAMPLE_SECONDS = 0.05


@dataclass(frozen=True)
class Resident:
    """One slot: one measurement of one contender (see ``bench.blocks``)."""

    routes: int
    seconds: int

    def __call__(self, path: PathUnderTest) -> SlotResult:
        if not path.forwarders:
            raise Refused(f"{path.name} is not udptun; this metric needs udptun")
        own = [forwarder.routes_file.read_text() for forwarder in path.forwarders]
        vias = path.b.v4, path.a.v4
        try:
            for forwarder, text, via in zip(path.forwarders, own, vias, strict=True):
                more = (
                    f"{prefix} via {via}\n" for prefix in consecutive("10.64.0.0", self.routes)
                )
                replace_routes(forwarder, (text + "".join(more)).encode(), "text/plain")
                if forwarder.status()["route_count"] < self.routes:
                    raise Refused(f"the forwarder has fewer than {self.routes} routes")
            return self._load(path)
        finally:
            for forwarder, text in zip(path.forwarders, own, strict=True):
                replace_routes(forwarder, text.encode(), "text/plain")

    def _load(self, path: PathUnderTest) -> SlotResult:
        most = 0
        with bulk(path, self.seconds + 2):
            end = time.monotonic() + self.seconds
            before = path.forwarders[0].status()["packets"]["encap"]["delivered"]
            while time.monotonic() < end:
                most = max(most, *(forwarder.rss_kib() for forwarder in path.forwarders))
                time.sleep(_SAMPLE_SECONDS)
            after = path.forwarders[0].status()["packets"]["encap"]["delivered"]
        if after - before < 1000 * self.seconds:
            raise Refused(
                f"{after - before} packets in {self.seconds} s, expected at least 1000 per second"
            )
        return SlotResult({"rss_bytes": most * 1024.0}, facts={"packets": after - before})


def jobs(plan: Plan) -> Iterator[Job]:
    for variant in plan.variants or VARIANTS:
        for profile in plan.profiles:
            yield Job(
                Series("memory", profile, variant), plan.contenders,
                Resident(int(variant.split()[0]), plan.seconds), blocks=plan.blocks,
                slot_seconds=plan.seconds + 0.6, mirrored=False,
            )


METRIC = Metric(
    "memory", "peak resident memory of a forwarder under load", jobs, VARIANTS,
    "N routes (N: 1..1000000)", r"(?P<n>\d+) routes", {"": (1, 1_000_000)}, programs=("udptun",),
)
