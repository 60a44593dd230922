"""The look at the routes to many peers, and the changes that are a reason for it."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from dataclasses import replace

import pytest

from tests.own_netns import in_own_netns, sh
from udptun.leases.base import Attributes, Lease, Subnets
from udptun.net.netlink import Netlink
from udptun.node.host.misrouted import PEERS_N, Misrouted, Outer
from udptun.node.host.watch import HostWatch

NETWORK = ipaddress.ip_network("10.0.0.0/8")
OWN = ipaddress.ip_network("10.255.255.0/24")


def leases(n):
    subnets = [ipaddress.ip_network((int(NETWORK.network_address) + (1 + i << 8), 24))
               for i in range(n)]
    first = ipaddress.ip_address("198.18.0.2")
    return [Lease(str(subnet).replace("/", "-"), Subnets(subnet), Attributes(first + i))
            for i, subnet in enumerate(subnets)]


def make_devices():
    sh("sysctl -qw net.ipv6.conf.default.disable_ipv6=1",  # it adds addresses on its own
       "ip link add overlay0 type veth peer name underlay0", "ip link set overlay0 up",
       "ip link set underlay0 up", "ip addr add 10.255.255.0/32 dev overlay0",
       "ip addr add 198.18.0.1/15 dev underlay0", "ip route add 10.0.0.0/8 dev overlay0")


@in_own_netns
async def test_a_check_of_all_peers_finds_every_wrong_route():
    make_devices()
    peers = leases(2 * PEERS_N + 10)
    # A policy rule: it is not in the list of the main table's routes, so each peer must be asked.
    sh("ip route add default dev underlay0 table 77",
       *(f"ip rule add to {lease.subnets.v4} lookup 77" for lease in (peers[0], peers[-1])))
    wrong = [peers[0].key, peers[-1].key]
    devices = {socket.if_nametoindex("overlay0")}
    with Netlink() as netlink:
        misrouted = Misrouted(netlink)
        await misrouted.look(peers, [OWN], devices, [NETWORK], direct=False, everyone=True)
        assert list(misrouted.found) == wrong
        assert misrouted.found[wrong[1]] == (
            f"packets to {peers[-1].subnets.v4} do not enter the overlay: "
            "they take the route 0.0.0.0/0 dev underlay0 table 77")

        # A look at a part keeps what is known of the others.
        sh(*(f"ip rule del to {lease.subnets.v4} lookup 77" for lease in (peers[0], peers[-1])))
        while peers[-1].key in misrouted.found:
            before = dict(misrouted.found)
            await misrouted.look(peers, [OWN], devices, [NETWORK], direct=False, everyone=False)
            assert misrouted.found.items() <= before.items()
        while misrouted.found:
            await misrouted.look(peers, [OWN], devices, [NETWORK], direct=False, everyone=False)


@in_own_netns
@pytest.mark.parametrize("cause", ["route", "rule for our source", "rule for our mark"])
async def test_a_silent_peer_whose_datagrams_leave_elsewhere_is_named(cause):
    make_devices()
    peers = leases(PEERS_N + 2)
    to = peers[-1].attributes.public_ip
    commands = {
        "route": [f"ip route add {to}/32 dev wg9"],
        "rule for our source": ["ip rule add from 198.18.0.1 lookup 79"],
        "rule for our mark": ["ip rule add fwmark 0x42 lookup 79"],
    }[cause]
    sh("ip link add wg9 type veth peer name far", "ip link set wg9 up", "ip link set far up",
       f"ip route add {to}/32 dev wg9 table 79", *commands)
    outer = Outer(socket.if_nametoindex("underlay0"),
                  {4: ipaddress.ip_address("198.18.0.1")}, 0x42, {peers[-1].key})
    table = "" if cause == "route" else " table 79"
    with Netlink() as netlink:
        misrouted = Misrouted(netlink)

        async def look(outer):
            await misrouted.look(peers, [OWN], {socket.if_nametoindex("overlay0")}, [NETWORK],
                                 direct=False, everyone=False, outer=outer)
            return misrouted.found

        assert await look(outer) == {
            peers[-1].key: f"it does not answer, and packets to its address {to} leave through "
                           f"wg9 instead of underlay0, by the route {to}/32 dev wg9{table}"}
        assert await look(replace(outer, silent=())) == {}  # it answers: several uplinks
        assert await look(replace(outer, device=0)) == {}


@in_own_netns
@pytest.mark.parametrize("used", ["wg9", "underlay0", "overlay0"])
async def test_a_silent_peer_behind_an_interface_with_answering_peers_is_not_misrouted(used):
    """Several uplinks, or the node's address is on a device that sends no packets."""
    make_devices()
    peers = leases(3)
    sh("ip link add wg9 type veth peer name far", "ip link set wg9 up", "ip link set far up")
    sh(*(f"ip route add {peer.attributes.public_ip}/32 dev wg9" for peer in peers[1:]),
       f"ip route add {peers[0].attributes.public_ip}/32 dev {used}")
    outer = Outer(socket.if_nametoindex("underlay0"), {}, 0, {peers[-1].key}, {peers[0].key})
    with Netlink() as netlink:
        misrouted = Misrouted(netlink)
        await misrouted.look(peers, [OWN], set(), [], direct=False, everyone=True, outer=outer)
    assert [*misrouted.found] == ([] if used == "wg9" else [peers[-1].key])


