"""Nodes that measure their paths: filters of VXLAN or UDP, stock peers, peers that have left."""

from __future__ import annotations

import pytest

from tests.netns.cluster_traffic import SteadyPing, SteadyTransfer, all_reach_all
from tests.netns.test_cluster_mixed import Stock, device_to
from udptun.lab import ping, wait_for
from udptun.lab.cluster import Cluster, Member, etcd_obstacle

pytestmark = pytest.mark.skipif(etcd_obstacle() is not None, reason=str(etcd_obstacle()))

VXLAN = {"Network": "10.244.0.0/16", "Backend": {"Type": "vxlan"}}
UDP_PORT, VXLAN_PORT = 8285, 8472
# Deadlines for a busy machine. On an idle one, a pair with traffic is switched after 3 s, and a
# peer without traffic is reported after 15 s at most.
SWITCH_SECONDS = 60.0
RETURN_SECONDS = 120.0
REPORT_SECONDS = 60.0


def auto_cluster(lab, count=2, **what) -> Cluster:
    """Start nodes with both backends, and wait until each pair is measured by both."""
    cluster = Cluster(lab, count, config=VXLAN, options=["--backend=auto"], **what)
    cluster.start()
    all_reach_all(cluster.members)
    for member in cluster.members:
        wait_for(lambda m=member: measured(m, count - 1), f"{member.host.name} to measure")
    return cluster


def state_of(member: Member, peer: Member) -> dict:
    return next(one for one in member.ask_node()["peers"] if one["subnet"] == str(peer.subnet))


def measured(member: Member, count: int) -> bool:
    peers = member.ask_node()["peers"]
    return len(peers) == count and all(
        path["state"] == "reachable" for one in peers for path in one["paths"].values())


def block(member: Member, match: str) -> None:
    """Drop what matches and arrives on the host's underlay interface."""
    device = member.host.interfaces[0].name
    member.host.run(["nft", "-f", "-"], text=(
        "table inet block { chain arriving { type filter hook prerouting priority -300; "
        f"iifname {device} {match} drop; }}; }}"))


def unblock(member: Member) -> None:
    member.host.run(["nft", "delete table inet block"])


def switched(seconds: float, pairs, device: str) -> None:
    wait_for(lambda: all(device_to(*pair) == device for pair in pairs), f"{device}", seconds)


def test_filtered_vxlan_is_left_for_udp(lab):
    """All checks still pass, and a daemon that starts again keeps the choice."""
    a, b = auto_cluster(lab).members
    transfer = SteadyTransfer(a.pod, b.pod, b.pod_v4)
    block(b, f"udp dport {VXLAN_PORT}")
    switched(SWITCH_SECONDS, [(a, b), (b, a)], "udptun0")
    good, text = a.ready()
    assert good, text
    assert [check["name"] for check in a.ask_node()["checks"] if check["state"] != "ok"] == []
    pinging = SteadyPing(a.pod, b.pod_v4)
    a.stop()
    a.start()
    a.wait_ready()
    wait_for(lambda: state_of(a, b)["state"] == "reachable", "the measurement", REPORT_SECONDS)
    assert device_to(a, b) == "udptun0"
    assert state_of(a, b)["path"] == "udp"
    assert pinging.lost() == 0
    assert transfer.finish() > 0


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["both ways", "one way", "large only"])
def test_a_pair_leaves_vxlan_and_returns(lab, fault):
    """Only the affected pair changes its path, a transfer continues, and VXLAN is used again."""
    cluster = auto_cluster(lab, 3)
    a, b, third = cluster.members
    here = [(a, b), (b, a)]
    others = [(a, third), (third, a), (b, third), (third, b)]
    transfer = SteadyTransfer(a.pod, b.pod, b.pod_v4)
    from_a, from_b = (f"ip saddr {one.host.v4} udp dport {VXLAN_PORT}" for one in (a, b))
    block(b, f"{from_a} meta length > 1000" if fault == "large only" else from_a)
    if fault == "both ways":
        block(a, from_b)
    switched(SWITCH_SECONDS, here, "udptun0")
    peer = state_of(a, b)
    assert (peer["path"], peer["state"]) == ("udp", "reachable"), peer
    assert "VXLAN" in peer["path_reason"]
    assert [device_to(*pair) for pair in others] == ["flannel.1"] * 4
    unblock(b)
    if fault == "both ways":
        unblock(a)
    switched(RETURN_SECONDS, here, "flannel.1")
    assert transfer.finish() > 0
    for member in (a, b):
        lines = [line for line in member.daemon.text().splitlines() if " now use " in line]
        assert len(lines) == 2, lines
        assert [event["path"] for event in member.ask_node()["events"]
                if event["type"] == "path_changed"] == ["udp", "vxlan"]
        assert 'udptun_node_path_changes_total{path="udp"} 1.0' in member.metrics()
    assert not any(" now use " in line for line in third.daemon.text().splitlines())


