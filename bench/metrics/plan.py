"""How much of a metric a run asks for. Owns nothing but the numbers."""

from __future__ import annotations

from dataclasses import dataclass

COMPARED = ("direct", "vxlan", "udptun", "udptun --offload off", "onepacket")


@dataclass(frozen=True)
class Plan:
    """blocks      how many blocks to accept
    seconds     how long a slot measures
    congestion  TCP's congestion control, None for the machine's own
    """

    blocks: int
    seconds: int
    profiles: tuple[str, ...] = ("P1", "P2", "P3")
    contenders: tuple[str, ...] = COMPARED
    variants: tuple[str, ...] = ()
    congestion: str | None = None
