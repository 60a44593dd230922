"""This node's access to the store of leases: our network, our identity, our lease.

Owns: the lease source, the cache on disk, the known data about this node, and the task that holds
our lease. While the store does not answer, cached answers are used. Does not depend on the host, on
backends, or on paths to other nodes. One asyncio loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Coroutine, Iterable, Iterator
from ipaddress import IPv4Address, IPv6Address
from typing import Any, TypeVar

from ..errors import FieldError, UdptunError
from ..leases.base import (
    Attributes,
    Changes,
    Identity,
    Lease,
    LeaseSource,
    Snapshot,
    StoreDown,
    StoreRefused,
    Subnets,
)
from ..leases.cache import CACHE_FILE, LastKnown, LeaseCache
from ..leases.netconf import NetConfig
from ..model import IPAddress
from .config import NodeConfig
from .host.subnet_env import former_subnets
from .status.log import LogOnce
from .status.report import DISK_REMEDY, NodeReport

log = logging.getLogger(__name__)
T = TypeVar("T")

PATIENCE_SECONDS = 2.0  # at the start, wait so long for the store before a cached answer is used

FAILURES = (StoreDown, StoreRefused, FieldError, TimeoutError)


class Store:
    """One store of leases. Call ``network``, ``identity`` and ``acquire`` only within ``pass_``.

    addresses  the addresses of this host to which the overlay was bound last; empty: not known
    confirmed  True: the store did not fail in the last pass. Each answer came from the store, in
               this pass or in an earlier one.
    """

    def __init__(
        self, config: NodeConfig, source: LeaseSource, report: NodeReport, errors: LogOnce
    ) -> None:
        self.addresses: tuple[IPAddress, ...] = ()
        self.confirmed = False
        self._config = config
        self._source = source
        self._report = report
        self._errors = errors
        self._cache = LeaseCache(
            config.state_dir / CACHE_FILE,
            failed=lambda why: report.set_trouble("leases", why, DISK_REMEDY))
        self._network: NetConfig | None = None
        self._refused: tuple[NetConfig, FieldError] | None = None
        self._identity: Identity | None = None
        self._overrides: Identity | None = None  # of the cache, if it has any
        self._lease: Lease | None = None
        self._published: Attributes | None = None  # that the store has accepted since our start
        self._settled = False  # ``settled`` was called since our start
        self._refresh = True  # the next pass asks the store again, also for answers that are known
        self._asking = False  # this pass asks the store again, also for answers that are known
        self._hold: asyncio.Task[None] | None = None
        self._held: Lease | None = None

    @property
    def kind(self) -> str:
        return self._config.source.kind

    @property
    def lease(self) -> Lease | None:
        """The last known version of our lease, possibly from the cache."""
        return self._lease

    @property
    def lease_error(self) -> str:
        return self._source.health.lease_error

    @property
    def refresh_pending(self) -> bool:
        return self._refresh

    def hosts(self) -> tuple[str, ...]:
        return self._source.hosts()

    def refresh(self) -> None:
        """In the next pass, ask the store for everything again, including known answers."""
        self._refresh = True

    def reload(self) -> None:
        self._source.reload()
        self._refused = None
        self.refresh()

    async def aclose(self) -> None:
        """Write the cache and close the connections. Our lease stays in the store."""
        await self._cache.aclose()
        await self._source.aclose()

    # -- one pass: network, identity, lease -------------------------------------------------------

    @contextlib.contextmanager
    def pass_(self) -> Iterator[None]:
        """Return the context of one pass.

        If the pass fails or is not confirmed, the next pass asks the store again.
        """
        self._asking, self._refresh = self._refresh, False
        self.confirmed = True
        try:
            yield
        except BaseException:
            self._refresh |= self._asking
            raise
        self._refresh |= not self.confirmed

    async def network(self) -> NetConfig:
        """Return the network's configuration. Raises StoreDown, StoreRefused, FieldError."""
        network = self._network
        if self._asking or network is None:
            try:
                answer = await self._ask(self._source.network(), network)
                if self._refused is not None and answer == self._refused[0]:
                    raise self._refused[1]
                network = answer
            except FAILURES as exc:
                self._fall_back(exc, network)
        assert network is not None
        return network

    def refuse(self, network: NetConfig, error: FieldError) -> UdptunError:
        """Use the last known network instead of ``network``, from the next pass on, until
        ``reload``.

        Returns the error to raise: ``error``, which ends the daemon, if there is no other network.
        """
        self._refused = network, error
        if self._network is None or self._network == network:
            return error
        return StoreDown(str(error))

    async def identity(self) -> Identity:
        """Return the data that the store declares about this node.

        Raises StoreDown, StoreRefused.
        """
        if self.confirmed and (self._asking or self._identity is None):
            try:
                return await self._ask(self._source.identity(), self._lease)
            except FAILURES as exc:
                self._fall_back(exc, self._lease)
        if self._identity is not None:
            return self._identity
        if self._lease is None:
            raise StoreDown("there is no lease yet")
        return self._overrides or self._source.cached_identity(self._lease)

    def settled_lease(self, identity: Identity) -> Lease | None:
        """Return our lease if the host is set up for it and ``identity`` has not changed.

        Return None in other cases.
        """
        return self._lease if self._settled and identity == self._identity else None

    async def acquire(self, attributes: Attributes) -> Lease:
        """Publish ``attributes`` in our lease, and return the lease.

        If the store fails, return the cached lease.
        """
        lease = self._lease
        if self.confirmed and (
            self._asking or lease is None or attributes != self._published
        ):
            former = former_subnets(self._config.subnet_file)
            if lease is not None:
                # subnet.env has no IPv6 subnet if IPv6 is not carried
                former = Subnets(former.v4 or lease.subnets.v4, former.v6 or lease.subnets.v6)
            try:
                got = await self._ask(self._source.acquire(attributes, former), lease)
            except FAILURES as exc:
                self._fall_back(exc, lease)
            else:
                self._record(attributes, got)
                return got
        if lease is None:
            raise StoreDown("there is no lease yet")
        return lease

    def settled(
        self, network: NetConfig, identity: Identity, lease: Lease,
        addresses: tuple[IPAddress, ...],
    ) -> None:
        """Record the data for which the host is now set up.

        addresses  the addresses of this host to which the overlay is bound
        """
        self.addresses = addresses
        self._network, self._identity, self._lease = network, identity, lease
        self._settled = True
        self._report.lease = lease

    async def _ask(self, question: Coroutine[Any, Any, T], known: object) -> T:
        """Return the store's answer.

        known  the cached answer, or None
        If an answer is cached and ``settled`` was not called yet, raise TimeoutError after
        PATIENCE_SECONDS.
        """
        hurry = not self._settled and known is not None
        async with asyncio.timeout(PATIENCE_SECONDS if hurry else None):
            return await question

    def _fall_back(self, exc: Exception, known: object) -> None:
        """Handle a failure of the store.

        If an answer is known, record that the pass is not confirmed, and return. Else raise.
        """
        if known is None:
            if isinstance(exc, TimeoutError):
                raise StoreDown("the store does not answer") from None
            raise exc
        text = str(exc) or f"the store does not answer within {PATIENCE_SECONDS:g} s"
        self._errors.error(text)
        self._report.lease_error = text
        self.confirmed = False

    def _record(self, attributes: Attributes, got: Lease) -> None:
        if self._lease is not None and got.subnets != self._lease.subnets:
            log.error(
                "our subnets are now %s: packets to pods in %s no longer arrive. Delete these "
                "pods, and the bridge cni0 if it has an address in %s: the CNI plugin creates it "
                "again", got.subnets, self._lease.subnets, self._lease.subnets)
        if attributes != self._published:
            public = " and ".join(
                str(one) for one in (got.attributes.public_ip, got.attributes.public_ipv6) if one)
            log.info("published in our lease %s: %s, backend %s", got.key, public,
                     self._report.backend)
        self._published = attributes
        self._report.lease_error = ""

    # -- holding our lease ------------------------------------------------------------------------

    def hold(self, lease: Lease, tasks: asyncio.TaskGroup) -> None:
        """Start to hold ``lease``, and stop to hold the former lease."""
        if self._held == lease:
            return
        if self._hold is not None:
            self._hold.cancel()
        self._held = lease
        self._hold = tasks.create_task(self._source.hold(lease))

    def changed_by_others(self, own: Lease | None) -> bool:
        """Return True if another program has edited our lease in the store.

        own  our lease in the store; None: the lease was deleted. Then return False, because the
             source acquires the lease again.
        """
        return own is not None and self._lease is not None and \
            (own.subnets, own.attributes) != (self._lease.subnets, self._lease.attributes)

    # -- leases of all nodes ----------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def updates(self) -> AsyncIterator[AsyncIterator[Snapshot | Changes]]:
        """Return the source's updates. Use: ``async with store.updates() as updates``."""
        async with contextlib.aclosing(self._source.updates()) as updates:  # type: ignore[type-var]
            yield updates

    def load(self) -> tuple[Lease, ...] | None:
        """Return all cached leases. Return None if there is no cache of this store. Blocks."""
        known = self._cache.load(self._config.source.store_id)
        return None if known is None else known.leases

    def load_own(self) -> None:
        """Load this node's network and lease from the cache. Blocks.

        The other nodes' leases are not kept in memory. They are usually not needed, because the
        store answers. Two lists of thousands of leases would double the memory of the daemon.
        """
        known = self._cache.load(self._config.source.store_id)
        if known is not None:
            self._network, self._lease = known.network, known.lease
            self.addresses = known.addresses
            self._overrides = _overriding(known.overrides)
            self._source.recall(known.memory)
            self._report.lease = known.lease

    def save(self, leases: Iterable[Lease]) -> None:
        """Schedule a write of the cache with ``leases`` and the data about this node."""
        assert self._network is not None
        self._cache.keep(LastKnown(
            self._config.source.store_id, self._network, self._lease, tuple(leases),
            self.addresses, _overrides(self._identity), self._source.memory()))


def _overrides(identity: Identity | None) -> tuple[IPAddress, ...]:
    if identity is None or not identity.overrides_options:
        return ()
    both = (identity.public_ip, identity.public_ipv6)
    return tuple(address for address in both if address is not None)


def _overriding(addresses: tuple[IPAddress, ...]) -> Identity | None:
    v4 = next((one for one in addresses if isinstance(one, IPv4Address)), None)
    v6 = next((one for one in addresses if isinstance(one, IPv6Address)), None)
    return Identity(v4, v6, overrides_options=True) if addresses else None
