"""Reach peers through the kernel's VXLAN device, as flannel does it.

Owns the device (``flannel.<VNI>``) and what it shall be like. A peer stands in it as a permanent
neighbour (base address of its subnet -> MAC), a forwarding entry (MAC -> endpoint) and a route
(subnet via its base address through the device): ``vxlan_peers`` and ``vxlan_entries`` make these.
Refuses to know leases and to choose which peer goes this way. Threading rule: call from any asyncio
loop; the work is done in the thread of the ``Netlink`` that is given, one call after the other.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import logging
import os
import socket
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from ..device.fault import device_error
from ..errors import DeviceError, FieldError
from ..model import MIN_MTU6, IPAddress, IPNetwork
from .batch import RouteSocket
from .netlink import (
    IFA_F_NODAD,
    IFA_F_NOPREFIXROUTE,
    IFF_UP,
    IN6_ADDR_GEN_MODE_NONE,
    Netlink,
)
from .vxlan_entries import Entries, EntrySocket
from .vxlan_peers import Application, PeerFailure, VxlanPeer, parse_mac, take

__all__ = ["OVERHEAD", "PeerFailure", "Vxlan", "VxlanConfig", "VxlanDevice", "VxlanPeer"]

log = logging.getLogger(__name__)
T = TypeVar("T")
IPInterface = ipaddress.IPv4Interface | ipaddress.IPv6Interface

KIND = "vxlan"
PROBE_NAME = "udtunprobe"
PROBE_VNI = (1 << 24) - 8285  # the top of the range, which people seldom use
# The kernel's, from before IANA gave 4789; a host may say otherwise when it loads the module.
DEFAULT_PORT = 8472
DEFAULT_PORT_FILE = Path("/sys/module/vxlan/parameters/udp_port")
OVERHEAD = {4: 50, 6: 70}  # bytes around the inner packet, by the IP version of the underlay


@dataclass(frozen=True, slots=True)
class VxlanConfig:
    """What a VXLAN device shall be like.

    port            UDP port; 0 is the kernel's own, 8472
    underlay_index  number of the interface that the datagrams leave through
    local           this host's address there; its version is that of the device
    mtu             of the device, so of inner packets, bytes: underlay's less OVERHEAD
    mac             "aa:bb:.." to be known by; None: the present device's, else one at random
    """

    name: str
    vni: int
    port: int
    underlay_index: int
    local: IPAddress
    mtu: int
    learning: bool = False
    gbp: bool = False
    mac: str | None = None


@dataclass(frozen=True, slots=True)
class VxlanDevice:
    """A device that is there. version: of the underlay, and of the subnets it carries."""

    name: str
    index: int
    mac: str
    mtu: int
    version: int


class Vxlan:
    """VXLAN devices of this network namespace, and their peers."""

    def __init__(self, netlink: Netlink) -> None:
        self._netlink = netlink
        self._known: dict[int, Entries] = {}  # by interface number; only in the netlink thread

    # -- the device -------------------------------------------------------------------------------

    async def probe(self, like: VxlanConfig | None = None) -> str | None:
        """Whether the kernel makes a VXLAN device here: None, or a sentence that says why not.

        Makes one on another VNI, sets it up, which takes the UDP port, and removes it. ``like``:
        of the same port, GBP, underlay and IP version.
        """
        config = like or VxlanConfig(PROBE_NAME, PROBE_VNI, 0, 0, ipaddress.IPv4Address(0), 0)
        config = replace(config, name=PROBE_NAME, vni=PROBE_VNI, mtu=0, mac=None)
        try:
            await self.remove(PROBE_NAME)  # one that a killed probe left
            await self._make("trying a VXLAN device", config, IFF_UP)
            await self.remove(PROBE_NAME)
        except DeviceError as error:
            return str(error)
        return None

    async def ensure(
        self, config: VxlanConfig, addresses: Iterable[IPAddress] | None = None
    ) -> VxlanDevice:
        """The device is there, up, and as told. One that fits is adopted, with its peers and its
        MAC; one that does not is made anew, with the same MAC, since peers know it.

        addresses  become its only ones, each as a host address; None: not known yet, those it has
                   stay (link-local ones always do)
        DeviceError, FieldError (mtu, mac)
        """
        if config.mac is not None:
            parse_mac("mac", config.mac)
        if config.local.version == 6 and config.mtu < MIN_MTU6:
            raise FieldError("mtu", config.mtu, f"at least {MIN_MTU6} for IPv6 inside")
        doing = f"making the VXLAN device {config.name}"
        found = await self._find(config.name)
        if found is not None:
            if not (misfit := _misfit(found, config)):
                return await self._settle(found, config, addresses)
            if found.kind != KIND:
                raise device_error(errno.EEXIST, doing, misfit)
            log.warning("%s is made anew: %s", config.name, misfit)
            config = replace(config, mac=config.mac or found.mac)
            await self._delete(found)
        await self._make(doing, config, 0)
        found = await self._find(config.name)
        try:
            if found is None:
                raise device_error(errno.ENODEV, doing, "somebody removed it")
            return await self._settle(found, config, addresses)
        except BaseException:  # half made it is of no use
            if found is not None:
                with contextlib.suppress(DeviceError):
                    await self._delete(found)
            raise

    async def remove(self, name: str) -> None:
        """Remove the device with all that goes through it, and the routes straight to its peers.
        Nothing happens if there is none. DeviceError: it is not a VXLAN device."""
        found = await self._find(name)
        if found is None:
            return
        if found.kind != KIND:
            raise device_error(errno.EEXIST, f"removing {name}", "it is not a VXLAN device")

        def take_routes(entries: EntrySocket) -> list[str]:
            return entries.delete(Entries(routes=entries.read().routes))

        device = VxlanDevice(name, found.index, found.mac, found.mtu, found.version)
        for sentence in await self._entries(f"removing {name}", device, take_routes):
            log.warning("%s", sentence)
        await self._delete(found)

    # -- the peers --------------------------------------------------------------------------------

    async def sync(
        self, device: VxlanDevice, peers: Iterable[VxlanPeer]
    ) -> tuple[PeerFailure, ...]:
        """Make these the peers of the device: reads what is there, applies the difference. A peer
        that the kernel refuses is returned; all others are in force. DeviceError: none may be."""
        put = tuple(peers)

        def work(entries: EntrySocket) -> tuple[PeerFailure, ...]:
            self._known.pop(device.index, None)
            return self._apply(device, Application(entries, Entries(), entries.read(), trust=True),
                               put)

        return await self._entries(f"telling {device.name} its peers", device, work)

    async def change(
        self, device: VxlanDevice, put: Iterable[VxlanPeer] = (), remove: Iterable[IPNetwork] = (),
    ) -> tuple[PeerFailure, ...]:
        """Remove the peers of some subnets, add or change others. As ``sync``, but what is there
        is remembered, not read, and whatever is put is sent."""
        peers = tuple(put)
        touched = {*remove, *(peer.subnet for peer in peers)}

        def work(entries: EntrySocket) -> tuple[PeerFailure, ...]:
            now = self._known.pop(device.index, None) or entries.read()
            former = take(now, touched)
            return self._apply(device, Application(entries, now, former, trust=False), peers)

        return await self._entries(f"changing the peers of {device.name}", device, work)

    def _apply(
        self, device: VxlanDevice, application: Application, peers: tuple[VxlanPeer, ...]
    ) -> tuple[PeerFailure, ...]:
        application.put(peers, device.name, device.version)
        for sentence in application.clear():
            log.warning("%s: %s", device.name, sentence)
        self._known[device.index] = application.now  # unless it failed: then read again
        return tuple(application.failures)

    async def _entries(
        self, doing: str, device: VxlanDevice, work: Callable[[EntrySocket], T]
    ) -> T:
        """Run ``work`` on the entries of the device. All of it is one turn of the netlink thread,
        so that calls that come together do not mix."""
        async def job(_: Any) -> T:
            try:
                there = socket.if_nametoindex(device.name) == device.index
            except OSError:
                there = False
            if not there:
                raise OSError(errno.ENODEV, "")
            with RouteSocket() as netlink:
                return work(EntrySocket(netlink, device.index, device.version))

        return await self._netlink.work(doing, job)

    # -- pieces -----------------------------------------------------------------------------------

    async def _find(self, name: str) -> _Found | None:
        async def get(ipr: Any) -> _Found:
            (message,) = await ipr.link("get", ifname=name)
            return _Found.read(message)

        try:
            return await self._netlink.work(f"looking for {name}", get)
        except DeviceError as error:
            if error.errno != errno.ENODEV:
                raise
            return None

    async def _make(self, doing: str, config: VxlanConfig, flags: int) -> None:
        options = _options(config)
        if config.mtu:
            options["mtu"] = config.mtu

        async def add(ipr: Any) -> None:
            await ipr.link("add", ifname=config.name, kind=KIND, flags=flags, change=flags,
                           address=config.mac or _random_mac(), **options)

        await self._netlink.work(doing, add)

    async def _set(self, doing: str, index: int, **what: Any) -> None:
        async def change(ipr: Any) -> None:
            await ipr.link("set", index=index, **what)

        await self._netlink.work(doing, change)

    async def _delete(self, found: _Found) -> None:
        async def delete(ipr: Any) -> None:
            await ipr.link("del", index=found.index)
            self._known.pop(found.index, None)

        await self._netlink.work(f"removing {found.name}", delete)

    async def _settle(
        self, found: _Found, config: VxlanConfig, addresses: Iterable[IPAddress] | None
    ) -> VxlanDevice:
        """Give the device what can be changed while it lives."""
        name, index, version = found.name, found.index, config.local.version
        mac = (config.mac or found.mac).lower()
        if found.mtu != config.mtu:
            await self._set(f"setting up {name}: MTU {config.mtu}", index, mtu=config.mtu)
        if found.mac != mac:
            await self._set(f"setting up {name}: MAC {mac}", index, address=mac)
        await self._quieten(name, index, version == 6)
        if addresses is not None:
            await self._set_addresses(name, index, frozenset(addresses))
        if not found.up:
            await self._set(f"bringing up {name}", index, flags=IFF_UP, change=IFF_UP)
        return VxlanDevice(name, index, mac, config.mtu, version)

    async def _quieten(self, name: str, index: int, wants_v6: bool) -> None:
        """Who is behind the device is told, not asked: no link-local address, no solicitations,
        and what a peer advertises is not believed."""
        conf = Path("/proc/sys/net/ipv6/conf", name)
        if not conf.exists():  # this host has no IPv6
            return
        with contextlib.suppress(OSError):  # read-only in a container: then as the host has it
            (conf / "accept_ra").write_text("0")
            if wants_v6:
                (conf / "disable_ipv6").write_text("0")
        await self._set(
            f"setting up {name}: no link-local address", index, IFLA_AF_SPEC={"attrs": [
                ("AF_INET6", {"attrs": [("IFLA_INET6_ADDR_GEN_MODE", IN6_ADDR_GEN_MODE_NONE)]}),
            ]},
        )

    async def _set_addresses(
        self, name: str, index: int, addresses: frozenset[IPAddress]
    ) -> None:
        async def read(ipr: Any) -> set[IPInterface]:
            return {
                ipaddress.ip_interface(f"{message.get_attr('IFA_ADDRESS')}/{message['prefixlen']}")
                async for message in await ipr.addr("dump", index=index)
            }

        present = {address for address in await self._netlink.work(
            f"reading the addresses of {name}", read) if not address.is_link_local}
        wanted = {ipaddress.ip_interface(address) for address in addresses}
        for address in present - wanted:
            await self._address(f"taking {address} from {name}", "del", index, address)
        for address in wanted - present:
            await self._address(f"giving {name} {address}", "add", index, address)

    async def _address(self, doing: str, verb: str, index: int, address: IPInterface) -> None:
        async def change(ipr: Any) -> None:
            flags = IFA_F_NODAD | IFA_F_NOPREFIXROUTE if address.version == 6 else 0
            await ipr.addr(verb, index=index, address=str(address.ip),
                           prefixlen=address.network.prefixlen, flags=flags)

        await self._netlink.work(doing, change)


@dataclass(frozen=True, slots=True)
class _Found:
    """A device as the kernel describes it. version: of a VXLAN device's underlay."""

    name: str
    index: int
    mac: str
    mtu: int
    up: bool
    kind: str
    version: int
    options: dict[str, Any]

    @classmethod
    def read(cls, message: Any) -> _Found:
        info = message.get_attr("IFLA_LINKINFO")
        kind = (info and info.get_attr("IFLA_INFO_KIND")) or ""
        data = info.get_attr("IFLA_INFO_DATA") if kind == KIND else None
        options = dict(data["attrs"]) if data else {}
        return cls(
            message.get_attr("IFLA_IFNAME"), message["index"],
            message.get_attr("IFLA_ADDRESS") or "", message.get_attr("IFLA_MTU") or 0,
            bool(message["flags"] & IFF_UP), kind, 6 if "IFLA_VXLAN_LOCAL6" in options else 4,
            options,
        )


