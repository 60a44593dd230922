"""The effect of each masquerade rule on packets through a node."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from ipaddress import ip_address, ip_network

import pytest

from udptun.node.host.firewall import Firewall, FirewallRules

PORT = 9000


class Cluster:
    """world -- node -- peer, a pod behind the node, one address of another pod on the peer."""

    def __init__(self, lab, version):
        self.family = socket.AF_INET if version == 4 else socket.AF_INET6
        self.node, self.world, self.peer = (lab.host(name) for name in ("node", "world", "peer"))
        to_world, to_peer = lab.link(self.node, self.world).a, lab.link(self.node, self.peer).a
        self.pod = self.node.pod("10.42.0.0/24", "fc00:0:0:0::/64")
        self.peer.ip("address add 10.42.1.2/32 dev lo", "address add fc00:0:0:1::2/128 dev lo")
        self.node.ip(f"route add 10.42.1.0/24 via {self.peer.v4}",
                     f"route add fc00:0:0:1::/64 via {self.peer.v6}")
        # Both hosts have a route back to pods and nodes, with and without masquerading.
        for host, gateway in ((self.world, to_world), (self.peer, to_peer)):
            host.ip(f"route add default via {gateway.v4.ip}",
                    f"route add default via {gateway.v6.ip}")
        choose = (lambda end: end.v4.ip) if version == 4 else (lambda end: end.v6.ip)
        self.at = {
            "node": choose(to_world), "node to peer": choose(to_peer),
            "world": choose(self.world.interfaces[0]), "pod": choose(self.pod.interfaces[0]),
            "other pod": ip_address("10.42.1.2" if version == 4 else "fc00:0:0:1::2"),
        }
        self.host = {"node": self.node, "world": self.world, "pod": self.pod,
                     "other pod": self.peer}
        self.rules = FirewallRules(
            ip_network("10.42.0.0/16"), ip_network("10.42.0.0/24"),
            ip_network("fc00::/56"), ip_network("fc00:0:0:0::/64"), masquerade=True, forward=True,
        )

    def firewall(self):
        with self.node.inside():
            asyncio.run(Firewall(self.rules).sync())

    def source_seen(self, sender, receiver):
        """Send a datagram; return the name of the source address that ``receiver`` sees."""
        with contextlib.closing(self.host[receiver].socket(self.family, socket.SOCK_DGRAM)) as to, \
                contextlib.closing(self.host[sender].socket(self.family, socket.SOCK_DGRAM)) as out:
            to.settimeout(60)
            to.bind((str(self.at[receiver]), PORT))
            out.bind((str(self.at[sender]), 0))
            out.sendto(b"who am I?", (str(self.at[receiver]), PORT))
            seen = ip_address(to.recvfrom(100)[1][0])
        return next(name for name, address in self.at.items() if address == seen)


@pytest.fixture(params=[4, 6])
def cluster(lab, request):
    return Cluster(lab, request.param)


@pytest.mark.parametrize(("sender", "receiver", "without", "want"), [
    ("pod", "other pod", "pod", "pod"),  # my subnet to the cluster: return
    ("other pod", "pod", "other pod", "other pod"),  # the cluster to my subnet: return
    ("world", "pod", "world", "world"),  # from outside to my subnet: return
    ("pod", "world", "pod", "node"),  # the cluster to outside: masquerade
    ("node", "other pod", "node", "node to peer"),  # from outside to the cluster: masquerade
])
def test_which_packets_are_masqueraded(cluster, sender, receiver, without, want):
    assert cluster.source_seen(sender, receiver) == without
    cluster.firewall()
    assert cluster.source_seen(sender, receiver) == want


def test_packets_with_kube_proxys_mark_are_not_masqueraded_here(cluster):
    cluster.firewall()
    cluster.node.nft("""\
table inet proxy {
  chain prerouting {
    type filter hook prerouting priority mangle;
    meta mark set 0x4001
  }
}
""")
    assert cluster.source_seen("pod", "world") == "pod"