@in_own_netns
@pytest.mark.parametrize("route", [None, "default dev dummy0 metric 9", "198.51.100.0/24"])
async def test_a_device_without_routes_is_not_expected_to_send(route):
    """The host announces its address to routers, and sends through another interface."""
    make_devices()
    sh("ip link add dummy0 type veth peer name dummy1",  # not all kernels have dummy devices
       "sysctl -qw net.ipv6.conf.dummy0.disable_ipv6=0", "ip link set dummy1 up",
       "ip link set dummy0 up", "ip addr add 192.0.2.1/32 dev dummy0",
       "ip addr add 2001:db8::1/128 dev dummy0 nodad", *(
           [] if route is None else [f"ip route add {route} dev dummy0".replace(
               "dev dummy0 metric 9 dev dummy0", "dev dummy0 metric 9")]))
    (peer,) = leases(1)
    outer = Outer(socket.if_nametoindex("dummy0"), {4: ipaddress.ip_address("192.0.2.1")}, 0,
                  {peer.key})
    with Netlink() as netlink:
        misrouted = Misrouted(netlink)
        await misrouted.look([peer], [OWN], set(), [], direct=False, everyone=True, outer=outer)
    assert bool(misrouted.found) == (route is not None)


@in_own_netns
@pytest.mark.parametrize(("version", "source"), [(4, "198.18.0.1"), (6, "fd00:9::1")])
async def test_an_address_that_the_host_has_lost_is_not_a_fault_of_the_routes(version, source):
    """The check of the interface reports it. A route that drops packets is a fault."""
    make_devices()
    public = {4: "203.0.113.1", 6: "2001:db8::2"}[version]
    via6 = "ip -6 route add default dev underlay0"
    sh("sysctl -qw net.ipv6.conf.underlay0.disable_ipv6=0",
       "ip addr add fd00:9::1/64 dev underlay0 nodad", "ip route add default dev underlay0", via6)
    address = ipaddress.ip_address(public)
    peer = Lease("n2", Subnets(leases(1)[0].subnets.v4), Attributes(
        address if version == 4 else None, address if version == 6 else None))
    outer = Outer(socket.if_nametoindex("underlay0"),
                  {version: ipaddress.ip_address(source)}, 0, {peer.key})

    with Netlink() as netlink:
        misrouted = Misrouted(netlink)

        async def look():
            await misrouted.look([peer], [OWN], set(), [], direct=False, everyone=True, outer=outer)
            return misrouted.found

        assert await look() == {}
        flag = "-6" if version == 6 else "-4"
        for drop, undo in (
            (f"route add blackhole {public}", f"route del blackhole {public}"),
            (f"rule add from {source} blackhole", f"rule del from {source} blackhole"),
        ):
            sh(f"ip {flag} {drop}")
            assert f"there is no route to its address {public}: " in (await look())["n2"]
            sh(f"ip {flag} {undo}")
            assert await look() == {}
        sh(f"ip addr del {source}/{15 if version == 4 else 64} dev underlay0")
        assert await look() == {}  # IPv4: the kernel has removed the default route too
        outer = replace(outer, sources={})
        if version == 6:
            sh("ip -6 route del default dev underlay0")
        assert f"there is no route to its address {public}: " in (await look())["n2"]


