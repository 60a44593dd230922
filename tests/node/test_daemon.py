"""The daemon from start to end, with a store and a forwarder that the test controls.

The host is a real network namespace with one interface. The forwarder is a table with a real
control server; its options are always the ones that the daemon wants.
"""

from __future__ import annotations

import asyncio
import json
import socket
from dataclasses import replace
from ipaddress import IPv4Address, IPv4Network, IPv6Address

import pytest

from tests.control.fakes import LoopThread, Served
from tests.leases.kube_api import node as kube_node
from tests.leases.kube_cluster import flannel, open_cluster
from tests.node.daemon_host import OURS, Node, peer, routes_to, table
from tests.own_netns import in_own_mount_namespace, in_own_netns, sh
from tests.wait import until
from udptun.errors import FieldError
from udptun.leases.advert import ECN, PROBE, Advert, embed
from udptun.leases.base import (
    Attributes,
    Change,
    Changes,
    Snapshot,
    StoreDown,
    StoreRefused,
    Subnets,
)
from udptun.leases.netconf import NetConfig
from udptun.net.netlink import Netlink
from udptun.net.udp import keeps_marks, kernel_release
from udptun.node import peers as peers_module
from udptun.node import store as store_module
from udptun.node.backends import BACKENDS
from udptun.node.config import InterfaceOptions
from udptun.node.daemon import Daemon, run
from udptun.node.status.readiness import judge


@pytest.fixture
def served(tmp_path):
    (tmp_path / "run").mkdir()
    with LoopThread() as thread, Served(thread, tmp_path / "run" / "udptun.sock") as running:
        yield running


@pytest.fixture
def node_of(tmp_path, monkeypatch):
    """Return a function that creates a Node in the namespace of the caller."""
    return lambda: Node(tmp_path, monkeypatch)


@in_own_netns
async def test_leases_of_the_store_are_applied(served, node_of):
    node = node_of()
    async with node.running() as daemon:
        await until(lambda: node.store.published, "the lease")
        assert daemon.report.waiting  # the leases are not known yet
        node.store.send(peer(2), peer(3))
        await node.ready(daemon)
        assert table(served) == routes_to(peer(2), peer(3))
        (published,) = node.store.published
        features = {PROBE, ECN} if keeps_marks(kernel_release()) else {PROBE}
        assert published == Attributes(
            IPv4Address("192.0.2.1"), None, "",
            embed(None, Advert(8285, 1472, frozenset(features))))
        assert node.config.subnet_file.read_text() == (
            "FLANNEL_NETWORK=10.244.0.0/16\nFLANNEL_SUBNET=10.244.1.1/24\n"
            "FLANNEL_MTU=1472\nFLANNEL_IPMASQ=false\n")
        assert node.forward_file["listen"] == ["192.0.2.1:8285"]
        assert daemon.report.leases_n == 3
        assert daemon.report.peers.carried_n == dict.fromkeys(BACKENDS, 0) | {"udp": 2}
        assert not daemon.report.stale
        await until(lambda: node.store.held, "the lease to be held")

        changes = (Change(peer(2), None), Change(peer(3), peer(3, 33)), Change(None, peer(4)))
        node.store.news.put_nowait(Changes(changes))
        await until(lambda: table(served) == routes_to(peer(3, 33), peer(4)), "the change")
        assert daemon.report.leases_n == 3
    assert not served.forwarder.stopped.is_set()
    assert table(served) == routes_to(peer(3, 33), peer(4))


@in_own_netns
async def test_without_the_advertisement_the_lease_is_flannels(served, node_of):
    node = node_of()
    node.config = replace(node.config, advertise=False)
    async with node.running():
        await until(lambda: node.store.published, "the lease")
    assert node.store.published == [Attributes(IPv4Address("192.0.2.1"))]


@in_own_netns
@pytest.mark.parametrize("advertise", [True, False])
async def test_flannels_udp_backend_publishes_no_ipv6_address(served, node_of, advertise):
    node = node_of()
    node.config = replace(
        node.config, advertise=advertise,
        interface=replace(node.config.interface, public_ipv6=IPv6Address("2001:db8::1")))
    async with node.running():
        await until(lambda: node.store.published, "the lease")
    (published,) = node.store.published
    assert (published.public_ipv6 is not None) == advertise


