"""The other nodes: what the rules against forged packets may assume about them."""

from __future__ import annotations

from collections.abc import Collection
from ipaddress import IPv4Address, IPv4Network
from typing import Any, cast

import pytest

from udptun.leases.base import Attributes, Change, Lease, Snapshot, SourceHealth, Subnets
from udptun.model import IPNetwork
from udptun.node.backends.active import ActiveBackends
from udptun.node.backends.plan import LocalNode, Plan
from udptun.node.peers import Peers
from udptun.node.status.report import NodeReport
from udptun.node.store import Store

NETWORK = IPv4Network("10.244.0.0/16")
OURS, NEAR, FAR = (IPv4Network(f"10.244.{number}.0/24") for number in (1, 2, 3))


def lease(subnet: IPv4Network) -> Lease:
    attributes = Attributes(IPv4Address("192.0.2.9"), backend_type="vxlan")
    return Lease(str(subnet), Subnets(subnet), attributes)


class Backends:
    """Knows which subnets are on the link only when they are applied, as the VXLAN backend does.

    peers   whose rules are asked for while a change is applied
    link    the subnets on the link
    during  the rules that were seen during a change
    """

    marked = True

    def __init__(self) -> None:
        self.peers: Peers
        self.link = {NEAR}
        self.known: set[IPNetwork] = set()
        self.during: list[Collection[IPNetwork] | None] = []

    async def apply_all(self, plan: Plan, since: float) -> None:
        self._apply()

    async def apply(self, plan: Plan, delta: Any, since: float) -> None:
        self._apply()

    async def resync(self, plan: Plan) -> None:
        self._apply()

    def _apply(self) -> None:
        self.during.append(direct(self.peers))
        self.known = set(self.link)

    def guarded(self, plan: Plan, interface: str) -> tuple[frozenset[Any], frozenset[IPNetwork]]:
        return frozenset(), frozenset(self.known)


class Kept:
    """The parts of the store that ``Peers`` uses."""

    def __init__(self) -> None:
        self.lease = lease(OURS)

    def changed_by_others(self, own: Lease | None) -> bool:
        return False

    def save(self, leases: Collection[Lease]) -> None:
        pass


def direct(peers: Peers) -> Collection[IPNetwork] | None:
    found = peers.guarded("eth0")
    return None if found is None else found[1]


@pytest.fixture
async def made() -> tuple[Peers, Backends, list[Any]]:
    backends, planned = Backends(), list[Any]()
    peers = Peers(
        cast(Store, Kept()), cast(ActiveBackends, backends), NodeReport("file", SourceHealth()),
        lambda: None, lambda plan, subnets: planned.append(direct(peers)))
    backends.peers = peers
    await peers.replan(local())
    await peers._replace(Snapshot((lease(OURS), lease(NEAR))).leases, 0.0)
    return peers, backends, planned


def local() -> LocalNode:
    return LocalNode(lease(OURS).key, Subnets(OURS), (NETWORK,), (IPv4Address("192.0.2.1"),), ())


async def test_the_rules_are_not_known_before_the_paths_are(
    made: tuple[Peers, Backends, list[Any]]
) -> None:
    peers, backends, planned = made
    assert backends.during == [None]
    assert direct(peers) == {NEAR}
    assert planned[-1] == {NEAR}


async def test_the_rules_follow_what_the_kernel_has_decided(
    made: tuple[Peers, Backends, list[Any]]
) -> None:
    """Also if somebody asks for them while a change is being applied."""
    peers, backends, planned = made
    backends.link = {NEAR, FAR}
    await peers._change((Change(None, lease(FAR)),), 0.0)
    assert backends.during[-1] == {NEAR}
    assert planned[-1] == direct(peers) == {NEAR, FAR}
    backends.link = {FAR}  # the host has other routes now, and no lease has changed
    await peers.replan(local())
    assert planned[-1] == direct(peers) == {FAR}
