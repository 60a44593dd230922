"""The samples that the page shows.

Asks only if a client asks, and at most once in FRESH_SECONDS, for any number of clients. So a page
that nobody looks at costs nothing. Threading: the loop; the requests run in a thread.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from ...control.client import ControlClient
from ...control.protocol import NODE_SOCKET
from ...errors import NoForwarder, UdptunError
from ..events import event_text
from ..node_status import event_text as node_event_text
from ..samples import Change, Sample, take

ASK_SECONDS = 5.0  # the longest time to wait for an answer
FRESH_SECONDS = 1.0
STALE_SECONDS = 30.0  # rates since an older sample would say little about now
FIRST_SECONDS = 0.5  # between the first two samples
EVENTS_N = 30


class Event:
    """An event of the forwarder or of the node daemon. time: UTC, in seconds."""

    def __init__(self, time: str, kind: str, text: str) -> None:
        self.time, self.kind, self.text = time, kind, text


class View:
    """What the page shows.

    sample   None: nothing answered, and ``trouble`` says why
    """

    def __init__(
        self, sample: Sample | None = None, change: Change | None = None,
        events: Iterable[Event] = (), trouble: str = "",
    ) -> None:
        self.sample, self.change, self.events = sample, change, [*events]
        self.trouble = trouble
        self.wall = time.time() if sample is None else sample.wall


class Watch:
    def __init__(self, control: Path) -> None:
        self._forwarder = ControlClient(str(control), ASK_SECONDS)
        self._node = ControlClient(str(control.with_name(NODE_SOCKET)), ASK_SECONDS)
        self._lock = asyncio.Lock()
        self._view = View(trouble="nothing was measured yet")
        self._at = float("-inf")
        self.taken_n = 0

    async def view(self) -> View:
        """Return the newest view. It is at most FRESH_SECONDS old."""
        async with self._lock:
            if time.monotonic() - self._at >= FRESH_SECONDS:
                self._view = await self._ask()
                self._at = time.monotonic()
            return self._view

    async def _ask(self) -> View:
        before = self._view.sample
        try:
            if before is None or time.monotonic() - before.at > STALE_SECONDS:
                before = await self._take()
                await asyncio.sleep(FIRST_SECONDS)
            now = await self._take()
            events = await asyncio.to_thread(self._events, now)
        except UdptunError as exc:
            return View(trouble=str(exc))
        return View(now, Change(before, now), events)

    async def _take(self) -> Sample:
        self.taken_n += 1
        return await asyncio.to_thread(take, self._node, self._forwarder)

    def _events(self, sample: Sample) -> list[Event]:
        """Return the last events of both, the newest first."""
        found = [] if sample.node is None else [
            _event(event, node_event_text) for event in sample.node["events"]]
        if sample.forwarder is not None:
            with suppress(NoForwarder):  # it has ended since
                found += [_event(event, event_text)
                          for event in self._forwarder.events(follow=False)
                          if event["type"] != "hello"]
        return sorted(found, key=lambda event: event.time, reverse=True)[:EVENTS_N]

    def close(self) -> None:
        self._node.close()
        self._forwarder.close()


def _event(event: Mapping[str, Any], text: Callable[[dict[str, Any]], str]) -> Event:
    return Event(f"{event['time'][:19]}Z".replace("T", " "), event["type"], text(dict(event)))