@in_own_netns
async def test_cached_leases_are_applied_while_the_store_is_down_at_the_start(served, node_of):
    node = node_of()
    await node.fill_cache(peer(2), peer(3))
    served.forwarder.table = {}  # as after a reboot
    node.store.fail(StoreDown("etcd is away"))
    async with node.running() as daemon:
        await node.ready(daemon)
        assert table(served) == routes_to(peer(2), peer(3))
        assert daemon.report.stale
        assert daemon.report.lease_error == "etcd is away"
        assert daemon.report.lease.subnets == OURS
        # The store answers again: one diff, and the lease is confirmed.
        node.store.recover()
        node.store.send(peer(2), peer(4))
        await until(lambda: table(served) == routes_to(peer(2), peer(4)), "the truth")
        await until(lambda: node.store.held, "the lease to be held")
        assert not daemon.report.stale
        assert daemon.report.lease_error == ""


@in_own_netns
async def test_active_routes_are_not_touched_before_the_leases_are_known(
    served, node_of, monkeypatch
):
    """The store answers, but lists the leases late. Until then the forwarder's routes stay."""
    node = node_of()
    await node.fill_cache(peer(2))
    calls = served.forwarder.calls
    calls.clear()
    monkeypatch.setattr(peers_module, "PATIENCE_SECONDS", 0.3)
    async with node.running() as daemon:
        await until(lambda: daemon.report.forwarder.connected, "the forwarder")
        await until(lambda: node.store.published, "the lease")
        assert calls == []
        await until(lambda: daemon.report.stale, "the leases on disk to be taken")
        await node.ready(daemon)
        assert table(served) == routes_to(peer(2))
        assert served.forwarder.generation == 2  # the routes did not change


@in_own_netns
async def test_the_cache_is_used_if_the_store_does_not_answer(served, node_of, monkeypatch):
    node = node_of()
    await node.fill_cache(peer(2))
    monkeypatch.setattr(store_module, "PATIENCE_SECONDS", 0.1)
    monkeypatch.setattr(peers_module, "PATIENCE_SECONDS", 0.1)

    async def never():
        await asyncio.Event().wait()

    node.store.network = never
    async with node.running() as daemon:
        await until(lambda: daemon.report.stale, "what is known to be active")
        assert table(served) == routes_to(peer(2))


@in_own_netns
async def test_without_a_cache_the_daemon_waits_for_the_store(served, node_of):
    node = node_of()
    node.store.fail(StoreDown("etcd is away"))
    async with node.running() as daemon:
        await until(lambda: daemon.report.waiting == "etcd is away", "the reason")
        node.store.recover()
        node.store.news.put_nowait(Snapshot((peer(2),)))
        await node.ready(daemon)
        assert table(served) == routes_to(peer(2))


@pytest.mark.parametrize(
    "error", [StoreRefused("no podCIDR"), FieldError("Network", "x", "an IPv4 network")]
)
def test_a_refusal_ends_a_daemon_without_a_cache(served, node_of, error):
    @in_own_netns
    async def check():
        node = node_of()
        node.store.fail(error)
        with Netlink() as netlink, pytest.raises(type(error), match=str(error)[:10]):
            await Daemon(node.config, netlink).run()
        assert node.store.closed

    check()


@in_own_netns
async def test_a_refusal_does_not_end_a_daemon_with_a_cache(served, node_of):
    node = node_of()
    await node.fill_cache(peer(2))
    node.store.fail(StoreRefused("the password is wrong"))
    async with node.running() as daemon:
        await node.ready(daemon)
        assert table(served) == routes_to(peer(2))
        assert daemon.report.lease_error == "the password is wrong"


TAKING = NetConfig.parse('{"Network": "192.0.2.0/25", "SubnetLen": 28}')


@in_own_netns
async def test_a_network_that_contains_the_underlay_is_refused(served, node_of):
    node = node_of()
    node.store.network_answer = TAKING
    with Netlink() as netlink, pytest.raises(
        FieldError,
        match=r"192.0.2.0/25.* does not divert packets to 192.0.2.1, the underlay's address",
    ):
        await Daemon(node.config, netlink).run()
    assert not node.store.published and not node.config.forward_file.exists()


