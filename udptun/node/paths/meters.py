"""All meters of one node. A meter measures the paths of one device, or with one protocol.

Owns: the sockets of this daemon (one per device that can be probed, one per IP version for echoes),
the view of what the forwarder has measured, and the search for pairs with traffic. Does not choose
between paths. Runs on the daemon's loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...errors import DeviceError
from ...model import OVERHEAD, IPNetwork
from ...probe.state import REACHABLE, PathState
from ..backends.base import Backend
from ..backends.plan import SubnetPaths
from .bound import BoundMeter
from .choice import Health
from .echo import EchoMeter
from .forwarder import ForwarderView
from .listen import Listener
from .meter import Meter
from .pair import Pair, health_of_report, health_of_state, state_json

log = logging.getLogger(__name__)

TICK_SECONDS = 1.0
# A path that was left is probed at least this often, so that it can carry again soon. Once it
# answers, it is probed like one with traffic, because the largest size has to be measured again.
LEFT_SECONDS = 5.0
LEFT_N = 100  # pairs per tick for which this is done; more take turns
SEND_AGES_PEERS = 1000  # the times of the last packets are read every (peers / this) seconds
AGE_SLACK_SECONDS = 0.1  # rounding of these times, and the time of the call
# Between two turns of ``keep_forwarder``: (peers / REFRESH_PEERS) seconds, but at least
# REFRESH_SECONDS.
REFRESH_SECONDS = 15.0
REFRESH_PEERS = 20
# Between two reads of the forwarder's whole state: (peers / READ_PEERS) seconds. Verdicts come at
# once, as events. A read is for the round trips, losses and times in the status. So it also takes
# place when the status is asked for, if the last one is older than FRESH_SECONDS.
READ_PEERS = 5
FRESH_SECONDS = 5.0
READ_WAIT_SECONDS = 2.0  # the status does not wait longer for the forwarder


class Meters:
    """The meters, and the state that they have measured.

    changed  is called with the subnets whose state may have changed
    """

    def __init__(
        self, control: Path, changed: Callable[[Iterable[IPNetwork]], None]
    ) -> None:
        self._control = control
        self._changed = changed
        self._port = 0
        self._bound: dict[tuple[str, int], BoundMeter] = {}  # by backend and IP version
        self._echo: dict[int, EchoMeter] = {}  # by IP version
        self._listeners: dict[tuple[int, str], Listener] = {}  # by IP version and device
        self._forwarder: ForwarderView | None = None
        self._by_endpoint: dict[str, tuple[IPNetwork, ...]] = {}
        self._standby_changed = False
        self._tuples: dict[tuple[Meter | None, ...], tuple[Meter | None, ...]] = {}
        self._echoed: set[IPNetwork] = set()  # they answer echoes, but not the forwarder's probes
        self._turn = 0
        self._looked_at: dict[int, float] = {}  # by path: when the last search for traffic began

    # -- which meter measures a path --------------------------------------------------------------

    def use_port(self, port: int) -> None:
        """Set the UDP port that our lease advertises."""
        self._port = port

    def of(self, found: SubnetPaths, backends: Sequence[Backend[Any]]) -> tuple[
        tuple[Meter | None, ...], tuple[str | None, ...]
    ]:
        """Return the meter of each path, and the endpoint of each that the forwarder measures."""
        meters: list[Meter | None] = []
        endpoints: list[str | None] = []
        for backend, path in zip(backends, found.paths, strict=True):
            meter, endpoint = (None, None) if path is None else self._of_path(backend, path, found)
            meters.append(meter)
            endpoints.append(endpoint)
        found_meters = tuple(meters)  # most pairs share one tuple
        return self._tuples.setdefault(found_meters, found_meters), tuple(endpoints)

    def _of_path(
        self, backend: Backend[Any], path: Any, found: SubnetPaths
    ) -> tuple[Meter | None, str | None]:
        version = found.subnet.version
        if found.answers_probes:
            if (device := backend.probe_device(path)) is not None:
                key = backend.name, version
                if key not in self._bound:
                    self._bound[key] = BoundMeter(device, self._port, self._changed)
                self._bound[key].move(device, self._port)
                return self._bound[key], None
            if (endpoint := backend.forwarder_endpoint(path)) is not None:
                self._follow_forwarder()
                return None, sys.intern(str(endpoint))
        return self._echo_meter(version), None

    def _echo_meter(self, version: int) -> EchoMeter:
        if version not in self._echo:
            self._echo[version] = EchoMeter(version, self._changed)
        return self._echo[version]

    def _follow_forwarder(self) -> None:
        if self._forwarder is None:
            self._forwarder = ForwarderView(self._control, self._forwarder_changed)

    def errors_of(self, found: SubnetPaths, backends: Sequence[Backend[Any]]) -> str | None:
        """Return the endpoint whose errors the forwarder reports, for a peer that gets echoes."""
        if found.answers_probes:
            return None
        for backend, path in zip(backends, found.paths, strict=True):
            if path is not None and (endpoint := backend.forwarder_endpoint(path)) is not None:
                self._follow_forwarder()
                return sys.intern(str(endpoint))
        return None

    def probe(self, pair: Pair) -> None:
        """Measure the paths of this pair from now on. Keep the earlier measurements."""
        for at, meter in enumerate(pair.meters):
            if isinstance(meter, BoundMeter):
                assert pair.found.advert is not None
                left = LEFT_SECONDS if at != pair.choice.at else None
                meter.add(pair.subnet, pair.found.advert.port, pair.device_mtu, left)
            elif isinstance(meter, EchoMeter):
                meter.add(pair.subnet, pair.mtu)
        self._standby_changed |= any(pair.endpoints)
        for endpoint in filter(None, (*pair.endpoints, pair.errors_of)):
            subnets = self._by_endpoint.get(endpoint, ())
            if pair.subnet not in subnets:
                self._by_endpoint[endpoint] = (*subnets, pair.subnet)

    def forget(self, pair: Pair) -> None:
        """Stop measuring the paths of this pair."""
        for meter in (*pair.meters, self._echo.get(pair.subnet.version)):
            if meter is not None:
                meter.remove(pair.subnet)
        self._echoed.discard(pair.subnet)
        for endpoint in filter(None, (*pair.endpoints, pair.errors_of)):
            subnets = self._by_endpoint.pop(endpoint, ())
            if (left := tuple(one for one in subnets if one != pair.subnet)):
                self._by_endpoint[endpoint] = left

    # -- what was measured ------------------------------------------------------------------------

    def health(self, pair: Pair, at: int) -> tuple[Health | None, str]:
        """Return the health of one path, and the reason if it is not GOOD."""
        meter, endpoint = pair.meters[at], pair.endpoints[at]
        if meter is not None:
            if not meter.able or (meter.follows_route and at != pair.choice.at):
                return None, ""
            overhead = OVERHEAD[pair.subnet.version]
            state = meter.state(pair.subnet)
            health, why = health_of_state(state, overhead, time.monotonic())
            if health is Health.LOST and state is not None and (error := self._error(pair, state)):
                why += f"; {error}"
            return health, why
        if self._forwarder is None or self._forwarder.gone:
            return Health.LOST, "the forwarder does not answer"
        health, why = health_of_report(self._forwarder.probe(endpoint))
        if sum(path is not None for path in pair.found.paths) == 1:
            return self._or_echoed(pair, health, why)
        return health, why  # an echo would take the path that carries the packets

    def _or_echoed(
        self, pair: Pair, health: Health | None, why: str
    ) -> tuple[Health | None, str]:
        """Return the health that echoes show if no probe is answered.

        The node may run something else than the hosts file says. Its packets do not show that it is
        reachable, because they prove only one direction.
        """
        if health is not Health.LOST:
            if health is not None:
                if (meter := self._echo.get(pair.subnet.version)) is not None:
                    meter.remove(pair.subnet)
                self._echoed.discard(pair.subnet)
            return health, why
        meter = self._echo_meter(pair.subnet.version)
        if (state := meter.state(pair.subnet)) is None:
            meter.add(pair.subnet, pair.mtu, data_proves=False)
        if not meter.able:  # its state is from a time when it could measure
            return health, why
        echoed, limit = health_of_state(state, OVERHEAD[pair.subnet.version], time.monotonic())
        if not echoed:  # not measured yet, or LOST
            return health, why
        if pair.subnet not in self._echoed:
            self._echoed.add(pair.subnet)
            log.warning("%s: %s answers echoes, but no probes: see `probe` in the documentation of "
                        "the hosts file", pair.found.key, pair.subnet)
        return echoed, limit

    def _error(self, pair: Pair, state: PathState) -> str:
        """Return what the underlay reported about a peer since its last answer."""
        if self._forwarder is None or pair.errors_of is None:
            return ""
        return self._forwarder.error(pair.errors_of, state.last_answer or 0.0)

    def describe(self, pair: Pair, at: int) -> dict[str, Any]:
        """Return the measurements of one path as JSON, without the verdict."""
        meter, endpoint = pair.meters[at], pair.endpoints[at]
        if meter is not None:
            state = meter.state(pair.subnet)
            return {} if state is None else state_json(state, OVERHEAD[pair.subnet.version])
        probe = {} if self._forwarder is None else self._forwarder.probe(endpoint)
        return {"endpoint": endpoint, **probe}

    def figures(self, pair: Pair, at: int) -> tuple[float | None, float | None]:
        """Return the round trip of one path in seconds, and its loss; None: not measured."""
        meter, endpoint = pair.meters[at], pair.endpoints[at]
        if meter is None:
            return (None, None) if self._forwarder is None else self._forwarder.figures(endpoint)
        if meter.follows_route and at != pair.choice.at:
            return None, None  # it measures the other path
        state = meter.state(pair.subnet)
        return (None, None) if state is None else (state.rtt, state.loss)

    async def ask(self, endpoint: str, size: int) -> Health | None:
        """Let the forwarder probe its path now. Return what passes; None: it cannot say."""
        assert self._forwarder is not None
        answered = await self._forwarder.ask(endpoint, size)
        if answered is None:
            return None
        if answered:
            return Health.GOOD
        return Health.SMALL if await self._forwarder.ask(endpoint) else Health.LOST

    def errors(self) -> tuple[str, ...]:
        """Return the reasons why some peers cannot be measured."""
        meters = (*self._bound.values(), *self._echo.values())
        return tuple({meter.error: None for meter in meters if meter.error and len(meter.prober)})

    def _forwarder_changed(self, endpoints: Collection[str] | None) -> None:
        for endpoint in [*self._by_endpoint] if endpoints is None else endpoints:
            self._changed([*self._by_endpoint.get(endpoint, ())])

    # -- background work --------------------------------------------------------------------------

    def check(self, pairs: Mapping[IPNetwork, Pair], backends: Sequence[Backend[Any]]) -> None:
        """Open missing sockets again, and follow devices that were created again."""
        for at, backend in enumerate(backends):
            for version in (4, 6):
                bound = self._bound.get((backend.name, version))
                subnet = None if bound is None else next(iter(bound), None)
                pair = None if subnet is None else pairs.get(subnet)
                if bound is not None and pair is not None:
                    device = backend.probe_device(pair.found.paths[at])
                    if device is not None:
                        bound.move(device, self._port)
        for meter in (*self._bound.values(), *self._echo.values()):
            meter.check()
        for version, echo in self._echo.items():
            self._listen(version, echo, pairs, backends)

    def _listen(
        self, version: int, echo: EchoMeter, pairs: Mapping[IPNetwork, Pair],
        backends: Sequence[Backend[Any]],
    ) -> None:
        """Look for packets from the peers that do not answer echoes."""
        silent: dict[str, list[IPNetwork]] = {}  # by device
        for subnet in echo:
            pair = pairs.get(subnet)
            if pair is not None and echo in pair.meters and _is_silent(echo, subnet):
                for name in _arrival_devices(pair, backends):
                    silent.setdefault(name, []).append(subnet)
                    if (version, name) not in self._listeners:
                        self._listeners[version, name] = Listener(
                            version, name, echo.data_received)
        for (of_version, name), listener in self._listeners.items():
            if of_version == version:
                try:
                    listener.watch(silent.get(name, ()))
                except OSError as exc:
                    log.debug("listening on %s for packets of silent peers: %s", name, exc)

    async def follow_standby(self, pairs: Iterable[Pair]) -> None:
        """Tell the forwarder to which peers another path carries the packets."""
        if not self._standby_changed or self._forwarder is None:
            return
        self._standby_changed = False
        carrying: set[str] = set()
        standby: set[str] = set()
        for pair in pairs:
            for at, endpoint in enumerate(pair.endpoints):
                if endpoint is not None:
                    (carrying if at == pair.choice.at else standby).add(endpoint)
        await self._forwarder.set_standby(frozenset(standby - carrying))

    def follow_left(self, left: Sequence[Pair]) -> None:
        """Probe the preferred path of each of these pairs as often as a path with traffic, if it
        answers again. The pairs do not use their preferred paths at present."""
        self._turn = self._turn + LEFT_N if self._turn + LEFT_N < len(left) else 0
        for pair in left[self._turn : self._turn + LEFT_N]:
            meter, measured = pair.meters[pair.preferred], pair.measured[pair.preferred]
            if meter is not None and measured is not None and measured.health:
                meter.traffic([pair.subnet])

    async def follow_traffic(
        self, pairs: Mapping[IPNetwork, Pair], at: int, backend: Backend[Any]
    ) -> None:
        """Find the pairs with traffic: the kernel stores the time of the last packet to each peer.
        """
        began = time.monotonic()
        probes_n = {version: bound.sent_n for (name, version), bound in self._bound.items()
                    if name == backend.name}
        try:
            ages = await backend.send_ages(
                began - self._looked_at.get(at, 0.0) + AGE_SLACK_SECONDS, probes_n)
        except DeviceError as exc:
            log.debug("%s", exc)
            return
        self._looked_at[at] = began
        busy: dict[Meter, list[IPNetwork]] = {}
        for subnet, age in ages.items():
            pair = pairs.get(subnet)
            meter = None if pair is None or at >= len(pair.meters) else pair.meters[at]
            # The last packet may be our own probe, so its time is compared with that of our last
            # probe. The kernel read its clock after ``began``. So ``began - age`` is never too
            # late, also if the read is slow.
            if meter is not None and \
                    began - age > meter.sent_at(subnet) + AGE_SLACK_SECONDS:
                busy.setdefault(meter, []).append(subnet)
        for meter, subnets in busy.items():
            meter.traffic(subnets)

    async def keep_forwarder(self, pairs: Mapping[IPNetwork, Pair]) -> None:
        """Tell the forwarder regularly which paths are standby: it ignores a peer that it does not
        probe yet. Read its whole state more rarely, because its events report only verdicts."""
        while True:
            await asyncio.sleep(max(REFRESH_SECONDS, len(pairs) / REFRESH_PEERS))
            if self._forwarder is not None:
                await self._forwarder.repeat_standby()
                if time.monotonic() >= self._forwarder.read_at + len(pairs) / READ_PEERS:
                    await self._forwarder.refresh()

    async def freshen(self) -> None:
        """Read the forwarder's whole state if the last read is old."""
        forwarder = self._forwarder
        if forwarder is not None and time.monotonic() >= forwarder.read_at + FRESH_SECONDS:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(READ_WAIT_SECONDS):
                    await forwarder.refresh()

    def close(self) -> None:
        for meter in (*self._bound.values(), *self._echo.values()):
            meter.close()
        for listener in self._listeners.values():
            listener.close()
        if self._forwarder is not None:
            self._forwarder.close()


def _arrival_devices(pair: Pair, backends: Sequence[Backend[Any]]) -> set[str]:
    return {name for backend, path in zip(backends, pair.found.paths, strict=True)
            if path is not None for name in backend.arrival_devices(path)}


def _is_silent(echo: EchoMeter, subnet: IPNetwork) -> bool:
    """Return whether this peer does not answer echoes at present."""
    state = echo.state(subnet)
    assert state is not None
    if state.state != REACHABLE or state.last_answer is None:
        return state.loss is not None  # else no echo was sent yet
    return state.suspect or (state.last_data or 0.0) > state.last_answer
