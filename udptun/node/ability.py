"""What this node can do, from what it was told and what its host and kernel have.

Owns the choice of the backend, the inner MTU, and what is published in our lease. Refuses to know
other nodes, and to change the host. Pure; any thread.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import FieldError
from ..leases.advert import Advert, embed
from ..leases.base import Attributes, Lease, Subnets
from ..leases.netconf import NetConfig
from ..model import Endpoint, IPAddress
from ..net.vxlan import OVERHEAD as VXLAN_OVERHEAD
from ..net.vxlan import VxlanConfig, VxlanDevice
from .config import BACKENDS, NodeConfig
from .host.interface import Underlay
from .plan import Here
from .process.launch import ForwarderSpec

UDP_OVERHEAD = {4: 28, 6: 48}  # outer IP and UDP header, bytes
STATE_FILE = "routes"  # the forwarder's table, in the state directory


def backend(config: NodeConfig, network: NetConfig) -> str:
    """"udp", "vxlan" or "auto". FieldError: it is one that is none of ours."""
    kind = config.backend or network.backend_type
    if kind not in BACKENDS:
        raise FieldError("Backend.Type", kind, "udp, vxlan or auto; --backend overrules it")
    if kind == "vxlan" and (no_vxlan := config.source.no_vxlan):
        raise FieldError("backend", kind, f"udp or auto with this source of leases: {no_vxlan}")
    return kind


def vxlan_name(vni: int, version: int) -> str:
    """flannel's name of the device."""
    return f"flannel.{vni}" if version == 4 else f"flannel-v6.{vni}"


def vxlan_wanted(
    network: NetConfig, underlay: Underlay, mtu: int, former: Attributes | None
) -> tuple[VxlanConfig, ...]:
    """The devices there are to be, one per family of the network.

    mtu     of the inner packets, bytes
    former  what our lease said last: peers know the MAC that stands there
    """
    locals_: tuple[tuple[IPAddress | None, bool], ...] = (
        (underlay.address, network.network is not None),
        (underlay.address6, network.network6 is not None),
    )
    return tuple(
        VxlanConfig(
            vxlan_name(network.vni, local.version), network.vni, network.vxlan_port,
            underlay.index, local, mtu, network.learning, network.gbp,
            _former_mac(former, local.version),
        )
        for local, wanted in locals_ if wanted and local is not None
    )


def inner_mtu(network: NetConfig, underlay: Underlay, udp: bool, vxlan: bool) -> int:
    """The largest inner packet that fits every path this node may take, in bytes."""
    outer = [address.version for address in (underlay.address, underlay.address6) if address]
    overheads = [UDP_OVERHEAD[version] for version in outer if udp]
    if vxlan:
        overheads += [VXLAN_OVERHEAD[net.version] for net in network.networks]
    return (network.mtu or underlay.mtu) - max(overheads)


def _former_mac(former: Attributes | None, version: int) -> str | None:
    if former is None:
        return None
    data = former.backend_data if version == 4 else former.backend_v6_data
    mac = data.get("VtepMAC") if isinstance(data, Mapping) else None
    return mac if isinstance(mac, str) else None


@dataclass(frozen=True, slots=True)
class Ability:
    """What this node does, once its devices are there.

    udp_port  where our forwarder listens; None: there is none
    mtu       of the inner packets, bytes
    devices   for VXLAN, by IP version
    """

    network: NetConfig
    underlay: Underlay
    udp_port: int | None
    mtu: int
    devices: Mapping[int, VxlanDevice] = field(default_factory=dict)

    @property
    def outer(self) -> tuple[IPAddress, ...]:
        """The addresses our forwarder listens at."""
        both = (self.underlay.address, self.underlay.address6)
        return tuple(address for address in both if address is not None)

    def attributes(self, advertise: bool) -> Attributes:
        """What our lease is to say. Without ``advertise`` byte for byte what flannel's would."""
        data: dict[int, Any] = {
            version: {"VNI": self.network.vni, "VtepMAC": device.mac}
            for version, device in self.devices.items()
        }
        if advertise and self.udp_port is not None:
            data[4] = embed(data.get(4), Advert(self.udp_port, self.mtu))
        return Attributes(
            self.underlay.public, self.underlay.public6, "vxlan" if self.devices else "",
            data.get(4), data.get(6),
        )

    def here(self, lease: Lease) -> Here:
        public = (self.underlay.public, self.underlay.public6)
        return Here(
            lease.key, lease.subnets, self.network.networks,
            tuple(address for address in public if address is not None),
            tuple(address.version for address in self.outer), self.udp_port,
            tuple(self.devices), self.network.vni, self.network.direct_routing,
        )

    def forwarder(self, config: NodeConfig, subnets: Subnets) -> ForwarderSpec | None:
        """What our forwarder shall be; None: there shall be none."""
        if self.udp_port is None:
            return None
        return ForwarderSpec(
            control=str(config.control),
            listen=tuple(str(Endpoint(address, self.udp_port)) for address in self.outer),
            addresses=tuple(str(subnet.network_address) for subnet in subnets),
            networks=tuple(str(net) for net in self.network.networks),
            tun=config.tun,
            state=str(config.state_dir / STATE_FILE),
            mtu=self.mtu,
        )
