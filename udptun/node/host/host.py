"""Make this host what the node's lease says, and put the way to each peer in force.

Owns: VXLAN devices, what the forwarder shall be, firewall rules, subnet.env; which of them a
backend needs. Every step may be repeated, and changes only what differs: a restart finds all in
place. Refuses to know stores, and to choose a path (``plan``). The daemon's loop; ``prepare``,
``settle``, ``put_all`` and ``put`` one after the other.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import time
from collections.abc import Mapping

from ...errors import DeviceError, UdptunError
from ...leases.advert import Advert
from ...leases.base import Attributes, Lease
from ...leases.netconf import NetConfig
from ...model import IPNetwork
from ...net.netlink import Netlink
from ...net.vxlan import PeerFailure, Vxlan, VxlanConfig, VxlanDevice, VxlanPeer
from ..ability import Ability, backend, inner_mtu, vxlan_name, vxlan_wanted
from ..config import NodeConfig
from ..plan import Delta, Plan
from ..process.keeper import ForwarderKeeper
from ..process.launch import LOG_FILE
from ..status.report import NodeReport
from .firewall import Firewall, FirewallError, FirewallRules
from .interface import Underlay
from .subnet_env import SubnetEnv

log = logging.getLogger(__name__)


class NoVxlan(UdptunError):
    """Only VXLAN was asked for, and this kernel makes no such device."""


class Host:
    def __init__(self, config: NodeConfig, netlink: Netlink, report: NodeReport) -> None:
        self.keeper = ForwarderKeeper(
            config.control, config.forward_file, config.state_dir / LOG_FILE,
            config.forwarder == "spawn", report,
        )
        self.firewall = Firewall(FirewallRules())
        self._config = config
        self._report = report
        self._vxlan = Vxlan(netlink)
        self._configs: dict[int, VxlanConfig] = {}
        self._devices: dict[int, VxlanDevice] = {}
        self._peers: dict[IPNetwork, VxlanPeer] = {}
        self._refused: dict[IPNetwork, str] = {}

    # -- what we are ------------------------------------------------------------------------------

    async def prepare(
        self, network: NetConfig, underlay: Underlay, former: Attributes | None,
        own: Advert | None = None,
    ) -> Ability:
        """Find out what this node can do, with the devices made that its lease has to name.

        former  what our lease said last
        own     what the store wants us to be, where it is the store that says so
        NoVxlan, FieldError (the backend is none of ours), DeviceError.
        """
        kind = backend(self._config, network)
        udp = kind != "vxlan"
        no_vxlan = self._config.source.no_vxlan if kind == "auto" else ""
        if kind != "udp" and not no_vxlan:
            mtu = inner_mtu(network, underlay, udp, True)
            wanted = vxlan_wanted(network, underlay, mtu, former)
            no_vxlan = await self._make_devices(wanted, kind == "auto")
            if no_vxlan and kind == "vxlan":
                raise NoVxlan(f"{no_vxlan}; --backend auto would take UDP instead")
        if no_vxlan and no_vxlan != self._report.no_vxlan:
            log.warning("no VXLAN on this node, it has UDP only: %s", no_vxlan)
        if kind == "udp" or no_vxlan:
            await self._drop_devices(network, former)
        mtu = inner_mtu(network, underlay, udp, bool(self._devices))
        if own is not None and own.mtu is not None:
            mtu = min(mtu, own.mtu)
        self._report.backend, self._report.no_vxlan, self._report.mtu = kind, no_vxlan, mtu
        port = own.port if own is not None else network.udp_port
        return Ability(network, underlay, port if udp else None, mtu, dict(self._devices))

    async def _make_devices(self, wanted: tuple[VxlanConfig, ...], probe: bool) -> str:
        """Why they cannot be made, in a sentence; "" when they are there."""
        try:
            for config in wanted:
                version = config.local.version
                if probe and version not in self._devices and \
                        (why := await self._vxlan.probe(config)):
                    return why
                self._devices[version] = await self._vxlan.ensure(config)
                self._configs[version] = config
        except DeviceError as exc:
            return str(exc)
        return ""

    async def _drop_devices(self, network: NetConfig, former: Attributes | None) -> None:
        """Those of a time when we had VXLAN: their routes would go before the TUN's."""
        if self._devices or (former is not None and former.backend_type == "vxlan"):
            for version in (4, 6):
                await self._vxlan.remove(vxlan_name(network.vni, version))
        self._devices, self._configs, self._peers = {}, {}, {}

    # -- the host as the lease says ---------------------------------------------------------------

    async def settle(self, ability: Ability, lease: Lease) -> None:
        """DeviceError, OSError. Rules and subnet.env that fail are told in the report."""
        for version, config in self._configs.items():
            bases = [net.network_address for net in lease.subnets if net.version == version]
            self._devices[version] = await self._vxlan.ensure(config, bases)
        spec = ability.forwarder(self._config, lease.subnets)
        if spec is None:
            await self.keeper.dismiss()
        else:
            self.keeper.want(spec)
        await self._set_rules(ability.network, lease)
        self._write_env(ability, lease)

    async def _set_rules(self, network: NetConfig, lease: Lease) -> None:
        config = self._config
        self.firewall.want = FirewallRules(
            network.network, lease.subnets.v4, network.network6, lease.subnets.v6,
            config.ip_masq, config.iptables_forward_rules,
        )
        with contextlib.suppress(FirewallError):  # tried again, and told, by Firewall.keep
            await self.firewall.sync()

    @property
    def rules_wanted(self) -> bool:
        return self._config.ip_masq or self._config.iptables_forward_rules

    def _write_env(self, ability: Ability, lease: Lease) -> None:
        network, subnets = ability.network, lease.subnets
        env = SubnetEnv(network.network, subnets.v4, network.network6, subnets.v6, ability.mtu,
                        self._config.ip_masq)
        try:
            if env.write(self._config.subnet_file):
                log.info("wrote %s: %s, MTU %d", self._config.subnet_file, subnets, ability.mtu)
            self._report.subnet_env_error = ""
        except OSError as exc:
            why = f"{self._config.subnet_file} cannot be written: {exc.strerror}"
            if why != self._report.subnet_env_error:
                log.error("%s", why)
            self._report.subnet_env_error = why

    # -- the way to each peer ---------------------------------------------------------------------

    async def put_all(self, plan: Plan, since: float) -> None:
        """Put a whole plan in force. ``since``: time.monotonic() when it was told. DeviceError."""
        if plan.here.udp_port is not None:
            self.keeper.replace(plan.routes)
        differ = plan.peers.items() ^ self._peers.items()
        self._peers, self._refused = dict(plan.peers), {}
        await self.resync()
        self._note(plan, since, len({subnet for subnet, _ in differ}))

    async def put(self, plan: Plan, delta: Delta, since: float) -> None:
        """Put the last change of a plan in force. DeviceError."""
        if plan.here.udp_port is not None:
            self.keeper.change(delta.routes)
        for subnet, peer in delta.peers.items():
            self._refused.pop(subnet, None)
            if peer is None:
                self._peers.pop(subnet, None)
            else:
                self._peers[subnet] = peer
        for version, device in self._devices.items():
            mine = {net: peer for net, peer in delta.peers.items() if net.version == version}
            if mine:
                self._book(await self._vxlan.change(
                    device, [peer for peer in mine.values() if peer is not None],
                    [subnet for subnet, peer in mine.items() if peer is None],
                ))
        self._note(plan, since, len(delta.peers))

    async def resync(self) -> None:
        """Compare the kernel's VXLAN entries with ours, and mend what others did. DeviceError."""
        for version, device in self._devices.items():
            try:
                await self._sync(device, version)
            except DeviceError as exc:
                if exc.errno not in (errno.ENODEV, errno.ENOENT):
                    raise
                log.warning("%s is gone, making it anew: %s", device.name, exc)
                fresh = await self._vxlan.ensure(self._configs[version])
                self._devices[version] = fresh
                await self._sync(fresh, version)

    async def _sync(self, device: VxlanDevice, version: int) -> None:
        mine = [peer for net, peer in self._peers.items() if net.version == version]
        for peer in mine:
            self._refused.pop(peer.subnet, None)
        self._book(await self._vxlan.sync(device, mine))

    def _book(self, failures: tuple[PeerFailure, ...]) -> None:
        for failure in failures:
            why = str(failure.error)
            if self._refused.get(failure.peer.subnet) != why:
                log.warning("%s is not reached by VXLAN: %s", failure.peer.subnet, why)
            self._refused[failure.peer.subnet] = why

    def _note(self, plan: Plan, since: float, vxlan_changes: int) -> None:
        report = self._report
        report.peers.udp_n, report.peers.vxlan_n = plan.udp_n, plan.vxlan_n
        _say_new(report.peers.unreachable, plan.unreachable)
        report.peers.unreachable = dict(plan.unreachable)
        report.peers.refused = {plan.key_of(net): why for net, why in self._refused.items()}
        if plan.here.udp_port is None or vxlan_changes:  # else it is the keeper who knows
            report.applied = time.monotonic()
            report.lag = report.applied - since
        report.route_changes_n["vxlan"] += vxlan_changes


MAX_SAID = 10


def _say_new(before: Mapping[str, str], now: Mapping[str, str]) -> None:
    """Each peer's reason once; of very many the first."""
    fresh = [(key, why) for key, why in now.items() if before.get(key) != why]
    for key, why in fresh[:MAX_SAID]:
        log.warning("no way leads to %s: %s", key, why)
    if len(fresh) > MAX_SAID:
        log.warning("nor to %d others: see /readyz?verbose", len(fresh) - MAX_SAID)