@in_own_netns
async def test_a_network_that_contains_the_store_does_not_replace_the_cached_one(
    served, node_of
):
    node = node_of()
    await node.fill_cache(peer(2))
    node.store.network_answer = NetConfig.parse('{"Network": "10.0.0.0/8"}')
    node.store.hosts = lambda: ("10.9.9.9",)
    sh("ip route add default dev under0")
    async with node.running() as daemon:
        await node.ready(daemon)
        assert table(served) == routes_to(peer(2))
        assert node.forward_file["network"] == ["10.244.0.0/16"]
        assert "does not divert packets to 10.9.9.9, the address of the store" in \
            daemon.report.lease_error
        node.store.hosts = tuple
        daemon.reload()
        await until(lambda: node.forward_file["network"] == ["10.0.0.0/8"], "the new network")


@in_own_netns
async def test_a_lease_that_contains_the_gateway_does_not_affect_other_leases(served, node_of):
    node = node_of()
    sh("ip route add 10.244.7.0/25 dev under0", "ip route add default via 10.244.7.9")
    async with node.running() as daemon:
        await until(lambda: node.store.published, "the lease")
        node.store.send(peer(2), peer(7))
        await until(lambda: table(served) == routes_to(peer(2), peer(7)), "a longer prefix is safe")
    sh("ip route replace default dev under0", "ip route del 10.244.7.0/25")
    sh("ip route add 10.244.7.0/24 dev under0", "ip route replace default via 10.244.7.9")
    node.store = type(node.store)()
    async with node.running() as daemon:
        await until(lambda: node.store.published, "the lease")
        node.store.send(peer(2), peer(7))
        await until(lambda: table(served) == routes_to(peer(2)), "the other lease")
        await until(lambda: daemon.report.peers.unreachable, "the reason")
        (why,) = daemon.report.peers.unreachable.values()
        assert why == "its subnet 10.244.7.0/24 would divert packets to 10.244.7.9, the gateway " \
            "of this host"
        assert "no_path" in [event["type"] for event in daemon.report.events.recent]


@in_own_netns
async def test_a_lease_that_is_routed_into_our_tun_does_not_affect_other_leases(served, node_of):
    node = node_of()
    inside = replace(peer(3), attributes=replace(
        peer(3).attributes, public_ip=IPv4Address("10.244.77.7")))
    async with node.running() as daemon:
        await until(lambda: sh("ip route show 10.244.0.0/16"), "the route of the network")
        sh("ip route add 192.0.2.4 dev udptun0")
        await until(lambda: node.store.published, "the lease")
        node.store.send(peer(2), inside, peer(4))
        await until(lambda: table(served) == routes_to(peer(2)), "the other lease")
        await until(lambda: len(daemon.report.peers.refused) == 2, "the reasons")
        refused = daemon.report.peers.refused
        assert refused.keys() == {"10.244.3.0-24", "10.244.4.0-24"}
        assert "address 10.244.77.7 into the forwarder's own TUN" in refused["10.244.3.0-24"]
        sh("ip route add 10.244.77.0/24 via 192.0.2.254")  # now it is reachable by the underlay
        daemon.reload()
        await until(lambda: table(served) == routes_to(peer(2), inside), "the usable lease")
        await until(lambda: daemon.report.peers.refused.keys() == {"10.244.4.0-24"}, "the report")


@in_own_netns
@pytest.mark.parametrize("problem", ["readonly", "full", "no inode"])
async def test_a_full_or_readonly_disk_does_not_stop_the_node(
    served, node_of, monkeypatch, problem
):
    """The state directory cannot be written. Later it can."""
    monkeypatch.setattr("udptun.leases.cache.RETRY_SECONDS", 0.2)
    in_own_mount_namespace()
    node = node_of()
    state = node.config.state_dir
    state.mkdir()
    options, repair = {
        "readonly": ("ro", "rw"), "full": ("size=4k", "size=1m"),
        "no inode": ("nr_inodes=1", "nr_inodes=100"),
    }[problem]
    sh(f"mount -t tmpfs -o {options} none {state}")
    if problem == "full":
        (state / "filler").write_bytes(bytes(4096))
    async with node.running() as daemon:
        await until(lambda: node.store.published, "the lease")
        node.store.send(peer(2))
        await node.ready(daemon)
        assert table(served) == routes_to(peer(2))
        await until(lambda: "leases" in daemon.report.troubles, "the report")
        assert ("lock" in shown(daemon)) == (problem != "full")
        assert f"the leases are not saved to {state}" in shown(daemon)
        sh(f"mount -o remount,{repair} {state}")
        await until(lambda: shown(daemon) == "", "the disk to be used")
        assert (state / "leases.json").exists()
        assert (state / "lock").exists()


