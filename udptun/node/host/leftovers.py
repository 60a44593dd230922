"""Remove what an earlier flannel has left on this host, if it would divert or change our packets.

Owns: which things are flannel's leftovers, and the conditions for their removal:
- No flanneld runs in this network namespace (nor k3s or rke2, which contain flannel), and this
  process sees the host's processes.
- The VXLAN device has flannel's name for our VNI, our VNI, and an address in our network. Our own
  backend does not use the device.
- The iptables chains FLANNEL-POSTRTG and FLANNEL-FWD, and the nftables tables flannel-ipv4 and
  flannel-ipv6: at least one rule names our network, and no rule names a prefix outside it, except
  multicast. Each rule in the chains has the form of one of flannel's. A former FLANNEL-POSTRTG
  masquerades all packets between pods once this node has another subnet.

Everything else stays. Runs on the daemon's loop.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import logging
import os
import shlex
import shutil
from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator, Sequence
from functools import partial
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

# These contain flannel. k3s runs its own file again under the names k3s-server and k3s-agent.
PROGRAMS = ("flanneld", "k3s", "k3s-server", "k3s-agent", "rke2")
# If process 1 is one of these, this is a container without the PID namespace of the host. ("pause"
# is process 1 of a pod.)
CONTAINER_INITS = ("pause", "tini", "docker-init", "dumb-init", "catatonit")
DELETED = " (deleted)"  # the kernel appends this to the name of a running file that was removed
CHAINS = {"nat": ("POSTROUTING", "FLANNEL-POSTRTG"), "filter": ("FORWARD", "FLANNEL-FWD")}
NFT_TABLES = {4: ("ip", "flannel-ipv4"), 6: ("ip6", "flannel-ipv6")}
# flannel's rules as iptables-save prints them, without the comment and with P for each prefix.
RULES = {
    "nat": frozenset((
        "-m mark --mark 0x4000/0x4000 -j RETURN",
        "-s P -d P -j RETURN", "! -s P -d P -j RETURN",
        *(f"{match} -j MASQUERADE{option}" for match in ("-s P ! -d P", "! -s P -d P")
          for option in ("", " --random-fully")),
    )),
    "filter": frozenset(("-s P -j ACCEPT", "-d P -j ACCEPT")),
}
PREFIX_OPTIONS = ("-s", "-d")  # of iptables-save
HIDDEN = "the host's processes are not visible here"
RULES_SECONDS = 10.0  # between two looks at the rules


class Leftovers:
    """found  by name: why a leftover stays, as a sentence"""

    def __init__(self, netlink: Netlink) -> None:
        self.found: dict[str, str] = {}
        self._vxlan = Vxlan(netlink)
        self._network: NetConfig | None = None  # of the last ``remove``
        self._said = ""

    async def remove(self, network: NetConfig, ours: Collection[str]) -> None:
        """Remove flannel's leftovers of this network. A failure is only logged.

        ours  the names of the VXLAN devices that our backends use
        """
        if network != self._network:
            self._network = network
            await self._attempt(self._remove_rules)
        for one in network.networks:
            name = _device(network.vni, one.version)
            if name and name not in ours and Path("/sys/class/net", name).exists():
                await self._attempt(partial(self._remove_device, name, one))

    async def keep(self) -> None:
        """Remove rules that appear later, until cancelled. The kernel does not notify us when
        rules change, so this looks at them regularly."""
        while True:
            await asyncio.sleep(RULES_SECONDS)
            if self._network is not None:
                await self._attempt(self._remove_rules)

    async def _attempt(self, removal: Callable[[], Awaitable[None]]) -> None:
        try:
            await removal()
        except (UdptunError, OSError) as exc:
            self._say(f"looking for leftovers of flannel: {exc}")

    async def _remove_device(self, name: str, network: IPNetwork) -> None:
        assert self._network is not None
        if self._may_remove() and \
                await self._vxlan.remove_leftover(name, self._network.vni, network):
            log.warning("removed %s, which a former flannel has left", name)

    async def _remove_rules(self) -> None:
        assert self._network is not None
        names = sorted(await names_there())
        why = why_keep() if names else ""
        if not names or why:
            # If a flannel runs, these are its rules, and no leftovers.
            self.found = {name: f"{name} may be a leftover of a former flannel, whose rules can"
                                f" masquerade packets between pods; it stays, because {why}"
                          for name in names if why == HIDDEN}
            if names:
                self._say(f"{why}: flannel's devices and rules stay")
            return
        stay = []
        for network in self._network.networks:
            for variant in iptables.VARIANTS:
                stay += await _remove_chains(network, variant)
            await _remove_nft_table(network)
        self.found = {text: text for text in stay}
        if stay:
            self._say("; ".join(stay))

    def _may_remove(self) -> bool:
        why = why_keep()
        if why:
            self._say(f"{why}: flannel's devices and rules stay")
        return not why

    def _say(self, text: str) -> None:
        if text != self._said:
            log.warning("%s", text)
        self._said = text


def why_keep() -> str:
    """Say why flannel may run in this network namespace; "": it does not run here."""
    try:
        if os.getpid() == 1 or _comm(Path("/proc/1")) in CONTAINER_INITS:
            return HIDDEN
    except OSError:  # the mount option hidepid
        return HIDDEN
    here = Path("/proc/thread-self/ns/net").stat().st_ino
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if name := _flannel(process):
                try:
                    if (process / "ns/net").stat().st_ino == here:
                        return f"{name} runs here"
                except PermissionError:
                    return f"{name} runs, and its network namespace cannot be read"
        except (FileNotFoundError, ProcessLookupError):  # it has ended
            continue
    return ""


def _flannel(process: Path) -> str:
    """Return the name of the process if it contains flannel, otherwise "".

    The link to the file of a process with more privileges than ours cannot be read. Everybody can
    read the name of a process and its command line, but a process can change these.
    """
    try:
        file = (process / "exe").readlink().name.removesuffix(DELETED)
    except (PermissionError, FileNotFoundError):  # a kernel thread has no file
        file = ""
    command = os.fsdecode((process / "cmdline").read_bytes().partition(b"\0")[0])
    return next((name for name in (_comm(process), file, Path(command).name) if name in PROGRAMS),
                "")


def _comm(process: Path) -> str:
    return (process / "comm").read_text(errors="replace").rstrip("\n")


def _device(vni: int, version: int) -> str:
    try:
        return Instance().vxlan_device(vni, version)
    except FieldError:  # the name is too long for a device
        return ""


async def names_there() -> set[str]:
    """Return those of flannel's names that a chain or a table has, in nftables or in iptables."""
    names = {chain for _, chain in CHAINS.values()} | {table for _, table in NFT_TABLES.values()}
    return names & await chain_names(CHAINS)


