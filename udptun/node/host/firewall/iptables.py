"""iptables: our chains, and the rules of other programs in the same tables.

Owns: the instance's chains, by default UDPTUN-FORWARD in the table filter and UDPTUN-POSTRTG in the
table nat, and the rules that jump to them. Changes no other rule. Does not decide which rules are
needed: ``keeper`` does. Asyncio, one loop.

iptables exists in two variants, which have separate tables in the kernel: "nft" and "legacy". A
host can have rules in both, and a packet has to pass both. Reading a legacy table creates the
table, so a legacy table is read only if the kernel already has it.
"""

from __future__ import annotations

import ipaddress
import shlex
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

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
    leaves_through,
    negated,
    source_in,
    to_udp_port,
    unknown,
)

PACKAGE = "iptables"
VARIANTS = ("nft", "legacy")
WAIT_S = "5"  # for the lock of the legacy variant, which other programs may hold
FORWARD, POSTROUTING = "FORWARD", "POSTROUTING"
INPUT, OUTPUT = "INPUT", "OUTPUT"
TABLE_OF = {FORWARD: "filter", POSTROUTING: "nat"}

_ACTIONS = {"ACCEPT": Action.ACCEPT, "DROP": Action.DROP, "REJECT": Action.DROP,
            "RETURN": Action.RETURN}


@dataclass(frozen=True, slots=True)
class Listing:
    """One table, as iptables-save prints it.

    policies  by base chain
    rules     by chain: the rules in order, without ``-A CHAIN``
    """

    policies: Mapping[str, str]
    rules: Mapping[str, Sequence[str]]

    @classmethod
    def parse(cls, text: str) -> Listing:
        policies: dict[str, str] = {}
        rules: dict[str, list[str]] = {}
        for line in text.splitlines():
            if line.startswith(":"):
                name, policy, *_ = line[1:].split()
                rules[name] = []
                if policy != "-":
                    policies[name] = policy.lower()
            elif line.startswith("-A "):
                _, name, rule = (*line.split(" ", 2), "")[:3]
                rules.setdefault(name, []).append(rule)
        return cls(policies, rules)

    def count_jumps(self, base: str, own: str) -> int:
        return [*self.rules.get(base, ())].count(f"-j {own}")

    def chains(self) -> dict[str, Chain]:
        """Return the chains, so that ``verdict`` can evaluate them.

        Takes about 20 ms for each thousand rules.
        """
        return {name: Chain([_rule(text, self.rules) for text in rules],
                            self.policies.get(name, ""))
                for name, rules in self.rules.items()}


class Tables:
    """The tables of one variant for one IP version.

    name  of the variant, for messages
    """

    def __init__(self, version: int, variant: str, command: str) -> None:
        self.version = version
        self.variant = variant
        self.name = f"{'iptables' if version == 4 else 'ip6tables'} ({variant})"
        self._command = command

    async def read(self, table: str) -> Listing:
        """Raises FirewallError."""
        return Listing.parse(await run_tool((f"{self._command}-save", "-t", table), PACKAGE))

    async def apply(self, table: str, lines: Sequence[str]) -> None:
        """Apply lines of iptables-restore's language in one transaction. Raises FirewallError."""
        if lines:
            text = "\n".join((f"*{table}", *lines, "COMMIT", ""))
            # The nft variant needs no lock, and ignores the option.
            await run_tool((f"{self._command}-restore", "-w", WAIT_S, "--noflush"), PACKAGE, text)


async def find(version: int, variant: str) -> Tables | None:
    """Return the tables of a variant, or None if its programs are not installed."""
    plain = "iptables" if version == 4 else "ip6tables"
    if shutil.which(f"{plain}-{variant}-save"):
        return Tables(version, variant, f"{plain}-{variant}")
    if shutil.which(f"{plain}-save") and await _variant_of(plain) == variant:
        return Tables(version, variant, plain)
    return None


async def is_default(tables: Tables) -> bool:
    """Return whether the host's command iptables uses these tables."""
    plain = "iptables" if tables.version == 4 else "ip6tables"
    return tables.variant == await _variant_of(plain)


async def _variant_of(command: str) -> str:
    try:
        text = await run_tool((command, "--version"), PACKAGE)
    except FirewallError:
        return ""
    return "nft" if "nf_tables" in text else "legacy"  # before 1.8 there was only this one


