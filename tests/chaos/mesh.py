"""Steady traffic from every pod to every other pod: the pairs that work, and since when.

One thread per pod lives in the pod's namespace. Four times a second it sends a datagram to each
other pod, small and full-size ones in turn, and it answers the datagrams of the others. Each tick
uses a new source port: firewalls accept packets of known flows, and a new flow tells the truth.
"""

import contextlib
import selectors
import socket
import struct
import threading
import time
from collections import deque
from dataclasses import dataclass

from udptun.lab import Host

PORT = 7007
TICK_SECONDS = 0.25
LOST_SECONDS = 1.0  # a request without an answer after this time is lost
STALL_SECONDS = 0.3  # this program did not run for so long: then a late answer proves nothing
SMALL = 32
HEADERS = 28  # IPv4 and UDP
SIZES = ("small", "full")
_SEQUENCE = struct.Struct("!Q")
_HISTORY = 64


@dataclass(slots=True)
class Request:
    sent: float
    answered: bool = False


class Sender:
    """One pod's part of the mesh. ``targets`` maps names of nodes to addresses of their pods."""

    def __init__(
        self, pod: Host, address: str, mtu: int, targets: dict[str, str],
        stalls: deque[tuple[float, float]],
    ) -> None:
        self._pod, self._address, self._stalls = pod, address, stalls
        self._sizes = {"small": SMALL, "full": mtu - HEADERS}
        self.targets = targets
        self.history: dict[tuple[str, str], deque[Request]] = {}
        self._waiting: dict[int, Request] = {}
        self._over = threading.Event()
        self._open: deque[tuple[float, socket.socket]] = deque()
        self._poll = selectors.DefaultSelector()
        self._ticks = self._sequence = 0
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._over.set()
        self._thread.join(10)

    def _run(self) -> None:
        with self._pod.inside():
            echo = self._socket(PORT)
            tick = time.monotonic()
            try:
                while not self._over.is_set():
                    for key, _ in self._poll.select(max(0.0, tick - time.monotonic())):
                        self._receive(key.fileobj, key.fileobj is echo)
                    if (now := time.monotonic()) >= tick:
                        if now > tick + STALL_SECONDS:
                            self._stalls.append((tick, now))
                        self._send(now)
                        tick = max(tick + TICK_SECONDS, now)
            finally:
                self._poll.close()
                for _, sock in self._open:
                    sock.close()
                echo.close()

    def _socket(self, port: int) -> socket.socket:
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        sock.setblocking(False)
        sock.bind((self._address, port))
        self._poll.register(sock, selectors.EVENT_READ)
        return sock

    def _receive(self, sock, is_echo) -> None:
        with contextlib.suppress(OSError):  # an ICMP error, or a reply that cannot be sent
            data, sender = sock.recvfrom(65535)
            if is_echo:
                sock.sendto(data, sender)
            elif request := self._waiting.pop(_SEQUENCE.unpack_from(data)[0], None):
                request.answered = True

    def _send(self, now: float) -> None:
        while self._open and self._open[0][0] < now - LOST_SECONDS:
            _, old = self._open.popleft()
            self._poll.unregister(old)
            old.close()
        for number in [n for n, one in self._waiting.items() if one.sent < now - LOST_SECONDS]:
            del self._waiting[number]
        try:
            sock = self._socket(0)
        except OSError:  # the pod's address is gone; the requests count as lost
            sock = None
        else:
            self._open.append((now, sock))
        size = SIZES[self._ticks % len(SIZES)]
        self._ticks += 1
        for target, address in self.targets.items():
            self._sequence += 1
            request = self._waiting[self._sequence] = Request(now)
            self.history.setdefault((target, size), deque(maxlen=_HISTORY)).append(request)
            data = _SEQUENCE.pack(self._sequence).ljust(self._sizes[size], b"\0")
            if sock is not None:
                with contextlib.suppress(OSError):
                    sock.sendto(data, (address, PORT))


class Mesh:
    """The traffic between the pods of all nodes. A pair is (name of a node, name of a node)."""

    def __init__(self) -> None:
        self._senders: dict[str, Sender] = {}
        self._stalls: deque[tuple[float, float]] = deque(maxlen=_HISTORY)

    def restart(self, members) -> None:
        """Start again, with the pods that the members have now."""
        self.stop()
        addresses = {member.host.name: str(member.pod_v4) for member in members}
        for member in members:
            name = member.host.name
            targets = {other: address for other, address in addresses.items() if other != name}
            mtu = int(member.env["FLANNEL_MTU"])
            self._senders[name] = Sender(member.pod, addresses[name], mtu, targets,
                                         self._stalls)

    def stop(self) -> None:
        for sender in self._senders.values():
            sender.stop()
        self._senders.clear()

    def pairs(self) -> list[tuple[str, str]]:
        return [(name, target) for name, sender in self._senders.items()
                for target in sender.targets]

    def broken(self, since: float) -> dict[tuple[str, str], str]:
        """Return the pairs that do not work now, with the sizes that are lost.

        since  a pair works only if requests that were sent after this time are answered
        """
        now = time.monotonic()
        start, end = max(since, now - 3.0), now - LOST_SECONDS
        found = {}
        for name, target in self.pairs():
            lost = []
            for size in SIZES:
                recent = self._sent(name, target, size, start, end)
                if not recent or not all(request.answered for request in recent):
                    lost.append(size)
            if lost:
                found[name, target] = "+".join(lost)
        return found

    def last_lost(self, since: float) -> dict[tuple[str, str], float]:
        """Return when the last lost request of each pair was sent, if after ``since``."""
        end = time.monotonic() - LOST_SECONDS
        found = {}
        for name, target in self.pairs():
            for size in SIZES:
                for request in self._sent(name, target, size, since, end):
                    if not request.answered:
                        found[name, target] = max(found.get((name, target), 0.0), request.sent)
        return found

    def _sent(self, name, target, size, start, end):
        history = self._senders[name].history.get((target, size), ())
        stalls = tuple(self._stalls)
        return [request for request in tuple(history)
                if start <= request.sent <= end and (request.answered or not any(
                    began - LOST_SECONDS < request.sent < ended for began, ended in stalls))]
