"""Checks with packet counters that the measured bytes went through the tunnel under test.

Owns: the counters at both ends of a path's wire, and the rules for the counter values. A figure
without proof is refused. Independent of the metrics. Main thread only, like udptun.lab.

What is proved about the bytes that a receiver counted in one measurement:

- The bytes left the sending host's veth in packets of the contender (for udptun: UDP to port 8285).
  An nft counter on the egress hook must have counted at least as many bytes. The hook runs before
  the kernel segments super-packets, so the counter costs every contender little. By comparison, a
  counter on each received packet reduced the rate on P3 (software segmentation, no GRO) by one
  seventh.
- No packet was fragmented: no packet with a fragment offset or the more-fragments bit left the
  host.
- On P2 and P3 (software segmentation), the mean size of the Ethernet frames that arrived on the
  other veth fits the MTU. These frames are counted before GRO. The kernel drops a frame that is
  larger than the MTU on a veth, unless the frame is a super-packet. Without segmentation offloads
  there are no super-packets on the wire.
- Packets of the express path skip the egress hook, because tc redirects them. If the contender has
  it, the bytes that arrived on the other veth are counted instead. Nothing else is sent there.
- On P1 and P4, super-packets cross the veth whole, so their segments cannot be counted. Three facts
  replace the count: the kernel accepts a UDP_SEGMENT send only if each segment fits the MTU; no
  packet was fragmented; the same program passes the test on P3.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from udptun.lab import Host, LabError

from .contenders import PathUnderTest
from .profiles import PROFILES

_TABLE = "bench_proof"
_ETHERNET = 14
_FRAGMENT = "ip frag-off & 0x3fff"


@dataclass(frozen=True)
class WireCount:
    """Traffic in one direction.

    packets, bytes        sent packets; a super-packet is one packet, and bytes include IP headers
    fragments             sent packets that are IP fragments
    frames, frames_bytes  received frames as the device counts them: before GRO, and the bytes
                          include Ethernet headers
    """

    packets: int = 0
    bytes: int = 0
    fragments: int = 0
    frames: int = 0
    frames_bytes: int = 0

    def __sub__(self, before: WireCount) -> WireCount:
        return WireCount(**{k: v - getattr(before, k) for k, v in asdict(self).items()})


class WireCounters:
    """The counters of one path. They are installed once, and read before and after each slot."""

    def __init__(self, path: PathUnderTest) -> None:
        self._ends = path.a, path.b
        self._redirected = path.redirected
        for host in self._ends:
            try:
                host.nft(_rules(host.interfaces[0].name, path.carries))
            except LabError as error:
                raise LabError(
                    f"cannot install the counters on the netdev egress hook (Linux 5.16 or newer): "
                    f"{error}"
                ) from None

    def read(self) -> tuple[WireCount, WireCount]:
        """Return the totals for the direction to b and for the direction to a."""
        a, b = self._ends
        return _read(a, b, self._redirected), _read(b, a, self._redirected)


def _rules(device: str, carries: str) -> str:
    return f"""table netdev {_TABLE} {{
  counter carried {{}}
  counter fragments {{}}
  chain c {{
    type filter hook egress device {device} priority 0
    {carries} {_FRAGMENT} == 0 counter name carried accept
    {_FRAGMENT} != 0 counter name fragments
  }}
}}
"""


def _read(sender: Host, receiver: Host, redirected: bool) -> WireCount:
    text = sender.run(["nft", "-j", "list", "counters", "table", "netdev", _TABLE]).stdout
    name = receiver.interfaces[0].name
    count = parse(text, receiver.run(["ip", "-s", "-j", "link", "show", "dev", name]).stdout)
    if not redirected:
        return count
    return replace(
        count, packets=count.frames, bytes=count.frames_bytes - count.frames * _ETHERNET)


def parse(nft: str, ip: str) -> WireCount:
    """Parse ``nft -j list counters`` of the sender and ``ip -s -j link`` of the receiver."""
    counters: Mapping[str, Mapping[str, int]] = {
        item["counter"]["name"]: item["counter"]
        for item in json.loads(nft)["nftables"] if "counter" in item
    }
    carried = counters["carried"]
    device: Mapping[str, Any] = json.loads(ip)[0]["stats64"]["rx"]
    return WireCount(
        carried["packets"], carried["bytes"] - carried["packets"] * _ETHERNET,
        counters["fragments"]["packets"], device["packets"], device["bytes"],
    )


def refusal_reason(
    profile: str, received: tuple[int, int], counted: tuple[WireCount, WireCount],
    link_mtu: int = 1500,
) -> str | None:
    """Return the reason to refuse the figure, or None if the figure is proved.

    received  payload bytes that the program on b received, and those that the program on a received
    counted   traffic on the wire to b, and to a, during the same time
    """
    for host, payload, count in zip("ba", received, counted, strict=True):
        if count.bytes < payload:
            return f"{payload} bytes were received at {host}, only {count.bytes} crossed the wire"
        if count.fragments:
            return f"{count.fragments} IP fragments were sent to {host}, expected none"
        if PROFILES[profile].mtu_frames and count.frames and (
            count.frames_bytes / count.frames > link_mtu + _ETHERNET
        ):
            mean = count.frames_bytes / count.frames - _ETHERNET
            return (f"the mean packet size on the wire to {host} was {mean:.0f} bytes, more than "
                    f"the MTU {link_mtu}")
    return None
