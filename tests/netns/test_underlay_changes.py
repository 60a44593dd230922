"""The underlay changes while a tunnel is in use: MTU, address, link, default route. Nothing is
restarted: the same forwarder process follows."""

import json
import socket

import pytest

from tests.netns.cluster_traffic import SteadyPing, all_reach_all
from tests.netns.netns_traffic import assert_invariant, settled_packets
from tests.netns.test_takeover import take_over
from udptun.lab import pair, ping, wait_for
from udptun.lab.cluster import NETWORK_CONFIG, Cluster, Member, etcd_obstacle
from udptun.lab.tunnels import PORT

needs_etcd = pytest.mark.skipif(etcd_obstacle() is not None, reason=str(etcd_obstacle()))
OVERHEAD = {4: 28, 6: 48}


def mtu_of(host, device: str = "udptun0") -> int:
    return int(host.run(["cat", f"/sys/class/net/{device}/mtu"]).stdout)


def change_path_mtu(tunnel, mtu: int) -> None:
    """Change the MTU of both ends of the underlay, and wait until both forwarders know it."""
    for end in (tunnel.link.a, tunnel.link.b):
        end.set_mtu(mtu)
    for side in tunnel.sides:
        wait_for(lambda side=side: side.forwarder.status()["peers"][0]["path_mtu"] == mtu,
                 f"the path MTU {mtu}")


BOTH = pytest.mark.parametrize("outer", [4, pytest.param(6, marks=pytest.mark.slow)])


@BOTH
def test_a_forwarder_follows_the_mtu_of_the_underlay(lab, outer):
    tunnel = pair(lab, outer=outer)
    a, b = tunnel.sides
    processes = [side.forwarder.process.pid for side in tunnel.sides]
    for link_mtu in (1400, 1500, 9000):
        for end in (tunnel.link.a, tunnel.link.b):
            end.set_mtu(link_mtu)
        inner = link_mtu - OVERHEAD[outer]
        for side in tunnel.sides:
            wait_for(lambda host=side.host, inner=inner: mtu_of(host) == inner,
                     f"the TUN's MTU {inner}")
            status = side.forwarder.status()
            assert status["device"]["mtu"] == inner
            assert status["peers"][0]["path_mtu"] == link_mtu
        assert ping(a.host, b.v4, size=inner - 28, df=True).received == 3
        assert ping(b.host, a.v6, size=inner - 48, df=True).received == 3
    assert [side.forwarder.process.pid for side in tunnel.sides] == processes
    for side in tunnel.sides:
        assert_invariant(side.forwarder)


@pytest.mark.slow
def test_a_fixed_mtu_of_the_tun_stays(lab):
    """Only the limit of the path follows the underlay."""
    tunnel = pair(lab, mtu=1300)
    a, b = tunnel.sides
    for link_mtu in (1290, 1500):
        change_path_mtu(tunnel, link_mtu)
        assert ping(a.host, b.v4, size=min(1300, link_mtu - 28) - 28, df=True).received == 3
    assert [mtu_of(side.host) for side in tunnel.sides] == [1300, 1300]


@pytest.mark.slow
def test_probed_peers_follow_the_mtu_of_the_underlay(lab):
    tunnel = pair(lab, start=False)
    a, b = tunnel.sides
    for side, other in ((a, b), (b, a)):
        side.start(routes=[f"{route} probe" for route in side.routes_to(other)])
    for link_mtu in (1400, 1500):
        change_path_mtu(tunnel, link_mtu)
        wait_for(lambda link_mtu=link_mtu: ping(
            a.host, b.v4, size=link_mtu - 56, df=True).received == 3, "large packets to pass")


@BOTH
def test_a_link_goes_down_and_up(lab, outer):
    tunnel = pair(lab, outer=outer)
    a, b = tunnel.sides
    pid, end = a.forwarder.process.pid, tunnel.link.a
    a.host.ip(f"link set {end.name} down")  # the kernel removes the IPv6 addresses
    ping(a.pod, b.pod_v4, count=2, wait=0.3)
    a.host.ip(f"link set {end.name} up", f"address replace {end.v6} dev {end.name} nodad")
    wait_for(lambda: ping(a.pod, b.pod_v4, count=1, wait=1).received, "an answer")
    assert ping(b.pod, a.pod_v6).received == 3
    assert a.forwarder.process.alive
    assert a.forwarder.status()["pid"] == pid
    assert_invariant(a.forwarder)


