"""What must go on between pods while a cluster changes around them.

Both run in the background, and say at the end what was lost or late: by then the test has done its
worst. Sockets live in the pods' namespaces, the program in this process.
"""

import hashlib
import random
import re
import signal
import socket
import struct
import threading
import time

from udptun.lab import Host

CHUNK = 16384
PAUSE = 0.004  # some 30 Mbit/s: all the time, and not all of the machine
STAMP = struct.Struct("=d")


class SteadyTransfer:
    """One TCP connection from pod to pod, paced; every chunk tells when it was handed over.

    ``finish`` compares what was sent and what came. ``stall``: the longest that a chunk was on its
    way, in seconds: a sender that is not given the CPU makes no stall, a lost packet does.
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
        """Bytes that came, all of them as they were sent."""
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
        """Ends it. The one that is under way at that moment does not count."""
        self._ping.signal(signal.SIGINT)
        self._ping.wait()
        found = re.search(r"(\d+) packets transmitted, (\d+) received", self._ping.text())
        assert found, self._ping.text()
        answered = {int(n) for n in re.findall(r"icmp_seq=(\d+) ttl=", self._ping.text())}
        return max(answered) - len(answered)
