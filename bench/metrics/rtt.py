"""Round-trip time of 64-byte requests over UDP and TCP: p50, p99 and p99.9, in ns.

Idle: bench/udpload sends each request when the previous reply has arrived, like netperf's UDP_RR
and TCP_RR.

Under bulk load: an iperf3 TCP stream runs in the direction of the requests. udpload sends 2000
requests per second at fixed times, does not wait for replies, and counts lost requests.

Works with every contender.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..blocks import Refused, Series, SlotResult, run_blocks
from ..contenders import PathUnderTest
from ..load import bulk, echo, round_trips
from ..session import Session
from .metric import Metric, Plan

VARIANTS = ("udp idle", "udp bulk", "tcp idle", "tcp bulk")
_INTERVAL_US = 500
_SIZE = 64
_MIN_REPLIES = 100  # with fewer replies, p99 has no meaning
_BULK_START_SECONDS = 2


@dataclass(frozen=True)
class RoundTrips:
    """One slot: one measurement of one contender (see ``bench.blocks``)."""

    tcp: bool
    loaded: bool
    seconds: int
    congestion: str | None = None

    def __call__(self, path: PathUnderTest) -> SlotResult:
        with echo(path):
            if not self.loaded:
                found = round_trips(path, seconds=self.seconds, tcp=self.tcp, size=_SIZE)
            else:
                with bulk(path, self.seconds + _BULK_START_SECONDS, self.congestion):
                    found = round_trips(
                        path, seconds=self.seconds, tcp=self.tcp, interval_us=_INTERVAL_US,
                        size=_SIZE,
                    )
        sent, received = found["sent"], found["received"]
        if received < _MIN_REPLIES or (not self.loaded and received < 0.9 * sent):
            raise Refused(f"{received} of {sent} requests were answered")
        values = {name: float(found[name]) for name in ("p50_ns", "p99_ns", "p999_ns")}
        return SlotResult(
            values, (received * _SIZE, received * _SIZE), {"sent": sent, "returned": received}
        )


def measure(s: Session, plan: Plan) -> None:
    for variant in plan.variants or VARIANTS:
        for profile in plan.profiles:
            protocol, state = variant.split()
            loaded = state == "bulk"
            run_blocks(
                s, Series("rtt", profile, variant, None if loaded else "p50_ns"), plan.contenders,
                RoundTrips(protocol == "tcp", loaded, plan.seconds, plan.congestion),
                blocks=plan.blocks,
                slot_seconds=plan.seconds + (_BULK_START_SECONDS if loaded else 0),
            )


METRIC = Metric(
    "rtt", "round-trip time of 64-byte requests, idle and under bulk load", measure, VARIANTS,
    "udp idle, udp bulk, tcp idle or tcp bulk", r"(udp|tcp) (idle|bulk)",
)
