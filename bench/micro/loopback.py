"""One worker with a socket pair in place of the TUN, and with UDP over loopback.

Owns: the sockets and the worker between them. One thread only. A frame is one message of a
SOCK_SEQPACKET pair, and the peer is a UDP socket on loopback. The times include the kernel's work
for UDP, but not its work for a TUN. So compare the times only with other times of this benchmark.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from types import TracebackType
from typing import Self

from udptun import _core

UDP_SEGMENT, UDP_GRO = 103, 104  # linux/udp.h
IP_RECVTOS = 13  # linux/in.h; the forwarder sets it, too
SO_RCVBUFFORCE = 33  # asm-generic/socket.h
_ROOM = 8 << 20
_FEATURES = ("tun-gso", "tun-uso", "udp-gso", "udp-gro", "tcp-merge", "udp-merge", "batch")


class LoopbackWorker:
    """A worker with the TUN end and the UDP peer that the benchmark uses.

    peers  number of peers; with more than one (at most 250), peer k has the packets to 10.64.k.0/24
    To measure TUN to UDP, call ``send_frame``, ``work``, ``received(peer)``.
    To measure UDP to TUN, call ``send_run``, ``work``, ``received(tun)``.
    """

    def __init__(self, peers: int = 1) -> None:
        self._closing = contextlib.ExitStack()
        self.tun, worker_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for end in (self.tun, worker_end):
            self._closing.enter_context(end)
            end.setblocking(False)
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _ROOM)
        self._udp = self._bound("127.0.0.1")
        # With several peers, this socket receives the datagrams to all of them.
        self.peer = self._bound("127.0.0.2" if peers == 1 else "0.0.0.0")
        notify = os.eventfd(0, os.EFD_NONBLOCK)
        self._closing.callback(os.close, notify)
        self.core = core = _core.Core("off", 1, (1500, 0), [bytes((10, 99, 1, 0))], notify)
        port = self.peer.getsockname()[1]
        routes = ["10.0.0.0/8 via 127.0.0.2"] + [
            f"10.64.{k}.0/24 via 127.1.0.{k + 1}" for k in range(peers) if peers > 1
        ]
        core.publish(_core.RouteTable.parse_text(
            "\n".join(f"{route} port {port}" for route in routes).encode()))
        self._worker = _core.Worker(
            core, worker_end.fileno(), self._udp.fileno(), -1, _FEATURES, 64
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._closing.close()

    def _bound(self, address: str) -> socket.socket:
        sock = self._closing.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        sock.setblocking(False)
        # Without root, net.core.rmem_max limits the buffer. The default size is enough for one run.
        with contextlib.suppress(PermissionError):
            sock.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, _ROOM)
        sock.setsockopt(socket.IPPROTO_UDP, UDP_GRO, 1)
        sock.setsockopt(socket.IPPROTO_IP, IP_RECVTOS, 1)
        sock.bind((address, 0))
        return sock

    def send_frame(self, frame: bytes) -> None:
        """Send one frame to the worker: a vnet header and an IP packet."""
        self.tun.send(frame)

    def send_run(self, packets: list[bytes]) -> None:
        """Send packets of equal size from the peer to the worker, as one UDP_SEGMENT message."""
        control = [(socket.IPPROTO_UDP, UDP_SEGMENT, struct.pack("=H", len(packets[0])))]
        self.peer.sendmsg([b"".join(packets)], control, 0, self._udp.getsockname())

    def work(self) -> None:
        """Run the worker until it has been idle for one millisecond."""
        self._worker.run(1)

    @staticmethod
    def received(sock: socket.socket) -> int:
        """Read all messages in ``sock`` (``tun`` or ``peer``); return the number of bytes."""
        n = 0
        with contextlib.suppress(BlockingIOError):
            while True:
                n += len(sock.recv(1 << 18))
        return n
