"""What the forwarder has measured on its paths, by endpoint.

Owns the connection to the forwarder's events, a copy of the forwarder's measurements, and a copy of
the last errors of the peers that the forwarder does not measure. After each connect the whole state
is read; then each event updates the copy. ``ask`` makes the forwarder probe one peer now;
``set_standby`` makes it probe some peers less often. The control client is synchronous: one thread
follows the events, and a small pool makes the calls. All other methods and the callback run on the
daemon's loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import struct
import sys
import threading
import time
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple, Self

from ...control.client import ControlClient
from ...errors import ControlError, NoForwarder
from ...probe.state import REACHABLE, UNREACHABLE
from ..malloc import return_free_memory
from ..status.report import iso_time

log = logging.getLogger(__name__)

CALL_SECONDS = 5.0
RECONNECT_SECONDS = 0.5
THREADS_N = 4  # calls of ``ask`` at a time
# The forwarder counts as gone after this time. A forwarder that is restarted answers sooner.
GONE_SECONDS = 3.0

# The forwarder's events about measurements, and the new state; None: the state does not change.
EVENTS = {"peer_reachable": REACHABLE, "peer_unreachable": UNREACHABLE, "peer_size": None}
# The members of a peer's measurement that are kept.
FIELDS = ("state", "since", "reason", "rtt_us", "loss", "last_answer", "largest_size",
          "full_size_passes")
# The numbers among these members: since, last answer, loss, rtt_us, largest_size, full_size_passes.
# NaN or a negative number: not known.
NUMBERS = struct.Struct("=dddqib")


class LastError(NamedTuple):
    """What the underlay reported about a datagram, and when (monotonic clock)."""

    text: str
    at: float


class ForwarderView:
    """A copy of the forwarder's measured state.

    gone     no forwarder has answered for GONE_SECONDS
    read_at  when the whole state was read last (monotonic clock); 0: never
    changed  is called with the endpoints whose state may have changed; None: all
    """

    def __init__(
        self, control: Path, changed: Callable[[Collection[str] | None], None]
    ) -> None:
        self._probes: dict[str, _Known] = {}  # by endpoint; empty while no forwarder answers
        self._errors: dict[str, LastError] = {}
        self.gone = False
        self.read_at = 0.0
        self._standby: frozenset[str] = frozenset()
        self._control = str(control)
        self._changed = changed
        self._loop = asyncio.get_running_loop()
        self._calls = ThreadPoolExecutor(THREADS_N, "forwarder-probe")
        self._stopping = threading.Event()
        self._stream: ControlClient | None = None
        self._gone_timer: asyncio.TimerHandle | None = None
        self._thread = threading.Thread(
            target=self._follow, name="forwarder-events", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._stopping.set()
        if self._stream is not None:
            self._stream.interrupt()
        if self._gone_timer is not None:
            self._gone_timer.cancel()
        self._calls.shutdown(wait=False, cancel_futures=True)

    def probe(self, endpoint: str | None) -> dict[str, Any]:
        """Return what was measured on the path to this endpoint; {} if nothing is known."""
        found = self._probes.get(endpoint or "")
        return {} if found is None else found.to_json()

    def figures(self, endpoint: str | None) -> tuple[float | None, float | None]:
        """Return the round trip of this peer in seconds, and its loss; None: not known."""
        found = self._probes.get(endpoint or "")
        if found is None:
            return None, None
        _, _, loss, rtt, *_ = NUMBERS.unpack(found.numbers)
        return None if rtt < 0 else rtt / 1e6, None if math.isnan(loss) else loss

    def error(self, endpoint: str, since: float) -> str:
        """Return the last error of a peer that the forwarder does not measure; "" if there was none
        since this time of the monotonic clock."""
        found = self._errors.get(endpoint)
        return found.text if found is not None and found.at > since else ""

    async def ask(self, endpoint: str, size: int | None = None) -> bool | None:
        """Probe this peer now. Return whether it answers; None: the forwarder cannot say."""
        def call() -> bool | None:
            try:
                with ControlClient(self._control, CALL_SECONDS) as client:
                    return bool(client.probe(endpoint, size)["answered"])
            except (NoForwarder, ControlError) as exc:
                log.debug("probing %s: %s", endpoint, exc)
                return None

        return await self._loop.run_in_executor(self._calls, call)

    async def set_standby(self, endpoints: frozenset[str]) -> None:
        """Set the peers to which other paths carry the packets."""
        former, self._standby = self._standby, endpoints

        def call() -> None:
            with ControlClient(self._control, CALL_SECONDS) as client:
                client.set_standby(former - endpoints, False)
                client.set_standby(endpoints - former, True)

        with contextlib.suppress(NoForwarder, ControlError):  # ``repeat_standby`` follows
            await self._loop.run_in_executor(self._calls, call)

    def _send_standby(self, client: ControlClient) -> None:
        with contextlib.suppress(ControlError):  # a forwarder of an older version
            client.set_standby(self._standby, True)

    async def repeat_standby(self) -> None:
        """Send the standby peers again: the forwarder ignores a peer that it does not probe yet."""
        def call() -> None:
            with ControlClient(self._control, CALL_SECONDS) as client:
                self._send_standby(client)

        if self._standby:
            with contextlib.suppress(NoForwarder, ControlError):
                await self._loop.run_in_executor(self._calls, call)

    async def refresh(self) -> None:
        """Read the whole state again."""
        def call() -> _State:
            with ControlClient(self._control, CALL_SECONDS) as client:
                return _read(client)

        with contextlib.suppress(NoForwarder, ControlError):
            self._replace(*await self._loop.run_in_executor(self._calls, call))

    # -- the thread -------------------------------------------------------------------------------

    def _follow(self) -> None:
        while not self._stopping.is_set():
            try:
                with ControlClient(self._control, CALL_SECONDS) as stream, \
                        ControlClient(self._control, CALL_SECONDS) as client:
                    self._stream = stream
                    events = stream.events()
                    next(events)  # "hello": from here on, no event is missed
                    self._send_standby(client)
                    self._post(self._replace, *_read(client))
                    for event in events:
                        self._post(self._event, event)
            except (NoForwarder, ControlError, StopIteration) as exc:
                log.debug("the forwarder's events: %s", exc)
            self._stream = None
            self._post(self._disconnected)
            self._stopping.wait(RECONNECT_SECONDS)

    def _post(self, call: Callable[..., None], *args: Any) -> None:
        if not self._stopping.is_set():
            with contextlib.suppress(RuntimeError):  # the loop is already closed
                self._loop.call_soon_threadsafe(call, *args)

    # -- on the loop ------------------------------------------------------------------------------

    def _replace(
        self, probes: dict[str, _Known], errors: dict[str, LastError]
    ) -> None:
        self.read_at = time.monotonic()
        former, self._probes = self._probes, probes
        former_errors, self._errors = self._errors, errors
        changed = None
        if former and not self.gone:
            changed = [endpoint for endpoint in former.keys() | probes.keys()
                       if _verdict(former.get(endpoint)) != _verdict(probes.get(endpoint))]
            changed += former_errors.keys() | errors.keys()
        self.gone = False
        if self._gone_timer is not None:
            self._gone_timer.cancel()
            self._gone_timer = None
        self._changed(changed)

    def _event(self, event: Mapping[str, Any]) -> None:
        if event["type"] not in EVENTS:
            return
        endpoint = event["endpoint"]
        known = self.probe(endpoint) | {name: event[name] for name in FIELDS if name in event}
        if (state := EVENTS[event["type"]]) is not None:
            known |= {"state": state, "since": event["time"]}
        self._probes[sys.intern(endpoint)] = _Known.of(known)
        self._changed((endpoint,))

    def _disconnected(self) -> None:
        if self._gone_timer is None:
            self._probes, self._errors = {}, {}
            self._gone_timer = self._loop.call_later(GONE_SECONDS, self._is_gone)
            self._changed(None)

    def _is_gone(self) -> None:
        self.gone = True
        self._changed(None)


class _Known(NamedTuple):
    """What is known of one peer. The numbers are packed: there can be thousands of peers."""

    state: str
    reason: str
    numbers: bytes

    @classmethod
    def of(cls, probe: Mapping[str, Any]) -> Self:
        def number(name: str, unknown: float = -1) -> Any:
            value = probe.get(name)
            return unknown if value is None else value

        return cls(sys.intern(str(probe.get("state"))), str(probe.get("reason") or ""),
                   NUMBERS.pack(_seconds(probe.get("since")), _seconds(probe.get("last_answer")),
                                number("loss", math.nan), number("rtt_us"), number("largest_size"),
                                number("full_size_passes")))

    def to_json(self) -> dict[str, Any]:
        since, answer, loss, rtt, largest, passes = NUMBERS.unpack(self.numbers)
        return dict(zip(FIELDS, (
            self.state, _iso(since), self.reason, None if rtt < 0 else rtt,
            None if math.isnan(loss) else loss, _iso(answer), None if largest < 0 else largest,
            None if passes < 0 else bool(passes)), strict=True))


def _seconds(iso: str | None) -> float:
    """Return the Unix time, or NaN."""
    return math.nan if iso is None else datetime.fromisoformat(iso).timestamp()


def _iso(seconds: float) -> str | None:
    return None if math.isnan(seconds) else iso_time(seconds)


_State = tuple[dict[str, _Known], dict[str, LastError]]


def _read(client: ControlClient) -> _State:
    """Return by endpoint what is measured, and the last errors of all other peers."""
    probes: dict[str, _Known] = {}
    errors: dict[str, LastError] = {}
    now = time.monotonic()

    def reduce(value: dict[str, Any]) -> Any:
        """Keep little of each object: the whole answer would take much memory."""
        if "full_size_passes" in value:
            return _Known.of(value)
        if "seconds_ago" in value:
            return LastError(value["text"], now - value["seconds_ago"])
        if "endpoint" in value:
            probe, error = value.get("probe"), value.get("last_error")
            if probe:
                probes[sys.intern(value["endpoint"])] = probe
            elif error:
                errors[value["endpoint"]] = error
            return None
        return value

    client.peers(reduce)
    return_free_memory()  # the text of the answer is large
    return probes, errors


def _verdict(found: _Known | None) -> tuple[Any, ...] | None:
    """Return the values on which a decision depends."""
    return None if found is None else (
        found.state, found.reason, *NUMBERS.unpack(found.numbers)[-2:])
