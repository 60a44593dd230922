"""Masquerade and forward rules: the same rules as flannel's, in nftables tables of our own.

Owns: the instance's two tables, by default ``ip udptun-ipv4`` and ``ip6 udptun-ipv6``. Does not
change other rules of the host. Does not depend on leases or interfaces. Asyncio, one loop per
object.

Each ``sync`` reads our tables from the kernel. If a table differs from the wanted rules, ``sync``
replaces the table in one transaction. An accept in our table does not override a drop in another
table: a packet that the host's own rules drop is still dropped. ``keep`` logs a warning if the
policy of a forward chain is drop.
"""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import json
import logging
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ...errors import UdptunError
from ...instance import Instance
from ...model import IPNetwork

log = logging.getLogger(__name__)

Json = dict[str, Any]

FAMILIES = {"ip": 4, "ip6": 6}  # nft's name of each IP version
MULTICAST = {"ip": ipaddress.ip_network("224.0.0.0/4"), "ip6": ipaddress.ip_network("ff00::/8")}
KUBE_PROXY_MARK = 0x4000  # kube-proxy masquerades packets with this mark itself
# linux/netfilter_ipv4.h: NF_IP_PRI_NAT_SRC, NF_IP_PRI_FILTER
POSTROUTING = {"type": "nat", "hook": "postrouting", "prio": 100, "policy": "accept"}
FORWARD = {"type": "filter", "hook": "forward", "prio": 0, "policy": "accept"}
NFT_TIMEOUT_S = 10.0
DEFAULT = Instance()

ACCEPT: Json = {"accept": None}
RETURN: Json = {"return": None}
MASQUERADE: Json = {"masquerade": {"flags": "fully-random"}}


class FirewallError(UdptunError):
    """The rules could not be read or set. The text is nft's error, or the reason why nft failed."""


class _GarbledError(FirewallError):
    """The output of nft cannot be parsed."""


@dataclass(frozen=True, slots=True)
class FirewallRules:
    """The wanted rules. An IP version without a network has no rules.

    network     the overlay's IPv4 network
    subnet      this node's IPv4 subnet
    network6    the overlay's IPv6 network
    subnet6     this node's IPv6 subnet
    masquerade  the value of --ip-masq
    forward     the value of --iptables-forward-rules
    """

    network: ipaddress.IPv4Network | None = None
    subnet: ipaddress.IPv4Network | None = None
    network6: ipaddress.IPv6Network | None = None
    subnet6: ipaddress.IPv6Network | None = None
    masquerade: bool = False
    forward: bool = False


class Firewall:
    """Keeps the instance's tables equal to ``want``.

    want   the wanted rules; can be set at any time
    error  the reason why the last ``sync`` failed, as a sentence; "" if ``sync`` succeeded
    """

    def __init__(
        self, want: FirewallRules, instance: Instance = DEFAULT, *, nft: str = "nft"
    ) -> None:
        self.want = want
        self.error = ""
        self._tables = {
            family: instance.nft_table(version) for family, version in FAMILIES.items()
        }
        self._nft = nft
        self._lock = asyncio.Lock()  # one ``sync`` at a time
        # By family: the rules that we applied last, and nft's output for these rules. Another
        # release of nft may print the same rules in another form. If the output has not changed
        # since then, ``sync`` does not replace the table.
        self._applied: dict[str, tuple[list[Json] | None, list[Json] | None]] = {}

    async def sync(self) -> bool:
        """Apply the wanted rules. Return True if a table had to be changed.

        Raises FirewallError, but only after it has tried both families.
        """
        changed = False
        failed: dict[str, None] = {}  # an ordered set: both families may fail for the same reason
        async with self._lock:
            for family in FAMILIES:
                try:
                    changed |= await self._sync(family)
                except FirewallError as error:
                    failed[str(error)] = None
        self.error = "; ".join(failed)
        if failed:
            raise FirewallError(self.error)
        return changed

    async def keep(self, every_s: float) -> None:
        """Call ``sync`` now and every ``every_s`` seconds, until cancelled.

        An error that occurs several times in succession is logged once.
        """
        failed = ""
        obstacles: tuple[str, ...] = ()
        while True:
            try:
                if await self.sync():
                    log.info("firewall rules applied")
                found = await self.obstacles()
                for sentence in found:
                    if sentence not in obstacles:
                        log.warning("%s", sentence)
                failed, obstacles = "", found
            except FirewallError as error:
                if str(error) != failed:
                    log.error("firewall rules are not active: %s", error)
                failed = str(error)
            await asyncio.sleep(every_s)

    async def remove(self) -> bool:
        """Remove our tables. Return True if at least one existed. Raises FirewallError."""
        self.want = FirewallRules()
        return await self.sync()

    async def obstacles(self) -> tuple[str, ...]:
        """Return a sentence for each forward chain whose policy is drop.

        Return nothing if no forward rules are wanted. Raises FirewallError.
        """
        if not self.want.forward:
            return ()
        chains = [item["chain"] for item in await self._nft_json("list", "chains")
                  if "chain" in item]
        return tuple(
            f"{chain['family']} {chain['table']} {chain['name']} has the policy drop: unless one of"
            " its rules accepts them, packets of the overlay are dropped"
            for chain in chains
            if chain.get("hook") == "forward" and chain.get("policy") == "drop"
        )

    # -- one family -------------------------------------------------------------------------------

    async def _sync(self, family: str) -> bool:
        want = list(_content(family, self._tables[family], self.want)) or None
        if want is None and shutil.which(self._nft) is None:
            return False  # no rules are wanted; without nft, udptun cannot have created rules
        try:
            there = await self._read(family)
        except _GarbledError:  # nft 1.0.6 prints this for a table with flags; our table has none
            there = []
        if there == want or self._applied.get(family) == (want, there):
            return False
        table = {"table": {"family": family, "name": self._tables[family]}}
        # The first "add" creates the table if there is none. So the "delete" always succeeds.
        steps: list[Json] = [{"add": table}, {"delete": table}]
        steps += [{"add": item} for item in want or ()]
        await self._nft_json("-f", "-", stdin=json.dumps({"nftables": steps}))
        self._applied[family] = (want, await self._read(family))
        return True

    async def _read(self, family: str) -> list[Json] | None:
        """Return our table, its chains and its rules, without handles.

        Return None if the table does not exist.
        """
        try:
            items = await self._nft_json("list", "table", family, self._tables[family])
        except FirewallError as error:
            if os.strerror(errno.ENOENT) in str(error):
                return None
            raise
        return [
            {kind: {key: value for key, value in body.items() if key != "handle"}}
            for item in items for kind, body in item.items() if kind != "metainfo"
        ]

    async def _nft_json(self, *arguments: str, stdin: str = "") -> list[Json]:
        """Run nft and return its output. Raises FirewallError.

        nft runs in a thread, so that cancelling the caller does not interrupt nft.
        """
        command = " ".join((self._nft, *arguments))
        try:
            done = await asyncio.to_thread(
                subprocess.run, (self._nft, "-j", *arguments), input=stdin, text=True,
                capture_output=True, check=False, timeout=NFT_TIMEOUT_S,
                env={**os.environ, "LC_ALL": "C"},  # we recognise errors by their English text
            )
        except subprocess.TimeoutExpired:
            raise FirewallError(f"{command}: no answer within {NFT_TIMEOUT_S:g} s") from None
        except OSError as error:
            hint = " (Debian has it in the package nftables)" \
                if isinstance(error, FileNotFoundError) else ""
            raise FirewallError(f"{self._nft} does not run: {error.strerror}{hint}") from None
        if done.returncode != 0:
            # The first line is the error. The other lines quote the input.
            why = done.stderr.strip().partition("\n")[0] or f"exit code {done.returncode}"
            raise FirewallError(f"{command}: {why}")
        try:
            answer: list[Json] = json.loads(done.stdout)["nftables"] if done.stdout else []
        except (ValueError, KeyError, TypeError):
            raise _GarbledError(f"{command}: its output is not the expected JSON") from None
        return answer


