"""Round-trip time of 64-byte requests over UDP, TCP and ICMP: p50, p99 and p99.9, in ns.

Idle: bench/udpload sends each request when the previous reply has arrived, like netperf's UDP_RR
and TCP_RR.

Under bulk load: an iperf3 TCP stream runs in the direction of the requests. udpload sends 2000
requests per second at fixed times, does not wait for replies, and counts lost requests. The slot
also has the throughput of the TCP stream in the same time.

"ping" uses ping(8), every 2 ms. The kernel answers a ping, so no program at b has to be woken. The
difference between "ping" and "udp" is what the programs at both ends cost.

Works with every contender.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ..blocks import Job, Refused, Series, SlotResult
from ..contenders import PathUnderTest
from ..load import bulk, echo, pings, round_trips
from .metric import Metric, Plan

VARIANTS = ("udp idle", "udp bulk", "ping idle", "ping bulk", "tcp idle", "tcp bulk")
_INTERVAL_US = 500
_PING_INTERVAL_US = 2000
_SIZE = 64
_MIN_REPLIES = 100  # with fewer replies, p99 has no meaning
_BULK_START_SECONDS = 2
_BULK_OVERHEAD_SECONDS = 0.6  # until the stream has started


@dataclass(frozen=True)
class RoundTrips:
    """One slot: one measurement of one contender (see ``bench.blocks``)."""

    protocol: str
    loaded: bool
    seconds: int
    congestion: str | None = None

    def _requests(self, path: PathUnderTest) -> dict[str, Any]:
        if self.protocol == "ping":
            return pings(path, seconds=self.seconds, interval_us=_PING_INTERVAL_US, size=_SIZE)
        return round_trips(
            path, seconds=self.seconds, tcp=self.protocol == "tcp", size=_SIZE,
            interval_us=_INTERVAL_US if self.loaded else 0,
        )

    def __call__(self, path: PathUnderTest) -> SlotResult:
        with echo(path):
            if not self.loaded:
                found, beside = self._requests(path), {}
            else:
                with bulk(path, self.seconds + _BULK_START_SECONDS, self.congestion) as stream:
                    stream.mark()
                    found = self._requests(path)
                    beside = {"bits_per_second": stream.rate()}
        sent, received = found["sent"], found["received"]
        if received < _MIN_REPLIES or (not self.loaded and received < 0.9 * sent):
            raise Refused(f"{received} of {sent} requests were answered")
        values = {name: float(found[name]) for name in ("p50_ns", "p99_ns", "p999_ns")}
        facts = {"sent": sent, "returned": received, "quantiles_ns": found["quantiles_ns"]}
        return SlotResult(values | beside, (received * _SIZE, received * _SIZE), facts)


def jobs(plan: Plan) -> Iterator[Job]:
    for variant in plan.variants or VARIANTS:
        for profile in plan.profiles:
            protocol, state = variant.split()
            loaded = state == "bulk"
            yield Job(
                Series("rtt", profile, variant, None if loaded else "p50_ns"), plan.contenders,
                RoundTrips(protocol, loaded, plan.seconds, plan.congestion),
                blocks=plan.blocks,
                slot_seconds=plan.seconds + (_BULK_OVERHEAD_SECONDS if loaded else 0),
            )


METRIC = Metric(
    "rtt", "round-trip time of 64-byte requests, idle and under bulk load", jobs, VARIANTS,
    "udp, tcp or ping, then idle or bulk (udp idle)", r"(udp|tcp|ping) (idle|bulk)",
)
