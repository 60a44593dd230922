"""ICMP echoes: the socket, the request, and the reply that belongs to it.

Owns the format. The size of an echo is the number of bytes after the ICMP header, which has the
size of UDP's: an echo and a probe of the same size make equally large packets. A reply is matched
by a random token in its payload. Does not depend on who is asked or when, and uses only the
standard library, because a client command has to start fast. Any thread.
"""

from __future__ import annotations

import os
import socket
import struct

from ..model import IPAddress

ECHO_REQUEST, ECHO_REPLY = {4: 8, 6: 128}, {4: 0, 6: 129}
HEADER = struct.Struct(">BBHHH")  # type, code, checksum, identifier, sequence number
TOKEN = struct.Struct(">Q")
IP_MTU_DISCOVER, PMTUDISC_PROBE = 10, 3  # linux/in.h: set DF, and ignore the known path MTU
IPV6_MTU_DISCOVER, IPV6_DONTFRAG = 23, 62  # linux/in6.h
SOL_RAW, ICMP_FILTER, ICMPV6_FILTER = 255, 1, 1  # linux/socket.h, icmp.h, icmpv6.h


def open_raw(version: int, device: str = "", address: IPAddress | None = None) -> socket.socket:
    """Return a raw socket that receives echo replies only. It needs CAP_NET_RAW. Raises OSError.

    Ping sockets need no privilege, but the sysctl ping_group_range excludes everybody by default.

    device, address  send and receive only through this device and with this own address
    """
    v6 = version == 6
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
        send_whole(opened, version)
        if device:
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, device.encode() + b"\0")
        if address is not None:
            opened.bind((str(address), 0))
    except BaseException:
        opened.close()
        raise
    return opened


def send_whole(opened: socket.socket, version: int) -> None:
    """Make the socket send each message in one packet of any size, or refuse it with EMSGSIZE."""
    if version == 4:
        opened.setsockopt(socket.IPPROTO_IP, IP_MTU_DISCOVER, PMTUDISC_PROBE)
    else:
        opened.setsockopt(socket.IPPROTO_IPV6, IPV6_MTU_DISCOVER, PMTUDISC_PROBE)
        opened.setsockopt(socket.IPPROTO_IPV6, IPV6_DONTFRAG, 1)


class Echoes:
    """Builds the requests of one sender, and recognises their replies."""

    def __init__(self, version: int) -> None:
        self._version = version
        self._identifier = int.from_bytes(os.urandom(2))
        self._sequence = 0

    def request(self, token: int, size: int) -> bytes:
        """Return a request. size: at least 8 bytes."""
        self._sequence = (self._sequence + 1) & 0xFFFF
        head = HEADER.pack(ECHO_REQUEST[self._version], 0, 0, self._identifier, self._sequence)
        head += TOKEN.pack(token)
        if self._version == 4:  # for IPv6, the kernel computes the checksum
            head = head[:2] + _checksum(head).to_bytes(2) + head[4:]
        return head.ljust(HEADER.size + size, b"\0")

    def reply(self, message: bytes) -> tuple[int, int] | None:
        """Return the token and the size of a received reply to one of our requests, else None."""
        start = 4 * (message[0] & 15) if self._version == 4 else 0  # IPv4 comes with its header
        if len(message) < start + HEADER.size + TOKEN.size:
            return None
        kind, code, _, identifier, _ = HEADER.unpack_from(message, start)
        if (kind, code, identifier) != (ECHO_REPLY[self._version], 0, self._identifier):
            return None
        (token,) = TOKEN.unpack_from(message, start + HEADER.size)
        return token, len(message) - start - HEADER.size


def _checksum(data: bytes) -> int:
    """Return the Internet checksum (RFC 1071) of ``data``, which has an even length."""
    words: tuple[int, ...] = struct.unpack(f">{len(data) // 2}H", data)
    total = sum(words)
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total ^ 0xFFFF
