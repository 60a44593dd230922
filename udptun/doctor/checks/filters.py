"""Checks of the packet filters: what others drop, and the table of connections."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

from ...errors import FieldError
from ...model import IPNetwork
from ..check import Finding, Skip, check, failed, ok, warning
from ..facts import Facts


def drops(facts: Facts) -> Iterator[Finding]:
    """Read the rules of other programs, as the daemon does."""
    from ...node.host.firewall.keeper import find_drops
    from ...node.host.firewall.rules import FirewallRules
    from ...node.host.firewall.verdict import datagrams

    if not facts.is_root:
        raise Skip("the rules of the firewall can only be read by root")
    if not facts.networks:
        raise Skip("the overlay's networks are not known")
    subnets = () if facts.known is None or facts.known.lease is None else facts.known.lease.subnets
    by_version: dict[int, tuple[IPNetwork | None, IPNetwork | None]] = {
        version: (
            next((one for one in facts.networks if one.version == version), None),
            next((one for one in subnets if one.version == version), None))
        for version in (4, 6)}
    want = FirewallRules(*by_version[4], *by_version[6], forward=True,  # type: ignore[arg-type]
                         devices=frozenset(facts.devices))
    link = facts.underlay
    flows = [] if link is None else [
        flow for one in facts.listen
        for flow in datagrams(one.address, link.name, one.port, "established")]
    yield from _own_rules(facts)
    found = asyncio.run(find_drops(want, flows, facts.instance))
    for one in found:
        yield (failed if one.cuts else warning)(one.text, remedy=one.remedy)
    if not found:
        yield ok("no rule drops packets of the overlay or of the tunnel")


def _own_rules(facts: Facts) -> Iterator[Finding]:
    """subnet.env tells whether the daemon masquerades: then its rules must be there."""
    try:
        env = facts.subnet_env
    except (FieldError, OSError):
        return
    if not env.ip_masq:
        return
    from ...node.host.leftovers import chain_names

    names, instance = asyncio.run(chain_names()), facts.instance
    for version in sorted({subnet.version for subnet in env.subnets}):
        table, chain = instance.nft_table(version), instance.iptables_chain("POSTROUTING")
        if table not in names and chain not in names:
            yield failed(f"the rules that masquerade packets of pods are gone (IPv{version})",
                         f"neither the nftables table {table} nor the chain {chain} exists",
                         "start the node daemon: it restores them")


@check("conntrack", "whether the kernel's table of connections is nearly full", "node.md#health")
def conntrack(facts: Facts) -> Iterator[Finding]:
    from ...node.host.conntrack import LIMIT, REMEDY, shortage

    why = shortage()
    if why:
        yield failed(why, remedy=REMEDY)
        return
    if not LIMIT.exists():
        raise Skip("this kernel tracks no connections")
    yield ok("the table has room")


CHECKS = (conntrack,)
