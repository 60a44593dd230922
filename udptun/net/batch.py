"""Send many netlink route requests in one system call; the caller packs their bodies.

pyroute2 sends a request only after the answer to the last one: about 2,000 per second. Thousands of
neighbour, FDB and route entries need 100 times that rate. Owns the message header, the answers and
their order. Does not interpret the body of a request. Threading: one thread per socket. A call
blocks only during the system call, because the kernel answers within it.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import ClassVar, Self

# linux/netlink.h
NLM_F_REQUEST, NLM_F_ACK, NLM_F_DUMP_INTR, NLM_F_DUMP = 0x1, 0x4, 0x10, 0x300
NLM_F_ACK_TLVS = 0x200
NLMSG_ERROR, NLMSG_DONE = 2, 3
NLMSGERR_ATTR_MSG = 1
SOL_NETLINK = 270
NETLINK_CAP_ACK, NETLINK_EXT_ACK, NETLINK_GET_STRICT_CHK = 10, 11, 12

HEADER = struct.Struct("=IHHII")  # struct nlmsghdr: length, type, flags, sequence, port
ATTRIBUTE = struct.Struct("=HH")  # struct nlattr: length including this header, type
ATTRIBUTE_TYPE = 0x3FFF  # mask without the flags NLA_F_NESTED and NLA_F_NET_BYTEORDER
ERRNO = struct.Struct("=i")  # a negative errno: the first field of nlmsgerr and NLMSG_DONE
NLMSGERR_LEN = ERRNO.size + HEADER.size  # the answer contains the request's header
RECEIVE_LEN = 1 << 16  # bytes; a datagram of the kernel is at most half as long
# Requests per send. If all fail, the answers still fit into the default receive buffer (208 KiB).
CHUNK_N = 128
ASK_N = 32  # questions per send; each answer uses up to 4 KiB of the receive buffer
DUMP_TRIES = 5
OWN_PORTS_N = 256


@dataclass(frozen=True, slots=True)
class Request:
    """One request: message type, flags such as NLM_F_CREATE, and body."""

    kind: int
    flags: int
    body: bytes


@dataclass(frozen=True, slots=True)
class Refusal:
    """The kernel's errno for one request, and its error message, which may be empty."""

    number: int
    message: str

    def __str__(self) -> str:
        return self.message or os.strerror(self.number)


