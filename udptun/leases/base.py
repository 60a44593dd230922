"""The contract of a lease source: the calls that the node daemon can make to any store of leases.

Owns: the types of leases and of their changes, the calls of a source, and the source's health.
After an outage, a source connects to the store again. An outage does not end ``updates`` and does
not remove a lease; only ``health`` shows the outage. Does not depend on any particular store, or on
the use of a lease. Threads: everything runs in the daemon's asyncio loop.
"""

from __future__ import annotations

import ipaddress
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from ..errors import UdptunError
from ..model import IPAddress, IPNetwork
from ..text import printable
from .advert import Advert

if TYPE_CHECKING:
    from .netconf import NetConfig


# Returns the addresses of this host's interfaces.
LocalAddresses = Callable[[], Awaitable[Iterable[IPAddress]]]


MAX_ERROR = 1000  # characters of an error's text
MAX_NAME = 253  # characters of a key or a node's name, as in Kubernetes: no valid one is longer
MAX_REASONS = 100  # invalid entries of a store whose reason is kept
LOG_SECONDS = 5.0  # the shortest time between two log lines about invalid entries


class _StoreError(UdptunError):
    """An error of a store. Its text may contain a server's text, so it is cut and escaped."""

    def __init__(self, text: str) -> None:
        super().__init__(printable(text, MAX_ERROR))


class StoreDown(_StoreError):
    """The store does not answer, or answers with a temporary error: a retry may succeed."""


class StoreRefused(_StoreError):
    """The store refused the request: a retry alone cannot succeed.

    Examples: wrong credentials, an invalid kubeconfig.
    """


class StoreNotReady(StoreRefused):
    """The store refuses the request until it is changed there: the daemon waits for this.

    Examples: missing permissions, a node without podCIDR.
    """


@dataclass(frozen=True, slots=True)
class Subnets:
    """The overlay prefixes of one node, at most one per family."""

    v4: ipaddress.IPv4Network | None = None
    v6: ipaddress.IPv6Network | None = None

    def __iter__(self) -> Iterator[IPNetwork]:
        return (subnet for subnet in (self.v4, self.v6) if subnet is not None)

    def __str__(self) -> str:
        return " and ".join(map(str, self)) or "none"


@dataclass(frozen=True, slots=True)
class Attributes:
    """The data that a node publishes in its lease in addition to its subnets: flannel's LeaseAttrs.

    backend_type     "vxlan", "udp", ...; flannel's UDP backend publishes ""
    backend_data     any JSON value, decoded; None if the lease has no such value. Data of an
                     unknown backend is kept unchanged
    backend_v6_data  the backend data for the IPv6 underlay, in the form of ``backend_data``
    """

    public_ip: ipaddress.IPv4Address | None = None
    public_ipv6: ipaddress.IPv6Address | None = None
    backend_type: str = ""
    backend_data: Any = None
    backend_v6_data: Any = None


@dataclass(frozen=True, slots=True)
class Lease:
    """A node's subnets and its published attributes.

    key       identifies the lease in its store: etcd's subnet key, or the name of the node
    name      the node's name, for messages only; "" if the store has no name for the node
    reserved  True: an operator reserved the subnets permanently. The lease is routed like any
              other lease, and its subnets are never assigned to another node
    since     when the lease was created, in a unit of its store: if two leases claim one address,
              the older lease has it. A renewal does not change it. 0: not known
    """

    key: str
    subnets: Subnets
    attributes: Attributes
    name: str = ""
    reserved: bool = False
    since: int = field(default=0, compare=False)

    @property
    def age(self) -> tuple[int, str]:
        """Orders the leases of one store, the oldest first. All nodes have the same order."""
        return self.since, self.key


