"""Read a table of the kernel's as bytes, where there may be thousands of entries.

Owns netlink's framing for dumps: pyroute2 makes an object of each message, which for the routes of
5,000 peers takes most of a second and many megabytes. Refuses to know what a message says. Plain
blocking calls of some milliseconds, in the caller's thread and network namespace.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct

from .netlink import DUMP_TRIES, NLM_F_REQUEST

# linux/netlink.h
SOL_NETLINK, NETLINK_GET_STRICT_CHK = 270, 12
NLMSG_ERROR, NLMSG_DONE = 2, 3
NLM_F_DUMP, NLM_F_DUMP_INTR = 0x300, 0x10
NLA_TYPE_MASK = 0x3FFF
NLMSG = struct.Struct("=IHHII")  # length, type, flags, sequence, port
NLA = struct.Struct("=HH")  # length, type
ERRNO = struct.Struct("=i")
DATAGRAM = 65536  # the kernel sends at most half of it at once


def dump(kind: int, body: bytes) -> list[memoryview]:
    """The body of each message of a dump.

    kind  RTM_GETROUTE or the like
    body  its header (an rtmsg), with what the kernel shall filter by; before Linux 4.20 it does
          not, and gives more
    A table that changes while it is read is read again, as the kernel asks. OSError.
    """
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as sock:
        with contextlib.suppress(OSError):  # an old kernel
            sock.setsockopt(SOL_NETLINK, NETLINK_GET_STRICT_CHK, 1)
        for sequence in range(1, DUMP_TRIES + 1):
            head = NLMSG.pack(NLMSG.size + len(body), kind, NLM_F_REQUEST | NLM_F_DUMP, sequence, 0)
            sock.send(head + body)
            found = _answer(sock)
            if found is not None:
                return found
    raise OSError(errno.EINTR, "the table changed each time while it was read")


def _answer(sock: socket.socket) -> list[memoryview] | None:
    """Until the kernel says that it is done. None: it changed under way."""
    found: list[memoryview] = []
    sound = True
    while True:
        messages = memoryview(sock.recv(DATAGRAM))
        while messages:
            length, kind, flags, _, _ = NLMSG.unpack_from(messages)
            body = messages[NLMSG.size:length]
            sound = sound and not flags & NLM_F_DUMP_INTR
            if kind in (NLMSG_ERROR, NLMSG_DONE):
                if number := -ERRNO.unpack_from(body)[0]:
                    raise OSError(number, os.strerror(number))
                return found if sound else None
            found.append(body)
            messages = messages[_align(length):]


def attributes(data: memoryview) -> dict[int, memoryview]:
    """The attributes behind a message's header, or within another attribute, by type."""
    found = {}
    while len(data) >= NLA.size:
        length, kind = NLA.unpack_from(data)
        found[kind & NLA_TYPE_MASK] = data[NLA.size:length]
        data = data[_align(max(length, NLA.size)):]
    return found


def _align(length: int) -> int:
    return length + 3 & ~3
