"""Measure peers that answer no probes, such as stock flannel nodes, by ICMP echoes.

An echo request goes to the base address of the peer's subnet, which flannel and udptun assign to
the peer's overlay device. It takes the route that data packets take. So it measures the only path
of such a peer, but not two paths one by one. One raw socket per IP version; it needs CAP_NET_RAW.
Ping sockets would not: but the sysctl ping_group_range excludes everybody by default.

The reply is matched by a random token in its payload. Runs on the daemon's loop.
"""

from __future__ import annotations

import os
import socket
import struct
import time
from collections.abc import Callable
from typing import Any

from ...model import OVERHEAD, IPNetwork
from ...probe.prober import Request
from .meter import Meter, send_whole

ECHO_REQUEST, ECHO_REPLY = {4: 8, 6: 128}, {4: 0, 6: 129}
HEADER = struct.Struct(">BBHHH")  # type, code, checksum, identifier, sequence number
TOKEN = struct.Struct(">Q")
SOL_RAW, ICMP_FILTER, ICMPV6_FILTER = 255, 1, 1  # linux/socket.h, icmp.h, icmpv6.h


class EchoMeter(Meter):
    """Echoes to peers of one IP version."""

    follows_route = True

    def __init__(self, version: int, changed: Callable[[list[IPNetwork]], None]) -> None:
        super().__init__(changed)
        self._version = version
        self._identifier = int.from_bytes(os.urandom(2))
        self._sequence = 0

    def add(self, subnet: IPNetwork, mtu: int) -> None:
        """Send echoes to the peer of this subnet. mtu: of the inner packets."""
        # The header of ICMP has the size of UDP's. Peers may drop ICMP, so data count too.
        self._probe(subnet, mtu - OVERHEAD[self._version], data_proves=True)

    # -- the socket -------------------------------------------------------------------------------

    def _opening(self) -> str:
        return "opening a raw socket for echoes"

    def _open(self) -> socket.socket:
        v6 = self._version == 6
        opened = socket.socket(
            socket.AF_INET6 if v6 else socket.AF_INET, socket.SOCK_RAW | socket.SOCK_CLOEXEC,
            socket.IPPROTO_ICMPV6 if v6 else socket.IPPROTO_ICMP)
        try:
            if v6:  # a bit of 1 blocks the type
                blocked = bytearray(b"\xff" * 32)
                struct.pack_into("=I", blocked, 4 * (ECHO_REPLY[6] >> 5),
                                 0xFFFFFFFF & ~(1 << (ECHO_REPLY[6] & 31)))
                opened.setsockopt(socket.IPPROTO_ICMPV6, ICMPV6_FILTER, bytes(blocked))
            else:
                opened.setsockopt(SOL_RAW, ICMP_FILTER,
                                  struct.pack("=I", 0xFFFFFFFF & ~(1 << ECHO_REPLY[4])))
            send_whole(opened, self._version)
        except BaseException:
            opened.close()
            raise
        return opened

    def _message(self, request: Request[str]) -> tuple[bytes, Any]:
        self._sequence = (self._sequence + 1) & 0xFFFF
        head = HEADER.pack(ECHO_REQUEST[self._version], 0, 0, self._identifier, self._sequence)
        head += TOKEN.pack(request.token)
        if self._version == 4:  # for IPv6, the kernel computes the checksum
            head = head[:2] + _checksum(head).to_bytes(2) + head[4:]
        return head.ljust(request.size, b"\0"), (request.key, 0)

    def _received(self, message: bytes, source: Any) -> None:
        start = 4 * (message[0] & 15) if self._version == 4 else 0  # IPv4 comes with its header
        if source[0] not in self.prober or len(message) < start + HEADER.size + TOKEN.size:
            return
        kind, code, _, identifier, _ = HEADER.unpack_from(message, start)
        if (kind, code, identifier) == (ECHO_REPLY[self._version], 0, self._identifier):
            (token,) = TOKEN.unpack_from(message, start + HEADER.size)
            self.prober.answered(source[0], token, len(message) - start, time.monotonic())


def _checksum(data: bytes) -> int:
    """Return the Internet checksum (RFC 1071) of ``data``, which has an even length."""
    words: tuple[int, ...] = struct.unpack(f">{len(data) // 2}H", data)
    total = sum(words)
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total ^ 0xFFFF
