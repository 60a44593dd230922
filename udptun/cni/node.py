"""This node's part of the overlay as it is now: is it ready, its subnets, and its MTU.

Owns: the questions to subnet.env, the node daemon and the kernel. Does not change anything.

The daemon's answer decides if there is one. If no daemon answers, it may be restarting, and the
overlay works without it: then the devices of the overlay in the kernel decide. If udptun has not
run on this node since it was started, flanneld has written subnet.env, and the file alone decides.
"""

from __future__ import annotations

import _socket  # the part of socket that is compiled: socket takes a sixth of the whole start
import fcntl
import json
import os
import struct
import time

from ..env_file import assignments, network4, network6
from ..errors import FieldError
from .failure import LIMITED, NOT_AVAILABLE, TRY_AGAIN, CniError

TYPE_CHECKING = False  # see udptun/cni/__init__.py
if TYPE_CHECKING:
    from collections.abc import Callable
    from ipaddress import IPv4Network, IPv6Network
    from typing import Any

    Network = IPv4Network | IPv6Network

LOOK_SECONDS = 0.1  # between two looks while ADD waits
ANSWER_SECONDS = 2.0  # limit for the daemon's answer
MAX_ANSWER = 16 * 1024 * 1024
MAX_REASON = 500
# without the list of peers, which can be long: docs/node.md
_REQUEST = b"GET /v1/node?peers=0 HTTP/1.1\r\nHost: udptun\r\nConnection: close\r\n\r\n"
_SIOCGIFFLAGS, _SIOCGIFADDR, _SIOCGIFMTU = 0x8913, 0x8915, 0x8921  # linux/sockios.h
_IFF_UP = 1
_MTUS = range(68, 65536)


class NotReady(Exception):
    """The node cannot attach pods now.

    limited  pods that exist may have no connectivity either
    """

    def __init__(self, reason: str, limited: bool = False) -> None:
        super().__init__(reason[:MAX_REASON])
        self.limited = limited


class Overlay:
    """What the delegate needs of this node.

    networks, subnets  one of each IP version that the overlay carries
    mtu                the largest inner packet, in bytes
    ip_masq            the node daemon masquerades, so the delegate need not
    """

    def __init__(
        self, networks: list[Network], subnets: list[Network], mtu: int, ip_masq: bool
    ) -> None:
        self.networks, self.subnets, self.mtu, self.ip_masq = networks, subnets, mtu, ip_masq


def wait_for(
    files: tuple[str, str], seconds: float, waiting: Callable[[str], None]
) -> Overlay:
    """Return the overlay as soon as the node is ready.

    files    subnet.env and the daemon's socket
    waiting  called with the reason if the node is not ready at once
    Raises CniError after ``seconds``.
    """
    deadline, told = time.monotonic() + seconds, False
    while True:
        try:
            return look(*files)
        except NotReady as error:
            if time.monotonic() >= deadline:
                raise CniError(TRY_AGAIN, f"this node is not ready after {seconds:g} s: {error}"
                               ) from None
            if not told:
                waiting(str(error))
                told = True
        time.sleep(LOOK_SECONDS)


def check(files: tuple[str, str]) -> Overlay:
    """Return the overlay. Raises CniError with a code of STATUS if the node is not ready."""
    try:
        return look(*files)
    except NotReady as error:
        raise CniError(LIMITED if error.limited else NOT_AVAILABLE,
                       f"this node is not ready: {error}") from None


def look(subnet_file: str, node_socket: str) -> Overlay:
    """Raises NotReady."""
    state = ask_daemon(node_socket)
    if state is not None and state.get("ready") is not True:
        raise NotReady(_trouble(state), limited=bool(state.get("subnets")))
    overlay = from_file(subnet_file)
    if state is not None:
        active = {str(subnet) for subnet in overlay.subnets}
        if active != set(state.get("subnets", ())):
            raise NotReady(f"{subnet_file} has the subnet {', '.join(sorted(active))}, but the "
                           f"node has {', '.join(state.get('subnets', ())) or 'none'}")
    overlay.mtu = _mtu(overlay, state, os.path.dirname(node_socket))
    return overlay


def _trouble(state: dict[str, Any]) -> str:
    """Return why the daemon says that the node is not ready."""
    failed = [f"{check['name']}: {check['text'][0]}" for check in state.get("checks", ())
              if check.get("state") == "failed"]
    return "; ".join(failed) or str(state.get("waiting")) or "udptun node gives no reason"


# subnet.env


def from_file(path: str) -> Overlay:
    """Return the overlay as the file describes it. Raises NotReady."""
    try:
        return parse(read(path), path)
    except FieldError as error:
        raise NotReady(str(error)) from None


