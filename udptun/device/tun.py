"""Open a TUN device with every offload that is requested and that the kernel supports.

Owns the ioctls on ``/dev/net/tun``, the write probe and the rule for device names. ``net.netlink``
sets addresses, routes and MTU. The compiled core reads and writes. Any thread; no shared state.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import socket
import struct
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import DeviceError, FieldError
from ..instance import MAX_DEVICE_NAME
from .fault import device_error
from .offload import ASKED, OffloadRequest

log = logging.getLogger(__name__)

DEVICE = "/dev/net/tun"
HOLDER_LEN = 200  # bytes of a command line in an error message

# linux/if_tun.h
TUNSETIFF = 0x400454CA
TUNSETOWNER = 0x400454CC
TUNSETOFFLOAD = 0x400454D0
TUNGETIFF = 0x800454D2
TUNSETVNETHDRSZ = 0x400454D8
IFF_TUN, IFF_MULTI_QUEUE, IFF_PERSIST = 0x0001, 0x0100, 0x0800
IFF_NO_PI, IFF_VNET_HDR, IFF_TUN_EXCL = 0x1000, 0x4000, 0x8000
TUN_F_CSUM, TUN_F_TSO4, TUN_F_TSO6, TUN_F_TSO_ECN = 0x01, 0x02, 0x04, 0x08
TUN_F_USO4, TUN_F_USO6 = 0x20, 0x40
TSO = TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO6
USO = TUN_F_USO4 | TUN_F_USO6  # the kernel accepts both or none

SIOCGIFFLAGS, IFF_UP = 0x8913, 0x1  # linux/sockios.h, linux/if.h

VNET_LEN = 10  # struct virtio_net_hdr, linux/virtio_net.h; in native byte order by default
VNET_HDR = struct.Struct("=BBHHHH")  # flags, gso_type, hdr_len, gso_size, csum_start, csum_offset
NEEDS_CSUM, GSO_TCPV4, GSO_TCPV6, GSO_UDP_L4 = 1, 1, 4, 5

Ifreq = struct.Struct("16sH22x")


@dataclass
class Tun:
    """An open TUN device. ``close`` removes it, unless it is persistent.

    name      name in the kernel (the kernel replaces ``tun%d``)
    fds       one descriptor per queue, non-blocking, close-on-exec; owned by this object
    vnet_hdr  True: a virtio_net_hdr of VNET_LEN bytes precedes each packet that is read or written.
              Same as ``"tun-gso" in features``
    features  which of tun-gso and tun-uso the kernel supports
    off       for each feature that is off, the cause. A merge feature is off if the kernel refuses
              the writes of merged packets
    """

    name: str
    fds: tuple[int, ...]
    vnet_hdr: bool
    features: frozenset[str]
    off: dict[str, str] = field(default_factory=dict)

    @classmethod
    def open(cls, name: str, queues: int, request: OffloadRequest) -> Tun:
        """Open ``queues`` queues of the device ``name``. Create the device if it does not exist.

        The device stays down, because the write probe works only while it is down. Raises
        FieldError for an invalid name, DeviceError if the kernel refuses.
        """
        check_name(name)
        if "tun-gso" in request.features:
            fds, real_name = _open_queues(name, queues, IFF_VNET_HDR)
            tun = cls(real_name, fds, True, frozenset())
            try:
                cause = tun._enable(request)
            except BaseException:
                tun.close()
                raise
            if cause is None:
                return tun
            tun.close()
        else:
            cause = ASKED
        fds, real_name = _open_queues(name, queues, 0)
        off = {"tun-gso": cause, "tun-uso": "needs tun-gso"}
        tun = cls(real_name, fds, False, frozenset(), off)
        # A persistent device may still have the offloads of its previous user.
        _set_offload(fds[0], 0)
        return tun

    @classmethod
    def adopt(
        cls, name: str, fds: tuple[int, ...], vnet_hdr: bool, features: frozenset[str],
        off: dict[str, str],
    ) -> Tun:
        """Use the queues that another process has opened. The new object owns the descriptors.

        Raises DeviceError if they are not queues of this device, or the device is gone.
        """
        for fd in fds:
            try:
                answer = fcntl.ioctl(fd, TUNGETIFF, bytes(Ifreq.size))
            except OSError as error:
                raise device_error(error.errno or 0, f"using a queue of {name}") from None
            actual = os.fsdecode(Ifreq.unpack(answer)[0].rstrip(b"\0"))
            if actual != name:
                raise device_error(errno.ENODEV, f"using a queue of {name}", f"it is of {actual}")
        return cls(name, fds, vnet_hdr, features, off)

    @classmethod
    def reuse(cls, fds: tuple[int, ...], request: OffloadRequest) -> Tun:
        """Use the queues of a process that has died. The new object owns the descriptors.

        Raises DeviceError if the device is gone or has other settings than ``request`` needs; the
        descriptors then stay open.
        """
        doing = "using the kept queues of the TUN device"
        try:
            answer = Ifreq.unpack(fcntl.ioctl(fds[0], TUNGETIFF, bytes(Ifreq.size)))
        except OSError as error:
            raise device_error(error.errno or 0, doing) from None
        vnet_hdr = bool(answer[1] & IFF_VNET_HDR)
        name = os.fsdecode(answer[0].rstrip(b"\0"))
        if vnet_hdr != ("tun-gso" in request.features):
            raise device_error(errno.EOPNOTSUPP, doing, "it was made with other offloads")
        tun = cls.adopt(name, fds, vnet_hdr, frozenset(), {})
        if vnet_hdr and (cause := tun._enable(request)) is not None:
            raise device_error(errno.EOPNOTSUPP, doing, cause)
        return tun

    def reopen(self, request: OffloadRequest) -> None:
        """Make the device again after it was deleted. The numbers of the descriptors do not change.

        So a thread that polls or reads a descriptor continues with the new queue. The new device is
        down and has no address. Raises DeviceError if the kernel refuses, or if the new device
        would have other offloads.
        """
        new = Tun.open(self.name, len(self.fds), request)
        try:
            if (new.vnet_hdr, new.features) != (self.vnet_hdr, self.features):
                raise device_error(errno.EOPNOTSUPP, f"making {self.name} again",
                                   "the kernel does not support the same offloads any more")
            for fresh, fd in zip(new.fds, self.fds, strict=True):
                os.dup2(fresh, fd, inheritable=False)
        finally:
            new.close()  # the device stays, because its queues have other descriptors now

    def close(self) -> None:
        """Close all queues. The kernel then removes the device, unless it is persistent."""
        fds, self.fds = self.fds, ()
        for fd in fds:
            os.close(fd)

    def _enable(self, request: OffloadRequest) -> str | None:
        """Turn the offloads on and probe them. Return None, or why no offload can be used."""
        # The header size and the offloads are properties of the device, not of a queue.
        try:
            fcntl.ioctl(self.fds[0], TUNSETVNETHDRSZ, struct.pack("i", VNET_LEN))
        except OSError as error:
            return self._give_up(f"kernel refuses TUNSETVNETHDRSZ: {_name(error)}")
        tries: list[tuple[int, tuple[str, ...]]] = [(TSO | TUN_F_TSO_ECN, ()), (TSO, ("ECN",))]
        if "tun-uso" in request.features:
            tries = [(TSO | TUN_F_TSO_ECN | USO, ()),
                     *((offload, ("USO", *without)) for offload, without in tries)]
        else:
            self.off["tun-uso"] = ASKED
        cause: str | None = None
        without: tuple[str, ...] = ()
        for offload, without in tries:  # noqa: B007 - used after the loop
            refused = _set_offload(self.fds[0], offload)
            if refused is None:
                break
            cause = refused
        else:
            return self._give_up(f"kernel refuses TUNSETOFFLOAD TSO: {cause}")
        for what in without:
            # Without TUN_F_TSO_ECN, the kernel itself segments super-packets with CWR set.
            log.warning("%s: %s off: kernel refuses TUNSETOFFLOAD %s: %s",
                        self.name, {"USO": "tun-uso", "ECN": "TSO_ECN"}[what], what, cause)
        if "USO" in without:
            self.off["tun-uso"] = f"kernel refuses TUNSETOFFLOAD USO: {cause}"
        self.features = frozenset({"tun-gso", "tun-uso"} - self.off.keys())
        self._probe_writes()
        return None

    def _give_up(self, cause: str) -> str:
        log.warning("%s: tun-gso off: %s", self.name, cause)
        return cause

    def _probe_writes(self) -> None:
        """Write a super-packet of each kind to the device while it is down.

        The kernel parses the header before it checks that the device is up. EIO means that the
        kernel supports the format, EINVAL that it does not. No packet is delivered. Each probe
        counts as one rx_dropped of the device.

        A device that is up would receive the probe as a packet, so such a device is not probed. The
        data path then turns a merge off when its first write fails.
        """
        if _is_up(self.name):
            return
        probes = [("tcp-merge", "TSO4", _probe_frame(4, GSO_TCPV4)),
                  ("tcp-merge", "TSO6", _probe_frame(6, GSO_TCPV6))]
        if "tun-uso" in self.features:
            probes += [("udp-merge", "USO4", _probe_frame(4, GSO_UDP_L4)),
                       ("udp-merge", "USO6", _probe_frame(6, GSO_UDP_L4))]
        for feature, what, frame in probes:
            try:
                os.write(self.fds[0], frame)
            except OSError as error:
                if error.errno == errno.EIO or feature in self.off:
                    continue
                self.off[feature] = f"kernel refuses {what} writes: {_name(error)}"
                log.warning("%s: %s off: %s", self.name, feature, self.off[feature])


def check_name(name: str) -> None:
    """Raise FieldError if the kernel does not accept ``name`` as a device name (dev_valid_name in
    net/core/dev.c), or if ``name`` is not safe to print."""
    if (
        not 0 < len(os.fsencode(name)) <= MAX_DEVICE_NAME
        or name in (".", "..")
        or any(char in "/:\0" or char.isspace() for char in name)
        or not name.isprintable()
    ):
        raise FieldError("tun", name, f"a device name of 1 to {MAX_DEVICE_NAME} bytes, without "
                                      "blanks, '/' and ':'")


def _open_queues(name: str, queues: int, flags: int) -> tuple[tuple[int, ...], str]:
    fds: list[int] = []
    flags |= IFF_TUN | IFF_NO_PI
    if queues > 1:
        flags |= IFF_MULTI_QUEUE
    try:
        for _ in range(queues):
            fds.append(_open_device())
            name = _attach(fds[-1], name, flags, first=len(fds) == 1)
            if len(fds) == 1 and not _is_persistent(fds[0]):
                # A device without owner and group lets every user who can open DEVICE, which is
                # every user of most hosts, add a queue: to read our packets, and to send.
                fcntl.ioctl(fds[0], TUNSETOWNER, os.geteuid())
    except BaseException:
        for fd in fds:
            os.close(fd)
        raise
    return tuple(fds), name


def _open_device() -> int:
    try:
        return os.open(DEVICE, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        hint = {
            errno.ENOENT: "run modprobe tun, or give the container this device",
            errno.ENODEV: "run modprobe tun, or give the container this device",
            errno.ENXIO: "run modprobe tun, or give the container this device",
            errno.EPERM: "the container has no access to this device",
            errno.EACCES: "this user has no access to this device",
        }.get(error.errno or 0, "")
        raise device_error(error.errno or 0, f"opening {DEVICE}", hint) from None


def _attach(fd: int, name: str, flags: int, first: bool) -> str:
    """Attach ``fd`` to the device as a queue. Return the device's name."""
    doing = f"opening the TUN device {name}"
    try:
        if first and flags & IFF_MULTI_QUEUE:
            # Without IFF_TUN_EXCL the kernel would add our queues to the device of another
            # process. If the device exists and is persistent, it was created for us: use it.
            with contextlib.suppress(FileExistsError):
                return _set_iff(fd, name, flags | IFF_TUN_EXCL)
            real_name = _set_iff(fd, name, flags)
            if not _is_persistent(fd):
                raise OSError(errno.EBUSY, "")
            return real_name
        return _set_iff(fd, name, flags)
    except OSError as error:
        raise _attach_error(error, doing, name) from None


