"""The daemon's state for /readyz, /metrics, the service manager and the tests.

Owns: the names of these facts. Does not judge them: ``readiness`` decides whether a node is ready.
The daemon writes it and the health server reads it, both on the daemon's loop: values that are read
between two awaits are consistent. No I/O.
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
    """The forwarder's process, and which of our routes it has.

    needed      an active backend uses it
    connected   it answered the last request, and has the right options
    error       why it is not connected, in a sentence; "" if it is
    synced      its table has exactly our routes
    routes_n    routes in that table
    starts_n    processes started since our own start
    replaces_n  how often the whole table was replaced
    """

    needed: bool = True
    connected: bool = False
    error: str = "not looked for yet"
    synced: bool = False
    routes_n: int = 0
    starts_n: int = 0
    replaces_n: int = 0


@dataclass(slots=True)
class PeersReport:
    """How the other nodes are reached.

    carried_n    by backend: the number of peers whose packets it carries
    unreachable  by lease key: peers without a path, each with the reason in a sentence
    refused      by lease key: peers whose path the kernel did not accept, each with the reason
    """

    carried_n: Mapping[str, int] = field(default_factory=dict)
    unreachable: Mapping[str, str] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)

    def by_path(self) -> str:
        return ", ".join(f"{count} by {BACKENDS[name]}" for name, count in self.carried_n.items())


@dataclass(slots=True)
class NodeReport:
    """One daemon. Reasons and errors are sentences; "" where there is none.

    store             kind of the lease source
    source            health of the lease source, which updates it
    waiting           reason why the start is not complete; "" once it is
    stale             the active leases are cached ones: the store has not listed its leases since
                      our start
    lease             ours; None before there was one
    lease_error       why it could not be acquired or published
    underlay          the interface that carries the overlay; None before it was chosen
    interface_error   why none was chosen, or why it can no longer be used
    backend           the mode: a backend's name or "auto"; "" before the network's configuration
                      was read
    unavailable       by backend, as text shows it: why it is not available on this node
    mtu               of the inner packets, bytes; 0 before it is known
    subnet_env_error  why subnet.env is not written
    firewall_error    why the firewall rules are not active; "" also if none are wanted
    leases_n          leases known, our own included
    route_changes_n   by backend: routes added, changed or removed since our start
    applied           time.monotonic() when paths were last applied, or None
    lag               seconds from the store's update until its last change was active
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
    subnet_env_error: str = "not written yet"
    firewall_error: str = "not set yet"
    forwarder: ForwarderReport = field(default_factory=ForwarderReport)
    peers: PeersReport = field(default_factory=PeersReport)
    leases_n: int = 0
    route_changes_n: dict[str, int] = field(default_factory=dict)
    applied: float | None = None
    lag: float = 0.0
    started: float = field(default_factory=time.time)

    def paths_applied(self, since: float) -> None:
        """Record that paths are active. ``since``: time.monotonic() when their leases arrived."""
        self.applied = time.monotonic()
        self.lag = self.applied - since

    def summary(self) -> str:
        """Return one line for the log and for ``systemctl status``."""
        subnets = self.lease.subnets if self.lease is not None else "no lease"
        stale = "; from the cache, because the store is down" if self.stale else ""
        return f"{subnets}, {self.leases_n} leases, peers: {self.peers.by_path()}{stale}"
