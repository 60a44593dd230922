"""A client of etcd v3 over gRPC: which member to ask, who we are to it, and whether it is alive.

Owns: the one channel that is open, the token, time limits, what an error means. Refuses to know:
keys, leases, when to try again. Asyncio, one loop. Needs etcd 3.4 or newer (it asks a watch for
progress).

A call asks each member once, beginning with the one that answered last. A member that fails is
left, with its channel: what else was under way there ends with StoreDown. The next channel reads
the certificates again, so that new ones are taken without a restart.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any, NamedTuple

import grpc  # type: ignore[import-untyped]

from ..base import StoreDown, StoreRefused
from . import messages
from .config import EtcdConfig

CALL_TIMEOUT_S = 3.0
# A watch that is silent for so long is asked for a sign of life, and dead if none comes. The kernel
# takes data for a stopped process, so that neither TCP nor a write tells.
WATCH_QUIET_S = 4.0
WATCH_ANSWER_S = 3.0

_OPTIONS = (
    ("grpc.max_receive_message_length", -1),  # a listing of all leases is one message
    ("grpc.use_local_subchannel_pool", 1),  # a new channel must not inherit another's back-off
    ("grpc.enable_http_proxy", 0),
)
_REFUSALS = {
    grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNAUTHENTICATED,
    grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.UNIMPLEMENTED, grpc.StatusCode.NOT_FOUND,
}
# etcd tells by text, not by code, that a token is none, or older than the last change of roles.
_STALE_TOKEN = ("invalid auth token", "user name is empty", "revision of auth store is old")
_NO_AUTH = "authentication is not enabled"


class _Link(NamedTuple):
    channel: Any
    address: str


class Client:
    """StoreDown: no member answered. StoreRefused: one did, with a refusal.

    failed  called for each exchange that failed
    """

    def __init__(self, config: EtcdConfig, failed: Callable[[], None]) -> None:
        self._config = config
        self._failed = failed
        self._targets = config.targets
        self._at = 0
        self._link: _Link | None = None
        self._token: str | None = None

    async def call(self, method: messages.Method, request: Any) -> Any:
        failures: list[str] = []
        for _ in self._targets:
            link = self._open()
            try:
                return await self._call_with_token(link, method, request)
            except StoreDown as error:
                failures.append(str(error))
                await self._leave(link)
        raise StoreDown("; ".join(failures))

    async def watch(self, create: Any) -> AsyncGenerator[Any, None]:
        """The WatchResponses to one WatchCreateRequest; ends with an error only, or when closed.

        Responses to our own asking for progress are passed on: signs of life, without events.
        """
        link = self._open()
        try:
            async with aclosing(self._watch(link, create)) as responses:
                async for response in responses:
                    yield response
        except StoreDown:
            await self._leave(link)
            raise

    async def aclose(self) -> None:
        if self._link is not None:
            link, self._link = self._link, None
            await link.channel.close()

    def _open(self) -> _Link:
        if self._link is None:
            address, secure = self._targets[self._at]
            channel = (
                grpc.aio.secure_channel(address, self._credentials(), _OPTIONS) if secure
                else grpc.aio.insecure_channel(address, _OPTIONS)
            )
            self._link = _Link(channel, address)
        return self._link

    async def _leave(self, link: _Link) -> None:
        """Turn to the next member, unless somebody has done so since."""
        if link is self._link:
            self._at = (self._at + 1) % len(self._targets)
            await self.aclose()

    def _credentials(self) -> Any:
        def read(option: str, path: str) -> bytes | None:
            try:
                return Path(path).read_bytes() if path else None
            except OSError as error:
                raise StoreRefused(f"cannot read --{option} {path}: {error.strerror}") from None

        config = self._config
        return grpc.ssl_channel_credentials(
            read("etcd-cafile", config.cafile), read("etcd-keyfile", config.keyfile),
            read("etcd-certfile", config.certfile),
        )

    async def _call_with_token(
        self, link: _Link, method: messages.Method, request: Any
    ) -> Any:
        had_token = self._token is not None
        try:
            return await self._call_once(link, method, request, await self._metadata(link))
        except StoreRefused as error:
            if not (had_token and any(text in str(error) for text in _STALE_TOKEN)):
                raise
            self._token = None  # a member forgets its tokens when it starts
            return await self._call_once(link, method, request, await self._metadata(link))

    async def _metadata(self, link: _Link) -> tuple[tuple[str, str], ...]:
        """What every request carries: the token, if there is a user."""
        config = self._config
        if not config.username:
            return ()
        if self._token is None:
            request = messages.AUTHENTICATE.request(name=config.username, password=config.password)
            try:
                answer = await self._call_once(link, messages.AUTHENTICATE, request, ())
            except StoreRefused as error:
                if _NO_AUTH not in str(error):
                    raise
                return ()  # as etcd's own client: a user without auth is no error
            self._token = str(answer.token)
        return (("token", self._token),)

    async def _call_once(
        self, link: _Link, method: messages.Method, request: Any,
        metadata: tuple[tuple[str, str], ...],
    ) -> Any:
        call = link.channel.unary_unary(
            method.path, method.request.SerializeToString, method.response.FromString
        )
        address = link.address
        try:
            return await call(request, timeout=CALL_TIMEOUT_S, metadata=metadata)
        except grpc.aio.AioRpcError as error:
            raise self._error(address, error.code(), error.details()) from None
        except (grpc.aio.UsageError, asyncio.CancelledError) as error:
            raise _closed(address, error) from None

    async def _watch(self, link: _Link, create: Any) -> AsyncGenerator[Any, None]:
        address = link.address
        # Without a leader a member would keep silent and look alive.
        metadata = (*await self._metadata(link), ("hasleader", "true"))
        try:
            stream = link.channel.stream_stream(
                messages.WATCH.path, messages.WatchRequest.SerializeToString,
                messages.WatchResponse.FromString,
            )(metadata=metadata)
        except grpc.aio.UsageError as error:
            raise _closed(address, error) from None
        reading: asyncio.Future[Any] | None = None
        try:
            await stream.write(messages.WatchRequest(create_request=create))
            patience, asked = WATCH_ANSWER_S, True
            while True:
                reading = reading or asyncio.ensure_future(stream.read())
                if not (await asyncio.wait({reading}, timeout=patience))[0]:
                    if asked:
                        self._failed()
                        raise StoreDown(f"etcd at {address}: the watch is not answered")
                    await stream.write(messages.WatchRequest(
                        progress_request=messages.WatchProgressRequest()
                    ))
                    patience, asked = WATCH_ANSWER_S, True
                    continue
                response, reading = reading.result(), None
                if response is grpc.aio.EOF:
                    raise self._error(address, await stream.code(), await stream.details())
                patience, asked = WATCH_QUIET_S, False
                if response.canceled:
                    self._token = None  # a stale one looks like a lack of permission here
                yield response
        except grpc.aio.AioRpcError as error:
            raise self._error(address, error.code(), error.details()) from None
        except asyncio.InvalidStateError:  # written to when it had ended
            raise self._error(address, await stream.code(), await stream.details()) from None
        except (grpc.aio.UsageError, asyncio.CancelledError) as error:
            raise _closed(address, error) from None
        finally:
            stream.cancel()
            if reading is not None:
                await asyncio.wait({reading})
                _ = reading.cancelled() or reading.exception()  # seen: nothing to complain about

    def _error(self, address: str, code: Any, details: str | None) -> StoreDown | StoreRefused:
        self._failed()
        details = (details or code.name).removeprefix("etcdserver: ")
        if code is grpc.StatusCode.DEADLINE_EXCEEDED:
            details = f"no answer within {CALL_TIMEOUT_S:g} s"
        kind = StoreRefused if code in _REFUSALS else StoreDown
        return kind(f"etcd at {address}: {details}")


def _closed(address: str, error: BaseException) -> BaseException:
    """What it means that a call was cut off: the channel was left meanwhile, or we are to end."""
    task = asyncio.current_task()
    if isinstance(error, asyncio.CancelledError) and task is not None and task.cancelling():
        return error
    return StoreDown(f"etcd at {address}: left, as it failed another request")
