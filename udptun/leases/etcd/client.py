"""A client of etcd v3 over gRPC: selection of a member, authentication, detection of dead members.

Owns: the one open channel, the token, the time limits, and the meaning of errors. Does not depend
on keys or leases. The callers retry. Asyncio, one loop. Needs etcd 3.4 or newer, because older
versions do not answer progress requests on a watch.

A call tries each member once. The first is the member that answered last. When a member fails, its
channel is closed, and all other requests on this channel end with StoreDown. Each new channel reads
the certificate files again, so renewed certificates need no restart.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any, NamedTuple

import grpc  # type: ignore[import-untyped]

from ...text import os_reason
from ..base import StoreDown, StoreRefused
from . import messages
from .config import EtcdConfig

CALL_TIMEOUT_S = 3.0
# If a watch has no response for WATCH_IDLE_S, the client sends a progress request. If there is no
# response to this request within WATCH_RESPONSE_S, the watch is dead. TCP does not detect a stopped
# etcd process, because the kernel still accepts data for the process.
WATCH_IDLE_S = 4.0
WATCH_RESPONSE_S = 3.0

_OPTIONS = (
    ("grpc.max_receive_message_length", -1),  # all leases are listed in one message
    # A new channel must not use the back-off of the previous channel.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_http_proxy", 0),
)
_REFUSALS = {
    grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNAUTHENTICATED,
    grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.UNIMPLEMENTED, grpc.StatusCode.NOT_FOUND,
}
# These texts of an error mean that the token is invalid, or that roles have changed since the token
# was issued. The error's code alone does not tell this.
_STALE_TOKEN = ("invalid auth token", "user name is empty", "revision of auth store is old")
_NO_AUTH = "authentication is not enabled"


class _Connection(NamedTuple):
    channel: Any
    address: str


class Client:
    """Sends requests to one etcd cluster.

    Each request raises StoreDown if no member answered, and StoreRefused if etcd refused the
    request.

    failed  called once for each failed request
    """

    def __init__(self, config: EtcdConfig, failed: Callable[[], None]) -> None:
        self._config = config
        self._failed = failed
        self._targets = config.targets
        self._member = 0
        self._connection: _Connection | None = None
        self._token: str | None = None

    async def call(self, method: messages.Method, request: Any) -> Any:
        failures: list[str] = []
        for _ in self._targets:
            connection = self._open()
            try:
                return await self._call_with_token(connection, method, request)
            except StoreDown as error:
                failures.append(str(error))
                await self._drop(connection)
        raise StoreDown("; ".join(failures))

    async def watch(self, create: Any) -> AsyncGenerator[Any, None]:
        """Yield the WatchResponses to one WatchCreateRequest, until an error or until closed.

        Some of them are responses to progress requests. Such a response has no events; it shows
        that the member is alive.
        """
        connection = self._open()
        try:
            async with aclosing(self._watch(connection, create)) as responses:
                async for response in responses:
                    yield response
        except StoreDown:
            await self._drop(connection)
            raise

    async def aclose(self) -> None:
        if self._connection is not None:
            connection, self._connection = self._connection, None
            await connection.channel.close()

    def _open(self) -> _Connection:
        if self._connection is None:
            address, secure = self._targets[self._member]
            channel = (
                grpc.aio.secure_channel(address, self._credentials(), _OPTIONS) if secure
                else grpc.aio.insecure_channel(address, _OPTIONS)
            )
            self._connection = _Connection(channel, address)
        return self._connection

    async def _drop(self, connection: _Connection) -> None:
        """Close ``connection`` and select the next member.

        Do nothing if ``connection`` is not the open connection any more.
        """
        if connection is self._connection:
            self._member = (self._member + 1) % len(self._targets)
            await self.aclose()

    def _credentials(self) -> Any:
        def read(option: str, path: str) -> bytes | None:
            try:
                return Path(path).read_bytes() if path else None
            except OSError as error:
                raise StoreRefused(f"cannot read --{option} {path}: {os_reason(error)}") from None

        config = self._config
        return grpc.ssl_channel_credentials(
            read("etcd-cafile", config.cafile), read("etcd-keyfile", config.keyfile),
            read("etcd-certfile", config.certfile),
        )

    async def _call_with_token(
        self, connection: _Connection, method: messages.Method, request: Any
    ) -> Any:
        had_token = self._token is not None
        try:
            metadata = await self._metadata(connection)
            return await self._call_once(connection, method, request, metadata)
        except StoreRefused as error:
            if not (had_token and any(text in str(error) for text in _STALE_TOKEN)):
                raise
            self._token = None  # get a new token: a member loses all tokens when it restarts
            metadata = await self._metadata(connection)
            return await self._call_once(connection, method, request, metadata)

    async def _metadata(self, connection: _Connection) -> tuple[tuple[str, str], ...]:
        """Return the metadata of a request: the token; empty without a user name."""
        config = self._config
        if not config.username:
            return ()
        if self._token is None:
            request = messages.AUTHENTICATE.request(name=config.username, password=config.password)
            try:
                answer = await self._call_once(connection, messages.AUTHENTICATE, request, ())
            except StoreRefused as error:
                if _NO_AUTH not in str(error):
                    raise
                return ()  # authentication is off; like etcd's own client, continue without a token
            self._token = str(answer.token)
        return (("token", self._token),)

    async def _call_once(
        self, connection: _Connection, method: messages.Method, request: Any,
        metadata: tuple[tuple[str, str], ...],
    ) -> Any:
        call = connection.channel.unary_unary(
            method.path, method.request.SerializeToString, method.response.FromString
        )
        address = connection.address
        try:
            return await call(request, timeout=CALL_TIMEOUT_S, metadata=metadata)
        except grpc.aio.AioRpcError as error:
            raise self._error(address, error.code(), error.details()) from None
        except (grpc.aio.UsageError, asyncio.CancelledError) as error:
            raise _closed(address, error) from None

    async def _watch(self, connection: _Connection, create: Any) -> AsyncGenerator[Any, None]:
        address = connection.address
        # "hasleader": a member that has lost its leader ends the watch. Without it, such a member
        # sends no events, but still answers progress requests as a healthy member does.
        metadata = (*await self._metadata(connection), ("hasleader", "true"))
        try:
            stream = connection.channel.stream_stream(
                messages.WATCH.path, messages.WatchRequest.SerializeToString,
                messages.WatchResponse.FromString,
            )(metadata=metadata)
        except grpc.aio.UsageError as error:
            raise _closed(address, error) from None
        reading: asyncio.Future[Any] | None = None
        try:
            await self._write(stream, address, messages.WatchRequest(create_request=create))
            timeout, response_expected = WATCH_RESPONSE_S, True
            while True:
                reading = reading or asyncio.ensure_future(stream.read())
                if not (await asyncio.wait({reading}, timeout=timeout))[0]:
                    if response_expected:
                        self._failed()
                        raise StoreDown(f"etcd at {address}: no response to the watch within "
                                        f"{timeout:g} s")
                    await self._write(stream, address, messages.WatchRequest(
                        progress_request=messages.WatchProgressRequest()
                    ))
                    timeout, response_expected = WATCH_RESPONSE_S, True
                    continue
                response, reading = reading.result(), None
                if response is grpc.aio.EOF:
                    raise self._error(address, await stream.code(), await stream.details())
                timeout, response_expected = WATCH_IDLE_S, False
                if response.canceled:
                    self._token = None  # etcd reports a stale token here as a missing permission
                yield response
        except grpc.aio.AioRpcError as error:
            raise self._error(address, error.code(), error.details()) from None
        except asyncio.InvalidStateError:  # the stream had ended before a write
            raise self._error(address, await stream.code(), await stream.details()) from None
        except (grpc.aio.UsageError, asyncio.CancelledError) as error:
            raise _closed(address, error) from None
        finally:
            stream.cancel()
            if reading is not None:
                await asyncio.wait({reading})
                # Retrieve the exception, so that asyncio does not log it.
                _ = reading.cancelled() or reading.exception()

    async def _write(self, stream: Any, address: str, request: Any) -> None:
        """Send a request of the watch.

        A write has a time limit: grpc never ends it if another request closes the channel
        meanwhile.
        """
        try:
            async with asyncio.timeout(WATCH_RESPONSE_S):
                await stream.write(request)
        except TimeoutError:
            self._failed()
            raise StoreDown(f"etcd at {address}: the watch could not be requested within "
                            f"{WATCH_RESPONSE_S:g} s") from None

    def _error(self, address: str, code: Any, details: str | None) -> StoreDown | StoreRefused:
        self._failed()
        details = (details or code.name).removeprefix("etcdserver: ")
        if code is grpc.StatusCode.DEADLINE_EXCEEDED:
            details = f"no response within {CALL_TIMEOUT_S:g} s"
        kind = StoreRefused if code in _REFUSALS else StoreDown
        return kind(f"etcd at {address}: {details}")


def _closed(address: str, error: BaseException) -> BaseException:
    """Return the error to raise for an interrupted call.

    If our task was cancelled, return this cancellation. Else another request has closed the
    connection: return StoreDown.
    """
    task = asyncio.current_task()
    if isinstance(error, asyncio.CancelledError) and task is not None and task.cancelling():
        return error
    return StoreDown(f"etcd at {address}: the connection was closed after another request failed")
