"""The requests to the API server: get a node, get a pod, list and watch nodes, patch a node.

Owns: HTTP, paging, the framing of a watch, and the meaning of each failure: ``Gone`` (list again),
``StoreDown`` or ``StoreRefused``. Does not depend on leases. Asyncio, one loop.
"""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import aiohttp
import msgspec

from ..base import StoreDown, StoreNotReady, StoreRefused
from .config import KubeConfig
from .http import Http
from .schema import FullNode, Node, Patch

_NODES = "/api/v1/nodes"
_STRATEGIC_MERGE = "application/strategic-merge-patch+json"
_T = TypeVar("_T")


class Gone(StoreDown):
    """The server does not have the request's resource version. List the nodes again.

    It returned HTTP 410, or its store was set back to a backup.
    """


class Forbidden(StoreNotReady):
    """Our role does not permit the request (403)."""


class Event(msgspec.Struct):
    """One line of a watch, of type ADDED, MODIFIED, DELETED or BOOKMARK.

    The object of a BOOKMARK has only a resource version.
    """

    type: str
    object: Node


class _Line(msgspec.Struct):
    type: str
    object: msgspec.Raw


class _ListMetadata(msgspec.Struct, rename="camel"):
    resource_version: str = ""
    continue_: str = msgspec.field(default="", name="continue")


class _NodeList(msgspec.Struct):
    metadata: _ListMetadata
    items: list[Node] | None = None


class _Status(msgspec.Struct):
    code: int = 0
    message: str = ""


class _PodSpec(msgspec.Struct, rename="camel"):
    node_name: str = ""


class _Pod(msgspec.Struct):
    spec: _PodSpec


class Api:
    """Sends requests to the API server. Each failure raises Gone, StoreDown or StoreRefused."""

    def __init__(self, config: KubeConfig) -> None:
        self._config = config
        self._http = Http(config)

    @property
    def hosts(self) -> tuple[str, ...]:
        return self._http.hosts

    async def aclose(self) -> None:
        await self._http.aclose()

    async def pod_node_name(self, namespace: str, name: str) -> str:
        """Return the name of the node that a pod runs on; "" if the pod is not scheduled."""
        path = f"/api/v1/namespaces/{namespace}/pods/{name}"
        pod = await self._call(f"get pod {namespace}/{name}", _Pod, "GET", path)
        return pod.spec.node_name

    async def node(self, name: str) -> FullNode:
        return await self._call(f"get node {name}", FullNode, "GET", f"{_NODES}/{name}")

    async def patch_status(self, name: str, patch: Patch) -> FullNode:
        """Patch the node's status subresource, as flannel does.

        So the node daemon needs no other permission to write.
        """
        return await self._call(
            f"patch the status of node {name}", FullNode, "PATCH", f"{_NODES}/{name}/status",
            data=msgspec.json.encode(patch), headers=[("Content-Type", _STRATEGIC_MERGE)],
        )

    async def nodes(self, page: int | None) -> AsyncGenerator[tuple[list[Node], str], None]:
        """Yield all nodes in pages, each with the resource version from which to watch.

        page  the number of nodes in a page; None: all nodes in one page

        Raises Gone if the listing took too long. In this case, the server no longer has the
        resource version of the first page.
        """
        params: dict[str, str] = {} if page is None else {"limit": str(page)}
        while True:
            listing = await self._call("list nodes", _NodeList, "GET", _NODES, params=params)
            yield listing.items or [], listing.metadata.resource_version
            if not listing.metadata.continue_:
                return
            params["continue"] = listing.metadata.continue_

    async def watch(self, version: str) -> AsyncGenerator[list[Event], None]:
        """Yield the events after ``version``. Events that are received together are in one list.

        The first list is empty. It shows that the server has accepted the watch. Returns when the
        server ends the watch, which is normal. Returns also if nothing is received for
        ``watch_silence``, and the server still answers: the connection can be broken, so the caller
        watches again. Raises Gone if the server has been set back to an older version. From a later
        version, the server accepts a watch, but sends nothing. Raises StoreDown if the server does
        not answer.
        """
        action = "watch nodes"
        params = {
            "watch": "true", "allowWatchBookmarks": "true", "resourceVersion": version,
            "timeoutSeconds": str(self._config.watch_timeout),
        }
        with _failures(action):
            async with self._http.request("GET", _NODES, params=params) as response:
                await self._check(action, response)
                yield []
                rest = b""
                while True:
                    try:
                        async with asyncio.timeout(self._config.watch_silence):
                            chunk = await response.content.readany()
                    except TimeoutError:
                        await self._probe(version)
                        return
                    if not chunk:
                        return
                    *lines, rest = (rest + chunk).split(b"\n")
                    events = [_event(action, line) for line in lines if line.strip()]
                    if events:
                        version = events[-1].object.metadata.resource_version
                    yield events

    async def _probe(self, version: str) -> None:
        """List one node. Raises Gone if the server's version is older than ``version``."""
        listing = await self._call("list nodes", _NodeList, "GET", _NODES, params={"limit": "1"})
        now = listing.metadata.resource_version
        # Decimal numbers without leading zeros are compared as text: they can have any length.
        if now.isdecimal() and version.isdecimal() and (len(now), now) < (len(version), version):
            raise Gone(f"watch nodes: the API server went back from version {version} to {now}")

    async def _call(
        self, action: str, kind: type[_T], method: str, path: str, **options: Any
    ) -> _T:
        with _failures(action):
            async with self._http.request(method, path, **options) as response:
                await self._check(action, response)
                async with asyncio.timeout(self._config.request_timeout):
                    return msgspec.json.decode(await response.read(), type=kind)

    async def _check(self, action: str, response: aiohttp.ClientResponse) -> None:
        """Raise the exception of a response that is not successful."""
        if 200 <= response.status < 300:
            return
        async with asyncio.timeout(self._config.request_timeout):
            body = await response.read()
        try:
            message = msgspec.json.decode(body, type=_Status).message
        except msgspec.DecodeError:  # for example, the response of a proxy
            message = body[:200].decode(errors="replace")
        raise _failure(action, response.status, message or response.reason or "")