@pytest.mark.slow
def test_a_pair_leaves_udp_if_udp_fails(lab):
    """VXLAN is filtered, then UDP too, then VXLAN works: it carries at once, without a hold."""
    cluster = auto_cluster(lab)
    a, b = cluster.members
    pairs = [(a, b), (b, a)]
    block(b, f"udp dport {VXLAN_PORT}")
    switched(SWITCH_SECONDS, pairs, "udptun0")
    unblock(b)
    block(b, f"udp dport {UDP_PORT}")
    switched(SWITCH_SECONDS, pairs, "flannel.1")
    all_reach_all(cluster.members)


@pytest.mark.slow
def test_a_dead_peer_is_reported_by_name(lab):
    """Both paths are lost: nothing changes, the peer is named, and the node stays ready."""
    cluster = auto_cluster(lab, 3)
    a, b, third = cluster.members
    b.host.ip(f"link set {b.host.interfaces[0].name} down")
    for member in (a, third):
        wait_for(lambda m=member: state_of(m, b)["state"] == "unreachable", "the verdict",
                 REPORT_SECONDS)
        good, text = member.ready()
        assert good, text
        assert f"{str(b.subnet).replace('/', '-')}: for " in text
        assert state_of(member, b)["path"] == "vxlan"
        assert 'udptun_node_paths{state="unreachable"} 1.0' in member.metrics()
    wait_for(lambda: not b.ready()[0], "the lonely node to be unready", 60)
    assert "no peer answers" in b.ready()[1]
    b.host.ip(f"link set {b.host.interfaces[0].name} up")
    for member in cluster.members:
        wait_for(lambda m=member: measured(m, 2), "all paths", 60)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["udp", "vxlan"])
def test_one_backend_measures_and_does_not_change_paths(lab, backend):
    cluster = Cluster(lab, 3, config=VXLAN, options=[f"--backend={backend}"])
    cluster.start()
    all_reach_all(cluster.members)
    a, b, _ = cluster.members
    wait_for(lambda: measured(a, 2), "the measurement")
    device = device_to(a, b)
    block(b, f"ip saddr {a.host.v4} udp dport {UDP_PORT if backend == 'udp' else VXLAN_PORT}")
    wait_for(lambda: state_of(a, b)["state"] == "unreachable", "the verdict", REPORT_SECONDS)
    assert device_to(a, b) == device
    assert a.ready()[0]
    unblock(b)
    wait_for(lambda: measured(a, 2), "the measurement", RETURN_SECONDS)


@pytest.mark.slow
def test_a_stock_peer_is_measured_by_echoes(lab):
    """A peer that drops echoes counts as reachable while its packets arrive."""
    cluster = Cluster(lab, 2, config=VXLAN, options=["--backend=auto"])
    ours, other = cluster.members
    stock = Stock(cluster, other)
    cluster.start([ours])
    stock.learn()

    def state() -> str:
        (peer,) = ours.ask_node()["peers"]
        return peer["state"]

    wait_for(lambda: state() == "reachable", "the echo", 30)
    assert ping(ours.pod, "10.244.200.2").received == 3
    stock.host.run(["nft", "-f", "-"], text=(
        "table inet block { chain c { type filter hook input priority -300; "
        "iifname flannel.1 icmp type echo-request ip daddr 10.244.200.0 drop; }; }"))
    wait_for(lambda: state() == "unreachable", "the verdict", REPORT_SECONDS)
    good, text = ours.ready()
    assert good, text
    assert "[!]peers" in text
    pinging = stock.pod.start(["ping", "-n", "-i", "0.2", str(ours.pod_v4)])
    wait_for(lambda: state() == "reachable", "its packets to be seen", 30)
    pinging.stop()
    wait_for(lambda: state() == "unreachable", "the verdict", REPORT_SECONDS)


def test_a_peer_behind_a_smaller_underlay_gets_large_packets_by_udp(lab):
    """VXLAN has no MTU for a single peer: large packets would be lost without an error."""
    cluster = Cluster(lab, 2, config=VXLAN, options=["--backend=auto"])
    a, b = cluster.members
    b.host.interfaces[0].set_mtu(1400)
    cluster.start()
    assert (a.env["FLANNEL_MTU"], b.env["FLANNEL_MTU"]) == ("1450", "1350")
    switched(SWITCH_SECONDS, [(a, b)], "udptun0")
    wait_for(lambda: ping(a.pod, b.pod_v4, count=1, size=1400).received, "a large answer")
    assert ping(b.pod, a.pod_v4, size=1300, df=True).received == 3