def legacy_tables(version: int) -> frozenset[str]:
    """Return the names of the legacy tables that the kernel has. Blocks for a short time."""
    name = "ip_tables_names" if version == 4 else "ip6_tables_names"
    try:
        return frozenset(Path(f"/proc/thread-self/net/{name}").read_text().split())
    except OSError:  # a kernel without the legacy tables
        return frozenset()


# -- our rules ------------------------------------------------------------------------------------


def own_rules(base: str, version: int, want: FirewallRules) -> list[str]:
    """Return the rules of our chain for a base chain, as iptables-save prints them."""
    network, subnet = want.of(version)
    if network is None:
        return []
    if base == FORWARD:
        return [f"-s {network} -j ACCEPT", f"-d {network} -j ACCEPT"] if want.forward else []
    if not want.masquerade or subnet is None:
        return []
    # flannel's rules, in flannel's order; ``nft`` explains their purpose
    mark = f"{KUBE_PROXY_MARK:#x}/{KUBE_PROXY_MARK:#x}"
    return [
        f"-m mark --mark {mark} -j RETURN",
        f"-s {subnet} -d {network} -j RETURN",
        f"-s {network} -d {subnet} -j RETURN",
        f"! -s {network} -d {subnet} -j RETURN",
        f"-s {network} ! -d {MULTICAST[version]} -j MASQUERADE --random-fully",
        f"! -s {network} -d {network} -j MASQUERADE --random-fully",
    ]


def change(
    there: Listing, base: str, own: str, rules: Sequence[str], at: int | None
) -> list[str]:
    """Return the lines that give our chain these rules and make the base chain jump to it once.

    base   the base chain
    own    the name of our chain
    rules  our chain's rules; empty: remove our chain
    at     the index in the base chain, without our jumps, where the jump is inserted; None: the end
    """
    jump = f"-j {own}"
    lines = [f"-D {base} {jump}" for rule in there.rules.get(base, ()) if rule == jump]
    if not rules:
        if own in there.rules:
            lines = [f":{own} - [0:0]", *lines, f"-X {own}"]  # the first line empties our chain
        return lines
    position = "" if at is None else f" {at + 1}"
    return [
        f":{own} - [0:0]",
        *lines,
        *(f"-A {own} {rule}" for rule in rules),
        f"-A {base} {jump}" if at is None else f"-I {base}{position} {jump}",
    ]


# -- the rules of others --------------------------------------------------------------------------


def _rule(text: str, chains: Mapping[str, object]) -> Rule:
    try:
        words = iter(shlex.split(text))
        conditions, target, goto = _parse(words)
    except (ValueError, StopIteration):
        return Rule((unknown,), Action.NEXT)
    if target in chains:
        return Rule(conditions, Action.GOTO if goto else Action.JUMP, target, text)
    return Rule(conditions, _ACTIONS.get(target, Action.NEXT), text=text)


def _parse(words: Iterator[str]) -> tuple[tuple[Condition, ...], str, bool]:
    """Return the conditions, the target, and whether the target is reached by -g."""
    conditions: list[Condition] = []
    inverse = False
    for word in words:
        if word == "!":
            inverse = True
            continue
        if word in ("-j", "-g"):
            return tuple(conditions), next(words), word == "-g"
        if word == "-m":
            next(words)  # skip the match's name; its options follow and have the conditions
            continue
        if word == "--comment":
            next(words)
            continue
        condition = _condition(word, words)
        conditions.append(negated(condition) if inverse else condition)
        inverse = False
    return tuple(conditions), "", False


_CONDITIONS: Mapping[str, Callable[[str], Condition]] = {
    "-s": lambda text: source_in(_network(text)),
    "-d": lambda text: destination_in(_network(text)),
    "-i": lambda text: arrives_through(text, "+"),
    "-o": lambda text: leaves_through(text, "+"),
    "-p": is_protocol,
    "--dport": lambda text: _ports(text),  # noqa: PLW0108 - it is defined below
    "--dports": lambda text: any_of([_ports(part) for part in text.split(",")]),
    "--ctstate": lambda text: has_state(text.split(",")),
    "--state": lambda text: has_state(text.split(",")),
}


def _condition(option: str, words: Iterator[str]) -> Condition:
    if option in _CONDITIONS:
        return _CONDITIONS[option](next(words))
    # The value of an unknown option is read as another unknown option, which changes nothing.
    return unknown


def _ports(text: str) -> Condition:
    first, _, last = text.partition(":")
    return to_udp_port(int(first), int(last or first))


def _network(text: str) -> IPNetwork:
    return ipaddress.ip_network(text, strict=False)
