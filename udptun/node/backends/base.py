"""The contract between the node daemon and a backend.

Owns: the calls that the daemon makes to every backend, and the records that they exchange. Does not
depend on any single backend, the store, or how paths of several backends are combined (``plan``). A
backend runs on the daemon's loop, and its coroutines are called one at a time, except ``run`` and
``synced``. A ``Reach`` is a pure value that any thread may use.

The order of calls: ``prepare``, ``lease_data`` and ``reach``; ``settle`` once our lease is known;
then ``apply_all``, ``apply`` and ``resync`` as often as needed. Every call may be repeated at any
time, and changes only what differs. If the backend is not used, the daemon calls ``retire`` instead
of these.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

from ...errors import UdptunError
from ...leases.advert import Advert
from ...leases.base import Attributes, Lease
from ...leases.cache import LastKnown
from ...leases.netconf import NetConfig
from ...model import IPAddress, IPNetwork
from ..host.interface import Underlay


class InstanceConflict(UdptunError):
    """Another instance on this host uses a resource that this one needs."""


P = TypeVar("P")  # how this backend reaches one subnet: its own type of path

# A context manager that records an error of its body instead of raising it.
Attempt = Callable[[], AbstractContextManager[None]]


@dataclass(frozen=True, slots=True)
class Site:
    """What is known about this node before its lease is published.

    network   the network's configuration
    underlay  the interface that carries the overlay, and this node's addresses on it
    former    the attributes that our lease had last; None: there was no lease
    declared  UDP port and MTU limit that the store declares for this node, or None
    optional  another backend is used if this one is not available
    """

    network: NetConfig
    underlay: Underlay
    former: Attributes | None = None
    declared: Advert | None = None
    optional: bool = False


@dataclass(frozen=True, slots=True)
class LeaseData:
    """What a backend publishes in our lease.

    backend_type  the lease's BackendType; "": leave it to the other backends
    data          members of BackendData (key 4) and of BackendV6Data (key 6)
    """

    backend_type: str = ""
    data: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)


class PeerNode(NamedTuple):
    """Another node, by its lease, which may contain anything.

    public  its public addresses by IP version, each checked to be a unicast address
    """

    attributes: Attributes
    public: Mapping[int, IPAddress]


class Reach(ABC, Generic[P]):
    """How one backend of this node reaches other nodes. Subclasses are frozen dataclasses: the
    daemon computes all paths again when a value differs."""

    name: ClassVar[str]

    @abstractmethod
    def path(self, peer: PeerNode, subnet: IPNetwork) -> P | str:
        """Return the path to this subnet of the peer, or a sentence that says why there is none.

        An empty string: the peer's lease has nothing to do with this backend. Never raises.
        """


class Backend(ABC, Generic[P]):
    """One backend of this node.

    name             its key in ``BACKENDS``
    waits_for        names what ``synced`` waits for; "": it returns at once
    needs_node_data  it works only if each node's lease carries data of that node
    """

    name: ClassVar[str]
    waits_for: ClassVar[str] = ""
    needs_node_data: ClassVar[bool] = False

    @abstractmethod
    def device_names(self, network: NetConfig) -> Collection[str]:
        """Return the names of the network devices that this backend creates."""

    @abstractmethod
    def overhead(self, site: Site) -> int:
        """Return how many bytes this backend adds to an inner packet, at most."""

    @abstractmethod
    async def prepare(self, site: Site, mtu: int) -> str:
        """Create the devices that our lease names. Return "" or the reason why that failed.

        mtu  the largest inner packet, in bytes
        Raises FieldError if the configuration is not valid, and InstanceConflict.
        """

    @abstractmethod
    def lease_data(self, mtu: int) -> LeaseData:
        """Return the data for our lease. Call it after ``prepare``."""

    @abstractmethod
    def reach(self) -> Reach[P]:
        """Return how this node reaches others by this backend. Call it after ``prepare``."""

    @abstractmethod
    async def settle(self, lease: Lease, mtu: int) -> None:
        """Set up the host for our lease. Raises DeviceError, OSError."""

    @abstractmethod
    async def retire(self, network: NetConfig, former: Attributes | None) -> None:
        """Remove everything that this backend has created, because it is not used.
        Raises DeviceError, ControlError, OSError."""

    async def run(self) -> None:
        """Do this backend's background work until cancelled."""
        return

    async def synced(self) -> None:
        """Return once everything that was applied is active."""
        return

    @abstractmethod
    async def apply_all(self, paths: Mapping[IPNetwork, P]) -> int | None:
        """Make these the only paths, by subnet. After DeviceError, ``resync`` applies the rest.

        Return how many paths changed; None: they are applied in the background, and the backend
        reports the result itself.
        """

    @abstractmethod
    async def apply(self, changes: Mapping[IPNetwork, P | None]) -> int | None:
        """Set some paths and remove those that are None; as ``apply_all``."""

    async def resync(self) -> None:
        """Compare the host with the last paths, and repair differences. Raises DeviceError.

        For a backend that does not do this itself in ``run``.
        """
        return

    @property
    def refused(self) -> Mapping[IPNetwork, str]:
        """The subnets whose path the host did not accept, each with the reason."""
        return {}

    @abstractmethod
    async def cleanup(self, known: LastKnown | None, attempt: Attempt) -> None:
        """Remove all that a daemon with this configuration created, each part in an ``attempt``.

        known  the cached leases; None: there are none
        """
