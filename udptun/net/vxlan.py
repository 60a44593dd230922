"""Create and configure kernel VXLAN devices and their peers, as flannel does.

Owns the device and its settings. Each peer has three entries:
- a permanent neighbour entry: base address of the peer's subnet -> MAC;
- an FDB entry: MAC -> endpoint;
- a route through the device: subnet via its base address.

``vxlan_peers`` and ``vxlan_entries`` add and remove these entries. The caller decides which peers
use VXLAN. Does not depend on leases. Threading: call from any asyncio loop. The work runs in the
thread of the given ``Netlink``, one call after the other.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import ipaddress
import logging
import math
import os
import random
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
from .tun_state import tun_state
from .vxlan_ages import others_n, read_ages
from .vxlan_entries import RTPROT_UDPTUN, Entries, EntrySocket
from .vxlan_peers import EntryUpdate, PeerFailure, VxlanPeer, parse_mac, take, unrouted

__all__ = ["OVERHEAD", "PeerFailure", "VniInUse", "Vxlan", "VxlanConfig", "VxlanDevice",
           "VxlanPeer", "parse_mac"]

log = logging.getLogger(__name__)
T = TypeVar("T")
IPInterface = ipaddress.IPv4Interface | ipaddress.IPv6Interface

KIND = "vxlan"
PROBE_NAME = "udptunprobe"
PROBE_TRIES = 50
PROBE_PAUSE_SECONDS = 0.1  # the longest pause between two tries
PROBE_VNI = (1 << 24) - 8285  # near the maximum: networks rarely use such VNIs
# The kernel's default port, which is older than IANA's 4789. A module parameter can change it.
DEFAULT_PORT = 8472
DEFAULT_PORT_FILE = Path("/sys/module/vxlan/parameters/udp_port")
LAST_METRIC = (1 << 32) - 1  # the kernel uses the route only if no other route matches
OVERHEAD = {4: 50, 6: 70}  # bytes of the headers added to an inner packet, by underlay IP version


@dataclass(frozen=True, slots=True)
class VxlanConfig:
    """The settings of a VXLAN device.

    port            UDP port; 0: the kernel's default, 8472
    underlay_index  index of the interface that sends the datagrams
    local           this host's address on that interface; the device has the same IP version
    mtu             MTU of the device in bytes: the MTU of the underlay minus OVERHEAD
    mac             "aa:bb:.."; None: the MAC of the existing device, or else a random one
    other_paths     True: packets of a peer may also arrive by another device, and packets to a peer
                    may leave by another one. Then a socket that is bound to this device must reach
                    the peers without their routes
    network         network of the overlay. It decides which direct routes are ours. A direct route
                    has udptun's protocol number and does not use the device (DirectRouting). It is
                    ours if its prefix is within ``network``; otherwise another instance has added
                    the route. None: no other instance exists, so all direct routes are ours
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
    network: IPNetwork | None = None
    other_paths: bool = False


@dataclass(frozen=True, slots=True)
class VxlanDevice:
    """An existing device.

    version  IP version of the underlay and of the subnets that the device carries
    network  same as ``VxlanConfig.network``
    """

    name: str
    index: int
    mac: str
    mtu: int
    version: int
    network: IPNetwork | None = None


class VniInUse(DeviceError):
    """Another device has the VNI and port. The kernel allows one such device per network namespace.

    holder  the name of the other device
    """

    def __init__(self, config: VxlanConfig, holder: str) -> None:
        port = config.port or default_port()
        super().__init__(errno.EEXIST, f"creating the VXLAN device {config.name}: {holder} has "
                         f"VNI {config.vni} and port {port} already")
        self.holder = holder