@in_own_netns
async def test_a_readonly_run_directory_does_not_stop_the_node(served, node_of):
    """The files of an earlier daemon are there, and the forwarder runs."""
    in_own_mount_namespace()
    node = node_of()
    run_dir = node.config.control.parent
    sh(f"mount --bind {run_dir} {run_dir}", f"mount -o remount,bind,ro {run_dir}")
    async with node.running() as daemon:
        await until(lambda: node.store.published, "the lease")
        for text in ("the control socket", "forward.json is not written", "no status for"):
            await until(lambda text=text: text in shown(daemon), text)
        sh(f"mount -o remount,bind,rw {run_dir}")
        node.store.send(peer(2))
        await node.ready(daemon)
        assert table(served) == routes_to(peer(2))
        await until(lambda: shown(daemon) == "", "the directory to be used")
        assert (run_dir / "node.sock").exists()


@in_own_netns
async def test_a_taken_health_port_does_not_stop_the_node(served, node_of, monkeypatch):
    """Any user of the host can listen there first."""
    monkeypatch.setattr("udptun.control.http.RETRY_SECONDS", 0.1)
    node = node_of()
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        node.config = replace(node.config, healthz_port=port)
        async with node.running() as daemon:
            await until(lambda: node.store.published, "the lease")
            node.store.send(peer(2))
            await node.ready(daemon)
            assert table(served) == routes_to(peer(2))
            assert f"health checks on 127.0.0.1 port {port}: Address already" in shown(daemon)
            other.close()
            await until(lambda: shown(daemon) == "", "the port")
            assert sh(f"ss -Hltn sport = {port}")


@in_own_netns
async def test_routes_are_looked_at_while_another_fault_stays(served, node_of, monkeypatch):
    """The device is up, but nobody restores its address: the forwarder of the test does not."""
    monkeypatch.setattr("udptun.node.host_check.ROUTES_SECONDS", 0.1)
    node = node_of()
    async with node.running() as daemon:
        await until(lambda: node.store.published, "the lease")
        node.store.send(peer(2))
        await node.ready(daemon)
        sh("ip addr del 10.244.1.0/32 dev udptun0")
        await until(lambda: daemon.report.host.wrong, "the lasting fault")
        sh("ip link set wire up", "ip route add 10.244.2.0/24 dev wire")
        await until(lambda: daemon.report.host.misrouted, "the misrouted peer")
        assert daemon.report.host.wrong
        sh("ip link set udptun0 down")  # now the answers would say nothing of their own
        assert not daemon._host_check._may_look_at_routes()


def shown(daemon):
    """Return the problems of the check ``daemon``."""
    (found,) = (check for check in judge(daemon.report) if check.name == "daemon")
    return "\n".join(one.text for one in found.problems)


@in_own_netns
async def test_an_unknown_backend_is_refused_by_name(served, node_of):
    node = node_of()
    node.store.network_answer = NetConfig.parse(
        '{"Network": "10.244.0.0/16", "Backend": {"Type": "wireguard"}}')
    with Netlink() as netlink, pytest.raises(FieldError, match="wireguard"):
        await Daemon(node.config, netlink).run()


@in_own_netns
async def test_another_address_is_published_and_listened_at(served, node_of):
    node = node_of()
    async with node.running() as daemon:
        await until(lambda: node.store.published, "the lease")
        node.store.send(peer(2))
        await node.ready(daemon)
        sh("ip addr del 192.0.2.1/24 dev under0")
        await until(lambda: daemon.report.interface_error, "the error")
        sh("ip addr add 192.0.2.7/24 dev under0")
        await until(lambda: len(node.store.published) == 2, "the new address to be published")
        assert node.store.published[-1].public_ip == IPv4Address("192.0.2.7")
        assert node.forward_file["listen"] == ["192.0.2.7:8285"]
        await until(lambda: served.forwarder.device, "the forwarder to move")
        assert served.forwarder.device["listen"] == ["192.0.2.7:8285"]
        assert daemon.report.interface_error == ""


