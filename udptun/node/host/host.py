"""The parts of the host's setup that do not depend on a backend: firewall rules and subnet.env.

Owns: the firewall rules, subnet.env, and their fields in the report. A failure is reported, the
operation is tried again, and the daemon continues. Runs on the daemon's loop.
"""

from __future__ import annotations

import contextlib
import logging

from ...errors import FieldError
from ...leases.base import Lease
from ...leases.netconf import NetConfig
from ..config import NodeConfig
from ..status.report import FirewallDrop, NodeReport
from .firewall.keeper import Firewall
from .firewall.rules import FirewallError, FirewallRules
from .subnet_env import SubnetEnv

log = logging.getLogger(__name__)


class Host:
    def __init__(self, config: NodeConfig, report: NodeReport) -> None:
        self._config = config
        self._report = report
        self._firewall = Firewall(FirewallRules(), config.instance)

    @property
    def firewall_error(self) -> str:
        """The reason why the firewall rules are not active; "" if they are active."""
        return self._firewall.error

    @property
    def firewall_drops(self) -> tuple[FirewallDrop, ...]:
        return self._firewall.dropped

    async def settle(self, network: NetConfig, lease: Lease, mtu: int) -> None:
        """Set up the host for our lease.

        mtu  the largest inner packet, in bytes
        """
        await self._set_rules(network, lease)
        self._write_env(network, lease, mtu)

    async def run(self) -> None:
        """Restore firewall rules that other programs remove, until cancelled."""
        await self._firewall.keep(self._config.iptables_resync)

    async def _set_rules(self, network: NetConfig, lease: Lease) -> None:
        config = self._config
        self._firewall.want = FirewallRules(
            network.network, lease.subnets.v4, network.network6, lease.subnets.v6,
            config.ip_masq, config.iptables_forward_rules, self._devices(network),
        )
        self._firewall.mode = config.firewall or ("nftables" if network.nftables else "auto")
        with contextlib.suppress(FirewallError):  # Firewall.keep tries again and logs it
            await self._firewall.sync()

    def _devices(self, network: NetConfig) -> frozenset[str]:
        """Return the names of the overlay's devices, also of those that do not exist here."""
        devices = {self._config.tun}
        for one in network.networks:
            with contextlib.suppress(FieldError):  # a name that is too long for a device
                devices.add(self._config.instance.vxlan_device(network.vni, one.version))
        return frozenset(devices)

    def _write_env(self, network: NetConfig, lease: Lease, mtu: int) -> None:
        path, subnets = self._config.subnet_file, lease.subnets
        env = SubnetEnv(network.network, subnets.v4, network.network6, subnets.v6, mtu,
                        self._config.ip_masq)
        try:
            if env.write(path):
                log.info("wrote %s: %s, MTU %d", path, subnets, mtu)
            self._report.subnet_env_error = ""
        except OSError as exc:
            why = f"{path} cannot be written: {exc.strerror}"
            if why != self._report.subnet_env_error:
                log.error("%s", why)
            self._report.subnet_env_error = why
