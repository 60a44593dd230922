"""Keep one forwarder running with the right options, and keep its routes equal to ours.

Owns: the decision to adopt or to replace a running forwarder, the time when a forwarder is started,
and the forwarder's routes. The forwarder is a separate process. It intentionally keeps running
after the daemon has ended; only a change of the wanted options ends it. Does not depend on leases,
or on how a process is started (``launch``). One asyncio loop. The control client is synchronous, so
it has its own thread, which makes one call at a time.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Awaitable, Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ..._version import __version__
from ...build import build_id
from ...control.client import ControlClient
from ...control.protocol import HEALTHZ
from ...errors import ControlError, DeviceError, FieldError, NoForwarder
from ...instance import Instance
from ...model import IPNetwork, Route, RouteDiff
from ...takeover.channel import close_all
from ...text import counted, os_reason
from ..status.report import DISK_REMEDY, NodeReport
from .copies import Copies
from .launch import ForwarderSpec, how_ended, spawn
from .standby import Standby

if TYPE_CHECKING:
    import subprocess

log = logging.getLogger(__name__)
T = TypeVar("T")

CALL_SECONDS = 5.0  # timeout of a call; a forwarder that works answers within milliseconds
POLL_SECONDS = 0.02  # between two attempts to reach a forwarder that we have just started
OPENING_SECONDS = 10.0  # a forwarder that opens has answered by then
IDLE_POLL_SECONDS = 0.1  # between two attempts to reach a forwarder of another program
CHECK_SECONDS = 5.0  # between two checks of the forwarder's options and routes
DEAF_SECONDS = 15.0  # for so long, a failure of the kernel's programs does not change the lease
FEW_ROUTES = 32  # if more routes change, replacing the whole table is less work
MAX_LOGGED = 10  # limit of routes that are logged one by one when they are refused
FIRST_BACKOFF, LAST_BACKOFF = 0.5, 5.0  # delay before a forwarder that ended early is started again


class ForwarderKeeper:
    """Keeps one forwarder running, and keeps its routes equal to ours.

    ``want``, ``replace`` and ``change`` can be called at any time, also while no forwarder runs.

    instance  of this forwarder
    external  another program starts the forwarder
    backend   the backend whose changed routes are counted in the report
    looping   returns which of these packed addresses the host routes into the forwarder's TUN.
              Raises DeviceError
    on_refused  called when ``refused`` has changed
    on_features  called when ``receives`` or ``copies_marks`` has changed
    standby   keep a standby process for the case that the forwarder dies. If ``external``, this
              process forwards until a forwarder of the other program takes over. With
              ``external``, a systemd unit has no standby process: systemd keeps the descriptors
              itself, and ends all processes of the unit together
    log_format  of the forwarders that we start
    """

    def __init__(
        self, control: Path, forward_file: Path, log_file: Path, instance: Instance,
        external: bool, report: NodeReport, backend: str,
        looping: Callable[[Collection[bytes]], Awaitable[Collection[bytes]]],
        on_refused: Callable[[], None], on_features: Callable[[], None], standby: bool = False,
        log_format: str = "text",
    ) -> None:
        self._log_format = log_format
        self._control, self._forward_file, self._log_file = control, forward_file, log_file
        self._instance, self._external = instance, external
        self._report = report
        self._backend = backend
        self._looping, self._on_refused, self._on_features = looping, on_refused, on_features
        self._client = ControlClient(str(control), CALL_SECONDS)
        self._thread = ThreadPoolExecutor(1, "forwarder-control")
        self._child: subprocess.Popen[bytes] | None = None
        self._copies = Copies(instance.takeover_socket(control))
        self._build = build_id()  # now, because an update replaces the files
        self._renewed = False
        self._wants_standby = standby and not (external and "INVOCATION_ID" in os.environ)
        self._standby: Standby | None = None
        self._backoff, self._not_before = 0.0, 0.0

        self._spec: ForwarderSpec | None = None
        self._unwritten = False  # the file has other options
        self._serving = False  # the running forwarder gets our routes
        self._matches = False  # it also matches ``_spec``
        self._check_at = 0.0  # time.monotonic() of the next check
        self._receives: bool | None = None
        self._copies_marks = True
        self._deaf_since: float | None = None  # the forwarder says that it does not receive
        self._routes: dict[IPNetwork, Route] | None = None
        self._pending: dict[IPNetwork, Route | None] = {}
        self._refused: dict[IPNetwork, Route] = {}
        self._replace_all = True  # send the whole table, because the forwarder's table is not known
        self._since: float | None = None  # arrival time of the oldest change that is not active yet
        self._generation = -1
        self._wake = asyncio.Event()
        self._synced = asyncio.Event()

    # -- the wanted options and routes ------------------------------------------------------------

    @property
    def spec(self) -> ForwarderSpec | None:
        """The options that the forwarder must have; None: no forwarder is wanted."""
        return self._spec

    @property
    def matches(self) -> bool:
        """Whether the running forwarder is known to have the wanted options."""
        return self._matches

    @property
    def receives(self) -> bool | None:
        """Whether the forwarder's programs receive in the kernel; None: not known since our start.

        Without a forwarder it is what the last one has said, because its programs go on.
        """
        return self._receives

    @property
    def copies_marks(self) -> bool:
        """Whether the forwarder copies congestion marks. One of an earlier version does not, and
        refuses the word ``ecn`` in a route. True until a forwarder has answered."""
        return self._copies_marks

    @property
    def refused(self) -> dict[IPNetwork, str]:
        """The subnets whose route is not sent to the forwarder, with the reason.

        The forwarder would refuse the route, and the whole table that contains it.
        """
        return {subnet: _why(route) for subnet, route in self._refused.items()}

    def want(self, spec: ForwarderSpec) -> None:
        """Set the options that the forwarder must have, and write them to the file.

        If the file cannot be written, for example because the disk is full, this is reported, and
        ``run`` writes it later. Until then the running forwarder keeps its options, because another
        one would read the former ones.
        """
        self._report.forwarder.needed = True
        if spec == self._spec:
            return
        self._write_if_changed(spec)
        self._spec, self._serving, self._matches = spec, False, False
        self._request_work()

    def _written(self) -> ForwarderSpec | None:
        """Return the options that the file has; None: it cannot be read."""
        try:
            return ForwarderSpec.read(self._forward_file)
        except (OSError, FieldError):
            return None

    def _write_if_changed(self, spec: ForwarderSpec) -> None:
        self._unwritten = self._written() != spec
        self._write(spec)

    def _write(self, spec: ForwarderSpec) -> None:
        """Write the options if the file is known to have others."""
        if self._unwritten:
            try:
                spec.write(self._forward_file)
            except OSError as exc:
                why = f"{self._forward_file} is not written: {os_reason(exc)}"
                if not self._report.troubles.get("options"):
                    log.error("%s", why)
                self._report.set_trouble("options", why, DISK_REMEDY)
                return
            self._unwritten = False
        self._report.set_trouble("options", "")

    async def dismiss(self) -> None:
        """Stop our forwarder, and do not start another one.

        A forwarder that does not use our options file keeps running.
        """
        self._report.forwarder.needed = False
        self._report.set_trouble("options", "")
        self._spec, self._routes = None, None
        self._unwritten = self._serving = self._matches = False
        self._copies.close()
        self._close_standby()
        self._wake.set()
        if self._forward_file.exists():
            await stop_forwarder(self._control, self._forward_file)

    def replace(self, routes: Mapping[IPNetwork, Route]) -> None:
        """Replace all routes of the forwarder by ``routes``."""
        self._routes = dict(routes)
        self._request_replacement()

    def change(self, routes: Mapping[IPNetwork, Route | None]) -> None:
        """Set the given routes. None deletes the subnet's route. Call it after ``replace``."""
        if not routes:
            return
        assert self._routes is not None
        for subnet, route in routes.items():
            if route is None:
                self._routes.pop(subnet, None)
            else:
                self._routes[subnet] = route
        self._pending.update(routes)
        self._request_work()

    async def wait_synced(self) -> None:
        """Wait until the forwarder has the right options and our routes."""
        await self._synced.wait()

    def _request_replacement(self) -> None:
        """Request that the whole table is sent.

        The forwarder changes nothing if its table already has the same routes.
        """
        self._replace_all = True
        self._request_work()

    def _request_work(self) -> None:
        self._synced.clear()
        self._report.forwarder.mark_synced(False)
        self._since = self._since or time.monotonic()
        self._wake.set()

    # -- finding, starting and stopping the forwarder ---------------------------------------------

    async def run(self) -> None:
        """Run until cancelled. The forwarder then keeps running."""
        try:
            while True:
                await self._attempt()
        finally:
            self._copies.close()
            self._close_standby()
            self._thread.submit(self._client.close)
            self._thread.shutdown(wait=False)

    async def _attempt(self) -> None:
        """Connect to the forwarder once.

        If this succeeds, keep its routes until it ends; else start a forwarder or wait for one.
        """
        if self._spec is None:
            await self._woken(None)
            return
        self._write(self._spec)
        try:
            # When the forwarder ends, the kernel closes this connection, so we notice the end at
            # once, also if the forwarder's process is in another PID namespace. We send one request
            # on it, because the forwarder closes a connection that sends none.
            lifeline, writer = await asyncio.open_unix_connection(self._control)
            writer.write(f"GET {HEALTHZ} HTTP/1.1\r\nHost: udptun\r\n\r\n".encode())
        except OSError:
            await self._absent(self._spec)
            return
        gone = asyncio.ensure_future(lifeline.read())
        try:
            await self._serve(gone)
        except (NoForwarder, ControlError, DeviceError) as exc:
            self._fail(str(exc))
            await asyncio.sleep(POLL_SECONDS if gone.done() else FIRST_BACKOFF)
        finally:
            gone.cancel()
            writer.close()
            await asyncio.wait({gone})  # unlike ``await gone``, wait() raises no exception of gone
            if not gone.cancelled():
                gone.exception()
            self._report.forwarder.connected = self._serving = self._matches = False

    async def _serve(self, gone: asyncio.Future[bytes]) -> None:
        """Keep the routes of a running forwarder up to date.

        Return or raise when the forwarder has ended, or when its options are not the wanted ones.
        But while the wanted options cannot be written, it keeps the options that it has.
        """
        status = await self._call(lambda: self._client.status(peers=False))
        spec = self._spec  # read after the call: ``want`` and ``dismiss`` may come during it
        if spec is None:
            return
        why = spec.mismatch(status)
        if why and await self._change_running(spec, status, why):
            why = ""
        if self._spec is not spec:
            return
        if why:
            self._write_if_changed(spec)  # without the file, no other forwarder can be started
        if why and not self._unwritten:
            await self._stop_wrong(why)
            return
        if why:
            self._fail("the forwarder's options are wrong, and it keeps them, because the right"
                       f" ones cannot be written: {why}")
        else:
            self._report.forwarder.connected, self._report.forwarder.error = True, ""
        self._backoff, self._serving, self._matches = 0.0, True, not why
        self._replace_all = True
        self._adopt(status)
        self._take_features(status)
        self._check_at = time.monotonic() + self._check_pause()
        while self._serving and not gone.done():
            if self._routes is not None and (self._replace_all or self._pending):
                await self._send_routes()
            await self._woken(gone)
            if not gone.done() and time.monotonic() >= self._check_at:
                # Also while routes change all the time.
                if self._receives is not None:
                    self._prepare_standby()
                await self._check()
                self._check_at = time.monotonic() + self._check_pause()
        if gone.done():
            raise NoForwarder(f"the forwarder on {self._control} has ended")

    async def _stop_wrong(self, why: str) -> None:
        """Stop the running forwarder, because its options are wrong."""
        if time.monotonic() < self._not_before:  # just started, or it has not stopped yet
            self._fail(f"the forwarder's options are wrong: {why}")
            await asyncio.sleep(IDLE_POLL_SECONDS)
            return
        log.warning("stopping the forwarder, because its options are wrong: %s", why)
        self._back_off()
        self._copies.close()
        await self._call(self._client.stop)
        if self._child is not None and self._child.poll() is not None:
            self._child = None  # the end was requested, so it is not an error

    def _adopt(self, status: Mapping[str, Any]) -> None:
        """Prepare for the death of a running forwarder, or replace it by one of our build."""
        if not self._report.forwarder.starts_n:
            log.info("adopting the forwarder on %s", self._control)
        if self._wants_standby or not self._external:
            self._copies.follow()
        if not self._external and not self._unwritten:
            self._renew(status["version"], status.get("build", ""))

    async def _change_running(
        self, spec: ForwarderSpec, status: Mapping[str, Any], why: str
    ) -> bool:
        """Give the running forwarder the wanted options. Return False if it must be replaced."""
        changes = spec.changes(status)
        if not changes:
            return False
        try:
            answer = await self._call(lambda: self._client.change_device(**changes))
        except ControlError as exc:  # also a forwarder of an earlier version
            log.warning("the running forwarder cannot change its options: %s", exc)
            return False
        if any(answer.get(name) != _plain(value) for name, value in changes.items()):
            # Its MTU stays while its address is on no interface. ``_check`` asks again.
            log.debug("the running forwarder cannot have all its options yet: %s", why)
        else:
            log.info("changed the options of the running forwarder, which were wrong: %s", why)
        return True

    async def _absent(self, spec: ForwarderSpec) -> None:
        """Start a forwarder, or wait until another program starts it."""
        child = self._child
        if child is not None and child.poll() is not None:
            self._child = None
            if not (self._external and child.returncode == 0):  # else another one has taken over
                self._fail(how_ended(child.returncode, self._log_file))
        if self._external and not (self._standby and self._copies.held):
            self._fail(f"no forwarder answers on {self._control}: start one with "
                       f"--wait-for {self._forward_file}")
            await asyncio.sleep(IDLE_POLL_SECONDS)
        elif self._child is None and time.monotonic() >= self._not_before:
            self._start(spec)
        await asyncio.sleep(POLL_SECONDS)

    def _start(self, spec: ForwarderSpec) -> None:
        in_unit = "INVOCATION_ID" in os.environ
        if in_unit and not self._external and not self._report.forwarder.starts_n:
            log.warning("starting a forwarder within this systemd unit: unless the unit has "
                        "KillMode=process, stopping it stops forwarding too. Better give the "
                        "forwarder a unit of its own, and --forwarder external here")
        self._back_off()
        try:
            # The file may have been removed. If the disk does not accept the new options, a
            # forwarder with the old ones is better than none.
            self._write_if_changed(spec)
            if self._written() is None:
                self._fail(f"no forwarder can be started: {self._forward_file} is not written")
                return
            kept = self._copies.take()
            try:
                self._child = self._standby_goes(kept) or \
                    spawn(self._forward_file, self._log_file, self._instance, kept,
                          log_format=self._log_format)
            finally:
                close_all(kept)
        except OSError as exc:
            self._fail(f"no forwarder can be started: {exc}")
            return
        self._report.forwarder.starts_n += 1
        log.info("started a forwarder, process %d; it logs to %s%s", self._child.pid,
                 self._log_file, "; another one may take over from it" if self._external else "")

    def _renew(self, version: str, build: str) -> None:
        """If the running forwarder is of another build, start one of our build, which takes over.
        Try this once. If it fails, the running forwarder goes on."""
        if (version, build) == (__version__, self._build) or self._renewed:
            return
        self._renewed = True
        what = (f"the forwarder is udptun {version} (build {build or 'unknown'}), this daemon "
                f"{__version__} (build {self._build})")
        if not self._instance.takeover_socket(self._control).exists():
            log.warning("%s; it is too old to be replaced without an outage, so it stays", what)
            return
        log.info("%s: a new forwarder takes over", what)
        try:
            self._child = spawn(self._forward_file, self._log_file, self._instance,
                                take_over=True, log_format=self._log_format)
        except OSError as exc:
            log.error("no forwarder can be started: %s", exc)
            return
        self._report.forwarder.starts_n += 1

    # -- the standby process ----------------------------------------------------------------------

    def _prepare_standby(self) -> None:
        """Start a standby process if there is none. Called when the forwarder has run for a while,
        so that the load of the start does not add to that of the forwarder's start."""
        if not self._wants_standby or self._standby is not None:
            return
        try:
            self._standby = Standby.start(
                self._forward_file, self._log_file, self._instance, self._log_format)
        except OSError as exc:
            log.warning("no standby process for the forwarder can be started: %s", exc)

    def _standby_goes(self, kept: Mapping[str, int]) -> subprocess.Popen[bytes] | None:
        """Let the standby process forward. Return None if there is none."""
        standby, self._standby = self._standby, None
        if standby is None:
            return None
        try:
            return standby.go(kept)
        except OSError as exc:
            log.warning("the standby process has ended: %s", exc)
            standby.close()
            return None

    def _close_standby(self) -> None:
        standby, self._standby = self._standby, None
        if standby is not None:
            standby.close()

    def _back_off(self) -> None:
        """Delay the next start or stop. The delay increases with each call."""
        self._not_before = time.monotonic() + self._backoff
        self._backoff = min(max(2 * self._backoff, FIRST_BACKOFF), LAST_BACKOFF)

    def _fail(self, why: str) -> None:
        report = self._report.forwarder
        report.mark_synced(False)
        self._synced.clear()
        if report.error != why:
            log.warning("%s", why)
            report.error = why

    # -- routes -----------------------------------------------------------------------------------

    async def _send_routes(self) -> None:
        """Send all pending changes. Changes that arrive during the call are sent by the next call.
        """
        assert self._routes is not None
        whole = self._replace_all or len(self._pending) > FEW_ROUTES
        pending, self._pending = self._pending, {}
        since, self._since = self._since, None
        self._replace_all = False
        try:
            if whole:
                routes = self._routes.copy()  # it can change during a call
                await self._refuse_loops(routes, whole=True)
                # As text, because JSON has three times the size and takes three times as long to
                # create.
                table = "".join([f"{self._known(route)}\n" for subnet, route in routes.items()
                                 if subnet not in self._refused]).encode()
                diff = await self._call(lambda: self._client.replace_text(table))
                if self._count(diff):
                    log.info("routes applied: %d added, %d changed, %d removed",
                             diff.added, diff.changed, diff.removed)
                self._report.forwarder.replaces_n += 1
            else:
                await self._refuse_loops(pending, whole=False)
                for subnet, route in pending.items():
                    before = self._generation
                    diff = await self._call(
                        self._one(subnet, None if subnet in self._refused else route))
                    if diff.generation != before + bool(self._count(diff)):
                        self._restore_all()
        except BaseException:
            self._replace_all, self._since = True, since
            raise
        report = self._report
        report.forwarder.routes_n = len(self._routes.keys() - self._refused.keys())
        if since is not None:
            report.paths_applied(since)
        if self._matches and not (self._replace_all or self._pending):
            report.forwarder.mark_synced(True)
            self._synced.set()

    async def _refuse_loops(
        self, routes: Mapping[IPNetwork, Route | None], *, whole: bool
    ) -> None:
        """Find those of the routes whose endpoint the host routes into the forwarder's TUN.

        whole  the other routes are not wanted any more
        """
        looping = await self._looping(
            {route.via.packed for route in routes.values() if route is not None})
        before = self._refused
        self._refused = {} if whole else {
            subnet: route for subnet, route in before.items() if subnet not in routes}
        for subnet, route in routes.items():
            if route is not None and route.via.packed in looping:
                self._refused[subnet] = route
        new = [(subnet, route) for subnet, route in self._refused.items()
               if before.get(subnet) != route]
        for subnet, route in new[:MAX_LOGGED]:
            log.warning("%s cannot be reached by UDP: %s", self._report.name_of(subnet),
                        _why(route))
        if len(new) > MAX_LOGGED:
            log.warning("%s cannot be reached by UDP either, for the same reason: see "
                        "`udptun status`", counted(len(new) - MAX_LOGGED, "more subnet"))
        if before != self._refused:
            self._on_refused()

    def _one(self, subnet: IPNetwork, route: Route | None) -> Callable[[], RouteDiff]:
        if route is None:
            return lambda: self._client.delete(subnet)
        known = self._known(route)
        return lambda: self._client.put(known)

    def _known(self, route: Route) -> Route:
        """Return the route without the word that the forwarder does not know."""
        return replace(route, ecn=False) if route.ecn and not self._copies_marks else route

    def _count(self, diff: RouteDiff) -> int:
        self._generation = diff.generation
        changed = diff.added + diff.changed + diff.removed
        changes_n = self._report.route_changes_n
        changes_n[self._backend] = changes_n.get(self._backend, 0) + changed
        return changed

    def _restore_all(self) -> None:
        log.warning("the forwarder's routes were changed by another program: restoring them")
        self._request_replacement()

    async def _check(self) -> None:
        """Look at the forwarder: its options and routes may have been changed by another program.
        Send a refused route if the forwarder would accept it now."""
        status = await self._call(lambda: self._client.status(peers=False))
        self._take_features(status)
        if self._spec is not None:
            self._write(self._spec)
            why = self._spec.mismatch(status)
            right = not why or await self._change_running(self._spec, status, why)
            if right != self._matches or not (right or self._unwritten):
                self._serving = False
        events = await self._call(lambda: list(self._client.events(follow=False)))
        if self._routes is not None and not self._replace_all and \
                events[0]["generation"] != self._generation:
            self._restore_all()
        if self._refused:  # the host may have another route now
            refused = {route.via.packed for route in self._refused.values()}
            if refused != {*await self._looping(refused)}:
                self._request_replacement()

    def _take_features(self, status: Mapping[str, Any]) -> None:
        receives = status.get("accelerate", {}).get("receives", False)  # older ones do not say it
        if receives is not None:
            receives = self._damped(receives)
        marks = "dscp" in status
        changed = (receives is not None and receives != self._receives) or \
            marks != self._copies_marks
        self._copies_marks = marks
        if receives is not None:
            self._receives = receives
        if changed:
            self._on_features()

    def _damped(self, receives: bool) -> bool:
        """Return True also for a while after the forwarder no longer receives in the kernel. Its
        workers take these packets, so a short failure need not change the lease."""
        now = time.monotonic()
        if receives:
            self._deaf_since = None
            return True
        if self._deaf_since is None:
            self._deaf_since = now
        return bool(self._receives) and now < self._deaf_since + DEAF_SECONDS

    # -- waiting ----------------------------------------------------------------------------------

    def _check_pause(self) -> float:
        """Return the time to the next check: a short one if the forwarder could not say yet whether
        it receives in the kernel."""
        return CHECK_SECONDS if self._receives is not None else min(
            CHECK_SECONDS, IDLE_POLL_SECONDS)

    async def _woken(self, gone: asyncio.Future[bytes] | None) -> None:
        """Wait for work, for the end of the forwarder, or for the time of the next check.

        gone  done when the forwarder has ended; None: there is no forwarder, and no check
        """
        wake = asyncio.ensure_future(self._wake.wait())
        waiting: set[asyncio.Future[Any]] = {wake} if gone is None else {wake, gone}
        try:
            await asyncio.wait(
                waiting, timeout=None if gone is None else max(
                    0.0, self._check_at - time.monotonic()),
                return_when=asyncio.FIRST_COMPLETED,
            )
        finally:
            wake.cancel()
        self._wake.clear()

    async def _call(self, call: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, call)


