"""nftables: our tables, and other programs' rules at the hooks that our packets pass.

Owns: the instance's two tables, by default ``ip udptun-ipv4`` and ``ip6 udptun-ipv6``. Does not
change other rules of the host. Does not depend on leases or interfaces. Asyncio, one loop.

Each ``sync`` reads one of our tables from the kernel. If the table differs from the wanted rules,
``sync`` replaces the table in one transaction. An accept in our table does not override a drop in
another table: a packet that the host's own rules drop is still dropped. ``others`` returns the
chains of the other tables.
"""

from __future__ import annotations

import errno
import ipaddress
import json
import os
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from ....instance import Instance
from ....model import IPNetwork
from .rules import KUBE_PROXY_MARK, MULTICAST, FirewallError, FirewallRules, run_tool
from .verdict import (
    Action,
    Chain,
    Condition,
    Rule,
    any_of,
    arrives_through,
    destination_in,
    has_state,
    is_protocol,
    is_version,
    leaves_through,
    negated,
    never,
    source_in,
    to_udp_port,
    unknown,
)

Json = dict[str, Any]

FAMILIES = {"ip": 4, "ip6": 6}  # nft's name of each IP version
# linux/netfilter_ipv4.h: NF_IP_PRI_NAT_SRC, NF_IP_PRI_FILTER
POSTROUTING = {"type": "nat", "hook": "postrouting", "prio": 100, "policy": "accept"}
FORWARD = {"type": "filter", "hook": "forward", "prio": 0, "policy": "accept"}
PACKAGE = "nftables"
# The hooks that packets pass, in their order.
FORWARDED = ("prerouting", "forward", "postrouting")
RECEIVED, SENT = ("prerouting", "input"), ("output", "postrouting")
_HOOKS = ("prerouting", "input", "forward", "output", "postrouting")

ACCEPT: Json = {"accept": None}
RETURN: Json = {"return": None}
MASQUERADE: Json = {"masquerade": {"flags": "fully-random"}}


class GarbledError(FirewallError):
    """The output of nft cannot be parsed."""


@dataclass(frozen=True, slots=True)
class OtherTable:
    """A table of another program.

    versions  the IP versions whose packets pass the chains
    bases     the names and hooks of the filtering base chains, in the order of the hooks
    """

    name: str
    versions: Collection[int]
    bases: tuple[tuple[str, str], ...]

    def at(self, hooks: Collection[str]) -> list[str]:
        """Return the names of the base chains at these hooks."""
        return [name for name, hook in self.bases if hook in hooks]


