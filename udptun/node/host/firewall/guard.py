"""Rules against packets that pretend to come from this node's forwarder, or from the overlay.

Owns: the nftables tables ``ip udptun-guard`` and ``ip6 udptun-guard``, or the iptables chains
UDPTUN-GUARD-OUT and UDPTUN-GUARD-IN in the table mangle; other instances have other names. Does not
decide which tool is used: ``keeper`` does. Asyncio, one loop per object.

Outgoing: a packet to the UDP port of another node's forwarder is dropped, unless it has the mark of
our forwarder. Otherwise any program on this host, and any pod whose packets are masqueraded, could
send inner packets that look as if this node had sent them.

- nftables: the chain is at the hook postrouting, after address translation. It drops only packets
  whose source is now an address of this host. So this host still forwards the datagrams of other
  nodes.
- iptables: no table can drop after address translation. The chain drops packets with any source
  except the addresses of other nodes.

Incoming: a packet that arrives on the underlay's interface with a source and a destination in the
overlay is dropped, because packets of the overlay arrive on the overlay's devices. If this node
masquerades, a packet with a source in the overlay and any other destination is dropped too. Without
masquerading, pods of other nodes use their own addresses also for packets that leave the overlay.
Nodes that route without encapsulation (DirectRouting) are excepted.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from ....instance import Instance
from ....model import Endpoint, IPAddress, IPNetwork, Mark
from . import iptables
from .nft import FAMILIES, GarbledError, Json, Nft
from .rules import FirewallError

# linux/netfilter_ipv4.h: after NF_IP_PRI_NAT_SRC (100), and NF_IP_PRI_RAW (before conntrack)
OUT = {"type": "filter", "hook": "postrouting", "prio": 150, "policy": "accept"}
IN = {"type": "filter", "hook": "prerouting", "prio": -300, "policy": "accept"}
DROP: Json = {"drop": None}
COUNTER: Json = {"counter": None}
COMPARE_SECONDS = 60.0  # between two comparisons of the sets with the kernel; reading them is slow
TABLE = "mangle"  # of iptables; the only one with both hooks in which packets can be dropped
BASES = {"out": "POSTROUTING", "in": "PREROUTING"}
MULTIPORT_MAX = 15  # ports of one rule: linux/netfilter/xt_multiport.h


@dataclass(frozen=True, slots=True)
class GuardRules:
    """What to guard. Without endpoints there are no rules for outgoing packets; without an
    interface there are no rules for incoming packets.

    mark        the mark of our forwarder's datagrams
    endpoints   of the forwarders of other nodes
    interface   of the underlay
    networks    of the overlay
    direct      subnets of the nodes that route without encapsulation
    masquerade  this node masquerades packets that leave the overlay
    """

    mark: Mark | None = None
    endpoints: frozenset[Endpoint] = frozenset()
    interface: str = ""
    networks: tuple[IPNetwork, ...] = ()
    direct: frozenset[IPNetwork] = frozenset()
    masquerade: bool = False

    def endpoints_of(self, version: int) -> frozenset[tuple[IPAddress, int]]:
        if self.mark is None:
            return frozenset()
        return frozenset((one.address, one.port) for one in self.endpoints
                         if one.address.version == version)

    def networks_of(self, version: int) -> list[IPNetwork]:
        return [one for one in self.networks if one.version == version and self.interface]

    def direct_of(self, version: int) -> frozenset[IPNetwork]:
        if not self.networks_of(version):
            return frozenset()
        return frozenset(one for one in self.direct if one.version == version)


# -- nftables -------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Applied:
    """The last rules that we applied, and nft's output for them without the sets' elements."""

    rules: GuardRules
    structure: list[Json]
    elements: dict[str, frozenset[Any]]
    printed: list[Json] | None
    compared: float = field(default_factory=time.monotonic)


class NftGuard:
    """Our two tables."""

    def __init__(self, instance: Instance, nft: Nft) -> None:
        self._table = instance.guard_table
        self._nft = nft
        self._applied: dict[str, _Applied] = {}

    async def sync(self, family: str, rules: GuardRules) -> bool:
        """Apply the rules of one family. Return True if our table had to be changed.

        If only elements of the sets have changed, only these are sent to the kernel.
        Raises FirewallError.
        """
        applied = self._applied.get(family)
        if applied is not None and applied.rules == rules:  # the usual case
            structure, elements = applied.structure, applied.elements
        else:
            structure, elements = _content(family, self._table, rules)
        if not structure and not (self._nft.is_there if applied is None else applied.structure):
            return False
        there = await self._read(family)
        if applied is not None and applied.structure == structure and applied.printed == there \
                and await self._elements_are_there(family, applied):
            return await self._change_elements(family, applied, rules, elements)
        if structure:
            await self._replace(family, structure, elements)
        elif there is not None:
            await self._run([{"delete": self._named(family)}])
        printed = await self._read(family)
        self._applied[family] = _Applied(rules, structure, elements, printed)
        return there != printed

    async def _change_elements(
        self, family: str, applied: _Applied, rules: GuardRules,
        elements: dict[str, frozenset[Any]],
    ) -> bool:
        steps: list[Json] = []
        for name, wanted in elements.items():
            before = applied.elements[name]
            for step, some in (("delete", before - wanted), ("add", wanted - before)):
                if some:
                    steps.append({step: {"element": {
                        "family": family, "table": self._table, "name": name,
                        "elem": _elements(some)}}})
        if steps:
            try:
                await self._run(steps)
            except FirewallError:
                del self._applied[family]  # the next ``sync`` replaces the table
                raise
        applied.rules, applied.elements = rules, elements
        return bool(steps)

    async def _elements_are_there(self, family: str, applied: _Applied) -> bool:
        """Compare the number of the sets' elements, at most once per COMPARE_SECONDS."""
        if time.monotonic() - applied.compared < COMPARE_SECONDS:
            return True
        applied.compared = time.monotonic()
        items = await self._nft.run("list", "table", family, self._table)
        found = {body["name"]: len(body.get("elem", ())) for item in items
                 if (body := item.get("set")) is not None}
        return all(found.get(name, 0) == len(some) for name, some in applied.elements.items())

    async def _replace(
        self, family: str, structure: list[Json], elements: dict[str, frozenset[Any]]
    ) -> None:
        steps: list[Json] = [{"add": self._named(family)}, {"delete": self._named(family)}]
        for item in structure:
            found = item.get("set")
            if found is not None and elements[found["name"]]:
                filled = {**found, "elem": _elements(elements[found["name"]])}
                steps.append({"add": {"set": filled}})
            else:
                steps.append({"add": item})
        await self._run(steps)

    async def _run(self, steps: list[Json]) -> None:
        await self._nft.run("-f", "-", stdin=json.dumps({"nftables": steps}))

    def _named(self, family: str) -> Json:
        return {"table": {"family": family, "name": self._table}}

    async def _read(self, family: str) -> list[Json] | None:
        """Return our table without handles, counts and the sets' elements; None: there is none."""
        try:
            items = await self._nft.run("-t", "list", "table", family, self._table)
        except GarbledError:
            return []
        except FirewallError as error:
            if os.strerror(errno.ENOENT) in str(error):
                return None
            raise
        return [_without_counts(item) for item in items if "metainfo" not in item]


