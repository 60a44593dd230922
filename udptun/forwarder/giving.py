"""Hand this forwarder over to another process that asks for it at the take-over socket.

Owns the socket, and the order of a take-over on this side: hold back changes of the routes, send
descriptors and state, wait until the other forwarder is ready, stop the workers, send the counters,
and end. If anything fails before the other forwarder confirms, the workers continue. A process can
also ask for copies of the descriptors only. docs/takeover.md describes the messages. Does not
depend on how the parts of a forwarder are opened. Threading: control loop only.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .. import _core
from .._version import __version__
from ..build import build_id
from ..control.events import EventHub
from ..control.sockets import UnixListener, listen_unix
from ..device.offload import Capabilities
from ..device.tun import Tun
from ..errors import UdptunError
from ..files import FileLock
from ..net.udp import UdpSocket
from ..takeover import document
from ..takeover.channel import Channel, Ended, write_document
from ..takeover.document import CountersDocument, Device, Socket, StateDocument
from ..takeover.kept import tun_name, udp_name
from ..takeover.message import (
    DESCRIPTORS,
    Done,
    Hello,
    Ready,
    Refused,
    State,
    Stopped,
    TakeOverError,
    agree,
)
from .config import ForwarderConfig
from .express import Express
from .probes import Probes
from .routes import Routes
from .view import View
from .workers import Workers

log = logging.getLogger(__name__)

MODE = 0o600
# names of descriptors that are not of the device
LOCK, STATE_LOCK, CONTROL, TAKEOVER = "lock", "state-lock", "control", "takeover"
FLANNEL, FLANNEL_FD = "flannel", "flannel-fd"
SCRAPES = "metrics"

WithFile = UnixListener | FileLock  # each has fd, path and owns_file
HELLO_SECONDS = 5.0  # limit for the first message of a client
DONE_SECONDS = 10.0  # limit for its confirmation; until then, only the new forwarder forwards
READY_SECONDS = 30.0  # limit for the new forwarder to get ready; routes cannot change until then


def network_namespace() -> int:
    return Path("/proc/thread-self/ns/net").stat().st_ino


@dataclass(frozen=True, slots=True)
class Parts:
    """The parts of a running forwarder.

    sockets    in the order of the workers, and for each worker in the order of ``config.listen``
    files      the listening sockets and locks by name
    others     further descriptors by name
    express    its counters stay in maps, which are handed over
    handed_over  called when another process has taken over. The other process then owns the files
                 that it uses
    """

    config: ForwarderConfig
    tun: Tun
    sockets: list[UdpSocket]
    core: _core.Core
    routes: Routes
    workers: Workers
    probes: Probes
    view: View
    capabilities: Capabilities
    events: EventHub
    files: Callable[[], Mapping[str, WithFile]]
    others: Callable[[], Mapping[str, int]]
    handed_over: Callable[[], None]
    express: Express

    def descriptors(self) -> dict[str, int]:
        """Return all descriptors, by name."""
        files = {name: each.fd for name, each in self.files().items()}
        return self.device_descriptors() | files | dict(self.others())

    def kept_descriptors(self) -> dict[str, int]:
        """Return the descriptors of the TUN and the UDP sockets, by the names under which another
        process keeps copies."""
        mark = self.config.fingerprint
        return {f"{name}.{mark}": fd for name, fd in self.device_descriptors().items()}

    def device_descriptors(self) -> dict[str, int]:
        """Return the descriptors of the TUN and the UDP sockets, by name."""
        named = {tun_name(index): fd for index, fd in enumerate(self.tun.fds)}
        per_worker = len(self.config.listen)
        for at, opened in enumerate(self.sockets):
            named[udp_name(at // per_worker, opened.endpoint.address.version)] = opened.fd
        return named


class Giver:
    """Answers at the take-over socket from ``start`` to ``close``.

    listener  the listening socket of the earlier forwarder at this path; None: create a socket
    """

    def __init__(self, path: Path, parts: Parts, listener: UnixListener | None = None) -> None:
        self.path = path
        self._parts = parts
        self._listener = listener
        self._tasks: set[asyncio.Task[None]] = set()
        self._one = asyncio.Lock()
        self.successor: int | None = None  # the process that has taken over
        self._keepers: set[Channel] = set()  # of the processes that keep copies

    @property
    def listener(self) -> UnixListener | None:
        return self._listener

    async def start(self) -> None:
        """Raises DeviceError."""
        if self._listener is None:
            self._listener = await listen_unix(self.path, socket.SOCK_SEQPACKET, MODE)
        self._spawn(self._accept(self._listener))

    async def close(self) -> None:
        if self._listener is not None:
            self._listener.unlink()
        for task in self._tasks - {asyncio.current_task()}:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._listener is not None:
            self._listener.sock.close()

    def renew_copies(self) -> None:
        """Send the descriptors again to the processes that keep copies, because they changed."""
        for channel in self._keepers:
            self._spawn(self._send_copies(channel))

    async def _send_copies(self, channel: Channel) -> None:
        try:
            await channel.send_descriptors(self._parts.kept_descriptors())
        except TakeOverError as error:
            log.debug("the copies of the descriptors are not renewed: %s", error)

    def _spawn(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _accept(self, listener: UnixListener) -> None:
        while True:
            self._spawn(self._serve(Channel(await listener.accept(log.warning))))

    async def _serve(self, channel: Channel) -> None:
        try:
            if channel.peer_uid not in (0, os.geteuid()):
                raise TakeOverError("only root and the user of the forwarder may take over")
            async with asyncio.timeout(HELLO_SECONDS):
                hello, _ = await channel.receive(Hello)
            if hello.want == DESCRIPTORS:
                await self._lend(channel)
            elif self._one.locked():
                raise TakeOverError("another take-over is in progress")
            else:
                async with self._one:
                    await self._give(channel, hello)
        except Ended as error:
            log.debug("take-over: %s", error)
        except (UdptunError, OSError, TimeoutError) as error:
            log.warning("a take-over has failed, this forwarder continues: %s", error or "time-out")
            await _refuse(channel, str(error) or "it took too long")
        finally:
            self._keepers.discard(channel)
            channel.close()

    # -- copies -----------------------------------------------------------------------------------

    async def _lend(self, channel: Channel) -> None:
        """Let a process keep copies of the descriptors until it closes the connection."""
        await channel.send_descriptors(self._parts.kept_descriptors())
        self._keepers.add(channel)
        await channel.receive(Done)

    # -- a take-over ------------------------------------------------------------------------------

    async def _give(self, channel: Channel, hello: Hello) -> None:
        parts = self._parts
        version = agree(hello.oldest, hello.newest)
        _check_agreement(parts, hello)
        log.info("process %d, udptun %s (build %s), takes over", hello.pid, hello.program,
                 hello.build or "unknown")
        async with parts.routes.frozen() as table:
            await channel.send_descriptors(parts.descriptors())
            text = document.dump(self._having(table))
            state = State(
                version=version, program=__version__, build=build_id(), pid=os.getpid(),
                size=len(text))
            await _send_document(channel, state, text)
            async with asyncio.timeout(READY_SECONDS):
                # Batons: one eventfd for each worker, to which it writes after its last turn.
                _, batons = await channel.receive(Ready)
            try:
                done = await self._stop(channel, batons)
            finally:
                for baton in batons:
                    os.close(baton)
            parts.routes.hand_over()
        for name, each in parts.files().items():
            each.owns_file = name not in done.taken
        self.successor = hello.pid
        log.info("process %d has taken over", hello.pid)
        parts.handed_over()

    async def _stop(self, channel: Channel, batons: list[int]) -> Done:
        """Stop the workers, send the counters, and return the confirmation. If this fails, let the
        workers go on, and raise."""
        parts = self._parts
        if len(batons) != parts.config.workers_n:
            raise TakeOverError(f"{len(batons)} eventfds for {parts.config.workers_n} workers")
        parts.workers.hand_over(batons)
        try:
            await asyncio.shield(asyncio.to_thread(parts.workers.finish_hand_over))
            parts.probes.take()
            parts.probes.close()
            text = document.dump(self._counted())
            await _send_document(channel, Stopped(size=len(text)), text)
            return await _confirmation(channel)
        except BaseException:
            parts.workers.go_on()
            parts.probes.start()
            raise

    def _having(self, table: bytes) -> StateDocument:
        parts = self._parts
        tun = parts.tun
        lost = {name: cause for name, cause in parts.capabilities.off.items()
                if name in parts.capabilities.found}
        return StateDocument(
            generation=parts.routes.generation, mtu=parts.view.mtu, off=lost,
            device=asdict(Device(
                name=tun.name, vnet_hdr=tun.vnet_hdr, features=sorted(tun.features), off=tun.off)),
            sockets=[
                asdict(Socket(endpoint=str(opened.endpoint), features=sorted(opened.features),
                              off=opened.off))
                for opened in parts.sockets
            ],
            routes=table.decode(),
            peers=[document.peer_to_json(peer) for peer in parts.core.peers() if peer.path_mtu_ns],
            paths={name: str(each.path) for name, each in parts.files().items()},
        )

    def _counted(self) -> CountersDocument:
        parts = self._parts
        parts.express.read()
        peers = parts.core.peers()
        return CountersDocument(
            packets=parts.core.packets(), drops=[list(row) for row in parts.core.drops() if row[2]],
            peer_errors=parts.core.peer_errors(),
            workers=parts.workers.counters(),
            peers=[document.peer_to_json(peer) for peer in peers],
            probes=parts.probes.measured(), probe_counts=parts.probes.counters()["probes"],
            events=list(parts.events.recent),
            gone=document.gone(parts.core.transferred(), peers),
            send_errors=parts.view.send_errors(), takeovers_n=parts.view.takeovers_n,
            **parts.express.counted(),
        )


def _check_agreement(parts: Parts, hello: Hello) -> None:
    """Raise TakeOverError if the other forwarder has other options than this one."""
    if hello.namespace != network_namespace():
        raise TakeOverError("the other forwarder is in another network namespace")
    own = parts.config.agreed_options()
    own["tun"] = parts.tun.name if hello.options.get("tun") == parts.tun.name else own["tun"]
    for name in own.keys() & hello.options.keys():
        if own[name] != hello.options[name]:
            raise TakeOverError(
                f"--{name}: {hello.options[name]}: the running forwarder has {own[name]}; to change"
                " this option, restart the forwarder"
            )


async def _confirmation(channel: Channel) -> Done:
    """Raises TakeOverError if the new forwarder hangs, for example in a frozen container."""
    try:
        async with asyncio.timeout(DONE_SECONDS):
            done, _ = await channel.receive(Done)
    except TimeoutError:
        raise TakeOverError(f"no confirmation within {DONE_SECONDS:g} s") from None
    return done


async def _send_document(channel: Channel, message: State | Stopped, text: bytes) -> None:
    fd = write_document(text)
    try:
        await channel.send(message, [fd])
    finally:
        os.close(fd)


async def _refuse(channel: Channel, reason: str) -> None:
    try:
        await channel.send(Refused(reason))
    except TakeOverError as error:
        log.debug("take-over: %s", error)
