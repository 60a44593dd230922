"""Compare the kernel's state with the daemon's setup, and publish subnet.env when they are equal.

Owns:
- the comparison of the host with the setup, and its result in the report
- the decision which changes of the host cause another ``settle`` of the daemon
- the log lines about repairs
- the time at which subnet.env is written

Does not repair anything: ``settle`` and the forwarder do. Runs on the daemon's loop.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Collection

from ..errors import UdptunError
from ..leases.base import Lease
from ..model import Mark
from ..net.lookup import device_index, is_up
from ..net.netlink import Netlink
from ..repairs import Repairs
from ..wait import wait_at_most
from .backends.active import ActiveBackends
from .backends.base import Site
from .host.host import Host
from .host.interface import LOOPBACK
from .host.misrouted import Misrouted, Outer
from .host.watch import HostWatch
from .status.report import NodeReport

log = logging.getLogger(__name__)

TICK_SECONDS = 1.0
# Between two looks at the routes to peers. After a change of routes or rules, the next look is at
# once, and at all peers; else it is at some of them.
ROUTES_SECONDS = 10.0
ROUTES_PEERS = 500  # ... but at all peers at most every (peers / this) seconds
LOOK_TICKS = 5  # look at the host every so many ticks, and at each tick while something is wrong
FIRST_LOOKS_SECONDS = 0.05  # between two looks before subnet.env is written


class HostCheck:
    """Compares the host with its desired state.

    repairs       limits how often the daemon repairs the host
    settle_again  is called if the host may differ from its desired state
    leases        returns the leases of all nodes
    mark          of the forwarder's datagrams
    """

    def __init__(
        self, netlink: Netlink, backends: ActiveBackends, host: Host, report: NodeReport,
        settle_again: Callable[[], None], leases: Callable[[], Collection[Lease]],
        mark: Mark | None,
    ) -> None:
        self._netlink = netlink
        self._mark = mark
        self._leases = leases
        self._misrouted = Misrouted(netlink)
        self._lease: Lease | None = None  # ours, of the last ``settled``
        self.repairs = Repairs(lambda text: log.warning("%s", text))
        self._backends = backends
        self._host = host
        self._report = report
        self._settle_again = settle_again
        self._routing_changed = asyncio.Event()
        self._watch = HostWatch(netlink, settle_again, self._routing_changed.set)
        self._site: Site | None = None  # of the last ``settled``
        self._looked = False

    def start(self) -> None:
        self._watch.start()

    async def settled(self, site: Site, lease: Lease) -> None:
        """Look at the host after a successful ``settle`` of the daemon."""
        self._site, self._lease = site, lease
        self._watch.concern(
            self._backends.active_devices(site.network), site.underlay.index,
            site.network.networks, lease.subnets)
        self._record(self._backends.take_repairs())
        await self._look()

    async def published(self) -> None:
        """Wait until the whole setup is active, then write subnet.env."""
        while not await self._publish():
            await asyncio.sleep(FIRST_LOOKS_SECONDS)

    async def keep(self) -> None:
        """Look at the host from time to time, until cancelled."""
        tick = 0
        while True:
            await asyncio.sleep(TICK_SECONDS)
            tick += 1
            self.repairs.summarise()
            if tick % LOOK_TICKS == 0 or self._report.host.wrong:
                before = self._report.host.wrong.keys()
                await self._look()
                if self._report.host.wrong.keys() - before:
                    self._settle_again()
            if not self._missing():
                self._host.write_env()

    async def keep_routes(self) -> None:
        """Look at the routes to the peers: at all of them after a change, else at some of them in
        turn. Until cancelled."""
        self._routing_changed.set()
        while True:
            await wait_at_most(self._routing_changed, ROUTES_SECONDS)
            pause = TICK_SECONDS
            if self._may_look_at_routes():
                changed = self._routing_changed.is_set()
                self._routing_changed.clear()
                await self._look_at_routes(everyone=changed)
                if changed:
                    pause = max(pause, len(self._leases()) / ROUTES_PEERS)
            await asyncio.sleep(pause)

    def _may_look_at_routes(self) -> bool:
        """Return False if the answers would only show what is wrong with the overlay's devices."""
        assert self._site is not None
        devices = self._backends.active_devices(self._site.network)
        since = min(self._report.host.wrong.values(), default=0.0)
        # If a repair does not succeed, the other faults of the host are reported nevertheless.
        return all(map(is_up, devices)) and since < time.time() - ROUTES_SECONDS

    async def _publish(self) -> bool:
        await self._look()
        missing = self._missing()
        if missing:
            self._report.waiting = f"not everything is active yet: {missing}"
            return False
        self._host.write_env()
        return True

    def _missing(self) -> str:
        """Return the part that was missing at the last comparison; "" if none was missing."""
        report = self._report
        if report.forwarder.needed and not report.forwarder.synced:
            return "the forwarder's routes"
        return "; ".join((*report.host.wrong, *filter(None, (self._host.firewall_error,))))

    async def _look(self) -> None:
        assert self._site is not None
        try:
            wrong = await self._backends.verify()
        except (UdptunError, OSError) as exc:
            wrong = [str(exc)]
        repairs, off = self._host.keep_forwarding(self._site.network)
        if self._looked:
            self._record(repairs)
        else:  # to turn on a setting that was off before our start is not a repair
            for text in repairs:
                log.info("%s", text)
        self._looked = True
        self._report.host.set(wrong, off)

    async def _look_at_routes(self, *, everyone: bool) -> None:
        assert self._site is not None and self._lease is not None
        network, own = self._site.network, self._lease
        devices = {device_index(name) for name in self._backends.device_names(network)} - {0}
        peers = [lease for lease in self._leases() if lease.key != own.key]
        before = self._misrouted.found
        try:
            await self._misrouted.look(
                peers, tuple(own.subnets), devices, network.networks,
                direct=network.direct_routing, everyone=everyone, outer=self._outer())
        except (UdptunError, OSError) as exc:
            log.warning("the routes to peers are not known: %s", exc)
            return
        for key, why in self._misrouted.found.items():
            if before.get(key) != why:
                log.warning("%s: %s", key, why)
        self._report.host.set_misrouted(self._misrouted.found)

    def _outer(self) -> Outer:
        assert self._site is not None
        underlay, mark = self._site.underlay, self._mark
        silent = {pair.key for pair in self._report.in_state("unreachable")}
        return Outer(
            0 if underlay.name == LOOPBACK else underlay.index,
            {address.version: address for address in underlay.bound},
            mark.value if mark is not None and self._backends.through_tun else 0,
            silent=silent,
            answering={pair.key for state in ("reachable", "limited")
                       for pair in self._report.in_state(state)} - silent)

    def _record(self, repairs: list[str]) -> None:
        if repairs:
            self.repairs.begin("; ".join(repairs))
        for text in repairs:
            self.repairs.done(text)
            self._report.event("repaired", message=text)
