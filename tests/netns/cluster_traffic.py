"""Steady traffic between pods, which must not be disturbed while a test changes the cluster.

Both kinds run in the background and report at the end what was lost or late. The sockets are in the
pods' namespaces, the threads in this process.
"""

import hashlib
import random
import re
import signal
import socket
import struct
import threading
import time

from udptun.lab import Host, LabError, wait_for
from udptun.lab.cluster import Member, unreachable

CHUNK = 16384
PAUSE = 0.004  # seconds between chunks: about 30 Mbit/s, which leaves most of the CPU idle
STAMP = struct.Struct("=d")


def all_reach_all(members: list[Member]) -> None:
    """Wait until every pod reaches every other: a daemon learns of a change by a watch."""
    missing: list[str] = []

    def reached() -> bool:
        missing[:] = unreachable(members)
        return not missing

    try:
        wait_for(reached, "all pods to reach all others")
    except LabError as error:
        raise LabError(f"{error}: {missing}") from None


class SteadyTransfer:
    """One paced TCP connection from pod to pod; each chunk carries the time of its ``send``.

    ``finish`` compares the sent and the received bytes. ``stall`` is the longest time from a send
    to the receipt, in seconds. A lost packet causes one; a sender that waits for the CPU does not.
    """

    def __init__(self, source: Host, target: Host, address: object) -> None:
        self.stall = 0.0
        self._ends: dict[str, tuple[int, str]] = {}
        self._failures: list[BaseException] = []
        self._over = threading.Event()
        listener = target.socket(socket.AF_INET, socket.SOCK_STREAM)
        listener.bind((str(address), 0))
        listener.listen(1)
        self._sender = source.socket(socket.AF_INET, socket.SOCK_STREAM)
        self._sender.settimeout(30)
        self._sender.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._sender.connect(listener.getsockname())
        self._receiver, _ = listener.accept()
        self._receiver.settimeout(30)
        listener.close()
        self._threads = [
            threading.Thread(target=self._guarded, args=(work,), daemon=True)
            for work in (self._send, self._receive)
        ]
        for thread in self._threads:
            thread.start()

    def finish(self) -> int:
        """Stop; check that all bytes arrived unchanged; return their number."""
        self._over.set()
        for thread in self._threads:
            thread.join(60)
        self._sender.close()
        self._receiver.close()
        assert not self._failures, self._failures
        assert self._ends["received"] == self._ends["sent"]
        return self._ends["sent"][0]

    def _guarded(self, work) -> None:
        try:
            work()
        except BaseException as exc:
            self._failures.append(exc)

    def _send(self) -> None:
        rng, digest, size = random.Random(4), hashlib.sha256(), 0
        filling = [rng.randbytes(CHUNK - STAMP.size) for _ in range(16)]
        while not self._over.is_set():
            chunk = STAMP.pack(time.monotonic()) + filling[size // CHUNK % 16]
            digest.update(chunk)
            self._sender.sendall(chunk)
            size += CHUNK
            time.sleep(PAUSE)
        self._sender.shutdown(socket.SHUT_WR)
        self._ends["sent"] = size, digest.hexdigest()

    def _receive(self) -> None:
        digest, size, rest = hashlib.sha256(), 0, b""
        while data := self._receiver.recv(1 << 18):
            now = time.monotonic()
            digest.update(data)
            size += len(data)
            rest += data
            whole = len(rest) // CHUNK * CHUNK
            for start in range(0, whole, CHUNK):
                self.stall = max(self.stall, now - STAMP.unpack_from(rest, start)[0])
            rest = rest[whole:]
        self._ends["received"] = size, digest.hexdigest()


class SteadyPing:
    """Twenty pings a second from a host until ``finish``."""

    def __init__(self, source: Host, address: object) -> None:
        self._ping = source.start(["ping", "-n", "-i", "0.05", "-W", "2", str(address)])
        self._ping.wait_for_output("bytes from")

    def lost(self) -> int:
        """Stop; return the number of lost pings, without one that is still under way."""
        self._ping.signal(signal.SIGINT)
        self._ping.wait()
        found = re.search(r"(\d+) packets transmitted, (\d+) received", self._ping.text())
        assert found, self._ping.text()
        answered = {int(n) for n in re.findall(r"icmp_seq=(\d+) ttl=", self._ping.text())}
        return max(answered) - len(answered)