@in_own_netns
async def test_a_vpns_default_route_does_not_move_the_node(served, node_of):
    """Neither while the daemon runs, nor at its next start."""
    node = node_of()
    node.config = replace(node.config, interface=InterfaceOptions())
    sh("ip route add default via 192.0.2.254 metric 100")
    async with node.running() as daemon:
        await until(lambda: node.store.published, "the lease")
        node.store.send(peer(2))
        await node.ready(daemon)
        sh("ip link add vpn0 type veth peer name far", "ip link set far up", "ip link set vpn0 up",
           "ip route add default dev vpn0 metric 50", "ip addr add 203.0.113.1/24 dev vpn0")
        await until(lambda: daemon.report.interface_note, "the note")
        assert "default route goes through vpn0 now" in daemon.report.interface_note
        assert len(node.store.published) == 1
        assert node.forward_file["listen"] == ["192.0.2.1:8285"]
    async with node.running() as daemon:
        await until(lambda: len(node.store.published) == 2, "the lease again")
        assert node.store.published[-1].public_ip == IPv4Address("192.0.2.1")
        sh("ip link del vpn0")
        await until(lambda: not daemon.report.interface_note, "the note to be withdrawn")


@in_own_netns
async def test_an_address_that_is_gone_for_a_moment_stays_published(served, node_of):
    node = node_of()
    node.config = replace(node.config, address_grace=600)
    sh("ip addr add 198.51.100.1/24 dev under0")
    async with node.running() as daemon:
        await until(lambda: node.store.published, "the lease")
        node.store.send(peer(2))
        await node.ready(daemon)
        sh("ip addr del 192.0.2.1/24 dev under0")
        await until(lambda: daemon.report.interface_error, "the error")
        assert "192.0.2.1 is not on this host any more" in daemon.report.interface_error
        sh("ip addr add 192.0.2.1/24 dev under0")
        await until(lambda: not daemon.report.interface_error, "the address to be used again")
        assert len(node.store.published) == 1


@in_own_netns
async def test_addresses_that_do_not_matter_have_no_effect(served, node_of):
    node = node_of()
    async with node.running() as daemon:
        await until(lambda: node.store.published, "the lease")
        node.store.send(peer(2))
        await node.ready(daemon)
        calls = len(served.forwarder.calls)
        sh("ip link add pods type veth peer name pod", "ip addr add 10.244.1.1/24 dev pods",
           "ip addr add 192.0.2.99/24 dev under0")
        await asyncio.sleep(0.2)  # no event shows that nothing was published, so wait a while
        assert len(node.store.published) == 1
        assert len(served.forwarder.calls) == calls


@in_own_netns
async def test_a_lease_changed_in_the_store_is_acquired_again(served, node_of):
    node = node_of()
    async with node.running() as daemon:
        await until(lambda: node.store.published, "the lease")
        node.store.send(peer(2))
        await node.ready(daemon)
        fresh = Subnets(IPv4Network("10.244.77.0/24"))
        old = daemon.report.lease
        node.store.acquire_answer = fresh
        node.store.news.put_nowait(Changes((Change(old, replace(old, subnets=fresh)),)))
        await until(lambda: node.forward_file["address"] == ["10.244.77.0"], "the options")
        await until(lambda: not daemon.report.forwarder.connected, "the forwarder to be stopped")
        # No forwarder has the new address yet, so pods must not be attached with it.
        assert "10.244.1.1/24" in node.config.subnet_file.read_text()


@in_own_netns
async def test_a_kubernetes_node_with_another_pod_cidr_is_used(
    served, node_of, tmp_path, caplog
):
    """The Node object was deleted and created again, so it has no annotations."""
    node = node_of()
    async with open_cluster("small", tmp_path) as cluster:
        await cluster.create(kube_node("n1", "10.244.1.0/24"))
        node.store = cluster.source()
        async with node.running() as daemon:
            await until(lambda: cluster.condition("n1"), "the condition")
            await cluster.delete("n1")
            await cluster.create(kube_node("n1", "10.244.9.0/24"))
            await until(lambda: cluster.condition("n1"), "the condition of the new Node object")
            assert (await cluster.annotations("n1"))["public-ip"] == "192.0.2.1"
            assert node.forward_file["address"] == ["10.244.9.0"]
            assert str(daemon.report.lease.subnets) == "10.244.9.0/24"
            await until(lambda: node.store.health.lease == "held", "the lease to be held")
    assert "the bridge cni0 if it has an address in 10.244.1.0/24" in caplog.text


