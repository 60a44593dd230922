"""Networks whose routes would divert packets that the host needs, with the real kernel."""

import socket
from ipaddress import ip_address, ip_network

import pytest

from tests.own_netns import in_own_netns, sh
from udptun.errors import FieldError
from udptun.net.netlink import Netlink
from udptun.node.host.interface import Underlay
from udptun.node.host.taken import Taken, refuse_taken

HOST = (
    "ip link add under0 type veth peer name wire", "ip link set wire up",
    "ip addr add 10.1.2.3/24 dev under0", "ip addr add 10.200.0.9/32 dev under0",
    "ip -6 addr add fd00:1::3/64 dev under0 nodad", "ip link set under0 up",
    "ip route add default via 10.1.2.1", "ip -6 route add default via fd00:1::1",
    "ip route add 10.50.0.0/16 via 10.1.2.7",
    "ip route add 10.60.0.0/16 via 10.1.2.7 table 7", "ip rule add to 10.60.0.0/16 table 7",
)
STORE = "10.9.9.9"  # behind the default route


async def taken_by(network, *store_hosts, own=()):
    """Return the needed addresses whose packets the route to a network would divert."""
    sh(*HOST)
    underlay = Underlay(
        "under0", socket.if_nametoindex("under0"), 1500, ip_address("10.1.2.3"),
        ip_address("fd00:1::3"), ip_address("10.1.2.3"), ip_address("fd00:1::3"))
    with Netlink() as netlink:
        taken = Taken(netlink)
        needed = await taken.needed(underlay, store_hosts, own)
    assert taken.broadcasts == (ip_address("10.1.2.255"),)
    found = {str(one.address) for one in needed if one.is_in(ip_network(network))}
    if found:
        with pytest.raises(FieldError, match="whose route does not divert") as raised:
            refuse_taken([ip_network(network)], needed)
        assert any(address in str(raised.value) for address in found)
    else:
        refuse_taken([ip_network(network)], needed)
    return found


@pytest.mark.parametrize(("network", "stores", "taken"), [
    # A network may contain the underlay: the route to its link has the longer prefix.
    ("10.0.0.0/8", (), set()),
    ("10.1.0.0/16", (), set()),
    ("10.1.2.128/25", (), set()),  # no address in use
    ("10.1.2.0/24", (), {"10.1.2.1", "10.1.2.3"}),
    ("10.1.2.0/25", (), {"10.1.2.1", "10.1.2.3"}),
    ("10.1.2.0/30", (), {"10.1.2.1", "10.1.2.3"}),
    ("10.1.2.1/32", (), {"10.1.2.1"}),
    ("10.200.0.0/16", (), set()),
    ("fd00::/16", (), set()),
    ("fd00:1::/64", (), {"fd00:1::1", "fd00:1::3"}),
    ("10.0.0.0/8", (STORE,), {STORE}),
    ("10.9.9.0/24", (STORE,), {STORE}),
    ("10.244.0.0/16", (STORE,), set()),
    ("10.0.0.0/8", ("10.50.1.1",), set()),  # a route of the host with a longer prefix
    ("10.50.0.0/16", ("10.50.1.1",), {"10.50.1.1"}),
    ("10.60.0.0/16", ("10.60.1.1",), set()),  # a rule selects another table
    ("10.0.0.0/8", ("10.1.2.3",), set()),  # the store runs on this host
    ("10.0.0.0/8", ("localhost", "no such name.invalid"), set()),
])
def test_a_network_captures_addresses_without_longer_prefixes(network, stores, taken):
    @in_own_netns
    async def check():
        assert await taken_by(network, *stores) == taken

    check()


@pytest.mark.parametrize(("network", "taken"), [
    ("10.0.0.0/8", True), ("10.128.0.0/9", True), ("10.244.0.0/16", False), ("10.128.0.1/32", True),
])
def test_an_address_without_a_link(network, taken):
    """Some clouds give such an address, and a gateway that is reached on the link."""
    @in_own_netns
    async def check():
        sh("ip link add under0 type veth peer name wire", "ip link set wire up",
           "ip addr add 10.128.0.2/32 dev under0", "ip link set under0 up",
           "ip route add 10.128.0.1/32 dev under0", "ip route add default via 10.128.0.1")
        address = ip_address("10.128.0.2")
        underlay = Underlay(
            "under0", socket.if_nametoindex("under0"), 1500, address, None, address, None)
        with Netlink() as netlink:
            needed = await Taken(netlink).needed(underlay, (), ())
        assert any(one.is_in(ip_network(network)) for one in needed) == taken

    check()


@in_own_netns
async def test_an_address_that_the_overlay_already_captures():
    sh("ip link add tun9 type veth peer name far", "ip link set far up", "ip link set tun9 up",
       "ip route add 10.0.0.0/8 dev tun9")
    assert await taken_by("10.0.0.0/8", STORE, own=("tun9", "none")) == {STORE}
    refuse_taken([], [])
