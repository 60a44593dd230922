"""The VXLAN backend: the kernel's VXLAN device carries packets, as in flannel.

Owns: one device per IP version of the network, the MAC addresses in our lease, and the list of
peers of each device. Does not depend on how a device and its entries are created (``net.vxlan``).
Runs on the daemon's loop.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from ipaddress import IPv4Network, IPv6Network
from typing import Any, ClassVar

from ...errors import DeviceError, FieldError
from ...instance import Instance
from ...leases.base import Attributes, Lease
from ...leases.cache import LastKnown
from ...leases.netconf import NetConfig
from ...model import IPAddress, IPNetwork
from ...net.netlink import Netlink
from ...net.vxlan import (
    OVERHEAD,
    PeerFailure,
    VniInUse,
    Vxlan,
    VxlanConfig,
    VxlanDevice,
    VxlanPeer,
    default_port,
)
from ...probe.message import VXLAN_PATH
from ..config import NodeConfig
from ..host.interface import OuterFlow
from ..status.report import NodeReport
from .base import Attempt, Backend, InstanceConflict, LeaseData, PeerNode, ProbeDevice, Reach, Site

log = logging.getLogger(__name__)

TYPE = "vxlan"  # flannel's BackendType
# By IP version: a network that contains no node's subnet.
NO_NETWORK: dict[int, IPNetwork] = {4: IPv4Network("0.0.0.0/32"), 6: IPv6Network("::/128")}


@dataclass(frozen=True, slots=True)
class VxlanReach(Reach[VxlanPeer]):
    """The paths through the VXLAN devices.

    versions  the IP versions for which this node has a device
    vni       the VNI of these devices
    direct    packets to a peer on our own link are routed without encapsulation
    """

    name: ClassVar[str] = "vxlan"

    versions: tuple[int, ...]
    vni: int
    direct: bool

    def path(self, peer: PeerNode, subnet: IPNetwork) -> VxlanPeer | str:
        if peer.attributes.backend_type != TYPE:
            return ""
        endpoint = peer.public.get(subnet.version)
        data = _data(peer.attributes, subnet.version)
        mac = data.get("VtepMAC")
        if subnet.version in self.versions and endpoint is not None and isinstance(mac, str) \
                and data.get("VNI", self.vni) == self.vni:
            try:
                return VxlanPeer(subnet, mac, endpoint, self.direct)
            except FieldError:
                pass
        return "the VXLAN data in the peer's lease do not match this node's"


class VxlanBackend(Backend[VxlanPeer]):
    name = "vxlan"
    needs_node_data = True  # each lease contains the MAC address of the node's device

    def __init__(self, config: NodeConfig, netlink: Netlink, report: NodeReport) -> None:
        self._instance = config.instance
        self._leaves_to_flannel = config.leaves_to_flannel
        self._report = report
        self._vxlan = Vxlan(netlink)
        self._site: Site | None = None  # of the last ``prepare``
        self._configs: dict[int, VxlanConfig] = {}  # by IP version, like ``_devices``
        self._devices: dict[int, VxlanDevice] = {}
        self._bases: dict[int, IPAddress] = {}  # our overlay addresses, also by IP version
        self._peers: dict[IPNetwork, VxlanPeer] = {}
        self._diverted: set[IPNetwork] = set()
        self._refused: dict[IPNetwork, str] = {}

    def device_names(self, network: NetConfig) -> tuple[str, ...]:
        return tuple(name for version in (4, 6) if (name := self._device(network, version)))

    def active_devices(self, network: NetConfig) -> tuple[str, ...]:
        return tuple(device.name for device in self._devices.values())

    def _device(self, network: NetConfig, version: int) -> str | None:
        """Return the device's name, or None if the name is too long.

        No device can exist with a name that is too long.
        """
        try:
            return self._instance.vxlan_device(network.vni, version)
        except FieldError:
            return None

    def overhead(self, site: Site) -> int:
        return max(OVERHEAD[net.version] for net in site.network.networks)

    # -- our own devices --------------------------------------------------------------------------

    async def prepare(self, site: Site, mtu: int) -> str:
        self._site = site
        wanted = self._wanted(site, mtu)
        try:
            await self._remove_all_but({config.local.version for config in wanted}, site)
            for config in wanted:
                version = config.local.version
                if site.optional and version not in self._devices and \
                        (why := await self._vxlan.probe(config)):
                    return why
                self._devices[version] = await self._vxlan.ensure(config)
                self._configs[version] = config
        except VniInUse as exc:
            owner = Instance.of_vxlan_device(exc.holder, site.network.vni)
            if owner is None:
                return str(exc)
            raise InstanceConflict(
                f"{exc}: it belongs to the instance {owner.name} of udptun, or to flannel; give "
                "this network another VNI"
            ) from None
        except DeviceError as exc:
            return str(exc)
        return ""

    async def _remove_all_but(self, versions: Collection[int], site: Site) -> None:
        """Remove our devices of the IP versions that are not carried any more.

        A device is ours if we have created it, or if our last lease has its data.
        """
        for version in {4, 6}.difference(versions):
            config = self._configs.pop(version, None)
            ours = site.former is not None and site.former.backend_type == TYPE and \
                _data(site.former, version)
            if (config or ours) and (name := self._device(site.network, version)):
                network = NO_NETWORK[version] if config is None else config.network
                await self._vxlan.remove(name, network)
            self._devices.pop(version, None)

    def _wanted(self, site: Site, mtu: int) -> list[VxlanConfig]:
        """Return the configurations of the devices, one per IP version of the network."""
        network, underlay = site.network, site.underlay
        pairs: tuple[tuple[IPAddress | None, IPNetwork | None], ...] = (
            (underlay.address, network.network), (underlay.address6, network.network6),
        )
        return [
            VxlanConfig(
                self._instance.vxlan_device(network.vni, local.version), network.vni,
                network.vxlan_port, underlay.index, local, mtu, network.learning, network.gbp,
                _former_mac(site.former, local.version), overlay, site.optional,
            )
            for local, overlay in pairs if local is not None and overlay is not None
        ]

    def lease_data(self, mtu: int) -> LeaseData:
        vni = self._prepared.network.vni
        return LeaseData(TYPE if self._devices else "", {
            version: {"VNI": vni, "VtepMAC": device.mac}
            for version, device in self._devices.items()
        })

    def outer_flow(self) -> OuterFlow:
        return OuterFlow(self._prepared.network.vxlan_port or default_port(), same_port=False)

    def reach(self) -> VxlanReach:
        network = self._prepared.network
        return VxlanReach(tuple(self._devices), network.vni, network.direct_routing)

    async def settle(self, lease: Lease, mtu: int) -> None:
        self._configs = {
            version: replace(config, mtu=mtu) for version, config in self._configs.items()
        }
        for version, config in self._configs.items():
            bases = [net.network_address for net in lease.subnets if net.version == version]
            self._devices[version] = await self._vxlan.ensure(config, bases)
            if bases:
                self._bases[version] = bases[0]

    async def retire(self, network: NetConfig, former: Attributes | None) -> None:
        """Remove our devices, because their routes would take precedence over the TUN's routes."""
        if self._devices or (former is not None and former.backend_type == TYPE):
            await self._remove_devices(network)
        self._devices, self._configs, self._peers, self._refused = {}, {}, {}, {}
        self._diverted.clear()

    async def _remove_devices(self, network: NetConfig, attempt: Attempt = nullcontext) -> None:
        networks: dict[int, IPNetwork | None] = {4: network.network, 6: network.network6}
        for version, overlay in networks.items():
            if name := self._device(network, version):
                with attempt():
                    await self._vxlan.remove(name, overlay or NO_NETWORK[version])

    # -- peers ------------------------------------------------------------------------------------

    async def apply_all(self, paths: Mapping[IPNetwork, VxlanPeer]) -> int:
        differ = paths.items() ^ self._peers.items()
        self._peers, self._refused = dict(paths), {}
        await self._sync_all(repair=False)
        return len({subnet for subnet, _ in differ})

    async def apply(self, changes: Mapping[IPNetwork, VxlanPeer | None]) -> int:
        for subnet, peer in changes.items():
            self._refused.pop(subnet, None)
            if peer is None:
                self._peers.pop(subnet, None)
            else:
                self._peers[subnet] = peer
        await self._send(changes)
        return len(changes)

    async def divert(self, changes: Mapping[IPNetwork, bool]) -> None:
        for subnet, diverted in changes.items():
            (self._diverted.add if diverted else self._diverted.discard)(subnet)
        await self._send({net: peer for net in changes if (peer := self._peers.get(net))})

    async def diverted(self, paths: Mapping[IPNetwork, VxlanPeer]) -> list[IPNetwork]:
        return [
            subnet for version, device in self._devices.items()
            for subnet in await self._vxlan.unrouted(
                device, [peer for net, peer in paths.items() if net.version == version])]

    async def _send(self, changes: Mapping[IPNetwork, VxlanPeer | None]) -> None:
        for version, device in self._devices.items():
            of_device = {net: peer for net, peer in changes.items() if net.version == version}
            if of_device:
                self._record(await self._vxlan.change(
                    device, self._with_routes(peer for peer in of_device.values() if peer),
                    [subnet for subnet, peer in of_device.items() if peer is None],
                ))

    def _with_routes(self, peers: Iterable[VxlanPeer]) -> list[VxlanPeer]:
        return [replace(peer, routed=False) if peer.subnet in self._diverted else peer
                for peer in peers]

    async def resync(self) -> None:
        await self._sync_all(repair=True)

    async def _sync_all(self, *, repair: bool) -> None:
        for version, device in self._devices.items():
            try:
                await self._sync(device, repair)
            except DeviceError as exc:
                if exc.errno not in (errno.ENODEV, errno.ENOENT):
                    raise
                self._devices[version] = await self._vxlan.ensure(self._configs[version])
                await self._sync(self._devices[version], repair)

    async def verify(self) -> list[str]:
        return [text for device in self._devices.values()
                for text in await self._vxlan.verify(device.name)]

    def take_repairs(self) -> list[str]:
        return self._vxlan.take_repairs()

    async def _sync(self, device: VxlanDevice, repair: bool) -> None:
        peers = [peer for net, peer in self._peers.items() if net.version == device.version]
        for peer in peers:
            self._refused.pop(peer.subnet, None)
        self._record(await self._vxlan.sync(
            device, self._with_routes(peers), repair=repair))

    def _record(self, failures: tuple[PeerFailure, ...]) -> None:
        for failure in failures:
            why = str(failure.error)
            if self._refused.get(failure.peer.subnet) != why:
                log.warning("%s cannot be reached by VXLAN: %s",
                            self._report.name_of(failure.peer.subnet), why)
            self._refused[failure.peer.subnet] = why

    # -- measuring --------------------------------------------------------------------------------

    def probe_device(self, path: VxlanPeer) -> ProbeDevice | None:
        version = path.subnet.version
        device, base = self._devices.get(version), self._bases.get(version)
        # A direct path does not use the device: a probe through the device would measure another
        # path.
        if device is None or base is None or path.direct:
            return None
        return ProbeDevice(device.name, device.index, base, VXLAN_PATH)

    async def send_ages(
        self, within: float, probes_n: Mapping[int, Callable[[], int | None]]
    ) -> Mapping[IPNetwork, float]:
        recent: dict[int, dict[str, float]] = {}  # by IP version: by MAC address
        for version, device in [*self._devices.items()]:
            ages = await self._vxlan.ages(device, within, probes_n.get(version, lambda: 0))
            if ages:
                recent[version] = {mac.hex(":"): age for mac, age in ages.items()}
        if not recent:
            return {}
        return {
            net: age for net, peer in self._peers.items()
            if (age := recent.get(net.version, {}).get(peer.mac.lower())) is not None
        }

    def arrival_devices(self, path: VxlanPeer) -> tuple[str, ...]:
        device = self._devices.get(path.subnet.version)
        # Packets of a peer on our own link arrive without encapsulation if routing is direct.
        link = () if self._vxlan.encapsulates(path) else (self._prepared.underlay.name,)
        return link if device is None else (device.name, *link)

    @property
    def refused(self) -> Mapping[IPNetwork, str]:
        return self._refused

    async def cleanup(self, known: LastKnown | None, attempt: Attempt) -> None:
        # If our own lease is not a VXLAN lease, the device belongs to a stock flannel.
        if known is None or known.lease is None or known.lease.attributes.backend_type != TYPE:
            return
        if not self._leaves_to_flannel:
            await self._remove_devices(known.network, attempt)

    @property
    def _prepared(self) -> Site:
        assert self._site is not None
        return self._site


def _data(attributes: Attributes, version: int) -> Mapping[str, Any]:
    data: Any = attributes.backend_data if version == 4 else attributes.backend_v6_data
    return data if isinstance(data, Mapping) else {}


def _former_mac(former: Attributes | None, version: int) -> str | None:
    """Return the MAC address in our last known lease.

    The device gets the same address again, because the peers' entries contain the address.
    """
    mac = None if former is None else _data(former, version).get("VtepMAC")
    return mac if isinstance(mac, str) else None


def create(config: NodeConfig, netlink: Netlink, report: NodeReport) -> VxlanBackend:
    return VxlanBackend(config, netlink, report)
