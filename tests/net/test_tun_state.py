"""The state of one device on a host whose other devices also have addresses and routes."""

from __future__ import annotations

import socket
from ipaddress import ip_address, ip_network

from tests.own_netns import in_own_netns, sh
from udptun.net.netlink import Netlink
from udptun.net.tun_state import TunState, tun_state

PAIR = ("ip link add name eth0 type veth peer name eth1", "ip link set eth0 up",
        "ip link set eth1 up", "ip -6 address flush dev eth0", "ip -6 address flush dev eth1")


@in_own_netns
async def test_flags_addresses_and_routes_of_one_device():
    sh(*PAIR)
    index = socket.if_nametoindex("eth0")
    with Netlink() as netlink:
        assert await tun_state(netlink, index) == TunState(True, frozenset(), frozenset())
        sh("ip address add 10.244.1.0/32 dev eth0", "ip address add 10.1.1.1/32 dev eth1",
           "ip address add fd00:1::/128 dev eth0 nodad",
           "ip route add 10.244.0.0/16 dev eth0", "ip route add 10.245.0.0/16 dev eth1",
           "ip route add 10.246.0.0/16 dev eth0 table 77",
           "ip route add default dev eth0", "ip -6 route add fd00::/16 dev eth0")
        state = await tun_state(netlink, index)
        assert state.up
        assert state.addresses == {ip_address("10.244.1.0"), ip_address("fd00:1::")}
        assert {ip_network("10.244.0.0/16"), ip_network("0.0.0.0/0"), ip_network("fd00::/16")} <= \
            state.networks
        assert not {ip_network("10.245.0.0/16"), ip_network("10.246.0.0/16")} & state.networks
        sh("ip link set eth0 down")
        state = await tun_state(netlink, index)
        assert (state.up, state.addresses) == (False, {ip_address("10.244.1.0")})
        assert not {n for n in state.networks if n.version == 4}
        sh("ip link del eth0")
        assert await tun_state(netlink, index) is None
