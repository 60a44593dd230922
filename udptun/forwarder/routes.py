"""The active route table: its changes, its generation, and its copy on disk.

Owns the table, the lock that orders its changes, the generation number and the state file. Does not
depend on the control API or the TUN. Threading: control loop only. A large table is parsed and
compiled in a helper thread without the GIL. One pointer swap on the control loop activates the
table.
"""

from __future__ import annotations

import asyncio
import logging
from bisect import bisect_left
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Iterable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from mmap import mmap
from pathlib import Path
from typing import Any, TypeVar

from .. import _core
from ..control.events import EventHub
from ..errors import DeviceError, FieldError, GenerationMismatch, RouteLoops, UdptunError
from ..model import IPAddress, IPNetwork, Peer, Route, RouteDiff, source_port_json
from ..text import counted, os_reason
from .express import Express, Table
from .loops import SLICE, Loops
from .state import StateFile

log = logging.getLogger(__name__)
T = TypeVar("T")

LARGE_TABLE = 2000  # routes; a change of a larger table is computed in a helper thread
LARGE_BODY = 64 * LARGE_TABLE  # bytes of a table that is not parsed yet
MAX_NAMED = 10  # routes that one message names
OWN_ROUTES_MAX = 20  # routes to one of our own subnets that are reported
EVENTS_MAX = 1000  # a change of more routes emits one event for all of them


class HandedOver(UdptunError, ConnectionError):
    """The change reached a forwarder that has just handed over to another one.

    This is a ConnectionError, so the control API closes the connection without an answer. A client
    then connects to the new forwarder, and repeats its request.
    """


@dataclass(frozen=True, slots=True)
class PeerRoutes:
    """One peer and the prefixes routed to it."""

    peer: Peer
    prefixes: list[str]


