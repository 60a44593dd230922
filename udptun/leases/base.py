"""The contract of a lease source: what the node daemon can ask of any store of leases.

Owns: the types of leases and of their changes, the calls of a source, and its health. A source
recovers by itself: an outage ends no iteration and removes no lease, it only shows in ``health``.
Does not depend on any particular store, or on what a lease is used for.
Threads: everything runs in the daemon's asyncio loop.
"""

from __future__ import annotations

import ipaddress
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from ..errors import UdptunError
from ..model import IPAddress, IPNetwork
from .advert import Advert

if TYPE_CHECKING:
    from .netconf import NetConfig


# Returns the addresses of this host's interfaces.
LocalAddresses = Callable[[], Awaitable[Iterable[IPAddress]]]


class StoreDown(UdptunError):
    """The store does not answer, or answers with a temporary error: a retry may succeed."""


class StoreRefused(UdptunError):
    """The store refused: a retry alone cannot succeed (credentials, permissions, no podCIDR)."""


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
    """What a node publishes in its lease besides its subnets: flannel's LeaseAttrs.

    backend_type     "vxlan", "udp", ...; flannel's UDP backend publishes ""
    backend_data     any JSON value, decoded; None if absent. Data of an unknown backend is kept
                     unchanged
    backend_v6_data  the same for the IPv6 underlay
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
    name      the node's name, for messages only; "" if the store has none
    reserved  a permanent reservation by an operator: routed like any lease, never reassigned
    """

    key: str
    subnets: Subnets
    attributes: Attributes
    name: str = ""
    reserved: bool = False


@dataclass(frozen=True, slots=True)
class Change:
    """One lease that was added (``old`` is None), removed (``new`` is None) or changed."""

    old: Lease | None
    new: Lease | None

    @property
    def key(self) -> str:
        lease = self.new or self.old
        assert lease is not None
        return lease.key


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All leases, including our own. A source yields it once, first."""

    leases: tuple[Lease, ...]


@dataclass(frozen=True, slots=True)
class Changes:
    """Changes since the last update, in order; one response of the store becomes one update."""

    changes: tuple[Change, ...]


@dataclass(slots=True)
class SourceHealth:
    """The state of a source. Written by the source, read by /readyz, /metrics and the log.

    connected       the last request to the store succeeded, and the watch runs
    error           the reason if not connected, in a sentence; else ""
    last_contact    time.monotonic() of the last response of the store, or None
    lease           "none", "held", or "lost": no longer ours, the source tries to get it back
    lease_error     the reason why it is lost, in a sentence
    lease_expires   time.time() at which it expires unless renewed; None: never
    errors_n        failed requests to the store since the start
    relists_n       full listings that were needed because the watch could not continue
    skipped         entries that cannot be used: {key: reason}
    """

    connected: bool = False
    error: str = ""
    last_contact: float | None = None
    lease: str = "none"
    lease_error: str = ""
    lease_expires: float | None = None
    errors_n: int = 0
    relists_n: int = 0
    skipped: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Identity:
    """What the store itself declares about this node, independent of what the node publishes.

    public_ip, public_ipv6  addresses at which other nodes reach this node; None: not declared
    overrides_options       True: these addresses take precedence over --public-ip and
                            --public-ipv6; False: they are used where those are not given
    families                the IP versions of the underlay that this node uses; None: those of
                            the network
    advert                  the UDP port of this node and the largest MTU it may use; None: the
                            network's configuration and the underlay determine them
    """

    public_ip: ipaddress.IPv4Address | None = None
    public_ipv6: ipaddress.IPv6Address | None = None
    overrides_options: bool = False
    families: frozenset[int] | None = None
    advert: Advert | None = None


class SourceConfig(Protocol):
    """The configuration of one source; what is known about a store before it is contacted.

    kind          as shown in status and metrics: "file", "etcd", "kubernetes"
    no_node_data  why leases of this source cannot carry data of a node's backend, such as a MAC
                  address, in a sentence; "" if they can
    store_id      identifies one store: leases cached from one store are never used for another

    The command line imports the class at every start, so its module must import neither asyncio nor
    a client library.
    """

    kind: ClassVar[str]
    no_node_data: ClassVar[str]

    @property
    def store_id(self) -> str: ...


class LeaseSource(ABC):
    """One store.

    ``network``, ``identity`` and ``acquire`` try once, within a few seconds. ``hold`` and
    ``updates`` retry until they are cancelled or closed.
    """

    health: SourceHealth

    @abstractmethod
    async def network(self) -> NetConfig:
        """Return the network's configuration. Raises StoreDown, StoreRefused; FieldError if it is
        invalid."""

    async def identity(self) -> Identity:
        """Return what the store declares about this node. Raises StoreDown, StoreRefused."""
        return Identity()

    def cached_identity(self, lease: Lease) -> Identity:
        """Return the identity that follows from our own cached lease.

        Used while the store is down and ``identity`` has not succeeded since the start.
        """
        return Identity()

    @abstractmethod
    async def acquire(self, attributes: Attributes, former: Subnets) -> Lease:
        """Get this node's lease, a new one or the existing one, and publish ``attributes`` in it.

        former  the subnets this node had last; assigned again if they are free; may be empty
        May be repeated, with the same or other attributes. Raises StoreDown, StoreRefused.
        """

    @abstractmethod
    async def hold(self, lease: Lease) -> None:
        """Keep the lease until cancelled: renew it, and acquire it again if it is lost."""

    @abstractmethod
    def updates(self) -> AsyncIterator[Snapshot | Changes]:
        """Yield one Snapshot as soon as the store answers, then Changes, until closed.

        Does not raise for an outage. An entry that cannot be used is skipped and listed in
        ``health.skipped``.
        """

    def reload(self) -> None:
        """Read the store again now. Does nothing in a source that watches its store."""
        return

    @abstractmethod
    async def aclose(self) -> None:
        """Close connections to the store; the lease stays."""


class LeaseBook:
    """The leases of one source by key. Computes the change that each new state causes."""

    def __init__(self) -> None:
        self._leases: dict[str, Lease] = {}

    @property
    def leases(self) -> Mapping[str, Lease]:
        return self._leases

    def put(self, lease: Lease) -> Change | None:
        """Store a lease; return the change, or None if the book already has the same lease."""
        old = self._leases.get(lease.key)
        if old == lease:
            return None
        self._leases[lease.key] = lease
        return Change(old, lease)

    def remove(self, key: str) -> Change | None:
        old = self._leases.pop(key, None)
        return None if old is None else Change(old, None)

    def replace(self, leases: Iterable[Lease]) -> tuple[Change, ...]:
        """Take a complete listing; return the changes against the known leases, removals first."""
        listed = {lease.key: lease for lease in leases}
        removed = [change for key in [*self._leases] if key not in listed
                   if (change := self.remove(key))]
        return (*removed, *(change for lease in listed.values() if (change := self.put(lease))))
