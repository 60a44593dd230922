"""Attach BPF programs to the clsact hooks of devices, and look for other programs there.

Owns the requests for the clsact qdisc and its filters. A filter stays attached when this process
ends: the kernel holds the program and its maps. So packets flow without a process, and no
file in /sys/fs/bpf is needed. Our filters have the names that ``filter_name`` gives; filters of
other programs are never changed. Does not depend on what a program does. Threading: any thread, in
the network namespace of that thread; a call takes well under a millisecond.
"""

from __future__ import annotations

import errno
import socket
import struct
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import Enum

from ..device.bpf import TCX_EGRESS, TCX_INGRESS, attached_n
from .batch import Refusal, Request, RouteSocket, attribute, attributes
from .local import IFINFOMSG, IFLA_IFNAME, IFLA_MTU, RTM_GETLINK

# linux/rtnetlink.h, linux/pkt_sched.h, linux/pkt_cls.h
RTM_NEWQDISC, RTM_DELQDISC, RTM_GETQDISC = 36, 37, 38
RTM_NEWTFILTER, RTM_DELTFILTER, RTM_GETTFILTER = 44, 45, 46
NLM_F_CREATE, NLM_F_EXCL = 0x400, 0x200
TCMSG = struct.Struct("=BxxxiIII")  # family, interface index, handle, parent, info
TCA_KIND, TCA_OPTIONS = 1, 2
TCA_BPF_FD, TCA_BPF_NAME, TCA_BPF_FLAGS, TCA_BPF_ID = 6, 7, 8, 11
DIRECT_ACTION = 1  # TCA_BPF_FLAG_ACT_DIRECT: the program's result is the verdict
CLSACT_HANDLE, CLSACT_PARENT = 0xFFFF0000, 0xFFFFFFF1
PRIORITY = 8285  # of our filters; filters of other programs usually have smaller or larger numbers
ALL_PROTOCOLS = socket.htons(3)  # ETH_P_ALL
NAME_PREFIX = "udptun-"
PROGRAMS = ("send", "receive")
# A bit of the handles of our filters: we have added the qdisc. A later process can read it.
OUR_QDISC = 1
QDISCS = ("clsact", "ingress")  # those that have hooks; "ingress" has only one
HANDLE_TRIES = 5
ARPHRD_ETHER = 1
RTMGRP_TC = 0x8


class Hook(Enum):
    """A hook of a device: what arrives on it, or what leaves through it."""

    INGRESS = 0xFFFFFFF2
    EGRESS = 0xFFFFFFF3


@dataclass(frozen=True, slots=True)
class Filter:
    """A filter at a hook.

    name     of a BPF filter; "" if there is none
    program  the kernel's number of the BPF program; 0: none
    """

    kind: str
    priority: int
    handle: int
    name: str
    program: int


def filters(kernel: RouteSocket, device: int, hook: Hook) -> list[Filter]:
    """Return the filters of a hook; none if the device is gone. Raises OSError."""
    try:
        answers = kernel.dump(RTM_GETTFILTER, TCMSG.pack(0, device, 0, hook.value, 0))
    except OSError as error:
        if error.errno in (errno.ENODEV, errno.EINVAL, errno.ENOENT):  # no device, or no clsact
            return []
        raise
    return list(_filters(answers))


def _filters(answers: list[memoryview]) -> Iterator[Filter]:
    for answer in answers:
        _, _, handle, _, info = TCMSG.unpack_from(answer)
        about = attributes(answer, TCMSG.size)
        if handle == 0:  # not a filter: the head of a list of filters
            continue
        options = attributes(about.get(TCA_OPTIONS, memoryview(b"")), 0)
        yield Filter(
            _text(about.get(TCA_KIND)), info >> 16, handle, _text(options.get(TCA_BPF_NAME)),
            int.from_bytes(options.get(TCA_BPF_ID, b""), sys.byteorder))


def filter_name(program: str, tun: str) -> str:
    """Return the name of our filter with a program, for the forwarder with this TUN."""
    return f"{NAME_PREFIX}{program}-{tun}"


