"""Hand the node from one daemon to another, for example from an old pod to its successor.

The new daemon asks the old one at its socket. The old one ends its work, as after SIGTERM: the
forwarder, the routes and the lease stay. It releases its locks, and stays as an idle process until
the new one has ended. If a container runtime then starts it again, the node has a daemon in any
case. Owns the request and the waiting. One asyncio loop.
"""

from __future__ import annotations

import asyncio
import json
import logging
import socket
from pathlib import Path

from ...control.protocol import HAND_OVER, NODE_SOCKET
from ...errors import UdptunError
from ...instance import Instance

log = logging.getLogger(__name__)

ANSWER_SECONDS = 10.0
RELEASE_SECONDS = 30.0  # from the answer until the old daemon has released its locks
POLL_SECONDS = 0.05
LOOK_SECONDS = 2.0  # between two checks whether the successor has ended
ANSWER_MAX = 1 << 16


class NoHandOver(UdptunError):
    """The running daemon does not hand over the node."""


async def take_over(instance: Instance, control: Path) -> None:
    """Let the daemon of this instance that runs hand over, and wait until it has. Return at once
    if none runs. Raises NoHandOver, OSError."""
    lock = instance.lock("node")
    if lock.is_free():
        return
    path = control.with_name(NODE_SOCKET)
    try:
        pid = await asyncio.to_thread(_ask, path)
    except OSError as error:
        raise NoHandOver(f"the running daemon does not answer at {path}: {error}") from None
    log.info("the daemon with the process ID %d hands over", pid)
    try:
        async with asyncio.timeout(RELEASE_SECONDS):
            while not lock.is_free():
                await asyncio.sleep(POLL_SECONDS)
    except TimeoutError:
        raise NoHandOver("the running daemon did not end its work") from None


async def wait_for_successor(instance: Instance) -> None:
    """Wait until another daemon has begun, and has ended. Also return if none begins within
    RELEASE_SECONDS."""
    lock = instance.lock("node")
    try:
        async with asyncio.timeout(RELEASE_SECONDS):
            while lock.is_free():
                await asyncio.sleep(POLL_SECONDS)
    except TimeoutError:
        log.warning("no other daemon has begun")
        return
    log.info("another daemon has taken over; waiting for its end")
    while not lock.is_free():
        await asyncio.sleep(LOOK_SECONDS)


def _ask(path: Path) -> int:
    """Send the request. Return the process ID of the daemon. Raises OSError, NoHandOver."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(ANSWER_SECONDS)
        sock.connect(str(path))
        sock.sendall(f"POST {HAND_OVER} HTTP/1.1\r\nHost: udptun\r\n\r\n".encode())
        answer = b""
        while len(answer) < ANSWER_MAX and (part := sock.recv(ANSWER_MAX)):
            answer += part
    head, _, body = answer.partition(b"\r\n\r\n")
    status = head.split(b"\r\n")[0].split(b" ")[1:2]
    try:
        if status == [b"200"]:
            return int(json.loads(body)["pid"])
    except (ValueError, KeyError, TypeError):
        pass
    raise NoHandOver(f"the running daemon cannot hand over, stop it first ({path}: "
                     f"{(b' '.join(status)).decode('ascii', 'replace')[:20] or 'no answer'})")
