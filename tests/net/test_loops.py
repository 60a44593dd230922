"""Which addresses the kernel would route into our own TUN."""

from ipaddress import ip_address

import pytest

from tests.own_netns import in_own_netns, sh
from udptun.model import Mark
from udptun.net.loops import FEW, routed_into
from udptun.net.netlink import Netlink

SOURCES = [ip_address("192.0.2.1"), ip_address("2001:db8::1")]


def make_host():
    sh("ip tuntap add mode tun name loop0", "ip link set loop0 up",
       "ip link add under0 type veth peer name wire", "ip link set wire up",
       "ip link set under0 up", "ip address add 192.0.2.1/24 dev under0",
       "ip address add 2001:db8::1/64 dev under0 nodad", "ip route add 10.0.0.0/8 dev loop0",
       "ip route add fd00::/16 dev loop0")


async def looping(*addresses, mark=None, device="loop0", fill=()):
    with Netlink() as netlink:
        packed = [ip_address(one).packed for one in (*addresses, *fill)]
        return {str(ip_address(one)) for one in
                await routed_into(netlink, device, packed, SOURCES, mark)}


@in_own_netns
@pytest.mark.parametrize("others_n", [0, 2 * FEW])
async def test_the_kernels_route_decides(others_n):
    make_host()
    sh("ip route add 10.9.0.0/16 via 192.0.2.254", "ip route add 198.51.100.7 dev loop0",
       "ip route add fd00:9::/32 via 2001:db8::fe", "ip route add 10.9.9.0/24 nexthop dev loop0")
    fill = [f"203.0.{n >> 8}.{n & 255}" for n in range(others_n)]
    found = await looping(
        "10.1.2.3", "10.9.1.1", "10.9.9.9", "192.0.2.2", "198.51.100.7", "198.51.100.8",
        "fd00:1::1", "fd00:9::1", "2001:db8::2", "192.0.2.1", fill=fill)
    assert found == {"10.1.2.3", "10.9.9.9", "198.51.100.7", "fd00:1::1"}


@in_own_netns
@pytest.mark.parametrize("others_n", [0, 2 * FEW])
async def test_rules_for_our_mark_and_our_source_count(others_n):
    make_host()
    fill = [f"203.0.{n >> 8}.{n & 255}" for n in range(others_n)]
    sh("ip rule add fwmark 0x10/0x10 lookup 7", "ip route add 10.1.0.0/16 via 192.0.2.254 table 7",
       "ip rule add from 192.0.2.1 lookup 8", "ip route add 10.2.0.0/16 via 192.0.2.254 table 8",
       "ip route add 172.16.0.0/12 dev loop0 table 8")
    assert await looping("10.1.2.3", "10.2.2.3", "172.16.1.1", fill=fill) == {
        "10.1.2.3", "172.16.1.1"}
    assert await looping("10.1.2.3", mark=Mark.parse("0x10/0x10"), fill=fill) == set()


@in_own_netns
async def test_a_device_that_is_gone_has_no_routes():
    make_host()
    assert await looping("10.1.2.3", "192.0.3.1", device="gone0") == set()
    assert await looping() == set()
