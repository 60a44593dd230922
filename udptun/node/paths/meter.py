"""Probe many peers from one socket: the part that all kinds of probes have in common.

Owns the socket, the timer for the next probe, and one ``Prober`` with the state of each path.
Subclasses build and parse the messages. A socket that cannot be opened, or whose device was
removed, is opened again at the next ``check``. If the device or its address is missing, the path
does not work, so each probe fails until then. With any other cause, for example another program
that uses the port, the path may work: it is not measured, and all states are unknown. Runs on the
daemon's loop; no method waits.
"""

from __future__ import annotations

import asyncio
import errno
import socket
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from typing import Any, ClassVar

from ...model import IPNetwork
from ...probe.prober import Prober, Request
from ...probe.state import UNREACHABLE, PathState
from ...text import os_reason

RECEIVE_LEN = 65536  # the largest message
BATCH_SECONDS = 0.05  # between two sends: probes, and so their answers, come in small batches
RECEIVE_N = 64  # messages per wake-up, so that other work of the loop is not delayed
# After this many probes of a batch, the answers are read, to measure the round trips well.
READ_AFTER = 4
BUFFER_LEN = 1 << 20  # of the socket: the answers of some hundred full-size probes

# The socket is of no use any more: its device or its address is gone, or this process lacks
# a privilege.
_BROKEN = frozenset({
    errno.ENODEV, errno.ENXIO, errno.EADDRNOTAVAIL, errno.EBADF, errno.EPERM, errno.EACCES})

# The device or its address is gone, so the path carries no packets.
_GONE = frozenset({errno.ENODEV, errno.ENXIO, errno.EADDRNOTAVAIL})


