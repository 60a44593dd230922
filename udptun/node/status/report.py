"""The daemon's state for /readyz, /metrics, the service manager and the tests.

Owns: the names of the values in the report. Does not decide whether a node is ready: ``readiness``
does. The daemon writes the report, and the health server reads the report. Both run on the daemon's
loop, so values that are read without an await in between are consistent. No I/O.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from ...control.events import EventHub
from ...leases.base import Lease, SourceHealth
from ...model import IPNetwork
from ...text import counted
from ..backends import BACKENDS
from ..host.interface import Underlay

DISK_REMEDY = "free space on this disk, or make it writable; the daemon tries again"
STATES = ("reachable", "limited", "unreachable", "unknown")  # values of ``PairReport.state``


def _clock_offset() -> float:
    """Return the difference between the wall clock and the time since the boot."""
    return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)


@dataclass(slots=True)
class ForwarderReport:
    """The state of the forwarder's process and of its routes.

    needed      an active backend uses the forwarder
    connected   the forwarder has answered the last request, and has the right options
    error       the reason why the forwarder is not connected, as a sentence; "" if it is connected
    synced      the forwarder's table has exactly our routes
    behind      time.monotonic() when it began to differ from our routes; None: it has been equal
                at no time, or it is equal
    routes_n    the number of routes in the forwarder's table
    starts_n    the number of forwarder processes that we have started since our own start
    replaces_n  how often the whole table was replaced
    """

    needed: bool = True
    connected: bool = False
    error: str = "not looked for yet"
    synced: bool = False
    behind: float | None = None
    routes_n: int = 0
    starts_n: int = 0
    replaces_n: int = 0

    def mark_synced(self, synced: bool) -> None:
        if synced:
            self.behind = None
        elif self.synced:
            self.behind = time.monotonic()
        self.synced = synced


@dataclass(frozen=True, slots=True)
class FirewallDrop:
    """Packets of the overlay that rules of another program drop, and that udptun cannot lift.

    text    a sentence that names the dropped packets and the rule that drops them
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
    refused      by lease key: the reason why the kernel or the forwarder does not accept the peer's
                 path
    """

    carried_n: Mapping[str, int] = field(default_factory=dict)
    unreachable: Mapping[str, str] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)

    def by_path(self) -> str:
        return ", ".join(f"{count} by {BACKENDS[name]}" for name, count in self.carried_n.items())


@dataclass(slots=True)
class PairReport:
    """The measurements between this node and one subnet of a peer. Times are Unix times.

    key       the key of the peer's lease
    path      the backend that carries the packets
    why       why it is not the preferred one; "" if it is
    since     when it began to carry them
    state     of this path: "reachable"; "limited": large packets do not pass; "unreachable";
              "unknown": not measured yet, or not measurable
    trouble   why the state is "limited" or "unreachable"
    changed   when the state changed last
    preferred the preferred backend; it carries the packets as long as it works
    hold      if it does not carry them: it carries them again after it has worked for so many
              seconds; None: it carries them, or cannot
    returns   when it will carry them again if it works until then; None: it does not work now
    """

    key: str
    subnet: IPNetwork
    path: str
    why: str = ""
    since: float = field(default_factory=time.time)
    state: str = "unknown"
    trouble: str = ""
    changed: float = field(default_factory=time.time)
    preferred: str = ""
    hold: float | None = None
    returns: float | None = None


@dataclass(frozen=True, slots=True)
class DeviceCount:
    """What the kernel has counted for one device of a backend, in one direction. The kernel counts
    a super-packet as one packet.

    direction  "encap": to other nodes; "decap": from them
    """

    path: str
    device: str
    direction: str
    packets: int
    bytes: int
    errors: int
    dropped: int


@dataclass(frozen=True, slots=True)
class PathMeasurement:
    """What was measured of one path to one subnet of a peer.

    key         the key of the peer's lease
    path        the backend
    state       one of STATES
    round_trip  in seconds; None: not measured
    loss        share of the last 32 probes without an answer; None: not measured
    """

    key: str
    subnet: IPNetwork
    path: str
    state: str
    round_trip: float | None
    loss: float | None


@dataclass(slots=True)
class HostReport:
    """What the kernel has, compared with what this node needs. Each text has time.time() of the
    first look that found it.

    wrong      why this node's pods cannot use the overlay
    off        by sysctl: a setting that is off, so some packets may be lost
    misrouted  by lease key: why the kernel does not route the peer's packets through the overlay
    """

    wrong: Mapping[str, float] = field(default_factory=lambda: {"not looked at yet": time.time()})
    off: Mapping[str, tuple[str, float]] = field(default_factory=dict)
    misrouted: Mapping[str, tuple[str, float]] = field(default_factory=dict)

    def set(self, wrong: Iterable[str], off: Mapping[str, str]) -> None:
        """Record the result of a look."""
        now = time.time()
        self.wrong = {text: self.wrong.get(text, now) for text in wrong}
        self.off = _lasting(self.off, off)

    def set_misrouted(self, found: Mapping[str, str]) -> None:
        self.misrouted = _lasting(self.misrouted, found)


def _lasting(
    former: Mapping[str, tuple[str, float]], found: Mapping[str, str]
) -> dict[str, tuple[str, float]]:
    """Return each text with the time since when it applies."""
    now = time.time()
    return {key: former[key] if former.get(key, ("",))[0] == text else (text, now)
            for key, text in found.items()}


@dataclass(frozen=True, slots=True)
class Trouble:
    """Something that the daemon itself cannot do now, and tries again. Packets still pass.

    text    a sentence
    remedy  what an operator can do, as a sentence
    since   time.time() of the first try
    """

    text: str
    remedy: str
    since: float


async def _nothing() -> None:
    return


async def _none() -> list[Any]:
    return []


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
    interface_note    a doubt about the choice of the interface or address: see ``Underlay.note``
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
    leftovers         by name: why a leftover of flannel stays; see ``set_leftovers``
    conntrack         the reason why the kernel drops new flows, or soon will
    troubles          by name: what the daemon itself cannot do now; see ``set_trouble``
    leases_n          the number of known leases, including our own lease
    pairs             by subnet: what was measured
    measure_errors    the reasons why some peers cannot be measured
    path_changes_n    by backend: how often a subnet was moved to it
    events            the events of this daemon
    describe_paths    returns the state of each path to a subnet, by backend, as JSON
    freshen_paths     reads the state of the paths again if it is old
    measurements      returns what was measured of each path
    count_devices     reads the counters of the backends' devices
    route_changes_n   by backend: how many routes were added, changed or removed since our start
    applied           time.monotonic() when paths were applied last; None: never
    lag               seconds from the arrival of the last update until its paths were active
    started           time.time() of our start
    files             the paths of our files, by name
    """

    store: str
    source: SourceHealth
    waiting: str = "starting"
    stale: bool = False
    lease: Lease | None = None
    lease_error: str = ""
    underlay: Underlay | None = None
    interface_error: str = ""
    interface_note: str = ""
    backend: str = ""
    unavailable: Mapping[str, str] = field(default_factory=dict)
    mtu: int = 0
    ipv6_error: str = ""
    subnet_env_error: str = "not written yet"
    firewall_error: str = "not set yet"
    firewall_drops: tuple[FirewallDrop, ...] = ()
    host: HostReport = field(default_factory=HostReport)
    leftovers: Mapping[str, tuple[str, float]] = field(default_factory=dict)
    conntrack: str = ""
    troubles: dict[str, Trouble] = field(default_factory=dict)
    forwarder: ForwarderReport = field(default_factory=ForwarderReport)
    peers: PeersReport = field(default_factory=PeersReport)
    leases_n: int = 0
    pairs: dict[IPNetwork, PairReport] = field(default_factory=dict)
    measure_errors: tuple[str, ...] = ()
    path_changes_n: dict[str, int] = field(default_factory=lambda: dict.fromkeys(BACKENDS, 0))
    events: EventHub = field(default_factory=EventHub)
    describe_paths: Callable[[IPNetwork], Mapping[str, Any]] = lambda _: {}
    freshen_paths: Callable[[], Awaitable[None]] = _nothing
    measurements: Callable[[], Awaitable[list[PathMeasurement]]] = _none
    count_devices: Callable[[], Awaitable[list[DeviceCount]]] = _none
    route_changes_n: dict[str, int] = field(default_factory=dict)
    applied: float | None = None
    lag: float = 0.0
    started: float = field(default_factory=time.time)
    files: Mapping[str, str] = field(default_factory=dict)
    _boot: float = field(default_factory=_clock_offset)

    def clock_step(self) -> float:
        """Return by how many seconds the wall clock was set forward since our start. Suspension
        does not count, nor does the slow correction by NTP."""
        return _clock_offset() - self._boot

    def paths_applied(self, since: float) -> None:
        """Record that paths are active.

        since  time.monotonic() when the leases of these paths arrived
        """
        self.applied = time.monotonic()
        self.lag = self.applied - since

    def set_leftovers(self, found: Mapping[str, str]) -> None:
        self.leftovers = _lasting(self.leftovers, found)

    def set_trouble(self, name: str, text: str, remedy: str = "") -> None:
        """Record what the daemon itself cannot do now; "": it can. ``name`` says what it is."""
        former = self.troubles.get(name)
        if not text:
            self.troubles.pop(name, None)
        elif former is None or former.text != text:
            self.troubles[name] = Trouble(
                text, remedy, time.time() if former is None else former.since)

    def event(self, kind: str, **fields: Any) -> None:
        """Record an event of the type ``kind`` with the present time."""
        self.events.emit(kind, **fields)

    def name_of(self, subnet: IPNetwork) -> str:
        """Return the subnet, with the key of its peer's lease if that is another text."""
        pair = self.pairs.get(subnet)
        if pair is None or pair.key in (str(subnet), str(subnet).replace("/", "-")):
            return str(subnet)
        return f"{pair.key} ({subnet})"

    def in_state(self, state: str) -> list[PairReport]:
        return [pair for pair in self.pairs.values() if pair.state == state]

    def summary(self) -> str:
        """Return one line for the log and for ``systemctl status``."""
        subnets = self.lease.subnets if self.lease is not None else "no lease"
        stale = "; from the cache, because the store is down" if self.stale else ""
        return f"{subnets}, {counted(self.leases_n, 'lease')}, peers: {self.peers.by_path()}{stale}"


def iso_time(seconds: float) -> str:
    """Return a Unix time as text, as in the forwarder's events."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")
