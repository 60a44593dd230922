"""Steady traffic from every pod to every other pod: the pairs that work, and since when.

One thread per pod lives in the pod's namespace. Four times a second it sends a datagram to each
address of each other pod, small and full-size ones in turn, and it answers the datagrams of the
others. Each tick uses a new source port: firewalls accept packets of known flows, so only a new
flow shows whether packets pass.
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
HEADERS = {4: 28, 6: 48}  # IP and UDP
SIZES = ("small", "full")
FAMILY = {4: socket.AF_INET, 6: socket.AF_INET6}
# What is sent: the IP version and the size, by the name in reports.
KINDS = {"small": (4, "small"), "full": (4, "full"),
         "small IPv6": (6, "small"), "full IPv6": (6, "full")}
_SEQUENCE = struct.Struct("!Q")
_HISTORY = 64


@dataclass(slots=True)
class Request:
    sent: float
    answered: bool = False


class Sender:
    """One pod's part of the mesh.

    addresses  of the pod, by IP version
    targets    the addresses of the pods of the other nodes, by name of the node
    """

    def __init__(
        self, pod: Host, addresses: dict[int, str], mtu: int, targets: dict[str, dict[int, str]],
        stalls: deque[tuple[float, float]],
    ) -> None:
        self._pod, self._addresses, self._stalls = pod, addresses, stalls
        self._mtu = mtu
        self.targets = targets
        self.kinds = [kind for kind, (version, _) in KINDS.items() if version in addresses]
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
            echoes = [self._socket(version, PORT) for version in self._addresses]
            tick = time.monotonic()
            try:
                while not self._over.is_set():
                    for key, _ in self._poll.select(max(0.0, tick - time.monotonic())):
                        self._receive(key.fileobj, key.fileobj in echoes)
                    if (now := time.monotonic()) >= tick:
                        if now > tick + STALL_SECONDS:
                            self._stalls.append((tick, now))
                        self._send(now)
                        tick = max(tick + TICK_SECONDS, now)
            finally:
                self._poll.close()
                for sock in (*echoes, *(sock for _, sock in self._open)):
                    sock.close()

    def _socket(self, version: int, port: int) -> socket.socket:
        sock = socket.socket(FAMILY[version], socket.SOCK_DGRAM)
        sock.setblocking(False)
        try:
            sock.bind((self._addresses[version], port))
        except OSError:
            sock.close()
            raise
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
        size = SIZES[self._ticks % len(SIZES)]
        self._ticks += 1
        for kind in self.kinds:
            version, of_size = KINDS[kind]
            if of_size == size:
                self._send_all(now, kind, version, size)

    def _send_all(self, now: float, kind: str, version: int, size: str) -> None:
        try:
            sock = self._socket(version, 0)
        except OSError:  # the pod's address is gone; the requests count as lost
            sock = None
        else:
            self._open.append((now, sock))
        length = SMALL if size == "small" else self._mtu - HEADERS[version]
        for target, addresses in self.targets.items():
            self._sequence += 1
            request = self._waiting[self._sequence] = Request(now)
            self.history.setdefault((target, kind), deque(maxlen=_HISTORY)).append(request)
            data = _SEQUENCE.pack(self._sequence).ljust(length, b"\0")
            if sock is not None:
                with contextlib.suppress(OSError):
                    sock.sendto(data, (addresses[version], PORT))


class Mesh:
    """The traffic between the pods of all nodes. A pair is (name of a node, name of a node)."""

    def __init__(self) -> None:
        self._senders: dict[str, Sender] = {}
        self._stalls: deque[tuple[float, float]] = deque(maxlen=_HISTORY)

    def restart(self, members) -> None:
        """Start again, with the pods that the members have now."""
        self.stop()
        addresses = {member.host.name: _addresses(member) for member in members}
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

    def kinds(self, name: str) -> list[str]:
        """Return the kinds of packets that this node's pod sends."""
        return self._senders[name].kinds

    def broken(self, since: float) -> dict[tuple[str, str], str]:
        """Return the pairs that do not work now, with the sizes that are lost.

        since  a pair works only if requests that were sent after this time are answered
        """
        now = time.monotonic()
        start, end = max(since, now - 3.0), now - LOST_SECONDS
        found = {}
        for name, target in self.pairs():
            lost = []
            for kind in self.kinds(name):
                recent = self._sent(name, target, kind, start, end)
                if not recent or not all(request.answered for request in recent):
                    lost.append(kind)
            if lost:
                found[name, target] = "+".join(lost)
        return found

    def last_lost(self, since: float) -> dict[tuple[str, str], float]:
        """Return when the last lost request of each pair was sent, if after ``since``."""
        end = time.monotonic() - LOST_SECONDS
        found = {}
        for name, target in self.pairs():
            for kind in self.kinds(name):
                for request in self._sent(name, target, kind, since, end):
                    if not request.answered:
                        found[name, target] = max(found.get((name, target), 0.0), request.sent)
        return found

    def _sent(self, name, target, kind, start, end):
        history = self._senders[name].history.get((target, kind), ())
        stalls = tuple(self._stalls)
        return [request for request in tuple(history)
                if start <= request.sent <= end and (request.answered or not any(
                    began - LOST_SECONDS < request.sent < ended for began, ended in stalls))]


def _addresses(member) -> dict[int, str]:
    found = {4: str(member.pod_v4)}
    return found if member.pod_v6 is None else found | {6: str(member.pod_v6)}
