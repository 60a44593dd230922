"""The offload profiles of the wire, P1 to P4, as text for the help, the report, plots and README.

A profile defines where super-packets (TSO, USO) are cut into MTU-sized packets. The wire is a veth
pair; ``udptun.lab`` sets its offloads. Every result belongs to one profile.

Owns: the descriptions. ``udptun.lab.hosts.PROFILES`` has the offloads of each profile.
Constants only; any thread.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from udptun.lab.hosts import PROFILES as OFFLOADS


@dataclass(frozen=True)
class Profile:
    """``title`` fits a plot's axis or a table's header; ``text`` is a full description."""

    title: str
    text: str
    mtu_frames: bool = True  # True if every frame that arrives fits the MTU

    def __str__(self) -> str:
        return f"{self.title}: {self.text}"


PROFILES = {
    "P1": Profile(
        "super-packets on the wire",
        "the wire passes super-packets whole, as between containers of one machine; no packet is "
        "segmented in software",
        mtu_frames=False,
    ),
    "P2": Profile(
        "software segmentation, GRO",
        "the wire passes only packets that fit the MTU: the sender's kernel segments in software, "
        "the receiver's kernel merges (GRO)",
    ),
    "P3": Profile(
        "software segmentation, no GRO",
        "as P2, but the receiver's kernel does not merge",
    ),
    "P4": Profile(
        "no offload for VXLAN super-packets",
        "the wire passes TCP and UDP super-packets whole, but no VXLAN super-packets: the sender's "
        "kernel segments these in software; GRO is on",
        mtu_frames=False,
    ),
}
assert PROFILES.keys() == OFFLOADS.keys(), "each profile of the lab needs a description"

NAMES = tuple(PROFILES)
DEFAULT = ("P1", "P2", "P3")  # P4 is measured on request only


def legend(names: Iterable[str] = NAMES) -> str:
    """Return one line per profile, for help texts."""
    return "\n".join(f"  {name}  {PROFILES[name].text}" for name in names)
