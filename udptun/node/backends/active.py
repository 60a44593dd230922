"""Combines the active backends of this node into one object.

Owns: which backends are active, the inner MTU that fits all of them, the attributes of our lease,
and the report about paths. Does not depend on any single backend. Runs on the daemon's loop. Calls
must not overlap, except calls of ``run`` and ``synced``.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Coroutine, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any

from ...errors import DeviceError, FieldError, UdptunError
from ...leases.base import Attributes, Lease, Subnets
from ...leases.netconf import NetConfig
from ...model import MIN_MTU6, Endpoint, IPNetwork
from ...net.counters import device_counts
from ...net.netlink import Netlink
from ...text import counted
from ..config import NodeConfig
from ..host.interface import OuterFlow, Underlay
from ..status.report import DeviceCount, NodeReport
from . import AUTO, BACKENDS, MODES
from .base import Backend, LeaseData, Reach, Site
from .plan import Delta, LocalNode, Plan

log = logging.getLogger(__name__)

MAX_LOGGED = 10  # limit of peers that are logged one by one when peers become unreachable


class BackendUnavailable(UdptunError):
    """The only configured backend does not work on this host."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """The result of ``ActiveBackends.prepare``.

    site        the data about this node; its network has only the IP versions that are carried
    network     the network's whole configuration
    mtu         the largest inner packet, in bytes
    attributes  the attributes to publish in our lease
    reaches     the ``Reach`` of each active backend
    """

    site: Site
    network: NetConfig
    mtu: int
    attributes: Attributes
    reaches: tuple[Reach[Any], ...]

    def carried(self, lease: Lease) -> Lease:
        """Return our lease with only the subnets whose IP version is carried."""
        versions = [network.version for network in self.site.network.networks]
        v4, v6 = lease.subnets.v4, lease.subnets.v6
        return replace(lease, subnets=Subnets(v4 if 4 in versions else None,
                                              v6 if 6 in versions else None))

    def local(self, lease: Lease) -> LocalNode:
        underlay = self.site.underlay
        public = tuple(one for one in (underlay.public, underlay.public6) if one is not None)
        return LocalNode(lease.key, lease.subnets, self.site.network.networks, public, self.reaches,
                         self.site.udp_port)


def create(
    name: str, config: NodeConfig, netlink: Netlink, report: NodeReport
) -> Backend[Any]:
    """Create the backend object of this name. The call changes nothing on the host."""
    module = import_module(f".{name}", __package__)
    backend: Backend[Any] = module.create(config, netlink, report)
    return backend


class ActiveBackends:
    """Holds all backends in the list, and the list of the active ones.

    on_lease_data  called when the data of our lease have changed: call ``prepare`` again
    """

    def __init__(
        self, config: NodeConfig, netlink: Netlink, report: NodeReport,
        on_lease_data: Callable[[], None] = lambda: None,
    ) -> None:
        self._config = config
        self._report = report
        self._all = {name: create(name, config, netlink, report) for name in BACKENDS}
        self._active: tuple[Backend[Any], ...] = ()
        self._plan: Plan | None = None  # the last one
        for backend in self._all.values():
            backend.on_refused = self._record_refused
            backend.on_lease_data = on_lease_data
        self._applied = False  # a whole plan was applied since our start
        self._network: NetConfig | None = None  # of the last ``prepare``
        report.count_devices = self._count_devices
        report.route_changes_n = dict.fromkeys(BACKENDS, 0)
        report.peers.carried_n = dict.fromkeys(BACKENDS, 0)

    def __iter__(self) -> Iterator[Backend[Any]]:
        return iter(self._all.values())

    def device_names(self, network: NetConfig) -> frozenset[str]:
        """Return the names of all network devices that the backends may create."""
        return frozenset(name for backend in self for name in backend.device_names(network))

    def active_devices(self, network: NetConfig) -> frozenset[str]:
        """Return the names of the network devices that should exist."""
        return frozenset(
            name for backend in self._active for name in backend.active_devices(network))

    async def _count_devices(self) -> list[DeviceCount]:
        """Ask the kernel. Return nothing if it fails."""
        if self._network is None:
            return []
        paths = {name: backend.name for backend in self._active
                 for name in backend.active_devices(self._network)}
        try:
            counts = await asyncio.to_thread(device_counts, paths)
        except OSError as exc:
            log.debug("the devices' counters are left out: %s", exc)
            return []
        return [DeviceCount(paths[name], name, direction, *of_direction)
                for name, of_device in counts.items()
                for direction, of_direction in of_device._asdict().items()]

    # -- our own side -----------------------------------------------------------------------------

    async def prepare(self, site: Site) -> Prepared:
        """Determine which backends are active, and create the devices that our lease names.

        If the inner MTU is too small for IPv6, only IPv4 is carried.
        Raises BackendUnavailable and DeviceError. Raises FieldError if udptun does not support the
        configured Backend.Type.
        """
        mode = self._mode(site.network)
        configured = replace(site, optional=mode == AUTO)
        unavailable: dict[str, str] = {}
        active = [self._all[name] for name in ([*BACKENDS] if mode == AUTO else [mode])]
        if no_data := self._config.source.no_node_data:
            for backend in active:
                if backend.needs_node_data:
                    unavailable[backend.name] = no_data
        # If a backend fails, try again without it: the inner MTU of the others may be larger.
        while True:
            active = [backend for backend in active if backend.name not in unavailable]
            site, mtu = self._fitting(configured, active)
            failed = {backend.name: why for backend in active
                      if (why := await backend.prepare(site, mtu))}
            if not failed:
                break
            unavailable |= failed
            if mode != AUTO:
                raise BackendUnavailable(
                    f"{failed[mode]}; --backend {AUTO} would use another backend")
        for name, why in unavailable.items():
            if self._report.unavailable.get(BACKENDS[name]) != why:
                log.warning("no %s on this node: %s", BACKENDS[name], why)
        self._active, self._network = tuple(active), configured.network
        self._report.backend, self._report.mtu = mode, mtu
        self._report.unavailable = {BACKENDS[name]: why for name, why in unavailable.items()}
        attributes = combine(site.underlay, [backend.lease_data(mtu) for backend in active])
        if not self._config.advertise and not attributes.backend_type:
            attributes = _as_flannels_udp(attributes)
        return Prepared(
            site, configured.network, mtu, attributes,
            tuple(backend.reach() for backend in active),
        )

    def _fitting(self, site: Site, active: Collection[Backend[Any]]) -> tuple[Site, int]:
        """Return the site, and the largest inner packet.

        If this packet is too small for IPv6, return the site without IPv6, because the kernel
        refuses IPv6 on devices with such an MTU. Raises BackendUnavailable if no IP version is
        left.
        """
        mtu, why = _inner_mtu(site, active), ""
        if site.network.network6 is not None and mtu < MIN_MTU6:
            why = f"inner packets have at most {mtu} bytes, and IPv6 needs {MIN_MTU6}"
        if why and why != self._report.ipv6_error:
            log.warning("IPv6 is not carried: %s", why)
        elif self._report.ipv6_error and not why:
            log.info("IPv6 is carried again: inner packets have up to %d bytes", mtu)
        self._report.ipv6_error = why
        if not why:
            return site, mtu
        if site.network.network is None:
            raise BackendUnavailable(f"IPv6 is not carried: {why}")
        site = replace(site, network=site.network.without_ipv6())
        return site, _inner_mtu(site, active)

    def _mode(self, network: NetConfig) -> str:
        mode = self._config.backend or network.backend_type
        if mode not in MODES:
            raise FieldError("Backend.Type", mode, f"{' or '.join(MODES)}; --backend overrides it")
        no_data = self._config.source.no_node_data
        if mode != AUTO and self._all[mode].needs_node_data and no_data:
            others = " or ".join(name for name in MODES if name != mode)
            raise FieldError("backend", mode, f"{others} with this source of leases: {no_data}")
        return mode

    async def settle(self, prepared: Prepared, lease: Lease) -> None:
        """Set up the active backends for our lease, and retire the other backends.

        Raises DeviceError, OSError.
        """
        lease = prepared.carried(lease)
        for backend in self._active:
            await backend.settle(lease, prepared.mtu)
        for backend in self:
            if backend not in self._active:
                await backend.retire(prepared.network, prepared.site.former)

    async def verify(self) -> list[str]:
        """Return a sentence for each part of the active backends that is missing on the host.

        Raises DeviceError.
        """
        return [text for backend in self._active for text in await backend.verify()]

    def take_repairs(self) -> list[str]:
        """Return a sentence for each repair since the last call."""
        return [text for backend in self for text in backend.take_repairs()]

    async def run(self) -> None:
        """Do the background work of all backends until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            for backend in self:
                tasks.create_task(backend.run())

    async def synced(self) -> None:
        """Wait until all applied paths are active."""
        for backend in self._active:
            if backend.waits_for:
                self._report.waiting = f"waiting for {backend.waits_for}"
            await backend.synced()

    # -- paths to peers ---------------------------------------------------------------------------

    async def apply_all(self, plan: Plan, since: float) -> None:
        """Apply a whole plan. Raises DeviceError.

        since  time.monotonic() when the leases of the plan arrived
        """
        if not self._applied:
            await self._keep_carriers(plan)
            self._applied = True
        await self._each(
            plan, lambda backend: backend.apply_all(plan.paths(backend.name)), since)

    async def _keep_carriers(self, plan: Plan) -> None:
        """Let the backends carry the packets that they carried under an earlier daemon.

        The earlier daemon has measured that the preferred path to these peers does not work.
        """
        for at, backend in enumerate(self._active):
            if not at:
                continue  # there is no other backend that could carry the packets
            diverted = {}
            for subnet in await backend.diverted(plan.paths(backend.name)):
                found = plan.get(subnet)
                paths = () if found is None else found.paths[:at]
                others = [position for position, path in enumerate(paths) if path is not None]
                if others:
                    plan.carry(subnet, self._active[others[-1]].name)
                    diverted[subnet] = True
            await backend.divert(diverted)

    async def apply(self, plan: Plan, delta: Delta, since: float) -> None:
        """Apply ``delta``, the last change of ``plan``. Raises DeviceError."""
        await self._each(plan, lambda backend: backend.apply(delta.of(backend.name)), since)

    async def carry(self, plan: Plan, carriers: Mapping[IPNetwork, str | None]) -> None:
        """Carry the packets to each subnet by the given backend; None: the last one in the list
        that has a path. Raises DeviceError."""
        for subnet, carrier in carriers.items():
            plan.carry(subnet, carrier)
        await self._each(plan, lambda backend: backend.divert({
            subnet: carrier not in (None, backend.name) for subnet, carrier in carriers.items()}))

    @property
    def through_tun(self) -> bool:
        return any(backend.through_tun for backend in self._active)

    def outer_flows(self) -> tuple[OuterFlow, ...]:
        return tuple(backend.outer_flow() for backend in self._active)

    def guarded(
        self, plan: Plan, interface: str
    ) -> tuple[frozenset[Endpoint], frozenset[IPNetwork]]:
        """Return the guarded endpoints of other nodes' forwarders, and the subnets whose packets
        arrive on the underlay's interface because their nodes route without encapsulation."""
        endpoints: set[Endpoint] = set()
        direct: set[IPNetwork] = set()
        for backend in self._active:
            for subnet, path in plan.paths(backend.name).items():
                if (endpoint := backend.guarded_endpoint(path)) is not None:
                    endpoints.add(endpoint)
                if interface in backend.arrival_devices(path):
                    direct.add(subnet)
        return frozenset(endpoints), frozenset(direct)

    @property
    def marked(self) -> bool:
        """Whether the datagrams of all forwarders are known to have the mark of --mark."""
        return all(backend.marked for backend in self._active)

    async def resync(self, plan: Plan) -> None:
        """Compare the host with the applied plan, and repair the differences on the host.

        Raises DeviceError.
        """
        await self._each(plan, lambda backend: backend.resync())

    async def _each(
        self, plan: Plan, call: Callable[[Backend[Any]], Coroutine[Any, Any, int | None]],
        since: float | None = None,
    ) -> None:
        """Call every active backend, even if some of the calls fail. Then raise the first error."""
        changes: dict[str, int | None] = {}
        errors: list[DeviceError] = []
        for backend in self._active:
            try:
                changes[backend.name] = await call(backend)
            except DeviceError as exc:
                errors.append(exc)
        self._record_peers(plan)
        for name, changed_n in changes.items():
            self._report.route_changes_n[name] += changed_n or 0
        if errors:
            raise errors[0]
        # A backend that returned None applies its paths in the background, and calls
        # ``paths_applied`` itself.
        if since is not None and (None not in changes.values() or any(changes.values())):
            self._report.paths_applied(since)

    def _record_peers(self, plan: Plan) -> None:
        report = self._report.peers
        _log_new(report.unreachable, plan.unreachable, self._report)
        report.carried_n = dict.fromkeys(BACKENDS, 0) | plan.carried_n
        report.unreachable = dict(plan.unreachable)
        self._plan = plan
        self._record_refused()

    def _record_refused(self) -> None:
        if self._plan is not None:
            self._report.peers.refused = {
                self._plan.key_of(subnet): why for backend in self._active
                for subnet, why in backend.refused.items()}


