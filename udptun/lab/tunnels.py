"""The tunnels that a lab starts: udptun's forwarder, bench/onepacket, the kernel's VXLAN.

Owns: the tunnels' command lines, waiting until a tunnel is ready, and the plan of overlay
addresses. Does not depend on how a tunnel works inside. This module uses the forwarder's command
line and control socket, as an operator does. Main thread only, like the whole lab.
"""

from __future__ import annotations

import http.client
import ipaddress
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..model import NO_EXPRESS_PEER
from .hosts import DEADLINE_SECONDS, Host, LabError, Process, Unavailable, wait_for

PORT = 8285
NETWORK = ipaddress.IPv4Network("10.244.0.0/16")
NETWORK6 = ipaddress.IPv6Network("fd44::/32")


ACCELERATE = "UDPTUN_LAB_ACCELERATE"  # the environment variable that Forwarder.start reads


@dataclass(frozen=True)
class Node:
    """The overlay addresses of a node.

    v4, v6           the addresses of the node's TUN
    subnet, subnet6  the subnets of the node's pods
    """

    v4: ipaddress.IPv4Address
    v6: ipaddress.IPv6Address
    subnet: ipaddress.IPv4Network
    subnet6: ipaddress.IPv6Network


def node(n: int) -> Node:
    """Return the addresses of node number n."""
    # The TUN does not get the first address of the IPv6 subnet, because this address is the anycast
    # address of the subnet's routers (RFC 4291 2.6.1).
    subnet6 = ipaddress.IPv6Network(f"fd44:0:{n:x}::/64")
    subnet = ipaddress.IPv4Network(f"10.244.{n}.0/24")
    return Node(subnet[0], subnet6[15], subnet, subnet6)


def _with_express(route: str) -> str:
    text, *comment = route.partition("#")
    if not text.strip() or "express" in text.split():
        return route
    return "".join((text.rstrip(), " express ", *comment)).rstrip()


def _has_decided(report: dict[str, Any]) -> bool:
    """Return whether a forwarder has attached its programs, or will not do so."""
    reason = report["reason"] or NO_EXPRESS_PEER
    return bool(report["receives"] or reason not in ("starting", NO_EXPRESS_PEER))


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=10)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


def control_request(
    control: Path, method: str, path: str, body: bytes | None = None,
    headers: dict[str, str] | None = None,
) -> tuple[int, Any]:
    """Send a request to a control socket. Return the HTTP status and the decoded JSON answer.

    The answer is None if it is not JSON.
    """
    connection = _UnixConnection(control)
    try:
        connection.request(method, path, body, headers or {})
        response = connection.getresponse()
        data = response.read()
    finally:
        connection.close()
    return response.status, json.loads(data) if data.strip().startswith((b"{", b"[")) else None