class RouteSocket:
    """A netlink socket, usually for routes, in the network namespace of the thread that creates it.

    own_ports  the netlink ports of the most recent sockets. A notification has the port of the
               socket that caused the change. It may be read after this socket is closed
    """

    own_ports: ClassVar[deque[int]] = deque(maxlen=OWN_PORTS_N)

    def __init__(self, protocol: int = socket.NETLINK_ROUTE) -> None:
        self._socket = socket.socket(
            socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, protocol
        )
        self._sequence = 0
        for option in (NETLINK_CAP_ACK, NETLINK_EXT_ACK, NETLINK_GET_STRICT_CHK):
            try:
                self._socket.setsockopt(SOL_NETLINK, option, 1)
            except OSError as error:  # an old kernel: no error texts, no filters
                if error.errno != errno.ENOPROTOOPT:
                    self._socket.close()
                    raise
        self._socket.bind((0, 0))  # the kernel chooses the port
        self.own_ports.append(self._socket.getsockname()[0])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._socket.close()

    def send(self, requests: Sequence[Request]) -> dict[int, Refusal]:
        """Send all requests, in order. A request that fails does not stop the next ones.

        returns  the requests that failed, by position in ``requests``
        raises   OSError: the socket failed, and the result of the requests is unknown
        """
        refused: dict[int, Refusal] = {}
        for start in range(0, len(requests), CHUNK_N):
            chunk = requests[start : start + CHUNK_N]
            first = self._sequence + 1
            self._sequence += len(chunk)
            message = bytearray()
            for sequence, request in enumerate(chunk, first):
                # The kernel answers each failed request. It also answers the last request, which
                # has NLM_F_ACK.
                flags = request.flags | NLM_F_REQUEST
                if sequence == self._sequence:
                    flags |= NLM_F_ACK
                message += HEADER.pack(
                    HEADER.size + len(request.body), request.kind, flags, sequence, 0
                )
                message += request.body
            self._socket.send(message)
            last = 0
            while last != self._sequence:
                for _, flags, last, answer in self._receive():
                    refusal = _refusal(answer, flags)
                    if refusal is not None:
                        refused[start + last - first] = refusal
        return refused

    def ask(self, kind: int, bodies: Sequence[bytes]) -> list[memoryview | Refusal]:
        """Send many questions that each have one answer. Return the answers' bodies, in order.

        raises  OSError: the socket failed
        """
        answers: list[memoryview | Refusal] = []
        for start in range(0, len(bodies), ASK_N):
            chunk = bodies[start : start + ASK_N]
            message = bytearray()
            for sequence, body in enumerate(chunk, self._sequence + 1):
                message += HEADER.pack(HEADER.size + len(body), kind, NLM_F_REQUEST, sequence, 0)
                message += body
            self._sequence += len(chunk)
            self._socket.send(message)
            while len(answers) < start + len(chunk):
                for answer_kind, flags, _, answer in self._receive():
                    refusal = _refusal(answer, flags) if answer_kind == NLMSG_ERROR else None
                    answers.append(refusal or answer)
        return answers

    def dump(self, kind: int, body: bytes) -> list[memoryview]:
        """Return the bodies of all answers to a dump request. Raises OSError.

        If the table changes during a dump, the kernel marks the dump, and the dump is repeated.
        There are at most DUMP_TRIES dumps. The last one is returned even if it is marked.
        """
        for _ in range(DUMP_TRIES):
            found, whole = self._dump(kind, body)
            if whole:
                break
        return found

    def _dump(self, kind: int, body: bytes) -> tuple[list[memoryview], bool]:
        self._sequence += 1
        self._socket.send(HEADER.pack(
            HEADER.size + len(body), kind, NLM_F_REQUEST | NLM_F_DUMP, self._sequence, 0
        ) + body)
        found: list[memoryview] = []
        whole = True
        while True:
            for answer_kind, flags, _, answer in self._receive():
                whole = whole and not flags & NLM_F_DUMP_INTR
                if answer_kind not in (NLMSG_ERROR, NLMSG_DONE):
                    found.append(answer)
                    continue
                refusal = _refusal(answer, flags)
                if refusal is not None:
                    raise OSError(refusal.number, str(refusal))
                return found, whole

    def _receive(self) -> Iterator[tuple[int, int, int, memoryview]]:
        """Yield type, flags, sequence number and body of each message in one datagram."""
        data = memoryview(self._socket.recv(RECEIVE_LEN))
        at = 0
        while at < len(data):
            length, kind, flags, sequence, _ = HEADER.unpack_from(data, at)
            yield kind, flags, sequence, data[at + HEADER.size : at + length]
            at += length + 3 & ~3


def attributes(body: memoryview, start: int) -> dict[int, memoryview]:
    """Return the attributes after the fixed part of a message, by type. Lengths are not checked."""
    found = {}
    end = len(body)
    while start + ATTRIBUTE.size <= end:
        length, kind = ATTRIBUTE.unpack_from(body, start)
        found[kind & ATTRIBUTE_TYPE] = body[start + ATTRIBUTE.size : start + length]
        start += length + 3 & ~3
    return found


def attribute(kind: int, value: bytes) -> bytes:
    """Return an attribute of a request, with its padding."""
    length = ATTRIBUTE.size + len(value)
    return ATTRIBUTE.pack(length, kind) + value + bytes(-length % 4)


def number(value: memoryview | None) -> int:
    """Return the value of an attribute as a number (host byte order); 0 if it is absent."""
    return int.from_bytes(value or b"", sys.byteorder)


def text(value: memoryview | None) -> str:
    """Return the value of an attribute as text; "" if it is absent."""
    return os.fsdecode(bytes(value or b"").rstrip(b"\0"))


def _refusal(answer: memoryview, flags: int) -> Refusal | None:
    number = -ERRNO.unpack_from(answer)[0]
    if number == 0:
        return None
    text = b""
    if flags & NLM_F_ACK_TLVS:
        text = bytes(attributes(answer, NLMSGERR_LEN).get(NLMSGERR_ATTR_MSG, b""))
    return Refusal(number, text.rstrip(b"\0").decode("utf-8", "replace"))
