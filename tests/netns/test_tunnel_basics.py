"""A tunnel with all features on: pings between hosts and pods, traceroute and tcpdump."""

import json
from collections.abc import Iterator

import pytest

from udptun.lab import Lab, Pair, node, pair, ping


@pytest.fixture(scope="module", params=[4, 6], ids=["outer4", "outer6"])
def tunnel(request) -> Iterator[Pair]:
    with Lab() as lab:
        yield pair(lab, outer=request.param)


def test_ping_between_nodes_and_pods(tunnel):
    a, b = tunnel.sides
    for host, addresses in (
        (a.host, (b.v4, b.v6, b.pod_v4, b.pod_v6)),
        (a.pod, (b.v4, b.v6, b.pod_v4, b.pod_v6)),
        (b.pod, (a.v4, a.v6, a.pod_v4, a.pod_v6)),
    ):
        for address in addresses:
            result = ping(host, address, count=3)
            assert result.received == 3, f"{host.name} -> {address}: {result}"


def test_traceroute_shows_both_ends_of_the_tunnel(tunnel):
    a, b = tunnel.sides
    gateway4, gateway6 = a.node.subnet[1], a.node.subnet6[1]
    # Each forwarder is a hop, and so is each node's kernel if it forwards for a pod. The remote
    # node appears twice: its forwarder answers the probe whose hop limit expires there, and its
    # kernel answers the next probe.
    for host, target, hops in (
        (a.host, b.v4, [a.v4, b.v4, b.v4]),
        (a.host, b.v6, [a.v6, b.v6, b.v6]),
        (a.pod, b.pod_v4, [gateway4, a.v4, b.v4, b.v4, b.pod_v4]),
        (a.pod, b.pod_v6, [gateway6, a.v6, b.v6, b.v6, b.pod_v6]),
    ):
        assert traceroute(host, target) == [str(hop) for hop in hops], f"{host.name} -> {target}"


def traceroute(host, target) -> list[str]:
    done = host.run(["traceroute", "-n", "-q", "1", "-w", "2", "-m", "8", str(target)])
    return [line.split()[1] for line in done.stdout.splitlines()[1:]]


def test_a_packet_without_a_route_causes_an_icmp_error_to_its_sender(tunnel):
    a = tunnel.a
    absent = node(77)
    for host in (a.host, a.pod):
        result = ping(host, absent.v4, count=2, wait=1)
        assert any(f"From {a.v4}" in e and "Net Unreachable" in e for e in result.errors), result
        result = ping(host, absent.v6, count=2, wait=1)
        assert any(f"From {a.v6}" in e and "No route" in e for e in result.errors), result
    assert a.forwarder.drops()["encap", "no_route"] >= 4
    verdict = json.loads(a.forwarder.udptun("trace", str(absent.v4), "-o", "json").stdout)
    assert (verdict["verdict"], verdict["reason"]) == ("drop", "no_route")


def test_status_counts_the_packets_of_a_peer(tunnel):
    a, b = tunnel.sides
    before = peer(a.forwarder.status())
    assert ping(a.host, b.v4, count=5).received == 5
    after = peer(a.forwarder.status())
    for direction in ("encap", "decap"):
        assert after[direction]["packets"] - before[direction]["packets"] == 5
        # An echo of ping's 56 bytes is 84 bytes of IP.
        assert after[direction]["bytes"] - before[direction]["bytes"] == 5 * 84
    assert sorted(after["subnets"]) == sorted([str(b.node.subnet), str(b.node.subnet6)])
    assert after["path_mtu"] == 1500


def peer(status):
    (only,) = status["peers"]
    return only
