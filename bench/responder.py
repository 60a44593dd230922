"""Answers the probes to all addresses of its namespace: the peers of ``bench nodes``.

Owns: one UDP socket on the forwarder's port. Each reply leaves from the address to which the
request was sent, so one process is any number of peers. Knows only the two bytes of the message
that a reply changes; udptun's own code is the program that is measured.
"""

from __future__ import annotations

import socket
import sys

PORT = 8285
_MAGIC = b"utp1"
_TYPE, _REQUEST, _REPLY = 4, 1, 2
_HEARD = slice(16, 20)
_IP_PKTINFO = 8  # linux/in.h
_PKTINFO_LEN = 12


def serve(port: int) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.setsockopt(socket.IPPROTO_IP, _IP_PKTINFO, 1)
        sock.bind(("", port))
        while True:
            data, control, _, sender = sock.recvmsg(65535, socket.CMSG_SPACE(_PKTINFO_LEN))
            if data[:4] != _MAGIC or data[_TYPE] != _REQUEST:
                continue
            reply = bytearray(data)
            reply[_TYPE] = _REPLY
            reply[_HEARD] = bytes(4)  # heard just now
            # in_pktinfo: interface (0: the routing table's), source address, address of the header
            info = bytes(4) + control[0][2][8:12] + bytes(4)
            try:
                sock.sendmsg([reply], [(socket.IPPROTO_IP, _IP_PKTINFO, info)], 0, sender)
            except OSError as error:
                print(f"reply to {sender}: {error}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    serve(PORT)
