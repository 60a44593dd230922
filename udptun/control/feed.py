"""The forwarder's events, fanned out to readers of any speed.

Owns the last events and one bounded queue per reader. A reader that does not keep up loses the
oldest of its events and is told how many; it never holds up the forwarder or other readers.
Refuses to know HTTP. Threading: one loop.
"""

from __future__ import annotations

import asyncio
from collections import deque
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from .protocol import RECENT_EVENTS, dump

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from .surface import Event

QUEUE_LINES = 1000


class Reader:
    """The events since it was opened that have not been taken yet, as NDJSON lines."""

    def __init__(self) -> None:
        self._lines: deque[bytes] = deque()
        self._lost = 0
        self._ended = False
        self._wake = asyncio.Event()

    def put(self, line: bytes) -> None:
        if len(self._lines) == QUEUE_LINES:
            self._lines.popleft()
            self._lost += 1
        self._lines.append(line)
        self._wake.set()

    def end(self) -> None:
        self._ended = True
        self._wake.set()

    async def take(self) -> bytes:
        """All lines that wait, at least one; ``b""`` at the end."""
        await self._wake.wait()
        if not self._ended:
            self._wake.clear()
        taken = b"".join(self._lines)
        if self._lost:
            taken = _loss(self._lost) + taken
        self._lines.clear()
        self._lost = 0
        return taken


class Feed:
    def __init__(self) -> None:
        self.recent: deque[bytes] = deque(maxlen=RECENT_EVENTS)
        self._readers: set[Reader] = set()

    async def pump(self, events: AsyncIterator[Event]) -> None:
        """Run until the events end: takes each at once, so that the source never queues."""
        async for event in events:
            self.publish(event)

    def publish(self, event: Event) -> None:
        line = dump(event)
        self.recent.append(line)
        for reader in self._readers:
            reader.put(line)

    def open(self) -> Reader:
        reader = Reader()
        self._readers.add(reader)
        return reader

    def drop(self, reader: Reader) -> None:
        self._readers.discard(reader)

    def end(self) -> None:
        for reader in self._readers:
            reader.end()


def _loss(lost: int) -> bytes:
    return dump({
        "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "type": "error",
        "message": f"{lost} events were lost: this reader does not keep up",
        "lost": lost,
    })
