"""Flannel's own control messages: 20 bytes each, over SOCK_SEQPACKET, without a reply.

flanneld's UDP backend sends these messages to its forwarder. Owns their format and both transports:
a socket path and an inherited descriptor. flanneld repeats SET_ROUTE at each lease renewal, so
every message is idempotent. Threading: control loop only. The messages of a connection are applied
in order, one at a time.

Source: flannel, pkg/backend/udp (the proxy's command struct).
"""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import logging
import select
import socket
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import DeviceError, FieldError, UdptunError
from ..model import MAX_PORT, Route
from ..text import os_reason
from .sockets import UnixListener, listen_unix

if TYPE_CHECKING:
    from collections.abc import Coroutine, Sequence
    from pathlib import Path

    from .surface import Controlled

log = logging.getLogger(__name__)

# cmd i32, dest_net 4 bytes, dest_net_len i32, next_hop_ip 4 bytes, next_hop_port 16 bits, 2 pad
# bytes. Numbers are in host byte order. flannel's port is signed, but ports over 32767 are valid.
MESSAGE = struct.Struct("=i4si4sHxx")
SET_ROUTE, DEL_ROUTE, STOP = 1, 2, 3

WARN_SECONDS = 5.0  # the shortest time between two log lines about bad messages


@dataclass(frozen=True, slots=True)
class SetRoute:
    route: Route


@dataclass(frozen=True, slots=True)
class DelRoute:
    dst: ipaddress.IPv4Network


@dataclass(frozen=True, slots=True)
class Stop:
    pass


def parse_message(data: bytes) -> SetRoute | DelRoute | Stop:
    """Parse one untrusted message. Raises FieldError."""
    if len(data) != MESSAGE.size:
        raise FieldError("length", len(data), f"{MESSAGE.size} bytes")
    cmd, net, net_len, hop, port = MESSAGE.unpack(data)
    if cmd == STOP:
        return Stop()
    if cmd not in (SET_ROUTE, DEL_ROUTE):
        raise FieldError("cmd", cmd, "1 (set route), 2 (delete route) or 3 (stop)")
    if not 0 <= net_len <= 32:
        raise FieldError("dest_net_len", net_len, "0 to 32")
    dst = ipaddress.IPv4Network((net, net_len), strict=False)
    if cmd == DEL_ROUTE:
        return DelRoute(dst)
    if port == 0:
        raise FieldError("next_hop_port", port, f"1 to {MAX_PORT}")
    return SetRoute(Route(dst, ipaddress.IPv4Address(hop), port))


class FlannelControl:
    """Applies flannel's messages, from any number of sockets, to ``forwarder`` until ``close``."""

    def __init__(self, forwarder: Controlled) -> None:
        self._forwarder = forwarder
        self._listeners: list[UnixListener] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._quiet_until = 0.0
        self._suppressed = 0

    @property
    def listeners(self) -> Sequence[UnixListener]:
        return self._listeners

    async def listen(self, path: Path, listener: UnixListener | None = None) -> None:
        """Accept connections at ``path``, or on a listening socket of an earlier process.

        Raises DeviceError in the cases of ``listen_unix``.
        """
        listener = listener or await listen_unix(path, socket.SOCK_SEQPACKET)
        self._listeners.append(listener)
        self._spawn(self._accept(listener), listener.sock)

    def adopt(self, fd: int) -> None:
        """Read messages from an inherited descriptor, which this object owns from now on."""
        try:
            sock = socket.socket(fileno=fd)
        except OSError as exc:
            raise DeviceError(
                exc.errno or errno.EBADF, f"flannel control fd {fd}: {os_reason(exc)}"
            ) from exc
        if (sock.family, sock.type) != (socket.AF_UNIX, socket.SOCK_SEQPACKET):
            sock.detach()
            raise DeviceError(
                errno.EPROTOTYPE, f"flannel control fd {fd} is not a Unix SOCK_SEQPACKET socket"
            )
        sock.set_inheritable(False)
        self._spawn(self._serve(sock, f"fd {fd}"), sock)

    async def close(self) -> None:
        for listener in self._listeners:
            listener.unlink()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._listeners.clear()

    def _spawn(self, work: Coroutine[None, None, None], sock: socket.socket) -> None:
        """Run ``work`` on ``sock``. Then close the socket, also if ``work`` never began."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(lambda _: sock.close())

    async def _accept(self, listener: UnixListener) -> None:
        while True:
            sock = await listener.accept(self._warn)
            if listener.may_connect(sock):
                self._spawn(self._serve(sock, str(listener.path)), sock)
            else:
                sock.close()
                self._warn(f"{listener.path}: refused a peer outside the socket's group")

    async def _serve(self, sock: socket.socket, name: str) -> None:
        loop = asyncio.get_running_loop()
        sock.setblocking(False)
        while True:
            try:
                data = await loop.sock_recv(sock, MESSAGE.size + 1)
            except OSError as exc:
                log.info("flannel control %s: %s", name, os_reason(exc))
                return
            if not data and _hung_up(sock):
                log.debug("flannel control %s: closed by the other side", name)
                return
            await self._apply(data, name)

    async def _apply(self, data: bytes, name: str) -> None:
        try:
            match parse_message(data):
                case SetRoute(route):
                    await self._forwarder.put_route(route)
                case DelRoute(dst):
                    await self._forwarder.delete_route(dst)
                case Stop():
                    log.info("flannel control %s: stop requested", name)
                    self._forwarder.request_stop()
        except UdptunError as exc:
            self._warn(f"{name}: message ignored: {exc}")
        except Exception:
            log.exception("flannel control %s: message failed", name)

    def _warn(self, what: str) -> None:
        """Log a warning, at most one per WARN_SECONDS."""
        now = asyncio.get_running_loop().time()
        if now < self._quiet_until:
            self._suppressed += 1
            return
        more = f" (and {self._suppressed} more)" if self._suppressed else ""
        log.warning("flannel control %s%s", what, more)
        self._quiet_until = now + WARN_SECONDS
        self._suppressed = 0


def _hung_up(sock: socket.socket) -> bool:
    """Return whether an empty read means the end of the connection.

    An empty SOCK_SEQPACKET message also causes an empty read.
    """
    poll = select.poll()
    poll.register(sock, select.POLLRDHUP)
    return bool(poll.poll(0))
