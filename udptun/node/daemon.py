"""The node daemon: lease, host and routes kept as the store says, whatever goes down around it.

Owns the order of things: what is done at the start, at each change, at the end, and what holds
while the store does not answer. Everything that is done to the host is one procedure, ``_settle``,
which may be repeated and changes only what differs; start, reload, another address, another lease
and the return of a store are nothing but reasons to run it. Refuses to know how any part works.
One asyncio loop, plain asyncio's; netlink and the control client have threads of their own.

Fail-static: what the store said last is on disk, and is in force until the store says otherwise.
The end of the daemon, however it comes, ends nothing else.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import gc
import logging
import os
import signal
import time
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from ..errors import DeviceError, FieldError, UdptunError
from ..leases.base import (
    Attributes,
    Change,
    Identity,
    Lease,
    Snapshot,
    StoreDown,
    StoreRefused,
)
from ..leases.cache import LastKnown, LeaseCache
from ..leases.netconf import NetConfig
from ..leases.sources import make_source
from ..leases.wait import wait_at_most
from ..net.netlink import Netlink
from .ability import vxlan_name
from .cleanup import LOCK_FILE, SAVED_FILE, clean_up
from .config import InterfaceOptions, NodeConfig
from .host.host import Host
from .host.interface import NoInterface, choose
from .host.subnet_env import former_subnets
from .memory import give_back, one_arena
from .plan import Here, Plan
from .status.notify import Notifier
from .status.report import NodeReport

log = logging.getLogger(__name__)
T = TypeVar("T")

RETRY_SECONDS = 1.0  # before the store, or the host, is asked again for what it refused
STORE_PATIENCE_SECONDS = 2.0  # what is kept on disk comes into force when the store takes longer
RESYNC_SECONDS = 60.0  # between looks at what others may have done to our VXLAN entries
LOOK_SECONDS = 1.0  # between looks at our own health, for the service manager and the log

_STORE_FAILED = (StoreDown, StoreRefused, FieldError, TimeoutError)


class AlreadyRunning(UdptunError):
    """Another daemon uses the same state directory."""


async def run(config: NodeConfig) -> None:
    """One node daemon, until SIGTERM or SIGINT; with ``cleanup`` the end of all that one made.

    Raises UdptunError or OSError for what no waiting can mend. Call it from the main thread.
    """
    one_arena()
    with locked(config.state_dir), Netlink() as netlink:
        if config.cleanup:
            await clean_up(config, netlink)
        else:
            daemon = Daemon(config, netlink)
            loop = asyncio.get_running_loop()
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.add_signal_handler(number, daemon.stop, signal.Signals(number).name)
            loop.add_signal_handler(signal.SIGHUP, daemon.reload)
            await daemon.run()


@contextlib.contextmanager
def locked(state_dir: Path) -> Iterator[None]:
    """Two daemons on one host, or one beside a cleanup, would undo each other's work."""
    state_dir.mkdir(mode=0o750, parents=True, exist_ok=True)
    with (state_dir / LOCK_FILE).open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise AlreadyRunning(f"a node daemon runs already with the state in {state_dir}") \
                from None
        yield


