"""The node daemon: starts its parts, sets up the host again after each change, and stops.

Owns: the order in which the parts are started and ended, and ``_settle``, the only procedure that
sets up this host for our lease and network. The daemon runs ``_settle`` at its start, at a reload,
after a change of this host that concerns the overlay, after a change of our lease, when the store
answers again, and every LOOK_SECONDS. ``_settle`` may be repeated: it changes only the parts of the
host that differ from the wanted state. Does not depend on how a part works. One asyncio loop (not
uvloop); netlink and the control client have threads of their own.

The node is fail-static: the last answers of the store are saved on disk and stay active until the
store gives other answers. If the daemon ends, also by a crash, the forwarder, the routes and the
lease stay.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import logging
import os
import signal
from collections.abc import Callable, Collection
from dataclasses import replace

from .._version import __version__
from ..errors import DeviceError, FieldError, UdptunError
from ..files import DISK_ERRORS
from ..instance import Instance
from ..leases.base import Identity, Lease, StoreDown, StoreNotReady
from ..leases.sources import make_source
from ..model import Endpoint, IPNetwork
from ..net.netlink import Netlink
from ..notify import Notifier
from ..wait import wait_at_most
from .backends.active import ActiveBackends, Prepared
from .backends.base import Site
from .backends.plan import Plan
from .cleanup import clean_up, remove_empty_directories
from .config import InterfaceOptions, NodeConfig
from .host import conntrack
from .host.host import Host
from .host.interface import Needed, NoInterface, Underlay
from .host.leftovers import Leftovers
from .host.sticky import UnderlayChoice
from .host.taken import Taken, refuse_taken
from .host_check import HostCheck
from .locks import Locks
from .malloc import return_free_memory, use_one_arena
from .paths.paths import Carriers, Paths
from .peers import Peers
from .process import handover
from .status.checks import CheckEvents
from .status.log import LogOnce
from .status.report import DISK_REMEDY, NodeReport
from .status.scrape import NodeScrape
from .status.socket import NodeSocket
from .store import Store

log = logging.getLogger(__name__)

LISTEN_REMEDY = "end the program that uses the address, or choose another; the daemon tries again"
RETRY_SECONDS = 1.0  # from a failure of ``_settle`` to the next attempt
BETWEEN_SECONDS = 0.2  # the shortest time between two calls of ``_settle``; one call takes longer
LOOK_SECONDS = 30.0  # without a notification of the kernel, compare the host at this interval
STATUS_SECONDS = 1.0  # between two updates of our status for the service manager


async def run(config: NodeConfig) -> None:
    """Run one node daemon until SIGTERM or SIGINT.

    If ``config.cleanup`` is set, remove everything that the daemon created, and return instead.
    Raises UdptunError or OSError for a failure that another attempt cannot repair. Call ``run``
    from the main thread.
    """
    use_one_arena()
    if config.take_over:
        await handover.take_over(config.instance, config.control)
    handed_over = await _run(config)
    if handed_over:
        await _stay(config.instance)


async def _run(config: NodeConfig) -> bool:
    """Return whether the daemon has handed over to another one."""
    with Locks(config) as locks, Netlink() as netlink:
        if config.cleanup:
            await clean_up(config, netlink)
        else:
            daemon = Daemon(config, netlink, locks)
            loop = asyncio.get_running_loop()
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.add_signal_handler(number, daemon.stop, signal.Signals(number).name)
            loop.add_signal_handler(signal.SIGHUP, daemon.reload)
            await daemon.run()
            return daemon.handed_over
    remove_empty_directories(config)  # the locks were there
    return False


async def _stay(instance: Instance) -> None:
    """Stay until the daemon that has taken over has ended, or until SIGTERM or SIGINT.

    Otherwise a container runtime would start this daemon again at once.
    """
    loop = asyncio.get_running_loop()
    waiting = loop.create_task(handover.wait_for_successor(instance))
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, waiting.cancel)
    with contextlib.suppress(asyncio.CancelledError):
        await waiting


class Daemon:
    """locks  those of the daemon; None: it needs none"""

    def __init__(self, config: NodeConfig, netlink: Netlink, locks: Locks | None = None) -> None:
        source = make_source(config.source, netlink.local_addresses)
        self.report = NodeReport(config.source.kind, source.health, files=_files(config))
        self._config = config
        self._netlink = netlink
        self._locks = locks
        self._changes = CheckEvents(self.report)
        self._scrape = NodeScrape(self.report, config.control, config.metrics_peers)
        self._errors = LogOnce(log)
        self._store = Store(config, source, self.report, self._errors)
        self._settle_again = asyncio.Event()
        self._backends = ActiveBackends(config, netlink, self.report, self._settle_again.set)
        self._underlay = UnderlayChoice(netlink, config.address_grace)
        self._host = Host(config, self.report, self._guarded)
        self._leftovers = Leftovers(netlink)
        self._taken = Taken(netlink)
        self._host_check = HostCheck(
            netlink, self._backends, self._host, self.report, self._settle_again.set,
            lambda: self._peers.leases, config.mark)
        self._paths = Paths(self._backends, self.report, config.control, self._carry)
        self._peers = Peers(self._store, self._backends, self.report, self._settle_again.set,
                            self._plan_changed)
        self._notifier = Notifier.from_environment()
        self._stopping = asyncio.Event()
        self._reloading = False
        self.handed_over = False
        self._tasks: asyncio.TaskGroup | None = None

    # -- run -------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Run until ``stop`` is called, or until a failure that another attempt cannot repair."""
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
        """End the daemon; the forwarder, the routes and the lease stay.

        The second call exits at once.
        """
        if self._stopping.is_set():
            log.warning("%s again: exiting at once", why)
            logging.shutdown()
            os._exit(1)
        log.info("%s: ending; forwarder, routes and lease stay", why)
        self._stopping.set()

    def _hand_over(self) -> None:
        """End for another daemon, which has asked for the node."""
        if not self._stopping.is_set():
            log.info("another daemon takes over; forwarder, routes and lease stay")
            self.handed_over = True
            self._stopping.set()

    def reload(self) -> None:
        """Read everything from the store again, and apply everything to the host again."""
        log.info("reloading")
        self._notifier.reloading()
        self._reloading = True
        self._store.reload()
        self._peers.reapply()
        self._settle_again.set()

    async def _work(self) -> None:
        try:
            async with asyncio.TaskGroup() as tasks:
                await self._start(tasks)
        except BaseExceptionGroup as group:
            raise _first_error(group) from None
        finally:
            await self._store.aclose()

    async def _start(self, tasks: asyncio.TaskGroup) -> None:
        self._tasks = tasks
        self.report.event("started", message=f"udptun {__version__}, process {os.getpid()}")
        self._check_locks()
        self._store.load_own()
        if self._config.healthz_port:
            tasks.create_task(self._serve_health())
        if self._config.metrics is not None:
            from ..control.scrape import Scrape

            tasks.create_task(Scrape(
                self._config.metrics, self._scrape.render, self._listening("metrics")).run())
        tasks.create_task(self._serve_status())
        tasks.create_task(self._notifier.feed(_alive))
        tasks.create_task(self._backends.run())
        loop = asyncio.get_running_loop()
        self._netlink.watch_addresses(lambda _: _call_in(loop, self._settle_again.set))
        settled = await self._settle_first()
        self._host_check.start()
        tasks.create_task(self._peers.follow())
        tasks.create_task(self._peers.use_cache(settled))
        tasks.create_task(self._keep_settled(settled))
        tasks.create_task(self._measure())
        tasks.create_task(self._host.run())
        if not self._config.keep_flannel:
            tasks.create_task(self._leftovers.keep())
        tasks.create_task(self._keep_status())
        tasks.create_task(self._announce())

    async def _serve_health(self) -> None:
        from .status.server import HealthServer  # not imported if there is no health server

        config = self._config
        server = HealthServer(
            self.report, config.healthz_ip, config.healthz_port, self._scrape.render)
        await server.serve(self._listening("health checks"))

    def _listening(self, what: str) -> Callable[[str], None]:
        """Return the function that reports why the server for ``what`` does not listen."""
        return lambda why: self.report.set_trouble(what, why, LISTEN_REMEDY)

    async def _serve_status(self) -> None:
        await NodeSocket(self.report, self._config.control, self._hand_over).serve()

    async def _announce(self) -> None:
        """Wait until the paths to all known leases are active and the kernel has everything that
        we have set up, then report that the start is complete."""
        self.report.waiting = f"waiting for the leases of {self._store.kind}"
        await self._peers.known.wait()
        await self._backends.synced()
        await self._host_check.published()
        self.report.waiting = ""
        assert self._tasks is not None
        self._tasks.create_task(self._host_check.keep())
        self._tasks.create_task(self._host_check.keep_routes())
        # Most objects that exist now are never deleted. Freezing them excludes them from garbage
        # collection, because a collection that visits them would delay a route change.
        gc.collect()
        gc.freeze()
        return_free_memory()
        log.info("ready: %s", self.report.summary())
        self.report.event("ready", message=self.report.summary())
        self._notifier.ready(self.report.summary())

    async def _keep_status(self) -> None:
        """Once a second, report the changes that no event reports."""
        status, lease_error = "", ""
        while True:
            self.report.firewall_error = self._host.firewall_error
            self.report.firewall_drops = self._host.firewall_drops
            self.report.set_leftovers(self._leftovers.found)
            self._check_conntrack()
            self._check_locks()
            self._changes.look()
            if not self.report.waiting and status != (status := self.report.summary()):
                self._notifier.status(status)
            if lease_error != (lease_error := self._store.lease_error) and lease_error:
                log.error("our lease: %s", lease_error)
            await asyncio.sleep(STATUS_SECONDS)

    def _check_locks(self) -> None:
        if self._locks is None:
            return
        if self._locks.missing:
            self._locks.retry()
        for name in self._locks.names:
            self.report.set_trouble(name, self._locks.missing.get(name, ""), DISK_REMEDY)

    def _check_conntrack(self) -> None:
        before, self.report.conntrack = self.report.conntrack, conntrack.shortage()
        if self.report.conntrack and not before:
            log.warning("%s; %s", self.report.conntrack, conntrack.REMEDY)
        elif before and not self.report.conntrack:
            log.info("the kernel's conntrack table has room again")

    # -- settling ---------------------------------------------------------------------------------

    async def _settle_first(self) -> bool:
        """Call ``_settle`` until it succeeds, and return its result.

        Raises an error that another attempt cannot repair.
        """
        while True:
            try:
                return await self._settle()
            except (StoreDown, StoreNotReady, NoInterface, OSError) as exc:
                if not _may_pass(exc):
                    raise
                self._errors.error(str(exc))
                self.report.waiting = str(exc)
            await self._pause()

    async def _keep_settled(self, settled: bool) -> None:
        while True:
            if settled:
                await wait_at_most(self._settle_again, LOOK_SECONDS)
                await asyncio.sleep(self._host_check.repairs.pause())
            else:
                await self._pause()
            self._settle_again.clear()
            reloading, self._reloading = self._reloading, False
            try:
                settled = await self._settle()
            except (UdptunError, OSError) as exc:
                self._errors.error(str(exc))
                settled = False
            if settled:
                self._errors.clear()
            if reloading:
                self._notifier.ready(self.report.summary())
            await asyncio.sleep(BETWEEN_SECONDS)

    async def _pause(self) -> None:
        await wait_at_most(self._settle_again, RETRY_SECONDS)
        self._settle_again.clear()

    async def _settle(self) -> bool:
        """Set up this host for our lease and network. Return False if a cached answer was used.

        Raises the store's error if the store fails and no answer is cached. Raises NoInterface,
        DeviceError, FieldError, BackendUnavailable, InstanceConflict, OSError.
        """
        store = self._store
        with store.pass_():
            network = await store.network()
            identity = await store.identity()
            families = identity.families
            if families is None:
                families = frozenset(net.version for net in network.networks)
            underlay = await self._choose_underlay(
                identity, families, self._backends.device_names(network))
            former = None if store.lease is None else store.lease.attributes
            prepared = await self._backends.prepare(
                Site(network, underlay, former, identity.advert))
            needed = await self._refuse_taken(prepared)
            if (lease := store.settled_lease(identity)) is not None:
                # Only the host may have changed: apply the change without waiting for the store.
                # If the store's data about this node have changed, our lease may have changed too.
                # Then both are applied together, after ``acquire``.
                await self._settle_host(prepared, lease)
            lease = await store.acquire(prepared.attributes)
            await self._settle_host(prepared, lease)
            store.settled(network, identity, lease, underlay.bound)
            self._paths.configure(prepared.mtu, prepared.site.udp_port)
            await self._peers.replan(replace(
                prepared.local(lease), needed=needed, broadcasts=self._taken.broadcasts))
            await self._host_check.settled(prepared.site, lease)
            if store.confirmed:
                assert self._tasks is not None
                store.hold(lease, self._tasks)
        return store.confirmed

    async def _refuse_taken(self, prepared: Prepared) -> tuple[Needed, ...]:
        """Return the addresses that this host must reach without the overlay.

        If the route to a network through the TUN would divert packets to one of them, raises the
        error of ``Store.refuse``. VXLAN has no such route, but a route to the subnet of each peer
        (``plan``).
        """
        network, underlay = prepared.site.network, prepared.site.underlay
        needed = await self._taken.needed(
            underlay, self._store.hosts(), self._backends.device_names(network))
        if self._backends.through_tun:
            try:
                refuse_taken(network.networks, needed)
            except FieldError as exc:
                raise self._store.refuse(network, exc) from None
        return needed

    async def _measure(self) -> None:
        """Measure the paths after all of them are active: an earlier probe would only fail."""
        await self._peers.known.wait()
        await self._backends.synced()
        await self._paths.run()

    def _guarded(
        self, interface: str
    ) -> tuple[frozenset[Endpoint], frozenset[IPNetwork]] | None:
        return self._peers.guarded(interface)

    def _plan_changed(self, plan: Plan, subnets: Collection[IPNetwork] | None) -> None:
        self._paths.update(plan, subnets)
        self._host.guard_soon()

    async def _carry(self, carriers: Carriers) -> None:
        await self._peers.carry(carriers)

    async def _settle_host(self, prepared: Prepared, lease: Lease) -> None:
        network, carried = prepared.site.network, prepared.carried(lease)
        await self._host.prepare(network, carried)
        await self._backends.settle(prepared, lease)
        if not self._config.keep_flannel:
            await self._leftovers.remove(network, self._backends.active_devices(network))
        await self._host.settle(network, carried, prepared.mtu, prepared.site.underlay,
                                self._backends.outer_flows())

    async def _choose_underlay(
        self, identity: Identity, families: frozenset[int], own_devices: frozenset[str]
    ) -> Underlay:
        report = self.report
        try:
            underlay = await self._underlay.choose(
                _with_declared(self._config.interface, identity), families, own_devices,
                self._store.addresses,
            )
        except (NoInterface, DeviceError) as exc:
            report.interface_error = str(exc)
            raise
        if report.underlay not in (None, underlay):
            log.warning("the underlay has changed: %s at %s", underlay.name,
                        underlay.public or underlay.public6)
        if underlay.note and underlay.note != report.interface_note:
            log.warning("%s", underlay.note)
        report.underlay, report.interface_error = underlay, ""
        report.interface_note = underlay.note
        return underlay


