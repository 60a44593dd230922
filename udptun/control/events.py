"""The forwarder's events. One hub delivers each event to all readers.

Owns the most recent events and one bounded queue per reader. A slow reader delays neither the
forwarder nor the other readers. Instead it loses its oldest events, and the next event that it gets
reports how many were lost. Does not depend on the sources of events or on how events are shown.
Threading: control loop only.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

from ..text import counted
from .protocol import RECENT_EVENTS

Event = dict[str, Any]

QUEUE_N = 4096  # events per reader


class Reader:
    """The events since the reader was opened, except those that are already taken.

    Take them in batches with ``take``, or one by one with ``async for``.
    """

    def __init__(self) -> None:
        self._events: deque[Event] = deque()
        self._lost = 0
        self._ended = False
        self._wake = asyncio.Event()

    def put(self, event: Event) -> None:
        if len(self._events) >= QUEUE_N:
            self._events.popleft()
            self._lost += 1
        self._events.append(event)
        self._wake.set()

    def end(self) -> None:
        """End the stream after the events that are queued now."""
        self._ended = True
        self._wake.set()

    async def take(self) -> list[Event]:
        """Wait for an event and return all queued events. Empty list: the stream has ended."""
        await self._wake.wait()
        if not self._ended:
            self._wake.clear()
        taken = [_loss(self._lost)] if self._lost else []
        taken += self._events
        self._events.clear()
        self._lost = 0
        return taken

    def __aiter__(self) -> Reader:
        return self

    async def __anext__(self) -> Event:
        while not self._events and not self._ended:
            self._wake.clear()
            await self._wake.wait()
        if self._lost:
            lost, self._lost = self._lost, 0
            return _loss(lost)
        if self._events:
            return self._events.popleft()
        raise StopAsyncIteration


class EventHub:
    def __init__(self) -> None:
        self.recent: deque[Event] = deque(maxlen=RECENT_EVENTS)
        self._readers: set[Reader] = set()

    def emit(self, kind: str, **fields: Any) -> None:
        """Deliver an event of the type ``kind`` with the present time."""
        self.publish(_event(kind, **fields))

    def publish(self, event: Event) -> None:
        self.recent.append(event)
        for reader in self._readers:
            reader.put(event)

    @contextmanager
    def subscribe(self) -> Iterator[Reader]:
        reader = Reader()
        self._readers.add(reader)
        try:
            yield reader
        finally:
            self._readers.discard(reader)

    @property
    def readers_n(self) -> int:
        return len(self._readers)

    def close(self) -> None:
        for reader in self._readers:
            reader.end()


def _event(kind: str, **fields: Any) -> Event:
    return {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "type": kind, **fields}


def _loss(lost: int) -> Event:
    were = "was" if lost == 1 else "were"
    return _event(
        "error", message=f"{counted(lost, 'event')} {were} lost: this reader is too slow", lost=lost
    )