def attach(
    kernel: RouteSocket, device: int, hook: Hook, name: str, program: int, ours: bool = False
) -> None:
    """Attach a program under this name, or replace the program of our filter with this name.

    Adds the clsact qdisc if the device has no qdisc with this hook. Raises OSError.

    ours  we have added the qdisc before
    """
    clsact = TCMSG.pack(0, device, CLSACT_HANDLE, CLSACT_PARENT, 0) + attribute(
        TCA_KIND, b"clsact\0")
    refusal = _send(kernel, Request(RTM_NEWQDISC, NLM_F_CREATE | NLM_F_EXCL, clsact), errno.EEXIST)
    ours = ours or refusal is None or _has_our_qdisc(kernel, device)
    options = attribute(TCA_OPTIONS, attribute(TCA_BPF_FD, struct.pack("=I", program))
                        + attribute(TCA_BPF_NAME, name.encode() + b"\0")
                        + attribute(TCA_BPF_FLAGS, struct.pack("=I", DIRECT_ACTION)))
    for _ in range(HANDLE_TRIES):
        present = filters(kernel, device, hook)
        handle, flags = next((one.handle for one in present if one.name == name), 0), 0
        if not handle:
            used = {one.handle for one in present if one.priority == PRIORITY}
            handle = next(n for n in range(OUR_QDISC if ours else 2, 1 << 16, 2) if n not in used)
            flags = NLM_F_EXCL  # another forwarder may take the same handle now
        body = _filter(device, hook, handle) + options
        refusal = _send(kernel, Request(RTM_NEWTFILTER, NLM_F_CREATE | flags, body), errno.EEXIST)
        if refusal is None:
            return
    raise OSError(errno.EEXIST, f"no free handle for the filter {name}")


def detach(kernel: RouteSocket, device: int, hook: Hook, name: str) -> bool:
    """Remove our filter with this name. The qdisc stays. Raises OSError.

    Returns whether the filter says that we have added the qdisc.
    """
    ours = False
    for one in filters(kernel, device, hook):
        if one.name == name:
            request = Request(RTM_DELTFILTER, 0, _filter(device, hook, one.handle))
            _send(kernel, request, errno.ENOENT, errno.ENODEV)
            ours = ours or bool(one.handle & OUR_QDISC)
    return ours


def remove_empty(kernel: RouteSocket, device: int) -> None:
    """Remove the clsact qdisc of a device if it has no filter. Raises OSError.

    Call it only if we have added the qdisc. The kernel drops the packets that the device sends at
    this moment, as when the qdisc is added.
    """
    if with_hooks(kernel).get(device) == "clsact" and \
            not any(filters(kernel, device, hook) for hook in Hook):
        request = Request(
            RTM_DELQDISC, 0, TCMSG.pack(0, device, CLSACT_HANDLE, CLSACT_PARENT, 0))
        _send(kernel, request, errno.ENOENT, errno.ENODEV, errno.EINVAL)


def attached(kernel: RouteSocket, tun: str) -> list[tuple[int, Hook, Filter]]:
    """Return the filters of the forwarder with this TUN, and those that a killed forwarder has
    left, and whose TUN is gone. Raises OSError."""
    found = [(device, hook, one) for device, kind in with_hooks(kernel).items() for hook in Hook
             if hook is Hook.INGRESS or kind == "clsact"
             for one in filters(kernel, device, hook) if _tun_of(one.name)]
    # Afterwards: a forwarder that starts makes its TUN before its filters.
    present = _device_names(kernel) if any(_tun_of(one.name) != tun for *_, one in found) else set()
    return [(device, hook, one) for device, hook, one in found
            if _tun_of(one.name) == tun or _tun_of(one.name) not in present]


