"""Tell subscribers what happened: route changes, peer MTU changes, errors.

Owns the queues between the forwarder and who listens. A subscriber that does not read loses its
oldest events and is told how many; it never holds up anybody. Control loop only.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

Event = dict[str, Any]
QUEUE_N = 4096


class Subscription:
    """An async iterator over events; ends when the forwarder closes."""

    def __init__(self) -> None:
        self._events: deque[Event] = deque(maxlen=QUEUE_N)
        self._lost = 0
        self._ready = asyncio.Event()
        self._closed = False

    def __aiter__(self) -> AsyncIterator[Event]:
        return self

    async def __anext__(self) -> Event:
        while not self._events and not self._lost and not self._closed:
            self._ready.clear()
            await self._ready.wait()
        if self._lost:
            lost, self._lost = self._lost, 0
            return make_event("error", message=f"{lost} events lost: the reader is too slow")
        if self._events:
            return self._events.popleft()
        raise StopAsyncIteration

    def put(self, event: Event) -> None:
        if len(self._events) == QUEUE_N:
            self._lost += 1
        self._events.append(event)
        self._ready.set()

    def close(self) -> None:
        self._closed = True
        self._ready.set()


class EventHub:
    def __init__(self) -> None:
        self._subscriptions: set[Subscription] = set()

    def emit(self, kind: str, **fields: Any) -> None:
        if self._subscriptions:
            event = make_event(kind, **fields)
            for subscription in self._subscriptions:
                subscription.put(event)

    @property
    def heard(self) -> bool:
        """Whether anybody listens: what is costly to tell need not be gathered otherwise."""
        return bool(self._subscriptions)

    @contextmanager
    def subscribe(self) -> Iterator[AsyncIterator[Event]]:
        subscription = Subscription()
        self._subscriptions.add(subscription)
        try:
            yield subscription
        finally:
            self._subscriptions.discard(subscription)

    def close(self) -> None:
        for subscription in self._subscriptions:
            subscription.close()


def make_event(kind: str, **fields: Any) -> Event:
    return {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "type": kind, **fields}
