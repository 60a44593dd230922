"""Masquerade and forward rules: flannel's, in nftables tables of our own.

Owns the tables ``ip udptun-ipv4`` and ``ip6 udptun-ipv6``, each as a whole, and nothing else of
the host's rules. Refuses to know leases and interfaces. Asyncio, one loop for an object.

Each ``sync`` reads the rules back and replaces a table, in one transaction, only where it differs.
An accept in a table of ours cannot lift a drop in another: what the host's own rules refuse stays
refused, and ``keep`` says so where it can be seen (a policy).
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
from ...model import IPNetwork

log = logging.getLogger(__name__)

Json = dict[str, Any]

TABLES = {"ip": "udptun-ipv4", "ip6": "udptun-ipv6"}
MULTICAST = {"ip": ipaddress.ip_network("224.0.0.0/4"), "ip6": ipaddress.ip_network("ff00::/8")}
KUBE_PROXY_MARK = 0x4000  # kube-proxy masquerades what it has marked so: twice is once too often
# linux/netfilter_ipv4.h: NF_IP_PRI_NAT_SRC, NF_IP_PRI_FILTER
POSTROUTING = {"type": "nat", "hook": "postrouting", "prio": 100, "policy": "accept"}
FORWARD = {"type": "filter", "hook": "forward", "prio": 0, "policy": "accept"}
NFT_TIMEOUT_S = 10.0

ACCEPT: Json = {"accept": None}
RETURN: Json = {"return": None}
MASQUERADE: Json = {"masquerade": {"flags": "fully-random"}}


class FirewallError(UdptunError):
    """The rules could not be read or set; the sentence is nft's, or says why nft did not run."""


class _GarbledError(FirewallError):
    """nft answered something that cannot be read."""


@dataclass(frozen=True, slots=True)
class FirewallRules:
    """What is wanted. A family without a network has no rules.

    network     the overlay's, ``network6`` for IPv6
    subnet      this node's, ``subnet6`` for IPv6
    masquerade  --ip-masq
    forward     --iptables-forward-rules
    """

    network: ipaddress.IPv4Network | None = None
    subnet: ipaddress.IPv4Network | None = None
    network6: ipaddress.IPv6Network | None = None
    subnet6: ipaddress.IPv6Network | None = None
    masquerade: bool = False
    forward: bool = False


class Firewall:
    """Keeps the tables as ``want`` says, which may be set to something else at any time.

    error  why the last ``sync`` failed, in a sentence; "" when it did not
    """

    def __init__(self, want: FirewallRules, nft: str = "nft") -> None:
        self.want = want
        self.error = ""
        self._nft = nft
        self._turn = asyncio.Lock()  # a table is read, compared and replaced by one at a time
        # What nft read back of what we have put in, by family: another release may write the same
        # rules in another way, and must not be taken for a change each time.
        self._in_force: dict[str, tuple[list[Json] | None, list[Json] | None]] = {}

    async def sync(self) -> bool:
        """Put in force what is wanted. True if something had to be changed. FirewallError: one
        family's trouble does not keep the other from being done."""
        changed = False
        failed: dict[str, None] = {}  # a set that keeps its order: both may say the same
        async with self._turn:
            for family in TABLES:
                try:
                    changed |= await self._sync(family)
                except FirewallError as error:
                    failed[str(error)] = None
        self.error = "; ".join(failed)
        if failed:
            raise FirewallError(self.error)
        return changed

    async def keep(self, every_s: float) -> None:
        """``sync`` now and every so many seconds, until cancelled; an error is logged once."""
        failed = ""
        obstacles: tuple[str, ...] = ()
        while True:
            try:
                if await self.sync():
                    log.info("firewall rules put in force")
                found = await self.obstacles()
                for sentence in found:
                    if sentence not in obstacles:
                        log.warning("%s", sentence)
                failed, obstacles = "", found
            except FirewallError as error:
                if str(error) != failed:
                    log.error("firewall rules are not in force: %s", error)
                failed = str(error)
            await asyncio.sleep(every_s)

    async def remove(self) -> bool:
        """Take the tables out. True if there were any. FirewallError."""
        self.want = FirewallRules()
        return await self.sync()

    async def obstacles(self) -> tuple[str, ...]:
        """Chains of others that refuse to forward by policy, a sentence each. FirewallError."""
        if not self.want.forward:
            return ()
        chains = [item["chain"] for item in await self._nft_json("list", "chains")
                  if "chain" in item]
        return tuple(
            f"{chain['family']} {chain['table']} {chain['name']} drops what it does not accept"
            " itself: packets of the overlay may be among them"
            for chain in chains
            if chain.get("hook") == "forward" and chain.get("policy") == "drop"
        )

    # -- one family -------------------------------------------------------------------------------

    async def _sync(self, family: str) -> bool:
        want = list(_content(family, self.want)) or None
        if want is None and shutil.which(self._nft) is None:
            return False  # a host without nft, which needs none
        try:
            there = await self._read(family)
        except _GarbledError:  # nft 1.0.6 on a table with flags: not ours, then
            there = []
        if there == want or self._in_force.get(family) == (want, there):
            return False
        table = {"table": _table(family)}
        # Adding it first makes the deletion good whether it is there or not.
        steps: list[Json] = [{"add": table}, {"delete": table}]
        steps += [{"add": item} for item in want or ()]
        await self._nft_json("-f", "-", tell=json.dumps({"nftables": steps}))
        self._in_force[family] = (want, await self._read(family))
        return True

    async def _read(self, family: str) -> list[Json] | None:
        """Our table, its chains and rules, without the kernel's numbers; None: no such table."""
        try:
            items = await self._nft_json("list", "table", family, TABLES[family])
        except FirewallError as error:
            if os.strerror(errno.ENOENT) in str(error):
                return None
            raise
        return [
            {kind: {key: value for key, value in body.items() if key != "handle"}}
            for item in items for kind, body in item.items() if kind != "metainfo"
        ]

    async def _nft_json(self, *arguments: str, tell: str = "") -> list[Json]:
        """What nft answers. In a thread: a caller that is cancelled leaves nothing half done."""
        command = " ".join((self._nft, *arguments))
        try:
            done = await asyncio.to_thread(
                subprocess.run, (self._nft, "-j", *arguments), input=tell, text=True,
                capture_output=True, check=False, timeout=NFT_TIMEOUT_S,
                env={**os.environ, "LC_ALL": "C"},  # so that errors can be told apart
            )
        except subprocess.TimeoutExpired:
            raise FirewallError(f"{command}: no answer in {NFT_TIMEOUT_S:g} s") from None
        except OSError as error:
            hint = " (Debian has it in the package nftables)" \
                if isinstance(error, FileNotFoundError) else ""
            raise FirewallError(f"{self._nft} does not run: {error.strerror}{hint}") from None
        if done.returncode != 0:
            # Behind the first line nft shows the place in its input.
            said = done.stderr.strip().partition("\n")[0] or f"exit code {done.returncode}"
            raise FirewallError(f"{command}: {said}")
        try:
            answer: list[Json] = json.loads(done.stdout)["nftables"] if done.stdout else []
        except (ValueError, KeyError, TypeError):
            raise _GarbledError(f"{command}: answers what is not its JSON") from None
        return answer


