"""Interfaces, addresses and routes of the host, read from the real kernel."""

from __future__ import annotations

import errno
import socket
import subprocess
from ipaddress import ip_address
from pathlib import Path

import pytest

from tests.own_netns import in_own_netns, ip_json, sh
from udptun.errors import DeviceError
from udptun.lab import wait_for
from udptun.net import batch
from udptun.net.netlink import Netlink
from udptun.net.underlay import default_routes, interfaces, route_to

PAIR = ("ip link add name eth0 type veth peer name eth1", "ip link set eth0 up",
        "ip link set eth1 up")


def index(name):
    return socket.if_nametoindex(name)


async def addresses_of(netlink, name):
    (interface,) = [one for one in await interfaces(netlink) if one.name == name]
    return [str(address) for address in interface.addresses]


@in_own_netns
async def test_interfaces():
    sh(*PAIR, "ip link set eth0 mtu 1400", "ip link set eth1 down",
       "ip address add 192.0.2.1/24 dev eth0")
    with Netlink() as netlink:
        found = {one.name: one for one in await interfaces(netlink)}
    assert [*found] == sorted(found, key=index)
    assert (found["eth0"].index, found["eth0"].mtu, found["eth0"].up) == (index("eth0"), 1400, True)
    assert (found["eth1"].mtu, found["eth1"].up, found["eth1"].addresses) == (1500, False, ())
    assert found["lo"].addresses == (ip_address("127.0.0.1"), ip_address("::1"))


@in_own_netns
async def test_addresses_are_sorted_best_first():
    sh(*PAIR,
       "ip address add 169.254.7.7/16 dev eth0",
       "ip address add 192.0.2.1/24 dev eth0",
       "ip address add 192.0.2.9/24 dev eth0",  # secondary has the same flag as temporary
       "ip address add 198.51.100.1/24 dev eth0 preferred_lft 0",
       "ip address add 2001:db8::2/64 dev eth0 nodad",
       "ip address add 2001:db8::1/64 dev eth0 nodad preferred_lft 0")
    with Netlink() as netlink:
        found = await addresses_of(netlink, "eth0")
    v4 = [address for address in found if "." in address]
    v6 = [address for address in found if ":" in address]
    assert v4 == ["192.0.2.1", "192.0.2.9", "198.51.100.1", "169.254.7.7"]
    assert v6[:2] == ["2001:db8::2", "2001:db8::1"]
    assert v6[2].startswith("fe80::")


@in_own_netns
async def test_virtual_addresses_come_after_the_others():
    """keepalived adds an address without a subnet, or marks the address with its protocol."""
    sh(*PAIR,
       "ip address add 192.0.2.100/32 dev eth0",
       "ip address add 192.0.2.1/24 dev eth0",
       "ip address add 192.0.2.2/24 dev eth0",  # secondary
       "ip address add 198.51.100.1/24 dev eth0",
       "ip address add 2001:db8::100/128 dev eth0 nodad",
       "ip address add 2001:db8::1/64 dev eth0 nodad")
    with Netlink() as netlink:
        found = await addresses_of(netlink, "eth0")
    v4 = [address for address in found if "." in address]
    assert v4 == ["192.0.2.1", "198.51.100.1", "192.0.2.2", "192.0.2.100"]
    assert [address for address in found if address.startswith("2001:")] == \
        ["2001:db8::1", "2001:db8::100"]


@in_own_netns
async def test_an_address_that_keepalived_has_added_comes_after_the_others():
    sh(*PAIR, "ip address add 192.0.2.1/24 dev eth0")
    try:
        sh("ip address add 198.51.100.1/24 dev eth0 proto 18")
        sh("ip address add 203.0.113.1/24 dev eth0")
    except AssertionError:
        pytest.skip("ip or the kernel has no protocols of addresses")
    with Netlink() as netlink:
        found = await addresses_of(netlink, "eth0")
    assert [address for address in found if "." in address] == \
        ["192.0.2.1", "203.0.113.1", "198.51.100.1"]


@in_own_netns
async def test_temporary_address_comes_after_the_others():
    """A temporary address (RFC 8981) expires within days. The kernel lists it first."""
    conf = Path("/proc/sys/net/ipv6/conf/eth0")
    sh(*PAIR)
    (conf / "use_tempaddr").write_text("2")
    (conf / "dad_transmits").write_text("0")
    sh("ip address add 2001:db8::1/64 dev eth0 mngtmpaddr nodad")

    def checked():
        return [item["local"] for item in ip_json("-6 address show dev eth0")[0]["addr_info"]
                if item.get("temporary") and not item.get("tentative")]

    (temporary,) = wait_for(checked, "the temporary address")
    with Netlink() as netlink:
        assert (await addresses_of(netlink, "eth0"))[:2] == ["2001:db8::1", temporary]