class Vxlan:
    """VXLAN devices of this network namespace, and their peers."""

    def __init__(self, netlink: Netlink) -> None:
        self._netlink = netlink
        self._known: dict[int, Entries] = {}  # by interface number; only in the netlink thread
        self._kept: dict[str, _Kept] = {}  # by device name: what the last ``ensure`` set up
        self._repairs: list[str] = []
        self._repaired: set[int] = set()  # interface numbers: repaired since the last ``sync``
        self._on_link: set[IPNetwork] = set()  # see ``encapsulates``
        # By interface number: packets sent through the device, without the caller's own (``ages``).
        self._others_n: dict[int, int] = {}

    # -- the device -------------------------------------------------------------------------------

    async def probe(self, like: VxlanConfig | None = None) -> str | None:
        """Return None if the kernel can create a VXLAN device here, else the error message.

        Creates a test device with another VNI, brings it up and removes it. Bringing it up binds
        the UDP port.

        like  the test device has the port, GBP, underlay and IP version of this configuration
        """
        config = like or VxlanConfig(PROBE_NAME, PROBE_VNI, 0, 0, ipaddress.IPv4Address(0), 0)
        config = replace(config, name=PROBE_NAME, vni=PROBE_VNI, mtu=0, mac=None)
        tries = 0
        while True:
            tries += 1
            try:
                await self._remove_probe()  # a killed process may have left the device
                await self._make("testing a VXLAN device", config, IFF_UP)
                await self._remove_probe()
            except DeviceError as error:
                # Another instance may run the same test, with a device of the same name.
                if error.errno not in (errno.EEXIST, errno.ENODEV) or tries == PROBE_TRIES:
                    return str(error)
                await asyncio.sleep(PROBE_PAUSE_SECONDS * random.random())
            else:
                return None

    async def ensure(
        self, config: VxlanConfig, addresses: Iterable[IPAddress] | None = None
    ) -> VxlanDevice:
        """Create the device or adopt an existing one, configure it and bring it up.

        A device with the configured settings is adopted, with its peers and its MAC. A device with
        other settings is replaced. The new device gets the MAC of the old one, because the peers
        have that MAC in their entries.

        addresses  the addresses of the device, each set as /32 or /128. All other addresses are
                   removed, except link-local addresses. None: those of the last call; if there
                   was none, the addresses are not known yet, and the present ones stay

        Raises DeviceError or its subclass VniInUse; FieldError for mtu and mac.
        """
        if config.mac is not None:
            parse_mac("mac", config.mac)
        if config.local.version == 6 and config.mtu < MIN_MTU6:
            raise FieldError("mtu", config.mtu, f"at least {MIN_MTU6} for IPv6 inside")
        kept = self._kept.get(config.name)
        wanted = None if kept is None else kept.addresses
        if addresses is not None:
            wanted = frozenset(addresses)
        wrong: list[str] = []
        found = await self._find(config.name)
        if found is None and kept is not None:
            found = await self._give_name_back(config.name, kept.index)
            wrong.append("its name was changed" if found else "it was deleted")
        if found is not None and (mismatch := _mismatch(found, config)):
            if found.kind != KIND:
                raise device_error(
                    errno.EEXIST, f"creating the VXLAN device {config.name}", mismatch)
            log.warning("replacing %s: %s", config.name, mismatch)
            config = replace(config, mac=config.mac or found.mac)
            await self._delete(found)
            found = None
        if found is not None:
            differences = await self._differences(found, config, wanted)
            if differences or kept is None:
                await self._settle(found, config, wanted)
            device = _device(found, config)
            wrong += differences
        else:
            device = await self._create(config, wanted)
        if wrong and kept is not None and kept.wanted(config, wanted):
            self._repairs.append(f"{config.name} is repaired: {'; '.join(wrong)}")
            self._repaired.add(device.index)
        self._kept[config.name] = _Kept(device.index, config, wanted)
        return device

    async def verify(self, name: str) -> list[str]:
        """Compare the device with what the last ``ensure`` set up, and return what differs.

        Raises DeviceError.
        """
        kept = self._kept.get(name)
        if kept is None:
            return [f"{name} is not set up yet"]
        found = await self._find(name)
        if found is None:
            return [f"{name} does not exist"]
        if mismatch := _mismatch(found, kept.config):
            return [f"{name}: {mismatch}"]
        return [f"{name}: {text}" for text in
                await self._differences(found, kept.config, kept.addresses)]

    def take_repairs(self) -> list[str]:
        """Return a sentence for each repair since the last call."""
        repairs, self._repairs = self._repairs, []
        return repairs

    async def remove(self, name: str, network: IPNetwork | None = None) -> None:
        """Remove the device with all its entries, and our direct routes to peers.

        If the device does not exist, nothing changes. Raises DeviceError if the device is not a
        VXLAN device.

        network  same as ``VxlanConfig.network``
        """
        found = await self._find(name)
        if found is None:
            return
        if found.kind != KIND:
            raise device_error(errno.EEXIST, f"removing {name}", "it is not a VXLAN device")

        def remove_routes(entries: EntrySocket) -> list[str]:
            return entries.delete(Entries(routes=entries.read().routes))

        self._kept.pop(name, None)
        device = VxlanDevice(name, found.index, found.mac, found.mtu, found.version,
                             network)
        for message in await self._entries(f"removing {name}", device, remove_routes):
            log.warning("%s", message)
        await self._delete(found)

    async def remove_leftover(self, name: str, vni: int, network: IPNetwork) -> bool:
        """Remove a VXLAN device that another program has left, with its routes.

        Only a device with this VNI and an address in the network is removed. Return whether there
        was one. Raises DeviceError.
        """
        found = await self._find(name)
        if found is None or found.kind != KIND or found.options.get("IFLA_VXLAN_ID") != vni:
            return False
        state = await tun_state(self._netlink, found.index)
        if state is None or not any(one in network for one in state.addresses):
            return False
        await self._delete(found)
        return True

    # -- the peers --------------------------------------------------------------------------------

    async def sync(
        self, device: VxlanDevice, peers: Iterable[VxlanPeer], *, repair: bool = False
    ) -> tuple[PeerFailure, ...]:
        """Make ``peers`` the device's only peers: read the device's entries, apply the difference.

        repair  the peers are those of the last call, so each difference is a repair
        Returns the peers that the kernel refused; all other peers are active. Raises DeviceError
        if the whole update failed. In this case possibly no peer is active.
        """
        put = tuple(peers)
        subnets = {peer.subnet for peer in put}

        def work(entries: EntrySocket) -> tuple[PeerFailure, ...]:
            self._known.pop(device.index, None)
            self._on_link = {net for net in self._on_link
                             if net in subnets or net.version != device.version}
            there = entries.read()
            before = there.copy()
            update = EntryUpdate(entries, Entries(), there, skip_unchanged=True)
            failures = self._apply(device, update, put)
            if repair and device.index not in self._repaired and (
                    wrong := _entry_differences(before, update.now)):
                self._repairs.append(f"{device.name} is repaired: {wrong}")
            self._repaired.discard(device.index)
            return failures

        return await self._entries(f"setting the peers of {device.name}", device, work)

    async def change(
        self, device: VxlanDevice, put: Iterable[VxlanPeer] = (), remove: Iterable[IPNetwork] = (),
    ) -> tuple[PeerFailure, ...]:
        """Add or change the peers in ``put``, and remove the peers of the subnets in ``remove``.

        Like ``sync``, with two differences. The present entries are those of the last call; they
        are not read from the kernel. Each peer in ``put`` is sent even if it is unchanged.
        """
        peers, removed = tuple(put), frozenset(remove)
        touched = {*removed, *(peer.subnet for peer in peers)}

        def work(entries: EntrySocket) -> tuple[PeerFailure, ...]:
            self._on_link -= removed
            now = self._known.pop(device.index, None) or entries.read()
            former = take(now, touched)
            update = EntryUpdate(entries, now, former, skip_unchanged=False)
            return self._apply(device, update, peers)

        return await self._entries(f"changing the peers of {device.name}", device, work)

    def encapsulates(self, peer: VxlanPeer) -> bool:
        """Return False if packets to this peer are known not to pass the device.

        A peer with ``direct`` is reached without encapsulation if it is on the link. The kernel
        decides this when the route is added. The answer for a peer that has lost its route is the
        last one.
        """
        return not peer.direct or peer.subnet not in self._on_link

    async def unrouted(
        self, device: VxlanDevice, peers: Iterable[VxlanPeer]
    ) -> list[IPNetwork]:
        """Return the subnets of those peers that have a neighbour and an FDB entry, but no route.

        Raises DeviceError.
        """
        asked = tuple(peers)
        if not asked:
            return []
        return await self._entries(
            f"reading the peers of {device.name}", device,
            lambda entries: unrouted(entries.read(), asked))

    async def ages(
        self, device: VxlanDevice, within: float = math.inf,
        own_n: Callable[[], int | None] | None = None,
    ) -> dict[bytes, float]:
        """Return {MAC: seconds since the last packet to it}, up to ``within``. Raises DeviceError.

        own_n  returns how many packets the caller itself has sent through this device, or None
               while it sends; another thread calls it. If only these were sent since the last call,
               the result is empty: to read the FDB takes long
        """
        async def job(_: Any) -> dict[bytes, float]:
            with RouteSocket() as netlink:
                if own_n and (n := others_n(netlink, device.index, own_n)) is not None:
                    if self._others_n.get(device.index) == n:
                        return {}
                    self._others_n[device.index] = n
                return read_ages(netlink, device.index, within)

        return await self._netlink.work(f"reading the use of {device.name}", job)

    def _apply(
        self, device: VxlanDevice, update: EntryUpdate, peers: tuple[VxlanPeer, ...]
    ) -> tuple[PeerFailure, ...]:
        update.put(peers, device.name, device.version)
        for message in update.clear():
            log.warning("%s: %s", device.name, message)
        for peer in peers:
            prefix = peer.subnet.network_address.packed, peer.subnet.prefixlen
            if peer.direct and update.now.routes.get(prefix) == peer.endpoint.packed:
                self._on_link.add(peer.subnet)
            elif peer.routed or not peer.direct:
                self._on_link.discard(peer.subnet)
        # If the update fails, this line is not reached. The next call then reads the entries from
        # the kernel.
        self._known[device.index] = update.now
        return tuple(update.failures)

    async def _entries(
        self, doing: str, device: VxlanDevice, work: Callable[[EntrySocket], T]
    ) -> T:
        """Run ``work`` on the entries of the device.

        ``work`` is one job of the netlink thread, so that concurrent calls do not interleave.
        """
        async def job(_: Any) -> T:
            try:
                exists = socket.if_nametoindex(device.name) == device.index
            except OSError:
                exists = False
            if not exists:
                raise OSError(errno.ENODEV, "")
            with RouteSocket() as netlink:
                return work(EntrySocket(
                    netlink, device.index, device.version, device.network))

        return await self._netlink.work(doing, job)

    # -- steps ------------------------------------------------------------------------------------

    async def _remove_probe(self) -> None:
        found = await self._find(PROBE_NAME)
        if found is not None:
            await self._delete(found)

    async def _holder(self, config: VxlanConfig) -> str | None:
        """Return the name of the device that has the VNI and port of ``config``."""
        wanted = _options(config)

        async def search(ipr: Any) -> str | None:
            async for message in await ipr.link("dump"):
                found = _Found.read(message)
                if found.kind == KIND and found.version == config.local.version and all(
                    found.options.get(f"IFLA_{option.upper()}") == wanted[option]
                    for option in ("vxlan_id", "vxlan_port")
                ):
                    return found.name
            return None

        return await self._netlink.work("looking for VXLAN devices", search)

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

    async def _give_name_back(self, name: str, index: int) -> _Found | None:
        """Rename the device with this interface number. Return None if it does not exist."""
        try:
            await self._netlink.rename(index, name)
        except DeviceError as error:
            if error.errno != errno.ENODEV:
                raise
            return None
        return await self._find(name)

    async def _create(
        self, config: VxlanConfig, addresses: frozenset[IPAddress] | None
    ) -> VxlanDevice:
        doing = f"creating the VXLAN device {config.name}"
        try:
            await self._make(doing, config, 0)
        except DeviceError as error:
            if error.errno == errno.EEXIST and (holder := await self._holder(config)):
                raise VniInUse(config, holder) from None
            raise
        found = await self._find(config.name)
        try:
            if found is None:
                raise device_error(errno.ENODEV, doing, "another program removed it")
            await self._settle(found, config, addresses)
            return _device(found, config)
        except BaseException:  # do not leave a device that is not configured
            if found is not None:
                with contextlib.suppress(DeviceError):
                    await self._delete(found)
            raise

    async def _differences(
        self, found: _Found, config: VxlanConfig, addresses: frozenset[IPAddress] | None
    ) -> list[str]:
        """Return what differs, among the settings that can be changed on an existing device."""
        for_sockets = _network_for_sockets(config)
        networks = () if for_sockets is None else (for_sockets,)
        state = await tun_state(self._netlink, found.index, networks)
        if state is None:
            return ["it was deleted"]
        wrong = state.differences(config.name, config.mtu, addresses or (), networks)
        if addresses is not None:
            more = {one for one in state.addresses - addresses if not one.is_link_local}
            wrong += [f"it has the address {one}" for one in more]
        if config.mac is not None and found.mac != config.mac.lower():
            wrong.append(f"its MAC is {found.mac}")
        return wrong

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
        self, found: _Found, config: VxlanConfig, addresses: frozenset[IPAddress] | None
    ) -> None:
        """Apply the settings that can be changed on an existing device."""
        name, index, version = found.name, found.index, config.local.version
        mac = (config.mac or found.mac).lower()
        if found.mtu < MIN_MTU6 <= config.mtu and found.up:
            # The device has lost IPv6. If IPv6 returns while the device is up, the kernel adds a
            # link-local address.
            await self._netlink.set_down(index)
            found = replace(found, up=False)
        if found.mtu != config.mtu:
            await self._set(f"setting up {name}: MTU {config.mtu}", index, mtu=config.mtu)
        if found.mac != mac:
            await self._set(f"setting up {name}: MAC {mac}", index, address=mac)
        await self._disable_autoconfiguration(name, index, version == 6)
        await self._netlink.set_device(name, index)
        if addresses is not None:
            await self._set_addresses(name, index, addresses)
        if not found.up:
            await self._set(f"bringing up {name}", index, flags=IFF_UP, change=IFF_UP)
        if (network := _network_for_sockets(config)) is not None:
            await self._add_route_for_sockets(name, index, network)

    async def _disable_autoconfiguration(self, name: str, index: int, wants_v6: bool) -> None:
        """Turn off IPv6 autoconfiguration, because peers are configured, not discovered.

        The device gets no link-local address, the kernel sends no solicitations, and router
        advertisements of peers are ignored.
        """
        conf = Path("/proc/sys/net/ipv6/conf", name)
        if not conf.exists():  # this host has no IPv6
            return
        with contextlib.suppress(OSError):  # /proc/sys is read-only in a container: the value stays
            (conf / "accept_ra").write_text("0")
            if wants_v6:
                (conf / "disable_ipv6").write_text("0")
        await self._set(
            f"turning off IPv6 link-local addresses on {name}", index, IFLA_AF_SPEC={"attrs": [
                ("AF_INET6", {"attrs": [("IFLA_INET6_ADDR_GEN_MODE", IN6_ADDR_GEN_MODE_NONE)]}),
            ]},
        )

    async def _add_route_for_sockets(self, name: str, index: int, network: IPNetwork) -> None:
        async def add(ipr: Any) -> None:
            await ipr.route("replace", family=socket.AF_INET6, dst=str(network),
                            oif=index, priority=LAST_METRIC, proto=RTPROT_UDPTUN)

        await self._netlink.work(f"adding the route for bound sockets of {name}", add)

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
            await self._address(f"removing {address} from {name}", "del", index, address)
        for address in wanted - present:
            await self._address(f"adding {address} to {name}", "add", index, address)

    async def _address(self, doing: str, verb: str, index: int, address: IPInterface) -> None:
        async def change(ipr: Any) -> None:
            flags = IFA_F_NODAD | IFA_F_NOPREFIXROUTE if address.version == 6 else 0
            await ipr.addr(verb, index=index, address=str(address.ip),
                           prefixlen=address.network.prefixlen, flags=flags)

        await self._netlink.work(doing, change)


