"""Probe peers through one device.

The socket is bound to the device, to our overlay address on it, and to the UDP port that our lease
advertises. So the kernel sends through this device with every route to the peer, and delivers only
datagrams that arrive through it. This measures the path of the device, even if the packets use
another path at present.

The peer's daemon answers the probes, but the peer's kernel carries the packets. If a probe is not
answered, the path may still work, because only the daemon may have ended. So with each further
probe an ICMP echo request is sent through the same device: the peer's kernel answers it. One of the
two answers is enough.

If an old conntrack entry has the addresses and ports of our probes, the kernel may change their
source port, and the peer ignores them. Example: a probe of the peer arrived before our address was
on the device, and the kernel masqueraded it. Further probes of the peer keep such an entry. So if
our probes are not answered, the entries of this flow are deleted.

A request is answered only if it comes from the address and port of a known peer. There is one reply
of the same size. So this node cannot be used to amplify traffic. Runs on the daemon's loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import time
from collections.abc import Callable, Iterable
from ipaddress import ip_address
from typing import Any

from ...model import DEFAULT_PORT, OVERHEAD, IPNetwork
from ...net.conntrack import UdpFlow, forget_flows
from ...net.icmp import Echoes, open_raw, send_whole
from ...probe.message import NEVER_HEARD, REPLY, REQUEST, Probe, decode, heard_field
from ...probe.prober import Request
from ...probe.state import UNREACHABLE
from ..backends.base import ProbeDevice
from .meter import RECEIVE_LEN, Meter

log = logging.getLogger(__name__)

SILENT_AFTER = 3  # answered echoes without an answered probe, until this is logged


class BoundMeter(Meter):
    """Probes the peers of one device.

    port  our UDP port, as our lease advertises it
    """

    def __init__(
        self, device: ProbeDevice, port: int, changed: Callable[[list[IPNetwork]], None]
    ) -> None:
        super().__init__(changed)
        self.device, self.port = device, port
        self._other_ports: dict[str, int] = {}  # of the peers that do not use DEFAULT_PORT
        self._echoes = Echoes(device.address.version)
        self._raw: socket.socket | None = None  # for the echoes; None: not needed until now
        # By peer: the number of echoes that were answered after the last answered probe. A peer
        # that answers probes has no entry.
        self._echoed: dict[str, int] = {}

    def add(
        self, subnet: IPNetwork, port: int, mtu: int, max_interval: float | None = None
    ) -> None:
        """Probe the peer of this subnet, which answers at ``port``. mtu: of the inner packets."""
        key = self._probe(subnet, mtu - OVERHEAD[subnet.version], max_interval=max_interval)
        if port == DEFAULT_PORT:
            self._other_ports.pop(key, None)
        else:
            self._other_ports[key] = port

    def remove(self, subnet: IPNetwork) -> None:
        super().remove(subnet)
        if (key := str(subnet.network_address)) not in self._subnets:
            self._other_ports.pop(key, None)
            self._echoed.pop(key, None)

    def move(self, device: ProbeDevice, port: int) -> None:
        """Use another device or port from now on. Keep the measurements."""
        if (device, port) != (self.device, self.port):
            self.close()
            self.device, self.port = device, port

    def close(self) -> None:
        super().close()
        if self._raw is not None:
            asyncio.get_running_loop().remove_reader(self._raw)
            self._raw.close()
            self._raw = None

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
        # The address may be new, and these peers may have sent probes to it before.
        self._lost(key for key in self.prober if self.prober[key].state == UNREACHABLE)
        return opened

    def _message(self, request: Request[str]) -> tuple[bytes, Any]:
        heard = heard_field(request.last_heard, time.monotonic())
        probe = Probe(REQUEST, self.device.path, request.token, heard, request.size)
        return probe.encode(), (request.key, self._other_ports.get(request.key, DEFAULT_PORT))

    def _received(self, message: bytes, source: Any) -> None:
        key, port = source[:2]
        if key not in self.prober or self._other_ports.get(key, DEFAULT_PORT) != port:
            return
        probe = decode(message)
        if probe is None or probe.path != self.device.path:
            return
        now = time.monotonic()
        if probe.kind == REPLY:
            self.prober.answered(key, probe.token, probe.size, now)
            if self._echoed.pop(key, 0) >= SILENT_AFTER:
                log.info("%s answers probes again", self._subnets[key])
            return
        last = self.prober[key].last_probe
        heard = None if probe.heard_ms == NEVER_HEARD else probe.heard_ms / 1000
        self.prober.heard(key, now, probe.token, heard)
        self.send(probe.reply(heard_field(last, now)).encode(), source)

    def _lost(self, keys: Iterable[str]) -> None:
        """Delete the conntrack entries of the probes in both directions."""
        flows = [UdpFlow(self.device.address, self.port, ip_address(key),
                         self._other_ports.get(key, DEFAULT_PORT)) for key in keys]
        if flows:
            forget_flows(one for flow in flows for one in (flow, flow.reverse()))

    # -- echoes -----------------------------------------------------------------------------------

    def _sent(self, request: Request[str]) -> None:
        key = request.key
        if not self.prober[key].missed and key not in self._echoed:
            return
        # An echo that cannot be sent counts as an echo without an answer.
        with contextlib.suppress(OSError):
            if self._raw is None:
                device = self.device
                self._raw = open_raw(device.address.version, self._echoes.identifier, device.name,
                                     device.address)
                self._raw.setblocking(False)
                asyncio.get_running_loop().add_reader(self._raw, self._receive_echo, self._raw)
            self._transmit(self._raw, self._echoes.request(request.token, request.size), (key, 0))

    def _receive_echo(self, opened: socket.socket) -> None:
        try:
            message, source = opened.recvfrom(RECEIVE_LEN)
        except OSError:  # the device is down, or there is no message
            return
        key = source[0]
        if key not in self.prober or (reply := self._echoes.reply(message)) is None:
            return
        if self.prober.answered(key, *reply, time.monotonic()):
            n = self._echoed[key] = self._echoed.get(key, 0) + 1
            if n == SILENT_AFTER:
                self._lost([key])  # its daemon may answer, but the probes have a wrong port
                log.warning("%s answers echoes, but no probes: its packets pass, but its node "
                            "daemon does not answer", self._subnets[key])
        self._report()
        self._schedule()
