"""Fills the conntrack table of the namespace in which it runs, or empties it.

    python -m tests.chaos.conntrack fill | flush

The entries are flows that have been answered, which the kernel does not evict early. The limit
(nf_conntrack_max) is the same for all namespaces; the number of entries counts in each alone.
"""

import socket
import struct
import sys
from pathlib import Path

_NETLINK_NETFILTER = 12  # linux/netlink.h
_CT_NEW, _CT_DELETE = 0x100, 0x102  # linux/netfilter/nfnetlink_conntrack.h, subsystem 1
_REQUEST, _CREATE = 0x1, 0x400
_NESTED = 0x8000
_STATUS = 2 | 4 | 8  # answered, assured, confirmed
_SECONDS = 90
_BATCH = 256
_SOURCE, _PORT = bytes((10, 99, 0, 0)), 0x5A5A  # placeholders in the template
COUNT, LIMIT = (Path(f"/proc/sys/net/netfilter/nf_conntrack_{name}") for name in ("count", "max"))


def _attribute(kind: int, data: bytes, nested: int = 0) -> bytes:
    size = 4 + len(data)
    return struct.pack("=HH", size, kind | nested) + data + bytes(-size % 4)


def _tuple(kind: int, source: bytes, target: bytes, source_port: int, target_port: int) -> bytes:
    address = _attribute(1, _attribute(1, source) + _attribute(2, target), _NESTED)
    protocol = _attribute(2, _attribute(1, b"\x11") + _attribute(2, struct.pack(">H", source_port))
                          + _attribute(3, struct.pack(">H", target_port)), _NESTED)
    return _attribute(kind, address + protocol, _NESTED)


def _message(kind: int, flags: int, body: bytes = b"") -> bytes:
    head = struct.pack("=BBH", socket.AF_INET, 0, 0)
    size = 16 + len(head) + len(body)
    return struct.pack("=IHHII", size, kind, flags | _REQUEST, 0, 0) + head + body


def _template() -> bytes:
    target = bytes((10, 98, 0, 1))
    return _message(_CT_NEW, _CREATE, (
        _tuple(1, _SOURCE, target, _PORT, 9) + _tuple(2, target, _SOURCE, 9, _PORT)
        + _attribute(3, struct.pack(">I", _STATUS)) + _attribute(7, struct.pack(">I", _SECONDS))
    ))


def fill(sock: socket.socket) -> None:
    template, limit, n = _template(), int(LIMIT.read_text()), 0
    port = struct.pack(">H", _PORT)
    while int(COUNT.read_text()) < limit:
        batch = []
        for _ in range(_BATCH):
            source = bytes((10, 99)) + (n >> 16).to_bytes(2, "big")
            batch.append(template.replace(_SOURCE, source).replace(
                port, (n & 0xFFFF).to_bytes(2, "big")))
            n += 1
        sock.send(b"".join(batch))


def flush(sock: socket.socket) -> None:
    sock.send(_message(_CT_DELETE, 0))


if __name__ == "__main__":
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_NETFILTER) as netlink:
        netlink.bind((0, 0))
        {"fill": fill, "flush": flush}[sys.argv[1]](netlink)