def read(path: str) -> str:
    try:
        with open(path, errors="replace") as file:
            return file.read(65536)
    except FileNotFoundError:
        raise NotReady(f"{path} does not exist: the node daemon has not written it yet") from None
    except OSError as error:
        raise NotReady(f"{path} cannot be read: {error.strerror}") from None


def parse(text: str, where: str) -> Overlay:
    """Return the overlay as the file describes it. Raises FieldError."""
    values = assignments(text)
    networks: list[Network] = []
    subnets: list[Network] = []
    has_v6 = "FLANNEL_IPV6_NETWORK" in values or "FLANNEL_IPV6_SUBNET" in values
    if "FLANNEL_NETWORK" in values or "FLANNEL_SUBNET" in values or not has_v6:
        networks.append(network4("FLANNEL_NETWORK", values, where))
        subnets.append(network4("FLANNEL_SUBNET", values, where))
    if has_v6:
        networks.append(network6("FLANNEL_IPV6_NETWORK", values, where))
        subnets.append(network6("FLANNEL_IPV6_SUBNET", values, where))
    mtu, masq = values.get("FLANNEL_MTU", ""), values.get("FLANNEL_IPMASQ")
    if not (mtu.isascii() and mtu.isdigit() and len(mtu) < 6 and int(mtu) in _MTUS):
        raise FieldError("FLANNEL_MTU", mtu or None, f"a number from {_MTUS[0]} to {_MTUS[-1]}",
                         where)
    if masq not in ("true", "false"):
        raise FieldError("FLANNEL_IPMASQ", masq, "true or false", where)
    return Overlay(networks, subnets, int(mtu), masq == "true")


# The daemon


def ask_daemon(path: str) -> dict[str, Any] | None:
    """Return the daemon's state, or None if no daemon answers."""
    answer = b""
    sock = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
    try:
        sock.settimeout(ANSWER_SECONDS)
        sock.connect(path)
        sock.sendall(_REQUEST)
        while len(answer) < MAX_ANSWER and (part := sock.recv(65536)):
            answer += part
    except OSError:  # also for a path that is too long, and for a timeout
        return None
    finally:
        sock.close()
    head, _, body = answer.partition(b"\r\n\r\n")
    try:
        state = json.loads(body)
    except (ValueError, RecursionError):
        return None
    return state if b" 200 " in head.partition(b"\r\n")[0] and isinstance(state, dict) else None


# The kernel


def _mtu(overlay: Overlay, state: dict[str, Any] | None, run_dir: str) -> int:
    """Return the MTU as it is now. subnet.env has that of the time at which it was written.

    Raises NotReady if no daemon answers, and the overlay's device is missing.
    """
    if state is not None and state.get("mtu") in _MTUS:
        return int(state["mtu"])
    mtus = device_mtus(overlay)
    if mtus:
        return min(mtus)
    if state is None and _has_run(run_dir):
        raise NotReady("no node daemon answers, and no network device that is up has the address "
                       f"{overlay.subnets[0].network_address}", limited=True)
    return overlay.mtu


def _has_run(run_dir: str) -> bool:
    """Return whether udptun runs, or has run since this machine was started."""
    try:
        return bool(os.listdir(run_dir))
    except OSError:
        return False


def device_mtus(overlay: Overlay) -> list[int]:
    """Return the MTUs of the overlay's devices that are up.

    The TUN and the VXLAN devices, and no others, have the base address of the node's subnet.
    """
    base4 = {subnet.network_address.packed for subnet in overlay.subnets if subnet.version == 4}
    base6 = {subnet.network_address.packed.hex() for subnet in overlay.subnets
             if subnet.version == 6}
    names = _names6(base6) if base6 else set()
    found: list[int] = []
    sock = _socket.socket(_socket.AF_INET, _socket.SOCK_DGRAM)
    try:
        for _, name in _socket.if_nameindex():
            try:
                if name not in names and _query(sock, name, _SIOCGIFADDR)[4:8] not in base4:
                    continue
                (flags,) = struct.unpack_from("=H", _query(sock, name, _SIOCGIFFLAGS))
                if flags & _IFF_UP:
                    found += struct.unpack_from("=i", _query(sock, name, _SIOCGIFMTU))
            except OSError:
                continue  # it has no IPv4 address, or was removed
    finally:
        sock.close()
    return found


def _query(sock: _socket.socket, name: str, request: int) -> bytes:
    """Return the union in the kernel's answer: struct ifreq of linux/if.h."""
    answer: bytes = fcntl.ioctl(sock.fileno(), request, struct.pack("16s24x", name.encode()))
    return answer[16:]


def _names6(addresses: set[str]) -> set[str]:
    """Return the devices that have one of these IPv6 addresses, each as 32 hexadecimal digits."""
    try:
        with open("/proc/thread-self/net/if_inet6") as file:
            lines = [line.split() for line in file]
    except OSError:
        return set()  # the kernel has no IPv6
    return {line[5] for line in lines if line[0] in addresses}
