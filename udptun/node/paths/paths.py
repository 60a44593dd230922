"""The measured paths to all peers, and the choice between them.

Owns the pairs, one per subnet of a peer, and when a choice is made and applied. ``meters``
measures, ``choice`` has the rule, ``record`` reports. Does not depend on the protocol of a probe,
or on how a choice is applied to the host. Runs on the daemon's loop.

How a path is measured:
- A peer that advertises probes is probed on each path: by this daemon through the device of a
  backend (``bound``), or by the forwarder, which reports the result (``forwarder``).
- Any other peer gets an echo request to its overlay address (``echo``). The request takes the path
  that carries the packets. So the state of these peers is only reported, and their path does not
  change.

Only a node with several backends chooses between paths.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import time
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from ...errors import DeviceError
from ...model import IPNetwork
from ...text import counted
from ...wait import wait_at_most
from ..backends.active import ActiveBackends
from ..backends.base import Backend
from ..backends.plan import Plan, SubnetPaths
from ..status.report import NodeReport, PairReport, PathMeasurement
from .choice import Choice, Health, Measured, decide, next_decision_time
from .meters import SEND_AGES_PEERS, TICK_SECONDS, Meters
from .pair import STATES, Pair
from .record import Recorder

log = logging.getLogger(__name__)

RETRY_SECONDS = 1.0  # after a choice could not be applied
ASKS_N = 20  # pairs that wait for the forwarder at a time; others use its last measurement
LOGGED_N = 5  # subnets that one log line names
SLICE_N = 500  # pairs that are read at a time for the metrics
HAIRPIN = "; both nodes have one public address, so their NAT has to send packets back (hairpin)"

FORMER = "chosen before the start of this daemon"  # why a path is not the preferred one

Carriers = Mapping[IPNetwork, str | None]

# With thousands of pairs, most of these objects are equal, because their pairs changed together. So
# the pairs share them, which saves memory.
_measured = functools.lru_cache(maxsize=16)(Measured)
_first_choice = functools.lru_cache(maxsize=16)(Choice)


class Paths:
    """Measures the paths of the plan that ``update`` receives, from ``run`` on.

    carry  applies a choice to the host. Raises DeviceError
    """

    def __init__(
        self, backends: ActiveBackends, report: NodeReport, control: Path,
        carry: Callable[[Carriers], Awaitable[None]],
    ) -> None:
        self._all = {backend.name: backend for backend in backends}
        self._report = report
        self._carry = carry
        self._backends: tuple[Backend[Any], ...] = ()
        self._mtu = 0
        self._pairs: dict[IPNetwork, Pair] = {}
        self._left: dict[IPNetwork, Pair] = {}  # those that do not use their preferred path
        self._meters = Meters(control, self._look_at)
        self._recorder = Recorder(report)
        self._wanted: dict[IPNetwork, str | None] = {}  # choices that are not applied yet
        self._wake = asyncio.Event()
        self._asks: set[asyncio.Task[None]] = set()
        report.describe_paths = self._describe
        report.freshen_paths = self._meters.freshen
        report.measurements = self._measurements

    # -- the plan ---------------------------------------------------------------------------------

    def configure(self, mtu: int, port: int) -> None:
        """Set our inner MTU, and the UDP port that our lease advertises."""
        self._meters.use_port(port)
        if mtu != self._mtu:
            self._mtu = mtu
            for pair in self._pairs.values():
                pair.mtu, pair.device_mtu = self._mtu_of(pair.found), mtu
                self._meters.probe(pair)

    def update(self, plan: Plan, subnets: Collection[IPNetwork] | None = None) -> None:
        """Measure the paths of a new plan, or of the changed ``subnets`` of the same plan."""
        backends = tuple(self._all[reach.name] for reach in plan.local.reaches)
        if backends != self._backends:
            for subnet in [*self._pairs]:
                self._remove(subnet)
            self._wanted.clear()
            self._backends = backends
        if subnets is None:
            subnets = {*self._pairs, *(found.subnet for found in plan)}
        now = time.monotonic()
        for subnet in subnets:
            found = plan.get(subnet)
            if found is None:
                self._remove(subnet)
            else:
                self._set(found, plan.carriers.get(subnet), now)

    def _set(self, found: SubnetPaths, carrier: str | None, now: float) -> None:
        """Measure the paths to this subnet. carrier: the backend that carries its packets now, if
        it is not the preferred one."""
        former = self._pairs.get(found.subnet)
        meters, endpoints = self._meters.of(found, self._backends)
        if former is not None and \
                (former.found, former.meters, former.endpoints) == (found, meters, endpoints):
            return
        measured = [None if path is None else _measured(None, now) for path in found.paths]
        if former is None:
            usable = [at for at, path in enumerate(found.paths) if path is not None]
            at = next((at for at in usable if self._backends[at].name == carrier), usable[-1])
            why = FORMER if at != usable[-1] else ""
            choice = _first_choice(at, now, why)
            report = PairReport(found.key, found.subnet, self._backends[at].name, why)
        else:  # the peer has changed, so the measurements belong to its former paths
            choice, report = former.choice, former.report
            report.key = found.key
            self._forget(former)
        pair = Pair(found, self._mtu_of(found), self._mtu, meters, endpoints, measured, choice,
                    report, self._meters.errors_of(found, self._backends))
        self._pairs[found.subnet] = self._report_on(pair)
        self._note_left(pair)
        self._meters.probe(pair)
        self._look(pair, now)

    def _note_left(self, pair: Pair) -> None:
        if pair.choice.at != pair.preferred:
            self._left[pair.subnet] = pair
        else:
            self._left.pop(pair.subnet, None)

    def _report_on(self, pair: Pair) -> Pair:
        self._report.pairs[pair.subnet] = pair.report
        return pair

    def _mtu_of(self, found: SubnetPaths) -> int:
        advert = found.advert
        return self._mtu if advert is None or advert.mtu is None else min(self._mtu, advert.mtu)

    def _remove(self, subnet: IPNetwork) -> None:
        pair = self._pairs.pop(subnet, None)
        self._left.pop(subnet, None)
        if pair is not None:
            self._forget(pair)
            self._recorder.forget(pair)
            self._report.pairs.pop(subnet, None)
            if pair.choice.at != pair.preferred:
                self._want(subnet, None)  # the next peer with this subnet starts afresh

    def _forget(self, pair: Pair) -> None:
        if pair.timer is not None:
            pair.timer.cancel()
        self._meters.forget(pair)

    # -- what was measured ------------------------------------------------------------------------

    def _look_at(self, subnets: Iterable[IPNetwork]) -> None:
        now = time.monotonic()
        for subnet in subnets:
            if (pair := self._pairs.get(subnet)) is not None:
                self._look(pair, now)

    def _look(self, pair: Pair, now: float) -> None:
        """Read the health of each path again, and act on it."""
        got_worse = False
        for at, old in enumerate(pair.measured):
            if old is None:
                continue
            health, why = self._meters.health(pair, at)
            if why and pair.found.shares_address:
                why += HAIRPIN
            if health is not old.health:
                pair.measured[at] = _measured(health, now, why)
                got_worse |= at == pair.choice.at and health is not None and health < Health.GOOD
            elif why != old.why:
                pair.measured[at] = Measured(health, old.since, why)
        self._record(pair)
        if not (got_worse and self._ask(pair)):
            self._decide(pair)

    def _record(self, pair: Pair) -> None:
        carrying = (pair.measured[at] for at, backend in enumerate(self._backends)
                    if backend.name == pair.report.path)
        self._recorder.measured(pair, next(carrying, None))

    def _describe(self, subnet: IPNetwork) -> dict[str, Any]:
        """Return the state of each path to a subnet, for the status."""
        pair = self._pairs.get(subnet)
        return {} if pair is None else {
            backend.name: self._meters.describe(pair, at) | {
                "state": STATES[measured.health], "reason": measured.why}
            for at, backend in enumerate(self._backends)
            if (measured := pair.measured[at]) is not None}

    async def _measurements(self) -> list[PathMeasurement]:
        """Return what was measured of each path, for the metrics."""
        found = []
        for n, pair in enumerate([*self._pairs.values()], 1):
            for at, (backend, measured) in enumerate(
                    zip(self._backends, pair.measured, strict=False)):
                if measured is not None:
                    found.append(PathMeasurement(
                        pair.report.key, pair.subnet, backend.name, STATES[measured.health],
                        *self._meters.figures(pair, at)))
            if n % SLICE_N == 0:
                await asyncio.sleep(0)
        return found

    # -- asking the forwarder ---------------------------------------------------------------------

    def _ask(self, pair: Pair) -> bool:
        """Let the forwarder probe its path: its last probe of an idle pair may be long ago.

        Return whether the choice has to wait for the result.
        """
        if pair.asking or not pair.chooses or len(self._asks) >= ASKS_N:
            return pair.asking
        for at, endpoint in enumerate(pair.endpoints):
            if at != pair.choice.at and endpoint is not None:
                pair.asking = True
                task = asyncio.get_running_loop().create_task(self._asked(pair, at, endpoint))
                self._asks.add(task)
                task.add_done_callback(self._asks.discard)
                return True
        return False

    async def _asked(self, pair: Pair, at: int, endpoint: str) -> None:
        health = None
        try:
            health = await self._meters.ask(endpoint, pair.mtu)
        finally:
            pair.asking = False
        if self._pairs.get(pair.subnet) is pair:
            if health is not None:
                why = "" if health is Health.GOOD else "no answer to a probe on suspicion"
                pair.measured[at] = Measured(health, time.monotonic(), why)
            self._decide(pair)

    # -- choosing ---------------------------------------------------------------------------------

    def _decide(self, pair: Pair) -> None:
        if pair.timer is not None:
            pair.timer.cancel()
            pair.timer = None
        if pair.asking:
            return
        now = time.monotonic()
        former = pair.choice
        if pair.chooses:
            pair.choice = decide(former, pair.measured, now)
            if (at := next_decision_time(pair.choice, pair.measured)) is not None:
                pair.timer = asyncio.get_running_loop().call_later(
                    max(at - now, 0.0), self._decide, pair)
        elif former.at != pair.preferred:
            pair.choice = Choice(pair.preferred, now)
        if pair.choice.at != former.at:
            preferred = pair.choice.at == pair.preferred
            self._want(pair.subnet, None if preferred else self._backends[pair.choice.at].name)
            self._meters.probe(pair)
            self._note_left(pair)
        self._report_return(pair, now)

    def _report_return(self, pair: Pair, now: float) -> None:
        """Report when the preferred path will carry the packets again."""
        report, away = pair.report, pair.chooses and pair.choice.at != pair.preferred
        report.preferred = self._backends[pair.preferred].name
        report.hold = pair.choice.hold if away else None
        at = next_decision_time(pair.choice, pair.measured) if away else None
        report.returns = None if at is None else time.time() + at - now

    def _want(self, subnet: IPNetwork, carrier: str | None) -> None:
        self._wanted[subnet] = carrier
        self._wake.set()

    async def _apply(self) -> None:
        """Apply the choices that were made since the last call, and report them."""
        wanted, self._wanted = self._wanted, {}
        try:
            await self._carry(wanted)
        except DeviceError as exc:
            log.error("changing the path to %s (%s): %s; trying again",
                      counted(len(wanted), "subnet"),
                      ", ".join(map(str, [*wanted][:LOGGED_N])), exc)
            self._wanted = wanted | self._wanted
            await asyncio.sleep(RETRY_SECONDS)
            self._wake.set()
            return
        for subnet, carrier in wanted.items():
            if (pair := self._pairs.get(subnet)) is not None:
                self._recorder.moved(pair, carrier or self._backends[pair.preferred].name)
                self._record(pair)

    # -- background work --------------------------------------------------------------------------

    async def run(self) -> None:
        """Measure and choose until cancelled."""
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._keep_choices())
                tasks.create_task(self._keep_meters())
                tasks.create_task(self._keep_traffic())
                tasks.create_task(self._meters.keep_forwarder(self._pairs))
        finally:
            self._meters.close()

    async def _keep_choices(self) -> None:
        while True:
            await wait_at_most(self._wake, TICK_SECONDS)
            self._wake.clear()
            if self._wanted:
                await self._apply()
            self._recorder.flush()

    async def _keep_meters(self) -> None:
        while True:
            self._meters.check(self._pairs, self._backends)
            self._meters.follow_left([*self._left.values()])
            await self._meters.follow_standby(self._pairs.values())
            self._report.measure_errors = self._meters.errors()
            await asyncio.sleep(TICK_SECONDS)

    async def _keep_traffic(self) -> None:
        while True:
            await asyncio.sleep(max(TICK_SECONDS, len(self._pairs) / SEND_AGES_PEERS))
            for at, backend in enumerate(self._backends):
                await self._meters.follow_traffic(self._pairs, at, backend)
