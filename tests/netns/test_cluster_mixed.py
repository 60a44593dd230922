"""Clusters of different nodes: one that cannot create VXLAN devices, and a stock flannel node.

The stock node has what flannel leaves in the kernel and in etcd: a vxlan device with static
entries, and a lease. ``no_vxlan.c`` makes the kernel refuse vxlan to one process.
"""

import json
import subprocess
from pathlib import Path

import pytest

from tests.netns.cluster_traffic import all_reach_all
from tests.netns.netns_traffic import transfer_tcp
from udptun.lab import ping, wait_for
from udptun.lab.cluster import PREFIX, Cluster, Member, etcd_obstacle
from udptun.net.udp import keeps_marks, kernel_release

pytestmark = pytest.mark.skipif(etcd_obstacle() is not None, reason=str(etcd_obstacle()))

VXLAN = {"Network": "10.244.0.0/16", "Backend": {"Type": "vxlan"}}
UNDERLAY_MTU = 1500
VXLAN_OVERHEAD = 50


@pytest.fixture(scope="session")
def no_vxlan(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return the environment of a process for which the kernel has no vxlan."""
    built = tmp_path_factory.mktemp("preload") / "no_vxlan.so"
    source = Path(__file__).with_name("no_vxlan.c")
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", str(built), str(source)], check=True)
    return {"LD_PRELOAD": str(built)}


def device_to(member: Member, peer: Member) -> str:
    """Return the device of the route to a peer's pod, or "" without a route."""
    shown = member.host.run(["ip", "route", "get", str(peer.pod_v4)], check=False).stdout
    _, _, after = shown.partition(" dev ")
    return after.partition(" ")[0]


def lease_of(cluster: Cluster, member: Member) -> dict:
    return cluster.etcd.leases()[str(member.subnet).replace("/", "-")]


def test_no_vxlan_refuses_the_device_like_a_kernel_without_vxlan(lab, no_vxlan):
    """In the tests below, the kernel and not udptun must refuse the device."""
    host = lab.host("a")
    add = ["ip", "link", "add", "v0", "type", "vxlan", "id", "7", "dstport", "8472"]
    refused = host.run(add, check=False, env=no_vxlan)
    assert "Unknown device type" in refused.stderr
    host.run(add)


def test_one_node_without_vxlan(lab, no_vxlan):
    """Every node reaches every other; each pair uses the best backend that both have."""
    cluster = Cluster(lab, 3, config=VXLAN, options=["--backend=auto"])
    a, b, without = cluster.members
    without.environment = no_vxlan
    cluster.start()
    all_reach_all(cluster.members)
    assert (device_to(a, b), device_to(b, a)) == ("flannel.1", "flannel.1")
    assert (device_to(a, without), device_to(without, a), device_to(b, without)) == ("udptun0",) * 3
    # Nodes with both backends have the smaller MTU, so that a packet fits either path.
    mtu = UNDERLAY_MTU - VXLAN_OVERHEAD
    assert (a.env["FLANNEL_MTU"], b.env["FLANNEL_MTU"]) == (str(mtu), str(mtu))
    for source, target in ((a, b), (a, without), (without, a)):
        assert ping(source.pod, target.pod_v4, size=mtu - 28, df=True).received == 3
    transfer_tcp(without.pod, a.pod, a.pod_v4)
    # The lease advertises the backends, and the log has the reason once.
    lease = lease_of(cluster, a)
    assert lease["BackendType"] == "vxlan"
    assert lease["BackendData"]["VNI"] == 1
    features = ["ecn", "probe"] if keeps_marks(kernel_release()) else ["probe"]
    advert = {"port": 8285, "v": 1, "features": features}
    assert lease["BackendData"]["udptun"] == {**advert, "mtu": mtu}
    lease = lease_of(cluster, without)
    assert "BackendType" not in lease
    inner = int(without.env["FLANNEL_MTU"])
    assert lease["BackendData"] == {"udptun": {**advert, "mtu": inner}}
    lines = without.daemon.text().splitlines()
    (why,) = [line for line in lines if " WARNING " in line and "no VXLAN" in line]
    assert "Unknown device type" in why
    # The node gets vxlan, as with a new kernel: the pairs change to it.
    without.stop()
    without.environment = {}
    without.start()
    wait_for(
        lambda: device_to(a, without) == device_to(without, b) == "flannel.1", "VXLAN everywhere"
    )
    all_reach_all(cluster.members)


class Stock:
    """A stock flannel node with the vxlan backend: its device, its lease, its peers' entries."""

    def __init__(self, cluster: Cluster, member: Member) -> None:
        self.host, self._cluster = member.host, cluster
        self.subnet = "10.244.200.0/24"
        end = self.host.interfaces[0]
        self.host.ip(
            f"link add flannel.1 type vxlan id 1 dstport 8472 local {self.host.v4} "
            f"dev {end.name} nolearning",
            "address add 10.244.200.0/32 dev flannel.1", "link set flannel.1 up",
        )
        shown = self.host.run(["ip", "-j", "link", "show", "flannel.1"]).stdout
        self.mac = json.loads(shown)[0]["address"]
        cluster.etcd.put(f"{PREFIX}/subnets/{self.subnet.replace('/', '-')}", json.dumps({
            "PublicIP": str(self.host.v4), "PublicIPv6": None, "BackendType": "vxlan",
            "BackendData": {"VNI": 1, "VtepMAC": self.mac},
        }))
        self.pod = self.host.pod(self.subnet, mtu=1450)

    def learn(self) -> list[str]:
        """Add the entries of leases of type vxlan only, as flannel does; return their subnets."""
        known = []
        for key, lease in self._cluster.etcd.leases().items():
            subnet = key.replace("-", "/")
            if lease.get("BackendType") == "vxlan" and subnet != self.subnet:
                base, mac = subnet.split("/")[0], lease["BackendData"]["VtepMAC"]
                self.host.run(["bridge", "fdb", "replace", mac, "dev", "flannel.1",
                               "dst", lease["PublicIP"]])
                self.host.ip(
                    f"neigh replace {base} lladdr {mac} dev flannel.1 nud permanent",
                    f"route replace {subnet} via {base} dev flannel.1 onlink",
                )
                known.append(subnet)
        return known


def test_a_stock_flannel_node_in_the_middle(lab, no_vxlan):
    cluster = Cluster(lab, 3, config=VXLAN, options=["--backend=auto"])
    with_vxlan, without, third = cluster.members
    without.environment = no_vxlan
    stock = Stock(cluster, third)
    cluster.start([with_vxlan, without])
    all_reach_all([with_vxlan, without])
    assert stock.learn() == [str(with_vxlan.subnet)]
    assert ping(with_vxlan.pod, "10.244.200.2").received == 3
    assert ping(stock.pod, with_vxlan.pod_v4).received == 3
    # The node without vxlan reports the peer that it cannot reach, and why.
    assert ping(without.pod, "10.244.200.2", count=1, wait=0.5).received == 0
    _, report = without.ready()
    assert "10.244.200.0" in report
    assert "ignores" in report
    assert "10.244.200.0" in without.daemon.text()


def test_without_an_advertisement_the_lease_is_flannels(lab):
    cluster = Cluster(lab, 2, config=VXLAN, options=["--advertise=off"])
    cluster.start()
    all_reach_all(cluster.members)
    for key, value in cluster.etcd.under(f"{PREFIX}/subnets/").items():
        lease = json.loads(value)
        assert list(lease) == ["PublicIP", "PublicIPv6", "BackendType", "BackendData"], key
        assert list(lease["BackendData"]) == ["VNI", "VtepMAC"]