class Routes:
    """The table. ``load`` reads it from disk, ``open`` activates it, ``close`` ends its changes.

    routes_file  file that is read at start and by ``reload``
    state_file   copy of the active table. At start, a valid state_file is loaded instead of
                 routes_file
    addresses    our addresses on the TUN
    subnets      our own subnets, as far as they are known
    """

    def __init__(
        self, routes_file: Path | None, state_file: Path | None, events: EventHub,
        report: Callable[[str], None], addresses: Iterable[IPAddress] = (),
        subnets: Iterable[IPNetwork] = (),
    ) -> None:
        self.generation = 0
        self._report = report
        self._addresses, self._subnets = tuple(addresses), tuple(subnets)
        self._own_routes: set[Route] = set()  # the routes to our own subnet that were reported
        self._routes_file = routes_file
        self.state = None if state_file is None else StateFile(state_file, report)
        self._events = events
        self._table = _core.RouteTable()
        self._origin: Path | None = None  # the file from which the first table was read
        self._core: _core.Core | None = None  # set between open and close
        self._loops: Loops | None = None
        self._express: Express | None = None
        self._handed_over = False
        self._lock = asyncio.Lock()
        self._changes: set[asyncio.Task[Any]] = set()

    def __len__(self) -> int:
        return len(self._table)

    # -- start and stop ---------------------------------------------------------------------------

    def load(self) -> None:
        """Read the first table. Call ``unlock`` afterwards, even if this fails. Raises FieldError,
        DeviceError."""
        state, routes_file = self.state, self._routes_file
        table = state.load() if state is not None else None
        if state is not None and table is not None:
            log.info("%s loaded from %s%s", counted(len(table), "route"), state.path,
                     "" if routes_file is None else f"; {routes_file} is read on SIGHUP only")
            self._table, self._origin = table, state.path
        elif routes_file is not None:
            self._table, self._origin = _parse_file(routes_file), routes_file

    def inherit(self, text: bytes, generation: int) -> None:
        """Continue the table of a forwarder from which this one takes over, instead of ``load``.

        Raises FieldError.
        """
        self._table, self.generation = _core.RouteTable.parse_text(text), generation

    def open(self, core: _core.Core, loops: Loops, express: Express) -> None:
        """Activate the table and accept changes. Raises FieldError, which names the file."""
        self._express = express
        try:
            try:
                self._publish(core, *self._prepare(core, self._table))
            except FieldError:
                if not self._leave_out_families(loops.versions):
                    raise
                self._publish(core, *self._prepare(core, self._table))
        except FieldError as error:
            where = f"{self._origin}: {error.where}"
            raise FieldError(error.field, error.value, error.expected, where) from None
        self._core, self._loops = core, loops
        self.generation = self.generation or 1
        self._report_own_routes(core)

    def _leave_out_families(self, versions: frozenset[int]) -> bool:
        """Remove the saved routes whose next hop has an IP version without a listener.

        The options may have changed since the routes were saved: such a route may not make the
        others unusable. Returns whether there was one.
        """
        if self.state is None or self._origin != self.state.path:
            return False
        routes = map(self._table.route_at, range(len(self._table)))
        left_out = [route for route in routes if route.via.version not in versions]
        for route in left_out:
            self._table.delete(route.dst)
        if left_out:
            self._report(f"left out {counted(len(left_out), 'route')} of {self._origin}, because "
                         "this "
                         "forwarder does not listen on an address of their IP version: "
                         f"{_named(left_out)}")
        return bool(left_out)

    async def leave_out_loops(self) -> None:
        """Remove and report the routes whose endpoint the host routes into the TUN.

        Call it at the start, when the TUN is set up: until then the kernel does not route anything
        into it. The state of the host may have changed since the routes were configured, so such a
        route does not make the other routes unusable.
        """
        await self._change(self._leave_out_loops)

    async def _leave_out_loops(self, core: _core.Core) -> None:
        assert self._loops is not None
        looping = [route async for route in self._loops.find(self._table)]
        if not looping:
            return
        table = self._table.copy()
        for route in looping:
            table.delete(route.dst)
        source = "" if self._origin is None else f" of {self._origin}"
        self._report(f"routes{source} are left out, because this host routes their endpoint into "
                     f"{self._loops.device} itself (ELOOP): {_named(looping)}")
        await self._install(core, table, checked=True)

    async def save(self) -> None:
        """Write the state file, at the start."""
        if self.state is not None:
            await self.state.save(self._table)

    def unlock(self) -> None:
        """Let another forwarder use the state file. Call it after ``close``."""
        if self.state is not None:
            self.state.unlock()

    @asynccontextmanager
    async def frozen(self) -> AsyncIterator[bytes]:
        """Hold back all changes while the context is open. Return the table as text.

        The state file then has this table. After ``hand_over``, the changes that were held back
        raise HandedOver.
        """
        async with self._lock:
            if self.state is not None:
                await self.state.write_pending()
            parts = []
            for start in range(0, len(self._table), SLICE):
                parts.append(self._table.text_slice(start, SLICE))
                await asyncio.sleep(0)
            yield b"".join(parts)

    def hand_over(self) -> None:
        """Refuse all changes from now on, because another forwarder has the table."""
        self._core, self._handed_over = None, True

    async def close(self) -> None:
        """Refuse further changes, finish the changes that have begun, and write the state file."""
        self._core = None
        await asyncio.gather(*self._changes, return_exceptions=True)
        if self.state is not None:
            await self.state.flush()

    # -- changes ----------------------------------------------------------------------------------

    async def add(self, route: Route) -> RouteDiff:
        """Add a route. If the table has the same route already, nothing changes.

        Raises RouteExists if the table has a different route to the prefix. Like the other changes,
        raises RouteLoops if the host routes an endpoint into the TUN.
        """
        return await self._change(lambda core: self._set(core, route, replace=False))

    async def put(self, route: Route) -> RouteDiff:
        """Add a route, or replace the route to the same prefix."""
        return await self._change(lambda core: self._set(core, route, replace=True))

    async def delete(self, dst: IPNetwork) -> RouteDiff:
        """Delete the route to ``dst``. If there is none, nothing changes; this is not an error."""
        return await self._change(lambda core: self._delete(core, dst))

    async def replace(self, routes: Iterable[Route]) -> RouteDiff:
        """Replace the whole table in one step."""
        table = _core.RouteTable.from_routes(routes)
        return await self._change(lambda core: self._install(core, table))

    async def replace_json(
        self, body: bytes | mmap, expect_generation: int | None = None
    ) -> RouteDiff:
        """Replace the whole table with ``{"routes": [...]}``.

        Raises FieldError, which names the entry and field; GenerationMismatch.
        """
        parse = _core.RouteTable.parse_json
        return await self._change(lambda core: self._replace(core, parse, body, expect_generation))

    async def replace_text(
        self, body: bytes | mmap, expect_generation: int | None = None
    ) -> RouteDiff:
        """Replace the whole table with a route file's text. Raises as ``replace_json``."""
        parse = _core.RouteTable.parse_text
        return await self._change(lambda core: self._replace(core, parse, body, expect_generation))

    async def reload(self) -> RouteDiff:
        """Read the route file again. Raises FieldError, OSError; the table is then unchanged."""
        path = self._routes_file
        if path is None:
            raise FieldError("routes", None, "a route file, given at start")
        try:
            return await self._change(lambda core: self._reload(core, path))
        except (UdptunError, OSError) as error:
            self._events.emit("error", message=f"the route file was not loaded: {error}")
            raise

    async def set_own_addresses(self, addresses: Iterable[IPAddress]) -> None:
        """Set the host's own addresses. No peer may use them as inner source addresses."""
        async def change(core: _core.Core) -> None:
            if core.set_own_addresses(address.packed for address in addresses):
                await self._activate(core, self._table, len(self))

        await self._change(change)

    async def alone(self, work: Callable[[_core.Core], Coroutine[Any, Any, T]]) -> T:
        """Run other work on the core while no route changes and no process takes over.

        Raises HandedOver.
        """
        return await self._change(work)

    async def _change(self, change: Callable[[_core.Core], Coroutine[Any, Any, T]]) -> T:
        """Run one change at a time. A change runs to its end even if its caller is cancelled, so
        that a prepared snapshot is either activated or freed under the lock."""
        self._refuse_handed_over()
        core = self._core
        if core is None:
            raise UdptunError("the forwarder is not running")

        async def run() -> T:
            async with self._lock:
                self._refuse_handed_over()
                return await change(core)

        task = asyncio.get_running_loop().create_task(run())
        self._changes.add(task)
        task.add_done_callback(self._finished)
        return await asyncio.shield(task)

    def _refuse_handed_over(self) -> None:
        if self._handed_over:
            raise HandedOver("another forwarder has taken over: repeat the request")

    def _finished(self, task: asyncio.Task[Any]) -> None:
        self._changes.discard(task)
        if not task.cancelled():
            task.exception()  # mark as retrieved: asyncio would log it if the caller is gone

    # -- with the lock held -----------------------------------------------------------------------

    async def _set(self, core: _core.Core, route: Route, replace: bool) -> RouteDiff:
        table = self._table.copy()
        if table.set(route, replace) == "same":
            return RouteDiff(self.generation)
        assert self._loops is not None
        if await self._loops.among({route.via.packed}):
            raise RouteLoops(str(route.dst), str(route.via), self._loops.device)
        return await self._install(core, table, checked=True)

    async def _delete(self, core: _core.Core, dst: IPNetwork) -> RouteDiff:
        table = self._table.copy()
        if not table.delete(dst):
            return RouteDiff(self.generation)
        return await self._install(core, table, checked=True)

    async def _replace(
        self, core: _core.Core, parse: Callable[[bytes | mmap], _core.RouteTable],
        body: bytes | mmap, expect: int | None,
    ) -> RouteDiff:
        if expect is not None and expect != self.generation:
            raise GenerationMismatch(f"the table is at generation {self.generation}, not {expect}")
        table = await _run(len(body) > LARGE_BODY, parse, body)
        return await self._install(core, table)

    async def _reload(self, core: _core.Core, path: Path) -> RouteDiff:
        table = await asyncio.to_thread(_parse_file, path)
        if len(self) and not len(table):  # the file was emptied, probably by mistake
            raise UdptunError(f"there is no route in {path}, so all routes would be deleted: use "
                              f"`udptun route sync --allow-empty {path}` if this is intended")
        return await self._install(core, table)

    async def _install(
        self, core: _core.Core, table: _core.RouteTable, checked: bool = False
    ) -> RouteDiff:
        """Replace the active table by ``table``, save the new table and emit events.

        checked  the table has no new route whose endpoint the host routes into the TUN
        """
        old = self._table
        size = max(len(table), len(old))
        added, changed, removed = await _run(size > LARGE_TABLE, table.diff_from, old)
        if not added and not changed and not removed:
            return RouteDiff(self.generation)
        if not checked:
            await self._refuse_loops(table)
        await self._activate(core, table, size)
        self._table = table
        self.generation += 1
        self._report_own_routes(core)
        diff = RouteDiff(self.generation, added, changed, removed)
        if self.state is not None:
            self.state.save_soon(table)
        if added + changed + removed <= EVENTS_MAX:
            for kind, dst, via, port, mtu, probe, ports, express, ecn in table.changes_from(
                    old, EVENTS_MAX):
                flags = {"probe": probe, "express": express, "ecn": ecn}
                more: dict[str, Any] = {name: True for name, is_on in flags.items() if is_on}
                if ports is not None:
                    more["source_port"] = source_port_json(ports)
                self._events.emit(f"route_{kind}", dst=dst, via=via, port=port, mtu=mtu, **more)
        self._events.emit("routes_replaced", **diff.to_json())
        return diff

    async def _refuse_loops(self, table: _core.RouteTable) -> None:
        assert self._loops is not None
        async for route in self._loops.find(table):
            raise RouteLoops(str(route.dst), str(route.via), self._loops.device)

    def _report_own_routes(self, core: _core.Core) -> None:
        """Report a route to our own subnet or to a part of it: it sends packets for our own pods to
        another host.

        If our subnet is not known, such a route begins at the address of the TUN, which is the base
        address of our subnet. A route with a shorter prefix, for example the route to a gateway for
        the whole overlay, usually begins at another address. It is not reported.
        """
        found = {route for subnet in self._subnets for route in _within(self._table, subnet)}
        for address in self._addresses:
            traced = core.trace(address.packed)
            if traced is not None and traced[0].dst.network_address == address:
                found.add(traced[0])
        for route in found - self._own_routes:
            self._report(f"the route {route} is to this host's own subnet, so packets for pods on "
                         f"this host may leave it")
        self._own_routes = found

    async def _activate(self, core: _core.Core, table: _core.RouteTable, size: int) -> None:
        self._publish(core, *await _run(size > LARGE_TABLE, self._prepare, core, table))

    def _prepare(
        self, core: _core.Core, table: _core.RouteTable
    ) -> tuple[_core.PreparedSnapshot, Table | None]:
        """Build what the workers and the express path look addresses up in. Any thread."""
        assert self._express is not None
        prepared = core.prepare(table)
        return prepared, self._express.build(prepared)

    def _publish(
        self, core: _core.Core, prepared: _core.PreparedSnapshot, table: Table | None
    ) -> None:
        """Activate both in one step."""
        assert self._express is not None
        core.activate(prepared)
        self._express.activate(table)

    # -- reading ----------------------------------------------------------------------------------

    async def json_chunks(self) -> AsyncGenerator[bytes, None]:
        """Yield the table as JSON text, in pieces: {"generation": N, "routes": [...]}."""
        table, generation = self._table, self.generation
        yield b'{"generation":%d,"routes":[' % generation
        for start in range(0, len(table), SLICE):
            yield (b"," if start else b"") + table.json_slice(start, SLICE)
            await asyncio.sleep(0)
        yield b"]}"

    async def peers(self, core: _core.Core) -> tuple[int, int, list[PeerRoutes]]:
        """Return the generation, the number of routes, and all peers in the order of the table."""
        async with self._lock:  # a concurrent change would reorder the peers
            table, generation = self._table, self.generation
            found = [PeerRoutes(peer, []) for peer in core.peers()]
            for start in range(0, len(table), SLICE):
                ordinals = core.hop_ordinals(start, SLICE)
                for peer, dst in zip(ordinals, table.prefixes(start, SLICE), strict=True):
                    found[peer].prefixes.append(dst)
                await asyncio.sleep(0)
        return generation, len(table), found