class Nft:
    """Reads and writes tables by the program nft."""

    def __init__(self, instance: Instance, program: str) -> None:
        self._tables = {
            family: instance.nft_table(version) for family, version in FAMILIES.items()
        }
        self._guard_table = instance.guard_table  # of ``guard``
        self._nft = program
        # By family: the rules that we applied last, and nft's output for these rules. Another
        # release of nft may print the same rules in another form. If the output has not changed
        # since then, ``sync`` does not replace the table.
        self._applied: dict[str, tuple[list[Json] | None, list[Json] | None]] = {}

    @property
    def is_there(self) -> bool:
        """Whether the program is installed."""
        return shutil.which(self._nft) is not None

    async def sync(self, family: str, rules: FirewallRules) -> bool:
        """Apply the rules of one family. Return True if our table had to be changed.

        Raises FirewallError.
        """
        want = list(_content(family, self._tables[family], rules)) or None
        if want is None and not self.is_there:
            return False  # no rules are wanted; without nft, udptun cannot have created rules
        try:
            there = await self._read(family)
        except GarbledError:  # nft 1.0.6 prints this for a table with flags; our table has none
            there = []
        if there == want or self._applied.get(family) == (want, there):
            return False
        table = {"table": {"family": family, "name": self._tables[family]}}
        # The first "add" creates the table if there is none. So the "delete" always succeeds.
        steps: list[Json] = [{"add": table}, {"delete": table}]
        steps += [{"add": item} for item in want or ()]
        await self.run("-f", "-", stdin=json.dumps({"nftables": steps}))
        self._applied[family] = (want, await self._read(family))
        return True

    async def _read(self, family: str) -> list[Json] | None:
        """Return our table, its chains and its rules, without handles.

        Return None if the table does not exist.
        """
        try:
            items = await self.run("list", "table", family, self._tables[family])
        except FirewallError as error:
            if os.strerror(errno.ENOENT) in str(error):
                return None
            raise
        return [
            {kind: {key: value for key, value in body.items() if key != "handle"}}
            for item in items for kind, body in item.items() if kind != "metainfo"
        ]

    async def run(self, *arguments: str, stdin: str = "") -> list[Json]:
        """Run nft and return its output. Raises FirewallError."""
        command = (self._nft, "-j", *arguments)
        output = await run_tool(command, PACKAGE, stdin)
        try:
            answer: list[Json] = json.loads(output)["nftables"] if output else []
        except (ValueError, KeyError, TypeError):
            raise GarbledError(f"{' '.join(command)}: its output is not the expected JSON") \
                from None
        return answer

    # -- the tables of others ---------------------------------------------------------------------

    async def others(self) -> list[OtherTable]:
        """Return all tables except ours. Raises FirewallError."""
        bases: dict[tuple[str, str], list[Json]] = {}
        for item in await self.run("list", "chains"):
            chain = item.get("chain", {})
            found = bases.setdefault((chain.get("family", ""), chain.get("table", "")), [])
            if chain.get("hook") in _HOOKS and chain.get("type") == "filter":
                found.append(chain)
        tables = []
        for (family, table), chains in bases.items():
            if family not in (*FAMILIES, "inet") or table in (
                    self._tables.get(family), self._guard_table):
                continue
            chains.sort(key=lambda chain: (_HOOKS.index(chain["hook"]), chain["prio"]))
            tables.append(OtherTable(
                f"{family} {table}", (FAMILIES[family],) if family in FAMILIES else (4, 6),
                tuple((chain["name"], chain["hook"]) for chain in chains),
            ))
        return tables

    async def chains(self, name: str) -> Mapping[str, Chain] | None:
        """Return the chains of another program's table.

        Return None if nft cannot print the table. Raises FirewallError.
        """
        try:
            items = await self.run("-t", "list", "table", *name.split())  # -t: no sets
        except GarbledError:
            return None
        except FirewallError as error:
            if os.strerror(errno.ENOENT) in str(error):
                return {}  # the table was removed in the meantime
            raise
        rules: dict[str, list[Rule]] = {}
        policies: dict[str, str] = {}
        for item in items:
            if chain := item.get("chain"):
                rules.setdefault(chain["name"], [])
                policies[chain["name"]] = chain.get("policy", "")
            elif rule := item.get("rule"):
                rules.setdefault(rule["chain"], []).extend(_parsed(rule.get("expr", ())))
        return {name: Chain(content, policies.get(name, "")) for name, content in rules.items()}


def _content(family: str, table: str, want: FirewallRules) -> Iterator[Json]:
    """Yield a family's table, its chains and its rules as nft's JSON.

    Yield nothing if no rules are wanted.
    """
    network, subnet = want.of(FAMILIES[family])
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
        [source("==", network), destination("!=", MULTICAST[FAMILIES[family]]), MASQUERADE],
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


# -- the rules of others --------------------------------------------------------------------------

_VERDICTS = {"accept": Action.ACCEPT, "drop": Action.DROP, "reject": Action.DROP,
             "return": Action.RETURN, "jump": Action.JUMP, "goto": Action.GOTO}
_NO_CONDITION = ("counter", "log", "mangle", "notrack", "comment", "meter", "flow", "ct helper")