@dataclass(frozen=True, slots=True)
class Change:
    """The change of one lease.

    If the lease was added, ``old`` is None. If it was removed, ``new`` is None.
    """

    old: Lease | None
    new: Lease | None

    @property
    def key(self) -> str:
        lease = self.new or self.old
        assert lease is not None
        return lease.key


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All leases, including our own. A source yields one Snapshot, before all Changes."""

    leases: tuple[Lease, ...]


@dataclass(frozen=True, slots=True)
class Changes:
    """The changes since the last update, in order.

    All changes in one response of the store are in one update.
    """

    changes: tuple[Change, ...]


class Skipped(dict[str, str]):
    """The entries of a store that cannot be used: {key: reason}. Logs them, with a limited rate.

    Anybody who can write to the store can create any number of them. Only the first MAX_REASONS
    reasons are kept.
    """

    NOT_KEPT = f"(only the first {MAX_REASONS} reasons are kept)"

    def __init__(self) -> None:
        super().__init__()
        self._new_n = 0  # the entries that are not logged yet
        self._first = ""  # a sentence about the first of them
        self._not_before = 0.0

    def add(self, key: str, reason: str, sentence: str) -> None:
        """Add an entry.

        sentence  for the log
        """
        known = self.get(key)
        if known in (reason, self.NOT_KEPT):
            return
        self[key] = reason if known is not None or len(self) < MAX_REASONS else self.NOT_KEPT
        self._first = self._first or sentence
        self._new_n += 1

    def log(self, log: logging.Logger) -> None:
        """Log the entries that were added since the last line, as one line. Call it after each
        answer of the store."""
        if not self._new_n or time.monotonic() < self._not_before:
            return
        more = self._new_n - 1
        be = "is" if more == 1 else "are"
        also = f"; so {be} {more} more {'entry' if more == 1 else 'entries'}" if more else ""
        log.warning("%s%s", self._first, also)
        self._new_n, self._first = 0, ""
        self._not_before = time.monotonic() + LOG_SECONDS


@dataclass(slots=True)
class SourceHealth:
    """The state of a source. Written by the source, read by /readyz, /metrics and the log.

    connected       True: the last request to the store succeeded, and the watch runs
    error           if not connected: the reason, in a sentence; else ""
    last_contact    time.monotonic() of the last response of the store; None: no response yet
    lease           the state of our lease: "none", "held" or "lost". While our lease is lost, the
                    source tries to get it back
    lease_error     if our lease is lost: the reason, in a sentence
    contested       if another machine writes our lease too: a sentence that names it; else ""
    lease_expires   time.time() at which our lease expires if it is not renewed; None: it does not
                    expire
    lease_renewed   time.time() at which our lease was last acquired or renewed; None: never
    errors_n        number of failed requests to the store since the start
    relists_n       number of full listings that were needed because the watch could not continue
    skipped         entries of the store that cannot be used: {key: reason}
    """

    connected: bool = False
    error: str = ""
    last_contact: float | None = None
    lease: str = "none"
    lease_error: str = ""
    contested: str = ""
    lease_expires: float | None = None
    lease_renewed: float | None = None
    errors_n: int = 0
    relists_n: int = 0
    skipped: Skipped = field(default_factory=Skipped)


@dataclass(frozen=True, slots=True)
class Identity:
    """The values that the store itself sets for this node. The node's lease does not change them.

    public_ip, public_ipv6  the addresses at which other nodes reach this node; None: the store
                            sets no address of this family
    overrides_options       True: these addresses are used instead of --public-ip and
                            --public-ipv6. False: each address is used only if its option is not
                            given
    families                the IP versions of the underlay that this node uses; None: the IP
                            versions of the network
    advert                  the UDP port of this node and the largest MTU that the node may use;
                            None: the network's configuration determines the port, and the
                            underlay determines the MTU
    """

    public_ip: ipaddress.IPv4Address | None = None
    public_ipv6: ipaddress.IPv6Address | None = None
    overrides_options: bool = False
    families: frozenset[int] | None = None
    advert: Advert | None = None


class SourceConfig(Protocol):
    """The configuration of one source: the facts known about a store before it is contacted.

    kind          the source's name in status and metrics: "file", "etcd", "kubernetes"
    no_node_data  "" if leases of this source can carry data of a node's backend, such as a MAC
                  address; else the reason why they cannot, in a sentence
    store_id      identifies one store: leases cached from one store are never used for another
    files         the files and directories that the source reads

    The command line imports the configuration class at every start. So the module of the class must
    import neither asyncio nor a client library.
    """

    kind: ClassVar[str]
    no_node_data: ClassVar[str]

    @property
    def store_id(self) -> str: ...

    @property
    def files(self) -> tuple[Path, ...]: ...


class LeaseSource(ABC):
    """One store.

    ``network``, ``identity`` and ``acquire`` try once and end within a few seconds. ``hold``
    retries until it is cancelled, ``updates`` until it is closed.
    """

    health: SourceHealth

    @abstractmethod
    async def network(self) -> NetConfig:
        """Return the network's configuration.

        Raises StoreDown, StoreRefused. Raises FieldError if the configuration is invalid.
        """

    async def identity(self) -> Identity:
        """Return the values that the store sets for this node. Raises StoreDown, StoreRefused."""
        return Identity()

    def cached_identity(self, lease: Lease) -> Identity:
        """Return the identity of this node according to ``lease``, our own cached lease.

        Used while the store is down, if ``identity`` has not succeeded since the start.
        """
        return Identity()

    def memory(self) -> Mapping[str, str]:
        """Return what the source has to know after a restart of the daemon."""
        return {}

    def recall(self, memory: Mapping[str, str]) -> None:
        """Take the ``memory`` of the daemon's last run, before any request."""
        return

    @abstractmethod
    async def acquire(self, attributes: Attributes, former: Subnets) -> Lease:
        """Get a lease for this node, and publish ``attributes`` in the lease.

        If the node already has a lease, return that lease. Else create a new lease.

        former  the last subnets of this node, or no subnets. If they are free, they are assigned
                to this node again
        May be called again, with the same or other attributes. Raises StoreDown, StoreRefused.
        """

    @abstractmethod
    async def hold(self, lease: Lease) -> None:
        """Renew the lease, and acquire the lease again if it is lost. Runs until cancelled."""

    @abstractmethod
    def updates(self) -> AsyncIterator[Snapshot | Changes]:
        """Yield one Snapshot as soon as the store answers, then Changes, until closed.

        Does not raise for an outage. An entry that cannot be used is skipped and listed in
        ``health.skipped``.
        """

    def hosts(self) -> tuple[str, ...]:
        """Return the names and addresses of the hosts to which requests are sent."""
        return ()

    def reload(self) -> None:
        """Read the store again now. A source that watches its store has nothing to do here."""
        return

    @abstractmethod
    async def aclose(self) -> None:
        """Close the connections to the store. The lease stays in the store."""


class LeaseBook:
    """The known leases of one source, by key. Each method that changes them returns the changes."""

    def __init__(self) -> None:
        self._leases: dict[str, Lease] = {}

    @property
    def leases(self) -> Mapping[str, Lease]:
        return self._leases

    def put(self, lease: Lease) -> Change | None:
        """Store a lease. Return the change, or None if the book already has an equal lease."""
        old = self._leases.get(lease.key)
        if old == lease and old.since == lease.since:
            return None
        self._leases[lease.key] = lease
        return Change(old, lease)

    def remove(self, key: str) -> Change | None:
        old = self._leases.pop(key, None)
        return None if old is None else Change(old, None)

    def replace(self, leases: Iterable[Lease]) -> tuple[Change, ...]:
        """Replace all known leases with ``leases``; return the changes, removals first."""
        listed = {lease.key: lease for lease in leases}
        removed = [change for key in [*self._leases] if key not in listed
                   if (change := self.remove(key))]
        return (*removed, *(change for lease in listed.values() if (change := self.put(lease))))