@dataclass(frozen=True, slots=True)
class _Kept:
    """A device that ``ensure`` has set up."""

    index: int
    config: VxlanConfig
    addresses: frozenset[IPAddress] | None

    def wanted(self, config: VxlanConfig, addresses: frozenset[IPAddress] | None) -> bool:
        """Return whether the last ``ensure`` had the same arguments. If the device differs
        nevertheless, another program has changed it."""
        return replace(config, mac=None) == replace(self.config, mac=None) and \
            addresses in (None, self.addresses)


@dataclass(frozen=True, slots=True)
class _Found:
    """A device as the kernel reports it.

    version  IP version of the underlay; meaningful only for a VXLAN device
    """

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


# A device is adopted only if these settings have the configured values. The keys are pyroute2's
# names, the values are the names in error texts.
OPTIONS = {
    "vxlan_id": "VNI", "vxlan_port": "port", "vxlan_link": "underlay interface",
    "vxlan_local": "local address", "vxlan_local6": "local address",
    "vxlan_learning": "learning", "vxlan_gbp": "GBP",
}
# Settings that the device must not have: with them, packets would not follow the device's entries.
FORBIDDEN = {
    "vxlan_group": "group", "vxlan_group6": "group", "vxlan_l2miss": "L2 misses",
    "vxlan_l3miss": "L3 misses", "vxlan_proxy": "ARP proxy",
    "vxlan_collect_metadata": "external mode (collect metadata)",
}