@in_own_netns
@pytest.mark.parametrize("lacking", ["node", "podCIDR", "role"])
async def test_a_kubernetes_node_waits_until_the_cluster_is_ready(
    served, node_of, tmp_path, lacking
):
    node = node_of()
    async with open_cluster("small", tmp_path) as cluster:
        rules = cluster.small.users["agent"]
        if lacking == "role":
            cluster.small.allow("agent", rules[0], [])
        if lacking != "node":
            await cluster.create(kube_node("n1", *["10.244.1.0/24"] * (lacking != "podCIDR")))
        node.store = cluster.source(token="agent")
        async with node.running() as daemon:
            await until(lambda: {
                "node": "404", "podCIDR": "n1: podCIDR: None",
                "role": 'cannot get resource "nodes"'}[lacking] in daemon.report.waiting, "a wait")
            assert not node.config.subnet_file.exists()
            if lacking == "node":
                await cluster.create(kube_node("n1", "10.244.1.0/24"))
            elif lacking == "role":
                cluster.small.users["agent"] = rules
            else:
                body = {"spec": {"podCIDR": "10.244.1.0/24", "podCIDRs": ["10.244.1.0/24"]}}
                await cluster.call(
                    "PATCH", "/api/v1/nodes/n1", body, "application/merge-patch+json")
            await node.ready(daemon)
            assert "10.244.1.1/24" in node.config.subnet_file.read_text()


@in_own_netns
async def test_an_address_that_the_store_sets_is_kept_while_it_is_down(served, node_of, tmp_path):
    node = node_of()
    async with open_cluster("small", tmp_path) as cluster:
        await cluster.create(kube_node(
            "n1", "10.244.1.0/24", annotations=flannel(node_public_ip="198.51.100.9")))
        for down in (False, True):
            node.store = cluster.source()
            async with node.running() as daemon:
                await node.ready(daemon)
                assert bool(daemon.report.lease_error) == down
                assert str(daemon.report.underlay.public) == "198.51.100.9"
            await cluster.small.stop()


@in_own_netns
async def test_an_address_that_the_store_sets_is_kept_if_it_becomes_invalid(
    served, node_of, tmp_path
):
    """Also after a restart, for example by an update of the DaemonSet."""
    node = node_of()
    async with open_cluster("small", tmp_path) as cluster:
        await cluster.create(kube_node("n1", "10.244.1.0/24", annotations=flannel(
            node_public_ip="198.51.100.9", public_ip_overwrite="198.51.100.8")))
        for _ in range(3):
            node.store = cluster.source()
            async with node.running() as daemon:
                await node.ready(daemon)
                assert str(daemon.report.underlay.public) == "198.51.100.9"
                assert (await cluster.annotations("n1"))["public-ip"] == "198.51.100.8"
            await cluster.annotate("n1", node_public_ip="typo", public_ip_overwrite="typo")


@in_own_netns
async def test_reload_asks_the_store_again_and_puts_routes_back(served, node_of):
    node = node_of()
    async with node.running() as daemon:
        await until(lambda: node.store.published, "the lease")
        node.store.send(peer(2))
        await node.ready(daemon)
        served.forwarder.table = {}
        node.config.subnet_file.unlink()
        daemon.reload()
        await until(lambda: table(served) == routes_to(peer(2)), "the routes")
        await until(node.config.subnet_file.exists, "subnet.env")
        await until(lambda: node.store.networks_n == 2, "the network to be asked for")


@in_own_netns
async def test_the_former_subnet_is_asked_for(served, node_of):
    node = node_of()
    await node.fill_cache(peer(2))
    async with node.running():
        await until(lambda: node.store.published, "the lease")
        assert node.store.formers == [OURS]


@in_own_netns
async def test_unreachable_peers_are_reported(served, node_of, caplog):
    node = node_of()
    stock = replace(peer(2), attributes=Attributes(
        IPv4Address("192.0.2.2"), None, "vxlan", {"VNI": 1, "VtepMAC": "0e:00:00:00:00:02"}))
    async with node.running() as daemon:
        await until(lambda: node.store.published, "the lease")
        node.store.send(stock, peer(3))
        await node.ready(daemon)
        assert "only UDP" in daemon.report.peers.unreachable[stock.key]
        assert table(served) == routes_to(peer(3))
        assert any(stock.key in text for text in caplog.messages)


