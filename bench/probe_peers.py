"""Plays the peers of ``python -m bench probes``: one socket that has the addresses of all peers.

    python -m bench.probe_peers FIRST PEERS NODE:PORT

Answers every probe from the address to which the probe was sent. Probes the node from each peer's
address, by the rules of udptun/probe, as real peers do. Runs in a namespace in which all these
addresses are local. Prints "ready", and at the end the numbers of its answers and requests.
"""

from __future__ import annotations

import ipaddress
import signal
import socket
import struct
import sys
import time

from udptun.probe.message import NEVER_HEARD, REPLY, REQUEST, UDP_PATH, Probe, decode, heard_field
from udptun.probe.prober import Prober

PORT = 8285
FULL = 1472
TICK_SECONDS = 0.1
_IP_PKTINFO = 8
_PKTINFO = struct.Struct("=i4s4s")  # interface, local address, header's destination


def main(argv: list[str]) -> None:
    first, count = int(ipaddress.IPv4Address(argv[0])), int(argv[1])
    host, _, port = argv[2].rpartition(":")
    node = host, int(port)
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.setsockopt(socket.IPPROTO_IP, _IP_PKTINFO, 1)
    sock.bind(("0.0.0.0", PORT))
    ending: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: ending.append(number))
    prober: Prober[bytes] = Prober(time.monotonic)  # by the peer's own address
    for n in range(count):
        prober.add((first + n).to_bytes(4, "big"), FULL)
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
            _, _, local = _PKTINFO.unpack(ancillary[0][2][: _PKTINFO.size])
            probe, now = decode(data), time.monotonic()
            if probe is not None and probe.kind == REQUEST:
                _send(sock, probe.reply(0), local, sender)
                heard = None if probe.heard_ms == NEVER_HEARD else probe.heard_ms / 1000
                prober.heard(local, now, heard)
                answered += 1
            elif probe is not None and probe.kind == REPLY:
                prober.answered(local, probe.token, probe.size, now)
        if time.monotonic() >= due:
            due = time.monotonic() + TICK_SECONDS
            for request in prober.run():
                heard_ms = heard_field(request.last_heard, time.monotonic())
                message = Probe(REQUEST, UDP_PATH, request.token, heard_ms, request.size)
                _send(sock, message, request.key, node)
                asked += 1
    print(f"answered {answered}, asked {asked}", flush=True)


def _send(sock: socket.socket, probe: Probe, local: bytes, to: tuple[str, int]) -> None:
    info = _PKTINFO.pack(0, local, b"\0\0\0\0")
    sock.sendmsg([probe.encode()], [(socket.IPPROTO_IP, _IP_PKTINFO, info)], 0, to)


if __name__ == "__main__":
    main(sys.argv[1:])
