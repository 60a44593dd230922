"""What the daemon knows of itself, for whoever asks: /readyz, /metrics, SIGUSR1, the tests.

Owns the names of what can be told. Refuses to judge: whether that makes a node ready is for
``readiness.py``. Written by the daemon, read by the health server, both in the one loop of the
daemon: what is read between two awaits belongs together. No I/O.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from ...leases.base import Lease, SourceHealth
from ..host.interface import Underlay


@dataclass(slots=True)
class ForwarderReport:
    """The forwarder's process and what of our routes it has.

    connected   it answered last time, and is what we want it to be
    error       why not, in a sentence; "" when connected
    in_step     its table is the one we want
    routes_n    routes in that table
    starts_n    processes we have started since our own start
    replaces_n  times the whole table was put
    """

    connected: bool = False
    error: str = "not looked for yet"
    in_step: bool = False
    routes_n: int = 0
    starts_n: int = 0
    replaces_n: int = 0


@dataclass(slots=True)
class PeersReport:
    """How the other nodes are reached, by lease key.

    udp_n, vxlan_n  peers that each path is chosen for
    unreachable     peers that no path leads to, each with the reason in a sentence
    refused         what the kernel or the forwarder would not take, each with its reason
    """

    udp_n: int = 0
    vxlan_n: int = 0
    unreachable: Mapping[str, str] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)


@dataclass(slots=True)
class NodeReport:
    """One daemon. Sentences are for people; "" where there is nothing to say.

    store             SourceConfig.kind
    source            the source's own, live
    waiting           what the start waits for; "" once everything is set up
    stale             the leases in force are those kept on disk: the store has not told its own
                      since our start
    lease             ours, or None before there was ever one
    lease_error       why it could not be had or published
    underlay          what carries the overlay, or None before it was found
    interface_error   why it was not found, or is not usable any more
    backend           "udp", "vxlan" or "auto"; "" before the network's configuration was read
    no_vxlan          why this node has no VXLAN, where it was to have one
    mtu               of the inner packets, bytes; 0 before it is known
    subnet_env_error  why subnet.env is not written; "" when it is
    firewall_error    why the rules are not in force; "" when they are or none are wanted
    leases_n          leases known, ours included
    route_changes_n   routes added, changed or removed since our start, by path: "udp", "vxlan"
    applied           time.monotonic() when leases were last put in force, or None
    lag               seconds the last change took from the store's word to being in force
    started           time.time() of our own start
    """

    store: str
    source: SourceHealth
    waiting: str = "starting"
    stale: bool = False
    lease: Lease | None = None
    lease_error: str = ""
    underlay: Underlay | None = None
    interface_error: str = ""
    backend: str = ""
    no_vxlan: str = ""
    mtu: int = 0
    subnet_env_error: str = "not written yet"
    firewall_error: str = "not set yet"
    forwarder: ForwarderReport = field(default_factory=ForwarderReport)
    peers: PeersReport = field(default_factory=PeersReport)
    leases_n: int = 0
    route_changes_n: dict[str, int] = field(default_factory=lambda: {"udp": 0, "vxlan": 0})
    applied: float | None = None
    lag: float = 0.0
    started: float = field(default_factory=time.time)