@in_own_netns
async def test_cleanup_removes_everything_and_can_be_repeated(served, node_of):
    node = node_of()
    node.config = replace(node.config, ip_masq=True)
    await node.fill_cache(peer(2))
    assert "udptun-ipv4" in sh("nft list ruleset")
    for name in ("routes", "routes.bad", "leases.json.bad", ".leases.json.0123456789abcdef",
                 ".routes.0123456789abcdef"):  # the last two: of killed writers
        (node.folder / "state" / name).write_text("")
    for _ in range(2):
        await run(replace(node.config, cleanup=True))
        assert served.forwarder.stopped.is_set()
        assert not (node.folder / "state").exists()
        assert not node.config.subnet_file.exists()
        assert not (node.folder / "run" / "forward.json").exists()
        assert "udptun" not in sh("nft list ruleset")


@in_own_netns
async def test_cleanup_removes_the_sockets_of_a_forwarder_that_was_killed(tmp_path, node_of):
    (tmp_path / "run").mkdir()
    node = node_of()
    for name in ("udptun.sock", "takeover.sock"):
        with socket.socket(socket.AF_UNIX) as left:
            left.bind(str(tmp_path / "run" / name))
    await run(replace(node.config, cleanup=True))
    assert not [*(tmp_path / "run").glob("*.sock")]


@in_own_netns
async def test_cleanup_keeps_the_device_of_a_stock_flannel(served, node_of):
    node = node_of()
    await node.fill_cache(peer(2))
    try:
        sh("ip link add flannel.1 type vxlan id 1 dev under0 dstport 8472")
    except AssertionError:
        pytest.skip("this kernel has no vxlan")
    await run(replace(node.config, cleanup=True))
    assert "flannel.1" in sh("ip link")


@in_own_netns
async def test_cleanup_leaves_device_and_subnet_file_to_a_flannel_that_uses_them(served, node_of):
    """The node changes back to flannel: flanneld has taken over the device and the file."""
    try:
        sh("ip link add flannel.9 type vxlan id 9 dstport 8472", "ip link del flannel.9")
    except AssertionError:
        pytest.skip("this kernel has no vxlan")
    node = node_of()
    node.config = replace(node.config, backend="vxlan", ip_masq=True)
    await node.fill_cache()
    for keep in (True, False):
        await run(replace(node.config, cleanup=True, keep_flannel=keep))
        assert ("flannel.1" in sh("ip link")) == keep
        assert node.config.subnet_file.exists() == keep
        assert "udptun" not in sh("nft list ruleset")
        if keep:
            assert not (node.folder / "state").exists()
            await node.fill_cache()  # the state, for the second clean-up


@in_own_netns
@pytest.mark.parametrize(("option", "enable", "mode"), [
    (None, False, "auto"), (None, True, "nftables"), ("iptables", True, "iptables"),
    ("auto", True, "auto"),
])
async def test_the_option_firewall_takes_precedence_over_the_network(
    served, node_of, option, enable, mode
):
    node = node_of()
    node.config = replace(node.config, firewall=option)
    node.store.network_answer = NetConfig.parse(json.dumps(
        {"Network": "10.244.0.0/16", "EnableNFTables": enable}))
    async with node.running() as daemon:
        await until(lambda: node.store.published, "the lease")
        node.store.send(peer(2))
        await node.ready(daemon)
        assert daemon._host._firewall.mode == mode


@in_own_netns
async def test_the_firewall_knows_a_new_subnet_before_a_device_has_its_address(
    served, node_of, monkeypatch
):
    """Else it masquerades our first packets from this address."""
    node = node_of()
    node.config = replace(node.config, ip_masq=True)
    known = {}  # by our subnet: whether each call of ``settle`` has found it in the rules

    async with node.running() as daemon:
        settle = daemon._backends.settle

        async def checked(prepared, lease):
            subnet = str(lease.subnets.v4)
            known.setdefault(subnet, []).append(f"saddr {subnet}" in sh("nft list ruleset"))
            await settle(prepared, lease)

        monkeypatch.setattr(daemon._backends, "settle", checked)
        await until(lambda: node.store.published, "the lease")
        node.store.send(peer(2))
        await node.ready(daemon)
        node.store.acquire_answer = Subnets(IPv4Network("10.244.5.0/24"))
        daemon.reload()
        await until(lambda: "10.244.5.0" in sh("ip -4 -o addr show"), "the new address")
    assert {*known} == {str(OURS.v4), "10.244.5.0/24"}
    assert all(all(calls) for calls in known.values())
