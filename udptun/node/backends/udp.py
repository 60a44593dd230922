"""The UDP backend: the forwarder carries packets as UDP payload.

Owns: the options of this node's forwarder, its routes, our advertisement in the lease, and the
choice of the endpoint to which the packets for a peer are sent. Does not depend on how the
forwarder's process is started and kept running (``process``). Runs on the daemon's loop.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from ipaddress import ip_address, ip_network
from typing import Any, ClassVar

from ...files import remove_replaced
from ...leases.advert import ECN, EXPRESS, PROBE, Advert, embed
from ...leases.advert import read as read_advert
from ...leases.base import Attributes, Lease
from ...leases.cache import LastKnown
from ...leases.netconf import NetConfig
from ...model import ANY_PORT, MIN_MTU6, OVERHEAD, Endpoint, IPAddress, IPNetwork, Route, dscp_text
from ...net import hooks
from ...net.batch import RouteSocket
from ...net.lookup import device_index
from ...net.loops import routed_into
from ...net.netlink import Netlink
from ...net.tun_state import tun_state
from ...net.udp import keeps_marks, kernel_release
from ..config import NodeConfig
from ..host.interface import OuterFlow, Underlay
from ..process.keeper import ForwarderKeeper, stop_forwarder
from ..process.launch import LOG_FILE, STATE_FILE, ForwarderSpec
from ..status.report import NodeReport
from .base import Attempt, Backend, LeaseData, PeerNode, Reach, Site

log = logging.getLogger(__name__)

FLANNEL_TYPES = ("", "udp")  # "": the lease of flannel's own udp backend has no type


@dataclass(frozen=True, slots=True)
class UdpReach(Reach[Route]):
    """The paths through the forwarder.

    port   the port of our forwarder, and of each peer that does not advertise a port
    outer  the IP versions of our underlay
    express  our forwarder may use the express path
    """

    name: ClassVar[str] = "udp"
    has_ports: ClassVar[bool] = True

    port: int
    outer: tuple[int, ...]
    express: bool = False

    def path(self, peer: PeerNode, subnet: IPNetwork) -> Route | str:
        advert = read_advert(peer.attributes.backend_data)
        port, mtu, probe, ports, express, ecn = self.port, None, False, None, False, False
        if advert is not None:
            port, mtu, probe = advert.port, advert.mtu, PROBE in advert.features
            ports = advert.source_ports
            express = self.express and EXPRESS in advert.features
            ecn = ECN in advert.features
        elif peer.attributes.backend_type not in FLANNEL_TYPES:
            return "the peer does not advertise UDP"
        elif subnet.version == 6:  # flannel's own udp backend would corrupt IPv6 packets
            return "the peer is a stock flannel, whose udp backend carries only IPv4 over IPv4"
        if mtu is not None and subnet.version == 6 and mtu < MIN_MTU6:
            return f"the peer's MTU {mtu} is too small for IPv6"
        # Each end accepts packets only from the endpoint to which it sends packets. So both ends
        # must choose the same outer IP version. The first choice is the IP version of the inner
        # packet; the second choice is the other IP version.
        for version in (subnet.version, 10 - subnet.version):
            if version in self.outer and version in peer.public:
                return Route(
                    subnet, peer.public[version], port, mtu, probe, ports, express, ecn)
        return "the peer has no underlay address of an IP version that this node's underlay has"


class UdpBackend(Backend[Route]):
    name = "udp"
    waits_for = "the forwarder"
    fragments = True
    through_tun = True

    def __init__(self, config: NodeConfig, netlink: Netlink, report: NodeReport) -> None:
        self._config = config
        self._netlink = netlink
        self._report = report
        self._keeper = ForwarderKeeper(
            config.control, config.forward_file, config.state_dir / LOG_FILE,
            config.instance, config.forwarder == "external", report, self.name,
            self._looping, self._refused_changed, self._features_changed,
            config.wants_standby, config.log_format,
        )
        self._site: Site | None = None  # of the last ``prepare``
        self._advertised: frozenset[str] = frozenset()

    def device_names(self, network: NetConfig) -> tuple[str, ...]:
        return (self._config.tun,)

    def overhead(self, site: Site) -> int:
        return max(OVERHEAD[address.version] for address in _outer(site.underlay))

    async def prepare(self, site: Site, mtu: int) -> str:
        self._site = site
        return ""

    def lease_data(self, mtu: int) -> LeaseData:
        if not self._config.advertise:
            return LeaseData()
        self._advertised = self._features
        advert = Advert(self._prepared.udp_port, mtu, self._advertised, self._source_ports())
        return LeaseData(data={4: embed(None, advert)})

    @property
    def _features(self) -> frozenset[str]:
        features = {PROBE}
        if self._receives_in_kernel:
            features.add(EXPRESS)
        if keeps_marks(kernel_release()) and self._keeper.copies_marks:
            features.add(ECN)
        return frozenset(features)

    def _source_ports(self) -> tuple[int, int] | None:
        """Return the further ports from which our datagrams arrive at other nodes. A NAT,
        which has our published address, may change our port to any other one."""
        if self._config.source_port is not None:
            return self._config.source_port or None
        underlay = self._prepared.underlay
        published = {underlay.public, underlay.public6} - {None}
        return None if published <= set(underlay.bound) else ANY_PORT

    def reach(self) -> UdpReach:
        site = self._prepared
        return UdpReach(site.udp_port, tuple(one.version for one in _outer(site.underlay)),
                        self._config.accelerate == "auto")

    @property
    def _receives_in_kernel(self) -> bool:
        """Whether peers may send to us from their kernel. Until the forwarder has said it, our last
        lease counts. So a restart of the daemon does not change the lease."""
        if self._config.accelerate == "off" or self._keeper.receives is False:
            return False
        if self._keeper.receives is None:
            former = self._prepared.former
            advert = None if former is None else read_advert(former.backend_data)
            return advert is not None and EXPRESS in advert.features
        return True

    async def settle(self, lease: Lease, mtu: int) -> None:
        site, config = self._prepared, self._config
        port = site.udp_port
        self._keeper.want(ForwarderSpec(
            control=str(config.control),
            listen=tuple(str(Endpoint(address, port)) for address in _outer(site.underlay)),
            addresses=tuple(str(subnet.network_address) for subnet in lease.subnets),
            networks=tuple(str(net) for net in site.network.networks),
            tun=config.tun,
            state=str(config.state_dir / STATE_FILE),
            mtu=mtu,
            mark=None if config.mark is None else str(config.mark),
            dscp=dscp_text(config.dscp),
            accelerate=config.accelerate,
            admit=config.admit,
            subnets=tuple(map(str, lease.subnets)),
        ))

    async def verify(self) -> list[str]:
        """Compare the TUN with its configuration. The forwarder repairs it."""
        spec, name = self._keeper.spec, self._config.tun
        if spec is None:
            return [f"{name} is not set up yet"]
        index = device_index(name)
        if index == 0:
            return [f"{name} does not exist"]
        networks = [*map(ip_network, spec.networks)]
        state = await tun_state(self._netlink, index, networks)
        if state is None:
            return [f"{name} does not exist"]
        return [f"{name}: {text}" for text in state.differences(
            name, state.mtu if spec.mtu is None else spec.mtu,
            map(ip_address, spec.addresses), networks,
        )]

    async def retire(self, network: NetConfig, former: Attributes | None) -> None:
        await self._keeper.dismiss()

    async def run(self) -> None:
        await self._keeper.run()

    async def synced(self) -> None:
        await self._keeper.wait_synced()

    async def apply_all(self, paths: Mapping[IPNetwork, Route]) -> None:
        self._keeper.replace(paths)

    async def apply(self, changes: Mapping[IPNetwork, Route | None]) -> None:
        self._keeper.change(changes)

    @property
    def refused(self) -> Mapping[IPNetwork, str]:
        return self._keeper.refused

    def _refused_changed(self) -> None:
        self.on_refused()  # read now: it is set after this object was made

    def _features_changed(self) -> None:
        if self._features != self._advertised:
            self.on_lease_data()

    async def _looping(self, addresses: Collection[bytes]) -> Collection[bytes]:
        config = self._config
        return await routed_into(
            self._netlink, config.tun, addresses, _outer(self._prepared.underlay), config.mark)

    def forwarder_endpoint(self, path: Route) -> Endpoint:
        return Endpoint(path.via, path.port)

    def guarded_endpoint(self, path: Route) -> Endpoint | None:
        # The peer chooses the address and the port. If every port was guarded, a lease could block
        # other traffic of all nodes, for example with the address of a name server and port 53, or
        # with the address of another node and the port of VXLAN. Only root can write a hosts file.
        site = self._prepared
        usual = path.port in (site.udp_port, site.network.udp_port)
        if not usual and self._config.source.kind != "file":
            return None
        return Endpoint(path.via, path.port)

    def outer_flow(self) -> OuterFlow:
        return OuterFlow(self._prepared.udp_port, same_port=True)

    @property
    def marked(self) -> bool:
        return self._config.mark is None or self._keeper.matches

    def arrival_devices(self, path: Route) -> tuple[str, ...]:
        return (self._config.tun,)

    async def cleanup(self, known: LastKnown | None, attempt: Attempt) -> None:
        config = self._config
        with attempt():
            if await stop_forwarder(config.control, config.forward_file, config.instance):
                log.info("stopped the forwarder, which removed %s", config.tun)
            else:  # a forwarder that was killed has left its sockets
                config.control.unlink(missing_ok=True)
                config.instance.takeover_socket(config.control).unlink(missing_ok=True)
        with attempt():
            await self._remove_programs()
        with attempt():
            remove_replaced(config.state_dir / STATE_FILE)
        for name in (f"{STATE_FILE}.bad", f".{STATE_FILE}.lock", LOG_FILE, f"{LOG_FILE}.1"):
            with attempt():
                (config.state_dir / name).unlink(missing_ok=True)

    async def _remove_programs(self) -> None:
        """Remove the programs that a killed forwarder has left."""
        async def remove(_: Any) -> list[str]:
            with RouteSocket() as kernel:
                return hooks.remove(kernel, self._config.tun)

        for name in await self._netlink.work("removing programs of the express path", remove):
            log.info("removed the program %s", name)

    @property
    def _prepared(self) -> Site:
        assert self._site is not None
        return self._site


def _outer(underlay: Underlay) -> tuple[IPAddress, ...]:
    """Return the addresses that the forwarder listens on."""
    both = (underlay.address, underlay.address6)
    return tuple(address for address in both if address is not None)


def create(config: NodeConfig, netlink: Netlink, report: NodeReport) -> UdpBackend:
    return UdpBackend(config, netlink, report)
