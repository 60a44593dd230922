"""The contract between the node daemon and a backend.

Owns: the calls that the daemon makes to every backend, and the arguments and results of these
calls. Does not depend on any single backend, on the store, or on how the paths of several backends
are combined (``plan``). A backend runs on the daemon's loop. The daemon never runs two coroutines
of a backend at the same time, except ``run`` and ``synced``. A ``Reach`` is a pure value that any
thread may use.

The order of calls:
1. ``prepare``, then ``lease_data`` and ``reach``.
2. ``settle``, when our lease is known.
3. ``apply_all``, ``apply``, ``divert`` and ``resync``, as often as needed.

The daemon may repeat a call at any time. A repeated call changes only the parts of the host that
differ from the wanted state. If the backend is not used, the daemon calls only ``retire``.
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
from ...model import Endpoint, IPAddress, IPNetwork
from ..host.interface import OuterFlow, Underlay


class InstanceConflict(UdptunError):
    """Another instance on this host uses a resource that this one needs."""


P = TypeVar("P")  # the backend's type of path; a path describes how to reach one subnet

# A context manager that records an error of its body instead of raising it.
Attempt = Callable[[], AbstractContextManager[None]]


@dataclass(frozen=True, slots=True)
class Site:
    """The data about this node that are known before its lease is published.

    network   the network's configuration
    underlay  the interface that carries the overlay, and this node's addresses on the interface
    former    the attributes of our last known lease; None: there was no lease
    declared  the UDP port and the MTU limit that the store declares for this node; None: the store
              declares neither
    optional  True: the daemon uses other backends if this backend is not available
    """

    network: NetConfig
    underlay: Underlay
    former: Attributes | None = None
    declared: Advert | None = None
    optional: bool = False

    @property
    def udp_port(self) -> int:
        """The UDP port of this node, which its lease advertises."""
        return self.network.udp_port if self.declared is None else self.declared.port


@dataclass(frozen=True, slots=True)
class LeaseData:
    """The data that a backend publishes in our lease.

    backend_type  the lease's BackendType; "": another backend sets BackendType
    data          key 4: members of BackendData; key 6: members of BackendV6Data
    """

    backend_type: str = ""
    data: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)


class PeerNode(NamedTuple):
    """Another node, as described by its lease.

    attributes  the lease's attributes; they are untrusted and may contain any value
    public      the node's public addresses by IP version; each is a valid unicast address
    """

    attributes: Attributes
    public: Mapping[int, IPAddress]


@dataclass(frozen=True, slots=True)
class ProbeDevice:
    """A device of a backend. A socket that is bound to it reaches the backend's peers through it.

    index    the interface index; a device that was created again has another one
    address  our overlay address, the source of the probes
    path     the number of this path in probe messages
    """

    name: str
    index: int
    address: IPAddress
    path: int


class Reach(ABC, Generic[P]):
    """Computes the paths from this node to other nodes through one backend.

    Subclasses are frozen dataclasses, so that the daemon can compare them. The daemon computes all
    paths again if a ``Reach`` differs from the one before.

    has_ports  a node can have a port of its own, so several nodes can have one public address
    """

    name: ClassVar[str]
    has_ports: ClassVar[bool] = False

    @abstractmethod
    def path(self, peer: PeerNode, subnet: IPNetwork) -> P | str:
        """Return the path to this subnet of the peer, or a sentence with the reason for no path.

        An empty string means that the peer does not use this backend. Never raises.
        """


class Backend(ABC, Generic[P]):
    """One backend of this node.

    name             the backend's key in ``BACKENDS``
    waits_for        the thing that ``synced`` waits for, as text; "": ``synced`` returns at once
    needs_node_data  the backend works only if the lease of every node contains data of that node
    fragments        the backend carries IPv6 packets of 1280 bytes over every underlay, because it
                     lets its own packets be fragmented
    through_tun      the host routes the whole network into the TUN, not only the subnets of peers
    on_refused       set by the daemon; a backend that applies paths in the background calls it when
                     ``refused`` has changed
    on_lease_data    set by the daemon; a backend calls it when ``lease_data`` has changed without a
                     call of ``prepare``
    """

    name: ClassVar[str]
    waits_for: ClassVar[str] = ""
    needs_node_data: ClassVar[bool] = False
    fragments: ClassVar[bool] = False
    through_tun: ClassVar[bool] = False
    on_refused: Callable[[], None] = staticmethod(lambda: None)
    on_lease_data: Callable[[], None] = staticmethod(lambda: None)

    @abstractmethod
    def device_names(self, network: NetConfig) -> Collection[str]:
        """Return the names of the network devices that this backend creates."""

    def active_devices(self, network: NetConfig) -> Collection[str]:
        """Return the names of those devices that should exist while the backend is active."""
        return self.device_names(network)

    @abstractmethod
    def overhead(self, site: Site) -> int:
        """Return the largest number of bytes that this backend adds to an inner packet."""

    @abstractmethod
    async def prepare(self, site: Site, mtu: int) -> str:
        """Create the devices that our lease names. Return "", or the reason for the failure.

        mtu  the largest inner packet, in bytes
        Raises InstanceConflict. Raises FieldError if the configuration is not valid.
        """

    @abstractmethod
    def lease_data(self, mtu: int) -> LeaseData:
        """Return the data for our lease. Call ``lease_data`` after ``prepare``."""

    @abstractmethod
    def outer_flow(self) -> OuterFlow:
        """Return what a firewall sees of the datagrams. Call ``outer_flow`` after ``prepare``."""

    @abstractmethod
    def reach(self) -> Reach[P]:
        """Return the ``Reach`` for this backend. Call ``reach`` after ``prepare``."""

    @abstractmethod
    async def settle(self, lease: Lease, mtu: int) -> None:
        """Set up the host for our lease. Raises DeviceError, OSError."""

    @abstractmethod
    async def retire(self, network: NetConfig, former: Attributes | None) -> None:
        """Remove everything that this backend has created, because the backend is not used.

        Raises DeviceError, ControlError, OSError.
        """

    async def run(self) -> None:
        """Do this backend's background work until cancelled."""
        return

    async def synced(self) -> None:
        """Wait until all applied paths are active."""
        return

    @abstractmethod
    async def apply_all(self, paths: Mapping[IPNetwork, P]) -> int | None:
        """Replace all paths by ``paths``, which are given by subnet.

        Return how many paths changed. Return None if the backend applies the paths in the
        background; then the backend reports the result itself. If DeviceError is raised, call
        ``resync`` to apply the remaining paths.
        """

    @abstractmethod
    async def apply(self, changes: Mapping[IPNetwork, P | None]) -> int | None:
        """Set the given paths. None removes the subnet's path.

        The return value and the errors are those of ``apply_all``.
        """

    async def divert(self, changes: Mapping[IPNetwork, bool]) -> None:
        """Give the packets for a subnet to another backend (True), or take them again (False).

        A diverted subnet keeps its path: packets and probes of the peer are still accepted, and our
        own probes still reach it. The setting applies to paths that are set later too, until it is
        changed again. A backend does nothing here if the routes of other backends take precedence
        over its own. Raises DeviceError.
        """
        return

    async def diverted(self, paths: Mapping[IPNetwork, P]) -> Collection[IPNetwork]:
        """Return the subnets that an earlier daemon has diverted, according to the host.

        Call it before the first ``apply_all``, with the same paths. Raises DeviceError.
        """
        return ()

    async def resync(self) -> None:
        """Compare the host with the last applied paths, and repair differences on the host.

        A backend that does this work in ``run`` does not implement ``resync``. Raises DeviceError.
        """
        return

    # How the daemon measures this backend's paths: exactly one of the next two returns a value if
    # the path can be probed. If neither does, only an echo by the peer's IP stack can measure it.

    def probe_device(self, path: P) -> ProbeDevice | None:
        """Return the device through which the daemon probes this path."""
        return None

    def forwarder_endpoint(self, path: P) -> Endpoint | None:
        """Return the endpoint under which the forwarder reports its measurements of this path."""
        return None

    def guarded_endpoint(self, path: P) -> Endpoint | None:
        """Return the endpoint of the peer's forwarder if the firewall shall keep other programs of
        this host from sending to it."""
        return None

    async def send_ages(
        self, within: float, probes_n: Mapping[int, Callable[[], int | None]]
    ) -> Mapping[IPNetwork, float]:
        """Return, for each subnet, how many seconds ago the last packet or probe was sent to it.
        Return {} if only probes were sent through the device since the last call.

        within    leave out subnets to which no packet was sent for more than this number of seconds
        probes_n  by IP version: a function that returns how many probes were sent through the
                  ``probe_device``, or None while one is being sent. Any thread may call it
        Only for paths with a ``probe_device``. Raises DeviceError.
        """
        return {}

    @abstractmethod
    def arrival_devices(self, path: P) -> Collection[str]:
        """Return the names of the devices through which packets of this path's peer arrive."""

    @property
    def marked(self) -> bool:
        """Whether the datagrams of this backend's forwarder are known to have the mark of --mark.
        """
        return True

    async def verify(self) -> list[str]:
        """Compare the kernel's state with everything that ``settle`` has set up.

        Return a sentence for each difference. Raises DeviceError.
        """
        return []

    def take_repairs(self) -> list[str]:
        """Return a sentence for each repair since the last call."""
        return []

    @property
    def refused(self) -> Mapping[IPNetwork, str]:
        """The subnets whose path the host or the forwarder does not accept, with the reason."""
        return {}

    @abstractmethod
    async def cleanup(self, known: LastKnown | None, attempt: Attempt) -> None:
        """Remove everything that a daemon with this configuration created through this backend.

        known    the cached leases; None: there is no cache
        attempt  the context manager in which each removal has to run, so that its error does not
                 stop the other removals
        """