def _table(family: str) -> Json:
    return {"family": family, "name": TABLES[family]}


def _content(family: str, want: FirewallRules) -> Iterator[Json]:
    """A family's table, its chains and rules as nft's JSON; nothing: there shall be none."""
    network: IPNetwork | None = want.network if family == "ip" else want.network6
    subnet: IPNetwork | None = want.subnet if family == "ip" else want.subnet6
    if network is None:
        return
    at = {"family": family, "table": TABLES[family]}
    chains: list[tuple[str, Json, list[list[Json]]]] = []
    if want.masquerade and subnet is not None:
        chains.append(("postrtg", POSTROUTING, _postrouting(family, network, subnet)))
    if want.forward:
        chains.append(("forward", FORWARD, [
            [_match(family, "saddr", "==", network), ACCEPT],
            [_match(family, "daddr", "==", network), ACCEPT],
        ]))
    if chains:
        yield {"table": _table(family)}
    for name, hook, _ in chains:
        yield {"chain": {**at, "name": name, **hook}}
    for name, _, rules in chains:
        for rule in rules:
            yield {"rule": {**at, "chain": name, "expr": rule}}


def _postrouting(family: str, network: IPNetwork, subnet: IPNetwork) -> list[list[Json]]:
    """flannel's rules, in its order; the first that matches decides."""
    def source(op: str, prefix: IPNetwork) -> Json:
        return _match(family, "saddr", op, prefix)

    def destination(op: str, prefix: IPNetwork) -> Json:
        return _match(family, "daddr", op, prefix)

    marked = {"match": {"op": "==", "left": {"&": [{"meta": {"key": "mark"}}, KUBE_PROXY_MARK]},
                        "right": KUBE_PROXY_MARK}}
    return [
        [marked, RETURN],
        # Within the overlay addresses stay what they are.
        [source("==", subnet), destination("==", network), RETURN],
        [source("==", network), destination("==", subnet), RETURN],
        # A pod of this node sees who calls it from outside.
        [source("!=", network), destination("==", subnet), RETURN],
        # Out of the overlay: the world knows no way back to a pod.
        [source("==", network), destination("!=", MULTICAST[family]), MASQUERADE],
        # Into the overlay from this host, whose own address the other nodes do not route back.
        [source("!=", network), destination("==", network), MASQUERADE],
    ]


def _match(family: str, field: str, op: str, prefix: IPNetwork) -> Json:
    """nft names a single host without a length."""
    address = str(prefix.network_address)
    right: Any = address if prefix.prefixlen == prefix.max_prefixlen else \
        {"prefix": {"addr": address, "len": prefix.prefixlen}}
    return {"match": {"op": op, "left": {"payload": {"protocol": family, "field": field}},
                      "right": right}}