def _without_counts(item: Json) -> Json:
    (kind, body), = item.items()
    body = {key: value for key, value in body.items() if key not in ("handle", "elem")}
    if "expr" in body:
        body["expr"] = [COUNTER if "counter" in one else one for one in body["expr"]]
    return {kind: body}


def _content(
    family: str, table: str, rules: GuardRules
) -> tuple[list[Json], dict[str, frozenset[Any]]]:
    """Return a family's table, sets, chains and rules as nft's JSON, and the elements of the sets.
    The first is empty if no rules are wanted."""
    version = FAMILIES[family]
    endpoints, subnets = rules.endpoints_of(version), rules.direct_of(version)
    at = {"family": family, "table": table}
    address = "ipv4_addr" if version == 4 else "ipv6_addr"
    found: list[Json] = [{"table": {"family": family, "name": table}}]
    if endpoints:
        assert rules.mark is not None
        found += [
            {"set": {**at, "name": "peers", "type": [address, "inet_service"]}},
            {"chain": {**at, "name": "out", **OUT}},
            {"rule": {**at, "chain": "out", "expr": [
                _is("==", {"meta": {"key": "l4proto"}}, socket.IPPROTO_UDP),
                _is("!=", {"&": [{"meta": {"key": "mark"}}, rules.mark.mask]}, rules.mark.value),
                _is("==", {"concat": [_field(family, "daddr"), _field("th", "dport")]}, "@peers"),
                _is("==", {"fib": {"result": "type", "flags": ["saddr"]}}, "local"),
                COUNTER, DROP,
            ]}},
        ]
    if networks := rules.networks_of(version):
        if subnets:
            found.append({"set": {**at, "name": "direct", "type": address, "flags": ["interval"]}})
        found.append({"chain": {**at, "name": "in", **IN}})
        for network in networks:
            prefix = {"prefix": {"addr": str(network.network_address), "len": network.prefixlen}}
            conditions = [_is("==", {"meta": {"key": "iifname"}}, rules.interface),
                          _is("==", _field(family, "saddr"), prefix)]
            if not rules.masquerade:
                conditions.append(_is("==", _field(family, "daddr"), prefix))
            if subnets:
                conditions.append(_is("!=", _field(family, "saddr"), "@direct"))
            found.append({"rule": {**at, "chain": "in", "expr": [*conditions, COUNTER, DROP]}})
    return found if len(found) > 1 else [], {"peers": endpoints, "direct": subnets}


