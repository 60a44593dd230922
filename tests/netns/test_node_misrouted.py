"""A node names the routes and rules of its host that keep packets out of the tunnel."""

from __future__ import annotations

import pytest

from tests.netns.cluster_traffic import all_reach_all
from udptun.lab import Lab, wait_for
from udptun.lab.cluster import Cluster

# By act: its command, the command that undoes it, and what the check must name.
ACTS = {
    "more specific route": (
        "ip route add {subnet} dev other", "ip route del {subnet} dev other",
        "{subnet} do not enter the overlay: they take the route {subnet} dev other"),
    "route to a part of the subnet": (
        "ip route add {pod}/32 dev other", "ip route del {pod}/32 dev other",
        "{pod}/32 do not enter the overlay: they take the route {pod}/32 dev other"),
    "blackhole": (
        "ip route add blackhole {subnet}", "ip route del blackhole {subnet}",
        "they take the route blackhole {subnet}"),
    "policy rule": (
        "ip route add {subnet} dev other table 77; ip rule add to {subnet} lookup 77",
        "ip rule del to {subnet} lookup 77; ip route flush table 77",
        "they take the route {subnet} dev other table 77"),
    "rule for our pods": (
        "ip route add default dev other table 78; ip rule add from {own} lookup 78",
        "ip rule del from {own} lookup 78; ip route flush table 78",
        "they take the route 0.0.0.0/0 dev other table 78"),
    "endpoint in the overlay": (
        "ip route add {endpoint}/32 dev DEV", "ip route del {endpoint}/32 dev DEV",
        "{endpoint} enter DEV and so the overlay itself, by the route {endpoint}/32 dev DEV"),
    "endpoint through another interface": (
        "ip route add {endpoint}/32 dev other", "ip route del {endpoint}/32 dev other",
        "{endpoint} leave through other instead of UNDERLAY, by the route {endpoint}/32 dev other"),
}


@pytest.fixture(scope="module", params=["udp", "vxlan"])
def cluster(request):
    with Lab() as lab:
        cluster = Cluster(lab, 2, options=[f"--backend={request.param}"])
        cluster.device = {"udp": "udptun0", "vxlan": "flannel.1"}[request.param]
        cluster.start()
        all_reach_all(cluster.members)
        cluster.members[0].host.ip(
            "link add other type veth peer name far", "link set other up", "link set far up")
        yield cluster


@pytest.mark.parametrize("name", list(ACTS))
def test_a_misrouted_peer_is_named(cluster, name):
    node, other = cluster.members
    if cluster.device == "flannel.1" and name in ("more specific route", "blackhole"):
        # The route to the peer's subnet is ours here, and the daemon takes it back.
        node.host.run(ACTS[name][0].replace("add", "replace").format(subnet=other.subnet).split())
        wait_for(lambda: "flannel.1" in node.host.run(
            ["ip", "route", "show", str(other.subnet)]).stdout, "our route")
        return
    underlay = node.host.interfaces[0].name
    do, undo, named = (
        text.replace("DEV", cluster.device).replace("UNDERLAY", underlay).format(
            subnet=other.subnet, pod=other.pod_v4, own=node.subnet, endpoint=other.host.v4)
        for text in ACTS[name])
    node.host.run(["sh", "-c", do])
    try:
        wait_for(lambda: named in node.ready()[1], f"{named!r} in the checks", 60)
        assert "[!]host" in node.ready()[1]
        assert named in node.daemon.text()
    finally:
        node.host.run(["sh", "-c", undo])
    wait_for(lambda: "[+]host" in node.ready()[1], "the check to pass again", 60)


def test_rules_that_drop_the_tunnels_datagrams_are_named(cluster):
    node, _ = cluster.members
    port = {"udptun0": 8285, "flannel.1": 8472}[cluster.device]
    node.host.nft("table inet strict {\nchain in {\ntype filter hook input priority 0\n"
                  f"udp dport {port} drop\n}}\n}}\n")
    named = f"(UDP {port}) are dropped by nftables, table inet strict, chain in: drop"
    try:
        wait_for(lambda: named in node.ready()[1], f"{named!r} in the checks")
    finally:
        node.host.nft("delete table inet strict\n")
    wait_for(lambda: "[+]firewall" in node.ready()[1], "the check to pass again")