async def chain_names(only: Collection[str] | None = None) -> set[str]:
    """Return the names of all chains and tables, of both variants of iptables and of nftables.

    only  the legacy tables to look at, because each needs a process; None: all
    """
    found: set[str] = set()
    for version in (4, 6):
        for table in iptables.legacy_tables(version):
            if only is not None and table not in only:
                continue
            if (tables := await iptables.find(version, "legacy")) is not None:
                found |= (await tables.read(table)).rules.keys()
    if shutil.which("nft"):
        text = await run_tool(("nft", "list", "chains"), "nftables")
        words = text.replace("{", " ").split()
        found |= {after for before, after in pairwise(words)
                  if before in ("chain", "ip", "ip6", "inet")}
    return found


async def _remove_chains(network: IPNetwork, variant: str) -> list[str]:
    """Return why a chain of this network stays, one text for each such chain."""
    tables = await iptables.find(network.version, variant)
    if tables is None:
        return []
    present = CHAINS.keys() if variant == "nft" else \
        CHAINS.keys() & iptables.legacy_tables(network.version)
    return [text for table in sorted(present)
            if (text := await _remove_chain(tables, table, network))]


async def _remove_chain(tables: iptables.Tables, table: str, network: IPNetwork) -> str:
    base, chain = CHAINS[table]
    listing = await tables.read(table)
    rules = [_words(rule) for rule in listing.rules.get(chain, ())]
    if not rules or not _only_ours(_prefixes_of(rules), network):
        return ""
    if any(_form(words) not in RULES[table] for words in rules):
        return f"the chain {chain} of {tables.name} stays: not all of its rules are flannel's"
    jumps = [rule for rule in listing.rules.get(base, ())
             if any(option in ("-j", "-g") and target == chain
                    for option, target in pairwise(_words(rule)))]
    await tables.apply(table, [
        *(f"-D {base} {rule}" for rule in jumps), f"-F {chain}", f"-X {chain}"])
    log.warning("removed the chain %s of %s, which a former flannel has left", chain, tables.name)
    return ""


def _words(rule: str) -> list[str]:
    """Split a rule of iptables-save, without its comments, which may contain any text."""
    try:
        words = shlex.split(rule)
    except ValueError:  # this is no rule of flannel
        return []
    while "--comment" in words:
        at = words.index("--comment")
        del words[at:at + 2]
    return words


def _form(words: Sequence[str]) -> str:
    text = " ".join("P" if option in PREFIX_OPTIONS else word
                    for option, word in pairwise(["", *words]))
    return text.replace("-m comment ", "")


def _prefixes_of(rules: Iterable[Sequence[str]]) -> Iterator[str]:
    for words in rules:
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
