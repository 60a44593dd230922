"""Plays the peers in ``bench nodes``: answers the probes to every address of its namespace.

Owns: one UDP socket on the forwarder's port, and one on VXLAN's port. Each reply is sent from the
address to which the request was sent, so one process can act as any number of peers. The reply to a
request in VXLAN is in VXLAN too, with the inner addresses swapped. Does not use udptun's own code,
which is under test: a reply is the request with a few changed fields.
"""

from __future__ import annotations

import selectors
import socket
import sys

PORT, VXLAN_PORT = 8285, 8472
_MAGIC = b"utp1"
_TYPE, _REQUEST, _REPLY = 4, 1, 2
_HEARD = slice(16, 20)
_IP_PKTINFO = 8  # linux/in.h
_PKTINFO_LEN = 12
# Offsets in a VXLAN datagram: the header, then Ethernet, IPv4 without options, UDP, the probe.
_ETHERNET, _IP, _UDP, _INNER = 8, 22, 42, 50
# Pairs of fields to swap: (offset of the first, length of each). The second follows the first.
_SWAPPED = ((_ETHERNET, 6), (_IP + 12, 4), (_UDP, 2))
_CHECKSUM = slice(_UDP + 6, _UDP + 8)  # UDP's; zero means none. The IP header's does not change.


def answer(data: bytes, inner: int = 0) -> bytearray | None:
    """Return the reply to a datagram; None if it is not a request. ``inner``: offset of the probe.
    """
    if data[inner:inner + 4] != _MAGIC or data[inner + _TYPE] != _REQUEST:
        return None
    reply = bytearray(data)
    reply[inner + _TYPE] = _REPLY
    reply[inner + _HEARD.start:inner + _HEARD.stop] = bytes(4)  # heard just now
    if inner:
        for at, size in _SWAPPED:
            middle, end = at + size, at + 2 * size
            reply[at:end] = data[middle:end] + data[at:middle]
        reply[_CHECKSUM] = bytes(2)
    return reply


def serve(ports: dict[int, int]) -> None:
    """Answer at these ports until the process is killed. The values are the offsets of the probe.
    """
    poll = selectors.DefaultSelector()
    for port, inner in ports.items():
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        sock.setsockopt(socket.IPPROTO_IP, _IP_PKTINFO, 1)
        sock.bind(("", port))
        poll.register(sock, selectors.EVENT_READ, (sock, port, inner))
    print("ready", flush=True)
    while True:
        for key, _ in poll.select():
            _receive(*key.data)


def _receive(sock: socket.socket, port: int, inner: int) -> None:
    data, control, _, sender = sock.recvmsg(65535, socket.CMSG_SPACE(_PKTINFO_LEN))
    reply = answer(data, inner)
    if reply is None:
        return
    # in_pktinfo: interface (0: the routing table chooses it), source address, destination address
    # (not used when sending)
    info = bytes(4) + control[0][2][8:12] + bytes(4)
    # VXLAN is sent from any port, and received at its own.
    to = (sender[0], port) if inner else sender
    try:
        sock.sendmsg([reply], [(socket.IPPROTO_IP, _IP_PKTINFO, info)], 0, to)
    except OSError as error:
        print(f"reply to {to}: {error}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    serve({PORT: 0, VXLAN_PORT: _INNER})