def test_a_forwarder_moves_to_another_address(lab):
    """The request of the node daemon, on a forwarder with two workers."""
    tunnel = pair(lab, workers=2)
    a, b = tunnel.sides
    assert ping(a.pod, b.pod_v4).received == 3
    before = settled_packets(a.forwarder)
    end = tunnel.link.a
    new, old = end.v4.network[7], end.v4.ip
    length = end.v4.network.prefixlen
    a.host.ip(f"address del {old}/{length} dev {end.name}",
              f"address add {new}/{length} dev {end.name}")
    for body, field in (
        ({"listen": [f"[{end.v6.ip}]:8285"]}, "listen"),
        ({"listen": ["198.18.255.1:8285"]}, "198.18.255.1"),
        ({"mtu": 5}, "mtu"), ({"mtu": 70000}, "mtu"), ({"mtu": "x"}, "mtu"),
        ({"listen": 7}, "listen"),
        ({"tun": "x"}, "mtu"), ({}, "mtu"), ({"mtu": True}, "mtu"),
    ):
        status, answer = a.forwarder.request("PUT", "/v1/device", json.dumps(body).encode())
        assert status in (400, 409), (body, answer)
        assert field in answer["error"]["message"], answer
    status, answer = a.forwarder.request(
        "PUT", "/v1/device", json.dumps({"listen": [f"{new}:8285"], "mtu": 1400}).encode())
    assert (status, answer) == (200, {"mtu": 1400, "listen": [f"{new}:8285"]})
    for route in b.routes_to(a):
        dst = route.split()[0]
        b.forwarder.udptun("route", "replace", dst, "via", str(new))
    assert ping(a.pod, b.pod_v4).received == 3
    assert ping(b.pod, a.pod_v6).received == 3
    assert a.forwarder.status()["device"]["listen"] == [f"{new}:8285"]
    assert mtu_of(a.host) == 1400
    after = settled_packets(a.forwarder)
    assert after["encap"]["delivered"] >= before["encap"]["delivered"] + 6
    assert_invariant(a.forwarder)
    a.host.ip(f"address add {old}/{length} dev {end.name}")
    a.host.socket(socket.AF_INET, socket.SOCK_DGRAM).bind((str(old), PORT))  # nobody has it
    take_over(a, listen=[new], mtu=1400)
    wait_for(lambda: ping(a.pod, b.pod_v4).received == 3, "answers")


@pytest.fixture(params=["spawned", pytest.param("external", marks=pytest.mark.slow)])
def cluster(lab, request):
    return started(Cluster(lab, 2, external=request.param == "external",
                           options=["--address-grace=1s"]))


def started(cluster):
    for member in cluster.members:
        member.choose = True
        add_default_route(cluster, member)
    cluster.start()
    all_reach_all(cluster.members)
    return cluster


def add_default_route(cluster, member):
    end, gateway = member.host.interfaces[0], cluster.etcd.host
    member.host.ip(f"route replace default via {gateway.v4} dev {end.name}",
                   f"route replace default via {gateway.v6} dev {end.name}")


def running(member: Member) -> tuple[int, str]:
    """Return the forwarder's process and the index of its TUN."""
    return (member.forwarder_pid(),
            member.host.run(["cat", "/sys/class/net/udptun0/ifindex"]).stdout)


@needs_etcd
def test_a_node_follows_the_mtu_of_the_underlay(cluster):
    a, b = cluster.members
    had = [running(one) for one in cluster.members]
    steady = SteadyPing(a.pod, b.pod_v4)
    for link_mtu in (1400, 1500):
        for member in cluster.members:
            member.host.interfaces[0].set_mtu(link_mtu)
        for member in cluster.members:
            inner = link_mtu - 28
            wait_for(lambda member=member, inner=inner: mtu_of(member.host) == inner
                     and member.env["FLANNEL_MTU"] == str(inner), f"the MTU {inner}")
            wait_for(lambda member=member: member.ready()[0], "the node to be ready")
    assert [running(one) for one in cluster.members] == had
    assert steady.lost() == 0


@needs_etcd
def test_a_node_gets_another_address(cluster):
    """As after a DHCP renewal. The lease, the forwarder and the other node follow."""
    a, b = cluster.members
    had, sent = running(a), a.ask("/v1/status")["packets"]["encap"]["read"]
    end = a.host.interfaces[0]
    old, new, length = end.v4.ip, end.v4.network[77], end.v4.network.prefixlen
    a.host.ip(f"address del {old}/{length} dev {end.name}",
              f"address add {new}/{length} dev {end.name}")
    add_default_route(cluster, a)
    key = str(a.subnet).replace("/", "-")
    wait_for(lambda: cluster.etcd.leases()[key]["PublicIP"] == str(new), "the lease")
    wait_for(lambda: any(route.endswith(f"via {new}") for route in b.routes()), "the route")
    all_reach_all(cluster.members)
    assert running(a) == had
    assert a.ask("/v1/status")["packets"]["encap"]["read"] > sent
    for member in cluster.members:
        member.wait_ready()


@needs_etcd
@pytest.mark.slow
def test_the_ipv6_default_route_is_away_for_some_seconds(lab):
    """A router advertisement is late. The node keeps its choice, and says so."""
    cluster = started(Cluster(lab, 2, config=NETWORK_CONFIG | {
        "EnableIPv6": True, "IPv6Network": "fd00:10:244::/56"}))
    a, b = cluster.members
    had = running(a)
    steady = SteadyPing(a.pod, b.pod_v4), SteadyPing(b.pod, a.pod_v6)
    a.host.run(["ip", "-6", "route", "del", "default"])
    a.daemon.wait_for_output("the former choice is kept")
    add_default_route(cluster, a)
    wait_for(lambda: a.ready()[0], "the node to be ready")
    assert [each.lost() for each in steady] == [0, 0]
    assert running(a) == had
