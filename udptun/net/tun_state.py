"""Read the kernel's configuration of one device: name, flags, settings, addresses and routes.

Owns the reading, and the comparison with the configuration that ``netlink.configure_tun`` sets.
Threading: call from any asyncio loop; the work runs in the thread of the given ``Netlink``.

A VXLAN device has a route for each peer. So the caller names the routes that it wants to find: only
these are parsed, and without any the routes are not read. Since Linux 4.20 the kernel filters the
dumps by interface. Older kernels send all entries, and this module filters them.
"""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
import struct
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from ..model import IPAddress, IPNetwork
from .batch import ATTRIBUTE, Refusal, RouteSocket, attributes
from .local import (
    IFA_ADDRESS,
    IFA_LOCAL,
    IFADDRMSG,
    IFINFOMSG,
    IFLA_IFNAME,
    IFLA_MTU,
    RTM_GETADDR,
    RTM_GETLINK,
)
from .netlink import (
    DEVICE_SETTINGS,
    IFF_UP,
    IFLA_AF_SPEC,
    IFLA_INET_CONF,
    IN6_ADDR_GEN_MODE_NONE,
    IPV4_DEVCONF_ACCEPT_LOCAL,
    IPV4_DEVCONF_RP_FILTER,
    Netlink,
)
from .underlay import RT_TABLE_MAIN, RTA_OIF, RTA_TABLE, RTM_GETROUTE, RTMSG

RTA_DST = 1  # linux/rtnetlink.h
# linux/if_link.h
IFLA_INET6_ADDR_GEN_MODE = 8
IFLA_LINKINFO, IFLA_INFO_DATA = 18, 2
IFLA_TUN_NUM_QUEUES, IFLA_TUN_NUM_DISABLED_QUEUES = 8, 9
FAMILIES = {socket.AF_INET: 32, socket.AF_INET6: 128}  # family: bits of an address
SETTING_NAMES = {IPV4_DEVCONF_ACCEPT_LOCAL: "accept_local", IPV4_DEVCONF_RP_FILTER: "rp_filter"}


@dataclass(frozen=True, slots=True)
class TunState:
    """The state of one device.

    up         the device is up (IFF_UP)
    addresses  addresses of the device, both families
    networks   those of the given networks to which the main table has a route through the device
    settings   the values of DEVICE_SETTINGS in the kernel
    quiet      the kernel creates no link-local address on the device, so it sends no packets of its
               own
    queues     number of queues, also the detached ones, of a TUN that may have several; else 0
    """

    name: str
    mtu: int
    up: bool
    addresses: frozenset[IPAddress]
    networks: frozenset[IPNetwork]
    settings: tuple[tuple[int, int], ...]
    quiet: bool
    queues: int = 0

    def differences(
        self, name: str, mtu: int, addresses: Iterable[IPAddress], networks: Iterable[IPNetwork]
    ) -> list[str]:
        """Return what differs from the wanted configuration, one text for each difference."""
        found = []
        if self.name != name:
            found.append(f"its name is {self.name}")
        if not self.up:
            found.append("it is down")
        if self.mtu != mtu:
            found.append(f"its MTU is {self.mtu}")
        lost = [str(one) for one in addresses if one not in self.addresses]
        if self.up:  # a device that is down has no routes
            lost += [str(one) for one in networks if one not in self.networks]
        if lost:
            found.append(f"it has lost {', '.join(lost)}")
        found += [f"its {SETTING_NAMES[number]} is {value}" for number, value in self.settings
                  if value != DEVICE_SETTINGS[number]]
        if not self.quiet:
            found.append("the kernel creates link-local addresses on it")
        return found


async def tun_state(
    netlink: Netlink, index: int, networks: Iterable[IPNetwork] = ()
) -> TunState | None:
    """Return the state of the device with this interface index, or None if it does not exist.

    networks  the routes to look for
    Raises DeviceError.
    """
    wanted = frozenset(networks)

    async def read(_: Any) -> TunState | None:
        with RouteSocket() as kernel:
            return _state(kernel, index, wanted)

    return await netlink.work("reading the TUN device's state", read)


