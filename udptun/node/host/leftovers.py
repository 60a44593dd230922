"""Remove what a former flannel has left on this host and what would take or change our packets.

Owns: which things are flannel's leftovers, and the conditions for their removal:
- No flanneld runs in this network namespace (nor k3s or rke2, which contain flannel).
- The VXLAN device has flannel's name for our VNI, our VNI, and an address in our network. Our own
  backend does not use the device.
- The iptables chains FLANNEL-POSTRTG and FLANNEL-FWD, and the nftables tables flannel-ipv4 and
  flannel-ipv6: at least one rule names our network, and no rule names a prefix outside it, except
  multicast. A former FLANNEL-POSTRTG masquerades all packets between pods once this node has
  another subnet.

Everything else stays. Runs on the daemon's loop.
"""

from __future__ import annotations

import ipaddress
import json
import logging
import time
from collections.abc import Collection, Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

from ...errors import FieldError, UdptunError
from ...instance import Instance
from ...leases.netconf import NetConfig
from ...model import IPNetwork
from ...net.netlink import Netlink
from ...net.vxlan import Vxlan
from .firewall import iptables
from .firewall.rules import MULTICAST, FirewallError, run_tool

log = logging.getLogger(__name__)

PROGRAMS = ("flanneld", "k3s", "rke2")  # they contain flannel
CHAINS = {"nat": ("POSTROUTING", "FLANNEL-POSTRTG"), "filter": ("FORWARD", "FLANNEL-FWD")}
NFT_TABLES = {4: ("ip", "flannel-ipv4"), 6: ("ip6", "flannel-ipv6")}
PREFIX_OPTIONS = ("-s", "-d")  # of iptables-save
RULES_SECONDS = 60.0  # between two looks at the rules, which need several processes


class Leftovers:
    def __init__(self, netlink: Netlink) -> None:
        self._vxlan = Vxlan(netlink)
        self._rules_looked: tuple[float, NetConfig] | None = None
        self._said = ""

    async def remove(self, network: NetConfig, ours: Collection[str]) -> None:
        """Remove flannel's leftovers of this network. A failure is only logged.

        ours  the names of the VXLAN devices that our backends use
        """
        now = time.monotonic()
        devices = [name for one in network.networks
                   if (name := _device(network.vni, one.version)) and name not in ours]
        rules_due = self._rules_looked is None or self._rules_looked[1] != network or \
            now - self._rules_looked[0] > RULES_SECONDS
        if not rules_due and not any(_exists(device) for device in devices):
            return
        if program := running_flannel():
            self._say(f"{program} runs here: flannel's devices and rules stay")
            return
        try:
            for one in network.networks:
                name = _device(network.vni, one.version)
                if name in devices and await self._vxlan.remove_leftover(name, network.vni, one):
                    log.warning("removed %s, which a former flannel has left", name)
            if rules_due:
                self._rules_looked = now, network
                for one in network.networks:
                    await _remove_rules(one)
            self._said = ""
        except (UdptunError, OSError) as exc:
            self._say(f"looking for leftovers of flannel: {exc}")

    def _say(self, text: str) -> None:
        if text != self._said:
            log.warning("%s", text)
        self._said = text


def running_flannel() -> str:
    """Return the name of a program with flannel that runs in this network namespace; "" if none.

    In a container without the host's PID namespace, the host's programs are not visible.
    """
    here = Path("/proc/thread-self/ns/net").stat().st_ino
    for process in Path("/proc").glob("[0-9]*"):
        try:
            name = (process / "exe").readlink().name
            if name in PROGRAMS and (process / "ns/net").stat().st_ino == here:
                return name
        except OSError:  # it has ended, or it is a kernel thread
            continue
    return ""


def _device(vni: int, version: int) -> str:
    try:
        return Instance().vxlan_device(vni, version)
    except FieldError:  # the name is too long for a device
        return ""


def _exists(device: str) -> bool:
    return Path("/sys/class/net", device).exists()


async def _remove_rules(network: IPNetwork) -> None:
    version = network.version
    for variant in iptables.VARIANTS:
        tables = await iptables.find(version, variant)
        if tables is None:
            continue
        present = CHAINS.keys() if variant == "nft" else \
            CHAINS.keys() & iptables.legacy_tables(version)
        for table in sorted(present):
            await _remove_chain(tables, table, network)
    await _remove_nft_table(network)


async def _remove_chain(tables: iptables.Tables, table: str, network: IPNetwork) -> None:
    base, chain = CHAINS[table]
    listing = await tables.read(table)
    rules = listing.rules.get(chain)
    if not rules or not _only_ours(_prefixes_of(rules), network):
        return
    jumps = [rule for rule in listing.rules.get(base, ()) if f"-j {chain}" in rule]
    await tables.apply(table, [
        *(f"-D {base} {rule}" for rule in jumps), f"-F {chain}", f"-X {chain}"])
    log.warning("removed the chain %s of %s, which a former flannel has left", chain, tables.name)


def _prefixes_of(rules: Iterable[str]) -> Iterator[str]:
    for rule in rules:
        words = rule.split()
        yield from (value for option, value in pairwise(words) if option in PREFIX_OPTIONS)


async def _remove_nft_table(network: IPNetwork) -> None:
    family, name = NFT_TABLES[network.version]
    try:
        text = await run_tool(("nft", "-j", "list", "table", family, name), "nftables")
    except FirewallError:  # the usual case: there is no such table, or no nft
        return
    if _only_ours(_prefixes_in(json.loads(text)), network):
        await run_tool(("nft", "delete", "table", family, name), "nftables")
        log.warning("removed the nftables table %s %s, which a former flannel has left",
                    family, name)


def _prefixes_in(value: Any) -> Iterator[str]:
    """Yield each prefix and each address in nft's JSON."""
    if isinstance(value, dict):
        if isinstance(prefix := value.get("prefix"), dict):
            yield f"{prefix['addr']}/{prefix['len']}"
        elif isinstance(address := value.get("right"), str):
            yield address
        for one in value.values():
            yield from _prefixes_in(one)
    elif isinstance(value, list):
        for one in value:
            yield from _prefixes_in(one)


def _only_ours(prefixes: Iterable[str], network: IPNetwork) -> bool:
    """Return whether the network is among the prefixes, and all of them are in it or multicast."""
    found = set()
    for text in prefixes:
        try:
            found.add(ipaddress.ip_network(text))
        except ValueError:
            return False
    multicast = MULTICAST[network.version]
    return network in found and all(one == multicast or _within(one, network) for one in found)


def _within(one: IPNetwork, network: IPNetwork) -> bool:
    return one.version == network.version and one.prefixlen >= network.prefixlen and \
        one.network_address in network
