"""Round trips of 64 bytes, over UDP and TCP: p50, p99 and p99.9, idle and under bulk load.

Idle: ping-pong by udpload, as netperf's UDP_RR and TCP_RR do it. Under load: one TCP stream by
iperf3 in the direction of the requests, and requests at fixed times, 2000 a second, whether or not
the ones before are back; what is lost is counted, not waited for.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..blocks import Measured, Refused, Series, run_blocks
from ..contenders import Road
from ..load import bulk, echo, round_trips
from ..session import Session
from .plan import Plan

VARIANTS = ("udp idle", "udp bulk", "tcp idle", "tcp bulk")
_INTERVAL_US = 500
_SIZE = 64
_ENOUGH = 100  # answers, for a p99 to mean something
_BULK_SETTLES_SECONDS = 2


@dataclass(frozen=True)
class RoundTrips:
    """The slot."""

    tcp: bool
    loaded: bool
    seconds: int
    congestion: str | None = None

    def __call__(self, road: Road) -> Measured:
        with echo(road):
            if not self.loaded:
                found = round_trips(road, seconds=self.seconds, tcp=self.tcp, size=_SIZE)
            else:
                with bulk(road, self.seconds + _BULK_SETTLES_SECONDS, self.congestion):
                    found = round_trips(
                        road, seconds=self.seconds, tcp=self.tcp, interval_us=_INTERVAL_US,
                        size=_SIZE,
                    )
        sent, received = found["sent"], found["received"]
        if received < _ENOUGH or (not self.loaded and received < 0.9 * sent):
            raise Refused(f"{received} of {sent} came back")
        values = {name: float(found[name]) for name in ("p50_ns", "p99_ns", "p999_ns")}
        return Measured(
            values, (received * _SIZE, received * _SIZE), {"sent": sent, "returned": received}
        )


def run(s: Session, plan: Plan) -> None:
    for variant in plan.variants or VARIANTS:
        for profile in plan.profiles:
            protocol, state = variant.split()
            loaded = state == "bulk"
            run_blocks(
                s, Series("rtt", profile, variant, None if loaded else "p50_ns"), plan.contenders,
                RoundTrips(protocol == "tcp", loaded, plan.seconds, plan.congestion),
                blocks=plan.blocks,
                slot_seconds=plan.seconds + (_BULK_SETTLES_SECONDS if loaded else 0),
            )