class Forwarder:
    """A running ``udptun forward`` and its control socket."""

    def __init__(self, process: Process, control: Path, routes_file: Path) -> None:
        self.process, self.control, self.routes_file = process, control, routes_file

    @classmethod
    def start(
        cls, host: Host, *, listen: Sequence[object] = (), addresses: Sequence[object] = (),
        networks: Sequence[object] = (NETWORK,), routes: Iterable[str] | None = (),
        tun: str = "udptun0", mtu: int | None = None, workers: object = None,
        offload: str | None = None, source_check: str | None = None, state: Path | None = None,
        extra: Sequence[str] = (), pass_fds: Sequence[int] = (), env: dict[str, str] | None = None,
        wait: bool = True,
    ) -> Forwarder:
        """Start a forwarder on a host.

        If the environment variable UDPTUN_LAB_ACCELERATE is set, it is the value of --accelerate,
        and all routes have ``express``, unless ``extra`` has the option.

        listen  the addresses to listen on, without port; empty: the host's first IPv4 address
        routes  the lines of the route file; None: no route file
        wait    True: return when the control socket answers. False: return at once
        """
        everywhere = os.environ.get(ACCELERATE)
        if everywhere and not any(one.partition("=")[0] == "--accelerate" for one in extra):
            extra = *extra, "--accelerate", everywhere
            routes = None if routes is None else map(_with_express, routes)
        folder = host.lab.folder
        control, routes_file = folder / f"{host.name}.sock", folder / f"{host.name}.routes"
        argv = ["forward", "--tun", tun, "--control", str(control)]
        if routes is not None:
            routes_file.write_text("".join(f"{route}\n" for route in routes))
            argv += ["--routes", str(routes_file)]
        for address in addresses:
            argv += ["--address", str(address)]
        for network in networks:
            argv += ["--network", str(network)]
        for address in listen or (host.v4,):
            argv += ["--listen", _endpoint(address)]
        for name, value in (
            ("mtu", mtu), ("workers", workers), ("offload", offload),
            ("source-check", source_check), ("state", state),
        ):
            if value is not None:
                argv += [f"--{name}", str(value)]
        process = host.start([*_UDPTUN, *argv, *extra], name="udptun", env=env, pass_fds=pass_fds)
        forwarder = cls(process, control, routes_file)
        if wait:
            forwarder.wait_ready()
            if everywhere == "auto":  # the kernel drops packets while the programs are attached
                wait_for(lambda: _has_decided(forwarder.status()["accelerate"]), "the express path")
        return forwarder

    @property
    def host(self) -> Host:
        return self.process.host

    def wait_ready(self, seconds: float = DEADLINE_SECONDS) -> None:
        def answers() -> bool:
            if not self.process.alive:
                raise LabError(f"the forwarder ended:\n{self.process.text()}")
            try:
                return bool(self.get("/v1/healthz"))
            except (OSError, http.client.HTTPException):
                return False

        try:
            wait_for(answers, f"{self.control} to answer", seconds)
        except LabError as e:
            raise LabError(f"{e}; the forwarder's log:\n{self.process.text()}") from None

    def request(
        self, method: str, path: str, body: bytes | None = None,
        headers: dict[str, str] | None = None,
    ) -> tuple[int, Any]:
        """Send a request to the control socket. Returns the same as ``control_request``."""
        return control_request(self.control, method, path, body, headers)

    def get(self, path: str) -> Any:
        status, answer = self.request("GET", path)
        if status != 200:
            raise LabError(f"GET {path}: {status} {answer}")
        return answer if answer is not None else True

    def status(self) -> dict[str, Any]:
        answer: dict[str, Any] = self.get("/v1/status")
        return answer

    def udptun(self, *argv: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a client command, e.g. ``udptun("route", "list", "-o", "json")``."""
        return self.host.run(
            [*_UDPTUN, *argv], check=check, env={"UDPTUN_SOCKET": str(self.control)}
        )

    def start_udptun(self, *argv: str) -> Process:
        """Start a client command, e.g. ``start_udptun("events", "-w", "-o", "json")``."""
        env = {"UDPTUN_SOCKET": str(self.control), "PYTHONUNBUFFERED": "1"}
        return self.host.start([*_UDPTUN, *argv], name="client", env=env)

    def drops(self) -> dict[tuple[str, str], int]:
        """Return the numbers of dropped packets by (direction, reason), without the zeros."""
        rows = self.get("/v1/drops")["drops"]
        return {(r["direction"], r["reason"]): r["packets"] for r in rows if r["packets"]}

    def rss_kib(self) -> int:
        text = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(text.split("VmRSS:")[1].split()[0])

    def stop(self) -> int:
        """Send SIGTERM, wait until the process ends, and return its exit code."""
        self.process.signal(signal.SIGTERM)
        return self.process.wait()


_UDPTUN = (sys.executable, "-m", "udptun")


def _endpoint(address: object) -> str:
    return f"[{address}]:{PORT}" if ":" in str(address) else f"{address}:{PORT}"


class OnePacket:
    """A running bench/onepacket: flannel's UDP proxy as a small C program."""

    def __init__(self, process: Process, control: Path) -> None:
        self.process, self.control = process, control

    @classmethod
    def start(
        cls, host: Host, binary: Path, *, address: object, routes: Iterable[str] = (),
        listen: object = None, network: object = NETWORK, tun: str = "flannel0", mtu: int = 1472,
    ) -> OnePacket:
        """Start the program; return when it is ready.

        routes  each route has the form ``CIDR=IP:PORT``
        """
        control = host.lab.folder / f"{host.name}-onepacket.sock"
        argv = [str(binary), "--tun", tun, "--address", str(address), "--network", str(network)]
        argv += ["--listen", _endpoint(listen or host.v4), "--mtu", str(mtu), "--ctl", str(control)]
        for route in routes:
            argv += ["--route", route]
        process = host.start(argv)
        process.wait_for_output("ready")
        return cls(process, control)


_VXLAN_ID = 77
_VXLAN_PORT = 4789


def vxlan(
    a: Host, b: Host, mtu: int = 1450
) -> tuple[ipaddress.IPv4Address, ipaddress.IPv4Address]:
    """Create a kernel VXLAN between the first links of two hosts; return the two inner addresses.

    Raises Unavailable, with the kernel's message, if the kernel has no VXLAN.
    """
    net4, _ = a.lab.next_subnets()
    ends = ((a, b, net4[1]), (b, a, net4[2]))
    for here, there, address in ends:
        device = here.interfaces[0].name
        try:
            here.ip(
                f"link add vxlan0 mtu {mtu} type vxlan id {_VXLAN_ID} dstport {_VXLAN_PORT} "
                f"local {here.v4} remote {there.v4} dev {device}"
            )
        except LabError as e:
            message = str(e).partition("): ")[2].splitlines()
            cause = message[0] if message else e
            raise Unavailable(f"this kernel has no vxlan ({cause})") from None
        here.ip(f"address add {address}/24 dev vxlan0", "link set vxlan0 up")
    return net4[1], net4[2]