def _options(config: VxlanConfig) -> dict[str, Any]:
    options: dict[str, Any] = {
        "vxlan_id": config.vni, "vxlan_port": config.port or default_port(),
        "vxlan_learning": int(config.learning),
    }
    if config.gbp:
        options["vxlan_gbp"] = True
    if config.underlay_index:
        options["vxlan_link"] = config.underlay_index
    options["vxlan_local6" if config.local.version == 6 else "vxlan_local"] = str(config.local)
    return options


def _mismatch(found: _Found, config: VxlanConfig) -> str:
    """Return the first setting that differs and cannot be changed on an existing device, or ""."""
    if found.kind != KIND:
        return "a device that is not a VXLAN device has this name"
    wanted = _options(config)
    for option, name in {**OPTIONS, **FORBIDDEN}.items():
        has, wants = found.options.get(f"IFLA_{option.upper()}"), wanted.get(option)
        if has != wants and (has or wants):
            return f"{name} is {_shown(has)}, expected {_shown(wants)}"
    return ""


def _network_for_sockets(config: VxlanConfig) -> IPNetwork | None:
    """Return the network to which sockets that are bound to the device need a route; None: none.

    Such a socket reaches peers whose subnets have no route through the device. IPv4 needs no route:
    for a bound socket the kernel treats the destination as on-link. IPv6 needs one. This route has
    the largest metric, so no other lookup selects it while another device has a route to the
    network.
    """
    return config.network if config.other_paths and config.local.version == 6 else None


