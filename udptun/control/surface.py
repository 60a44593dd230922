"""What control needs of a forwarder, as a type: the ends are written and tested against this.

Owns nothing at run time. ``udptun.forwarder.Forwarder`` is one; so is the fake in the tests.
Threading: every method is called on the forwarder's control loop.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AbstractContextManager
from mmap import mmap
from typing import Any, Protocol

from ..model import IPAddress, IPNetwork, Route, RouteDiff

Event = dict[str, Any]

class Controlled(Protocol):
    @property
    def generation(self) -> int: ...

    def status_chunks(self) -> AsyncGenerator[bytes, None]: ...

    def route_chunks(self) -> AsyncGenerator[bytes, None]: ...

    def drops(self) -> list[dict[str, Any]]: ...

    def trace(self, address: IPAddress) -> dict[str, Any]: ...

    def counters(self) -> dict[str, Any]: ...

    def subscribe(self) -> AbstractContextManager[AsyncIterator[Event]]: ...

    async def add_route(self, route: Route) -> RouteDiff: ...

    async def put_route(self, route: Route) -> RouteDiff: ...

    async def delete_route(self, dst: IPNetwork) -> RouteDiff: ...

    async def replace_routes_json(
        self, body: bytes | mmap, expect_generation: int | None = None
    ) -> RouteDiff: ...

    async def replace_routes_text(
        self, body: bytes | mmap, expect_generation: int | None = None
    ) -> RouteDiff: ...

    def request_stop(self) -> None: ...
