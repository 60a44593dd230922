"""Open the UDP sockets of the underlay with the options that the data path needs.

Owns the socket options and their probing. The compiled core sends, receives and reads the error
queue. Threading: any thread; no shared state.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
import socket
from dataclasses import dataclass, field
from pathlib import Path

from ..device.fault import device_error
from ..device.offload import ASKED, OffloadRequest
from ..model import Endpoint, Mark

log = logging.getLogger(__name__)

# linux/in.h
IP_MTU_DISCOVER, IP_RECVERR, IP_RECVTOS = 10, 11, 13
PMTUDISC_PROBE = 3  # set DF, ignore the kernel's path MTU; the core keeps a path MTU per peer
PMTUDISC_INTERFACE = 4  # also ignore ICMP errors about the path MTU
# linux/in6.h
IPV6_MTU_DISCOVER, IPV6_RECVERR, IPV6_DONTFRAG, IPV6_RECVTCLASS = 23, 25, 62, 66
# asm-generic/socket.h
SO_SNDBUFFORCE, SO_RCVBUFFORCE = 32, 33
# linux/udp.h
UDP_SEGMENT, UDP_GRO, UDP_NO_CHECK6_RX = 103, 104, 102

RCVBUF = 8 << 20  # holds a few milliseconds of a full link while no worker is scheduled
SNDBUF = 4 << 20


@dataclass
class UdpSocket:
    """A bound, non-blocking UDP socket that sets DF. ``close`` closes it.

    endpoint  the local address and port
    features  which of udp-gso and udp-gro the kernel supports; udp-gro is then turned on
    off       for each feature that is off, the cause
    rcvbuf, sndbuf  sizes as the kernel reports them (twice the requested bytes)
    """

    socket: socket.socket
    endpoint: Endpoint
    features: frozenset[str]
    off: dict[str, str] = field(default_factory=dict)
    rcvbuf: int = 0
    sndbuf: int = 0

    @property
    def fd(self) -> int:
        return self.socket.fileno()

    @property
    def family(self) -> int:
        return self.socket.family

    @classmethod
    def adopt(
        cls, fd: int, endpoint: Endpoint, features: frozenset[str], off: dict[str, str]
    ) -> UdpSocket:
        """Use the socket that another process has opened. The new object owns the descriptor.

        Raises DeviceError if it is not bound to this endpoint; the descriptor then stays open.
        """
        doing = f"using the UDP socket {endpoint}"
        try:
            sock = socket.socket(fileno=fd)
        except OSError as error:
            raise device_error(error.errno or 0, doing) from None
        bound, kind = sock.getsockname(), sock.type
        if (kind, *bound[:2]) != (socket.SOCK_DGRAM, str(endpoint.address), endpoint.port):
            sock.detach()
            raise device_error(errno.EADDRNOTAVAIL, doing, f"it is bound to {bound}")
        _queue_errors(sock)  # the other process may have turned this off during a flood
        _report_class(sock)  # an older version has not set this
        return cls(
            sock, endpoint, features, off,
            rcvbuf=sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF),
            sndbuf=sock.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF),
        )

    @classmethod
    def reuse(cls, fd: int, endpoint: Endpoint, request: OffloadRequest) -> UdpSocket:
        """Use the socket of a process that has died. The new object owns the descriptor.

        Raises DeviceError; the descriptor then stays open.
        """
        udp = cls.adopt(fd, endpoint, frozenset(), {})
        try:
            _set_path_options(udp.socket)
            _probe(udp, request)
        except OSError as error:
            udp.socket.detach()
            raise device_error(error.errno or 0, f"using the kept UDP socket {endpoint}") from None
        return udp

    def let_join(self) -> None:
        """Let later sockets share the endpoint: those opened with ``reuse_port``, and the own
        sockets of slow peers (src_ext/path/own_socket.pxd), which bind to the same port.

        The first socket is bound before this call, without SO_REUSEPORT. The bind then fails if
        another program uses the endpoint.
        """
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)

    def trust_icmp(self, on: bool) -> None:
        """Set whether ICMPv6 errors about the path MTU arrive in the error queue of an IPv6 socket.
        The kernel then also stores the path MTU for all programs.
        """
        self.socket.setsockopt(
            socket.IPPROTO_IPV6, IPV6_MTU_DISCOVER, PMTUDISC_PROBE if on else PMTUDISC_INTERFACE
        )

    def set_mark(self, mark: Mark | None) -> None:
        """Set the mark of all datagrams, or remove it. Raises DeviceError."""
        try:
            value = 0 if mark is None else mark.value
            if self.socket.getsockopt(socket.SOL_SOCKET, socket.SO_MARK) != value:
                self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, value)
        except PermissionError as error:
            raise device_error(
                error.errno or 0, f"setting the mark {mark} on a UDP socket",
                "--mark needs CAP_NET_ADMIN",
            ) from None

    def set_dscp(self, dscp: int | None) -> None:
        """Set the DSCP of the datagrams. None: the core sets that of each datagram."""
        value = (dscp or 0) << 2
        if self.family == socket.AF_INET6:
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_TCLASS, value)
        else:
            self.socket.setsockopt(socket.IPPROTO_IP, socket.IP_TOS, value)

    def accept_no_checksum(self) -> None:
        """Receive also the datagrams without a UDP checksum over IPv6 (RFC 6935). Over IPv4 they
        always arrive."""
        if self.endpoint.address.version == 6:
            self.socket.setsockopt(socket.IPPROTO_UDP, UDP_NO_CHECK6_RX, 1)

    def close(self) -> None:
        self.socket.close()


def open_udp(
    listen: Endpoint, request: OffloadRequest, reuse_port: bool, mark: Mark | None = None,
    dscp: int | None = 0,
) -> UdpSocket:
    """Open and bind a socket. Raises DeviceError, which names the endpoint.

    reuse_port  share the endpoint with a socket that is already bound to it (see ``let_join``)
    mark        mark of all datagrams; needs CAP_NET_ADMIN
    dscp        see ``UdpSocket.set_dscp``
    """
    doing = f"opening the UDP socket {listen}"
    family = socket.AF_INET6 if listen.address.version == 6 else socket.AF_INET
    try:
        sock = socket.socket(
            family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
        )
    except OSError as error:
        hint = "this host has no IPv6" if error.errno == errno.EAFNOSUPPORT else ""
        raise device_error(error.errno or 0, doing, hint) from None
    try:
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)  # not after the bind
        _set_path_options(sock)
        if reuse_port:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        udp = UdpSocket(
            sock, listen, frozenset(),
            rcvbuf=_enlarge(sock, SO_RCVBUFFORCE, socket.SO_RCVBUF, RCVBUF),
            sndbuf=_enlarge(sock, SO_SNDBUFFORCE, socket.SO_SNDBUF, SNDBUF),
        )
        udp.set_mark(mark)
        udp.set_dscp(dscp)
        _probe(udp, request)
        # Bind last: datagrams arrive after it, and the options above must apply to them.
        sock.bind((str(listen.address), listen.port))
    except OSError as error:
        sock.close()
        hint = {
            errno.EADDRINUSE: "another process listens there",
            errno.EADDRNOTAVAIL: "no interface has this address",
            errno.EPERM: "--mark needs CAP_NET_ADMIN",
            errno.EACCES: "ports below 1024 need CAP_NET_BIND_SERVICE",
        }.get(error.errno or 0, "")
        raise device_error(error.errno or 0, doing, hint) from None
    if udp.rcvbuf < 2 * RCVBUF:
        log.info("%s: receive buffer %d KiB instead of %d KiB: without CAP_NET_ADMIN the limit is "
                 "net.core.rmem_max", listen, udp.rcvbuf >> 11, RCVBUF >> 10)  # without overhead
    return udp


# UDP_GRO does not join datagrams with different traffic classes (linux 5babae777c61): in these
# series from this release on, and in all series from GRO_FIXED_SINCE on.
GRO_FIXED = {(5, 10): 217, (5, 15): 159, (6, 1): 91, (6, 6): 31, (6, 8): 10}
GRO_FIXED_SINCE = (6, 9)
VERSION_SIGNATURE = Path("/proc/version_signature")


def kernel_release() -> str:
    """Return the release of kernel.org on which the running kernel is based.

    The names of the kernels of Debian and Ubuntu do not contain the last number, for example
    ``6.1.0-56-amd64``. Debian has it in the kernel's version, Ubuntu in a file.
    """
    system = os.uname()
    if debian := re.search(r"\bDebian (\d+\.\d+\.\d+)", system.version):
        return debian[1]
    with contextlib.suppress(OSError):
        words = VERSION_SIGNATURE.read_text().split()  # Ubuntu 5.15.0-105.115-generic 5.15.148
        if len(words) == 3 and words[0] == "Ubuntu":
            return words[2]
    return system.release


def keeps_marks(release: str) -> bool:
    """Return whether a kernel of this release reports the congestion mark of each datagram.

    An older kernel joins marked and other datagrams, and reports the mark of the first one for all
    of them. ``release`` is that of ``kernel_release``.
    """
    numbers = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?", release)
    if numbers is None:
        return False
    major, minor, patch = (int(number or 0) for number in numbers.groups())
    series = major, minor
    return series >= GRO_FIXED_SINCE or (series in GRO_FIXED and patch >= GRO_FIXED[series])


def _set_path_options(sock: socket.socket) -> None:
    """Set DF on every datagram, and let ICMP errors arrive in the error queue."""
    if sock.family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, IPV6_MTU_DISCOVER, PMTUDISC_PROBE)
        sock.setsockopt(socket.IPPROTO_IPV6, IPV6_DONTFRAG, 1)
    else:
        sock.setsockopt(socket.IPPROTO_IP, IP_MTU_DISCOVER, PMTUDISC_PROBE)
    _queue_errors(sock)
    _report_class(sock)


def _report_class(sock: socket.socket) -> None:
    """Let the core receive the traffic class of each datagram, which has the congestion mark."""
    if sock.family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, IPV6_RECVTCLASS, 1)
    else:
        sock.setsockopt(socket.IPPROTO_IP, IP_RECVTOS, 1)


def _queue_errors(sock: socket.socket) -> None:
    if sock.family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, IPV6_RECVERR, 1)
    else:
        sock.setsockopt(socket.IPPROTO_IP, IP_RECVERR, 1)


def _enlarge(sock: socket.socket, force: int, plain: int, size: int) -> int:
    """Set the buffer size. Return the size that the kernel reports."""
    try:
        sock.setsockopt(socket.SOL_SOCKET, force, size)  # may exceed rmem_max; needs CAP_NET_ADMIN
    except PermissionError:
        sock.setsockopt(socket.SOL_SOCKET, plain, size)
    return sock.getsockopt(socket.SOL_SOCKET, plain)


def _probe(udp: UdpSocket, request: OffloadRequest) -> None:
    # Set the socket's UDP_SEGMENT back to 0, because each send passes its own value.
    probes = {"udp-gso": ("UDP_SEGMENT", UDP_SEGMENT, (1400, 0)),
              "udp-gro": ("UDP_GRO", UDP_GRO, (1,))}
    features = set()
    for feature, (option_name, option, values) in probes.items():
        if feature not in request.features:
            udp.off[feature] = ASKED
            continue
        try:
            for value in values:
                udp.socket.setsockopt(socket.IPPROTO_UDP, option, value)
        except OSError as error:
            name = errno.errorcode.get(error.errno or 0, str(error.errno))
            udp.off[feature] = f"kernel refuses {option_name}: {name}"
            log.warning("%s: %s off: %s", udp.endpoint, feature, udp.off[feature])
        else:
            features.add(feature)
    udp.features = frozenset(features)