def remove(kernel: RouteSocket, tun: str, emptied: Iterable[int] = ()) -> list[str]:
    """Remove what ``attached`` returns, and each qdisc that we have added, if it is empty then.

    emptied  devices whose qdisc we have added, and whose filter is gone already
    Needs CAP_NET_ADMIN. Returns the names of the filters. Raises OSError.
    """
    found, devices = attached(kernel, tun), set(emptied)
    for device, hook, one in found:
        if detach(kernel, device, hook, one.name):
            devices.add(device)
    for device in devices:
        remove_empty(kernel, device)
    return [one.name for _, _, one in found]


def _tun_of(name: str) -> str:
    """Return the TUN in the name of a filter; "": the filter is not one of ours."""
    for program in PROGRAMS:
        prefix = filter_name(program, "")
        if name.startswith(prefix):
            return name.removeprefix(prefix)
    return ""


def _device_names(kernel: RouteSocket) -> set[str]:
    return {_text(attributes(answer, IFINFOMSG.size).get(IFLA_IFNAME))
            for answer in kernel.dump(RTM_GETLINK, IFINFOMSG.pack(socket.AF_UNSPEC, 0, 0, 0, 0))}


def _has_our_qdisc(kernel: RouteSocket, device: int) -> bool:
    return any(one.handle & OUR_QDISC and one.name.startswith(NAME_PREFIX)
               for hook in Hook for one in filters(kernel, device, hook))


def with_hooks(kernel: RouteSocket) -> dict[int, str]:
    """Return the devices that have one of QDISCS, with the kind of the qdisc. Raises OSError."""
    found = {}
    for answer in kernel.dump(RTM_GETQDISC, TCMSG.pack(0, 0, 0, 0, 0)):
        _, device, _, _, _ = TCMSG.unpack_from(answer)
        kind = _text(attributes(answer, TCMSG.size).get(TCA_KIND))
        if kind in QDISCS:
            found[device] = kind
    return found


def others(kernel: RouteSocket, device: int, hook: Hook) -> str:
    """Return what other programs have at a hook, as text; "": nothing. Raises OSError."""
    if hook is Hook.EGRESS and with_hooks(kernel).get(device) == "ingress":
        return "an ingress qdisc, which has no hook for sent packets,"
    foreign = [one for one in filters(kernel, device, hook)
               if not one.name.startswith(NAME_PREFIX)]
    if foreign:
        return f"a {foreign[0].kind} filter {foreign[0].name}".rstrip()
    tcx = attached_n(device, TCX_INGRESS if hook is Hook.INGRESS else TCX_EGRESS)
    return "a TCX program" if tcx else ""


def watch() -> socket.socket | None:
    """Return a non-blocking socket that gets a message at each change of a qdisc or filter."""
    sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC
                         | socket.SOCK_NONBLOCK, socket.NETLINK_ROUTE)
    sock.bind((0, RTMGRP_TC))
    return sock


def ethernet_mtu(kernel: RouteSocket, device: int) -> int:
    """Return the MTU of a device; 0 if its packets have no Ethernet header. Raises OSError."""
    [answer] = kernel.ask(RTM_GETLINK, [IFINFOMSG.pack(socket.AF_UNSPEC, 0, device, 0, 0)])
    if isinstance(answer, Refusal):
        return 0
    _, kind, *_ = IFINFOMSG.unpack_from(answer)
    mtu = attributes(answer, IFINFOMSG.size).get(IFLA_MTU, b"")
    return int.from_bytes(mtu, sys.byteorder) if kind == ARPHRD_ETHER else 0


def _filter(device: int, hook: Hook, handle: int) -> bytes:
    info = PRIORITY << 16 | ALL_PROTOCOLS
    return TCMSG.pack(0, device, handle, hook.value, info) + attribute(TCA_KIND, b"bpf\0")


def _send(kernel: RouteSocket, request: Request, *accepted: int) -> Refusal | None:
    """Return the kernel's refusal. Raise OSError if its errno is another one than these."""
    refusal = kernel.send([request]).get(0)
    if refusal is not None and refusal.number not in accepted:
        raise OSError(refusal.number, str(refusal))
    return refusal


def _text(value: memoryview | None) -> str:
    return "" if value is None else bytes(value).rstrip(b"\0").decode("utf-8", "replace")