async def _run(large: bool, work: Callable[..., T], *args: Any) -> T:
    """Call ``work``, which releases the GIL. If ``large``, call it in a helper thread."""
    return await asyncio.to_thread(work, *args) if large else work(*args)


def _named(routes: list[Route]) -> str:
    more = f" and {len(routes) - MAX_NAMED} more" if len(routes) > MAX_NAMED else ""
    return ", ".join(map(str, routes[:MAX_NAMED])) + more


def _parse_file(path: Path) -> _core.RouteTable:
    try:
        return _core.RouteTable.parse_text(path.read_bytes())
    except FieldError as error:
        where = f"{path}: {error.where}"
        raise FieldError(error.field, error.value, error.expected, where) from None
    except OSError as error:
        raise DeviceError(error.errno, f"reading {path}: {os_reason(error)}") from None


def _within(table: _core.RouteTable, subnet: IPNetwork) -> Iterator[Route]:
    """Yield the first routes to the subnet or to parts of it."""
    def key(prefix: IPNetwork) -> tuple[int, int, int]:
        return prefix.version, int(prefix.network_address), prefix.prefixlen

    at = bisect_left(range(len(table)), key(subnet), key=lambda i: key(table.route_at(i).dst))
    for i in range(at, min(at + OWN_ROUTES_MAX, len(table))):
        route = table.route_at(i)
        if route.dst.version != subnet.version or route.dst.network_address not in subnet:
            return
        yield route
