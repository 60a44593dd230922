"""The clients of one server: which connection to close at the limit, and which Host to accept.

Owns the rule: clients that send nothing or read nothing must not block other clients. So at the
limit, a new connection replaces the connection that has been idle for the longest time. If no
connection is idle, it replaces the one with the oldest request. Does not depend on the kind of the
connections. Any thread.

A web page of another site can let its own name resolve to our address (DNS rebinding). For a
browser, our answers are then of the same origin, so the page can read them. It cannot do this with
an IP address or with a name that it does not control.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection
from ipaddress import ip_address
from typing import Generic, TypeVar

C = TypeVar("C")


class Connections(Generic[C]):
    """At most ``limit`` connections.

    close       closes an idle connection. It must not block. It must not raise if the connection
                is already closed
    close_busy  the same for a connection with a request in progress. None: such a connection is
                never closed
    """

    def __init__(
        self, limit: int, close: Callable[[C], object],
        close_busy: Callable[[C], object] | None = None,
    ) -> None:
        self._limit = limit
        self._close = close
        self._close_busy = close_busy
        self._lock = threading.Lock()
        # Connections without a request in progress, the longest idle one first. True: there was a
        # request before.
        self._idle: dict[C, bool] = {}
        self._busy: dict[C, None] = {}  # an ordered set, the oldest request first

    def add(self, connection: C) -> bool:
        """Add a connection. At the limit, close another one: see the module's docstring. Return
        False if no other one can be closed: the caller must close the new one."""
        close = None
        with self._lock:
            if len(self) >= self._limit:
                if self._idle:
                    oldest, close = next(iter(self._idle)), self._close
                    del self._idle[oldest]
                elif self._close_busy is not None:
                    oldest, close = next(iter(self._busy)), self._close_busy
                    del self._busy[oldest]
                else:
                    return False
            self._idle[connection] = False
        if close is not None:
            close(oldest)
        return True

    def __len__(self) -> int:
        return len(self._idle) + len(self._busy)

    def request_begins(self, connection: C) -> None:
        """Record that the connection has sent a request."""
        with self._lock:
            if connection in self._idle:
                del self._idle[connection]
                self._busy[connection] = None

    def request_ends(self, connection: C) -> None:
        with self._lock:
            if connection in self._busy:
                del self._busy[connection]
                self._idle[connection] = True

    def remove(self, connection: C) -> None:
        """Forget a connection that is closed."""
        with self._lock:
            self._idle.pop(connection, None)
            self._busy.pop(connection, None)

    def close_if_silent(self, connection: C) -> None:
        """Close the connection if it has never sent a request."""
        with self._lock:
            silent = self._idle.get(connection) is False
            if silent:
                del self._idle[connection]
        if silent:
            self._close(connection)


# The Host header

LOCALHOST = frozenset({"localhost"})


def host_name(host: str) -> str:
    """Return the name in a Host header, without port and brackets, in lower case."""
    name, colon, port = host.rpartition(":")
    if not colon or not port.isdigit():
        name = host
    return name.removeprefix("[").removesuffix("]").lower().removesuffix(".")


def is_accepted(host: str, names: Collection[str] = LOCALHOST) -> bool:
    """Return whether a Host header has an IP address or one of these names (lower case)."""
    name = host_name(host)
    if name in names:
        return True
    try:
        ip_address(name)
    except ValueError:
        return False
    return True
