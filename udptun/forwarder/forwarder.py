"""The forwarder: opens and closes the TUN, UDP sockets, workers, route table and control, in order.

Owns only the order of opening and closing. Each part owns its state: ``routes``, ``workers``,
``probes``, ``path_mtus``, ``tun_setup``, ``view``, ``control.events``. Does not depend on leases,
or on how the compiled core processes a packet. Threading: control loop only.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import logging
import os
import socket
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Iterable, Mapping
from contextlib import AbstractContextManager, AsyncExitStack
from mmap import mmap
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from .. import _core
from ..answers import Drop, Peer, ProbeAnswer, Status, Trace
from ..control.events import EventHub, Reader
from ..control.sockets import UnixListener, refuse_occupied
from ..device.fault import device_error
from ..device.offload import Capabilities
from ..device.steering import attach_steering
from ..device.tun import Tun
from ..errors import DeviceError, UdptunError
from ..files import DISK_ERRORS
from ..instance import InstanceLock
from ..model import (
    MIN_MTU6,
    OVERHEAD,
    CaptureFilter,
    Endpoint,
    IPAddress,
    IPNetwork,
    Route,
    RouteDiff,
    as_endpoint,
    as_route,
    parse_address,
    parse_destination,
)
from ..net.changes import Change, Kind
from ..net.local import local_addresses, underlay_mtu
from ..net.lookup import device_index
from ..net.netlink import Netlink
from ..net.udp import UdpSocket, open_udp
from ..takeover.document import (
    CountersDocument,
    drops_of,
    gone_of,
    packets_of,
)
from ..text import counted
from . import preload
from .captures import Captured, Captures
from .config import ForwarderConfig
from .express import MAPS, Express
from .giving import (
    CONTROL,
    FLANNEL,
    FLANNEL_FD,
    LOCK,
    SCRAPES,
    STATE_LOCK,
    TAKEOVER,
    Giver,
    Parts,
    WithFile,
)
from .kept import Kept
from .loops import Loops
from .path_mtus import PathMtus
from .probes import Probes
from .routes import HandedOver, Routes
from .taking import Taking
from .tun_setup import TunSetup
from .view import View
from .workers import Workers

if TYPE_CHECKING:
    from ..control.flannel import FlannelControl
    from ..control.metrics import Metrics
    from ..control.scrape import Scrape
    from ..control.server import ControlServer

log = logging.getLogger(__name__)

SOCKET_SECONDS = 5.0  # between two tries to make a Unix socket


class Forwarder:
    """One forwarder. Call ``start`` and ``close``, or ``async with Forwarder(config) as f:``.

    If the data path fails, for example because the TUN was deleted and cannot be made again, the
    body of ``async with`` is cancelled, and UdptunError is raised from it.

    lock  held from ``start`` to ``close``, if it can be held
    kept  descriptors of a forwarder that has died, by name; this forwarder owns them
    forget  called with the names of kept descriptors that cannot be used. It lets their keeper
          close its copies, and waits until this is done
    """

    def __init__(
        self, config: ForwarderConfig, lock: InstanceLock | None = None,
        kept: Mapping[str, int] | None = None,
        forget: Callable[[Iterable[str]], None] | None = None,
    ) -> None:
        self.config = config
        self._lock = lock
        self._kept = Kept(kept or {}, forget)
        self.tun_name = config.tun
        self.mtu = 0
        self._netlink: Netlink
        self._underlay: frozenset[int] = frozenset()  # the indexes of the interfaces
        self.capabilities = Capabilities()
        self.events = EventHub()
        self._routes = Routes(
            config.routes_file, config.state_file, self.events, self._report, config.addresses,
            config.subnets,
        )
        self._keep_device: Callable[[Mapping[str, int]], None] | None = None
        self._captures: Captures
        self._parts: Parts
        self._probes: Probes
        self._express: Express
        self._view: View
        self._setup: TunSetup | None = None
        self._server: ControlServer | None = None
        self._flannel: FlannelControl | None = None
        self._scrape: Scrape | None = None
        self._metrics: Metrics | None = None
        self._giver: Giver | None = None
        self._refused: list[tuple[Path, Callable[[], Awaitable[None]]]] = []  # see _listen
        self._sockets: list[UdpSocket] = []  # in the order of the workers
        self._closing = AsyncExitStack()
        self._stop = asyncio.Event()
        self._failure: UdptunError | None = None
        self._body: asyncio.Task[Any] | None = None  # runs the body of ``async with``
        self._cancelled = False

    # -- start and stop ---------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        await self.start()
        self._body = asyncio.current_task()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: object
    ) -> None:
        body, self._body = self._body, None
        await self.close()
        if self._cancelled and body is not None and body.uncancel() == 0 and kind in (
            None, asyncio.CancelledError
        ):
            assert self._failure is not None
            raise self._failure from None

    async def start(self) -> None:
        """Open everything, or take it over from the forwarder that runs. Traffic flows before the
        control socket answers.

        Raises FieldError (a route file), DeviceError (TUN, sockets), OSError (files),
        InstanceRunning, TakeOverError.
        """
        if self._lock is not None:
            self._closing.callback(self._lock.release)
        try:
            await self._start(await self._begin_taking())
        except BaseException:
            await self.close()
            raise

    async def _begin_taking(self) -> Taking | None:
        config = self.config
        if not config.take_over or config.takeover is None:
            return None
        preload.load()
        taking = await Taking.begin(config.takeover, config)
        if taking is None:
            log.info("no forwarder answers at %s, so there is none to take over", config.takeover)
        else:
            self._closing.callback(taking.close)
        return taking

    async def _start(self, taking: Taking | None) -> None:
        self._hold_lock(taking)
        # The thread imports pyroute2 during the next steps, because they need it to set up the TUN.
        # But if the TUN works already, packets wait, and the import would slow down these steps.
        self._netlink = netlink = Netlink(begin=taking is None and not self._kept)
        self._closing.callback(netlink.close)
        self._closing.callback(self._routes.unlock)
        if taking is None:
            self._routes.load()
            self._refuse_occupied_sockets()
        else:
            self._routes.inherit(taking.having.routes.encode(), taking.having.generation)
            if (state := self._routes.state) is not None:
                state.lock = taking.lock(STATE_LOCK, state.lock_path)
        tun, sockets = self._open_device(taking)
        self.capabilities = Capabilities.combine(self.config.offload, [tun, *sockets])
        core, notify_fd = self._make_core()
        express = self._open_express(tun, core, sockets, taking)
        self._routes.open(
            core, Loops(netlink, tun.name, self.config), express)
        self._closing.push_async_callback(self._routes.close)
        self._probes = Probes(core, self._routes, self.mtu, self.events, express.read)
        path_mtus = PathMtus(core, self._probes, self.events, self._trust_icmp6(sockets))
        workers = Workers(
            core, notify_fd, self.capabilities, self.events, self._probes.take,
            lambda: self._update_path_mtus(path_mtus), self._report, self.check_host,
        )
        self._closing.push_async_callback(asyncio.to_thread, workers.stop)
        batons = [] if taking is None else self._inherit_state(taking, path_mtus)
        workers.start(tun.fds, self._by_worker(sockets), batons)
        former = None if taking is None else await self._inherit_counts(taking, core, workers)
        netlink.begin()
        self._setup = setup = TunSetup(
            netlink, tun.name, self.mtu, self.config.addresses, self.config.networks,
            queues=len(tun.fds), reopen=lambda: self._reopen(tun, workers), report=self._report,
            repaired=self._report_repair, fail=self._fail,
        )
        if taking is None:
            await setup.apply()  # last: when the device is up, the table is active and workers run
            await self._routes.leave_out_loops()
        else:
            setup.check()
        self._watch_own_addresses(netlink)
        self._run_until_close(setup.keep())
        self._run_until_close(workers.supervise())
        self._probes.start()
        self._closing.callback(self._probes.close)
        await self._routes.save()
        self._view = View(
            self.config, tun.name, self.mtu, self.capabilities, core, self._routes, workers,
            self._probes, path_mtus, express, former,
        )
        self._closing.callback(self.events.close)
        self._log_start()
        await self._start_control(taking)
        self._parts = Parts(
            self.config, tun, sockets, core, self._routes, workers, self._probes, self._view,
            self.capabilities, self.events, self._files, self._other_descriptors,
            self.request_stop, express,
        )
        giver = self._make_giver(self._parts, taking)
        if taking is not None:
            await self._finish_taking(taking, sockets, workers)
        if giver is not None:
            await self._offer(giver)
        self._run_until_close(self._listen_later())
        self._run_express(express, netlink)
        self._watch_underlay(netlink)

    async def close(self) -> None:
        """Send the queued packets, then close everything that ``start`` opened."""
        closing, self._closing = self._closing, AsyncExitStack()
        await closing.aclose()

    def _update_path_mtus(self, path_mtus: PathMtus) -> None:
        path_mtus.update()
        self._express.update()

    def check_host(self) -> None:
        """Request a check of the TUN device: it is compared with the configuration and repaired."""
        if self._setup is not None:
            self._setup.check()

    def on_device(self, keep: Callable[[Mapping[str, int]], None]) -> None:
        """Call ``keep`` now, and each time when the TUN was made again, with the descriptors of the
        TUN and the UDP sockets, by the names under which another process can keep copies."""
        self._keep_device = keep
        keep(self._parts.kept_descriptors())

    async def answers(self) -> bool:
        """Ask all workers for a sign of life. Return whether they answered in time."""
        return await self._parts.workers.answer()

    @property
    def successor(self) -> int | None:
        """The process that has taken over from this forwarder; None: there is none."""
        return None if self._giver is None else self._giver.successor

    def request_stop(self) -> None:
        self._stop.set()

    async def wait_stopped(self) -> None:
        """Wait until a stop is requested. Raise if the data path failed."""
        await self._stop.wait()
        if self._failure is not None:
            raise self._failure

    def _report(self, message: str) -> None:
        log.error("%s", message)
        self.events.emit("error", message=message)

    def _report_repair(self, message: str) -> None:
        log.warning("%s", message)
        self.events.emit("repaired", message=message)

    def _fail(self, message: str) -> None:
        if self._failure is None:
            self._failure = UdptunError(message)
            self._report(message)
            self.request_stop()
            if self._body is not None:
                self._cancelled = self._body.cancel()

    # -- the steps of a start ---------------------------------------------------------------------

    def _refuse_occupied_sockets(self) -> None:
        """Raise DeviceError if a control socket is in use.

        The control sockets are created last. This check is made before the host is changed.
        """
        config = self.config
        for path, kind in (
            (config.control, socket.SOCK_STREAM),
            (config.flannel_control, socket.SOCK_SEQPACKET),
        ):
            if path is not None:
                refuse_occupied(path, kind)

    def _hold_lock(self, taking: Taking | None) -> None:
        """Hold the lock of the instance, or take it over. Raises InstanceRunning."""
        lock = self._lock
        if lock is None:
            return
        if taking is not None:
            lock.held = taking.lock(LOCK, lock.path())
        if lock.held is None:
            lock.acquire_if_possible()

    def _open_device(self, taking: Taking | None) -> tuple[Tun, list[UdpSocket]]:
        """Return the TUN, and one socket for each worker and endpoint, ordered by worker.

        They are those of the forwarder from which this one takes over, or of one that has died, or
        new ones.
        """
        config = self.config
        kept = None
        if taking is not None:
            tun, sockets = taking.tun(), None
        elif (kept := self._kept.device(config)) is not None:
            tun, sockets = kept
            for opened in sockets:
                opened.set_mark(config.mark)
                opened.set_dscp(config.dscp)
        else:
            tun, sockets = Tun.open(config.tun, config.workers_n, config.offload), None
        self._closing.callback(tun.close)
        self.tun_name = tun.name
        if len(tun.fds) > 1 and taking is None and kept is None:
            attach_steering(tun.fds[0])  # a flow stays on its queue, so its packets stay in order
        if taking is not None:
            sockets = taking.sockets(config.listen)
        self._closing.callback(self._close_sockets)
        if sockets is None:
            self._open_sockets(config, self._sockets)
        else:
            self._sockets.extend(sockets)
        return tun, self._sockets

    def _open_express(
        self, tun: Tun, core: _core.Core, sockets: list[UdpSocket], taking: Taking | None
    ) -> Express:
        maps = {name: None if taking is None else taking.descriptor(name) for name in MAPS}
        self._express = express = Express(self.config, tun.name, core, {
            name: fd for name, fd in maps.items() if fd is not None})
        self._closing.callback(express.release)
        for opened in sockets:  # also if it is off: peers may not know that yet
            opened.accept_no_checksum()
        return express

    def _run_express(self, express: Express, netlink: Netlink) -> None:
        """Attach the programs. Called after a take-over: the other forwarder has ended its work."""
        self._closing.push_async_callback(self._close_express)
        self._run_until_close(express.follow(netlink))

    async def _close_express(self) -> None:
        await self._express.close(leave=self.successor is not None)

    def _reopen(self, tun: Tun, workers: Workers) -> None:
        """Make the TUN again after it was deleted. Raises DeviceError."""
        tun.reopen(self.config.offload)
        if len(tun.fds) > 1:
            attach_steering(tun.fds[0])
        workers.continue_on_new_tun()
        self._renew_copies()

    def _open_sockets(self, config: ForwarderConfig, opened: list[UdpSocket]) -> None:
        """Append to ``opened`` a socket for each worker and endpoint of ``config``, ordered by
        worker. A socket that is open already is used again. Raises DeviceError."""
        per_worker = len(config.listen)
        present = {(at // per_worker, one.endpoint): one for at, one in enumerate(self._sockets)}
        for index in range(config.workers_n):
            for endpoint in config.listen:
                one = present.get((index, endpoint))
                if one is None:
                    one = open_udp(
                        endpoint, config.offload, reuse_port=index > 0, mark=config.mark,
                        dscp=config.dscp)
                    if index == 0:
                        one.let_join()  # the other workers, and own sockets of slow peers
                opened.append(one)

    def _close_sockets(self) -> None:
        for opened in self._sockets:
            opened.close()

    def _by_worker(self, sockets: list[UdpSocket]) -> list[dict[int, int]]:
        """Return, for each worker, the descriptors of its sockets by IP version."""
        per_worker = len(self.config.listen)
        return [
            {opened.endpoint.address.version: opened.fd for opened in sockets[at : at + per_worker]}
            for at in range(0, len(sockets), per_worker)
        ]

    def _trust_icmp6(self, sockets: list[UdpSocket]) -> Callable[[bool], None]:
        def trust(on: bool) -> None:
            for each in sockets:
                if each.endpoint.address.version == 6:
                    each.trust_icmp(on)

        return trust

    def _make_core(self) -> tuple[_core.Core, int]:
        """Create the core, and the eventfd that its workers signal when they have an event."""
        config = self.config
        link_mtus = self._link_mtus()
        self.mtu = self._mtu_for(link_mtus)
        notify_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._closing.callback(os.close, notify_fd)
        core = _core.Core(
            config.source_check, config.workers_n, (link_mtus[4], link_mtus[6]),
            [address.packed for address in config.addresses], notify_fd,
            None if config.admit == "any" else [
                (net.network_address.packed, net.prefixlen) for net in config.subnets],
            config.dscp,
        )
        core.set_tun_mtu(self.mtu)
        core.set_own_addresses(a.packed for a in local_addresses())
        self._captures = Captures(core, self.tun_name, self.mtu)
        return core, notify_fd

    def _link_mtus(self) -> dict[int, int]:
        """Return the MTU of the underlay by IP version; 0: there is no endpoint of the IP version.

        Raises DeviceError if no interface has the address of an endpoint.
        """
        link_mtus = {4: 0, 6: 0}
        devices = set()
        for endpoint in self.config.listen:
            name, link_mtu = underlay_mtu(endpoint.address)
            link_mtus[endpoint.address.version] = link_mtu
            devices.add(device_index(name))
        self._underlay = frozenset(devices)
        return link_mtus

    def _mtu_for(self, link_mtus: Mapping[int, int]) -> int:
        """Return the MTU of the TUN."""
        config = self.config
        carried = min(mtu - OVERHEAD[version] for version, mtu in link_mtus.items() if mtu)
        # IPv6 needs 1280 bytes (RFC 8200 5): on a smaller underlay the core lets its datagrams be
        # fragmented, and IPv4 senders get ICMP errors.
        return config.mtu or (max(carried, MIN_MTU6) if config.has_ipv6 else carried)

    def _watch_own_addresses(self, netlink: Netlink) -> None:
        loop = asyncio.get_running_loop()
        changes: asyncio.Queue[frozenset[IPAddress]] = asyncio.Queue()

        def on_change(addresses: frozenset[IPAddress]) -> None:  # in the netlink thread
            with contextlib.suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(changes.put_nowait, addresses)

        async def follow() -> None:
            while True:
                with contextlib.suppress(HandedOver):
                    await self._routes.set_own_addresses(await changes.get())

        netlink.watch_addresses(on_change)
        self._run_until_close(follow())

    # -- changes while packets pass ---------------------------------------------------------------

    async def change_device(
        self, mtu: int | None = None, listen: Iterable[Endpoint] | None = None
    ) -> dict[str, Any]:
        """Change the MTU of the TUN, or the listen addresses, for example because the address of
        the underlay has changed. Return both. None: as now.

        Packets that arrive at a former address are lost from then on. Raises FieldError,
        DeviceError (a socket cannot be opened); nothing is changed then.
        """
        async def change(core: _core.Core) -> None:
            wanted = self.config.change(mtu, None if listen is None else tuple(listen))
            if wanted.listen != self.config.listen:
                await self._rebind(wanted)
            self.config.adopt(wanted)
            await self._use_underlay(core)
            if listen is not None:
                self._renew_copies()

        await self._routes.alone(change)
        return {"mtu": self.mtu, "listen": [str(endpoint) for endpoint in self.config.listen]}

    async def _rebind(self, wanted: ForwarderConfig) -> None:
        """Replace the sockets by those of other addresses. Raises DeviceError; nothing is changed
        then."""
        opened: list[UdpSocket] = []
        former = self._sockets.copy()
        self._express.pause()
        try:
            self._open_sockets(wanted, opened)
            for one in opened:
                one.accept_no_checksum()
            await self._parts.workers.rebind(self._by_worker(opened), self._by_worker(former))
            self._sockets[:] = opened
            self.config.adopt(wanted)
        except DeviceError:
            raise
        except OSError as error:
            raise device_error(
                error.errno or errno.EIO, f"listening on {_named(wanted.listen)}") from error
        finally:
            for one in (*opened, *former):
                if one not in self._sockets:
                    one.close()
            self._express.go_on()
        self._view.path_mtus.sockets_changed()
        log.info("the forwarder listens on %s now", _named(wanted.listen))

    def _renew_copies(self) -> None:
        """Let the processes that keep copies of the descriptors have the present ones."""
        if self._giver is not None:
            self._giver.renew_copies()
        if self._keep_device is not None:
            self._keep_device(self._parts.kept_descriptors())

    async def _use_underlay(self, core: _core.Core) -> None:
        """Use the present MTU of the underlay, if the address of each endpoint is on this host."""
        async def read(_: Any) -> dict[int, int]:
            return self._link_mtus()

        try:
            link_mtus = await self._netlink.work("reading the MTU of the underlay", read)
        except DeviceError as error:
            log.info("the MTU of the underlay is unknown, so it stays: %s", error)
            return
        changed = core.set_link_mtus(link_mtus[4], link_mtus[6])
        mtu = self._mtu_for(link_mtus)
        if not changed and mtu == self.mtu:
            return
        log.info("the MTU of the underlay is %s; the MTU of %s is %d",
                 " and ".join(str(one) for one in link_mtus.values() if one), self.tun_name, mtu)
        self.mtu = self._captures.mtu = self._view.mtu = mtu
        core.set_tun_mtu(mtu)
        assert self._setup is not None
        self._setup.set_mtu(mtu)
        self._probes.set_mtu(mtu)
        self._express.check()

    def _watch_underlay(self, netlink: Netlink) -> None:
        """Follow the MTU of the underlay."""
        loop = asyncio.get_running_loop()
        changed = asyncio.Event()

        def on_changes(changes: frozenset[Change]) -> None:  # in the netlink thread
            if any(map(self._concerns_underlay, changes)):
                with contextlib.suppress(RuntimeError):  # the loop is closed
                    loop.call_soon_threadsafe(changed.set)

        async def follow() -> None:
            while True:
                await changed.wait()
                changed.clear()
                with contextlib.suppress(HandedOver):
                    await self._routes.alone(self._use_underlay)

        netlink.watch_changes(on_changes)
        self._run_until_close(follow())

    def _concerns_underlay(self, change: Change) -> bool:
        """Return whether the MTU of the underlay may be another one after the change."""
        if change.kind is Kind.LINK:
            return change.device in self._underlay
        if change.kind is Kind.ADDRESS:
            return any(one.address.packed == change.address for one in self.config.listen)
        return change.kind is Kind.ANY

    def _run_until_close(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        task.add_done_callback(self._task_ended)
        self._closing.push_async_callback(_cancel, task)

    def _task_ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and task.exception() is not None:
            log.error("an internal task failed", exc_info=task.exception())
            self._report(f"an internal task failed: {task.exception()}")

    def _log_start(self) -> None:
        log.info("%s is up: mtu %d, %s, offloads %s", self.tun_name, self.mtu,
                 counted(len(self._routes), "route"),
                 " ".join(sorted(self.capabilities.in_use)) or "none")
        for name, cause in self.capabilities.off.items():
            log.info("%s is off: %s", name, cause)

    async def _start_control(self, taking: Taking | None) -> None:
        config = self.config

        def inherited(name: str, path: Path) -> UnixListener | None:
            return None if taking is None else taking.listener(name, path)

        if config.flannel_control is not None or config.flannel_control_fd is not None:
            from ..control.flannel import FlannelControl

            self._flannel = flannel = FlannelControl(self)
            self._closing.push_async_callback(flannel.close)
            if config.flannel_control is not None:
                path = config.flannel_control
                if (listener := inherited(FLANNEL, path)) is not None:
                    await flannel.listen(path, listener)
                else:
                    await self._listen(
                        path, lambda: flannel.listen(path), "flannel cannot set routes yet")
            if config.flannel_control_fd is not None:
                had = None if taking is None else taking.descriptor(FLANNEL_FD)
                flannel.adopt(config.flannel_control_fd if had is None else had)
        if config.control is not None:
            from ..control.server import ControlServer  # not at the top: aiohttp loads slowly

            self._server = server = ControlServer(self, config.control)
            self._closing.push_async_callback(server.close)
            if (listener := inherited(CONTROL, config.control)) is not None:
                await server.start(listener)
            else:
                await self._listen(
                    config.control, server.start, "nobody can control this forwarder yet")
        if config.metrics is not None:
            self._start_scrape(config.metrics, taking)

    async def _listen(
        self, path: Path, listen: Callable[[], Awaitable[None]], missing: str
    ) -> None:
        """Listen at a path with ``listen``. If the disk refuses the file, report ``missing``, and
        remember to try again. Raises DeviceError."""
        try:
            await listen()
        except DeviceError as error:
            if error.errno not in DISK_ERRORS:
                raise
            self._report(f"{missing}: {error}")
            self._refused.append((path, listen))

    async def _listen_later(self) -> None:
        """Try to listen at the paths that the disk has refused, until it allows them.

        The control socket comes last: a node daemon that finds it connects to the others.
        """
        self._refused.sort(key=lambda one: one[0] == self.config.control)
        while self._refused:
            await asyncio.sleep(SOCKET_SECONDS)
            for path, listen in list(self._refused):
                with contextlib.suppress(UdptunError, OSError):
                    await listen()
                    self._refused.remove((path, listen))
                    self._report_repair(f"the socket {path} is there now")

    def _start_scrape(self, listen: Endpoint, taking: Taking | None) -> None:
        from ..control.scrape import Scrape  # not at the top, because it is seldom needed

        async def render() -> bytes:
            return (await self.metrics())[0]

        self._scrape = Scrape(listen, render)
        if taking is not None and (fd := taking.descriptor(SCRAPES)) is not None:
            self._scrape.inherit(fd)
        self._run_until_close(self._scrape.run())

    # -- handing over -----------------------------------------------------------------------------

    def _inherit_state(self, taking: Taking, path_mtus: PathMtus) -> list[int]:
        """Continue the state of the other forwarder. Return the batons: for each of our workers
        an eventfd, to which a worker of the other forwarder writes after its last turn."""
        path_mtus.inherit(taking.path_mtus())
        for name, cause in taking.having.off.items():
            self.capabilities.lose(name, cause)
        return taking.batons(self.config.workers_n)

    async def _inherit_counts(
        self, taking: Taking, core: _core.Core, workers: Workers
    ) -> CountersDocument:
        """Stop the workers of the other forwarder, and continue its counters. Return these."""
        counts = await taking.go()
        core.inherit(packets_of(counts, core.packets()), drops_of(counts), counts.peer_errors)
        self._express.inherit(counts)
        core.inherit_gone(gone_of(counts))
        workers.inherit(counts.workers)
        self._probes.inherit(counts.probes, counts.probe_counts)
        for event in counts.events:
            self.events.publish(event)
        return counts

    async def _finish_taking(
        self, taking: Taking, sockets: list[UdpSocket], workers: Workers
    ) -> None:
        await taking.done()
        for opened in sockets:  # not earlier: until now, the other forwarder might continue
            opened.set_mark(self.config.mark)
            opened.set_dscp(self.config.dscp)
        workers.renew_options()
        log.info("took over from process %d, udptun %s (build %s)", taking.state.pid,
                 taking.state.program, taking.state.build or "unknown")
        taking.close()

    def _files(self) -> dict[str, WithFile]:
        """Return the listening sockets and locks, by the names that they have in a take-over."""
        state = self._routes.state
        found: dict[str, WithFile | None] = {
            LOCK: None if self._lock is None else self._lock.held,
            STATE_LOCK: None if state is None else state.lock,
            CONTROL: None if self._server is None else self._server.listener,
            TAKEOVER: None if self._giver is None else self._giver.listener,
        }
        for listener in () if self._flannel is None else self._flannel.listeners:
            found[FLANNEL] = listener
        return {name: each for name, each in found.items() if each is not None}

    def _other_descriptors(self) -> dict[str, int]:
        scrape = None if self._scrape is None else self._scrape.fd
        found = {FLANNEL_FD: self.config.flannel_control_fd, SCRAPES: scrape}
        return self._express.descriptors() | {
            name: fd for name, fd in found.items() if fd is not None}

    def _make_giver(self, parts: Parts, taking: Taking | None) -> Giver | None:
        path = self.config.takeover
        if path is None:
            return None
        return Giver(path, parts, None if taking is None else taking.listener(TAKEOVER, path))

    async def _offer(self, giver: Giver) -> None:
        """Let other processes take over. If the socket cannot be opened, they cannot."""
        async def offer() -> None:
            await giver.start()
            self._giver = giver

        self._closing.push_async_callback(giver.close)
        try:
            await self._listen(
                giver.path, offer, "no other forwarder can take over from this one yet")
        except DeviceError as error:
            log.warning("no other forwarder can take over from this one: %s", error)

    # -- the Python API; the control API calls it as well (control/surface.py) --------------------

    @property
    def generation(self) -> int:
        return self._routes.generation

    @property
    def route_count(self) -> int:
        return len(self._routes)

    async def add_route(self, route: Route | str) -> RouteDiff:
        """Add a route. If there is a different route to its prefix: RouteExists."""
        return await self._routes.add(as_route(route))

    async def put_route(self, route: Route | str) -> RouteDiff:
        """Add a route, or replace the route to the same prefix."""
        return await self._routes.put(as_route(route))

    async def delete_route(self, dst: IPNetwork | str) -> RouteDiff:
        """Delete the route to a prefix. If there is none, nothing changes."""
        return await self._routes.delete(parse_destination("dst", dst))

    async def replace_routes(self, routes: Iterable[Route | str]) -> RouteDiff:
        """Replace the whole table in one step."""
        return await self._routes.replace(map(as_route, routes))

    async def replace_routes_json(
        self, body: bytes | mmap, expect_generation: int | None = None
    ) -> RouteDiff:
        return await self._routes.replace_json(body, expect_generation)

    async def replace_routes_text(
        self, body: bytes | mmap, expect_generation: int | None = None
    ) -> RouteDiff:
        return await self._routes.replace_text(body, expect_generation)

    async def reload(self) -> RouteDiff:
        return await self._routes.reload()

    def subscribe(self) -> AbstractContextManager[Reader]:
        """``with forwarder.subscribe() as events: async for event in events: ...``"""
        return self.events.subscribe()

    def route_chunks(self) -> AsyncGenerator[bytes, None]:
        return self._routes.json_chunks()

    async def routes(self) -> list[Route]:
        """Return the route table."""
        text = b"".join([chunk async for chunk in self.route_chunks()])
        return [Route.from_json(route) for route in json.loads(text)["routes"]]

    async def status(self) -> Status:
        """Return the status. docs/control.md describes its fields."""
        return Status(json.loads(b"".join([chunk async for chunk in self.status_chunks()])))

    async def peers(self) -> list[Peer]:
        """Return the peers."""
        text = b"".join([chunk async for chunk in self.peer_chunks()])
        return [Peer(peer) for peer in json.loads(text)["peers"]]

    def status_chunks(self, with_peers: bool = True) -> AsyncGenerator[bytes, None]:
        return self._view.status_chunks(with_peers)

    def peer_chunks(self) -> AsyncGenerator[bytes, None]:
        return self._view.peer_chunks()

    async def probe(
        self, endpoint: Endpoint | str, size: int | None = None, timeout: float | None = None
    ) -> ProbeAnswer:
        """Probe a peer now. docs/control.md describes the result."""
        return ProbeAnswer(await self._probes.probe(as_endpoint(endpoint), size, timeout))

    def set_standby(self, endpoints: Iterable[Endpoint | str], standby: bool) -> None:
        """Set whether other paths carry the packets to these peers."""
        self._probes.set_standby(map(as_endpoint, endpoints), standby)

    def drops(self) -> list[Drop]:
        """Return the dropped packets, by reason and direction."""
        return [Drop(row) for row in self._view.drops()]

    def capture(self, wanted: CaptureFilter) -> Captured:
        """Start to record packets. The caller ends this with ``close``."""
        return self._captures.start(wanted)

    def counters(self) -> dict[str, Any]:
        return self._view.counters()

    def peer_counters(self) -> dict[str, dict[str, Any]]:
        return self._view.peer_counters()

    async def metrics(self, accept: str = "") -> tuple[bytes, str]:
        """Return the counters as Prometheus's text, and its content type.

        accept  selects the format, as the HTTP header does
        """
        if self._metrics is None:
            loaded = await asyncio.to_thread(_load_metrics)
            self._metrics = self._metrics or loaded(self, self.config.metrics_peers)
        return self._metrics.render(accept)

    def trace(self, address: IPAddress | str) -> Trace:
        """Return what the forwarder does with a packet to an address."""
        return Trace(self._view.trace(parse_address("address", address)))

    def log_state(self) -> None:
        self._view.log_state()


def _named(endpoints: Iterable[Endpoint]) -> str:
    return ", ".join(map(str, endpoints))


def _load_metrics() -> type[Metrics]:
    """The import of prometheus_client takes long, so it runs in a thread, at the first scrape."""
    from ..control.metrics import Metrics

    return Metrics


async def _cancel(task: asyncio.Task[None]) -> None:
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError, Exception):  # reported by _task_ended
        await task
