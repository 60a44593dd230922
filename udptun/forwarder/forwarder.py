"""The forwarder: TUN, UDP sockets, workers, route table and control, opened and closed in order.

Owns the composition and the route table's changes. Refuses to know leases, and what happens to a
packet (the compiled core). Threading: everything here runs on the control loop; workers are
threads that never wait for it. A large table is parsed and built in a helper thread without the
GIL, and put in force by one pointer swap on this loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import json
import logging
import os
import socket
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Iterable
from contextlib import AbstractContextManager, AsyncExitStack
from mmap import mmap
from pathlib import Path
from typing import Any, Self, TypeVar

from .. import _core
from .._version import __version__
from ..control.sockets import refuse_occupied
from ..device.offload import Capabilities
from ..device.steering import attach_steering
from ..device.tun import Tun
from ..errors import DeviceError, FieldError, GenerationMismatch, UdptunError
from ..model import Endpoint, IPAddress, IPNetwork, Route, RouteDiff
from ..net.netlink import Netlink
from ..net.udp import UdpSocket, open_udp
from .config import ForwarderConfig
from .events import Event, EventHub
from .state import StateFile
from .threads import WorkerThread
from .tun_setup import TunSetup

log = logging.getLogger(__name__)
T = TypeVar("T")

OVERHEAD = {4: 28, 6: 48}  # outer IP and UDP header
HOUSEKEEPING_SECONDS = 1.0
FORGET_PATH_MTU_SECONDS = 600.0  # RFC 1191 6.3
DRAIN_SECONDS = 0.5
LARGE_TABLE = 2000  # routes from which a change is worth a helper thread
KERNEL_REFUSALS = ("send_error", "tun_write")
SLICE = 500  # routes shown at a time: well under a millisecond of the GIL
EVENTS_MAX = 1000  # routes of one change that are told one by one


class Forwarder:
    """One forwarder, from ``start`` to ``close``, or as ``async with Forwarder(config) as f:``."""

    def __init__(self, config: ForwarderConfig) -> None:
        self.config = config
        self.generation = 0
        self.tun_name = config.tun
        self.mtu = 0
        self.capabilities = Capabilities()
        self._hub = EventHub()
        self._closing = AsyncExitStack()
        self._stop = asyncio.Event()
        self._running = False
        self._failure: UdptunError | None = None
        self._changing = asyncio.Lock()
        self._changes: set[asyncio.Task[Any]] = set()
        self._table = _core.RouteTable()
        self._state = None
        if config.state_file is not None:
            self._state = StateFile(config.state_file, self._complain)
        self._unsent = 0
        self._core: _core.Core
        self._threads: list[WorkerThread] = []
        self._started = time.monotonic()

    # -- life -------------------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    async def start(self) -> None:
        """Open everything; traffic flows before the control socket answers.

        Raises FieldError (a route file), DeviceError (TUN, sockets), OSError (files).
        """
        try:
            await self._start()
        except BaseException:
            await self.close()
            raise

    async def _start(self) -> None:
        config = self.config
        close = self._closing
        netlink = Netlink()  # first: it loads in its own thread meanwhile
        close.callback(netlink.close)
        table, origin = self._first_table()
        for path, kind in (
            (config.control, socket.SOCK_STREAM),
            (config.flannel_control, socket.SOCK_SEQPACKET),
        ):
            if path is not None:  # made last, but a host is not touched in vain
                refuse_occupied(path, kind)
        tun = Tun.open(config.tun, config.workers_n, config.offload)
        close.callback(tun.close)
        self.tun_name = tun.name
        if len(tun.fds) > 1:
            attach_steering(tun.fds[0])  # a flow stays on its queue: the order is kept
        sockets = self._open_sockets()
        for opened in sockets:
            close.callback(opened.close)
        self.capabilities = Capabilities.combine(config.offload, [tun, *sockets])

        link_mtus = {4: 0, 6: 0}
        for endpoint in config.listen:
            _, link_mtu = await netlink.underlay_mtu(endpoint.address)
            link_mtus[endpoint.address.version] = link_mtu
        self.mtu = config.mtu or min(
            mtu - OVERHEAD[version] for version, mtu in link_mtus.items() if mtu
        )
        notify = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        close.callback(os.close, notify)
        self._core = _core.Core(
            config.source_check, config.workers_n, (link_mtus[4], link_mtus[6]),
            [address.packed for address in config.addresses], notify,
        )
        self._core.set_own_addresses(a.packed for a in await netlink.local_addresses())
        try:
            self._core.publish(table)
        except FieldError as error:
            where = f"{origin}: {error.where}"
            raise FieldError(error.field, error.value, error.expected, where) from None
        self._table, self.generation = table, 1
        self._running = True

        self._make_workers(tun, sockets)
        # the device goes up with its table in force and its queues watched
        close.push_async_callback(asyncio.to_thread, self._stop_workers)
        for thread in self._threads:
            thread.start()
        setup = TunSetup(
            netlink, self.tun_name, self.mtu, config.addresses, config.networks, self._complain
        )
        await setup.apply()

        loop = asyncio.get_running_loop()
        loop.add_reader(notify, self._on_notify, notify)
        close.callback(loop.remove_reader, notify)
        netlink.watch_addresses(
            lambda addresses: _call_in(loop, self._on_addresses, addresses)
        )
        close.push_async_callback(_cancel, loop.create_task(setup.keep()))
        housekeeping = loop.create_task(self._keep_house())
        close.push_async_callback(_cancel, housekeeping)
        close.push_async_callback(self._finish_changes)
        if self._state is not None:
            await self._state.save(table)  # that it can be kept is known before traffic flows
            close.push_async_callback(self._state.flush)
        close.callback(self._hub.close)
        log.info("%s is up: mtu %d, %d routes, offloads %s", tun.name, self.mtu, len(table),
                 " ".join(sorted(self.capabilities.in_use)) or "none")
        for name, cause in self.capabilities.off.items():
            log.info("%s is off: %s", name, cause)
        await self._start_control()

    async def close(self) -> None:
        """Drain what is queued, then remove all that ``start`` made."""
        self._running = False
        closing, self._closing = self._closing, AsyncExitStack()
        await closing.aclose()

    def request_stop(self) -> None:
        self._stop.set()

    async def wait_stopped(self) -> None:
        """Return when a stop was asked for; raise when the data path failed."""
        await self._stop.wait()
        if self._failure is not None:
            raise self._failure

    def _open_sockets(self) -> list[UdpSocket]:
        config = self.config
        sockets: list[UdpSocket] = []
        try:
            for index in range(config.workers_n):
                for endpoint in config.listen:
                    sockets.append(open_udp(endpoint, config.offload, reuse_port=index > 0))
                    if index == 0 and config.workers_n > 1:
                        sockets[-1].let_join()
        except BaseException:
            for opened in sockets:
                opened.close()
            raise
        return sockets

    def _make_workers(self, tun: Tun, sockets: list[UdpSocket]) -> None:
        per_worker = len(self.config.listen)
        for index in range(self.config.workers_n):
            mine = sockets[index * per_worker : (index + 1) * per_worker]
            fds = {opened.endpoint.address.version: opened.fd for opened in mine}
            worker = _core.Worker(
                self._core, tun.fds[index], fds.get(4, -1), fds.get(6, -1),
                self.capabilities.in_use,
            )
            self._threads.append(WorkerThread(worker, index))

    def _stop_workers(self) -> None:
        for thread in self._threads:
            thread.stop()
        for thread in self._threads:
            thread.worker.drain(DRAIN_SECONDS)

    async def _start_control(self) -> None:
        config = self.config
        if config.flannel_control is not None or config.flannel_control_fd is not None:
            from ..control.flannel import FlannelControl

            flannel = FlannelControl(self)
            self._closing.push_async_callback(flannel.close)
            if config.flannel_control is not None:
                await flannel.listen(config.flannel_control)
            if config.flannel_control_fd is not None:
                flannel.adopt(config.flannel_control_fd)
        if config.control is not None:
            from ..control.server import ControlServer  # late: see there

            server = ControlServer(self, config.control)
            await server.start()
            self._closing.push_async_callback(server.close)

    # -- what workers and netlink tell ------------------------------------------------------------

    def _on_notify(self, fd: int) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(fd)
        self._look_at_workers()

    def _look_at_workers(self) -> None:
        for thread in self._threads:
            for event in thread.worker.take_events():
                if event == "tun_gone":
                    self._fail(f"the TUN device {self.tun_name} is gone")
                elif event in ("udp-gso", "tcp-merge", "udp-merge"):
                    self._lose(event)
        for packed, port, path_mtu in self._core.path_mtu_changes(FORGET_PATH_MTU_SECONDS):
            endpoint = _endpoint(packed, port)
            log.info("path MTU to %s is %d", endpoint, path_mtu)
            self._hub.emit("peer_mtu", endpoint=endpoint, path_mtu=path_mtu)

    def _look_at_errors(self) -> None:
        """Tell, at most once a second, that the kernel refuses what we send or write."""
        unsent = sum(
            packets for reason, _, packets in self._core.drops() if reason in KERNEL_REFUSALS
        )
        if unsent > self._unsent:
            self._complain(
                f"the kernel refused {unsent - self._unsent} packets lately; see `udptun drops`"
            )
        self._unsent = unsent

    def _complain(self, message: str) -> None:
        log.error("%s", message)
        self._hub.emit("error", message=message)

    def _lose(self, feature: str) -> None:
        cause = "the kernel refused it at run time"
        for name in self.capabilities.lose(feature, cause):
            log.warning("%s is off from now on: %s", name, self.capabilities.off[name])
            self._hub.emit("capability_lost", capability=name, cause=cause)

    def _fail(self, message: str) -> None:
        if self._failure is None:
            self._failure = UdptunError(message)
            self._complain(message)
            self.request_stop()

    def _on_addresses(self, addresses: frozenset[IPAddress]) -> None:
        if self._running:
            self._begin(self._set_own(addresses))

    async def _set_own(self, addresses: frozenset[IPAddress]) -> None:
        async with self._changing:
            if self._core.set_own_addresses(address.packed for address in addresses):
                large = len(self._table) > LARGE_TABLE
                self._core.commit(await _aside(large, self._core.prepare, self._table))

    async def _keep_house(self) -> None:
        while True:
            await asyncio.sleep(HOUSEKEEPING_SECONDS)
            self._core.collect()
            self._look_at_workers()
            self._look_at_errors()

    # -- the route table --------------------------------------------------------------------------

    def _first_table(self) -> tuple[_core.RouteTable, Path | None]:
        """The table to start with, and the file it is from."""
        table = self._state.load() if self._state is not None else None
        routes_file = self.config.routes_file
        if table is not None:
            log.info("%d routes from %s%s", len(table), self.config.state_file,
                     "" if routes_file is None else f"; {routes_file} is read on SIGHUP only")
            return table, self.config.state_file
        if routes_file is not None:
            return _parse_file(routes_file), routes_file
        return _core.RouteTable(), None

    @property
    def route_count(self) -> int:
        return len(self._table)

    async def add_route(self, route: Route) -> RouteDiff:
        """Raises RouteExists when the prefix has another next hop; the same again is no change."""
        return await asyncio.shield(self._begin(self._set_route(route, replace=False)))

    async def put_route(self, route: Route) -> RouteDiff:
        """Add, or replace what the prefix has."""
        return await asyncio.shield(self._begin(self._set_route(route, replace=True)))

    def _begin(self, change: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """A change that has begun is finished, also when its caller is cancelled meanwhile: what
        is prepared in a helper thread must be committed or thrown away under the lock."""
        if not self._running:
            change.close()
            raise UdptunError("the forwarder is not running")
        task = asyncio.get_running_loop().create_task(change)
        self._changes.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._changes.discard(task)
        if not task.cancelled():
            task.exception()  # its caller, who may be gone, is the one to tell

    async def _finish_changes(self) -> None:
        await asyncio.gather(*self._changes, return_exceptions=True)

    async def _set_route(self, route: Route, replace: bool) -> RouteDiff:
        async with self._changing:
            table = self._table.copy()
            if table.set(route, replace) == "same":
                return RouteDiff(self.generation)
            return await self._put_in_force(table)

    async def delete_route(self, dst: IPNetwork) -> RouteDiff:
        """An absent route is no error and no change."""
        return await asyncio.shield(self._begin(self._delete_route(dst)))

    async def _delete_route(self, dst: IPNetwork) -> RouteDiff:
        async with self._changing:
            table = self._table.copy()
            if not table.delete(dst):
                return RouteDiff(self.generation)
            return await self._put_in_force(table)

    async def replace_routes(self, routes: Iterable[Route]) -> RouteDiff:
        """Replace the whole table in one step."""
        change = self._replace_typed(_core.RouteTable.from_routes(routes))
        return await asyncio.shield(self._begin(change))

    async def _replace_typed(self, table: _core.RouteTable) -> RouteDiff:
        async with self._changing:
            return await self._put_in_force(table)

    async def replace_routes_json(
        self, body: bytes | mmap, expect_generation: int | None = None
    ) -> RouteDiff:
        """Replace the whole table with ``{"routes": [...]}``.

        Raises FieldError naming the entry and field, GenerationMismatch.
        """
        change = self._replace(_core.RouteTable.parse_json, body, expect_generation)
        return await asyncio.shield(self._begin(change))

    async def replace_routes_text(
        self, body: bytes | mmap, expect_generation: int | None = None
    ) -> RouteDiff:
        """Replace the whole table with a route file's text. Raises as ``replace_routes_json``."""
        change = self._replace(_core.RouteTable.parse_text, body, expect_generation)
        return await asyncio.shield(self._begin(change))

    async def _replace(
        self, parse: Callable[[bytes | mmap], _core.RouteTable], body: bytes | mmap,
        expect: int | None,
    ) -> RouteDiff:
        async with self._changing:
            if expect is not None and expect != self.generation:
                raise GenerationMismatch(
                    f"the table is at generation {self.generation}, not {expect}"
                )
            table = await _aside(len(body) > 64 * LARGE_TABLE, parse, body)
            return await self._put_in_force(table)

    async def reload(self) -> RouteDiff:
        """Read the route file again. Raises FieldError or OSError; the table is then as it was."""
        if self.config.routes_file is None:
            raise FieldError("routes", None, "a route file, given at start")
        try:
            return await asyncio.shield(self._begin(self._reload(self.config.routes_file)))
        except (UdptunError, OSError) as error:
            self._hub.emit("error", message=f"the route file was not loaded: {error}")
            raise

    async def _reload(self, path: Path) -> RouteDiff:
        async with self._changing:
            table = await asyncio.to_thread(_parse_file, path)
            return await self._put_in_force(table)

    async def _put_in_force(self, table: _core.RouteTable) -> RouteDiff:
        old = self._table
        large = max(len(table), len(old)) > LARGE_TABLE
        added, changed, removed = await _aside(large, table.diff_from, old)
        if not added and not changed and not removed:
            return RouteDiff(self.generation)
        self._core.commit(await _aside(large, self._core.prepare, table))
        self._table = table
        self.generation += 1
        diff = RouteDiff(self.generation, added, changed, removed)
        if self._state is not None:
            self._state.save_soon(table)
        self._tell_changes(old, table, diff)
        return diff

    def _tell_changes(
        self, old: _core.RouteTable, table: _core.RouteTable, diff: RouteDiff
    ) -> None:
        if not self._hub.heard:
            return
        if diff.added + diff.changed + diff.removed <= EVENTS_MAX:
            for kind, dst, via, port, mtu in table.changes_from(old, EVENTS_MAX):
                self._hub.emit(f"route_{kind}", dst=dst, via=via, port=port, mtu=mtu)
        self._hub.emit("routes_replaced", **diff.to_json())

    # -- what a person wants to see ---------------------------------------------------------------

    def subscribe(self) -> AbstractContextManager[AsyncIterator[Event]]:
        """``with forwarder.subscribe() as events: async for event in events: ...``"""
        return self._hub.subscribe()

    async def route_chunks(self) -> AsyncGenerator[bytes, None]:
        """The table as JSON text, in pieces: {"generation": N, "routes": [...]}."""
        table, generation = self._table, self.generation
        yield b'{"generation":%d,"routes":[' % generation
        for start in range(0, len(table), SLICE):
            yield (b"," if start else b"") + table.json_slice(start, SLICE)
            await asyncio.sleep(0)
        yield b"]}"

    async def status(self) -> dict[str, Any]:
        """See docs/control.md for the shape."""
        text = b"".join([chunk async for chunk in self.status_chunks()])
        status: dict[str, Any] = json.loads(text)
        return status

    async def status_chunks(self) -> AsyncGenerator[bytes, None]:
        """The status as JSON text, in pieces."""
        async with self._changing:  # the peers' order is the table's
            table, generation, peers = self._table, self.generation, self._core.peers()
            subnets: list[list[str]] = [[] for _ in peers]
            for start in range(0, len(table), SLICE):
                ordinals = self._core.hop_ordinals(start, SLICE)
                for ordinal, dst in zip(ordinals, table.prefixes(start, SLICE), strict=True):
                    subnets[ordinal].append(dst)
                await asyncio.sleep(0)
        head = {
            "version": __version__,
            "pid": os.getpid(),
            "uptime_seconds": round(time.monotonic() - self._started, 3),
            "generation": generation,
            "route_count": len(table),
            "source_check": self.config.source_check,
            "device": {
                "name": self.tun_name,
                "mtu": self.mtu,
                "addresses": [str(address) for address in self.config.addresses],
                "networks": [str(network) for network in self.config.networks],
                "listen": [str(endpoint) for endpoint in self.config.listen],
            },
            "capabilities": self.capabilities.to_json(),
            "workers": self._workers(),
            "packets": self._core.packets(),
        }
        yield json.dumps(head)[:-1].encode() + b', "peers": ['
        for i, peer in enumerate(peers):
            yield (b"," if i else b"") + json.dumps(_peer_json(peer, subnets[i])).encode()
            if i % 64 == 63:
                await asyncio.sleep(0)
        yield b"]}"

    def drops(self) -> list[dict[str, Any]]:
        """Every reason in every direction in which it can occur, zeros too."""
        return [
            {"reason": reason, "direction": direction, "packets": packets}
            for reason, direction, packets in self._core.drops()
        ]

    def counters(self) -> dict[str, Any]:
        """A cheap snapshot for /metrics."""
        workers = self._workers()
        return {
            "packets": self._core.packets(),
            "drops": self.drops(),
            "peers_n": self._core.peers_n(),
            "routes_n": len(self._table),
            "generation": self.generation,
            "icmp": {
                "sent": sum(worker["icmp_sent"] for worker in workers),
                "suppressed": sum(worker["icmp_suppressed"] for worker in workers),
            },
            "workers": workers,
            "syscalls": {
                name: sum(worker["syscalls"][name] for worker in workers)
                for name in workers[0]["syscalls"]
            },
        }

    def trace(self, address: IPAddress) -> dict[str, Any]:
        """Which route, peer and MTU a packet to this address gets, and the verdict."""
        found = self._core.trace(address.packed)
        if found is None:
            return {
                "address": str(address), "verdict": "drop", "reason": "no_route",
                "route": None, "peer": None, "mtu": None,
            }
        route, limit = found
        return {
            "address": str(address), "verdict": "forward", "reason": None,
            "route": route.to_json(),
            "peer": str(Endpoint(route.via, route.port)),
            "mtu": min(limit, self.mtu),
        }

    def log_state(self) -> None:
        """Write the counters that matter to the log."""
        packets = self._core.packets()
        log.info("%s: generation %d, %d routes, %d peers", self.tun_name, self.generation,
                 len(self._table), self._core.peers_n())
        for direction, counts in packets.items():
            log.info("%s: %s", direction, " ".join(f"{k}={v}" for k, v in counts.items()))
        for drop in self.drops():
            if drop["packets"]:
                log.info("dropped %(packets)d: %(reason)s, %(direction)s", drop)

    def _workers(self) -> list[_core.WorkerCounters]:
        return [thread.worker.counters() for thread in self._threads]