def _event(action: str, line: bytes) -> Event:
    """Decode one line of a watch.

    An ERROR event is used where an HTTP status is not possible any more, so it raises the same
    exception as this HTTP status.
    """
    event = msgspec.json.decode(line, type=_Line)
    if event.type == "ERROR":
        status = msgspec.json.decode(event.object, type=_Status)
        raise _failure(action, status.code, status.message)
    return Event(event.type, msgspec.json.decode(event.object, type=Node))


@contextmanager
def _failures(action: str) -> Iterator[None]:
    """Turn errors of the connection, credentials and decoding into StoreDown or StoreRefused."""
    try:
        yield
    except TimeoutError as e:  # one of aiohttp's errors is also a TimeoutError
        raise StoreDown(f"{action}: the API server does not respond") from e
    except aiohttp.ClientError as e:
        raise StoreDown(f"{action}: {_reason(e)}") from e
    except msgspec.DecodeError as e:
        raise StoreDown(f"{action}: the response is not from Kubernetes: {e}") from e


def _reason(error: aiohttp.ClientError) -> str:
    """Return a text that is the same each time: aiohttp's contains the address of an object."""
    if isinstance(error, aiohttp.ClientConnectorCertificateError):
        return f"no connection to {error.host}:{error.port}: {error.certificate_error}"
    if isinstance(error, aiohttp.ClientConnectorError):
        cause = error.os_error
        known = cause.errno and not isinstance(cause, ssl.SSLError | socket.gaierror)
        why = os.strerror(cause.errno or 0) if known else str(cause)
        return f"no connection to {error.host}:{error.port}: {why}"
    if isinstance(error, aiohttp.ClientHttpProxyError):
        return f"the proxy returned {error.status}: {error.message}"
    return str(error) or type(error).__name__


def _failure(action: str, code: int, message: str) -> StoreDown | StoreRefused:
    sentence = f"{action}: the API server returned {code}: {message}"
    if code == 410:
        return Gone(sentence)
    if code in (408, 409, 429) or code >= 500:
        return StoreDown(sentence)
    if code == 403:  # also in the first second of a server, which has not read the roles yet
        return Forbidden(sentence)
    if code in (401, 404):  # the token is not valid yet, or the kubelet has not made the node yet
        return StoreNotReady(sentence)
    return StoreRefused(sentence)