# What a device is made with and must have to be adopted: pyroute2's name, ours.
OPTIONS = {
    "vxlan_id": "VNI", "vxlan_port": "port", "vxlan_link": "underlay interface",
    "vxlan_local": "local address", "vxlan_local6": "local address",
    "vxlan_learning": "learning", "vxlan_gbp": "GBP",
}
# What it must not have, since packets would take another way than the one told.
STRANGE = {
    "vxlan_group": "group", "vxlan_group6": "group", "vxlan_l2miss": "L2 misses",
    "vxlan_l3miss": "L3 misses", "vxlan_proxy": "ARP proxy",
    "vxlan_collect_metadata": "external control",
}


def _options(config: VxlanConfig) -> dict[str, Any]:
    options: dict[str, Any] = {
        "vxlan_id": config.vni, "vxlan_port": config.port or _default_port(),
        "vxlan_learning": int(config.learning),
    }
    if config.gbp:
        options["vxlan_gbp"] = True
    if config.underlay_index:
        options["vxlan_link"] = config.underlay_index
    options["vxlan_local6" if config.local.version == 6 else "vxlan_local"] = str(config.local)
    return options


def _misfit(found: _Found, config: VxlanConfig) -> str:
    """What about the device is not as told and cannot be changed while it lives; "" if nothing."""
    if found.kind != KIND:
        return "a device that is not a VXLAN device has the name"
    wanted = _options(config)
    for option, name in {**OPTIONS, **STRANGE}.items():
        has = found.options.get(f"IFLA_{option.upper()}")
        if has != wanted.get(option) and (has or wanted.get(option)):
            return f"{name} {has} where {wanted.get(option)} is wanted"
    return ""


def _default_port() -> int:
    try:
        return int(DEFAULT_PORT_FILE.read_text())
    except OSError:  # the module is not loaded, or /sys not mounted
        return DEFAULT_PORT


def _random_mac() -> str:
    """A unicast one of local administration. Given, not left to the kernel: udev would replace
    one that the kernel made, after peers have been told of it."""
    first, *rest = os.urandom(6)
    return bytes([first & 0xFE | 0x02, *rest]).hex(":")
