"""The measured paths to all peers, and the choice between them.

Owns: which path is measured by which kind of probe, the health of each path, the choice of the path
that carries the packets (``choice`` has the rule), and what is reported about it. Does not depend
on the protocol of a probe or on how a choice is applied to the host. Runs on the daemon's loop.

How a path is measured:
- A peer that advertises probes is probed on each path: by this daemon through the device of a
  backend (``bound``), or by the forwarder, which reports the result (``forwarder``).
- Any other peer gets an echo to its overlay address (``echo``). The echo takes the path that
  carries the packets. So these peers are only reported on, and keep the preferred path.

Only a node with several backends chooses. With a single backend the same measurements are reported.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...errors import DeviceError
from ...model import IPNetwork
from ...probe.state import REACHABLE, UNREACHABLE, PathState
from ...wait import wait_at_most
from ..backends import BACKENDS
from ..backends.active import ActiveBackends
from ..backends.base import Backend, ProbeDevice
from ..backends.plan import Plan, SubnetPaths
from ..status.report import NodeReport, PairReport
from .bound import BoundMeter
from .choice import Choice, Health, Measured, decide, due
from .echo import EchoMeter
from .forwarder import ForwarderView
from .meter import Meter

log = logging.getLogger(__name__)

TICK_SECONDS = 1.0
# A path that was left is probed at least this often, so that it can carry again soon.
LEFT_SECONDS = 5.0
SEND_AGES_PEERS = 1000  # the times of the last packets are read every (peers / this) seconds
AGE_SLACK_SECONDS = 0.1  # rounding of these times, and the time of the call
REFRESH_SECONDS = 15.0  # between two reads of the forwarder's whole state
RETRY_SECONDS = 1.0  # after a choice could not be applied
MAX_LOGGED = 10  # peers that are logged one by one per tick

STATES = {
    None: "unknown", Health.LOST: "unreachable", Health.SMALL: "limited", Health.GOOD: "reachable"}
TROUBLES = ("limited", "unreachable")

Carriers = Mapping[IPNetwork, str | None]


@dataclass(slots=True, eq=False)
class Pair:
    """One subnet of a peer.

    found     its paths, as planned
    meters    per path: the meter of this daemon that measures it; None: the forwarder does, or
              there is no such path
    measured  per path: the health; None: there is no such path
    choice    the path to carry the packets; ``report`` has the one that carries them now
    asking    the forwarder probes its path now, and the choice waits for the result
    timer     looks again when the preferred path has been good for long enough
    """

    found: SubnetPaths
    meters: tuple[Meter | None, ...]
    measured: list[Measured | None]
    choice: Choice
    report: PairReport
    asking: bool = False
    timer: asyncio.TimerHandle | None = None
    endpoints: list[str] = field(default_factory=list)

    @property
    def subnet(self) -> IPNetwork:
        return self.found.subnet


class Paths:
    """Measures the paths of the plan that ``update`` receives.

    carry  applies a choice to the host. Raises DeviceError
    """

    def __init__(
        self, backends: ActiveBackends, report: NodeReport, control: Path,
        carry: Callable[[Carriers], Awaitable[None]],
    ) -> None:
        self._all = {backend.name: backend for backend in backends}
        self._report = report
        self._control = control
        self._carry = carry
        self._backends: tuple[Backend[Any], ...] = ()
        self._mtu = self._port = 0
        self._pairs: dict[IPNetwork, Pair] = {}
        self._by_endpoint: dict[str, dict[IPNetwork, None]] = {}
        self._bound: dict[tuple[str, int], BoundMeter] = {}  # by backend and IP version
        self._echo: dict[int, EchoMeter] = {}  # by IP version
        self._forwarder: ForwarderView | None = None
        self._wanted: dict[IPNetwork, str | None] = {}  # choices that are not applied yet
        self._wake = asyncio.Event()
        self._asks: set[asyncio.Task[None]] = set()
        self._logged: list[tuple[int, str]] = []  # level and line
        report.describe_paths = self._describe

    # -- the plan ---------------------------------------------------------------------------------

    def configure(self, mtu: int, port: int) -> None:
        """Set our inner MTU, and the UDP port that our lease advertises."""
        if (mtu, port) != (self._mtu, self._port):
            self._mtu, self._port = mtu, port
            for pair in self._pairs.values():
                self._probe(pair)

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
        for subnet in subnets:
            found = plan.get(subnet)
            if found is None:
                self._remove(subnet)
            else:
                self._set(found)

    def _set(self, found: SubnetPaths) -> None:
        subnet, former = found.subnet, self._pairs.get(found.subnet)
        if former is not None and former.found != found:
            for meter in former.meters:  # measured on other paths
                if meter is not None:
                    meter.remove(subnet)
        meters = tuple(
            None if path is None else self._meter(backend, path, found)
            for backend, path in zip(self._backends, found.paths, strict=True))
        if former is not None and (former.found, former.meters) == (found, meters):
            self._probe(former)
            return
        pair = self._new_pair(found, meters, former)
        self._drop(former)
        self._pairs[subnet] = pair
        self._report.pairs[subnet] = pair.report
        for endpoint in pair.endpoints:
            self._by_endpoint.setdefault(endpoint, {})[subnet] = None
        self._probe(pair)
        self._look(pair)

    def _new_pair(
        self, found: SubnetPaths, meters: tuple[Meter | None, ...], former: Pair | None
    ) -> Pair:
        now = time.monotonic()
        measured = [None if path is None else Measured(None, now) for path in found.paths]
        at = max(at for at, path in enumerate(found.paths) if path is not None)
        choice = Choice(at, now) if former is None else former.choice
        if former is not None:
            report = former.report
            report.key = found.key
        else:
            report = PairReport(found.key, found.subnet, self._backends[at].name)
        endpoints = [
            str(endpoint) for backend, path, meter in zip(
                self._backends, found.paths, meters, strict=True)
            if path is not None and meter is None
            and (endpoint := backend.forwarder_endpoint(path)) is not None
        ]
        return Pair(found, meters, measured, choice, report, endpoints=endpoints)

    def _meter(self, backend: Backend[Any], path: Any, found: SubnetPaths) -> Meter | None:
        """Return the meter that probes this path; None: the forwarder does."""
        version = found.subnet.version
        if found.answers_probes:
            if (device := backend.probe_device(path)) is not None:
                return self._bound_meter(backend.name, version, device)
            if backend.forwarder_endpoint(path) is not None:
                self._forwarder = self._forwarder or ForwarderView(
                    self._control, self._forwarder_changed)
                return None
        return self._echo.setdefault(version, EchoMeter(version, self._measured))

    def _bound_meter(self, name: str, version: int, device: ProbeDevice) -> BoundMeter:
        meter = self._bound.get((name, version))
        if meter is None:
            meter = self._bound[name, version] = BoundMeter(device, self._port, self._measured)
        meter.move(device, self._port)
        return meter

    def _probe(self, pair: Pair) -> None:
        """Tell the meters of this pair what to probe."""
        advert = pair.found.advert
        mtu = self._mtu if advert is None or advert.mtu is None else min(self._mtu, advert.mtu)
        for at, meter in enumerate(pair.meters):
            if isinstance(meter, BoundMeter):
                assert advert is not None
                left = LEFT_SECONDS if at != pair.choice.at else None
                meter.add(pair.subnet, advert.port, mtu, left)
            elif isinstance(meter, EchoMeter):
                meter.add(pair.subnet, mtu)

    def _remove(self, subnet: IPNetwork) -> None:
        pair = self._pairs.pop(subnet, None)
        if pair is None:
            return
        for meter in pair.meters:
            if meter is not None:
                meter.remove(subnet)
        self._drop(pair)
        self._report.pairs.pop(subnet, None)
        if pair.choice.at != _preferred(pair):
            self._want(subnet, None)  # the next peer with this subnet begins anew

    def _drop(self, pair: Pair | None) -> None:
        """Release what belongs to this object, but not the state of its meters."""
        if pair is None:
            return
        if pair.timer is not None:
            pair.timer.cancel()
        for endpoint in pair.endpoints:
            of_endpoint = self._by_endpoint.get(endpoint, {})
            of_endpoint.pop(pair.subnet, None)
            if not of_endpoint:
                self._by_endpoint.pop(endpoint, None)

    # -- what was measured ------------------------------------------------------------------------

    def _measured(self, subnets: Iterable[IPNetwork]) -> None:
        for subnet in subnets:
            if (pair := self._pairs.get(subnet)) is not None:
                self._look(pair)

    def _forwarder_changed(self, endpoints: Collection[str] | None) -> None:
        for endpoint in [*self._by_endpoint] if endpoints is None else endpoints:
            self._measured([*self._by_endpoint.get(endpoint, ())])

    def _look(self, pair: Pair) -> None:
        """Read the health of each path again, and act on it."""
        now = time.monotonic()
        got_worse = False
        for at, old in enumerate(pair.measured):
            if old is None:
                continue
            health, why = self._health(pair, at, now)
            if health is not old.health:
                pair.measured[at] = Measured(health, now, why)
                got_worse |= at == pair.choice.at and health is not None and health < Health.GOOD
            elif why != old.why:
                pair.measured[at] = Measured(health, old.since, why)
        self._say(pair)
        if got_worse and self._chooses(pair) and (other := self._asked_path(pair)) is not None:
            pair.asking = True
            task = asyncio.get_running_loop().create_task(self._ask(pair, *other))
            self._asks.add(task)
            task.add_done_callback(self._asks.discard)
        else:
            self._decide(pair)

    def _health(self, pair: Pair, at: int, now: float) -> tuple[Health | None, str]:
        meter = pair.meters[at]
        if meter is not None:
            if meter is self._echo.get(pair.subnet.version) and at != pair.choice.at:
                return None, ""  # an echo measures only the path that carries the packets
            return _of_state(meter.prober.get(pair.subnet), now)
        if self._forwarder is None or self._forwarder.gone:
            return Health.LOST, "the forwarder does not answer"
        path = pair.found.paths[at]
        probe = self._forwarder.probes.get(str(self._backends[at].forwarder_endpoint(path)))
        return _of_probe(probe)

    def _full_size(self, pair: Pair) -> int:
        advert = pair.found.advert
        return self._mtu if advert is None or advert.mtu is None else min(self._mtu, advert.mtu)

    # -- asking the forwarder ---------------------------------------------------------------------

    def _asked_path(self, pair: Pair) -> tuple[int, str] | None:
        """Return a path that the forwarder can probe now, other than the carrying one."""
        if pair.asking or self._forwarder is None:
            return None
        for at, path in enumerate(pair.found.paths):
            if at != pair.choice.at and path is not None and pair.meters[at] is None:
                endpoint = self._backends[at].forwarder_endpoint(path)
                return at, str(endpoint)
        return None

    async def _ask(self, pair: Pair, at: int, endpoint: str) -> None:
        """Let the forwarder probe its path: its last probe of an idle pair may be long ago."""
        assert self._forwarder is not None
        try:
            answered = await self._forwarder.ask(endpoint, self._full_size(pair))
            health: Health | None = Health.GOOD if answered else None
            if answered is False:
                answered = await self._forwarder.ask(endpoint)
                health = Health.SMALL if answered else Health.LOST
        finally:
            pair.asking = False
        if self._pairs.get(pair.subnet) is pair:
            if health is not None:
                pair.measured[at] = Measured(health, time.monotonic(), "asked now")
            self._decide(pair)

    # -- choosing ---------------------------------------------------------------------------------

    def _chooses(self, pair: Pair) -> bool:
        measured = [meter for meter, path in zip(pair.meters, pair.found.paths, strict=True)
                    if path is not None]
        return len(measured) > 1 and not any(isinstance(one, EchoMeter) for one in measured)

    def _decide(self, pair: Pair) -> None:
        if pair.timer is not None:
            pair.timer.cancel()
            pair.timer = None
        if pair.asking:
            return
        now = time.monotonic()
        if not self._chooses(pair):
            at = _preferred(pair)
            choice = pair.choice if pair.choice.at == at else Choice(at, now)
        else:
            choice = decide(pair.choice, pair.measured, now)
        if choice is not pair.choice:
            moved, pair.choice = choice.at != pair.choice.at, choice
            if moved:
                self._want(pair.subnet, self._backends[choice.at].name
                           if choice.at != _preferred(pair) else None)
                self._probe(pair)
        if self._chooses(pair) and (at_time := due(pair.choice, pair.measured)) is not None:
            pair.timer = asyncio.get_running_loop().call_later(
                max(at_time - now, 0.0), self._decide, pair)

    def _want(self, subnet: IPNetwork, carrier: str | None) -> None:
        self._wanted[subnet] = carrier
        self._wake.set()

    async def _apply(self) -> None:
        """Apply the choices that were made since the last call, and report them."""
        wanted, self._wanted = self._wanted, {}
        try:
            await self._carry(wanted)
        except DeviceError as exc:
            log.error("changing the path of %d peers: %s", len(wanted), exc)
            self._wanted = wanted | self._wanted
            await asyncio.sleep(RETRY_SECONDS)
            self._wake.set()
            return
        for subnet in wanted:
            if (pair := self._pairs.get(subnet)) is not None:
                self._applied(pair)

    def _applied(self, pair: Pair) -> None:
        report, choice = pair.report, pair.choice
        now_by = self._backends[choice.at].name
        if report.path == now_by:
            return
        left = BACKENDS[report.path]
        report.path, report.since = now_by, time.time()
        report.why = f"{left}: {choice.why}" if choice.why else ""
        reason = report.why or f"{BACKENDS[now_by]} has answered for {choice.hold:.0f} s"
        self._log(logging.WARNING if choice.why else logging.INFO,
                  f"{report.key}: {pair.subnet} goes by {BACKENDS[now_by]} now: {reason}")
        self._report.path_changes_n[now_by] += 1
        self._report.event("path_changed", peer=report.key, subnet=str(pair.subnet), path=now_by,
                           reason=reason)
        self._say(pair)

    # -- reporting --------------------------------------------------------------------------------

    def _say(self, pair: Pair) -> None:
        """Update the report of this pair: the state of the path that carries the packets."""
        report = pair.report
        at = self._position(report.path)
        measured = pair.measured[at] if at is not None else None
        health = None if measured is None else measured.health
        report.trouble = "" if measured is None or not measured.why else \
            f"{BACKENDS[report.path]}: {measured.why}"
        before, report.state = report.state, STATES[health]
        if before == report.state:
            return
        report.changed = time.time()
        if health is not None and (health is not Health.GOOD or before in TROUBLES):
            level = logging.INFO if health is Health.GOOD else logging.WARNING
            text = f": {report.trouble}" if report.trouble else ""
            self._log(level, f"{report.key}: {pair.subnet} is {report.state}{text}")
            self._report.event(f"peer_{report.state}", peer=report.key, subnet=str(pair.subnet),
                               path=report.path, reason=report.trouble)

    def _position(self, name: str) -> int | None:
        return next((at for at, one in enumerate(self._backends) if one.name == name), None)

    def _describe(self, subnet: IPNetwork) -> dict[str, Any]:
        pair = self._pairs.get(subnet)
        return {} if pair is None else {
            backend.name: self._path_json(pair, at) for at, backend in enumerate(self._backends)
            if pair.measured[at] is not None}

    def _path_json(self, pair: Pair, at: int) -> dict[str, Any]:
        """Return what is known about one path, for the status."""
        measured, meter = pair.measured[at], pair.meters[at]
        health = None if measured is None else measured.health
        found: dict[str, Any] = {
            "state": STATES[health], "reason": "" if measured is None else measured.why}
        if meter is not None:
            state = meter.prober.get(pair.subnet)
            return found if state is None else _state_json(state) | found
        endpoint = str(self._backends[at].forwarder_endpoint(pair.found.paths[at]))
        probes = {} if self._forwarder is None else self._forwarder.probes
        return {"endpoint": endpoint} | probes.get(endpoint, {}) | found

    def _log(self, level: int, line: str) -> None:
        self._logged.append((level, line))

    def _flush_log(self) -> None:
        lines, self._logged = self._logged, []
        for level, line in lines[:MAX_LOGGED]:
            log.log(level, "%s", line)
        if len(lines) > MAX_LOGGED:
            log.warning("%d more changes of paths: see `udptun status`", len(lines) - MAX_LOGGED)

    # -- background work --------------------------------------------------------------------------

    async def run(self) -> None:
        """Measure and choose until cancelled."""
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._keep_choices())
                tasks.create_task(self._keep_meters())
                tasks.create_task(self._keep_traffic())
                tasks.create_task(self._keep_forwarder())
        finally:
            for meter in (*self._bound.values(), *self._echo.values()):
                meter.close()
            if self._forwarder is not None:
                self._forwarder.close()

    async def _keep_choices(self) -> None:
        while True:
            await wait_at_most(self._wake, TICK_SECONDS)
            self._wake.clear()
            if self._wanted:
                await self._apply()
            self._flush_log()

    async def _keep_meters(self) -> None:
        while True:
            for (name, version), meter in self._bound.items():
                pair = next((pair for pair in self._pairs.values()
                             if meter in pair.meters and pair.subnet.version == version), None)
                if pair is not None:
                    at = pair.meters.index(meter)
                    device = self._all[name].probe_device(pair.found.paths[at])
                    if device is not None:
                        meter.move(device, self._port)
            for one in (*self._bound.values(), *self._echo.values()):
                one.check()
            self._report.measure_errors = tuple(
                {one.error: None for one in (*self._bound.values(), *self._echo.values())
                 if one.error})
            await asyncio.sleep(TICK_SECONDS)

    async def _keep_traffic(self) -> None:
        """Find the pairs with traffic: the kernel knows when it last sent to each peer."""
        while True:
            await asyncio.sleep(max(TICK_SECONDS, len(self._pairs) / SEND_AGES_PEERS))
            for at, backend in enumerate(self._backends):
                try:
                    ages = await backend.send_ages()
                except DeviceError as exc:
                    log.debug("%s", exc)
                    continue
                self._note_traffic(at, ages, time.monotonic())

    def _note_traffic(self, at: int, ages: Mapping[IPNetwork, float], now: float) -> None:
        busy: dict[Meter, list[IPNetwork]] = {}
        for subnet, age in ages.items():
            pair = self._pairs.get(subnet)
            meter = pair.meters[at] if pair is not None and at < len(pair.meters) else None
            # Our own probes count for the kernel too.
            if meter is not None and \
                    now - age > meter.sent_at.get(subnet, 0.0) + AGE_SLACK_SECONDS:
                busy.setdefault(meter, []).append(subnet)
        for meter, subnets in busy.items():
            meter.traffic(subnets)

    async def _keep_forwarder(self) -> None:
        while True:
            await asyncio.sleep(max(REFRESH_SECONDS, len(self._pairs) / 100))
            if self._forwarder is not None:
                await self._forwarder.refresh()


def _preferred(pair: Pair) -> int:
    return max(at for at, path in enumerate(pair.found.paths) if path is not None)


def _of_state(state: PathState | None, now: float) -> tuple[Health | None, str]:
    if state is None or state.state not in (REACHABLE, UNREACHABLE):
        return None, ""
    if state.state == UNREACHABLE:
        return Health.LOST, state.reason(now)
    if state.sizes.full_passes is False:
        return Health.SMALL, f"packets over {state.sizes.largest} bytes do not pass"
    return Health.GOOD, ""


def _of_probe(probe: Mapping[str, Any] | None) -> tuple[Health | None, str]:
    """Return the health of a path that the forwarder measures."""
    state = None if probe is None else probe.get("state")
    if probe is None or state not in (REACHABLE, UNREACHABLE):
        return None, ""
    if state == UNREACHABLE:
        return Health.LOST, str(probe.get("reason") or "no probe is answered")
    if probe.get("full_size_passes") is False:
        return Health.SMALL, f"packets over {probe.get('largest_size')} bytes do not pass"
    return Health.GOOD, ""


def _state_json(state: PathState) -> dict[str, Any]:
    now, wall = time.monotonic(), time.time()

    def at(moment: float | None) -> float | None:
        return None if moment is None else round(wall - now + moment, 3)

    return {
        "since": at(state.since), "loss": state.loss, "last_answer": at(state.last_answer),
        "rtt_us": None if state.rtt is None else round(state.rtt * 1e6),
        "largest_size": state.sizes.largest,
    }