def _set_iff(fd: int, name: str, flags: int) -> str:
    request = Ifreq.pack(os.fsencode(name), flags)
    try:
        answer = fcntl.ioctl(fd, TUNSETIFF, request)
    except OSError as error:
        if error.errno == errno.EBUSY and flags & IFF_TUN_EXCL:
            raise FileExistsError from None
        raise
    return os.fsdecode(Ifreq.unpack(answer)[0].rstrip(b"\0"))


def _is_persistent(fd: int) -> bool:
    answer = fcntl.ioctl(fd, TUNGETIFF, bytes(Ifreq.size))
    return bool(Ifreq.unpack(answer)[1] & IFF_PERSIST)


def _attach_error(error: OSError, doing: str, name: str) -> DeviceError:
    hint = {
        errno.EPERM: "this needs CAP_NET_ADMIN, or a persistent device that this user owns",
        errno.EBUSY: f"the device is in use by {_holder(name)}",
        errno.EINVAL: "the name belongs to a device of another type, or to a TUN device with "
                      "another multi_queue setting (made for another number of --workers?)",
        errno.E2BIG: "the device has the maximum number of queues",
    }.get(error.errno or 0, "")
    return device_error(error.errno or 0, doing, hint)


def _holder(name: str) -> str:
    """Return the process that has the device open, for an error message."""
    here = Path("/proc/thread-self/ns/net").readlink()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # the process has ended, or belongs to another user
            if (process / "ns/net").readlink() == here and any(
                f"iff:\t{name}\n" in info.read_text() for info in (process / "fdinfo").iterdir()
            ):
                words = os.fsdecode((process / "cmdline").read_bytes().replace(b"\0", b" "))
                return f"process {process.name}: {words.strip()[:HOLDER_LEN]}"
    return "another process"


