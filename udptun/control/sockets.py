"""Unix socket files: create them with the final mode, protect them, remove only our own.

Owns three rules: the modes of files and directories, which of two forwarders gets a path, and which
clients may connect. Does not depend on the protocol. Threading: one loop. Changes no process-wide
state such as the umask, so other threads are not affected.
"""

from __future__ import annotations

import asyncio
import errno
import os
import secrets
import socket
import stat
import struct
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import DeviceError
from ..files import FileLock, make_directory
from ..text import os_reason

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

SOCKET_MODE = 0o660
BACKLOG = 128
ACCEPT_PAUSE = 0.5  # seconds to wait after a failed accept
LOCK_TRIES, LOCK_PAUSE = 100, 0.05  # a forwarder holds the lock for about a millisecond
SO_PEERGROUPS = 59  # Linux 4.13; missing in the socket module


class UnixListener:
    """A listening socket and its file.

    owns_file  ``unlink`` removes the file. False: the file belongs to another process, which
               listens on the same socket
    """

    def __init__(self, sock: socket.socket, path: Path, inode: tuple[int, int], gid: int) -> None:
        self.sock = sock
        self.path = path
        self.owns_file = True
        self._inode = inode
        self._gid = gid

    @property
    def fd(self) -> int:
        return self.sock.fileno()

    def may_connect(self, peer: socket.socket) -> bool:
        """Return whether ``peer`` is root, the forwarder's user, or in the socket file's group.

        The mode of the file has the same effect. This check still applies if the mode is changed to
        allow more users. A change of the file's group applies from the next connection on.
        """
        with suppress(OSError):
            found = self.path.stat()
            if (found.st_dev, found.st_ino) == self._inode:
                self._gid = found.st_gid
        uid, gid = peer_ids(peer)
        return uid in (0, os.geteuid()) or gid == self._gid or self._gid in _peer_groups(peer)

    async def accept(self, warn: Callable[[str], object]) -> socket.socket:
        """Return the next connection. If the kernel refuses it, for example because no descriptor
        is left, try again.

        warn  called with a sentence when the first try fails
        """
        loop, failed = asyncio.get_running_loop(), False
        while True:
            try:
                return (await loop.sock_accept(self.sock))[0]
            except OSError as exc:
                if not failed:
                    warn(f"{self.path}: accept: {os_reason(exc)}")
                failed = True
                await asyncio.sleep(ACCEPT_PAUSE)

    @classmethod
    def adopt(cls, fd: int, path: Path) -> UnixListener:
        """Use the socket that another process listens on. The file is that of the other process.
        Raises OSError."""
        sock = socket.socket(fileno=fd)
        try:
            sock.setblocking(False)
            found = path.stat()
        except BaseException:
            sock.close()
            raise
        listener = cls(sock, path, (found.st_dev, found.st_ino), found.st_gid)
        listener.owns_file = False
        return listener

    def unlink(self) -> None:
        """Remove the file unless it belongs to another socket now.

        Call this while the socket still listens. No other forwarder can take the path until then,
        so there is no race between the check and the removal.
        """
        if not self.owns_file:
            return
        with suppress(OSError):
            found = self.path.lstat()
            if (found.st_dev, found.st_ino) == self._inode:
                self.path.unlink()


async def listen_unix(
    path: Path, kind: socket.SocketKind, mode: int = SOCKET_MODE
) -> UnixListener:
    """Listen at ``path``. Replaces a stale socket. Refuses a live socket, and any other file.

    If several forwarders try the same path, exactly one succeeds: the check and the bind happen
    under a lock, and the socket listens before its file is visible.
    """
    with _explained(path):
        make_directory(path.parent)
        async with _locked(path):
            _refuse_occupied(path, kind)
            return _bind(path, kind, mode)


def refuse_occupied(path: Path, kind: socket.SocketKind) -> None:
    """Raise DeviceError if ``listen_unix`` would refuse ``path``. For an early check."""
    with _explained(path):
        _refuse_occupied(path, kind)


def _bind(path: Path, kind: socket.SocketKind, mode: int) -> UnixListener:
    """Bind to a temporary name, listen, and rename the file to ``path``.

    So ``path`` is either absent or a listening socket of this mode. On Linux a socket file gets the
    mode of the socket's inode, minus the umask. fchmod before bind therefore restricts the file
    from the start. chmod after bind restores the bits that the umask removed.
    """
    sock = socket.socket(socket.AF_UNIX, kind)
    hidden = path.with_name(f".{path.name}.{secrets.token_hex(2)}")
    try:
        sock.setblocking(False)
        os.fchmod(sock.fileno(), mode)
        sock.bind(str(hidden))
        try:
            hidden.chmod(mode)
            sock.listen(BACKLOG)
            made = hidden.stat()
            hidden.rename(path)
        except BaseException:
            hidden.unlink(missing_ok=True)
            raise
    except BaseException:
        sock.close()
        raise
    return UnixListener(sock, path, (made.st_dev, made.st_ino), made.st_gid)


def _refuse_occupied(path: Path, kind: socket.SocketKind) -> None:
    try:
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise DeviceError(errno.EEXIST, f"{path} exists and is not a socket: it stays as it is")
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX, kind) as probe:
        probe.setblocking(False)
        try:
            probe.connect(str(path))
        except (ConnectionRefusedError, FileNotFoundError):
            return  # stale: no process listens
        except OSError as exc:
            # EAGAIN (full backlog) and EPROTOTYPE (another type) mean that the socket is in use.
            if exc.errno not in (errno.EAGAIN, errno.EPROTOTYPE):
                raise
    raise DeviceError(
        errno.EADDRINUSE, f"{path} is in use: another process is listening on this socket"
    )


@asynccontextmanager
async def _locked(path: Path) -> AsyncIterator[None]:
    """Hold the lock of the socket ``path``.

    It is a file of its own: a lock on the directory could be taken by every user who can read it.
    """
    file = path.with_name(f".{path.name}.lock")
    for _ in range(LOCK_TRIES):
        if (lock := FileLock.take(file)) is not None:
            break
        await asyncio.sleep(LOCK_PAUSE)
    else:
        raise DeviceError(errno.EBUSY, f"{file} is locked by another process")
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except DeviceError:
        raise
    except OSError as exc:
        reason = exc.strerror or str(exc)  # a path over 107 bytes has no errno
        raise DeviceError(
            exc.errno or errno.EINVAL, f"cannot listen on {path}: {reason}"
        ) from exc


def peer_ids(peer: socket.socket) -> tuple[int, int]:
    """Return the user ID and the group ID of the process at the other end of a Unix socket."""
    packed = peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    _, uid, gid = struct.unpack("3i", packed)
    return uid, gid


def _peer_groups(peer: socket.socket) -> set[int]:
    """Return the peer's supplementary groups.

    Python limits getsockopt to 1024 bytes, which is 256 groups. If a peer has more groups, the
    kernel answers ERANGE, and only the peer's primary group counts.
    """
    try:
        packed = peer.getsockopt(socket.SOL_SOCKET, SO_PEERGROUPS, 1024)
    except OSError:
        return set()
    return set(struct.unpack(f"{len(packed) // 4}I", packed))