def _parsed(expressions: Iterable[Json]) -> Iterator[Rule]:
    """Yield the rule. A rule with a verdict map becomes several rules, one for each verdict."""
    conditions: list[Condition] = []
    for expression in expressions:
        kind, body = next(iter(expression.items()))
        if kind in _VERDICTS:
            yield _with_verdict(conditions, expression)
        elif kind == "vmap":
            elements = body["data"]["set"] if isinstance(body["data"], dict) else ()
            for element in elements:
                key, verdict = element[-2:]
                yield _with_verdict([*conditions, _compared(body["key"], key)], verdict)
        elif kind == "match":
            compared = _compared(body["left"], body["right"])
            conditions.append(negated(compared) if body["op"] == "!=" else
                              compared if body["op"] in ("==", "in") else unknown)
        elif kind not in _NO_CONDITION:
            conditions.append(unknown)


def _with_verdict(conditions: Iterable[Condition], verdict: Json) -> Rule:
    kind, body = next(iter(verdict.items()))
    target = body["target"] if kind in ("jump", "goto") else ""
    return Rule(tuple(conditions), _VERDICTS.get(kind, Action.NEXT), target, kind)


def _compared(left: Any, right: Any) -> Condition:
    """Return the condition that a part of the packet equals ``right``, or is in ``right``."""
    values = right if isinstance(right, list) else \
        right["set"] if isinstance(right, dict) and "set" in right else [right]
    condition_of: Callable[[Any], Condition] = _unknown
    match next(iter(left.items())) if isinstance(left, dict) else ("", None):
        case ("ct", {"key": "state"}):
            return has_state(map(str, values))
        case ("ct", {"key": "status"}):
            condition_of = _has_status
        case ("meta", {"key": "iifname" | "iif"}):
            condition_of = _arrives_through
        case ("meta", {"key": "oifname" | "oif"}):
            condition_of = _leaves_through
        case ("meta", {"key": "l4proto"}) | \
                ("payload", {"protocol": "ip", "field": "protocol"}) | \
                ("payload", {"protocol": "ip6", "field": "nexthdr"}):
            condition_of = _is_protocol
        case ("payload", {"protocol": "udp" | "th", "field": "dport"}):
            condition_of = _to_port
        case ("payload", {"protocol": "tcp" | "icmp" | "icmpv6"}):
            condition_of = _is_no_udp
        case ("meta", {"key": "nfproto"}):
            condition_of = _is_version
        case ("payload", {"protocol": "ip" | "ip6", "field": "saddr"}):
            condition_of = partial(_in_network, source_in)
        case ("payload", {"protocol": "ip" | "ip6", "field": "daddr"}):
            condition_of = partial(_in_network, destination_in)
    return any_of([condition_of(value) for value in values])


def _unknown(_: Any) -> Condition:
    return unknown


def _has_status(value: Any) -> Condition:
    """The packets of a flow are new, and have no address translation."""
    return never if value in ("dnat", "snat", "assured", "confirmed") else unknown


def _arrives_through(value: Any) -> Condition:
    return arrives_through(str(value), "*")


def _leaves_through(value: Any) -> Condition:
    return leaves_through(str(value), "*")


def _is_version(value: Any) -> Condition:
    return is_version(6 if value == "ipv6" else 4)


def _is_protocol(value: Any) -> Condition:
    return is_protocol(str(value))


def _is_no_udp(_: Any) -> Condition:
    return is_protocol("tcp")


def _to_port(value: Any) -> Condition:
    """Return the condition for a port or a range; names and named sets are unknown."""
    first, last = value["range"] if isinstance(value, dict) and "range" in value else (value, value)
    return to_udp_port(first, last) if isinstance(first, int) else unknown


def _in_network(where: Callable[[IPNetwork], Condition], value: Any) -> Condition:
    """Return the condition for an address or a prefix; ranges and named sets are unknown."""
    if isinstance(value, dict) and "prefix" in value:
        value = f"{value['prefix']['addr']}/{value['prefix']['len']}"
    try:
        return where(ipaddress.ip_network(value, strict=False))
    except (ValueError, TypeError):
        return unknown
