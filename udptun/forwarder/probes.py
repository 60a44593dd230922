"""Probe the peers over UDP: send requests, take answers, report changes.

Owns the paths to the peers that have a route with ``probe``, and the reports about these paths.
Sets the path MTU of these peers in the core.
``udptun/probe`` decides whether a path works. The compiled core sends and receives the probes.
Threading: control loop only. Nothing here runs per packet. Per peer, code runs only for peers that
are probed, have traffic, or are new.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import os
import time
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from typing import Any

from .. import _core
from ..control.events import EventHub
from ..errors import FieldError
from ..model import (
    MAX_UDP_PAYLOAD,
    MIN_MTU,
    OVERHEAD,
    Endpoint,
    PeerError,
    ProbeRecord,
    parse_number,
)
from ..probe.message import HEADER_SIZE, NEVER_HEARD, REPLY, heard_field
from ..probe.prober import Prober, Request
from ..probe.state import REACHABLE, UNKNOWN, UNREACHABLE, PathState
from . import peer_errors
from .routes import Routes

log = logging.getLogger(__name__)

Key = tuple[bytes, int]  # packed address and port of a peer

BATCH_SECONDS = 0.1  # the shortest time between two ticks; each sends and takes a batch of probes
LOOK_SECONDS = 1.0  # time between two looks at the table and at the counters of the peers
ANSWER_SECONDS = 1.0  # time for which ``probe`` waits for an answer, if the caller sets no other
TIMEOUT_MAX = 10.0
# The longest time between two probes of a peer behind a NAT. A NAT deletes its entry after 30 s.
NAT_SECONDS = 20.0
LINK_MTU = 0xFFFF  # the core uses the MTU of the link if that is smaller
STATES = (REACHABLE, UNREACHABLE, UNKNOWN)


class Probes:
    """The probes of one forwarder. They are sent from ``start`` until ``close``.

    mtu  MTU of the TUN: no packet to a peer is larger
    read_express  gives the core what the express path has counted
    """

    def __init__(
        self, core: _core.Core, routes: Routes, mtu: int, events: EventHub,
        read_express: Callable[[], None] = lambda: None,
    ) -> None:
        self._read_express = read_express
        self._core = core
        self._routes = routes
        self._mtu = mtu
        self._events = events
        self._prober: Prober[Key] = Prober(time.monotonic)
        # The peers at each address. It is made when a peer behind a NAT answers.
        self._by_address: dict[bytes, tuple[Key, ...]] | None = None
        self._waiting: dict[int, asyncio.Future[float]] = {}  # extra probes, by token
        self._generation = 0  # generation of the table at the last look
        self._look_at = self._ticked_at = 0.0
        self._looked_at = time.monotonic()
        self._looks_at_traffic = True
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = 0.0
        self._counts = dict.fromkeys(("sent", "refused", "answered", "received"), 0)

    def start(self) -> None:
        self._arm()

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    # -- another process continues ----------------------------------------------------------------

    def measured(self) -> dict[str, dict[str, Any]]:
        """Return what is known about the paths, by endpoint."""
        return {
            str(Endpoint(ipaddress.ip_address(key[0]), key[1])): self._prober[key].measured()
            for key in self._prober
        }

    def inherit(self, paths: Mapping[str, Mapping[str, Any]], counts: Mapping[str, int]) -> None:
        """Continue with the results of ``measured`` and ``counters`` of an earlier process."""
        self._follow_table()
        now = time.monotonic()
        for text, had in paths.items():
            endpoint = Endpoint.parse(text)
            key = endpoint.address.packed, endpoint.port
            if (path := self._prober.get(key)) is not None:
                path.inherit(had, now)
                self._set_path_mtu(key)
        for name in self._counts:
            self._counts[name] += counts.get(name, 0)

    # -- from the workers -------------------------------------------------------------------------

    def take(self) -> None:
        """Take the probes that the workers have received, without waiting for the next tick."""
        for record in self._core.take_probes():
            self._take(record)
        self._report_changes()
        if self._timer is not None:
            self._arm()

    # -- path MTUs --------------------------------------------------------------------------------

    def answers(self, key: Key) -> bool:
        """Return whether the peer answers probes at present."""
        path = self._prober.get(key)
        return path is not None and path.state == REACHABLE

    def set_mtu(self, mtu: int) -> None:
        """The MTU of the TUN or of the underlay has changed."""
        self._mtu = mtu
        self._generation = -1  # so that the sizes of all peers are set again
        self._follow_table()
        if self._timer is not None:
            self._arm()

    def hint(self, key: Key, size: int) -> None:
        """Test the present size, because of a report that only packets up to ``size`` pass."""
        self._prober.hint(key, size)
        if self._timer is not None:
            self._arm()

    def has_measured(self, key: Key) -> bool:
        """Return whether probes have shown which size passes."""
        path = self._prober.get(key)
        return path is not None and path.sizes.full_passes is not None

    def _set_path_mtu(self, key: Key) -> None:
        """Set the path MTU that the probes have measured, or that of the link if they show no
        limit."""
        limit = self._prober[key].sizes.limit
        overhead = OVERHEAD[4 if len(key[0]) == 4 else 6]
        path_mtu = LINK_MTU if limit is None else max(limit, MIN_MTU) + overhead
        self._core.set_path_mtu(*key, path_mtu, 0)

    # -- the control API --------------------------------------------------------------------------

    async def probe(
        self, endpoint: Endpoint, size: int | None = None, timeout: float | None = None
    ) -> dict[str, Any]:
        """Send one probe now, and wait for its answer. docs/control.md describes the result.

        Raises FieldError if the peer is not probed, or for a wrong size or timeout.
        """
        self._follow_table()
        key = endpoint.address.packed, endpoint.port
        if key not in self._prober:
            raise FieldError("endpoint", str(endpoint), "a peer that has a route with `probe`")
        size = parse_number("size", HEADER_SIZE if size is None else size, HEADER_SIZE,
                            MAX_UDP_PAYLOAD)
        seconds = _timeout(timeout)
        request = self._prober.request(key, size)
        answer: dict[str, Any] = {"answered": False, "rtt_us": None, "size": size}
        arrival: asyncio.Future[float] = asyncio.get_running_loop().create_future()
        self._waiting[request.token] = arrival
        self._core.wake_on_probe(True)
        sent_at = time.monotonic()
        try:
            error = self._send(request)
            if error:
                return answer | self._heard(key) | {"error": os.strerror(error)}
            self._arm()
            async with asyncio.timeout(seconds):
                rtt = await arrival - sent_at
            return answer | self._heard(key) | {
                "answered": True, "rtt_us": max(round(rtt * 1e6), 0)}
        except TimeoutError:
            return answer | self._heard(key) | {"error": f"no answer within {seconds:g} s"}
        finally:
            del self._waiting[request.token]
            self._core.wake_on_probe(bool(self._waiting))

    def _heard(self, key: Key) -> dict[str, Any]:
        """Return when each direction to this peer last worked, and what fails at present."""
        path, now = self._prober.get(key), time.monotonic()
        if path is None:  # its route was removed in the meantime
            return {"heard_seconds": None, "peer_heard_seconds": None, "from_peer": None,
                    "to_peer": None}
        from_peer, to_peer = path.directions()
        return {"heard_seconds": _age(path.last_heard, now),
                "peer_heard_seconds": _age(path.peer_heard, now),
                "from_peer": from_peer, "to_peer": to_peer}

    def set_standby(self, endpoints: Iterable[Endpoint], standby: bool) -> None:
        """Probe the peers on standby paths less often. Peers that are not probed are ignored."""
        self._follow_table()
        for endpoint in endpoints:
            self._prober.set_standby((endpoint.address.packed, endpoint.port), standby)
        self._arm()

    def report(
        self, address: bytes, port: int, error: PeerError | None = None
    ) -> dict[str, Any] | None:
        """Return the state of the path to a peer; None if the peer is not probed.

        error  the last error of the peer; part of the reason if it is newer than the last answer
        """
        path = self._prober.get((address, port))
        if path is None:
            return None
        now = time.monotonic()
        reason = _reason(path, now)
        if path.state == UNREACHABLE and error and error.time_ns / 1e9 > (path.last_answer or 0.0):
            endpoint = Endpoint(ipaddress.ip_address(address), port)
            reason += f"; {peer_errors.describe(error, endpoint)}"
        return {
            "state": path.state,
            "since": _iso(path.since, now),
            "reason": reason,
            "rtt_us": _microseconds(path.rtt),
            "loss": None if path.loss is None else round(path.loss, 4),
            "last_answer": None if path.last_answer is None else _iso(path.last_answer, now),
            "largest_size": path.sizes.largest,
            "full_size_passes": path.sizes.full_passes,
        }

    def counters(self) -> dict[str, dict[str, int]]:
        """Return the number of probed peers in each state, and of probes of each kind."""
        return {
            "states": dict.fromkeys(STATES, 0) | self._prober.states(), "probes": dict(self._counts)
        }

    def figures(self) -> dict[Key, tuple[float | None, float | None]]:
        """Return the round trip in seconds and the loss of each probed peer."""
        return {key: ((path := self._prober[key]).rtt, path.loss) for key in self._prober}

    # -- the loop ---------------------------------------------------------------------------------

    def _tick(self) -> None:
        """Take the probes that have arrived, then send the probes that are due.

        Once a second, also look at the table and the counters.
        """
        self._ticked_at, self._timer = time.monotonic(), None
        try:
            if self._ticked_at >= self._look_at - BATCH_SECONDS:
                self._look_at = self._ticked_at + LOOK_SECONDS
                self._follow_table()
                self._follow_traffic()
            for record in self._core.take_probes():
                self._take(record)
            for request in self._prober.run():
                self._send(request)
            self._report_changes()
        finally:
            self._arm()  # probing must also continue after an error, which the loop logs

    def _arm(self) -> None:
        """Call ``_tick`` when a probe is due, but no sooner than BATCH_SECONDS after the last call.
        """
        due = self._prober.next_at()
        at = self._look_at if due is None else min(due, self._look_at)
        at = max(at, self._ticked_at + BATCH_SECONDS)
        if self._timer is not None:
            if self._timer_at <= at:
                return
            self._timer.cancel()
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(max(at - time.monotonic(), 0.0), self._tick)
        self._timer_at = at

    def _follow_table(self) -> None:
        """Probe exactly the peers that have a route with ``probe`` in the present table."""
        if self._generation == self._routes.generation:
            return
        self._generation = self._routes.generation
        limits = self._core.probe_peers(min(self._mtu, MAX_UDP_PAYLOAD))
        for key in [key for key in self._prober if key not in limits]:
            self._prober.remove(key)
            self._core.set_path_mtu(*key, LINK_MTU, 0)
        for key, limit in limits.items():
            path = self._prober.get(key)
            if path is None or path.sizes.full != limit:
                self._prober.add(key, limit)
                self._set_path_mtu(key)
        self._by_address = None

    def _follow_traffic(self) -> None:
        """Report the traffic since the last look. The packets may have arrived right after it. A
        later time could make packets from before a failure look like packets after it."""
        since, self._looked_at = self._looked_at, self._ticked_at
        looked, self._looks_at_traffic = self._looks_at_traffic, len(self._prober) > 0
        if not self._looks_at_traffic:  # nobody needs it
            return
        self._read_express()
        for address, port, received in self._core.take_traffic():
            if not looked:  # it may be older than the last look
                continue
            key = address, port
            self._prober.traffic(key)
            if received:
                self._prober.data_received(key, since)

    def _send(self, request: Request[Key]) -> int:
        """Send a probe. Return 0, or the errno if the kernel refused it."""
        (address, port), heard = request.key, request.last_heard
        error = self._core.send_probe(
            address, port, request.token, request.size, heard_field(heard, time.monotonic())
        )
        self._counts["sent"] += 1
        if error:
            self._counts["refused"] += 1
            self._prober.send_failed(request, error)
        return error

    def _take(self, record: ProbeRecord) -> None:
        key, at = self._peer_of(record), record.received_ns / 1e9
        if key is None:
            return
        if record.kind != REPLY:
            self._counts["received"] += 1
            never = record.heard_ms == NEVER_HEARD
            self._prober.heard(
                key, at, record.token, None if never else record.heard_ms / 1000)
        elif self._prober.answered(key, record.token, record.size, at):
            self._counts["answered"] += 1
            if record.size == self._prober[key].sizes.present:
                # Also if nothing changed: a report about the device may have lowered the path MTU.
                self._set_path_mtu(key)
            arrival = self._waiting.get(record.token)
            if arrival is not None and not arrival.done():
                arrival.set_result(at)

    def _peer_of(self, record: ProbeRecord) -> Key | None:
        """Return the probed peer that sent this probe.

        A peer behind a NAT can send from another port than that of its endpoint. The NAT deletes
        its entry for the peer if no packet passes for some time. A request from another port can
        be forged. So only a reply to a probe from us shows that there is a NAT.
        """
        key = record.address, record.port
        if key in self._prober:
            return key
        keys = self._at(record.address)
        if record.kind == REPLY:
            keys = tuple(one for one in keys if self._prober[one].waits_for(record.token))
        if len(keys) != 1:
            return None
        if record.kind == REPLY:
            full = self._prober[keys[0]].sizes.full
            self._prober.add(keys[0], full, max_interval=NAT_SECONDS)
        return keys[0]

    def _at(self, address: bytes) -> tuple[Key, ...]:
        """Return the peers at this address."""
        if self._by_address is None:
            self._by_address = {}
            for key in self._prober:
                self._by_address[key[0]] = (*self._by_address.get(key[0], ()), key)
        return self._by_address.get(address, ())

    # -- reporting --------------------------------------------------------------------------------

    def _report_changes(self) -> None:
        now = time.monotonic()
        for key, before in self._prober.take_changes().items():
            path = self._prober[key]
            self._set_path_mtu(key)
            endpoint = str(Endpoint(ipaddress.ip_address(key[0]), key[1]))
            change = "size" if path.state == before else path.state
            if change == UNREACHABLE:
                log.warning("%s is unreachable: %s", endpoint, _reason(path, now))
            elif change == REACHABLE and before == UNREACHABLE:
                log.info("%s is reachable again", endpoint)
            self._events.emit(
                f"peer_{change}", endpoint=endpoint, path="udp", reason=_reason(path, now),
                rtt_us=_microseconds(path.rtt), largest_size=path.sizes.largest,
                full_size_passes=path.sizes.full_passes,
            )


def _reason(path: PathState, now: float) -> str:
    reason = path.reason(now)
    if path.state == UNREACHABLE and path.never_probed:
        reason += ", perhaps because its route to this node has no `probe`"
    return reason


def _timeout(value: float | None) -> float:
    if value is None:
        return ANSWER_SECONDS
    if isinstance(value, bool) or not isinstance(value, int | float) or \
            not 0 < value <= TIMEOUT_MAX:
        raise FieldError("timeout", value, f"a number of seconds, over 0 and up to {TIMEOUT_MAX:g}")
    return value


def _age(at: float | None, now: float) -> float | None:
    return None if at is None else round(max(now - at, 0.0), 3)


def _microseconds(seconds: float | None) -> int | None:
    return None if seconds is None else round(seconds * 1e6)


def _iso(at: float, now: float) -> str:
    """Return the time of the wall clock at this time of the monotonic clock."""
    return datetime.fromtimestamp(time.time() - (now - at), UTC).isoformat(timespec="milliseconds")
