"""The open connections of one server, and the choice of the connection to close at the limit.

Owns the rule: clients that send no request must not block other clients. So at the limit, a new
connection replaces the connection that has been idle for the longest time. Does not depend on the
kind of the connections. Any thread.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

C = TypeVar("C")


class Connections(Generic[C]):
    """At most ``limit`` connections.

    close  closes an idle connection. It must not block. It must not raise if the connection is
           already closed
    """

    def __init__(self, limit: int, close: Callable[[C], object]) -> None:
        self._limit = limit
        self._close = close
        self._lock = threading.Lock()
        # Connections without a request in progress, the longest idle one first. True: there was a
        # request before.
        self._idle: dict[C, bool] = {}
        self._busy: set[C] = set()

    def add(self, connection: C) -> bool:
        """Add a connection. At the limit, close the connection that has been idle for the longest
        time. If no connection is idle, return False: the caller must close the new one."""
        with self._lock:
            oldest = None
            if len(self._idle) + len(self._busy) >= self._limit:
                oldest = next(iter(self._idle), None)
                if oldest is None:
                    return False
                del self._idle[oldest]
            self._idle[connection] = False
        if oldest is not None:
            self._close(oldest)
        return True

    def request_begins(self, connection: C) -> None:
        """Record that the connection has sent a request: it is not closed until the answer."""
        with self._lock:
            if connection in self._idle:
                del self._idle[connection]
                self._busy.add(connection)

    def request_ends(self, connection: C) -> None:
        with self._lock:
            if connection in self._busy:
                self._busy.remove(connection)
                self._idle[connection] = True

    def remove(self, connection: C) -> None:
        """Forget a connection that is closed."""
        with self._lock:
            self._idle.pop(connection, None)
            self._busy.discard(connection)

    def close_if_silent(self, connection: C) -> None:
        """Close the connection if it has never sent a request."""
        with self._lock:
            silent = self._idle.get(connection) is False
            if silent:
                del self._idle[connection]
        if silent:
            self._close(connection)