def _is(op: str, left: Json, right: Any) -> Json:
    return {"match": {"op": op, "left": left, "right": right}}


def _field(protocol: str, name: str) -> Json:
    return {"payload": {"protocol": protocol, "field": name}}


def _elements(some: Iterable[Any]) -> list[Json]:
    """Return elements of the set ``peers`` (address and port) or ``direct`` (a prefix)."""
    return [
        {"concat": [str(one[0]), one[1]]} if isinstance(one, tuple)
        else {"prefix": {"addr": str(one.network_address), "len": one.prefixlen}}
        for one in some
    ]


# -- iptables -------------------------------------------------------------------------------------


async def sync_iptables(
    tables: iptables.Tables, instance: Instance, rules: GuardRules
) -> bool:
    """Apply the rules with iptables. Return True if they had to be changed. Raises FirewallError.
    """
    listing = await tables.read(TABLE)
    lines: list[str] = []
    for way, base in BASES.items():
        own = instance.guard_chain(way)
        wanted = list(_out(tables.version, rules) if way == "out" else _in(tables.version, rules))
        jumps = listing.count_jumps(base, own)
        right = jumps == 1 and [*listing.rules.get(own, ())] == wanted if wanted else \
            not jumps and own not in listing.rules
        if not right:
            lines += iptables.change(listing, base, own, wanted, 0)
    await tables.apply(TABLE, lines)
    return bool(lines)


def _out(version: int, rules: GuardRules) -> Iterator[str]:
    endpoints = sorted(rules.endpoints_of(version), key=str)
    if not endpoints:
        return
    yield "! -p udp -j RETURN"
    yield f"-m mark --mark {rules.mark} -j RETURN"
    ports = sorted({port for _, port in endpoints})
    if len(ports) <= MULTIPORT_MAX:  # other packets then pass without the rules for each peer
        yield f"-p udp -m multiport ! --dports {','.join(map(str, ports))} -j RETURN"
    for address in dict.fromkeys(address for address, _ in endpoints):
        yield f"-s {address}/{address.max_prefixlen} -j RETURN"
    for address, port in endpoints:
        yield f"-d {address}/{address.max_prefixlen} -p udp -m udp --dport {port} -j DROP"


def _in(version: int, rules: GuardRules) -> Iterator[str]:
    for subnet in sorted(rules.direct_of(version), key=str):
        yield f"-s {subnet} -j RETURN"
    for network in rules.networks_of(version):
        # Each rule names the interface, so that ``verdict`` can tell that it does not concern pods.
        to = "" if rules.masquerade else f" -d {network}"
        yield f"-s {network}{to} -i {rules.interface} -j DROP"
