"""The store of leases, as this node uses it: our network, our identity, our lease.

Owns: the lease source, the cache on disk, what is known about this node, and the task that holds
our lease. While the store does not answer, cached answers take its place. Does not depend on the
host, backends, or paths to other nodes. One asyncio loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Coroutine, Iterable, Iterator
from typing import Any, TypeVar

from ..errors import FieldError
from ..leases.base import (
    Attributes,
    Changes,
    Identity,
    Lease,
    LeaseSource,
    Snapshot,
    StoreDown,
    StoreRefused,
)
from ..leases.cache import LastKnown, LeaseCache
from ..leases.netconf import NetConfig
from .config import NodeConfig
from .host.subnet_env import former_subnets
from .status.log import LogOnce
from .status.report import NodeReport

log = logging.getLogger(__name__)
T = TypeVar("T")

PATIENCE_SECONDS = 2.0  # at the start; then the cache is used if it has an answer
CACHE_FILE = "leases.json"  # in the state directory

FAILURES = (StoreDown, StoreRefused, FieldError, TimeoutError)


class Store:
    """One store of leases. ``network``, ``identity`` and ``acquire`` are called within ``pass_``.

    confirmed  in the last pass each answer came from the store, or was confirmed by it before
    """

    def __init__(
        self, config: NodeConfig, source: LeaseSource, report: NodeReport, errors: LogOnce
    ) -> None:
        self.confirmed = False
        self._config = config
        self._source = source
        self._report = report
        self._errors = errors
        self._cache = LeaseCache(config.state_dir / CACHE_FILE)
        self._network: NetConfig | None = None
        self._identity: Identity | None = None
        self._lease: Lease | None = None
        self._published: Attributes | None = None  # what the store accepted since our start
        self._settled = False  # ``settled`` was called since our start
        self._refresh = True  # the next pass asks the store even for what is known
        self._asking = False  # this pass does
        self._hold: asyncio.Task[None] | None = None
        self._held: Lease | None = None

    @property
    def kind(self) -> str:
        return self._config.source.kind

    @property
    def lease(self) -> Lease | None:
        """Our lease as last known, possibly from the cache."""
        return self._lease

    @property
    def lease_error(self) -> str:
        return self._source.health.lease_error

    @property
    def refresh_pending(self) -> bool:
        return self._refresh

    def refresh(self) -> None:
        """Ask the store for everything in the next pass, even for what is known."""
        self._refresh = True

    def reload(self) -> None:
        self._source.reload()
        self.refresh()

    async def aclose(self) -> None:
        """Write the cache and close the connections; our lease stays."""
        await self._cache.aclose()
        await self._source.aclose()

    # -- one pass: network, identity, lease -------------------------------------------------------

    @contextlib.contextmanager
    def pass_(self) -> Iterator[None]:
        """Frame one pass. If it fails or is not confirmed, the next pass asks the store again."""
        self._asking, self._refresh = self._refresh, False
        self.confirmed = True
        try:
            yield
        except BaseException:
            self._refresh |= self._asking
            raise
        self._refresh |= not self.confirmed

    async def network(self) -> NetConfig:
        """Return the network's configuration. Raises StoreDown,
        StoreRefused, FieldError."""
        network = self._network
        if self._asking or network is None:
            try:
                network = await self._ask(self._source.network(), network)
            except FAILURES as exc:
                self._fall_back(exc, network)
        assert network is not None
        return network

    async def identity(self) -> Identity:
        """Return what the store declares about this node. Raises StoreDown, StoreRefused."""
        if self.confirmed and (self._asking or self._identity is None):
            try:
                return await self._ask(self._source.identity(), self._lease)
            except FAILURES as exc:
                self._fall_back(exc, self._lease)
        if self._identity is not None:
            return self._identity
        if self._lease is None:
            raise StoreDown("there is no lease yet")
        return self._source.cached_identity(self._lease)

    def settled_lease(self, identity: Identity) -> Lease | None:
        """Return our lease if the host is set up for it and ``identity`` is still the same."""
        return self._lease if self._settled and identity == self._identity else None

    async def acquire(self, attributes: Attributes) -> Lease:
        """Return our lease with ``attributes`` published in it, or the cached one."""
        lease = self._lease
        if self.confirmed and (
            self._asking or lease is None or attributes != self._published
        ):
            former = former_subnets(self._config.subnet_file)
            if not any(former) and lease is not None:
                former = lease.subnets
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

    def settled(self, network: NetConfig, identity: Identity, lease: Lease) -> None:
        """Remember what the host is set up for."""
        self._network, self._identity, self._lease = network, identity, lease
        self._settled = True
        self._report.lease = lease

    async def _ask(self, question: Coroutine[Any, Any, T], known: object) -> T:
        """Return the store's answer; before the first ``settled``, wait only PATIENCE_SECONDS if
        an answer is cached."""
        hurry = not self._settled and known is not None
        async with asyncio.timeout(PATIENCE_SECONDS if hurry else None):
            return await question

    def _fall_back(self, exc: Exception, known: object) -> None:
        """Continue with what is known; raise if nothing is."""
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
            log.error("our subnets are now %s: replies to pods in %s no longer arrive",
                      got.subnets, self._lease.subnets)
        if attributes != self._published:
            public = " and ".join(
                str(one) for one in (got.attributes.public_ip, got.attributes.public_ipv6) if one)
            log.info("published in our lease %s: %s, backend %s", got.key, public,
                     self._report.backend)
        self._published = attributes
        self._report.lease_error = ""

    # -- holding our lease ------------------------------------------------------------------------

    def hold(self, lease: Lease, tasks: asyncio.TaskGroup) -> None:
        """Keep the lease, instead of the one that was held before."""
        if self._held == lease:
            return
        if self._hold is not None:
            self._hold.cancel()
        self._held = lease
        self._hold = tasks.create_task(self._source.hold(lease))

    def changed_by_others(self, own: Lease | None) -> bool:
        """Return whether our lease in the store differs from the one we hold: it was edited. If it
        was deleted, the source acquires it again."""
        return own is not None and self._lease is not None and \
            (own.subnets, own.attributes) != (self._lease.subnets, self._lease.attributes)

    # -- leases of all nodes ----------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def updates(self) -> AsyncIterator[AsyncIterator[Snapshot | Changes]]:
        """The source's updates, as ``async with store.updates() as updates``."""
        async with contextlib.aclosing(self._source.updates()) as updates:  # type: ignore[type-var]
            yield updates

    def load(self) -> tuple[Lease, ...] | None:
        """Return all cached leases; None: there is no cache of this store. Blocks."""
        known = self._cache.load(self._config.source.store_id)
        return None if known is None else known.leases

    def load_own(self) -> None:
        """Take network and lease of this node from the cache. Blocks.

        The other leases are not kept: mostly the store answers, and two lists of thousands of
        leases would double the memory of the daemon.
        """
        known = self._cache.load(self._config.source.store_id)
        if known is not None:
            self._network, self._lease = known.network, known.lease
            self._report.lease = known.lease

    def save(self, leases: Iterable[Lease]) -> None:
        """Write to the cache soon."""
        assert self._network is not None
        self._cache.keep(LastKnown(
            self._config.source.store_id, self._network, self._lease, tuple(leases)))
