"""Take over from a running forwarder.

Owns the connection to it, the received descriptors until a part of the new forwarder adopts them,
and the order of a take-over on this side. docs/takeover.md describes the messages. If ``close``
closes the connection before ``done``, or this process ends, the running forwarder continues.
Threading: control loop only.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Self

from .._version import __version__
from ..build import build_id
from ..control.sockets import UnixListener
from ..device.tun import Tun
from ..files import FileLock
from ..model import Endpoint, Peer
from ..net.udp import UdpSocket
from ..takeover import document
from ..takeover.channel import Channel, Ended, close_all, read_document
from ..takeover.document import CountersDocument, Device, Socket, StateDocument
from ..takeover.kept import tun_name, udp_name
from ..takeover.message import (
    EVERYTHING,
    OLDEST,
    VERSION,
    Done,
    Hello,
    Ready,
    Refused,
    State,
    Stopped,
    TakeOverError,
    from_json,
)
from ..text import os_reason
from .config import ForwarderConfig
from .giving import network_namespace

log = logging.getLogger(__name__)

ANSWER_SECONDS = 30.0  # limit for each message of the running forwarder


class Taking:
    """A take-over in progress. If ``close`` ends it before ``done``, the other forwarder continues.

    state   the message ``state`` of the other forwarder
    having  the document that came with this message: what the other forwarder has
    """

    def __init__(
        self, channel: Channel, descriptors: dict[str, int], state: State, having: StateDocument
    ) -> None:
        self.state, self.having = state, having
        self._channel = channel
        self._descriptors = descriptors
        self._batons: list[int] = []
        self._files: dict[str, UnixListener | FileLock] = {}

    @classmethod
    async def begin(cls, path: Path, config: ForwarderConfig) -> Self | None:
        """Ask the forwarder at ``path`` for everything. Return None if no forwarder answers there.

        Raises TakeOverError, OSError.
        """
        try:
            channel = await Channel.connect(path)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ECONNREFUSED):
                return None
            raise TakeOverError(f"connecting to {path}: {os_reason(error)}") from None
        descriptors: dict[str, int] = {}
        try:
            await channel.send(Hello(
                want=EVERYTHING, oldest=OLDEST, newest=VERSION, program=__version__,
                build=build_id(), pid=os.getpid(), namespace=network_namespace(),
                options=config.agreed_options(),
            ))
            async with asyncio.timeout(ANSWER_SECONDS):
                descriptors = await channel.receive_descriptors()
                state, fds = await channel.receive(State)
            having = document.load(StateDocument, read_document(fds[0], state.size))
        except BaseException as error:
            close_all(descriptors)
            channel.close()
            if isinstance(error, TimeoutError):
                raise TakeOverError(f"the forwarder at {path} does not answer") from None
            raise
        return cls(channel, descriptors, state, having)

    def close(self) -> None:
        unused, self._descriptors = self._descriptors, {}
        close_all(unused)
        batons, self._batons = self._batons, []
        for baton in batons:
            os.close(baton)
        self._channel.close()

    # -- parts of the new forwarder ---------------------------------------------------------------

    def tun(self) -> Tun:
        """Return the TUN device. Raises DeviceError, TakeOverError."""
        device = from_json(Device, self.having.device)
        fds: list[int] = []
        while (fd := self._descriptors.pop(tun_name(len(fds)), None)) is not None:
            fds.append(fd)
        try:
            return Tun.adopt(
                device.name, tuple(fds), device.vnet_hdr, frozenset(device.features), device.off)
        except BaseException:
            close_all({str(fd): fd for fd in fds})
            raise

    def sockets(self, listen: Sequence[Endpoint]) -> list[UdpSocket]:
        """Return the UDP sockets, ordered by worker. Raises DeviceError, TakeOverError."""
        opened: list[UdpSocket] = []
        for at, values in enumerate(self.having.sockets):
            had, endpoint = from_json(Socket, values), listen[at % len(listen)]
            name = udp_name(at // len(listen), endpoint.address.version)
            fd = self.descriptor(name)
            if fd is None:
                raise TakeOverError(f"the running forwarder has not sent the socket {name}")
            opened.append(UdpSocket.adopt(fd, endpoint, frozenset(had.features), had.off))
        return opened

    def descriptor(self, name: str) -> int | None:
        """Return a descriptor, which the caller owns from now on; None: there is none."""
        return self._descriptors.pop(name, None)

    def listener(self, name: str, path: Path) -> UnixListener | None:
        """Return the other forwarder's listening socket if it has one at this path. Until ``done``,
        the file of the socket belongs to the other forwarder."""
        fd = self._of_file(name, path)
        if fd is None:
            return None
        try:
            listener = UnixListener.adopt(fd, path)
        except OSError as error:  # its file was removed just now
            log.warning("the listening socket %s cannot be taken over: %s", path, error)
            return None
        self._files[name] = listener
        return listener

    def lock(self, name: str, path: Path) -> FileLock | None:
        """Return the other forwarder's lock if it has one of this file. Until ``done``, the file
        belongs to the other forwarder."""
        fd = self._of_file(name, path)
        if fd is None:
            return None
        lock = self._files[name] = FileLock(path, fd, owns_file=False)
        return lock

    def _of_file(self, name: str, path: Path) -> int | None:
        fd = self.descriptor(name)
        if fd is not None and self.having.paths.get(name) != str(path):
            os.close(fd)
            return None
        return fd

    def path_mtus(self) -> list[Peer]:
        return [document.peer_from_json(values) for values in self.having.peers]

    # -- the exchange -----------------------------------------------------------------------------

    def batons(self, workers_n: int) -> list[int]:
        """Make an eventfd for each worker. The worker begins when it is readable."""
        flags = os.EFD_NONBLOCK | os.EFD_CLOEXEC
        self._batons = [os.eventfd(0, flags) for _ in range(workers_n)]
        return self._batons

    async def go(self) -> CountersDocument:
        """Stop the other forwarder's workers and start ours. Return its counters.

        If the other forwarder ends during this, our workers start nevertheless, and its counters
        are lost. Raises TakeOverError.
        """
        await self._channel.send(Ready(), self._batons)
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                stopped, fds = await self._channel.receive(Stopped)
        except Ended:
            log.warning("the running forwarder ended during the take-over: its counters are lost")
            for baton in self._batons:
                os.eventfd_write(baton, 1)
            return CountersDocument()
        except TimeoutError:
            raise TakeOverError("the running forwarder did not stop its workers") from None
        return document.load(CountersDocument, read_document(fds[0], stopped.size))

    async def done(self) -> None:
        """Confirm the take-over, and wait until the other forwarder closes the connection.

        Raises TakeOverError if it did not wait for the confirmation, and forwards again.
        """
        with suppress(Ended):  # it has ended already, or has not waited
            await self._channel.send(Done(taken=list(self._files)))
        for _ in range(2):  # the error of a broken connection comes before a waiting message
            try:
                async with asyncio.timeout(ANSWER_SECONDS):
                    refused, _ = await self._channel.receive(Refused)
            except Ended:
                continue
            except TimeoutError:  # it hangs
                break
            raise TakeOverError(f"the running forwarder continues: {refused.reason}")
        for each in self._files.values():
            each.owns_file = True
