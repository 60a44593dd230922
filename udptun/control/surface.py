"""The part of a forwarder that the control servers call, as a type.

A type only: owns no objects. ``udptun.forwarder.Forwarder`` implements the type, and so does the
fake forwarder of the tests. Threading: every method is called on the forwarder's control loop.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable, Sequence
from mmap import mmap
from typing import Any, Protocol

from ..model import CaptureFilter, Endpoint, IPAddress, IPNetwork, Route, RouteDiff
from .events import EventHub


class Captured(Protocol):
    """A running capture."""

    @property
    def head(self) -> dict[str, Any]: ...

    def take(self) -> bytes: ...

    def counts(self) -> tuple[int, int]: ...

    def close(self) -> None: ...


class Controlled(Protocol):
    @property
    def events(self) -> EventHub: ...

    @property
    def generation(self) -> int: ...

    def status_chunks(self) -> AsyncGenerator[bytes, None]: ...

    def route_chunks(self) -> AsyncGenerator[bytes, None]: ...

    def peer_chunks(self) -> AsyncGenerator[bytes, None]: ...

    async def probe(
        self, endpoint: Endpoint, size: int | None = None, timeout: float | None = None
    ) -> dict[str, Any]: ...

    def set_standby(self, endpoints: Iterable[Endpoint], standby: bool) -> None: ...

    def drops(self) -> Sequence[dict[str, Any]]: ...

    def capture(self, wanted: CaptureFilter) -> Captured: ...

    def trace(self, address: IPAddress) -> dict[str, Any]: ...

    def counters(self) -> dict[str, Any]: ...

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
