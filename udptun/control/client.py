"""The client of the control API: synchronous, standard library only, fast to import.

Owns one connection, which stays open between calls. Returns the JSON of docs/control.md unchanged,
except for the diff of a route change. Threading: one thread per client.
"""

from __future__ import annotations

import errno
import http.client
import json
import os
import select
import socket
import struct
from contextlib import contextmanager, suppress
from itertools import chain
from typing import TYPE_CHECKING, Any

from ..errors import ControlError, NoForwarder
from . import protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from types import TracebackType

    from ..answers import Drop, Node, ProbeAnswer, Status, Trace
    from ..model import Endpoint, IPAddress, IPNetwork, Route, RouteDiff

TIMEOUT = 30.0  # seconds; the forwarder answers within milliseconds
EXIT_SECONDS = 5.0  # limit between end of connection and end of process
CHUNK = 64 * 1024


class ControlClient:
    """A client of the forwarder at the socket ``path``. Connects at the first call.

    Every call raises NoForwarder if no forwarder answers, and ControlError if the forwarder answers
    with an error.
    """

    def __init__(
        self, path: str = protocol.DEFAULT_SOCKET, timeout: float | None = TIMEOUT
    ) -> None:
        self.path = str(path)
        self._connection = _UnixConnection(self.path, timeout)

    def __enter__(self) -> ControlClient:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        self._connection.close()

    def interrupt(self) -> None:
        """End a call that waits in another thread: it raises NoForwarder."""
        self._connection.shut_down()

    # Reading

    def status(self, peers: bool = True) -> Status:
        """Return the status. ``peers=False``: its list of peers, which can be very long, is empty.
        """
        from ..answers import Status

        if peers:
            return Status(self._get(protocol.STATUS))
        # A forwarder of an earlier version sends its peers all the same.
        status: dict[str, Any] = self._get(
            protocol.STATUS_WITHOUT_PEERS,
            lambda value: None if "last_seen_seconds" in value else value)
        return Status(status | {"peers": []})

    def peers(self, reduce: Callable[[dict[str, Any]], Any] | None = None) -> list[Any]:
        """Return the peers, each with the measured state of its path, as Peer.

        reduce  replaces each JSON object as soon as it is parsed, inner ones first: with thousands
                of peers, this saves memory
        """
        from ..answers import Peer

        peers: list[Any] = self._get(protocol.PEERS, reduce)["peers"]
        return peers if reduce is not None else [Peer(peer) for peer in peers]

    def drops(self) -> list[Drop]:
        """Return the dropped packets, by reason and direction."""
        from ..answers import Drop

        return [Drop(row) for row in self._get(protocol.DROPS)["drops"]]

    def routes(self) -> dict[str, Any]:
        """Return ``{"generation": N, "routes": [{"dst", "via", "port", "mtu"}]}``."""
        return self._get(protocol.ROUTES)

    def routes_text(self) -> Iterator[bytes]:
        """Yield the JSON text of ``routes`` in pieces, each when it arrives."""
        response = self._request("GET", protocol.ROUTES)
        while piece := self._read(response, CHUNK):
            yield piece

    def trace(self, address: IPAddress | str) -> Trace:
        """Return what the forwarder does with a packet to an address."""
        from urllib.parse import quote

        from ..answers import Trace

        return Trace(self._get(f"{protocol.TRACE}?address={quote(str(address))}"))

    def metrics(self) -> str:
        return self._read(self._request("GET", protocol.METRICS)).decode()

    def node(self) -> Node:
        """Return the state of the node daemon. Only for a client of the daemon's socket."""
        from ..answers import Node

        return Node(self._get(protocol.NODE))

    def hand_over(self) -> int:
        """Let the node daemon hand over the node. Return its process ID.

        Only for a client of the daemon's socket. The daemon releases its locks after the answer.
        """
        answer = json.loads(self._read(self._request("POST", protocol.HAND_OVER)))
        return int(answer["pid"])

    def events(self, follow: bool = True) -> Iterator[dict[str, Any]]:
        """Yield a ``hello``, then events.

        follow  True: new events, until the forwarder stops; False: the recent events

        Do not make another call on this client while reading events.
        """
        response = self._request("GET", f"{protocol.EVENTS}?follow={int(follow)}")
        if follow:
            self._connection.disable_timeout()
        try:
            for line in self._lines(response):
                yield json.loads(line)
        finally:
            self.close()

    def probe(
        self, endpoint: Endpoint | str, size: int | None = None, timeout: float | None = None
    ) -> ProbeAnswer:
        """Probe a peer now.

        timeout  how long the forwarder waits for the answer of the peer; None: a second
        """
        from ..answers import ProbeAnswer

        wanted: dict[str, Any] = {"endpoint": str(endpoint), "size": size, "timeout": timeout}
        wanted = {name: value for name, value in wanted.items() if value is not None}
        response = self._request("POST", protocol.PROBE, protocol.dump(wanted), {
            "Content-Type": protocol.JSON_TYPE})
        return ProbeAnswer(json.loads(self._read(response)))

    def set_standby(self, endpoints: Iterable[Endpoint | str], standby: bool) -> None:
        """Set whether other paths carry the packets to these peers."""
        left = [str(endpoint) for endpoint in endpoints]
        while left:
            part, left = left[: protocol.MAX_STANDBY], left[protocol.MAX_STANDBY :]
            body = protocol.dump({"endpoints": part, "standby": standby})
            self._read(self._request("POST", protocol.STANDBY, body, {
                "Content-Type": protocol.JSON_TYPE}))

    def change_device(
        self, mtu: int | None = None, listen: Iterable[Endpoint | str] | None = None
    ) -> dict[str, Any]:
        """Change the MTU of the TUN, or the listen addresses. None: as now. Return both."""
        wanted: dict[str, Any] = {}
        if mtu is not None:
            wanted["mtu"] = mtu
        if listen is not None:
            wanted["listen"] = [str(endpoint) for endpoint in listen]
        answer: dict[str, Any] = json.loads(self._read(self._request(
            "PUT", protocol.DEVICE, protocol.dump(wanted),
            {"Content-Type": protocol.JSON_TYPE})))
        return answer

    @contextmanager
    def capture(
        self, wanted: dict[str, Any]
    ) -> Iterator[tuple[dict[str, Any], Iterator[bytes]]]:
        """Start a capture; yield its head and its records in pieces. It ends with the context.

        wanted  the fields of ``POST /v1/capture``

        Do not make another call on this client before the end.
        """
        response = self._request("POST", protocol.CAPTURE, protocol.dump(wanted), {
            "Content-Type": protocol.JSON_TYPE})
        self._connection.disable_timeout()
        pieces = self._pieces(response)
        try:
            head, newline, rest = b"", b"", b""
            while not newline:
                piece = next(pieces, b"")
                if not piece:
                    raise NoForwarder(f"the forwarder on {self.path} closed the connection")
                head, newline, rest = (head + piece).partition(b"\n")
            yield json.loads(head), chain([rest] if rest else [], pieces)
        finally:
            self.close()

    # Changing. ``Forwarder`` has methods of the same names.

    def add_route(self, route: Route | str) -> RouteDiff:
        """Add a route. ControlError ``route_exists``: there is a different route to its prefix."""
        return self._put(route, {"If-None-Match": "*"})

    def put_route(self, route: Route | str) -> RouteDiff:
        """Add a route, or replace the route to the same prefix."""
        return self._put(route, {})

    def delete_route(self, dst: IPNetwork | str) -> RouteDiff:
        """Delete the route to a prefix. If there is none, nothing changes."""
        return self._change("DELETE", protocol.route_path(str(dst)))

    def replace_routes(
        self, routes: Iterable[Route | str], expect_generation: int | None = None
    ) -> RouteDiff:
        """Replace the whole table in one step.

        Raises ControlError ``generation_mismatch`` if the table is not at ``expect_generation``.
        """
        from ..model import as_route

        body = protocol.dump({"routes": [as_route(route).to_json() for route in routes]})
        return self._replace(body, protocol.JSON_TYPE, expect_generation)

    add, put, delete, replace = add_route, put_route, delete_route, replace_routes  # former names

    def replace_text(self, body: bytes, expect_generation: int | None = None) -> RouteDiff:
        """Replace the whole table by the text of a route file; see ``replace``."""
        return self._replace(body, protocol.TEXT_TYPE, expect_generation)

    def stop(self, exit_seconds: float = EXIT_SECONDS) -> None:
        """Stop the forwarder. Return when its process has ended.

        If the process does not end, because it does more than run the forwarder, return
        ``exit_seconds`` after the end of the connection. If the process is not visible, for example
        because it is in another PID namespace, return at the end of the connection.
        """
        self.close()  # the end of a new connection shows that the forwarder has stopped
        with self._connection.handle() as sock:
            packed = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
            with _process(struct.unpack("3i", packed)[0]) as process:
                self._read(self._request("POST", protocol.STOP))
                try:
                    sock.recv(1)
                except TimeoutError:
                    raise NoForwarder(
                        f"the forwarder on {self.path} accepted the request but has not stopped"
                    ) from None
                except OSError:
                    pass  # connection reset: the forwarder has ended
                self.close()
                if process is not None:
                    select.select([process], [], [], exit_seconds)

    # The wire

    def _get(
        self, target: str, reduce: Callable[[dict[str, Any]], Any] | None = None
    ) -> dict[str, Any]:
        text = self._read(self._request("GET", target))
        answer: dict[str, Any] = json.loads(text, object_hook=reduce)
        return answer

    def _put(self, route: Route | str, headers: dict[str, str]) -> RouteDiff:
        from ..model import as_route

        values = as_route(route).to_json()
        path = protocol.route_path(str(values.pop("dst")))
        headers["Content-Type"] = protocol.JSON_TYPE
        return self._change("PUT", path, protocol.dump(values), headers)

    def _replace(self, body: bytes, content_type: str, expect: int | None) -> RouteDiff:
        headers = {"Content-Type": content_type}
        if expect is not None:
            headers["If-Match"] = protocol.format_generation(expect)
        if len(body) > protocol.MAX_TABLE_BODY:
            raise ControlError("too_large", f"the table is over {protocol.MAX_TABLE_BODY} bytes")
        return self._change("PUT", protocol.ROUTES, body, headers)

    def _change(
        self, method: str, path: str, body: bytes | None = None,
        headers: dict[str, str] | None = None,
    ) -> RouteDiff:
        from ..model import RouteDiff

        response = self._request(method, path, body, headers or {})
        return RouteDiff(**json.loads(self._read(response)))

    def _request(
        self, method: str, target: str, body: bytes | None = None,
        headers: dict[str, str] | None = None,
    ) -> http.client.HTTPResponse:
        """Send a request and read the head of its answer.

        If the server has closed the open connection, try again on a new one. This is safe, because
        every request can be repeated. Exception: a request that depends on a generation.
        """
        headers = headers or {}
        again = self._connection.sock is not None and "If-Match" not in headers
        try:
            response = self._try(method, target, body, headers)
        except (ConnectionError, http.client.HTTPException) as exc:
            self.close()
            if not again:
                raise self._no_answer(exc) from exc
            try:
                response = self._try(method, target, body, headers)
            except (ConnectionError, http.client.HTTPException) as exc_again:
                self.close()
                raise self._no_answer(exc_again) from exc_again
        if response.status >= 400:
            raise protocol.parse_error(response.status, self._read(response))
        return response

    def _try(
        self, method: str, target: str, body: bytes | None, headers: dict[str, str]
    ) -> http.client.HTTPResponse:
        try:
            try:
                self._connection.request(method, target, body, headers)
            except BrokenPipeError:
                # The server refused the request before it had read all of it. Its answer has the
                # reason.
                return self._connection.refused_answer(method)
            return self._connection.getresponse()
        except TimeoutError as exc:
            self.close()
            raise self._no_answer(exc) from exc

    def _read(self, response: http.client.HTTPResponse, amount: int | None = None) -> bytes:
        try:
            return response.read(amount)
        except (OSError, http.client.HTTPException) as exc:
            self.close()
            raise self._no_answer(exc) from exc

    def _lines(self, response: http.client.HTTPResponse) -> Iterator[bytes]:
        """Yield each line when it arrives.

        HTTPResponse.readline is not used: it treats a broken connection as the normal end.
        """
        rest = b""
        for piece in self._pieces(response):
            *lines, rest = (rest + piece).split(b"\n")
            yield from lines

    def _pieces(self, response: http.client.HTTPResponse) -> Iterator[bytes]:
        """Yield the body in pieces, each when it arrives."""
        try:
            while piece := response.read1(CHUNK):
                yield piece
        except (OSError, http.client.HTTPException) as exc:
            raise self._no_answer(exc) from exc

    def _no_answer(self, exc: Exception) -> NoForwarder:
        if isinstance(exc, TimeoutError):
            return NoForwarder(f"the forwarder on {self.path} does not answer")
        return NoForwarder(f"the forwarder on {self.path} closed the connection")


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str, timeout: float | None) -> None:
        super().__init__("localhost")
        self._path = path
        self._timeout = timeout

    def connect(self) -> None:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.settimeout(self._timeout)
        try:
            sock.connect(self._path)
        except OSError as exc:
            sock.close()
            raise _no_forwarder(self._path, exc) from exc
        self.sock = sock

    def handle(self) -> socket.socket:
        """Return a duplicate of the socket. The duplicate stays open after the last answer."""
        if self.sock is None:
            self.connect()
        handle: socket.socket = self.sock.dup()
        handle.settimeout(self._timeout)
        return handle

    def disable_timeout(self) -> None:
        self.sock.settimeout(None)

    def shut_down(self) -> None:
        if self.sock is not None:
            with suppress(OSError):  # already disconnected
                self.sock.shutdown(socket.SHUT_RDWR)

    def refused_answer(self, method: str) -> http.client.HTTPResponse:
        """Return the answer to a request that could not be sent completely."""
        response = self.response_class(self.sock, method=method)
        response.begin()
        self.close()  # the request is incomplete: no other request can follow
        return response


@contextmanager
def _process(pid: int) -> Iterator[int | None]:
    """Yield a descriptor that becomes readable when the process ends, or None if the process is not
    visible."""
    if pid == os.getpid():
        yield None
        return
    try:
        fd = os.pidfd_open(pid)
    except (OSError, ValueError):
        yield None
        return
    try:
        yield fd
    finally:
        os.close(fd)


def _no_forwarder(path: str, exc: OSError) -> NoForwarder:
    if isinstance(exc, PermissionError):
        return NoForwarder(
            f"{path}: permission denied: only root and the socket's group may use the forwarder"
        )
    if exc.errno in (errno.ENOENT, errno.ENOTDIR, errno.ECONNREFUSED):
        return NoForwarder(
            f"no forwarder answers on {path}: start one with `udptun forward ...`, or select its "
            "socket with --socket, UDPTUN_SOCKET or --instance"
        )
    return NoForwarder(f"no forwarder answers on {path}: {exc.strerror or exc}")
