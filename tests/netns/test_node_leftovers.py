"""What a former flanneld has left on a host is removed, unless it may be in use."""

from __future__ import annotations

import shutil

import pytest

from tests.netns.cluster_traffic import all_reach_all
from udptun.lab import wait_for
from udptun.lab.cluster import Cluster

NETWORK = "10.244.0.0/16"
# As flannel writes them; the node had another subnet then.
IPTABLES = f"""\
*nat
:FLANNEL-POSTRTG - [0:0]
-A POSTROUTING -m comment --comment "flanneld masq" -j FLANNEL-POSTRTG
-A FLANNEL-POSTRTG -m mark --mark 0x4000/0x4000 -m comment --comment "flanneld masq" -j RETURN
-A FLANNEL-POSTRTG -s 10.244.99.0/24 -d {NETWORK} -m comment --comment "flanneld masq" -j RETURN
-A FLANNEL-POSTRTG -s {NETWORK} -d 10.244.99.0/24 -m comment --comment "flanneld masq" -j RETURN
-A FLANNEL-POSTRTG ! -s {NETWORK} -d 10.244.99.0/24 -m comment --comment "flanneld masq" -j RETURN
-A FLANNEL-POSTRTG -s {NETWORK} ! -d 224.0.0.0/4 -m comment --comment "flanneld masq" -j MASQUERADE
-A FLANNEL-POSTRTG ! -s {NETWORK} -d {NETWORK} -m comment --comment "flanneld masq" -j MASQUERADE
COMMIT
*filter
:FLANNEL-FWD - [0:0]
-A FORWARD -m comment --comment "flanneld forward" -j FLANNEL-FWD
-A FLANNEL-FWD -s {NETWORK} -m comment --comment "flanneld forward" -j ACCEPT
-A FLANNEL-FWD -d {NETWORK} -m comment --comment "flanneld forward" -j ACCEPT
COMMIT
"""
NFTABLES = f"""\
table ip flannel-ipv4 {{
  chain postrtg {{
    type nat hook postrouting priority srcnat; policy accept;
    meta mark 0x4000 return
    ip saddr 10.244.99.0/24 ip daddr {NETWORK} return
    ip saddr {NETWORK} ip daddr != 224.0.0.0/4 masquerade fully-random
  }}
}}
"""


def leave(host, network=NETWORK, address="10.244.99.0"):
    """Leave on the host what flanneld leaves."""
    host.ip(
        "link add flannel.1 type vxlan id 1 dstport 8472 dev eth0 nolearning",
        f"address add {address}/32 dev flannel.1", "link set flannel.1 up",
        *(f"route add 10.244.{n}.0/24 via 10.244.{n}.0 dev flannel.1 onlink" for n in range(1, 60)),
    )
    host.nft(NFTABLES.replace(NETWORK, network))
    if shutil.which("iptables-nft-restore"):
        host.run(["iptables-nft-restore", "-n"], text=IPTABLES.replace(NETWORK, network))


def leftovers(host):
    """Return the names of the leftovers that are still there."""
    there = host.run(["nft", "list", "ruleset"]).stdout + \
        host.run(["ip", "-o", "link", "show", "type", "vxlan"]).stdout
    return {name for name in (
        "flannel.1", "flannel-ipv4", "FLANNEL-POSTRTG", "FLANNEL-FWD") if name in there}


def test_leftovers_are_removed(lab):
    cluster = Cluster(lab, 2, options=["--backend=udp"])
    node, _ = cluster.members
    leave(node.host)
    assert {"flannel.1", "flannel-ipv4"} <= leftovers(node.host)
    cluster.start()
    all_reach_all(cluster.members)
    assert leftovers(node.host) == set()
    assert "removed flannel.1, which a former flannel has left" in node.daemon.text()
    # Also if they appear later.
    node.host.ip("link add flannel.1 type vxlan id 1 dstport 8472 dev eth0 nolearning",
                 "address add 10.244.99.0/32 dev flannel.1", "link set flannel.1 up",
                 "route add 10.244.98.0/24 dev flannel.1")
    node.host.nft(NFTABLES)
    wait_for(lambda: not leftovers(node.host), "the device and the table to be removed")


@pytest.mark.parametrize("why", [
    "runs",
    pytest.param("keep", marks=pytest.mark.slow),
    pytest.param("another network", marks=pytest.mark.slow),
])
def test_leftovers_stay(lab, why):
    cluster = Cluster(lab, 1, options=["--backend=udp"])
    (node,) = cluster.members
    if why == "another network":
        leave(node.host, "10.245.0.0/16", "10.245.99.0")
    else:
        leave(node.host)
    before = leftovers(node.host)
    if why == "keep":
        node.options += ("--keep-flannel",)
    if why == "runs":
        flanneld = lab.folder / "flanneld"
        shutil.copy(shutil.which("sleep"), flanneld)
        node.host.start([str(flanneld), "1000"])
    node.start()
    node.wait_ready()
    assert leftovers(node.host) == before
    if why == "runs":
        # The daemon has fewer privileges than this process, so it cannot read where it runs.
        assert "flanneld runs, and its network namespace cannot be read" in node.daemon.text()
