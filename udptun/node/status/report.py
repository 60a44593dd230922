"""The daemon's state for /readyz, /metrics, the service manager and the tests.

Owns: the names of the values in the report. Does not decide whether a node is ready: ``readiness``
does. The daemon writes the report, and the health server reads the report. Both run on the daemon's
loop, so values that are read without an await in between are consistent. No I/O.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from ...leases.base import Lease, SourceHealth
from ..backends import BACKENDS
from ..host.interface import Underlay


@dataclass(slots=True)
class ForwarderReport:
    """The state of the forwarder's process and of its routes.

    needed      an active backend uses the forwarder
    connected   the forwarder has answered the last request, and has the right options
    error       the reason why the forwarder is not connected, as a sentence; "" if it is connected
    synced      the forwarder's table has exactly our routes
    routes_n    the number of routes in the forwarder's table
    starts_n    the number of forwarder processes that we have started since our own start
    replaces_n  how often the whole table was replaced
    """

    needed: bool = True
    connected: bool = False
    error: str = "not looked for yet"
    synced: bool = False
    routes_n: int = 0
    starts_n: int = 0
    replaces_n: int = 0


@dataclass(frozen=True, slots=True)
class FirewallDrop:
    """Packets of the overlay that rules of another program drop, and that udptun cannot lift.

    text    what is dropped by what, as a sentence
    remedy  what an operator can do, as a sentence
    cuts    True: this node's pods cannot use the overlay; False: it may be so, or only new
            connections from other nodes are dropped
    since   time.time() of the first look that found it
    """

    text: str
    remedy: str
    cuts: bool
    since: float


@dataclass(slots=True)
class PeersReport:
    """The paths to the other nodes.

    carried_n    by backend: the number of peers to which the backend carries the packets
    unreachable  by lease key: the reason why the peer has no path, as a sentence
    refused      by lease key: the reason why the kernel did not accept the peer's path
    """

    carried_n: Mapping[str, int] = field(default_factory=dict)
    unreachable: Mapping[str, str] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)

    def by_path(self) -> str:
        return ", ".join(f"{count} by {BACKENDS[name]}" for name, count in self.carried_n.items())


@dataclass(slots=True)
class NodeReport:
    """The report of one daemon. Reasons and errors are sentences; "" means that there is none.

    store             the kind of the lease source
    source            the health of the lease source; the source updates this object
    waiting           the reason why the start is not complete; "" if the start is complete
    stale             the active leases are from the cache, because the store has not listed its
                      leases since our start
    lease             our lease; None before we have one
    lease_error       the reason why our lease could not be acquired or published
    underlay          the interface that carries the overlay; None before the choice
    interface_error   the reason why no interface was chosen, or why the chosen one is not usable
                      any more
    backend           the mode: a backend's name or "auto"; "" before the network's configuration
                      was read
    unavailable       the reasons why backends are not available on this node; the keys are the
                      texts in ``BACKENDS``
    mtu               the largest inner packet, in bytes; 0 before it is known
    ipv6_error        the reason why IPv6 is not carried although it is enabled
    subnet_env_error  the reason why subnet.env is not written
    firewall_error    the reason why the firewall rules are not active; "" also if no rules are
                      wanted
    firewall_drops    packets of the overlay that other programs' rules drop
    leases_n          the number of known leases, including our own lease
    route_changes_n   by backend: how many routes were added, changed or removed since our start
    applied           time.monotonic() when paths were applied last; None: never
    lag               seconds from the arrival of the last update until its paths were active
    started           time.time() of our start
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
    unavailable: Mapping[str, str] = field(default_factory=dict)
    mtu: int = 0
    ipv6_error: str = ""
    subnet_env_error: str = "not written yet"
    firewall_error: str = "not set yet"
    firewall_drops: tuple[FirewallDrop, ...] = ()
    forwarder: ForwarderReport = field(default_factory=ForwarderReport)
    peers: PeersReport = field(default_factory=PeersReport)
    leases_n: int = 0
    route_changes_n: dict[str, int] = field(default_factory=dict)
    applied: float | None = None
    lag: float = 0.0
    started: float = field(default_factory=time.time)

    def paths_applied(self, since: float) -> None:
        """Record that paths are active.

        since  time.monotonic() when the leases of these paths arrived
        """
        self.applied = time.monotonic()
        self.lag = self.applied - since

    def summary(self) -> str:
        """Return one line for the log and for ``systemctl status``."""
        subnets = self.lease.subnets if self.lease is not None else "no lease"
        stale = "; from the cache, because the store is down" if self.stale else ""
        return f"{subnets}, {self.leases_n} leases, peers: {self.peers.by_path()}{stale}"
