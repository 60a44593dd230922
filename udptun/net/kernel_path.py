"""What the kernel does with a packet to one address: the route, the device and the VXLAN entries.

For a person who looks for a fault. Reads the kernel's own answer (RTM_GETROUTE), and does not
depend on what udptun has configured. Uses only the standard library, because a client command has
to start fast. Any thread; the answer is for the network namespace of the thread.
"""

from __future__ import annotations

import ipaddress
import os
import struct
from dataclasses import dataclass

from ..errors import DeviceError
from ..model import IPAddress
from ..text import os_reason
from .batch import ATTRIBUTE, Refusal, RouteSocket, attributes, number, text
from .vxlan_entries import EntrySocket

# linux/rtnetlink.h
RTM_GETLINK, RTM_GETROUTE = 18, 26
RTA_DST, RTA_OIF, RTA_GATEWAY, RTA_PREFSRC, RTA_TABLE = 1, 4, 5, 7, 15
RTN_LOCAL = 2
RTMSG = struct.Struct("=8BI")  # family, dst_len, src_len, TOS, table, protocol, scope, type, flags
IFINFOMSG = struct.Struct("=BxHiII")  # family, kind of device, index, flags, change
# linux/if_link.h
IFLA_IFNAME, IFLA_MTU, IFLA_LINKINFO = 3, 4, 18
IFLA_INFO_KIND, IFLA_INFO_DATA, IFLA_VXLAN_ID = 1, 2, 1
FAMILY = {4: 2, 6: 10}  # AF_INET, AF_INET6


@dataclass(frozen=True, slots=True)
class Vxlan:
    """The entries of a VXLAN device for one next hop; None: there is no such entry.

    mac     of the neighbour entry
    remote  the address on the underlay, of the FDB entry of ``mac``
    """

    vni: int
    mac: str | None
    remote: IPAddress | None


@dataclass(frozen=True, slots=True)
class KernelPath:
    """The kernel's answer for packets that this host sends.

    error    if the kernel does not send the packet: the reason, as a sentence; else ""
    local    the address is this host's own
    kind     the type of the device, for example tun or vxlan; "" for a network card
    gateway  None: the destination is on the link
    vxlan    None: the device is not a VXLAN device
    """

    error: str = ""
    local: bool = False
    device: str = ""
    kind: str = ""
    mtu: int = 0
    gateway: IPAddress | None = None
    source: IPAddress | None = None
    table: int = 0
    vxlan: Vxlan | None = None


def kernel_path(address: IPAddress) -> KernelPath:
    """Ask the kernel of this network namespace. Raises DeviceError."""
    try:
        with RouteSocket() as kernel:
            return _ask(kernel, address)
    except OSError as exc:
        raise DeviceError(
            exc.errno, f"looking up the route to {address}: {os_reason(exc)}") from exc


def _ask(kernel: RouteSocket, address: IPAddress) -> KernelPath:
    packed = address.packed
    question = RTMSG.pack(FAMILY[address.version], len(packed) * 8, 0, 0, 0, 0, 0, 0, 0) + \
        ATTRIBUTE.pack(ATTRIBUTE.size + len(packed), RTA_DST) + packed
    (answer,) = kernel.ask(RTM_GETROUTE, [question])
    if isinstance(answer, Refusal):
        return KernelPath(error=str(answer))
    kind = RTMSG.unpack_from(answer)[7]
    route = attributes(answer, RTMSG.size)
    index, table = number(route.get(RTA_OIF)), number(route.get(RTA_TABLE))
    gateway, source = _address(route.get(RTA_GATEWAY)), _address(route.get(RTA_PREFSRC))
    (answer,) = kernel.ask(RTM_GETLINK, [IFINFOMSG.pack(0, 0, index, 0, 0)])
    if isinstance(answer, Refusal):  # the device was removed in the meantime
        raise OSError(answer.number, os.strerror(answer.number))
    link = attributes(answer, IFINFOMSG.size)
    info = attributes(link.get(IFLA_LINKINFO, memoryview(b"")), 0)
    name, device_kind = text(link.get(IFLA_IFNAME)), text(info.get(IFLA_INFO_KIND))
    vxlan = None
    if device_kind == "vxlan":
        data = attributes(info.get(IFLA_INFO_DATA, memoryview(b"")), 0)
        vni = number(data.get(IFLA_VXLAN_ID))
        vxlan = _vxlan(kernel, index, vni, gateway or address)
    return KernelPath("", kind == RTN_LOCAL, name, device_kind, number(link.get(IFLA_MTU)),
                      gateway, source, table, vxlan)


def _vxlan(kernel: RouteSocket, index: int, vni: int, next_hop: IPAddress) -> Vxlan:
    entries = EntrySocket(kernel, index, next_hop.version).read()
    mac = entries.neighbours.get(next_hop.packed)
    remote = None if mac is None else entries.forwarding.get(mac)
    return Vxlan(vni, None if mac is None else mac.hex(":"),
                 None if remote is None else ipaddress.ip_address(remote))


def _address(attribute: memoryview | None) -> IPAddress | None:
    return None if attribute is None else ipaddress.ip_address(bytes(attribute))
