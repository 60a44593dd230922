"""The socket on which a standby process waits until it is needed.

The process shuts down its sending side when it is loaded. One message lets it begin. The message
has the names of the kept descriptors (``kept``), and carries the descriptors. The end of the
connection lets the process end. Owns the form of this message. Threading: any thread; ``wait`` and
``wait_loaded`` block.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping

from .kept import is_device

NAMES_MAX = 1 << 14  # bytes
KEPT_MAX = 253  # SCM_MAX_FD of the kernel


def waiting_pair() -> tuple[socket.socket, socket.socket]:
    """Return our end, and the end on which the standby process waits."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def wait_loaded(sock: socket.socket) -> None:
    """Wait until the process at the other end is loaded, or has ended."""
    sock.recv(1)


def begin(sock: socket.socket, kept: Mapping[str, int]) -> None:
    """Let the process at the other end begin. Raises OSError."""
    names = " ".join(kept).encode() or b" "  # an empty message would be the end
    socket.send_fds(sock, [names], list(kept.values()), socket.MSG_NOSIGNAL)


def wait(sock: socket.socket) -> dict[str, int] | None:
    """Wait for ``begin``. Return the kept descriptors by name; None: this process is not needed."""
    try:
        # This shows that we wait. A message would have to be read before the other end may close.
        sock.shutdown(socket.SHUT_WR)
        names, fds, _, _ = socket.recv_fds(sock, NAMES_MAX, KEPT_MAX)
    except OSError:
        return None
    if not names:
        return None
    named = dict(zip(names.decode("utf-8", "replace").split(), fds, strict=False))
    kept = {name: fd for name, fd in named.items() if is_device(name)}
    for fd in set(fds) - set(kept.values()):
        os.close(fd)
    for fd in kept.values():
        os.set_inheritable(fd, False)  # recv_fds of Python 3.11 ignores MSG_CMSG_CLOEXEC
    return kept