def _device(found: _Found, config: VxlanConfig) -> VxlanDevice:
    mac = (config.mac or found.mac).lower()
    return VxlanDevice(
        config.name, found.index, mac, config.mtu, config.local.version, config.network)


def _entry_differences(before: Entries, now: Entries) -> str:
    """Return the numbers of missing entries and of removed entries of other programs, as text."""
    parts = []
    for name in ("routes", "neighbours", "forwarding"):
        were, are = getattr(before, name), getattr(now, name)
        label = "FDB entries" if name == "forwarding" else name
        if missing := sum(were.get(key) != value for key, value in are.items()):
            parts.append(f"it had lost {label}: {missing}")
        if foreign := len(were.keys() - are.keys()):
            parts.append(f"it had {label} of another program: {foreign}")
    return "; ".join(parts)


def _shown(setting: Any) -> str:
    return "not set" if setting is None else str(setting)


def default_port() -> int:
    """Return the port of a VXLAN device that is created without one."""
    try:
        return int(DEFAULT_PORT_FILE.read_text())
    except OSError:  # the module is not loaded, or /sys is not mounted
        return DEFAULT_PORT


def _random_mac() -> str:
    """Return a random, unicast, locally administered MAC address.

    The kernel does not choose the address, because udev would then replace the address after peers
    have learned it.
    """
    first, *rest = os.urandom(6)
    return bytes([first & 0xFE | 0x02, *rest]).hex(":")