def _may_pass(error: Exception) -> bool:
    """Return whether another attempt of ``_settle`` may succeed."""
    if isinstance(error, DeviceError):
        return error.errno not in (errno.EPERM, errno.EACCES)
    return not isinstance(error, OSError) or error.errno in DISK_ERRORS


def _files(config: NodeConfig) -> dict[str, str]:
    """Return the paths that the options can change, for `udptun doctor`."""
    return {
        "control": str(config.control), "state_dir": str(config.state_dir),
        "subnet_file": str(config.subnet_file), "forward_file": str(config.forward_file),
    }


def _with_declared(options: InterfaceOptions, identity: Identity) -> InterfaceOptions:
    """Return our options, combined with the public addresses that the store declares."""
    given = (options.public_ip, options.public_ipv6)
    declared = (identity.public_ip, identity.public_ipv6)
    first, second = (declared, given) if identity.overrides_options else (given, declared)
    return replace(options, public_ip=first[0] or second[0], public_ipv6=first[1] or second[1])


def _first_error(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """Return the first error of a group of tasks. It usually causes the other errors."""
    error = group.exceptions[0]
    return _first_error(error) if isinstance(error, BaseExceptionGroup) else error


def _call_in(loop: asyncio.AbstractEventLoop, work: Callable[[], object]) -> None:
    with contextlib.suppress(RuntimeError):  # the loop is already closed
        loop.call_soon_threadsafe(work)


async def _alive() -> bool:
    """The loop runs, so the daemon is alive."""
    return True
