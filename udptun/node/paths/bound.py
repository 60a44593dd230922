"""Probe peers through one device: request and reply stay on it, in both directions.

The socket is bound to the device, to our overlay address on it, and to the UDP port that our lease
advertises. So the kernel sends through the device whatever the route to the peer is, and delivers
only what arrives through it. This measures the path that the device makes, not the path that
packets take at present.

A request is answered only if it comes from the address and port of a known peer. There is one reply
of the same size. So this node cannot be used to amplify traffic. Runs on the daemon's loop.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from typing import Any

from ...model import OVERHEAD, IPNetwork
from ...probe.message import NEVER_HEARD, REPLY, REQUEST, Probe, decode, heard_field
from ...probe.prober import Request
from ..backends.base import ProbeDevice
from .meter import Meter, send_whole


class BoundMeter(Meter):
    """Probes the peers of one device.

    port  our UDP port, as our lease advertises it
    """

    def __init__(
        self, device: ProbeDevice, port: int, changed: Callable[[list[IPNetwork]], None]
    ) -> None:
        super().__init__(changed)
        self.device, self.port = device, port
        self._ports: dict[str, int] = {}  # of the peers, by their address

    def add(
        self, subnet: IPNetwork, port: int, mtu: int, max_interval: float | None = None
    ) -> None:
        """Probe the peer of this subnet, which answers at ``port``. mtu: of the inner packets."""
        key = self._probe(subnet, mtu - OVERHEAD[subnet.version], max_interval=max_interval)
        self._ports[key] = port

    def remove(self, subnet: IPNetwork) -> None:
        super().remove(subnet)
        if (key := str(subnet.network_address)) not in self._subnets:
            self._ports.pop(key, None)

    def move(self, device: ProbeDevice, port: int) -> None:
        """Use another device or port from now on. Keep the measurements."""
        if (device, port) != (self.device, self.port):
            self.close()
            self.device, self.port = device, port

    # -- the socket -------------------------------------------------------------------------------

    def _opening(self) -> str:
        return f"probing through {self.device.name} from {self.device.address} port {self.port}"

    def _open(self) -> socket.socket:
        device = self.device
        v6 = device.address.version == 6
        opened = socket.socket(
            socket.AF_INET6 if v6 else socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        try:
            opened.setsockopt(
                socket.SOL_SOCKET, socket.SO_BINDTODEVICE, device.name.encode() + b"\0")
            send_whole(opened, device.address.version)
            opened.bind((str(device.address), self.port))
            # When the forwarder opens a socket for a slow peer, it binds to this port on all
            # addresses for a moment. With this option, the kernel allows that if both processes
            # have the same user. The option is set after the bind, so that the bind fails if
            # another program uses our address and port.
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        except BaseException:
            opened.close()
            raise
        return opened

    def _message(self, request: Request[str]) -> tuple[bytes, Any]:
        heard = heard_field(request.last_heard, time.monotonic())
        probe = Probe(REQUEST, self.device.path, request.token, heard, request.size)
        return probe.encode(), (request.key, self._ports[request.key])

    def _received(self, message: bytes, source: Any) -> None:
        key, port = source[:2]
        if self._ports.get(key) != port:
            return
        probe = decode(message)
        if probe is None or probe.path != self.device.path:
            return
        now = time.monotonic()
        if probe.kind == REPLY:
            self.prober.answered(key, probe.token, probe.size, now)
            return
        last = self.prober[key].last_probe
        heard = None if probe.heard_ms == NEVER_HEARD else probe.heard_ms / 1000
        self.prober.heard(key, now, probe.token, heard)
        self.send(key, probe.reply(heard_field(last, now)).encode(), source)
