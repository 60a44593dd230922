"""The other nodes: keeps their leases, plans the paths to them, and applies the plan.

Owns: the active leases, the plan, and the order in which both change. The active leases come from
the store, or from the cache until the store lists its leases. Does not depend on how a store is
read or how a path is applied. One asyncio loop.

Until leases are known, no paths are applied: the forwarder and the kernel keep the paths of an
earlier daemon.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Collection, Mapping

from ..errors import DeviceError
from ..leases.base import Change, Lease, Snapshot
from ..model import Endpoint, IPNetwork
from ..text import counted
from ..wait import wait_at_most
from .backends.active import ActiveBackends
from .backends.plan import LocalNode, Plan
from .status.report import NodeReport
from .store import PATIENCE_SECONDS, Store

log = logging.getLogger(__name__)


class Peers:
    """Follows the store's leases, and applies the paths to the other nodes.

    known         set when leases are known, from the store or from the cache
    planned       is called after each change of the plan, with the plan and the changed subnets;
                  None: all subnets
    settle_again  is called if the daemon has to set up the host again, because our lease has
                  changed, a change could not be applied, or the store answers again
    """

    def __init__(
        self, store: Store, backends: ActiveBackends, report: NodeReport,
        settle_again: Callable[[], None],
        planned: Callable[[Plan, Collection[IPNetwork] | None], None],
    ) -> None:
        self.known = asyncio.Event()
        self._planned = planned
        self._store = store
        self._backends = backends
        self._report = report
        self._settle_again = settle_again
        self._leases: dict[str, Lease] = {}
        self._plan: Plan | None = None
        self._lock = asyncio.Lock()  # held during each change of ``_leases`` or ``_plan``
        self._reapply = False
        self._applied = False  # a whole plan was applied since our start
        # The last result of ``guarded`` and its interface; None after a change of the paths. It
        # depends on what the kernel has answered, so it is reset after a change is applied.
        self._guarded: tuple[
            str, tuple[frozenset[Endpoint], frozenset[IPNetwork]]] | None = None

    @property
    def leases(self) -> Collection[Lease]:
        """The leases of all nodes, ours included."""
        return self._leases.values()

    def guarded(
        self, interface: str
    ) -> tuple[frozenset[Endpoint], frozenset[IPNetwork]] | None:
        """Return what ``ActiveBackends.guarded`` returns. Return None if it is not known: no leases
        are applied yet, or our forwarder does not answer or does not have its mark yet."""
        if not self._applied or self._plan is None or not self._backends.marked:
            return None
        if self._guarded is None or self._guarded[0] != interface:
            self._guarded = interface, self._backends.guarded(self._plan, interface)
        return self._guarded[1]

    def reapply(self) -> None:
        """Apply all paths again at the next ``replan``, even if the plan is the same."""
        self._reapply = True

    async def replan(self, local: LocalNode) -> None:
        """Compute and apply all paths again if this node has changed.

        If this node has not changed, only repair the paths that other programs have changed.
        """
        async with self._lock:
            if not self.known.is_set():
                self._plan = Plan(local)
            elif self._plan is None or self._plan.local != local or self._reapply:
                await self._apply_all(local, time.monotonic())
            else:
                try:
                    await self._backends.resync(self._plan)
                finally:
                    self._guarded = None  # another peer may be on the link now
                self._planned(self._plan, ())
        if self.known.is_set():
            self._store.save(self._leases.values())

    # -- from the store ---------------------------------------------------------------------------

    async def follow(self) -> None:
        """Apply each update of the store until cancelled. Call it after the first ``replan``."""
        async with self._store.updates() as updates:
            async for update in updates:
                since = time.monotonic()
                if isinstance(update, Snapshot):
                    await self._replace(update.leases, since)
                else:
                    await self._change(update.changes, since)
                self._report.leases_n = len(self._leases)
                self._store.save(self._leases.values())
                if self._store.refresh_pending:  # the store answers again: read our lease too
                    self._settle_again()

    async def _replace(self, leases: tuple[Lease, ...], since: float) -> None:
        """Replace all leases, and apply a new plan.

        The new leases are not compared with the old leases. Each backend compares the new paths
        with its own paths. A comparison of leases would keep both lists in memory.
        """
        async with self._lock:
            self._leases = {lease.key: lease for lease in leases}
            assert self._plan is not None and self._store.lease is not None
            self._check_own(self._leases.get(self._store.lease.key))
            self.known.set()
            await self._apply_all(self._plan.local, since)
            self._report.stale = False

    async def _change(self, changes: tuple[Change, ...], since: float) -> None:
        async with self._lock:
            assert self._plan is not None and self._store.lease is not None
            for change in changes:
                if change.new is None:
                    self._leases.pop(change.key, None)
                else:
                    self._leases[change.key] = change.new
                if change.key == self._store.lease.key:
                    self._check_own(change.new)
            delta = self._plan.change(changes)
            try:
                await self._backends.apply(self._plan, delta, since)
            except DeviceError as exc:  # ``replan`` resyncs, which applies the failed changes
                log.error("%s", exc)
                self._settle_again()
            self._guarded = None
            self._planned(self._plan, delta.subnets)

    def _check_own(self, own: Lease | None) -> None:
        if self._store.changed_by_others(own):
            self._store.refresh()
            self._settle_again()

    async def _apply_all(self, local: LocalNode, since: float) -> None:
        carriers = {}
        if self._plan is not None and _names(self._plan.local) == _names(local):
            carriers = self._plan.carriers
        self._plan = Plan(local, self._leases.values(), carriers)
        try:
            await self._backends.apply_all(self._plan, since)
            self._reapply = False
        except DeviceError as exc:
            log.error("%s", exc)
            self._settle_again()
        self._applied, self._guarded = True, None
        self._planned(self._plan, None)

    async def carry(self, carriers: Mapping[IPNetwork, str | None]) -> None:
        """Carry the packets to each subnet by this backend; None: by the preferred one.

        Raises DeviceError.
        """
        async with self._lock:
            assert self._plan is not None
            try:
                await self._backends.carry(self._plan, carriers)
            finally:
                self._guarded = None

    # -- from the cache ---------------------------------------------------------------------------

    async def use_cache(self, store_answered: bool) -> None:
        """Apply the cached leases, unless the store has listed its leases.

        store_answered  True: the store has answered since our start, so first wait up to
                        PATIENCE_SECONDS for its list of leases; False: do not wait
        """
        await wait_at_most(self.known, PATIENCE_SECONDS if store_answered else 0)
        async with self._lock:
            cached = None if self.known.is_set() else self._store.load()
            if cached is None:
                return
            assert self._plan is not None
            self._leases = {lease.key: lease for lease in cached}
            await self._apply_all(self._plan.local, time.monotonic())
            self._report.leases_n, self._report.stale = len(self._leases), True
            self.known.set()
        log.warning("no leases from the store yet: using %s from the cache",
                    counted(len(self._leases), "lease"))


def _names(local: LocalNode) -> list[str]:
    return [reach.name for reach in local.reaches]
