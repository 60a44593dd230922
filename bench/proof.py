"""Whether the bytes took the road they are credited to.

Owns: the nft counters at both ends of a road's wire, and the judgement of what they counted. A
figure without proof is refused.

What is claimed, of the data that a receiver got within one measurement:

- It left the sending host's veth as what the contender sends (for udptun: UDP to port 8285): the
  nft counter there saw at least as many bytes. It stands before the kernel cuts super-packets, so
  that it costs each contender little; one on each packet that came in took a seventh of the rate on
  P3.
- Nothing was fragmented: no packet with an offset or more-fragments bit left the host.
- On P2 and P3 the mean frame that came in on the other veth, counted below GRO, must fit the MTU.
  The kernel drops a larger frame on a veth unless it is a super-packet, and with segmentation off
  there are none.
- On P1 super-packets cross the veth whole, so their pieces cannot be counted. The pieces of a
  UDP_SEGMENT send must fit the MTU for the kernel to take it. That, the absence of fragments, and
  the same program doing the same on P3 is all that is claimed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from udptun.lab import Host, LabError

from .contenders import Road

_TABLE = "bench_proof"
_ETHERNET = 14
_FRAGMENT = "ip frag-off & 0x3fff"


@dataclass(frozen=True)
class Count:
    """What crossed the wire one way: packets (a super-packet is one) and their bytes of IP as they
    left the sender, and the frames that came in."""

    packets: int = 0
    bytes: int = 0
    fragments: int = 0
    frames: int = 0
    frames_bytes: int = 0

    def __sub__(self, before: Count) -> Count:
        return Count(**{k: v - getattr(before, k) for k, v in asdict(self).items()})


class Watch:
    """The counters of one road; installed once, read before and after each measurement."""

    def __init__(self, road: Road) -> None:
        self._ends = road.a, road.b
        for host in self._ends:
            try:
                host.nft(_rules(host.interfaces[0].name, road.carries))
            except LabError as error:
                raise LabError(
                    f"the proof of each figure is counted on the netdev egress hook, which Linux "
                    f"has since 5.16: {error}"
                ) from None

    def read(self) -> tuple[Count, Count]:
        """(to b, to a) since the beginning."""
        a, b = self._ends
        return _read(a, b), _read(b, a)


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


def _read(sender: Host, receiver: Host) -> Count:
    text = sender.run(["nft", "-j", "list", "counters", "table", "netdev", _TABLE]).stdout
    name = receiver.interfaces[0].name
    return parse(text, receiver.run(["ip", "-s", "-j", "link", "show", "dev", name]).stdout)


def parse(nft: str, ip: str) -> Count:
    """From the JSON of ``nft list counters`` at the sender, and ``ip -s link`` at the receiver."""
    counters: Mapping[str, Mapping[str, int]] = {
        item["counter"]["name"]: item["counter"]
        for item in json.loads(nft)["nftables"] if "counter" in item
    }
    carried = counters["carried"]
    device: Mapping[str, Any] = json.loads(ip)[0]["stats64"]["rx"]
    return Count(
        carried["packets"], carried["bytes"] - carried["packets"] * _ETHERNET,
        counters["fragments"]["packets"], device["packets"], device["bytes"],
    )


def judge(
    profile: str, received: tuple[int, int], counted: tuple[Count, Count], link_mtu: int = 1500
) -> str | None:
    """Why the figure is refused; None when it is proved.

    received  payload bytes that the programs at b and at a got
    counted   what crossed the wire to b and to a meanwhile
    """
    for where, got, count in zip("ba", received, counted, strict=True):
        if count.bytes < got:
            return f"{got} bytes were received at {where}, {count.bytes} crossed the wire"
        if count.fragments:
            return f"{count.fragments} IP fragments went to {where}"
        if profile != "P1" and count.frames and (
            count.frames_bytes / count.frames > link_mtu + _ETHERNET
        ):
            return f"the mean frame at {where} was larger than the MTU {link_mtu}"
    return None
