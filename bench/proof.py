"""Whether the bytes took the road they are credited to.

Owns: the nft counters at both ends of a road's wire, and the judgement of what they counted. A
figure without proof is refused.

What is claimed, of the data that a receiver got within one measurement:

- It crossed the wire as what the contender sends (for udptun: UDP to port 8285): the counter on
  the receiving veth saw at least as many bytes.
- Nothing was fragmented: no packet with an offset or more-fragments bit came in.
- On P3 every packet is counted as it crossed, and none is larger than the MTU. On P2 the
  receiver's GRO joins packets before the counters see them; there, as on P3, the mean frame on the
  device, counted below GRO, must fit the MTU. The kernel drops a larger frame on a veth unless it
  is a super-packet, and with segmentation off there are none.
- On P1 super-packets cross the veth whole, so their pieces cannot be counted. The pieces of a
  UDP_SEGMENT send must fit the MTU for the kernel to take it. That, the absence of fragments, and
  the same program doing the same on P3 is all that is claimed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from udptun.lab import Host

from .contenders import Road

_TABLE = "bench_proof"
_ETHERNET = 14
_FRAGMENT = "ip frag-off & 0x3fff"


@dataclass(frozen=True)
class Count:
    """What came in at one end. ``whole``: up to the MTU; ``supers``: beyond it, super-packets."""

    whole: int = 0
    whole_bytes: int = 0
    supers: int = 0
    supers_bytes: int = 0
    fragments: int = 0
    frames: int = 0
    frames_bytes: int = 0

    @property
    def bytes(self) -> int:
        return self.whole_bytes + self.supers_bytes

    def __sub__(self, before: Count) -> Count:
        return Count(**{k: v - getattr(before, k) for k, v in asdict(self).items()})


class Watch:
    """The counters of one road; installed once, read before and after each measurement."""

    def __init__(self, road: Road, link_mtu: int = 1500) -> None:
        self.ends = (road.b, road.a)  # as the data comes: at b first
        for host in self.ends:
            host.nft(_rules(host.interfaces[0].name, road.carries, link_mtu))

    def read(self) -> tuple[Count, Count]:
        """(at b, at a) since the beginning."""
        at_b, at_a = (_read(host) for host in self.ends)
        return at_b, at_a


def _rules(device: str, carries: str, link_mtu: int) -> str:
    # The common case of each profile is decided by one rule: they cost all contenders the same.
    return f"""table netdev {_TABLE} {{
  counter whole {{}}
  counter supers {{}}
  counter fragments {{}}
  chain c {{
    type filter hook ingress device {device} priority 0;
    {carries} meta length <= {link_mtu} {_FRAGMENT} == 0 counter name whole accept
    {carries} meta length > {link_mtu} {_FRAGMENT} == 0 counter name supers accept
    {_FRAGMENT} != 0 counter name fragments
  }}
}}
"""


def _read(host: Host) -> Count:
    text = host.run(["nft", "-j", "list", "counters", "table", "netdev", _TABLE]).stdout
    device = host.run(["ip", "-s", "-j", "link", "show", "dev", host.interfaces[0].name]).stdout
    return parse(text, device)


def parse(nft: str, ip: str) -> Count:
    """From the JSON of ``nft list counters`` and of ``ip -s link``."""
    counters: Mapping[str, Mapping[str, int]] = {
        item["counter"]["name"]: item["counter"]
        for item in json.loads(nft)["nftables"] if "counter" in item
    }
    device: Mapping[str, Any] = json.loads(ip)[0]["stats64"]["rx"]
    return Count(
        counters["whole"]["packets"], counters["whole"]["bytes"],
        counters["supers"]["packets"], counters["supers"]["bytes"],
        counters["fragments"]["packets"], device["packets"], device["bytes"],
    )


def judge(
    profile: str, received: tuple[int, int], counted: tuple[Count, Count], link_mtu: int = 1500
) -> str | None:
    """Why the figure is refused; None when it is proved.

    received  payload bytes that the programs at b and at a got
    counted   what came in on the wire at b and at a meanwhile
    """
    for where, got, count in zip("ba", received, counted, strict=True):
        if count.bytes < got:
            return f"{got} bytes were received at {where}, {count.bytes} crossed the wire"
        if count.fragments:
            return f"{count.fragments} IP fragments came in at {where}"
        if profile == "P3" and count.supers:
            return f"{count.supers} packets at {where} were larger than the MTU {link_mtu}"
        if profile != "P1" and count.frames and (
            count.frames_bytes / count.frames > link_mtu + _ETHERNET
        ):
            return f"the mean frame at {where} was larger than the MTU {link_mtu}"
    return None
