"""Nodes of a hosts file probe each other. A peer in the file that answers no probes gets echoes."""

from __future__ import annotations

from typing import Any

import pytest

from tests.netns.hosts_file import write
from udptun.lab import OnePacket, ping, wait_for
from udptun.lab.cluster import Member, start_all

MIDDLE = 1400
STEP = 8  # the search for the largest size ends when its bounds are this close


def the_peer(member: Member) -> dict[str, Any]:
    """Return what the forwarder reports about its only peer."""
    (peer,) = member.ask("/v1/peers")["peers"]
    return peer


def states(member: Member) -> list[str]:
    """Return the state of each peer, as the node reports it."""
    return [peer["state"] for peer in member.ask_node()["peers"]]


def test_two_nodes_of_a_file_find_the_size_that_a_silent_path_carries(lab):
    hosts = [lab.host("n1"), lab.host("n2")]
    link = lab.link(*hosts, middle_mtu=1500)
    option = write(lab, hosts)
    members = [Member(host, [option], (f"--node-name={host.name}",)) for host in hosts]
    start_all(members)
    for member in members:
        wait_for(lambda member=member: the_peer(member)["path_mtu_source"] == "probe", "an answer")
        assert the_peer(member)["probe"]["state"] == "reachable"
    for router in link.routers:  # they report no size to the nodes
        router.nft("table ip silent {\n chain c {\n  type filter hook output priority 0;\n"
                   "  icmp type destination-unreachable drop\n }\n}\n")
    link.set_middle_mtu(MIDDLE)
    a, b = members
    load = a.pod.start(["ping", "-q", "-i", "0.2", "-s", "1400", str(b.pod_v4)])
    for member in members:
        wait_for(lambda member=member: MIDDLE - STEP < the_peer(member)["path_mtu"] <= MIDDLE,
                 "the size", 60)
    load.stop()
    # Not from the pod, whose kernel keeps a smaller size that was believed during the search.
    assert ping(a.host, b.pod_v4, size=MIDDLE - STEP - 28 - 28, df=True).received == 3


@pytest.mark.parametrize("said", [pytest.param(True, marks=pytest.mark.slow), False])
def test_a_peer_that_answers_no_probes_is_reachable_by_echoes(lab, onepacket, said):
    """The peer is not udptun. The file says so, or it does not."""
    hosts = [lab.host("n1"), lab.host("stock")]
    lab.link(*hosts)
    option = write(lab, hosts, *(["probe = false"] if said else []))
    node = Member(hosts[0], [option], ("--node-name=n1",))
    node.start()
    peer = OnePacket.start(hosts[1], onepacket, address="10.244.2.0",
                           routes=[f"10.244.1.0/24={hosts[0].v4}:8285"])
    node.wait_ready(30)
    wait_for(lambda: states(node) == ["reachable"], "an echo", 60)
    text = "10.244.2.0/24 answers echoes, but no probes"
    if said:
        assert the_peer(node)["probe"] is None
    else:
        node.daemon.wait_for_output(text)
        assert the_peer(node)["probe"]["state"] == "unreachable"
    assert ping(hosts[0], "10.244.2.0").received == 3
    assert node.daemon.text().count(text) == (0 if said else 1)
    if said:
        peer.process.stop()
        wait_for(lambda: states(node) == ["unreachable"], "its end", 60)