@in_own_netns
async def test_duplicate_address_is_not_listed():
    """If duplicate address detection fails, the kernel still lists the address, but does not use
    the address."""
    sh(*PAIR, "ip address add 2001:db8::1/64 dev eth1 nodad",
       "ip address add 2001:db8::1/64 dev eth0")
    wait_for(lambda: any(item.get("dadfailed") for item in
                         ip_json("-6 address show dev eth0")[0]["addr_info"]), "the detection")
    with Netlink() as netlink:
        assert "2001:db8::1" not in await addresses_of(netlink, "eth0")


@in_own_netns
async def test_point_to_point_link_has_its_local_address():
    sh(*PAIR, "ip address add 192.0.2.1 peer 192.0.2.2 dev eth0",
       "ip address add 2001:db8::1 peer 2001:db8::2 dev eth0 nodad")
    with Netlink() as netlink:
        found = await addresses_of(netlink, "eth0")
    assert {"192.0.2.1", "2001:db8::1"} <= {*found}
    assert not {"192.0.2.2", "2001:db8::2"} & {*found}


@in_own_netns
@pytest.mark.parametrize("kernel", ["this", "before 4.20"])
@pytest.mark.parametrize(("version", "net0", "net2"), [
    (4, "192.0.2.{}", "198.51.100.{}"), (6, "2001:db8::{}", "2001:db8:1::{}"),
])
async def test_default_routes(monkeypatch, version, net0, net2, kernel):
    """The route with the lowest metric is first. Routes in other tables and unreachable routes are
    ignored."""
    if kernel != "this":  # older kernels do not filter a dump
        monkeypatch.setattr(batch, "NETLINK_GET_STRICT_CHK", 999)
    tail = "/24" if version == 4 else "/64 nodad"
    sh(*PAIR, "ip link add name eth2 type veth peer name eth3", "ip link set eth2 up",
       "ip link set eth3 up",
       f"ip address add {net0.format(1)}{tail} dev eth0",
       f"ip address add {net2.format(1)}{tail} dev eth2")
    routes = f"ip -{version} route add"
    with Netlink() as netlink:
        assert await default_routes(netlink, version) == ()
        sh(f"{routes} default via {net2.format(7)} dev eth2 table 100")
        assert await default_routes(netlink, version) == ()
        sh(f"{routes} unreachable default metric 5")
        assert await default_routes(netlink, version) == ()
        sh(f"{routes} default via {net2.format(9)} dev eth2 metric 300",
           f"{routes} default via {net0.format(8)} dev eth0 metric 20")
        assert await default_routes(netlink, version) == (index("eth0"), index("eth2"))
        assert await default_routes(netlink, 10 - version) == ()


@in_own_netns
@pytest.mark.parametrize(("version", "address", "gateway"), [
    (4, "192.0.2.1/24", "192.0.2.{}"), (6, "2001:db8::1/64 nodad", "2001:db8::{}"),
])
async def test_default_route_with_several_next_hops(version, address, gateway):
    sh(*PAIR, f"ip address add {address} dev eth0",
       f"ip -{version} route add default nexthop via {gateway.format(8)} dev eth0"
       f" nexthop via {gateway.format(9)} dev eth0")
    with Netlink() as netlink:
        assert set(await default_routes(netlink, version)) == {index("eth0")}


@in_own_netns
async def test_default_route_among_thousands_of_routes():
    """A node of a large cluster has thousands of routes: one route per peer."""
    routes = "".join(f"route add 10.{n >> 8}.{n & 255}.0/24 dev eth0\n" for n in range(5000))
    sh(*PAIR, "ip address add 192.0.2.1/24 dev eth0")
    subprocess.run(("ip", "-batch", "-"), input=routes, text=True, check=True)
    sh("ip route add default via 192.0.2.254")
    with Netlink() as netlink:
        assert await default_routes(netlink, 4) == (index("eth0"),)


@in_own_netns
async def test_route_to():
    sh(*PAIR,
       "ip address add 192.0.2.1/24 dev eth0", "ip address add 2001:db8::1/64 dev eth0 nodad",
       "ip route add 198.51.100.0/24 via 192.0.2.254",
       "ip -6 route add 2001:db8:1::/64 via 2001:db8::fe")
    with Netlink() as netlink:
        for destination, source, gateway in (
            ("192.0.2.7", "192.0.2.1", None),
            ("198.51.100.7", "192.0.2.1", "192.0.2.254"),
            ("2001:db8::7", "2001:db8::1", None),
            ("2001:db8:1::7", "2001:db8::1", "2001:db8::fe"),
        ):
            route = await route_to(netlink, ip_address(destination))
            assert (route.index, str(route.source), route.gateway and str(route.gateway)) == \
                (index("eth0"), source, gateway)
        for nowhere in ("203.0.113.1", "2001:db8:2::1"):
            with pytest.raises(DeviceError, match=f"looking up the route to {nowhere}") as caught:
                await route_to(netlink, ip_address(nowhere))
            assert caught.value.errno == errno.ENETUNREACH
