"""The parts of the host's setup that do not depend on a backend: firewall, sysctls, subnet.env.

Owns: the firewall rules, forwarding, subnet.env, and their fields in the report. A failure is
reported, the operation is tried again, and the daemon continues. Runs on the daemon's loop.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator

from ...errors import FieldError
from ...leases.base import Lease
from ...leases.netconf import NetConfig
from ...model import Endpoint, IPNetwork
from ...text import os_reason
from ..config import NodeConfig
from ..status.report import FirewallDrop, NodeReport
from .firewall.guard import GuardRules
from .firewall.keeper import Firewall
from .firewall.rules import FirewallError, FirewallRules
from .firewall.verdict import Flow, datagrams
from .forwarding import keep_forwarding
from .interface import LOOPBACK, OuterFlow, Underlay
from .subnet_env import SubnetEnv

log = logging.getLogger(__name__)


class Host:
    """The parts of the host's setup that do not depend on a backend.

    guarded  takes the name of the underlay's interface. Returns the endpoints of the other nodes'
             forwarders, and the subnets whose packets arrive on this interface; None: not known
    """

    def __init__(
        self, config: NodeConfig, report: NodeReport,
        guarded: Callable[[str], tuple[frozenset[Endpoint], frozenset[IPNetwork]] | None],
    ) -> None:
        self._config = config
        self._report = report
        self._guarded = guarded
        self._underlay: Underlay | None = None
        self._networks: tuple[IPNetwork, ...] = ()
        self._firewall = Firewall(FirewallRules(), config.instance)
        self._firewall.guard = self._guard
        self._env: SubnetEnv | None = None  # the wanted content of subnet.env

    @property
    def firewall_error(self) -> str:
        """The reason why the firewall rules are not active; "" if they are active."""
        return self._firewall.error

    @property
    def firewall_drops(self) -> tuple[FirewallDrop, ...]:
        return self._firewall.dropped

    async def prepare(self, network: NetConfig, lease: Lease) -> None:
        """Set the wanted firewall rules. Apply them now if they differ from the former ones.

        Call it before a device gets an address of the lease. The old rules would masquerade the
        first packets from this address, and the kernel would keep the translation of these flows.
        """
        config, before = self._config, self._firewall.want
        self._firewall.want = FirewallRules(
            network.network, lease.subnets.v4, network.network6, lease.subnets.v6,
            config.ip_masq, config.iptables_forward_rules, self._devices(network),
        )
        self._firewall.mode = config.firewall or ("nftables" if network.nftables else "auto")
        if self._firewall.want != before:
            await self._sync_rules()

    async def settle(
        self, network: NetConfig, lease: Lease, mtu: int, underlay: Underlay,
        outer: Iterable[OuterFlow],
    ) -> None:
        """Set up the host for our lease, after ``prepare``.

        mtu    the largest inner packet, in bytes
        outer  one for each active backend
        """
        self._firewall.tunnel = tuple(tunnel_flows(underlay, outer))
        self._underlay, self._networks = underlay, network.networks
        await self._sync_rules()
        subnets = lease.subnets
        self._env = SubnetEnv(network.network, subnets.v4, network.network6, subnets.v6, mtu,
                              self._config.ip_masq)

    def keep_forwarding(self, network: NetConfig) -> tuple[list[str], dict[str, str]]:
        """Turn forwarding on. Return a sentence for each repair, and by sysctl a sentence for each
        setting that is still off."""
        if not self._config.iptables_forward_rules:
            return [], {}
        versions = {one.version for one in network.networks}
        return keep_forwarding(versions, self._devices(network))

    async def run(self) -> None:
        """Restore firewall rules that other programs remove, until cancelled."""
        await self._firewall.keep(self._config.iptables_resync)

    def guard_soon(self) -> None:
        """Update the rules against forged packets soon, because the other nodes have changed."""
        self._firewall.sync_soon()

    def _guard(self) -> GuardRules | None:
        """Return the wanted rules against forged packets; None: they are not known yet."""
        underlay, config = self._underlay, self._config
        if underlay is None or (found := self._guarded(underlay.name)) is None:
            # Rules that need a mark must not stay if the forwarder will have none.
            return GuardRules() if config.mark is None else None
        endpoints, direct = found
        public = (underlay.address, underlay.address6, underlay.public, underlay.public6)
        mixed = underlay.name == LOOPBACK or any(
            address in network for network in self._networks for address in public
            if address is not None)
        return GuardRules(
            config.mark, endpoints, "" if mixed else underlay.name, self._networks, direct,
            config.ip_masq)

    async def _sync_rules(self) -> None:
        with contextlib.suppress(FirewallError):  # Firewall.keep tries again and logs it
            await self._firewall.sync()

    def _devices(self, network: NetConfig) -> frozenset[str]:
        """Return the names of the overlay's devices, also of those that do not exist here."""
        devices = {self._config.tun}
        for one in network.networks:
            with contextlib.suppress(FieldError):  # a name that is too long for a device
                devices.add(self._config.instance.vxlan_device(network.vni, one.version))
        return frozenset(devices)

    def write_env(self) -> None:
        """Write subnet.env, if it does not have the wanted content. Call it after ``settle``, when
        everything is active: the CNI plugin attaches pods as soon as the file exists."""
        path, env = self._config.subnet_file, self._env
        assert env is not None
        try:
            if env.write(path):
                subnets = " and ".join(str(one) for one in (env.subnet, env.subnet6) if one)
                log.info("wrote %s: %s, MTU %d", path, subnets, env.mtu)
            self._report.subnet_env_error = ""
        except OSError as exc:
            why = f"{path} cannot be written: {os_reason(exc)}"
            if why != self._report.subnet_env_error:
                log.error("%s", why)
            self._report.subnet_env_error = why


def tunnel_flows(underlay: Underlay, outer: Iterable[OuterFlow]) -> Iterator[Flow]:
    """Yield the flows of the tunnel's own datagrams."""
    for each in outer:
        port, state = each.port, "established" if each.same_port else "new"
        for own in underlay.bound:
            yield from datagrams(own, underlay.name, port, state)
