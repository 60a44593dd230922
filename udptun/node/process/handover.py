"""Hand the node from one daemon to another, for example from an old pod to its successor.

The new daemon asks the old one at its socket. The old one ends its work, as after SIGTERM: the
forwarder, the routes and the lease stay. It releases its locks, and stays as an idle process until
the new one has ended. If the old process ended earlier, a container runtime would start its
container again beside the new daemon. Owns the request and the waiting. One asyncio loop.
"""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

from ...control.client import ControlClient
from ...control.protocol import NODE_SOCKET
from ...errors import ControlError, NoForwarder, UdptunError
from ...instance import Instance

log = logging.getLogger(__name__)

ANSWER_SECONDS = 10.0
RELEASE_SECONDS = 30.0  # from the answer until the old daemon has released its locks
POLL_SECONDS = 0.05
LOOK_SECONDS = 2.0  # between two checks whether the successor has ended


class NoHandOver(UdptunError):
    """The running daemon does not hand over the node."""


async def take_over(instance: Instance, control: Path) -> None:
    """Let the running daemon of this instance hand over the node, and wait until it has done so.
    Return at once if none is running. Raises NoHandOver."""
    lock = instance.lock("node")
    if lock.is_free():
        return
    path = control.with_name(NODE_SOCKET)
    pid = await asyncio.to_thread(_ask, path)
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
    """Send the request. Return the process ID of the daemon. Raises NoHandOver."""
    try:
        with ControlClient(str(path), ANSWER_SECONDS) as client:
            return client.hand_over()
    except NoForwarder:
        raise NoHandOver(f"the running daemon does not answer at {path}") from None
    except (ControlError, ValueError, KeyError, TypeError) as error:
        raise NoHandOver(
            f"the running daemon cannot hand over, stop it first ({path}: {error})") from None