class Meter(ABC):
    """Probes peers, given by subnet, and reports the subnets whose state has changed.

    follows_route  True: the probes take whichever path carries the packets; False: always one path
    able           False: nothing can be measured, or ``check`` was not called yet
    error          why there is no socket; "" if there is one
    changed        is called with the subnets whose state has changed, and with all subnets if
                   ``able`` has changed
    """

    follows_route: ClassVar[bool] = False

    def __init__(self, changed: Callable[[list[IPNetwork]], None]) -> None:
        # By the text of the subnet's base address, which is the peer's address. A network as the
        # key would cost more than all the rest, because Python computes its hash at each look-up.
        self.prober: Prober[str] = Prober(time.monotonic)
        self._subnets: dict[str, IPNetwork] = {}
        self.able = False  # no probe is sent before the first ``check``
        self.error = "not opened yet"
        self._sent_n = 0  # messages that the kernel has accepted
        self._sending = False
        self._changed = changed
        self._socket: socket.socket | None = None
        self._errno = errno.ENODEV  # of each probe while there is no socket
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = self._ran_at = 0.0

    # -- the peers --------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[IPNetwork]:
        return iter(self._subnets.values())

    def state(self, subnet: IPNetwork) -> PathState | None:
        """Return what was measured of the path to this subnet; None: it is not probed."""
        return self.prober.get(_key(subnet))

    def sent_at(self, subnet: IPNetwork) -> float:
        """Return when we last sent to the peer, a request or a reply; 0: it is not probed."""
        state = self.prober.get(_key(subnet))
        return 0.0 if state is None else state.last_sent

    def sent_n(self) -> int | None:
        """Return how many messages the kernel has accepted; None while one is being sent. Any
        thread."""
        return None if self._sending else self._sent_n

    def remove(self, subnet: IPNetwork) -> None:
        key = _key(subnet)
        if self._subnets.get(key) == subnet:
            del self._subnets[key]
            self.prober.remove(key)

    def traffic(self, subnets: Iterable[IPNetwork]) -> None:
        """Data packets are sent to these subnets now."""
        for subnet in subnets:
            self.prober.traffic(_key(subnet))
        self._schedule()

    def data_received(self, subnet: IPNetwork) -> None:
        self.prober.data_received(_key(subnet), time.monotonic())
        self._report()

    # -- the socket -------------------------------------------------------------------------------

    def check(self) -> None:
        """Open the socket if it is not open."""
        if self._socket is None:
            try:
                opened = self._open()
            except OSError as exc:
                self.error = f"{self._opening()}: {os_reason(exc)}"
                self._errno = exc.errno or self._errno
                self._set_able(exc.errno in _GONE)
            else:
                opened.setblocking(False)
                opened.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER_LEN)
                self._socket, self.error = opened, ""
                asyncio.get_running_loop().add_reader(opened, self._receive, opened)
                self._set_able(True)
        self._schedule()

    def _set_able(self, able: bool) -> None:
        before, self.able = self.able, able
        if able != before and self._subnets:
            self._changed([*self])

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._socket is not None:
            asyncio.get_running_loop().remove_reader(self._socket)
            self._socket.close()
            self._socket = None

    @abstractmethod
    def _opening(self) -> str:
        """Say what ``_open`` does, for an error message."""

    @abstractmethod
    def _open(self) -> socket.socket:
        """Open the socket. Raises OSError."""

    @abstractmethod
    def _message(self, request: Request[str]) -> tuple[bytes, Any]:
        """Return the bytes of a request and the address to which it is sent."""

    def _sent(self, request: Request[str]) -> None:
        """Called after each request that was sent."""
        return

    def _lost(self, keys: Iterable[str]) -> None:
        """Called when paths have become unreachable, before this is reported."""
        return

    @abstractmethod
    def _received(self, message: bytes, source: Any) -> None:
        """Parse one received message. It may come from any host."""

    # -- inside -----------------------------------------------------------------------------------

    def _probe(self, subnet: IPNetwork, full_size: int, **options: Any) -> str:
        """Probe this subnet from now on, with the options of ``Prober.add``. Return its key."""
        key = _key(subnet)
        self._subnets[key] = subnet
        self.prober.add(key, full_size, **options)
        self._schedule()
        return key

    def _schedule(self) -> None:
        if self.able and self._timer is not None and \
                self.prober.has_nothing_before(self._timer_at):
            return
        due = self.prober.next_at() if self.able else None
        at = None if due is None else max(due, self._ran_at + BATCH_SECONDS)
        if self._timer is not None:
            if at is not None and at >= self._timer_at:
                return  # the timer looks again when it fires
            self._timer.cancel()
            self._timer = None
        if at is not None:
            self._timer_at = at
            self._timer = asyncio.get_running_loop().call_later(
                max(at - time.monotonic(), 0.0), self._run)

    def _run(self) -> None:
        self._timer, self._ran_at = None, time.monotonic()
        for n, request in enumerate(self.prober.run(), 1):
            if (number := self.send(*self._message(request))):
                self.prober.send_failed(request, number)
            else:
                self._sent(request)
            if n % READ_AFTER == 0 and self._socket is not None:
                self._read(self._socket)
        self._report()
        self._schedule()

    def send(self, message: bytes, target: Any) -> int:
        """Send a message to a peer. Return 0 or the errno."""
        if self._socket is None:
            return self._errno
        try:
            self._transmit(self._socket, message, target)
        except OSError as exc:
            number = exc.errno or errno.EIO
            if number in _BROKEN:
                self._break(exc)
            return number
        return 0

    def _transmit(self, opened: socket.socket, message: bytes, target: Any) -> None:
        """Send and count a message. Raises OSError."""
        self._sending = True
        try:
            opened.sendto(message, target)
            self._sent_n += 1
        finally:
            self._sending = False

    def _break(self, exc: OSError) -> None:
        self.close()
        self.error, self._errno = os_reason(exc), exc.errno or self._errno

    def _receive(self, opened: socket.socket) -> None:
        self._read(opened)
        self._report()
        self._schedule()

    def _read(self, opened: socket.socket) -> None:
        for _ in range(RECEIVE_N):
            try:
                message, source = opened.recvfrom(RECEIVE_LEN)
            except (BlockingIOError, InterruptedError):
                break
            except OSError as exc:  # ENETDOWN is reported once; the next call works again
                if exc.errno in _BROKEN:
                    self._break(exc)
                break
            self._received(message, source)
            if self._socket is not opened:
                break

    def _report(self) -> None:
        if changed := self.prober.take_changes():
            if lost := [key for key, before in changed.items()
                        if self.prober[key].state == UNREACHABLE != before]:
                self._lost(lost)
            self._changed([self._subnets[key] for key in changed])


def _key(subnet: IPNetwork) -> str:
    return str(subnet.network_address)
