"""Clusters of three and of ten nodes: real etcd; a daemon, a forwarder and a pod on each node.

No packet between the other nodes is lost while nodes join, leave and change address. The cluster of
ten is in `make test-all`.
"""

import pytest

from tests.netns.cluster_traffic import SteadyPing, SteadyTransfer, all_reach_all
from udptun.lab import ping, wait_for
from udptun.lab.cluster import Cluster, Member, etcd_obstacle

pytestmark = pytest.mark.skipif(etcd_obstacle() is not None, reason=str(etcd_obstacle()))


def leave(cluster: Cluster, member: Member) -> None:
    """Decommission a node: clean up its host, and delete its lease."""
    subnet = member.subnet
    member.remove_pod()
    member.clean_up()
    cluster.etcd.revoke(subnet)


def die(cluster: Cluster, member: Member) -> None:
    """Cut a node off; its lease expires."""
    member.host.ip(f"link set {member.host.interfaces[0].name} down")
    cluster.etcd.revoke(member.subnet)


def renumber(member: Member) -> str:
    """Replace the node's address, as DHCP may do; return the new one."""
    end = member.host.interfaces[0]
    fresh = str(end.v4.network[200])
    member.host.ip(
        f"address del {end.v4} dev {end.name}",
        f"address add {fresh}/{end.v4.network.prefixlen} dev {end.name}",
    )
    return fresh


def test_three_nodes(lab):
    cluster = Cluster(lab, 3)
    cluster.start()
    a, b, _ = cluster.members
    all_reach_all(cluster.members)
    published = {lease["PublicIP"] for lease in cluster.etcd.leases().values()}
    assert published == {str(member.host.v4) for member in cluster.members}
    assert len({member.subnet for member in cluster.members}) == 3
    # what flannel's CNI plugin reads
    assert list(a.env) == ["FLANNEL_NETWORK", "FLANNEL_SUBNET", "FLANNEL_MTU", "FLANNEL_IPMASQ"]
    assert a.env["FLANNEL_NETWORK"] == "10.244.0.0/16"
    # hosts reach pods, too
    assert ping(a.host, b.pod_v4).received == 3


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_ten_nodes_that_come_and_go(lab):
    cluster = Cluster(lab, 10)
    early, late = cluster.members[:7], cluster.members[7:]
    cluster.start(early)
    all_reach_all(early)
    steady = SteadyPing(early[0].pod, early[1].pod_v4)
    transfer = SteadyTransfer(early[2].pod, early[1].pod, early[1].pod_v4)

    cluster.start(late)  # together
    all_reach_all(cluster.members)

    gone, dead, moved = cluster.members[3], cluster.members[9], cluster.members[5]
    leave(cluster, gone)
    die(cluster, dead)
    rest = [member for member in cluster.members if member not in (gone, dead)]
    for member in rest:
        wait_for(lambda m=member: len(m.routes()) == len(rest) - 1, "the routes of two to go")
    all_reach_all(rest)

    subnet = moved.subnet
    route = f"{subnet} via {renumber(moved)}"
    for member in rest:
        if member is not moved:
            wait_for(lambda m=member: route in m.routes(), f"{route} on {member.host.name}")
    all_reach_all(rest)
    assert moved.subnet == subnet

    gone.start()
    gone.wait_ready()
    gone.add_pod()
    all_reach_all([*rest, gone])

    assert steady.lost() == 0
    assert transfer.finish() > 0