class Daemon:
    def __init__(self, config: NodeConfig, netlink: Netlink) -> None:
        self._config = config
        self._netlink = netlink
        self._source = make_source(config.source, netlink.local_addresses)
        self.report = NodeReport(config.source.kind, self._source.health)
        self._host = Host(config, netlink, self.report)
        self._saved = LeaseCache(config.state_dir / SAVED_FILE)
        self._notifier = Notifier.from_environment()

        # What is known: from disk first, then from the store.
        self._network: NetConfig | None = None
        self._lease: Lease | None = None
        self._leases: dict[str, Lease] = {}
        self._identity: Identity | None = None  # what the store declared at the last settle
        self._published: Attributes | None = None  # what the store took from us since our start
        self._ask = True  # network and lease are to be asked for, whatever is known
        self._plan: Plan | None = None

        self._again = asyncio.Event()  # a reason to settle
        self._told = asyncio.Event()  # there are leases in force: the store's, or the disk's
        self._applying = asyncio.Lock()
        self._stopping = asyncio.Event()
        self._reloading = False
        self._held: Lease | None = None
        self._holding: asyncio.Task[None] | None = None
        self._tasks: asyncio.TaskGroup | None = None
        self._complained: set[str] = set()

    # -- life -------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Until ``stop``, or until what no waiting can mend."""
        loop = asyncio.get_running_loop()
        work = loop.create_task(self._work())
        stop = loop.create_task(self._stopping.wait())
        try:
            await asyncio.wait({work, stop}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._notifier.stopping()
            work.cancel()
            stop.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await work

    def stop(self, why: str) -> None:
        """End, and leave all in place. Asked again: exit at once."""
        if self._stopping.is_set():
            log.warning("%s again: exiting at once", why)
            logging.shutdown()
            os._exit(1)
        log.info("%s: ending; forwarder, routes and lease stay", why)
        self._stopping.set()

    def reload(self) -> None:
        """Ask the store for everything again, and look whether all on the host is as it should."""
        log.info("reading everything again")
        self._notifier.reloading()
        self._reloading = self._ask = True
        self._source.reload()
        self._host.keeper.resync()
        self._again.set()

    async def _work(self) -> None:
        try:
            async with asyncio.TaskGroup() as tasks:
                await self._start(tasks)
        except BaseExceptionGroup as group:
            raise _first(group) from None
        finally:
            await self._saved.aclose()
            await self._source.aclose()

    async def _start(self, tasks: asyncio.TaskGroup) -> None:
        self._tasks = tasks
        self._take_from_disk()
        if self._config.healthz_port:
            tasks.create_task(self._answer_for_health())
        tasks.create_task(self._notifier.feed(lambda: True))
        tasks.create_task(self._host.keeper.run())
        loop = asyncio.get_running_loop()
        self._netlink.watch_addresses(lambda _: _call_in(loop, self._again.set))
        current = await self._settle_first()
        tasks.create_task(self._follow())
        tasks.create_task(self._take_leases_from_disk(current))
        tasks.create_task(self._keep_settled(current))
        tasks.create_task(self._keep_peers())
        if self._host.rules_wanted:
            tasks.create_task(self._host.firewall.keep(self._config.iptables_resync))
        tasks.create_task(self._look_at_ourselves())
        tasks.create_task(self._announce())

    async def _answer_for_health(self) -> None:
        from .status.server import HealthServer  # late: only where a port was given

        config = self._config
        server = HealthServer(self.report, config.healthz_ip, config.healthz_port, config.control)
        await server.start()
        try:
            await asyncio.Event().wait()
        finally:
            await server.aclose()

    async def _announce(self) -> None:
        """Say that the start is over: what we know is in force."""
        self.report.waiting = f"waiting for the leases of {self._config.source.kind}"
        await self._told.wait()
        if self._plan is not None and self._plan.here.udp_port is not None:
            self.report.waiting = "waiting for the forwarder"
            await self._host.keeper.in_step()
        self.report.waiting = ""
        # What is loaded and known by now stays: a collection that walks it would hold up a change.
        gc.collect()
        gc.freeze()
        give_back()
        log.info("ready: %s", self._status())
        self._notifier.ready(self._status())

    def _status(self) -> str:
        report = self.report
        subnets = report.lease.subnets if report.lease is not None else "no lease"
        return (f"{subnets}, {report.leases_n} leases, "
                f"{report.peers.udp_n} peers by UDP and {report.peers.vxlan_n} by VXLAN"
                + (", kept from before: the store is down" if report.stale else ""))

    async def _look_at_ourselves(self) -> None:
        """What others are to know of changes that nobody tells us."""
        status, lease_error = "", ""
        while True:
            self.report.firewall_error = self._host.firewall.error
            if not self.report.waiting and status != (status := self._status()):
                self._notifier.status(status)
            if lease_error != (lease_error := self._source.health.lease_error) and lease_error:
                log.error("our lease: %s", lease_error)
            await asyncio.sleep(LOOK_SECONDS)

    # -- what is known ----------------------------------------------------------------------------

    def _take_from_disk(self) -> None:
        """What this node is. The leases are not taken: the store has them, mostly, and nobody needs
        the memory for two lists of them."""
        known = self._saved.load(self._config.source.store_id)
        if known is not None:
            self._network, self._lease = known.network, known.lease
            self.report.lease = known.lease

    async def _take_leases_from_disk(self, current: bool) -> None:
        """When the store does not tell its own. Until then nothing is put in force: the forwarder
        and the kernel go on with what they have."""
        await wait_at_most(self._told, STORE_PATIENCE_SECONDS if current else 0)
        async with self._applying:
            known = None if self._told.is_set() else self._saved.load(self._config.source.store_id)
            if known is None:
                return
            assert self._plan is not None
            self._leases = {lease.key: lease for lease in known.leases}
            await self._put_all(self._plan.here, time.monotonic())
            self.report.leases_n, self.report.stale = len(self._leases), True
            self._told.set()
        log.warning("the store does not tell the leases: those it told before are in force, %d",
                    len(self._leases))

    def _keep_on_disk(self) -> None:
        if not self._told.is_set():
            return  # what is there is more than we know
        assert self._network is not None
        self._saved.keep(LastKnown(
            self._config.source.store_id, self._network, self._lease, tuple(self._leases.values()),
        ))

    async def _asked(self, question: Coroutine[Any, Any, T], known: object) -> T:
        """The store's answer; at the start less time is given to it where one is known."""
        hurry = self._plan is None and known is not None
        async with asyncio.timeout(STORE_PATIENCE_SECONDS if hurry else None):
            return await question

    # -- settling ---------------------------------------------------------------------------------

    async def _settle_first(self) -> bool:
        """Until the host is set up, as the store says or as it said before our start."""
        while True:
            try:
                return await self._settle()
            except (StoreDown, NoInterface, DeviceError) as exc:
                if isinstance(exc, DeviceError) and exc.errno in (errno.EPERM, errno.EACCES):
                    raise
                self._complain(exc)
                self.report.waiting = str(exc)
            await self._sleep()

    async def _keep_settled(self, settled: bool) -> None:
        while True:
            if settled:
                await self._again.wait()
            else:
                await self._sleep()
            self._again.clear()
            reloading, self._reloading = self._reloading, False
            try:
                settled = await self._settle()
            except (UdptunError, OSError) as exc:
                self._complain(exc)
                settled = False
            if settled:
                self._complained.clear()
            if reloading:
                self._notifier.ready(self._status())

    async def _sleep(self) -> None:
        await wait_at_most(self._again, RETRY_SECONDS)
        self._again.clear()

    def _complain(self, why: Exception) -> None:
        """Once for each reason, until all is in order: it is tried again every second."""
        text = str(why) or f"the store does not answer within {STORE_PATIENCE_SECONDS:g} s"
        if text not in self._complained:
            log.error("%s", text)
            self._complained.add(text)

    async def _settle(self) -> bool:
        """Make the host what the store says. False: what the store said before had to do.

        Raises what the store raises where nothing is known from before; NoInterface, DeviceError,
        NoVxlan, FieldError, OSError.
        """
        ask, self._ask = self._ask, False
        try:
            current = await self._settle_with(ask)
        except BaseException:
            self._ask = self._ask or ask
            raise
        self._ask = self._ask or not current
        return current

    async def _settle_with(self, ask: bool) -> bool:
        current = True
        network, lease = self._network, self._lease
        if ask or network is None:
            try:
                network = await self._asked(self._source.network(), network)
            except _STORE_FAILED as exc:
                current = self._fall_back(exc, network)
        assert network is not None
        identity, current = await self._identify(ask, current)
        families = identity.families
        if families is None:
            families = frozenset(net.version for net in network.networks)
        options = _with_declared(self._config.interface, identity)
        ours = (self._config.tun, vxlan_name(network.vni, 4), vxlan_name(network.vni, 6))
        try:
            underlay = await choose(
                self._netlink, options, 4 in families, 6 in families, ours,
            )
        except (NoInterface, DeviceError) as exc:
            self.report.interface_error = str(exc)
            raise
        if self.report.underlay not in (None, underlay):
            log.warning("the underlay has changed: %s at %s", underlay.name,
                        underlay.public or underlay.public6)
        self.report.underlay, self.report.interface_error = underlay, ""

        former = None if lease is None else lease.attributes
        ability = await self._host.prepare(network, underlay, former, identity.advert)
        if self._plan is not None and lease is not None and identity == self._identity:
            # A change on this host is applied before the store answers. A change in the store is
            # applied together with the lease, which may have changed as well.
            await self._host.settle(ability, lease)
        attributes = ability.attributes(self._config.advertise)
        lease, current = await self._acquire(attributes, ask, current)
        await self._host.settle(ability, lease)
        self._network, self._lease, self._identity = network, lease, identity
        self.report.lease = lease
        await self._plan_for(ability.here(lease))
        self._keep_on_disk()
        if current:
            self._hold(lease)
        return current

    def _fall_back(self, exc: Exception, known: object) -> bool:
        """Go on with what is known; where nothing is, there is nothing to go on with."""
        if known is None:
            if isinstance(exc, TimeoutError):
                raise StoreDown("the store does not answer") from None
            raise exc
        self._complain(exc)
        self.report.lease_error = str(exc)
        return False

    async def _identify(self, ask: bool, current: bool) -> tuple[Identity, bool]:
        """What the store declares about us, and whether it has confirmed that."""
        if current and (ask or self._identity is None):
            try:
                return await self._asked(self._source.identity(), self._lease), current
            except _STORE_FAILED as exc:
                current = self._fall_back(exc, self._lease)
        if self._identity is not None:
            return self._identity, current
        if self._lease is None:
            raise StoreDown("there is no lease yet")
        return self._source.cached_identity(self._lease), current

    async def _acquire(
        self, attributes: Attributes, ask: bool, current: bool
    ) -> tuple[Lease, bool]:
        """Our lease, and whether the store has confirmed it and what it says."""
        lease = self._lease
        if current and (ask or lease is None or attributes != self._published):
            former = former_subnets(self._config.subnet_file)
            if not any(former) and lease is not None:
                former = lease.subnets
            try:
                got = await self._asked(self._source.acquire(attributes, former), lease)
            except _STORE_FAILED as exc:
                current = self._fall_back(exc, lease)
            else:
                if lease is not None and got.subnets != lease.subnets:
                    log.error("our subnets are %s now: what the pods of %s send does not come "
                              "back", got.subnets, lease.subnets)
                if attributes != self._published:
                    log.info("published in our lease %s: %s", got.key, _words(got.attributes))
                self._published = attributes
                self.report.lease_error = ""
                return got, current
        if lease is None:
            raise StoreDown("there is no lease yet")
        return lease, current

    def _hold(self, lease: Lease) -> None:
        if self._held == lease:
            return
        if self._holding is not None:
            self._holding.cancel()
        self._held = lease
        assert self._tasks is not None
        self._holding = self._tasks.create_task(self._source.hold(lease))

    # -- the other nodes --------------------------------------------------------------------------

    async def _follow(self) -> None:
        """Put in force what the store says, from its first word on."""
        async with contextlib.aclosing(self._source.updates()) as updates:  # type: ignore[type-var]
            async for update in updates:
                since = time.monotonic()
                if isinstance(update, Snapshot):
                    await self._take_all(update.leases, since)
                else:
                    await self._take(update.changes, since)
                self.report.leases_n = len(self._leases)
                self._keep_on_disk()
                if self._ask:  # the store is back: ask it for the rest, too
                    self._again.set()

    async def _take_all(self, leases: tuple[Lease, ...], since: float) -> None:
        """Made anew, not compared with what was known: so nothing holds that any longer. Those
        who put it in force compare it with what they have."""
        async with self._applying:
            self._leases = {lease.key: lease for lease in leases}
            assert self._plan is not None and self._lease is not None
            self._look_at_own(self._leases.get(self._lease.key))
            self._told.set()
            await self._put_all(self._plan.here, since)
            self.report.stale = False

    async def _take(self, changes: tuple[Change, ...], since: float) -> None:
        async with self._applying:
            assert self._plan is not None and self._lease is not None
            for change in changes:
                if change.new is None:
                    self._leases.pop(change.key, None)
                else:
                    self._leases[change.key] = change.new
                if change.key == self._lease.key:
                    self._look_at_own(change.new)
            try:
                await self._host.put(self._plan, self._plan.change(changes), since)
            except DeviceError as exc:  # all of it again: nothing of a change may be lost
                log.error("%s", exc)
                self._again.set()

    def _look_at_own(self, own: Lease | None) -> None:
        """Ours may be changed by others, in a file or by an operator; that it is gone is for the
        source to mend."""
        if own is not None and self._lease is not None and not _same(own, self._lease):
            self._ask = True
            self._again.set()

    async def _put_all(self, here: Here, since: float) -> None:
        self._plan = Plan(here, self._leases.values())
        try:
            await self._host.put_all(self._plan, since)
        except DeviceError as exc:
            log.error("%s", exc)
            self._again.set()

    async def _plan_for(self, here: Here) -> None:
        async with self._applying:
            if not self._told.is_set():
                self._plan = Plan(here)
            elif self._plan is not None and self._plan.here == here:
                await self._host.resync()
            else:
                await self._put_all(here, time.monotonic())

    async def _keep_peers(self) -> None:
        await self._told.wait()
        while True:
            await asyncio.sleep(RESYNC_SECONDS)
            async with self._applying:
                try:
                    await self._host.resync()
                except DeviceError as exc:
                    log.error("%s", exc)


def _with_declared(options: InterfaceOptions, identity: Identity) -> InterfaceOptions:
    """Combine our options with the public addresses that the store declares."""
    given = (options.public_ip, options.public_ipv6)
    declared = (identity.public_ip, identity.public_ipv6)
    first, second = (declared, given) if identity.overrides_options else (given, declared)
    return replace(options, public_ip=first[0] or second[0], public_ipv6=first[1] or second[1])


def _same(one: Lease, other: Lease) -> bool:
    return (one.subnets, one.attributes) == (other.subnets, other.attributes)


def _words(said: Attributes) -> str:
    public = " and ".join(str(one) for one in (said.public_ip, said.public_ipv6) if one)
    return f"{public}, backend {said.backend_type or 'udp'}"


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The first error of a group of tasks: the others are mostly its consequences."""
    error = group.exceptions[0]
    return _first(error) if isinstance(error, BaseExceptionGroup) else error


def _call_in(loop: asyncio.AbstractEventLoop, work: Callable[[], object]) -> None:
    with contextlib.suppress(RuntimeError):  # the loop closed meanwhile
        loop.call_soon_threadsafe(work)