def _state(
    kernel: RouteSocket, index: int, networks: frozenset[IPNetwork]
) -> TunState | None:
    (link,) = kernel.ask(RTM_GETLINK, [IFINFOMSG.pack(socket.AF_UNSPEC, 0, index, 0, 0)])
    if isinstance(link, Refusal):
        if link.number == errno.ENODEV:
            return None
        raise OSError(link.number, str(link))
    flags = IFINFOMSG.unpack_from(link)[3]
    about = attributes(link, IFINFOMSG.size)
    families = attributes(about.get(IFLA_AF_SPEC, memoryview(b"")), 0)
    return TunState(
        os.fsdecode(bytes(about[IFLA_IFNAME]).rstrip(b"\0")), _u32(about.get(IFLA_MTU)),
        bool(flags & IFF_UP), frozenset(_addresses(kernel, index)),
        frozenset(_routed(kernel, index, networks)), _settings(families.get(socket.AF_INET)),
        _is_quiet(families.get(socket.AF_INET6)), _queues(about.get(IFLA_LINKINFO)),
    )


def _queues(info: memoryview | None) -> int:
    data = attributes(info or memoryview(b""), 0).get(IFLA_INFO_DATA)
    tun = attributes(data or memoryview(b""), 0)
    return _u32(tun.get(IFLA_TUN_NUM_QUEUES)) + _u32(tun.get(IFLA_TUN_NUM_DISABLED_QUEUES))


def _is_quiet(inet6: memoryview | None) -> bool:
    mode = attributes(inet6 or memoryview(b""), 0).get(IFLA_INET6_ADDR_GEN_MODE)
    return mode is None or mode[0] == IN6_ADDR_GEN_MODE_NONE  # None: no IPv6 on this host


def _settings(inet: memoryview | None) -> tuple[tuple[int, int], ...]:
    """Read DEVICE_SETTINGS from the link message. Without IPv4 on the host there are none."""
    conf = attributes(inet or memoryview(b""), 0).get(IFLA_INET_CONF)
    if conf is None:
        return ()
    values = conf.cast("I")
    return tuple((number, values[number - 1]) for number in DEVICE_SETTINGS)


def _addresses(kernel: RouteSocket, index: int) -> list[IPAddress]:
    found: list[IPAddress] = []
    for message in kernel.dump(RTM_GETADDR, IFADDRMSG.pack(socket.AF_UNSPEC, 0, 0, 0, index)):
        if IFADDRMSG.unpack_from(message)[4] == index:
            values = attributes(message, IFADDRMSG.size)
            # On a point-to-point link IFA_ADDRESS is the other end.
            packed = values.get(IFA_LOCAL, values.get(IFA_ADDRESS))
            if packed is not None:
                found.append(ipaddress.ip_address(bytes(packed)))
    return found


def _routed(
    kernel: RouteSocket, index: int, networks: frozenset[IPNetwork]
) -> Iterator[IPNetwork]:
    """Yield the networks that the main table routes through the device."""
    for family, bits in FAMILIES.items():
        wanted = {(net.network_address.packed, net.prefixlen): net for net in networks
                  if net.max_prefixlen == bits}
        lengths = {length for _, length in wanted}
        for message in _routes(kernel, index, family) if wanted else ():
            prefix_len = RTMSG.unpack_from(message)[1]
            if prefix_len not in lengths:
                continue
            values = attributes(message, RTMSG.size)
            prefix = bytes(values.get(RTA_DST, bytes(bits // 8))), prefix_len
            if prefix in wanted and _u32(values.get(RTA_OIF)) == index and \
                    _u32(values.get(RTA_TABLE)) == RT_TABLE_MAIN:
                yield wanted[prefix]


def _routes(kernel: RouteSocket, index: int, family: int) -> list[memoryview]:
    request = RTMSG.pack(family, 0, 0, 0, RT_TABLE_MAIN, 0, 0, 0, 0)
    request += ATTRIBUTE.pack(ATTRIBUTE.size + 4, RTA_OIF) + struct.pack("=I", index)
    try:
        return kernel.dump(RTM_GETROUTE, request)
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.EOPNOTSUPP, errno.ENODEV):
            raise
        return []  # no main table yet, or no IPv6 on this host, or no such device


def _u32(attribute: memoryview | None) -> int:
    return int.from_bytes(attribute or b"", sys.byteorder)
