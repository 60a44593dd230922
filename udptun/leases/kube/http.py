"""Sends HTTP requests to the API server, and keeps the credentials up to date.

Owns: the connections, and when the credentials are read again: if one of their files has changed,
if they have expired, after a failure of TLS, and after the answer 401. Does not depend on the
content of a request. Asyncio, one loop.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any
from urllib.parse import urlsplit

import aiohttp

from ..._version import __version__
from ..base import StoreRefused
from .config import KubeConfig
from .credentials import Credentials, Reader, seconds_left

log = logging.getLogger(__name__)

_CONNECT_TIMEOUT = 3.0  # seconds; a running server accepts a connection at once
_REFUSED = 401


class Http:
    """The connections to one API server.

    ``request`` raises aiohttp.ClientError, TimeoutError, StoreRefused.
    """

    def __init__(self, config: KubeConfig) -> None:
        self._timeout = config.request_timeout
        self._reader = Reader(config)
        self._current: _Connection | None = None
        self._reading = asyncio.Lock()

    @property
    def hosts(self) -> tuple[str, ...]:
        """The hosts to which requests are sent; none before the first request."""
        if self._current is None:
            return ()
        credentials = self._current.credentials
        urls = filter(None, (credentials.server, credentials.proxy))
        return tuple(filter(None, (urlsplit(url).hostname for url in urls)))

    async def aclose(self) -> None:
        if self._current is not None:
            await self._current.retire()
            self._current = None

    @asynccontextmanager
    async def request(
        self, method: str, path: str, **options: Any
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """Send a request, and return the response without its body.

        If the credentials are refused, and they have changed, the request is sent again.
        """
        async with AsyncExitStack() as stack:
            connection = await self._connection()
            try:
                response = await self._send(stack, connection, method, path, options)
                refused = response.status == _REFUSED
            except aiohttp.ClientError as e:
                if not _is_tls(e):
                    raise
                another = await self._read_again(connection)
                if another is connection:
                    raise
                response = await self._send(stack, another, method, path, options)
            else:
                if refused:
                    another = await self._read_again(connection)
                    if another is not connection:
                        response = await self._send(stack, another, method, path, options)
            yield response

    async def _send(
        self, stack: AsyncExitStack, connection: _Connection, method: str, path: str,
        options: dict[str, Any],
    ) -> aiohttp.ClientResponse:
        async with asyncio.timeout(self._timeout):
            return await stack.enter_async_context(connection.request(method, path, options))

    async def _connection(self) -> _Connection:
        """Return a connection with the present credentials."""
        current = self._current
        if current is not None and not self._reader.changed() \
                and seconds_left(current.credentials) > 0:
            return current
        return await self._read_again(current)

    async def _read_again(self, former: _Connection | None) -> _Connection:
        """Read the credentials. Return ``former`` if they have not changed."""
        async with self._reading:
            if self._current is not None and self._current is not former:
                return self._current  # another request has read them meanwhile
            try:
                credentials = await self._reader.read()
            except StoreRefused as e:
                if former is None:
                    raise
                # For example, a certificate and its key are being replaced. The former credentials
                # may be valid for some time.
                if former.read_error != (text := str(e)):
                    log.warning("%s: the former credentials stay in use", text)
                    former.read_error = text
                return former
            if former is not None:
                former.read_error = ""
                if former.credentials == credentials:
                    former.credentials = credentials
                    return former
                log.info("the credentials for the Kubernetes API have changed")
            self._current = _Connection(credentials)
            if former is not None:
                await former.retire()
            return self._current


class _Connection:
    """Connections with the same credentials. They are closed after the last request, once retired.

    So a watch that runs is not interrupted.
    """

    def __init__(self, credentials: Credentials) -> None:
        self.credentials = credentials
        self.read_error = ""
        self._requests_n = 0
        self._retired = False
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(ssl=credentials.tls or True),
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_TIMEOUT),
        )

    @asynccontextmanager
    async def request(
        self, method: str, path: str, options: dict[str, Any]
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        credentials = self.credentials
        headers = [("User-Agent", f"udptun/{__version__}"), *credentials.headers,
                   *options.get("headers", ())]
        self._requests_n += 1
        try:
            async with self._session.request(
                method, credentials.server + path, allow_redirects=False,
                proxy=credentials.proxy or None,
                server_hostname=credentials.tls_server_name or None,
                **{**options, "headers": headers},
            ) as response:
                yield response
        finally:
            self._requests_n -= 1
            await self._close_if_unused()

    async def retire(self) -> None:
        self._retired = True
        await self._close_if_unused()

    async def _close_if_unused(self) -> None:
        if self._retired and not self._requests_n:
            await self._session.close()


def _is_tls(error: BaseException) -> bool:
    """Return whether a failure of TLS is the cause."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ssl.SSLError):
            return True
        cause = cause.__cause__ or cause.__context__
    return isinstance(error, aiohttp.ClientSSLError)
