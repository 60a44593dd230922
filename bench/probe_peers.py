"""Plays the peers of ``python -m bench probes``: one socket that has the addresses of all peers.

    python -m bench.probe_peers FIRST PEERS NODE:PORT PER_SECOND

Answers every probe from the address that it was sent to, and sends PER_SECOND requests to the node,
from one peer after the other, as that many real peers do. Runs in a namespace in which all the
addresses are local. Prints "ready", and at the end the number of probes that it answered.
"""

from __future__ import annotations

import ipaddress
import random
import signal
import socket
import struct
import sys
import time

from udptun.probe.message import NEVER_HEARD, REQUEST, UDP_PATH, Probe, decode

PORT = 8285
_IP_PKTINFO = 8
_PKTINFO = struct.Struct("=i4s4s")  # interface, local address, header's destination


def main(argv: list[str]) -> None:
    first, count = int(ipaddress.IPv4Address(argv[0])), int(argv[1])
    host, _, port = argv[2].rpartition(":")
    node, interval = (host, int(port)), 1 / float(argv[3])
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.setsockopt(socket.IPPROTO_IP, _IP_PKTINFO, 1)
    sock.bind(("0.0.0.0", PORT))
    ending: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: ending.append(number))
    print("ready", flush=True)
    answered = asked = 0
    due = time.monotonic()
    while not ending:
        sock.settimeout(max(due - time.monotonic(), 0.001))
        try:
            data, ancillary, _, sender = sock.recvmsg(65535, 64)
        except TimeoutError:
            pass
        else:
            probe = decode(data)
            if probe is not None and probe.kind == REQUEST:
                _, _, local = _PKTINFO.unpack(ancillary[0][2][: _PKTINFO.size])
                _send(sock, probe.reply(0), local, sender)
                answered += 1
        if time.monotonic() >= due:
            due += interval
            local = (first + asked % count).to_bytes(4, "big")
            request = Probe(REQUEST, UDP_PATH, random.getrandbits(64), NEVER_HEARD, 24)
            _send(sock, request, local, node)
            asked += 1
    print(f"answered {answered}, asked {asked}", flush=True)


def _send(sock: socket.socket, probe: Probe, local: bytes, to: tuple[str, int]) -> None:
    info = _PKTINFO.pack(0, local, b"\0\0\0\0")
    sock.sendmsg([probe.encode()], [(socket.IPPROTO_IP, _IP_PKTINFO, info)], 0, to)


if __name__ == "__main__":
    main(sys.argv[1:])
