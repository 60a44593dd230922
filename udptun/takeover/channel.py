"""The socket of a take-over: messages, the descriptors that they carry, and documents.

Owns the sending and receiving on one SOCK_SEQPACKET connection, so that a message arrives whole and
with its descriptors. A value that is too large for a message is in a file without a name
(memfd_create(2)), whose descriptor is sent. Does not depend on what the messages mean. Threading:
one asyncio loop.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import socket
import struct
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Self, TypeVar

from ..text import os_reason
from .message import (
    DESCRIPTORS_MAX,
    MESSAGE_MAX,
    Descriptors,
    Message,
    Refused,
    TakeOverError,
    decode,
    encode,
)

DOCUMENT_MAX = 1 << 30  # bytes
SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL

M = TypeVar("M", bound=Message)


class Ended(TakeOverError):
    """The other process has closed the connection, or has ended."""


class Channel:
    """One connection. After ``close``, the kernel closes the descriptors that were not read."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._sock = sock

    @classmethod
    async def connect(cls, path: Path) -> Self:
        """Connect to the forwarder at ``path``. Raises OSError."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        try:
            sock.setblocking(False)
            sock.connect(str(path))  # a Unix socket connects at once, or never
        except BaseException:
            sock.close()
            raise
        return cls(sock)

    @property
    def peer_uid(self) -> int:
        packed = self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        uid: int = struct.unpack("3i", packed)[1]
        return uid

    def close(self) -> None:
        self._sock.close()

    # -- messages ---------------------------------------------------------------------------------

    async def send(self, message: Message, fds: Sequence[int] = ()) -> None:
        """Raises Ended."""
        data = encode(message)
        if len(data) > MESSAGE_MAX:
            raise TakeOverError(f"the message {message.kind} has {len(data)} bytes")
        while True:
            try:
                socket.send_fds(self._sock, [data], fds, socket.MSG_NOSIGNAL)
                return
            except BlockingIOError:
                await self._event(asyncio.get_running_loop().add_writer,
                                  asyncio.get_running_loop().remove_writer)
            except OSError as error:
                raise Ended(f"the connection is broken: {os_reason(error)}") from None

    async def receive(self, kind: type[M]) -> tuple[M, list[int]]:
        """Return the next message, which must be of this kind, and its descriptors.

        The caller owns the descriptors. A message can carry any descriptors: those that do not
        belong to it are closed. Raises Ended, TakeOverError (also for ``Refused``).
        """
        while True:
            message, fds = await self._receive()
            least, most = (0, 0) if message is None else message.carries
            for fd in fds[most:]:
                os.close(fd)
            del fds[most:]
            if isinstance(message, kind):
                if len(fds) < least:
                    raise TakeOverError(f"the message {kind.kind} carries no descriptor")
                return message, fds
            for fd in fds:
                os.close(fd)
            if isinstance(message, Refused):
                raise TakeOverError(message.reason)
            if message is not None:  # None: a message of a newer version; it is ignored
                raise TakeOverError(f"received the message {message.kind}, not {kind.kind}")

    async def _receive(self) -> tuple[Message | None, list[int]]:
        while True:
            try:
                data, fds, flags, _ = socket.recv_fds(
                    self._sock, MESSAGE_MAX + 1, DESCRIPTORS_MAX)
                for fd in fds:
                    os.set_inheritable(fd, False)  # Python 3.11 ignores MSG_CMSG_CLOEXEC here
                break
            except BlockingIOError:
                await self._event(asyncio.get_running_loop().add_reader,
                                  asyncio.get_running_loop().remove_reader)
            except OSError as error:
                raise Ended(f"the connection is broken: {os_reason(error)}") from None
        if not data:
            raise Ended("the other forwarder has ended, or has closed the connection")
        try:
            if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
                raise TakeOverError(
                    "a message arrived without all of its bytes or descriptors: the limit of open "
                    "files (LimitNOFILE=, ulimit -n) may be too low")
            return decode(data), fds
        except BaseException:
            for fd in fds:
                os.close(fd)
            raise

    async def _event(
        self, add: Callable[..., object], remove: Callable[[int], object]
    ) -> None:
        ready = asyncio.get_running_loop().create_future()

        def set_ready() -> None:
            if not ready.done():
                ready.set_result(None)

        add(self._sock.fileno(), set_ready)
        try:
            await ready
        finally:
            remove(self._sock.fileno())

    # -- descriptors ------------------------------------------------------------------------------

    async def send_descriptors(self, named: dict[str, int]) -> None:
        """Send any number of descriptors. They stay open here."""
        names = list(named)
        for at in range(0, max(len(names), 1), DESCRIPTORS_MAX):
            part = names[at : at + DESCRIPTORS_MAX]
            more = at + DESCRIPTORS_MAX < len(names)
            await self.send(Descriptors(part, more), [named[name] for name in part])

    async def receive_descriptors(self) -> dict[str, int]:
        """The caller owns the descriptors."""
        named: dict[str, int] = {}
        try:
            while True:
                message, fds = await self.receive(Descriptors)
                fresh = dict(zip(message.names, fds, strict=False))
                if len(message.names) != len(fds) or len(fresh | named) != len(fds) + len(named):
                    for fd in fds:
                        os.close(fd)
                    raise TakeOverError(f"{len(message.names)} names for {len(fds)} descriptors: "
                                        "expected one for each, and no name twice")
                named |= fresh
                if not message.more:
                    return named
        except BaseException:
            close_all(named)
            raise


def close_all(named: dict[str, int]) -> None:
    for fd in named.values():
        with suppress(OSError):
            os.close(fd)


def write_document(text: bytes) -> int:
    """Return the descriptor of a file without a name. Nobody can change the file afterwards."""
    fd = os.memfd_create("udptun-take-over", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        left = memoryview(text)
        while left:
            left = left[os.write(fd, left) :]
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS)
    except BaseException:
        os.close(fd)
        raise
    return fd


def read_document(fd: int, size: int) -> bytes:
    """Read and close a document. Raises TakeOverError, OSError."""
    try:
        if not 0 <= size <= DOCUMENT_MAX or os.fstat(fd).st_size != size:
            raise TakeOverError(f"a document of {size} bytes: it has {os.fstat(fd).st_size}")
        parts, at = [], 0
        while at < size and (part := os.pread(fd, size - at, at)):
            parts.append(part)
            at += len(part)
        return b"".join(parts)
    finally:
        os.close(fd)