def _content(family: str, table: str, want: FirewallRules) -> Iterator[Json]:
    """Yield a family's table, its chains and its rules as nft's JSON.

    Yield nothing if no rules are wanted.
    """
    network: IPNetwork | None = want.network if family == "ip" else want.network6
    subnet: IPNetwork | None = want.subnet if family == "ip" else want.subnet6
    if network is None:
        return
    at = {"family": family, "table": table}
    chains: list[tuple[str, Json, list[list[Json]]]] = []
    if want.masquerade and subnet is not None:
        chains.append(("postrtg", POSTROUTING, _postrouting(family, network, subnet)))
    if want.forward:
        chains.append(("forward", FORWARD, [
            [_match(family, "saddr", "==", network), ACCEPT],
            [_match(family, "daddr", "==", network), ACCEPT],
        ]))
    if chains:
        yield {"table": {"family": family, "name": table}}
    for name, hook, _ in chains:
        yield {"chain": {**at, "name": name, **hook}}
    for name, _, rules in chains:
        for rule in rules:
            yield {"rule": {**at, "chain": name, "expr": rule}}


def _postrouting(family: str, network: IPNetwork, subnet: IPNetwork) -> list[list[Json]]:
    """Return flannel's rules, in flannel's order. The first rule that matches a packet decides."""
    def source(op: str, prefix: IPNetwork) -> Json:
        return _match(family, "saddr", op, prefix)

    def destination(op: str, prefix: IPNetwork) -> Json:
        return _match(family, "daddr", op, prefix)

    marked = {"match": {"op": "==", "left": {"&": [{"meta": {"key": "mark"}}, KUBE_PROXY_MARK]},
                        "right": KUBE_PROXY_MARK}}
    return [
        [marked, RETURN],
        # Packets within the overlay: do not translate their addresses.
        [source("==", subnet), destination("==", network), RETURN],
        [source("==", network), destination("==", subnet), RETURN],
        # Packets from outside the overlay to a pod of this node: the pod sees the client's address.
        [source("!=", network), destination("==", subnet), RETURN],
        # Packets from the overlay to other networks: these have no route back to a pod.
        [source("==", network), destination("!=", MULTICAST[family]), MASQUERADE],
        # Packets from this host to the overlay: the other nodes have no route to this host's own
        # address.
        [source("!=", network), destination("==", network), MASQUERADE],
    ]


def _match(family: str, field: str, op: str, prefix: IPNetwork) -> Json:
    """Return a match of an address with ``prefix``, in the form in which nft prints the match.

    nft prints the address of a single host without a prefix length.
    """
    address = str(prefix.network_address)
    right: Any = address if prefix.prefixlen == prefix.max_prefixlen else \
        {"prefix": {"addr": address, "len": prefix.prefixlen}}
    return {"match": {"op": op, "left": {"payload": {"protocol": family, "field": field}},
                      "right": right}}