async def _aside(large: bool, work: Callable[..., T], *args: Any) -> T:
    """Do what releases the GIL in a thread when it takes long, else here."""
    return await asyncio.to_thread(work, *args) if large else work(*args)


async def _cancel(task: asyncio.Task[None]) -> None:
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


def _call_in(loop: asyncio.AbstractEventLoop, work: Callable[..., object], *args: Any) -> None:
    with contextlib.suppress(RuntimeError):  # the loop closed meanwhile
        loop.call_soon_threadsafe(work, *args)


def _parse_file(path: Path) -> _core.RouteTable:
    try:
        return _core.RouteTable.parse_text(path.read_bytes())
    except FieldError as error:
        where = f"{path}: {error.where}"
        raise FieldError(error.field, error.value, error.expected, where) from None
    except OSError as error:
        raise DeviceError(error.errno, f"reading {path}: {error.strerror}") from None


def _endpoint(packed: bytes, port: int) -> str:
    return str(Endpoint(ipaddress.ip_address(packed), port))


def _peer_json(peer: tuple[Any, ...], subnets: list[str]) -> dict[str, Any]:
    packed, port, path_mtu, out_n, out_bytes, in_n, in_bytes, seen = peer
    return {
        "endpoint": _endpoint(packed, port),
        "subnets": subnets,
        "encap": {"packets": out_n, "bytes": out_bytes},
        "decap": {"packets": in_n, "bytes": in_bytes},
        "path_mtu": path_mtu,
        "last_seen_seconds": None if seen is None else round(seen, 3),
    }
