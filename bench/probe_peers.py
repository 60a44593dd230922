"""Simulates the peers of ``bench probes``: one process for any number of nodes.

    python -m bench.probe_peers

Runs in a namespace in which the peers' addresses are local. Answers the probes of one node, on the
UDP path and on the VXLAN path, from the address to which each probe was sent. After its first
probe, each peer also probes the node by the rules of udptun/probe, like a real peer: one probe
serves both sides of an idle pair. If a peer is probed on both paths, UDP is its standby path.
(bench/responder.py only answers.) Owns two sockets. Packs and unpacks VXLAN frames itself, because
a real VXLAN device has only one address.
"""

from __future__ import annotations

import selectors
import socket
import struct
import time
from dataclasses import dataclass

from udptun.probe import state
from udptun.probe.message import (
    NEVER_HEARD,
    REPLY,
    REQUEST,
    UDP_PATH,
    VXLAN_PATH,
    Probe,
    decode,
    heard_field,
)
from udptun.probe.prober import Prober

UDP_PORT, VXLAN_PORT = 8285, 8472
FULL_SIZE = 1422  # an inner packet of 1450 bytes
TICK_SECONDS = 0.01
_IP_PKTINFO = 8  # linux/in.h
_PKTINFO = struct.Struct("=i4s4s")  # interface, local address, address of the header
_VXLAN = struct.Struct(">8s6s6sH")  # VXLAN header, Ethernet: destination, source, type
_IPV4 = struct.Struct(">BBHHHBBH4s4s")
_UDP = struct.Struct(">HHHH")
_HEADERS_LEN = _VXLAN.size + _IPV4.size + _UDP.size


@dataclass(slots=True)
class Wire:
    """How messages of one peer reach the node.

    to     address of the node
    inner  for VXLAN: the headers of the last frame, from the node to the peer
    """

    to: tuple[str, int]
    inner: bytes


class Side:
    """All peers on one path (UDP_PATH or VXLAN_PATH)."""

    def __init__(self, path: int, port: int, standby: Side | None = None) -> None:
        self._path, self._standby = path, standby
        self.sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.sock.setsockopt(socket.IPPROTO_IP, _IP_PKTINFO, 1)
        self.sock.bind(("0.0.0.0", port))
        self._prober: Prober[bytes] = Prober(time.monotonic)  # by the peer's own address
        self._wires: dict[bytes, Wire] = {}

    def receive(self) -> None:
        data, control, _, sender = self.sock.recvmsg(65535, 64)
        local = _PKTINFO.unpack(control[0][2][: _PKTINFO.size])[2]
        inner = b""
        if self._path == VXLAN_PATH:
            inner, data = data[:_HEADERS_LEN], data[_HEADERS_LEN:]
            sender = sender[0], VXLAN_PORT
        probe, now = decode(data), time.monotonic()
        if probe is None or probe.path != self._path:
            return
        wire = self._wires[local] = Wire(sender, inner)
        if local not in self._prober:
            self._prober.add(local, FULL_SIZE)
        if self._standby is not None:
            self._standby.carries_nothing(local)
        if probe.kind == REQUEST:
            self._send(local, wire, probe.reply(0))
            heard = None if probe.heard_ms == NEVER_HEARD else probe.heard_ms / 1000
            self._prober.heard(local, now, probe.token, heard)
        elif probe.kind == REPLY:
            self._prober.answered(local, probe.token, probe.size, now)

    def carries_nothing(self, local: bytes) -> None:
        """Another side carries the packets to this peer."""
        self._prober.set_standby(local, True)

    def ask(self) -> None:
        """Send the requests that are due."""
        for request in self._prober.run():
            heard = heard_field(request.last_heard, time.monotonic())
            probe = Probe(REQUEST, self._path, request.token, heard, request.size)
            self._send(request.key, self._wires[request.key], probe)

    def _send(self, local: bytes, wire: Wire, probe: Probe) -> None:
        message = probe.encode()
        if wire.inner:
            message = frame_back(wire.inner, message)
        info = _PKTINFO.pack(0, local, bytes(4))
        self.sock.sendmsg([message], [(socket.IPPROTO_IP, _IP_PKTINFO, info)], 0, wire.to)


def frame_back(headers: bytes, message: bytes) -> bytes:
    """Return a VXLAN frame with this message for the sender of these headers."""
    vxlan, target_mac, source_mac, kind = _VXLAN.unpack_from(headers)
    *_, source, target = _IPV4.unpack_from(headers, _VXLAN.size)
    source_port, target_port, *_ = _UDP.unpack_from(headers, _VXLAN.size + _IPV4.size)
    length = _UDP.size + len(message)
    fields = (0x45, 0, _IPV4.size + length, 0, 0, 64, socket.IPPROTO_UDP)
    total = sum(struct.unpack(">10H", _IPV4.pack(*fields, 0, target, source)))
    total = (total & 0xFFFF) + (total >> 16)
    checksum = ~((total & 0xFFFF) + (total >> 16)) & 0xFFFF
    return b"".join((
        _VXLAN.pack(vxlan, source_mac, target_mac, kind),
        _IPV4.pack(*fields, checksum, target, source),
        _UDP.pack(target_port, source_port, length, 0),  # 0: no checksum
        message,
    ))


def serve() -> None:
    # Each real node has its own clock, so the batches of different peers do not come together.
    state.IDLE_BATCHES_PER_SECOND = round(1 / TICK_SECONDS)
    udp = Side(UDP_PATH, UDP_PORT)
    sides = udp, Side(VXLAN_PATH, VXLAN_PORT, standby=udp)
    selector = selectors.DefaultSelector()
    for side in sides:
        selector.register(side.sock, selectors.EVENT_READ, side)
    print("ready", flush=True)
    due = time.monotonic()
    while True:
        for key, _ in selector.select(max(due - time.monotonic(), 0.0)):
            key.data.receive()
        if time.monotonic() >= due:
            due = time.monotonic() + TICK_SECONDS
            for side in sides:
                side.ask()


if __name__ == "__main__":
    serve()
