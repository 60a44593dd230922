"""The few exchanges with the API server: one node, one pod, all nodes, their changes, a patch.

Owns HTTP, paging, the watch's framing, and what each failure means: ``Gone`` to list again,
``StoreDown``, ``StoreRefused``. Knows nothing of leases. lightkube's own calls are not used: its
watch asks for no bookmarks and waits for a silent server without end, and it decodes whole nodes.
Asyncio, one loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import httpx2
import msgspec
from lightkube.core.exceptions import ConfigError

from ..base import StoreDown, StoreRefused
from .access import connect
from .config import KubeConfig
from .schema import FullNode, Node, Patch

_NODES = "/api/v1/nodes"
_STRATEGIC_MERGE = "application/strategic-merge-patch+json"
_T = TypeVar("_T")


class Gone(StoreDown):
    """410: the server has forgotten the version that we refer to. List again."""


class Event(msgspec.Struct):
    """One line of a watch: ADDED, MODIFIED or DELETED, or BOOKMARK, which only has a version."""

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
    """Every call tries once. Every failure is Gone, StoreDown or StoreRefused, in a sentence."""

    def __init__(self, config: KubeConfig) -> None:
        self._config = config
        self._http = connect(config)

    async def aclose(self) -> None:
        await self._http.aclose()

    async def pod_node_name(self, namespace: str, name: str) -> str:
        """The node a pod runs on; "" if it runs on none."""
        path = f"/api/v1/namespaces/{namespace}/pods/{name}"
        pod = await self._call(f"get pod {namespace}/{name}", _Pod, "GET", path)
        return pod.spec.node_name

    async def node(self, name: str) -> FullNode:
        return await self._call(f"get node {name}", FullNode, "GET", f"{_NODES}/{name}")

    async def patch_status(self, name: str, patch: Patch) -> FullNode:
        """Through the status subresource, as flannel: it may write nothing else of a node."""
        return await self._call(
            f"patch the status of node {name}", FullNode, "PATCH", f"{_NODES}/{name}/status",
            content=msgspec.json.encode(patch), headers={"Content-Type": _STRATEGIC_MERGE},
        )

    async def nodes(self, page: int | None) -> AsyncGenerator[tuple[list[Node], str], None]:
        """All nodes, ``page`` at a time (None: all at once), and the version to watch from.

        Gone: it took so long that the server has forgotten the version of the first page.
        """
        params: dict[str, str] = {} if page is None else {"limit": str(page)}
        while True:
            found = await self._call("list nodes", _NodeList, "GET", _NODES, params=params)
            yield found.items or [], found.metadata.resource_version
            if not found.metadata.continue_:
                return
            params["continue"] = found.metadata.continue_

    async def watch(self, version: str) -> AsyncGenerator[list[Event], None]:
        """Events after ``version``, those that came in one piece together.

        The first list is empty: the server has begun to answer. It ends when the server ends the
        watch, as it does after a while. Silence is a failure: a bookmark is due every minute.
        """
        doing = "watch nodes"
        params = {
            "watch": "true", "allowWatchBookmarks": "true", "resourceVersion": version,
            "timeoutSeconds": str(self._config.watch_timeout),
        }
        request = self._http.build_request("GET", _NODES, params=params, timeout=None)
        with _failures(doing):
            async with asyncio.timeout(self._config.request_timeout):
                response = await self._http.send(request, stream=True)
        try:
            if not response.is_success:
                with _failures(doing):
                    async with asyncio.timeout(self._config.request_timeout):
                        await response.aread()
                raise _refusal(doing, response)
            yield []
            rest, pieces = b"", response.aiter_bytes()
            while True:
                with _failures(doing):
                    async with asyncio.timeout(self._config.watch_silence):
                        piece = await anext(pieces, None)
                    if piece is None:
                        return
                    *lines, rest = (rest + piece).split(b"\n")
                    events = [_event(doing, line) for line in lines if line.strip()]
                yield events
        finally:
            await response.aclose()

    async def _call(
        self, doing: str, kind: type[_T], method: str, path: str, **options: Any
    ) -> _T:
        with _failures(doing):
            async with asyncio.timeout(self._config.request_timeout):
                response = await self._http.request(method, path, **options)
            if not response.is_success:
                raise _refusal(doing, response)
            return msgspec.json.decode(response.content, type=kind)


def _event(doing: str, line: bytes) -> Event:
    """An ERROR event is what an HTTP status would be, had the answer not begun already."""
    event = msgspec.json.decode(line, type=_Line)
    if event.type == "ERROR":
        status = msgspec.json.decode(event.object, type=_Status)
        raise _failure(doing, status.code, status.message)
    return Event(event.type, msgspec.json.decode(event.object, type=Node))


@contextmanager
def _failures(doing: str) -> Iterator[None]:
    """Those on the way to the server, and of what is no Kubernetes at its end."""
    try:
        yield
    except (TimeoutError, httpx2.TimeoutException) as e:
        raise StoreDown(f"{doing}: the API server does not answer") from e
    except httpx2.HTTPError as e:
        raise StoreDown(f"{doing}: {e or type(e).__name__}") from e
    except msgspec.DecodeError as e:
        raise StoreDown(f"{doing}: the answer is not one of Kubernetes: {e}") from e
    except (ConfigError, OSError) as e:  # a token that cannot be read, a plugin that failed
        raise StoreRefused(f"{doing}: no credentials: {e}") from e


def _refusal(doing: str, response: httpx2.Response) -> StoreDown | StoreRefused:
    try:
        message = msgspec.json.decode(response.content, type=_Status).message
    except msgspec.DecodeError:  # of a proxy, say
        message = response.text[:200]
    return _failure(doing, response.status_code, message or response.reason_phrase)


def _failure(doing: str, code: int, message: str) -> StoreDown | StoreRefused:
    sentence = f"{doing}: the API server answers {code}: {message}"
    if code == 410:
        return Gone(sentence)
    if code in (408, 409, 429) or code >= 500:
        return StoreDown(sentence)
    return StoreRefused(sentence)