def _set_offload(fd: int, offload: int) -> str | None:
    """Set the offloads. Return None, or the name of the kernel's error."""
    try:
        fcntl.ioctl(fd, TUNSETOFFLOAD, offload)
    except OSError as error:
        return _name(error)
    return None


def _is_up(name: str) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as any_socket:
        answer = fcntl.ioctl(any_socket, SIOCGIFFLAGS, Ifreq.pack(os.fsencode(name), 0))
    return bool(Ifreq.unpack(answer)[1] & IFF_UP)


def _probe_frame(version: int, gso_type: int) -> bytes:
    """Build a super-packet of two segments with 8 bytes of payload each."""
    payload = bytes(16)
    if gso_type == GSO_UDP_L4:
        l4 = struct.pack("!HHHH", 9, 9, 8 + len(payload), 0)
        protocol, csum_offset = socket.IPPROTO_UDP, 6
    else:
        l4 = struct.pack("!HHIIBBHHH", 9, 9, 0, 0, 5 << 4, 0x10, 0, 0, 0)
        protocol, csum_offset = socket.IPPROTO_TCP, 16
    l4_len = len(l4) + len(payload)
    if version == 4:
        ip = struct.pack("!BBHHHBBH8x", 0x45, 0, 20 + l4_len, 0, 0, 64, protocol, 0)
    else:
        ip = struct.pack("!IHBB32x", 6 << 28, l4_len, protocol, 64)
    header = VNET_HDR.pack(NEEDS_CSUM, gso_type, len(ip) + len(l4), 8, len(ip), csum_offset)
    return header + ip + l4 + payload


def _name(error: OSError) -> str:
    return errno.errorcode.get(error.errno or 0, str(error.errno))

