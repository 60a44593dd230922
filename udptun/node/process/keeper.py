"""Keep the forwarder what it shall be, and its routes equal to ours.

Owns: whether a running forwarder is adopted or started anew, when one is started, what it is told
of our routes. The forwarder is a process of its own, which outlives the daemon on purpose: nothing
here ends it but a change of what it shall be. Refuses to know leases; how a process is started
stands in ``launch``. One asyncio loop; the control client, which is synchronous, has a thread of
its own that makes one call at a time.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ...control.client import ControlClient
from ...errors import ControlError, FieldError, NoForwarder
from ...model import IPNetwork, Route, RouteDiff
from ..status.report import NodeReport
from .launch import ForwarderSpec, log_tail, spawn

if TYPE_CHECKING:
    import subprocess

log = logging.getLogger(__name__)
T = TypeVar("T")

CALL_SECONDS = 5.0  # a forwarder answers within milliseconds; one that does not is in trouble
LOOK_SECONDS = 0.02  # between looks for a forwarder that we have just started
IDLE_LOOK_SECONDS = 0.1  # between looks for one that somebody else starts
CHECK_SECONDS = 5.0  # between looks at a forwarder that is in step: does it answer, is it so still
FEW_ROUTES = 32  # changes from which putting the whole table is less work
FIRST_PAUSE, LAST_PAUSE = 0.5, 5.0  # before a forwarder that ended early is started again


class ForwarderKeeper:
    """``want`` and the routes may be told at any time, also before and without a forwarder."""

    def __init__(
        self, control: Path, forward_file: Path, log_file: Path, spawned: bool, report: NodeReport
    ) -> None:
        self._control, self._forward_file, self._log_file = control, forward_file, log_file
        self._spawned = spawned
        self._report = report
        self._client = ControlClient(str(control), CALL_SECONDS)
        self._thread = ThreadPoolExecutor(1, "forwarder-control")
        self._child: subprocess.Popen[bytes] | None = None
        self._pause, self._not_before = 0.0, 0.0

        self._spec: ForwarderSpec | None = None
        self._fits = False  # the forwarder on the other end is what ``_spec`` says
        self._routes: dict[IPNetwork, Route] | None = None
        self._pending: dict[IPNetwork, Route | None] = {}
        self._all = True  # the whole table is to be put: what the forwarder has is not known
        self._since: float | None = None  # when the oldest change that is not in force was told
        self._generation = -1
        self._wake = asyncio.Event()
        self._in_step = asyncio.Event()

    # -- what is wanted ---------------------------------------------------------------------------

    def want(self, spec: ForwarderSpec) -> None:
        """What the forwarder shall be from now on. OSError: the file cannot be written."""
        if spec == self._spec:
            return
        try:
            told = ForwarderSpec.read(self._forward_file)
        except (FileNotFoundError, FieldError):
            told = None
        if told != spec:
            spec.write(self._forward_file)
        self._spec, self._fits = spec, False
        self._stir()

    async def dismiss(self) -> None:
        """There shall be none. Of a forwarder that is not ours nothing is known, nor done."""
        self._spec, self._routes, self._fits = None, None, False
        self._wake.set()
        if self._forward_file.exists():
            await dismiss(self._control, self._forward_file)

    def replace(self, routes: Mapping[IPNetwork, Route]) -> None:
        """The whole table, from now on."""
        self._routes = dict(routes)
        self.resync()

    def change(self, routes: Mapping[IPNetwork, Route | None]) -> None:
        """Put some routes and delete others, after ``replace``."""
        if not routes:
            return
        assert self._routes is not None
        for subnet, route in routes.items():
            if route is None:
                self._routes.pop(subnet, None)
            else:
                self._routes[subnet] = route
        self._pending.update(routes)
        self._stir()

    def resync(self) -> None:
        """Put the whole table again; where it is in force already, nothing changes."""
        self._all = True
        self._stir()

    async def in_step(self) -> None:
        """Return when the forwarder is as wanted and has our routes."""
        await self._in_step.wait()

    def _stir(self) -> None:
        self._in_step.clear()
        self._report.forwarder.in_step = False
        self._since = self._since or time.monotonic()
        self._wake.set()

    # -- finding, starting and stopping it --------------------------------------------------------

    async def run(self) -> None:
        """Until cancelled; the forwarder is left running."""
        try:
            while True:
                await self._once()
        finally:
            self._thread.submit(self._client.close)
            self._thread.shutdown(wait=False)

    async def _once(self) -> None:
        """From one look at the forwarder to the next."""
        if self._spec is None:
            await self._woken(None)
            return
        try:
            # Nothing is ever said on this connection: that it ends says that the forwarder has
            # ended, at once, also where its process is in another PID namespace.
            lifeline, writer = await asyncio.open_unix_connection(self._control)
        except OSError:
            await self._absent(self._spec)
            return
        gone = asyncio.ensure_future(lifeline.read())
        try:
            await self._attend(self._spec, gone)
        except (NoForwarder, ControlError) as exc:
            self._fail(str(exc))
            await asyncio.sleep(LOOK_SECONDS if gone.done() else FIRST_PAUSE)
        finally:
            gone.cancel()
            writer.close()
            await asyncio.wait({gone})  # which, unlike awaiting it, keeps its end apart from ours
            if not gone.cancelled():
                gone.exception()
            self._report.forwarder.connected = self._fits = False

    async def _attend(self, spec: ForwarderSpec, gone: asyncio.Future[bytes]) -> None:
        """Serve a forwarder that is there, until it is gone or something else is wanted."""
        status = await self._call(lambda: self._client.status(peers=False))
        why = spec.misfit(status)
        if why:
            if time.monotonic() < self._not_before:  # so it was made just now, or stopped in vain
                self._fail(f"the forwarder is not as wanted: {why}")
                await asyncio.sleep(IDLE_LOOK_SECONDS)
                return
            log.warning("stopping the forwarder, which is not as wanted: %s", why)
            self._hold_off()
            await self._call(self._client.stop)
            if self._child is not None and self._child.poll() is not None:
                self._child = None  # as it should
            return
        if not self._report.forwarder.starts_n:
            log.info("adopting the forwarder on %s", self._control)
        self._pause, self._fits, self._all = 0.0, True, True
        self._report.forwarder.connected, self._report.forwarder.error = True, ""
        while self._fits and not gone.done():
            if self._routes is not None and (self._all or self._pending):
                await self._put_in_force()
            if not await self._woken(gone):
                await self._check()
        if gone.done():
            raise NoForwarder(f"the forwarder on {self._control} has ended")

    async def _absent(self, spec: ForwarderSpec) -> None:
        """Nobody answers: start one, or wait for who does."""
        child = self._child
        if child is not None and child.poll() is not None:
            self._child = None
            self._fail(f"the forwarder ended: {log_tail(self._log_file) or child.returncode}")
        if not self._spawned:
            self._fail(f"no forwarder answers on {self._control}: whoever starts it has to, "
                       f"with --wait-for {self._forward_file}")
            await asyncio.sleep(IDLE_LOOK_SECONDS)
        elif self._child is None and time.monotonic() >= self._not_before:
            self._start(spec)
        await asyncio.sleep(LOOK_SECONDS)

    def _start(self, spec: ForwarderSpec) -> None:
        if "INVOCATION_ID" in os.environ and not self._report.forwarder.starts_n:
            log.warning("a forwarder is started within this systemd unit: unless it has "
                        "KillMode=process, a stop of the unit stops forwarding too. Better give "
                        "the forwarder a unit of its own, and --forwarder external here")
        self._hold_off()
        try:
            spec.write(self._forward_file)  # somebody may have removed it
            self._child = spawn(self._forward_file, self._log_file)
        except OSError as exc:
            self._fail(f"no forwarder can be started: {exc}")
            return
        self._report.forwarder.starts_n += 1
        log.info("started a forwarder, process %d; it logs to %s", self._child.pid, self._log_file)

    def _hold_off(self) -> None:
        """One that ends, or does not fit, again and again is not started in a busy loop."""
        self._not_before = time.monotonic() + self._pause
        self._pause = min(max(2 * self._pause, FIRST_PAUSE), LAST_PAUSE)

    def _fail(self, why: str) -> None:
        report = self._report.forwarder
        report.in_step = False
        self._in_step.clear()
        if report.error != why:
            log.warning("%s", why)
            report.error = why

    # -- routes -----------------------------------------------------------------------------------

    async def _put_in_force(self) -> None:
        """All that was told so far. What is told meanwhile waits for the next turn."""
        assert self._routes is not None
        whole = self._all or len(self._pending) > FEW_ROUTES
        pending, self._pending = self._pending, {}
        since, self._since = self._since, None
        self._all = False
        try:
            if whole:
                # As text, which is a third of the JSON, and of the work to make it.
                table = "".join([f"{route}\n" for route in self._routes.values()]).encode()
                diff = await self._call(lambda: self._client.replace_text(table))
                if self._count(diff):
                    log.info("routes put in force: %d added, %d changed, %d removed",
                             diff.added, diff.changed, diff.removed)
                self._report.forwarder.replaces_n += 1
            else:
                for subnet, route in pending.items():
                    before = self._generation
                    diff = await self._call(self._one(subnet, route))
                    if diff.generation != before + bool(self._count(diff)):
                        self._put_all_back()
        except BaseException:
            self._all, self._since = True, since
            raise
        report = self._report
        report.forwarder.routes_n = len(self._routes)
        if since is not None:
            report.applied = time.monotonic()
            report.lag = report.applied - since
        if not (self._all or self._pending):
            report.forwarder.in_step = True
            self._in_step.set()

    def _one(self, subnet: IPNetwork, route: Route | None) -> Callable[[], RouteDiff]:
        if route is None:
            return lambda: self._client.delete(subnet)
        return lambda: self._client.put(route)

    def _count(self, diff: RouteDiff) -> int:
        self._generation = diff.generation
        changed = diff.added + diff.changed + diff.removed
        self._report.route_changes_n["udp"] += changed
        return changed

    def _put_all_back(self) -> None:
        log.warning("somebody else has changed the forwarder's routes: putting them all")
        self.resync()

    async def _check(self) -> None:
        """Nothing was to do for a while: is the forwarder still as we left it?"""
        events = await self._call(lambda: list(self._client.events(follow=False)))
        if self._routes is not None and not self._all and \
                events[0]["generation"] != self._generation:
            self._put_all_back()

    # -- waiting ----------------------------------------------------------------------------------

    async def _woken(self, gone: asyncio.Future[bytes] | None) -> bool:
        """Wait until something is wanted, or the forwarder is gone. False: neither, for long."""
        wake = asyncio.ensure_future(self._wake.wait())
        waiting: set[asyncio.Future[Any]] = {wake} if gone is None else {wake, gone}
        try:
            done, _ = await asyncio.wait(
                waiting, timeout=None if gone is None else CHECK_SECONDS,
                return_when=asyncio.FIRST_COMPLETED,
            )
        finally:
            wake.cancel()
        self._wake.clear()
        return bool(done)

    async def _call(self, call: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, call)


async def dismiss(control: Path, forward_file: Path) -> bool:
    """Stop the forwarder that ``forward_file`` asks for, if it runs, and take the file away first:
    who starts it again is to wait. True if one was stopped. NoForwarder: it does not stop."""
    forward_file.unlink(missing_ok=True)

    def stop() -> bool:
        with ControlClient(str(control), CALL_SECONDS) as client:
            try:
                client.status(peers=False)
            except NoForwarder:
                return False
            client.stop()
            return True

    return await asyncio.to_thread(stop)
