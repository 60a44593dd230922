"""ICMP echoes: the socket, the request, and the reply that belongs to it.

Owns the format. The size of an echo is the number of bytes after the ICMP header, which has the
size of UDP's: an echo and a probe of the same size make equally large packets. A reply is matched
by a random token in its payload. Replies can be forged, so the kernel drops replies that do not
have the identifier of the socket's requests. Does not depend on the destination or the time of a
request. Uses only the standard library, because a client command has to start fast. Any thread.
"""

from __future__ import annotations

import array
import os
import socket
import struct

from ..model import IPAddress

ECHO_REQUEST, ECHO_REPLY = {4: 8, 6: 128}, {4: 0, 6: 129}
HEADER = struct.Struct(">BBHHH")  # type, code, checksum, identifier, sequence number
TOKEN = struct.Struct(">Q")
IP_MTU_DISCOVER, PMTUDISC_PROBE = 10, 3  # linux/in.h: set DF, and ignore the known path MTU
IPV6_MTU_DISCOVER, IPV6_DONTFRAG = 23, 62  # linux/in6.h
SO_ATTACH_FILTER = 26  # asm-generic/socket.h
# linux/filter.h: an instruction, and a program (the number of its instructions, and their address)
INSTRUCTION, PROGRAM = struct.Struct("=HBBI"), struct.Struct("@HP")
LOAD_IP4_HEADER_LEN, LOAD_16_BITS, LOAD_16_BITS_BEHIND_HEADER = 0xB1, 0x28, 0x48
JUMP_IF_EQUAL, RETURN = 0x15, 0x06
IDENTIFIER_AT = 4  # offset in the ICMP header
SOL_RAW, ICMP_FILTER, ICMPV6_FILTER = 255, 1, 1  # linux/socket.h, icmp.h, icmpv6.h


def open_raw(
    version: int, identifier: int, device: str = "", address: IPAddress | None = None
) -> socket.socket:
    """Return a raw socket that receives only echo replies with this identifier. It needs
    CAP_NET_RAW. Raises OSError.

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
        _receive_only(opened, version, identifier)
        send_whole(opened, version)
        if device:
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, device.encode() + b"\0")
        if address is not None:
            opened.bind((str(address), 0))
    except BaseException:
        opened.close()
        raise
    return opened


def _receive_only(opened: socket.socket, version: int, identifier: int) -> None:
    """Let the kernel drop messages with another identifier."""
    # An IPv4 message comes with its IP header.
    load = [(LOAD_IP4_HEADER_LEN, 0, 0, 0), (LOAD_16_BITS_BEHIND_HEADER, 0, 0, IDENTIFIER_AT)] \
        if version == 4 else [(LOAD_16_BITS, 0, 0, IDENTIFIER_AT)]
    program = [*load, (JUMP_IF_EQUAL, 0, 1, identifier), (RETURN, 0, 0, 0xFFFFFFFF),
               (RETURN, 0, 0, 0)]
    code = array.array("B", b"".join(INSTRUCTION.pack(*one) for one in program))
    opened.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER,
                      PROGRAM.pack(len(program), code.buffer_info()[0]))


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
        self.identifier = int.from_bytes(os.urandom(2))
        self._sequence = 0

    def request(self, token: int, size: int) -> bytes:
        """Return a request. size: at least 8 bytes."""
        self._sequence = (self._sequence + 1) & 0xFFFF
        head = HEADER.pack(ECHO_REQUEST[self._version], 0, 0, self.identifier, self._sequence)
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
        if (kind, code, identifier) != (ECHO_REPLY[self._version], 0, self.identifier):
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