def _plain(value: object) -> object:
    return [*value] if isinstance(value, tuple) else value


def _why(route: Route) -> str:
    return (f"this host routes the peer's address {route.via} into the forwarder's own TUN, so "
            "datagrams to it would come back (ELOOP)")


async def stop_forwarder(
    control: Path, forward_file: Path, instance: Instance | None = None
) -> bool:
    """Stop the forwarder that has its options from ``forward_file``, if this forwarder runs.

    The file is removed first. If a service manager then starts the forwarder again, the forwarder
    waits for the file. Return True if a forwarder was stopped. Raises NoForwarder if the forwarder
    does not stop.

    instance  wait for a forwarder of this instance that is still opening; None: do not wait
    """
    forward_file.unlink(missing_ok=True)

    def stop() -> bool:
        with ControlClient(str(control), CALL_SECONDS) as client:
            try:
                client.status(peers=False)
            except NoForwarder:
                return False
            client.stop()
            return True

    deadline = time.monotonic() + OPENING_SECONDS
    while not (stopped := await asyncio.to_thread(stop)):
        if instance is None or instance.lock("forward").is_free():
            break
        if time.monotonic() > deadline:
            raise NoForwarder(f"a forwarder of the instance {instance.name} runs, but does not "
                              f"answer on {control}")
        await asyncio.sleep(IDLE_POLL_SECONDS)
    return stopped
