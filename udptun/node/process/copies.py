"""Copies of the forwarder's descriptors, for the next forwarder if this one is killed.

Owns the copies and the connection on which the forwarder sends them. While there are copies, the
TUN keeps its addresses and routes, and the kernel queues packets, also if the forwarder dies. Does
not depend on how a forwarder is started. One asyncio loop.
"""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

from ...takeover.channel import Channel, close_all
from ...takeover.message import DESCRIPTORS, OLDEST, VERSION, Hello, TakeOverError

log = logging.getLogger(__name__)


class Copies:
    """The copies of one forwarder, which hands itself over at the socket ``path``."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._named: dict[str, int] = {}
        self._task: asyncio.Task[None] | None = None

    def follow(self) -> None:
        """Get copies from the forwarder that runs now, in place of the present ones."""
        self._stop()
        self._task = asyncio.get_running_loop().create_task(self._follow())

    @property
    def held(self) -> bool:
        return bool(self._named)

    def take(self) -> dict[str, int]:
        """Return the copies, which the caller owns from now on."""
        self._stop()
        named, self._named = self._named, {}
        return named

    def close(self) -> None:
        """Keep nothing: the TUN ends with the forwarder."""
        close_all(self.take())

    def _stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            self._task = None

    async def _follow(self) -> None:
        try:
            channel = await Channel.connect(self._path)
        except OSError as error:  # a forwarder of an earlier version has no such socket
            log.debug("no copies of the forwarder's descriptors: %s", error)
            return
        try:
            await channel.send(Hello(want=DESCRIPTORS, oldest=OLDEST, newest=VERSION))
            while True:
                named = await channel.receive_descriptors()
                close_all(self._named)
                self._named = named
        except TakeOverError as error:  # the forwarder has ended, so the copies stay
            log.debug("the forwarder's descriptors: %s", error)
        finally:
            channel.close()