@in_own_netns
async def test_the_route_of_ipv6_packets_is_named():
    sh("ip link add overlay0 type veth peer name underlay0", "ip link set overlay0 up",
       "ip link set underlay0 up", "ip addr add fd00:1::/128 dev overlay0 nodad",
       "ip route add fd00::/16 dev overlay0", "ip route add fd00:2::/64 dev underlay0 table 77",
       "ip -6 rule add to fd00:2::/64 lookup 77")
    peer = Lease("n2", Subnets(None, ipaddress.ip_network("fd00:2::/64")), Attributes())
    with Netlink() as netlink:
        misrouted = Misrouted(netlink)
        await misrouted.look(
            [peer], [ipaddress.ip_network("fd00:1::/64")], {socket.if_nametoindex("overlay0")},
            [ipaddress.ip_network("fd00::/16")], direct=False, everyone=True)
    assert misrouted.found == {
        "n2": "packets to fd00:2::/64 do not enter the overlay: they take the route fd00:2::/64 "
              "dev underlay0 table 77"}


@pytest.mark.parametrize("direct", [False, True])
def test_a_route_by_the_peer_itself_is_right_only_with_direct_routing(direct):
    @in_own_netns
    async def body():
        make_devices()
        peers = leases(3)
        sh(f"ip route add {peers[1].subnets.v4} via {peers[1].attributes.public_ip}",
           f"ip route add {peers[2].subnets.v4} via {peers[1].attributes.public_ip}")
        with Netlink() as netlink:
            misrouted = Misrouted(netlink)
            await misrouted.look(peers, [OWN], {socket.if_nametoindex("overlay0")}, [NETWORK],
                                 direct=direct, everyone=True)
        assert [*misrouted.found] == [peer.key for peer in peers[2 if direct else 1 :]]

    body()


@pytest.mark.parametrize(("command", "expected"), [
    ("ip rule add to 192.0.2.0/24 lookup 77", True),
    ("ip route add 10.1.0.0/24 dev underlay0", True),
    ("ip route add default dev underlay0", True),
    ("ip address add 10.255.255.7/32 dev overlay0", True),
    ("ip neigh add 10.1.0.1 lladdr 02:00:00:00:00:01 dev overlay0 nud permanent", False),
    ("ip link set overlay0 mtu 1400", False),
])
def test_changes_of_routes_are_told_apart(command, expected):
    @in_own_netns
    async def body():
        make_devices()
        seen = asyncio.Queue()
        with Netlink() as netlink:
            watch = HostWatch(netlink, lambda: seen.put_nowait("change"),
                              lambda: seen.put_nowait("routing"))
            watch.concern(["overlay0"], socket.if_nametoindex("underlay0"), [NETWORK], [OWN])
            watch.start()
            async with asyncio.timeout(60):
                assert {await seen.get(), await seen.get()} == {"change", "routing"}  # it begins
                sh(command)
                if expected:
                    while await seen.get() != "routing":
                        pass
                    return
                assert await seen.get() == "change"
                await asyncio.sleep(0)
            assert seen.empty()

    body()
