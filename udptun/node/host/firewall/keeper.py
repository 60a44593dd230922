"""Keeps our rules active, and finds other programs' rules that drop packets of the overlay.

Owns: which tool applies which rules (``--firewall``), the repetition, and the list of drops. Does
not depend on leases or interfaces. Asyncio, one loop per object.

- nftables: all rules are in our own nftables tables. Nothing else is changed.
- iptables: all rules are in our own iptables chains, like flannel's rules.
- auto: the same as nftables, and accept rules in the chain FORWARD of each variant of iptables
  whose rules drop our packets: an accept in our own table does not override that drop. The accept
  rules are removed when they are not needed any more. Without nft, auto is the same as iptables.

The jump to our chain is inserted directly before the rule that drops our packets. So rules of a
network policy before that rule stay effective.

The rules of other programs are read. Whether packets pass is not measured. A rule that udptun
cannot evaluate (see ``verdict``) makes a finding uncertain. XDP, tc and eBPF programs are not
found.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import replace

from ....instance import Instance
from ....model import IPNetwork
from ....wait import wait_at_most
from ...status.report import FirewallDrop
from . import iptables
from .guard import TABLE, GuardRules, NftGuard, sync_iptables
from .nft import FAMILIES, FORWARDED, RECEIVED, SENT, Nft, OtherTable
from .rules import FirewallError, FirewallRules
from .verdict import Chain, Drop, Flow, drop_of

log = logging.getLogger(__name__)

DEFAULT = Instance()
Variant = tuple[int, str]  # IP version and variant of iptables
SHARE = 20  # at most 1/20 of the time is used to read rules


class Firewall:
    """Keeps the host's rules equal to ``want``.

    want     the wanted rules; can be set at any time
    tunnel   the tunnel's own datagrams, which the rules of others may drop; the same
    mode     one of ``config.FIREWALLS``; can be set at any time
    guard    returns the wanted rules of ``guard``; None: leave those that are there. Set it before
             the first ``sync``
    error    the reason why the last ``sync`` failed, as a sentence; "" if ``sync`` succeeded
    dropped  what other programs' rules drop since the last ``sync``
    """

    def __init__(
        self, want: FirewallRules, instance: Instance = DEFAULT, *, mode: str = "auto",
        nft: str = "nft",
    ) -> None:
        self.want = want
        self.tunnel: tuple[Flow, ...] = ()
        self.mode = mode
        self.guard: Callable[[], GuardRules | None] = lambda: None
        self.error = ""
        self.dropped: tuple[FirewallDrop, ...] = ()
        self._instance = instance
        self._nft = Nft(instance, nft)
        self._nft_guard = NftGuard(instance, self._nft)
        self._again = asyncio.Event()
        self._lock = asyncio.Lock()  # one ``sync`` at a time
        # The variants without rules of ours in their table nat, if we do not want such rules.
        self._nat_done: set[Variant] = set()
        self._guard_done: set[Variant] = set()  # the same for the table mangle

    async def sync(self) -> bool:
        """Apply the wanted rules. Return True if a table had to be changed.

        Raises FirewallError, but only after it has tried everything.
        """
        async with self._lock:
            attempt = _Attempt(
                self.want, self.tunnel, self._effective_mode(), self._instance, self._nft,
                self._nat_done, self._nft_guard, self.guard(), self._guard_done)
            await attempt.run()
            self._record(attempt.dropped)
            self.error = "; ".join(attempt.failed)
            if attempt.changed and self.want != FirewallRules():
                log.info("firewall rules applied")
        if self.error:
            raise FirewallError(self.error)
        return attempt.changed

    def sync_soon(self) -> None:
        """Let ``keep`` call ``sync`` soon."""
        self._again.set()

    async def keep(self, every_s: float) -> None:
        """Call ``sync`` now, every ``every_s`` seconds and after ``sync_soon``, until cancelled.

        An error that occurs several times in succession is logged once.
        """
        failed = ""
        while True:
            started = time.monotonic()
            self._again.clear()
            try:
                await self.sync()
                failed = ""
            except FirewallError as error:
                if str(error) != failed:
                    log.error("firewall rules are not active: %s", error)
                failed = str(error)
            pause = SHARE * (time.monotonic() - started)
            await asyncio.sleep(pause)
            await wait_at_most(self._again, max(0.0, every_s - pause))

    async def remove(self) -> bool:
        """Remove our rules. Return True if there were any. Raises FirewallError."""
        self.want = FirewallRules()
        self.guard = GuardRules
        return await self.sync()

    def _effective_mode(self) -> str:
        """Return the mode; without nft, auto is iptables."""
        if self.mode == "auto" and not self._nft.is_there:
            return "iptables"
        return self.mode

    def _record(self, found: Mapping[str, FirewallDrop]) -> None:
        before = {one.text: one for one in self.dropped}
        for text, one in found.items():
            if text not in before:
                log.warning("%s; %s", text, one.remedy)
        for text in before.keys() - found.keys():
            log.info("no longer: %s", text)
        self.dropped = tuple(
            replace(one, since=before[text].since if text in before else one.since)
            for text, one in found.items()
        )


async def find_drops(
    want: FirewallRules, tunnel: Iterable[Flow], instance: Instance = DEFAULT, nft: str = "nft"
) -> list[FirewallDrop]:
    """Return what other programs' rules drop. Change nothing; for use without a daemon.

    want    the rules of ours that the daemon would apply
    tunnel  the tunnel's own datagrams
    Raises FirewallError.
    """
    programs = Nft(instance, nft)
    attempt = _Attempt(want, tunnel, "auto", instance, programs, set(),
                       NftGuard(instance, programs), None, set())
    await attempt.look()
    return [*attempt.dropped.values()]


class _Attempt:
    """One pass over all tables.

    failed   an ordered set of errors: both families may fail for the same reason
    dropped  by its text
    """

    def __init__(
        self, want: FirewallRules, tunnel: Iterable[Flow], mode: str, instance: Instance, nft: Nft,
        nat_done: set[Variant], nft_guard: NftGuard, guard: GuardRules | None,
        guard_done: set[Variant],
    ) -> None:
        self.changed = False
        self.failed: dict[str, None] = {}
        self.dropped: dict[str, FirewallDrop] = {}
        self._want = want
        self._tunnel = tuple(tunnel)
        self._mode = mode
        self._instance = instance
        self._nft = nft
        self._nat_done = nat_done
        self._nft_guard = nft_guard
        self._guard = guard
        self._guard_done = guard_done

    async def run(self) -> None:
        ours = FirewallRules() if self._mode == "iptables" else self._want
        for family in FAMILIES:
            with self._recorded():
                self.changed |= await self._nft.sync(family, ours)
        await self._sync_nft_guard()
        tables: list[OtherTable] = []
        if self._nft.is_there:
            with self._recorded():
                tables = await self._nft.others()
        names = {table.name for table in tables}
        for family, version in FAMILIES.items():
            for variant in iptables.VARIANTS:
                with self._recorded():
                    if await self._sync_variant(version, variant, names) and variant == "nft":
                        names.discard(f"{family} filter")
        for table in tables:
            if table.name in names and table.bases:
                with self._recorded():
                    self._judge_table(table, await self._nft.chains(table.name))

    @contextlib.contextmanager
    def _recorded(self) -> Iterator[None]:
        try:
            yield
        except FirewallError as error:
            self.failed[str(error)] = None

    async def _sync_nft_guard(self) -> None:
        if self._guard is None:
            return
        ours = GuardRules() if self._mode == "iptables" else self._guard
        for family in FAMILIES:
            with self._recorded():
                self.changed |= await self._nft_guard.sync(family, ours)

    # -- iptables ---------------------------------------------------------------------------------

    async def _sync_guard(
        self, tables: iptables.Tables, is_default: bool, variant: Variant, is_there: bool
    ) -> None:
        """Guard with iptables. If this is not wanted, remove the rules of an earlier daemon once.
        """
        if self._guard is None or (
                not is_default and (variant in self._guard_done or not is_there)):
            return
        ours = self._guard if is_default else GuardRules()
        self.changed |= await sync_iptables(tables, self._instance, ours)
        if is_default:
            self._guard_done.discard(variant)
        else:
            self._guard_done.add(variant)

    async def _sync_variant(self, version: int, variant: str, nft_tables: Collection[str]) -> bool:
        """Return True if the chain FORWARD of this variant was read and judged."""
        tables = await iptables.find(version, variant)
        if tables is None:
            return False
        is_default = self._mode == "iptables" and self._want != FirewallRules() \
            and await iptables.is_default(tables)
        if variant == "legacy":
            there: Collection[str] = iptables.legacy_tables(version)
        elif self._nft.is_there:
            family = "ip" if version == 4 else "ip6"
            there = {name.removeprefix(f"{family} ") for name in nft_tables}
        else:  # nft is not installed, so the tables are not known
            there = iptables.TABLE_OF.values()
        await self._sync_nat(tables, is_default, (version, variant), "nat" in there)
        await self._sync_guard(tables, is_default, (version, variant), TABLE in there)
        return (is_default or "filter" in there) and await self._sync_forward(tables, is_default)

    async def _sync_nat(
        self, tables: iptables.Tables, is_default: bool, variant: Variant, is_there: bool
    ) -> None:
        """Masquerade with iptables. If this is not wanted, remove the rules of an earlier daemon
        once."""
        if not is_default and (variant in self._nat_done or not is_there):
            return
        rules = iptables.own_rules(iptables.POSTROUTING, tables.version, self._want) \
            if is_default else []
        listing = await tables.read("nat")
        await self._change(tables, listing, iptables.POSTROUTING, rules, None, listing.count_jumps(
            iptables.POSTROUTING, self._instance.iptables_chain(iptables.POSTROUTING)) == 1)
        if is_default:
            self._nat_done.discard(variant)
        else:
            self._nat_done.add(variant)

    async def _sync_forward(self, tables: iptables.Tables, is_default: bool) -> bool:
        base, own = iptables.FORWARD, self._instance.iptables_chain(iptables.FORWARD)
        listing = await tables.read("filter")
        if base not in listing.policies:
            return False
        flows = self._flows(tables.version)
        # In a thread, because a host can have thousands of rules.
        chains = await asyncio.to_thread(listing.chains)
        others = [rule for rule in chains[base].rules if rule.target != own]
        drops = _drops({**chains, base: Chain(others, chains[base].policy)}, flows)
        lift = self._mode != "nftables" and (is_default or bool(drops))
        rules = iptables.own_rules(base, tables.version, self._want) if lift else []
        at = min((drop.at for drop in drops.values() if drop.at is not None), default=None)
        in_place = listing.count_jumps(base, own) == 1 and \
            not _drops(chains, flows)
        if await self._change(tables, listing, base, rules, at, in_place):
            chains = (await tables.read("filter")).chains()
        self._judge_variant(tables, chains, flows)
        return True

    async def _change(
        self, tables: iptables.Tables, listing: iptables.Listing, base: str, rules: list[str],
        at: int | None, in_place: bool,
    ) -> bool:
        own = self._instance.iptables_chain(base)
        if rules:
            right = in_place and [*listing.rules.get(own, ())] == rules
        else:
            right = own not in listing.rules and not listing.count_jumps(base, own)
        if not right:
            lines = iptables.change(listing, base, own, rules, at)
            await tables.apply(iptables.TABLE_OF[base], lines)
            self.changed = True
        return not right

    # -- findings ---------------------------------------------------------------------------------

    async def look(self) -> None:
        """Find the drops, and change nothing."""
        tables = await self._nft.others() if self._nft.is_there else []
        names = {table.name for table in tables}
        for family, version in FAMILIES.items():
            for variant in iptables.VARIANTS:
                is_there = "filter" in iptables.legacy_tables(version) if variant == "legacy" \
                    else f"{family} filter" in names
                found = await iptables.find(version, variant) if is_there else None
                if found is None:
                    continue
                chains = (await found.read("filter")).chains()
                if iptables.FORWARD in chains:
                    self._judge_variant(found, chains, self._flows(version))
                    if variant == "nft":
                        names.discard(f"{family} filter")
        for table in tables:
            if table.name in names and table.bases:
                self._judge_table(table, await self._nft.chains(table.name))

    def _judge_variant(
        self, tables: iptables.Tables, chains: Mapping[str, Chain], flows: Iterable[Flow]
    ) -> None:
        for flow, drop in _drops(chains, flows).items():
            remedy = "--firewall auto inserts accept rules there" if self._mode == "nftables" \
                else "an accept rule is needed there"
            self._report(flow, drop, f"{tables.name}, table filter", remedy)
        for flow in self._datagrams(tables.version):
            base = iptables.INPUT if flow.arrives else iptables.OUTPUT
            if base in chains and (found := drop_of(chains, base, flow)) is not None:
                self._report(flow, found, f"{tables.name}, table filter", _remedy_for(flow))

    def _judge_table(self, table: OtherTable, chains: Mapping[str, Chain] | None) -> None:
        for version in table.versions:
            network, _ = self._want.of(version)
            for flow in self._flows(version):
                if chains is not None:
                    self._judge_hooks(
                        table, chains, FORWARDED, flow, _remedy(table.name, network))
                elif table.at(FORWARDED):
                    self._add(f"nft cannot print the table {table.name}, whose rules may drop"
                              " packets of the overlay", "a newer nft may print it", False)
            for flow in self._datagrams(version):
                self._judge_hooks(table, chains or {}, RECEIVED if flow.arrives else SENT, flow,
                                  _remedy_for(flow))

    def _judge_hooks(
        self, table: OtherTable, chains: Mapping[str, Chain], hooks: Collection[str], flow: Flow,
        remedy: str,
    ) -> None:
        for base in table.at(hooks):
            if base in chains and (drop := drop_of(chains, base, flow)):
                self._report(flow, drop, f"nftables, table {table.name}", remedy)

    def _report(self, flow: Flow, drop: Drop, where: str, remedy: str) -> None:
        if flow.port is not None and not drop.sure:
            return  # whether the tunnel's datagrams pass is measured, too: see the check `peers`
        unless = "" if drop.sure else ", unless a rule with a condition that udptun cannot" \
            " evaluate accepts them"
        text = f"{flow.name} are dropped by {where}, chain {drop.chain}: {drop.text}{unless}"
        self._add(text, remedy, drop.sure and not flow.arrives and flow.port is None)

    def _add(self, text: str, remedy: str, cuts: bool) -> None:
        self.dropped[text] = FirewallDrop(text, remedy, cuts, time.time())

    def _datagrams(self, version: int) -> list[Flow]:
        return [flow for flow in self._tunnel if flow.version == version]

    def _flows(self, version: int) -> tuple[Flow, ...]:
        network, subnet = self._want.of(version)
        if network is None or subnet is None:
            return ()
        kind = f"IPv{version} packets"
        return (
            Flow(f"{kind} from this node's pods to other nodes", subnet, network, False,
                 self._want.devices),
            Flow(f"{kind} from other nodes to this node's pods", network, subnet, True,
                 self._want.devices),
        )


def _remedy_for(flow: Flow) -> str:
    return f"a rule of this chain has to accept UDP port {flow.port}"


def _drops(chains: Mapping[str, Chain], flows: Iterable[Flow]) -> dict[Flow, Drop]:
    return {flow: drop for flow in flows
            if (drop := drop_of(chains, iptables.FORWARD, flow)) is not None}


def _remedy(table: str, network: IPNetwork | None) -> str:
    if table.endswith(" firewalld"):
        return "to make firewalld accept them, run: firewall-cmd --permanent --zone=trusted" \
            f" --add-source={network} && firewall-cmd --reload"
    return f"a rule of this chain has to accept {network}"
