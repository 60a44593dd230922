"""The choice of a subnet, compared with a slow and simple implementation."""

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from udptun.leases.base import Attributes, StoreRefused, Subnets
from udptun.leases.etcd.allocate import Entry, choose, free_subnets, own_entries, same_node
from udptun.leases.netconf import NetConfig

V4 = ipaddress.IPv4Network
NETWORK = NetConfig.parse('{"Network": "10.5.0.0/16"}')


def entry(subnet, last=None, lease_id=1):
    attributes = None if last is None else Attributes(ipaddress.IPv4Address(f"192.0.2.{last}"))
    return Entry(subnet, Subnets(V4(subnet)), attributes, 1, lease_id)


@given(
    st.lists(st.tuples(st.integers(0, 255), st.integers(22, 32)), max_size=20),
    st.integers(24, 28), st.integers(1, 30),
)
def test_free_subnets_overlap_no_used_one(used, length, limit):
    taken = [V4((0x0A050000 + place * 64, bits), strict=False) for place, bits in used]
    low, high = 0x0A050000, 0x0A053F00
    size = 1 << (32 - length)
    slow = [base for base in range(low, high + 1, size)
            if not any(V4((base, length)).overlaps(net) for net in taken)]
    assert free_subnets(low, high, size, taken, limit) == slow[:limit]


def test_one_of_the_first_hundred_free_subnets_is_drawn():
    drawn_from = []
    subnets = choose(NETWORK, [entry("10.5.1.0/24")], Subnets(),
                     lambda bases: drawn_from.extend(bases) or bases[7])
    assert len(drawn_from) == 100
    assert str(ipaddress.IPv4Address(drawn_from[0])) == "10.5.2.0"
    assert subnets == Subnets(V4("10.5.9.0/24"))


def test_a_subnet_with_an_invalid_value_is_in_use():
    taken = [entry("10.5.1.0/24"), entry("10.5.2.0/23", 2), entry("10.5.4.128/25", 3, lease_id=0)]
    assert choose(NETWORK, taken, Subnets(), min) == Subnets(V4("10.5.5.0/24"))


def test_the_former_subnet_must_not_overlap_another():
    former = Subnets(V4("10.5.9.0/24"))
    assert choose(NETWORK, [], former, min) == former
    assert choose(NETWORK, [entry("10.5.9.128/25", 2)], former, min) != former


def test_both_families_must_be_free():
    network = NetConfig.parse('{"EnableIPv6": true, "Network": "10.5.0.0/16", "IPv6Network":'
                              ' "fc00::/62", "IPv6SubnetLen": 64, "IPv6SubnetMin": "fc00:0:0:1::",'
                              ' "IPv6SubnetMax": "fc00:0:0:2::"}')
    v6 = ipaddress.IPv6Network
    one = Entry("a", Subnets(V4("10.5.1.0/24"), v6("fc00:0:0:1::/64")), None, 1, 1)
    assert choose(network, [one], Subnets(), min) == Subnets(
        V4("10.5.2.0/24"), v6("fc00:0:0:2::/64")
    )
    two = Entry("b", Subnets(V4("10.5.2.0/24"), v6("fc00:0:0:2::/64")), None, 1, 1)
    with pytest.raises(StoreRefused, match="fc00:0:0:1:: to fc00:0:0:2:: are in use"):
        choose(network, [one, two], Subnets(), min)


def test_order_of_our_existing_leases():
    own = Attributes(ipaddress.IPv4Address("192.0.2.1"))
    entries = [entry("10.5.1.0/24", 1), entry("10.5.2.0/24", 2), entry("10.5.3.0/24", 1),
               entry("10.5.4.0/24", 1, lease_id=0), entry("10.5.5.0/24")]
    found = own_entries(entries, own, Subnets(V4("10.5.3.0/24")))
    assert [one.key for one in found] == ["10.5.4.0/24", "10.5.3.0/24", "10.5.1.0/24"]


def test_same_node():
    v4, v6 = ipaddress.IPv4Address("192.0.2.1"), ipaddress.IPv6Address("2001:db8::1")
    assert same_node(Attributes(v4), Attributes(v4, v6))
    assert not same_node(Attributes(None, v6), Attributes(v4, v6))
    assert same_node(Attributes(None, v6), Attributes(None, v6))
    assert not same_node(Attributes(), Attributes())
    assert not same_node(None, Attributes(v4))
