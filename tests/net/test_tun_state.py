"""The state of one device on a host whose other devices also have addresses and routes."""

from __future__ import annotations

import socket
from ipaddress import ip_address, ip_network

import pytest

from tests.own_netns import in_own_netns, sh
from udptun.errors import DeviceError
from udptun.net.netlink import DEVICE_SETTINGS, Netlink
from udptun.net.tun_state import TunState, tun_state

PAIR = ("ip link add name eth0 type veth peer name eth1", "ip link set eth0 up",
        "ip link set eth1 up", "ip -6 address flush dev eth0", "ip -6 address flush dev eth1")


SETTINGS = tuple(DEVICE_SETTINGS.items())


@in_own_netns
async def test_name_flags_settings_addresses_and_routes_of_one_device():
    sh(*PAIR, "ip link set eth0 addrgenmode none")
    index = socket.if_nametoindex("eth0")
    with Netlink() as netlink:
        await netlink.set_device("eth0", index)
        assert await tun_state(netlink, index) == TunState(
            "eth0", 1500, True, frozenset(), frozenset(), SETTINGS, quiet=True)
        sh("ip address add 10.244.1.0/32 dev eth0", "ip address add 10.1.1.1/32 dev eth1",
           "ip address add fd00:1::/128 dev eth0 nodad",
           "ip route add 10.244.0.0/16 dev eth0", "ip route add 10.245.0.0/16 dev eth1",
           "ip route add 10.246.0.0/16 dev eth0 table 77",
           "ip route add default dev eth0", "ip -6 route add fd00::/16 dev eth0")
        ours = {ip_network("10.244.0.0/16"), ip_network("0.0.0.0/0"), ip_network("fd00::/16")}
        asked = ours | {ip_network(one) for one in ("10.245.0.0/16", "10.246.0.0/16", "10.0.0.0/8")}
        state = await tun_state(netlink, index, asked)
        assert state.addresses == {ip_address("10.244.1.0"), ip_address("fd00:1::")}
        assert state.networks == ours
        assert (await tun_state(netlink, index)).networks == frozenset()
        assert state.differences("eth0", 1500, state.addresses, state.networks) == []
        assert state.differences("eth1", 1400, [ip_address("10.9.9.9")], [
            ip_network("10.245.0.0/16")]) == [
            "its name is eth0", "its MTU is 1500", "it has lost 10.9.9.9, 10.245.0.0/16"]
        sh("ip link set eth0 down", "sysctl -qw net.ipv4.conf.eth0.rp_filter=1",
           "ip link set eth0 addrgenmode eui64")
        state = await tun_state(netlink, index, asked)
        assert (state.up, state.addresses) == (False, {ip_address("10.244.1.0")})
        assert not {n for n in state.networks if n.version == 4}
        assert state.differences("eth0", 1500, (), [ip_network("10.244.0.0/16")]) == [
            "it is down", "its rp_filter is 1",
            "the kernel creates link-local addresses on it"]
        sh("ip link del eth0")
        assert await tun_state(netlink, index) is None


@in_own_netns
async def test_a_device_gets_its_name_back():
    sh(*PAIR)
    index = socket.if_nametoindex("eth0")
    with Netlink() as netlink:
        sh("ip link set eth0 down", "ip link set eth0 name other", "ip link set other up")
        await netlink.rename(index, "eth0")
        assert socket.if_nametoindex("eth0") == index
        with pytest.raises(DeviceError, match="renaming eth0 to eth1: File exists"):
            await netlink.rename(index, "eth1")
