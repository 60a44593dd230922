"""Peers that another backend carries for some time: later the kernel has its first state again."""

from __future__ import annotations

from ipaddress import ip_address, ip_network
from pathlib import Path

from tests.node.daemon_host import NETWORK, OURS, Node
from tests.own_netns import in_own_netns, ip_json, sh
from udptun.leases.base import Attributes, Lease
from udptun.net.netlink import Netlink
from udptun.net.vxlan import VxlanPeer
from udptun.node.backends.active import create
from udptun.node.backends.base import Site
from udptun.node.host.interface import choose
from udptun.node.status.report import NodeReport

PEERS = {
    net: VxlanPeer(net, f"02:00:00:00:00:{number:02x}", ip_address(f"192.0.2.{number}"))
    for number in range(2, 42) for net in (ip_network(f"10.244.{number}.0/24"),)
}
SOME = [*PEERS][::3]


def entries():
    """Return what the kernel has for the peers: routes, neighbours and FDB entries."""
    routes = {(one["dst"], one["dev"], one.get("gateway")) for one in ip_json("route show")}
    neighbours = {(one["dst"], one["lladdr"]) for one in ip_json("neigh show nud permanent")}
    fdb = {line.split(" self")[0] for line in sh("bridge fdb show dev flannel.1").splitlines()}
    return routes, neighbours, fdb


def open_files():
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


@in_own_netns
async def test_a_hundred_changes_of_the_carrier_leave_no_stale_entries(tmp_path, monkeypatch):
    node = Node(tmp_path, monkeypatch)
    with Netlink() as netlink:
        backend = create("vxlan", node.config, netlink, NodeReport("etcd", node.store.health))
        underlay = await choose(netlink, node.config.interface, True, False)
        site = Site(NETWORK, underlay, optional=True)
        assert await backend.prepare(site, 1400) == ""
        await backend.settle(Lease("own", OURS, Attributes()), 1400)
        await backend.apply_all(PEERS)
        before, files = entries(), open_files()
        assert len(before[1]) == len(before[2]) == len(PEERS)
        for number in range(100):
            await backend.divert(dict.fromkeys(SOME, True))
            if number % 25 == 0:
                routes, neighbours, fdb = entries()
                assert {dst for dst, _, _ in before[0] - routes} == {str(net) for net in SOME}
                assert (neighbours, fdb) == before[1:]
                await backend.resync()  # the regular look does not bring the routes back
                assert entries() == (routes, neighbours, fdb)
            await backend.divert(dict.fromkeys(SOME, False))
        assert entries() == before
        assert open_files() < files + 100  # one per change; other threads open some of their own
        assert backend.refused == {}
        # A peer that leaves while it is diverted leaves nothing either.
        await backend.divert(dict.fromkeys(SOME, True))
        await backend.apply(dict.fromkeys(PEERS))
        await backend.divert(dict.fromkeys(SOME, False))
        routes, neighbours, fdb = entries()
        assert not neighbours
        assert not fdb
        assert not any(device == "flannel.1" for _, device, _ in routes)
