"""The flows between the pods: numbered UDP datagrams, and TCP connections.

Owns: the sockets, which are in the pods' namespaces, one thread that sends all datagrams, one that
receives them, and two threads per TCP connection. ``pause`` stops the senders. Other methods: main
thread only.
"""

import hashlib
import random
import selectors
import socket
import struct
import threading
import time
from array import array
from collections.abc import Iterable
from pathlib import Path

from tests.netns.netns_traffic import SO_RCVBUFFORCE, family
from udptun.lab import Host

RATE = 100  # datagrams a second on each flow
TICK_SECONDS = 0.01
LENGTHS = (64, 300, 1200)  # of the datagrams, in turn
ROOM = 1 << 25
CHUNK = 1 << 15
CHUNK_SECONDS = 0.01  # between two chunks: about 25 Mbit/s
NUMBER = struct.Struct("!Q")


class UdpFlow:
    """Datagrams from one pod to another. ``sent_at`` has the time of each, by number."""

    def __init__(self, names: tuple[str, str], source: Host, target: Host, address: object) -> None:
        self.names = names
        self.sent_at = array("d")
        self.arrived = bytearray()
        self.receiver = target.socket(family(address), socket.SOCK_DGRAM)
        self.receiver.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, ROOM)
        self.receiver.bind((str(address), 0))
        self.receiver.setblocking(False)
        self.sender = source.socket(family(address), socket.SOCK_DGRAM)
        self.sender.connect(self.receiver.getsockname()[:2])
        self.refused = 0

    def send(self) -> None:
        number = len(self.sent_at)
        self.arrived.append(0)
        self.sent_at.append(time.monotonic())
        try:
            self.sender.send(NUMBER.pack(number).ljust(LENGTHS[number % len(LENGTHS)], b"."))
        except OSError:  # an ICMP error of an earlier datagram, or there is no route; it is lost
            self.refused += 1

    def receive(self) -> None:
        try:
            while True:
                number = NUMBER.unpack_from(self.receiver.recv(2048))[0]
                self.arrived[number] += self.arrived[number] < 3  # twice is an error, too
        except BlockingIOError:
            return

    def lost_at(self) -> list[float]:
        """Return the times at which the lost datagrams were sent."""
        return [self.sent_at[n] for n, times in enumerate(self.arrived) if not times]

    def repeated(self) -> int:
        return sum(times > 1 for times in self.arrived)


class TcpFlow:
    """One connection. ``finish`` compares what was sent with what arrived."""

    def __init__(
        self, names: tuple[str, str], source: Host, target: Host, address: object,
        going: threading.Event,
    ) -> None:
        self.names, self._going = names, going
        self.sent = self.received = 0
        self.failure = ""
        self._digests: dict[str, str] = {}
        self._over = False
        with target.socket(family(address), socket.SOCK_STREAM) as listener:
            listener.bind((str(address), 0))
            listener.listen(1)
            self._sender = source.socket(family(address), socket.SOCK_STREAM)
            self._sender.settimeout(60)
            self._sender.connect(listener.getsockname()[:2])
            self._receiver, _ = listener.accept()
        self._receiver.settimeout(60)
        self._threads = [threading.Thread(target=self._guarded, args=(work,), daemon=True)
                         for work in (self._send, self._receive)]
        for thread in self._threads:
            thread.start()

    def finish(self) -> str:
        """End the connection. Return what was wrong; "": nothing."""
        self._over = True
        for thread in self._threads:
            thread.join(90)
        self._sender.close()
        self._receiver.close()
        if not self.failure and self._digests.get("sent") != self._digests.get("received"):
            self.failure = f"{self.sent} bytes were sent, {self.received} arrived, or others"
        return self.failure

    def _guarded(self, work) -> None:
        try:
            work()
        except OSError as error:
            self.failure = self.failure or f"{error}"

    def _send(self) -> None:
        data, digest = random.Random(1).randbytes(CHUNK), hashlib.sha256()
        while not self._over:
            self._going.wait()
            self._sender.sendall(data)
            digest.update(data)
            self.sent += len(data)
            time.sleep(CHUNK_SECONDS)
        self._sender.shutdown(socket.SHUT_WR)
        self._digests["sent"] = digest.hexdigest()

    def _receive(self) -> None:
        digest = hashlib.sha256()
        while data := self._receiver.recv(1 << 18):
            digest.update(data)
            self.received += len(data)
        self._digests["received"] = digest.hexdigest()


class Traffic:
    """All flows between some pods.

    pods  name, pod and its addresses
    """

    def __init__(self, pods: Iterable[tuple[str, Host, tuple[object, ...]]]) -> None:
        self._going = threading.Event()
        self._going.set()
        self._over = False
        pods = list(pods)
        pairs = [((a, b), source, target, address) for a, source, _ in pods
                 for b, target, addresses in pods if a != b for address in addresses]
        self.udp = [UdpFlow(*pair) for pair in pairs]
        self.tcp = [TcpFlow(*pair, self._going) for pair in pairs if pair[0][0] < pair[0][1]]
        self._poll = selectors.DefaultSelector()
        for flow in self.udp:
            self._poll.register(flow.receiver, selectors.EVENT_READ, flow)
        self._threads = [threading.Thread(target=work, daemon=True)
                         for work in (self._send, self._receive)]
        for thread in self._threads:
            thread.start()

    @property
    def sent(self) -> int:
        return sum(len(flow.sent_at) for flow in self.udp)

    def pause(self) -> None:
        self._going.clear()

    def resume(self) -> None:
        self._going.set()

    def finish(self) -> list[str]:
        """Stop all flows. Return what was wrong with TCP."""
        self.resume()
        wrong = [f"TCP {' -> '.join(flow.names)}: {why}" for flow in self.tcp
                 if (why := flow.finish())]
        self._over = True
        self._threads[0].join(10)
        time.sleep(2)  # what is still on the way
        self._threads[1].join(10)
        self._poll.close()
        return wrong

    def _send(self) -> None:
        due = time.monotonic()
        while not self._over:
            if not self._going.is_set():
                self._going.wait()
                due = time.monotonic()
            for flow in self.udp:
                flow.send()
            due = max(due + 1 / RATE, time.monotonic() - TICK_SECONDS)
            time.sleep(max(0.0, due - time.monotonic()))

    def _receive(self) -> None:
        last = time.monotonic()
        while not self._over or time.monotonic() < last + 1:
            ready = self._poll.select(0.2)
            if not self._over or ready:
                last = time.monotonic()
            for key, _ in ready:
                key.data.receive()


def socket_drops(host: Host) -> int:
    """Return how many datagrams the host's UDP sockets have dropped."""
    total = 0
    with host.inside():
        for name in ("udp", "udp6"):
            lines = Path(f"/proc/thread-self/net/{name}").read_text().splitlines()[1:]
            total += sum(int(line.split()[-1]) for line in lines)
    return total