def _as_flannels_udp(attributes: Attributes) -> Attributes:
    """Return the attributes as flannel's udp backend publishes them: it has only IPv4."""
    return attributes if attributes.public_ip is None else replace(attributes, public_ipv6=None)


def combine(underlay: Underlay, published: Sequence[LeaseData]) -> Attributes:
    """Return our lease's attributes, combined from the data of all active backends.

    published  the data of each active backend, in the order of ``BACKENDS``
    The lease gets the backend type of the last entry that has one.
    """
    backend_type = ""
    data: dict[int, dict[str, Any]] = {}
    for one in reversed(published):
        backend_type = backend_type or one.backend_type
        for version, members in one.data.items():
            data.setdefault(version, {}).update(members)
    return Attributes(underlay.public, underlay.public6, backend_type, data.get(4), data.get(6))


def _inner_mtu(site: Site, active: Collection[Backend[Any]]) -> int:
    """Return the size in bytes of the largest inner packet that every active backend can carry.

    With IPv6, this is at least 1280 (RFC 8200 5) if the backends can fragment their own packets.
    """
    overhead = max((backend.overhead(site) for backend in active), default=0)
    mtu = (site.network.mtu or site.underlay.mtu) - overhead
    if site.declared is not None and site.declared.mtu is not None:
        mtu = min(mtu, site.declared.mtu)
    if site.network.network6 is not None and all(backend.fragments for backend in active):
        mtu = max(mtu, MIN_MTU6)
    return mtu


def _log_new(before: Mapping[str, str], now: Mapping[str, str], report: NodeReport) -> None:
    """Log the reasons that are new or have changed, and record an event for each. At most
    MAX_LOGGED peers are named."""
    new = [(key, why) for key, why in now.items() if before.get(key) != why]
    for key, why in new[:MAX_LOGGED]:
        log.warning("no path to %s: %s", key, why)
        report.event("no_path", peer=key, reason=why)
    if len(new) > MAX_LOGGED:
        log.warning("no path to %s: see `udptun status --state 'no path'`",
                    counted(len(new) - MAX_LOGGED, "more peer"))
