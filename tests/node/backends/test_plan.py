"""The paths to each peer, and the paths that differ after a change of leases."""

from __future__ import annotations

import ipaddress
import random
import time
from dataclasses import replace
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

import pytest

from udptun.leases.advert import ECN, EXPRESS, PROBE, Advert, embed
from udptun.leases.base import Attributes, Change, Lease, Subnets
from udptun.model import Route
from udptun.net.vxlan import VxlanPeer
from udptun.node.backends.plan import LocalNode, Plan, _overlap, reach
from udptun.node.backends.udp import UdpReach
from udptun.node.backends.vxlan import VxlanReach
from udptun.node.host.interface import Needed

MAC = "0e:00:00:00:00:02"
VXLAN = {"VNI": 1, "VtepMAC": MAC}
ADVERT = Advert(9285, 1400)
NET4, NET6 = IPv4Network("10.244.0.0/16"), IPv6Network("fd44::/32")
SUB4, SUB6 = IPv4Network("10.244.2.0/24"), IPv6Network("fd44:0:2::/64")
UDP4, UDP46, VXLAN4 = UdpReach(8285, (4,)), UdpReach(8285, (4, 6)), VxlanReach((4,), 1, False)
UDP_ONLY = LocalNode(
    key="me", subnets=Subnets(IPv4Network("10.244.1.0/24")), networks=(NET4,),
    public=(IPv4Address("192.0.2.1"),), reaches=(UDP4,),
)
VXLAN_ONLY = replace(UDP_ONLY, reaches=(VXLAN4,))
BOTH = replace(UDP_ONLY, reaches=(UDP4, VXLAN4))
DUAL = replace(
    UDP_ONLY, networks=(NET4, NET6), reaches=(UDP46,),
    public=(IPv4Address("192.0.2.1"), IPv6Address("2001:db8::1")),
    subnets=Subnets(IPv4Network("10.244.1.0/24"), IPv6Network("fd44:0:1::/64")),
)


def lease(n=2, backend="", data=None, data6=None, v6=False, public=None, public6=None, key=None):
    subnets = Subnets(IPv4Network(f"10.244.{n}.0/24"),
                      IPv6Network(f"fd44:0:{n:x}::/64") if v6 else None)
    public = IPv4Address(f"192.0.2.{n}") if public is None else public
    return Lease(key or f"n{n}", subnets, Attributes(public, public6, backend, data, data6))


def route_of(found):
    """Return the path in the UDP backend."""
    return next((path for path in found.paths if isinstance(path, Route)), None)


def peer_of(found):
    """Return the path in the VXLAN backend."""
    return next((path for path in found.paths if isinstance(path, VxlanPeer)), None)


def only(local, lease):
    (found,), why = reach(local, lease)
    assert why == ""
    return found


# The paths, for each combination of the backends of both ends


def test_a_stock_udp_peer_has_our_port():
    for backend in ("", "udp"):
        path = only(replace(UDP_ONLY, reaches=(UdpReach(8300, (4,)),)), lease(backend=backend))
        assert route_of(path) == Route(SUB4, IPv4Address("192.0.2.2"), 8300, None)
        assert peer_of(path) is None


def test_an_advertised_port_and_mtu_are_used():
    path = only(UDP_ONLY, lease(data=embed(None, ADVERT)))
    assert route_of(path) == Route(SUB4, IPv4Address("192.0.2.2"), 9285, 1400)


def test_two_nodes_with_vxlan_use_it_and_keep_a_udp_route():
    path = only(BOTH, lease(backend="vxlan", data=embed(VXLAN, ADVERT)))
    assert (peer_of(path).mac, peer_of(path).endpoint, peer_of(path).subnet) == (
        MAC, IPv4Address("192.0.2.2"), SUB4)
    assert route_of(path) is not None


def test_a_stock_vxlan_peer_is_reached_by_vxlan_only():
    path = only(BOTH, lease(backend="vxlan", data=VXLAN))
    assert peer_of(path) is not None
    assert route_of(path) is None


def test_a_node_without_vxlan_reaches_a_peer_with_both_by_udp():
    path = only(UDP_ONLY, lease(backend="vxlan", data=embed(VXLAN, ADVERT)))
    assert peer_of(path) is None
    assert route_of(path).port == 9285


def test_a_peer_without_vxlan_is_reached_by_udp():
    assert peer_of(only(BOTH, lease(data=embed(None, ADVERT)))) is None


def test_direct_routing_is_passed_to_the_peer():
    assert peer_of(only(
        replace(BOTH, reaches=(VxlanReach((4,), 1, True),)), lease(backend="vxlan", data=VXLAN),
    )).direct


def test_a_node_with_our_public_address_and_another_port_is_another_node():
    """Two nodes behind one NAT. VXLAN has the same port on all nodes."""
    ours = IPv4Address("192.0.2.1")
    found = only(BOTH, lease(public=ours, backend="vxlan", data=embed(VXLAN, ADVERT)))
    assert route_of(found).port == ADVERT.port
    assert peer_of(found) is None
    assert found.shares_address
    assert not only(BOTH, lease()).shares_address


@pytest.mark.parametrize(
    ("local", "peer", "why"),
    [
        (UDP_ONLY, lease(backend="vxlan", data=VXLAN), "has only UDP"),
        (VXLAN_ONLY, lease(), "only VXLAN"),
        (BOTH, lease(backend="host-gw"), "host-gw"),
        (BOTH, lease(backend="vxlan", data={"VNI": 2, "VtepMAC": MAC}), "do not match this node's"),
        (BOTH, lease(backend="vxlan", data={"VNI": 1, "VtepMAC": "no mac"}),
         "do not match this node's"),
        (BOTH, lease(backend="vxlan", data="nonsense"), "do not match this node's"),
        (BOTH, lease(backend="vxlan"), "do not match this node's"),
        (UDP_ONLY, lease(n=2, public=IPv4Address("192.0.2.1")), "old lease of this node"),
        (UDP_ONLY, lease(n=2, public=IPv4Address("192.0.2.1"),
                         data=embed(None, Advert(8285, 1400))), "such nodes need a hosts file"),
        (VXLAN_ONLY, lease(n=2, public=IPv4Address("192.0.2.1"), backend="vxlan",
                           data=embed(VXLAN, ADVERT)), "cannot tell apart nodes"),
        (UDP_ONLY, lease(n=2, public=IPv4Address("224.0.0.1")), "not a unicast address"),
        (UDP_ONLY, lease(n=2, public=IPv4Address("0.0.0.0")), "not a unicast address"),
        (UDP_ONLY, lease(public=IPv4Address("255.255.255.255")), "not a unicast address"),
        (replace(UDP_ONLY, broadcasts=(IPv4Address("192.0.2.255"),)),
         lease(public=IPv4Address("192.0.2.255")), "not a unicast address"),
        (replace(UDP_ONLY, needed=(Needed(IPv4Address("10.244.2.9"), "the gateway", 24),)), lease(),
         "would divert packets to 10.244.2.9, the gateway"),
        (UDP_ONLY, lease(public=IPv4Address("127.0.0.1")), "cannot be reached from another host"),
        (DUAL, lease(public6=IPv6Address("fe80::2")), "cannot be reached from another host"),
        (DUAL, lease(public6=IPv6Address("::1")), "cannot be reached from another host"),
        (UDP_ONLY, lease(public=IPv4Address("10.244.2.1")), "in the subnet 10.244.2.0/24"),
        (UDP_ONLY, lease(public=IPv4Address("10.244.1.9")), "in the subnet 10.244.1.0/24"),
        (replace(UDP_ONLY, public=(IPv4Address("10.244.2.9"),)), lease(),
         "has this node's public address 10.244.2.9"),
        (UDP_ONLY, Lease("n2", Subnets(SUB4), Attributes()), "no public address"),
        (UDP_ONLY, Lease("n2", Subnets(IPv4Network("10.9.0.0/24")),
                     Attributes(IPv4Address("192.0.2.2"))), "not within 10.244.0.0/16"),
        (UDP_ONLY, Lease("n2", Subnets(IPv4Network("10.0.0.0/8")),
                     Attributes(IPv4Address("192.0.2.2"))), "not within 10.244.0.0/16"),
        (UDP_ONLY, Lease("n2", Subnets(IPv4Network("10.244.1.0/25")),
                     Attributes(IPv4Address("192.0.2.2"))), "overlaps this node's subnet"),
        (UDP_ONLY, Lease("n2", Subnets(SUB4), Attributes(public_ipv6=IPv6Address("2001:db8::2"),
                                                     backend_data=embed(None, ADVERT))),
         "no underlay address of an IP version"),
    ],
)
def test_a_peer_without_a_path_has_a_reason(local, peer, why):
    found, reason = reach(local, peer)
    assert not found
    assert why in reason


# Two IP versions


def test_outer_ip_version_equals_inner_if_both_nodes_have_both():
    peer = lease(v6=True, public6=IPv6Address("2001:db8::2"), data=embed(None, ADVERT))
    found, why = reach(DUAL, peer)
    assert [str(route_of(one).via) for one in found] == ["192.0.2.2", "2001:db8::2"]
    assert why == ""


def test_both_ip_versions_use_the_only_common_outer_version():
    found, why = reach(replace(DUAL, reaches=(UDP4,)), lease(v6=True, data=embed(None, ADVERT)))
    assert [str(route_of(one).via) for one in found] == ["192.0.2.2", "192.0.2.2"]
    assert why == ""


def test_stock_flannel_peer_gets_no_ipv6_path():
    found, why = reach(DUAL, lease(v6=True))
    assert [one.subnet.version for one in found] == [4]
    assert "stock flannel" in why


def test_a_peer_with_an_mtu_too_small_for_ipv6_gets_no_ipv6_path():
    found, why = reach(DUAL, lease(v6=True, data=embed(None, Advert(8285, 1200))))
    assert [one.subnet.version for one in found] == [4]
    assert "MTU" in why


def test_a_family_that_the_network_does_not_have_is_ignored():
    found, why = reach(UDP_ONLY, lease(v6=True))
    assert len(found) == 1
    assert why == ""


def test_vxlan_of_each_family_has_its_own_data():
    local = replace(DUAL, reaches=(UDP46, VxlanReach((4, 6), 1, False)))
    other = {"VNI": 1, "VtepMAC": "0e:00:00:00:00:66"}
    peer = lease(v6=True, public6=IPv6Address("2001:db8::2"), backend="vxlan", data=VXLAN,
                 data6=other)
    found, _ = reach(local, peer)
    assert [(peer_of(one).mac, str(peer_of(one).endpoint)) for one in found] == [
        (MAC, "192.0.2.2"), ("0e:00:00:00:00:66", "2001:db8::2")]


# The plan of all peers


def test_our_own_lease_is_not_a_peer():
    plan = Plan(UDP_ONLY, [replace(lease(1), key="me"), lease(2)])
    assert set(plan.paths("udp")) == {SUB4}
    assert not plan.unreachable


def test_a_change_returns_only_the_differences():
    plan = Plan(UDP_ONLY, [lease(2), lease(3)])
    same = lease(2)
    assert plan.change([Change(same, same)]).paths == {}
    moved = lease(2, public=IPv4Address("192.0.2.99"))
    delta = plan.change([Change(lease(2), moved), Change(lease(3), None), Change(None, lease(4))])
    assert delta.of("udp") == {
        SUB4: Route(SUB4, IPv4Address("192.0.2.99")),
        IPv4Network("10.244.3.0/24"): None,
        IPv4Network("10.244.4.0/24"): Route(IPv4Network("10.244.4.0/24"),
                                            IPv4Address("192.0.2.4")),
    }
    assert delta.of("vxlan") == {}


def test_a_peer_that_loses_vxlan_keeps_its_route():
    plan = Plan(BOTH, [lease(backend="vxlan", data=embed(VXLAN, ADVERT))])
    assert plan.carried_n == {"vxlan": 1, "udp": 0}
    delta = plan.change([Change(None, lease(data=embed(None, ADVERT)))])
    assert delta.of("vxlan") == {SUB4: None}
    assert delta.of("udp") == {}
    assert plan.carried_n == {"vxlan": 0, "udp": 1}


def test_a_diverted_subnet_counts_for_the_backend_that_carries_it():
    """The setting outlasts a change of the lease, and ends with the path that it needs."""
    def plan_of(*leases):
        return Plan(BOTH, leases, {SUB4: "udp"})

    both, other = lease(backend="vxlan", data=embed(VXLAN, ADVERT)), lease(3)
    plan = plan_of(both, other)
    assert plan.carried_n == {"vxlan": 0, "udp": 2}
    plan.carry(SUB4, None)
    assert plan.carried_n == {"vxlan": 1, "udp": 1}
    plan.carry(SUB4, "udp")
    plan.change([Change(both, replace(both, name="renamed"))])
    assert plan.carried_n == {"vxlan": 0, "udp": 2}
    stock = lease(backend="vxlan", data=VXLAN)
    assert plan.change([Change(both, stock)]).subnets == {SUB4}
    assert plan.carried_n == {"vxlan": 1, "udp": 1}
    assert plan_of(stock, other).carried_n == plan.carried_n
    plan.carry(IPv4Network("10.244.9.0/24"), "udp")  # of no peer
    assert plan.carried_n == {"vxlan": 1, "udp": 1}


def test_only_a_peer_that_advertises_probes_gets_them():
    probed = Advert(9285, 1400, frozenset({PROBE}))
    for advert in (None, ADVERT, probed):
        found = only(UDP_ONLY, lease(data=embed(None, advert) if advert else None))
        assert (found.advert, found.answers_probes) == (advert, advert is probed)
        assert route_of(found).probe is (advert is probed)


@pytest.mark.parametrize("ours", [False, True])
@pytest.mark.parametrize("theirs", [False, True])
def test_the_express_path_needs_both_ends(ours, theirs):
    advert = Advert(9285, 1400, frozenset({PROBE, EXPRESS} if theirs else {PROBE}))
    local = replace(UDP_ONLY, reaches=(UdpReach(8285, (4,), ours),))
    route = route_of(only(local, lease(data=embed(None, advert))))
    assert route.express is (ours and theirs)
    assert route.probe


@pytest.mark.parametrize("advert", [
    None, Advert(9285), Advert(9285, 1400, frozenset({PROBE})),
    Advert(9285, 1400, frozenset({PROBE, ECN}))])
def test_only_a_peer_that_advertises_ecn_gets_ecn_fields(advert):
    found = only(UDP_ONLY, lease(data=embed(None, advert) if advert else None))
    assert route_of(found).ecn is (advert is not None and ECN in advert.features)


def test_a_subnet_claimed_twice_belongs_to_the_older_peer_until_it_leaves():
    first, second = lease(2), lease(2, key="other", public=IPv4Address("192.0.2.77"))
    plan = Plan(UDP_ONLY, [second, first])
    assert plan.paths("udp")[SUB4].via == first.attributes.public_ip
    assert "already belongs to n2" in plan.unreachable["other"]
    delta = plan.change([Change(first, None)])
    assert delta.of("udp") == {SUB4: Route(SUB4, IPv4Address("192.0.2.77"))}
    assert plan.unreachable == {}
    assert plan.key_of(SUB4) == "other"


PUBLIC = [*(f"192.0.2.{n}" for n in range(1, 9)), "10.244.3.7", "10.244.5.7"]


def test_changes_one_by_one_give_the_plan_of_all_leases_at_once():
    """A plan after single changes equals a new plan of the same leases."""
    chance = random.Random(7)
    plan, now = Plan(BOTH), {}
    routes, peers = {}, {}
    for _ in range(600):
        changes = []
        for _ in range(chance.randrange(1, 4)):
            key = f"k{chance.randrange(8)}"
            new = None
            if chance.random() < 0.7:
                data = chance.choice([None, embed(VXLAN, ADVERT), VXLAN])
                new = lease(chance.randrange(1, 6), chance.choice(["", "vxlan"]), data, key=key,
                            public=IPv4Address(chance.choice(PUBLIC)))
                wide = Subnets(IPv4Network("10.244.2.0/23"), None)
                new = replace(new, since=chance.randrange(3),
                              subnets=wide if chance.random() < 0.2 else new.subnets)
            if new is None and key not in now:
                continue
            changes.append(Change(now.get(key), new))
            if new is None:
                del now[key]
            else:
                now[key] = new
        delta = plan.change(changes)
        for sums, parts in ((routes, delta.of("udp")), (peers, delta.of("vxlan"))):
            for subnet, value in parts.items():
                if value is None:
                    del sums[subnet]
                else:
                    assert sums.get(subnet) != value
                    sums[subnet] = value
        assert plan.paths("udp") == routes
        assert plan.paths("vxlan") == peers
        fresh = Plan(BOTH, now.values())
        assert (fresh.paths("udp"), fresh.paths("vxlan")) == (routes, peers)
        assert plan.carried_n == fresh.carried_n
        assert plan.unreachable.keys() == fresh.unreachable.keys()
        # Each subnet of a usable lease has a path, or overlaps with the addresses of an older one.
        for peer in now.values():
            for one in reach(BOTH, peer)[0]:
                assert one.subnet in {*routes, *peers} or peer.key in plan.unreachable


def claims_agree(now):
    """Compare a plan with the rule, in slow form: from the oldest lease on, each lease gets its
    subnets and public address, unless they overlap with those of an older lease."""
    taken, expected = [], set()
    for peer in sorted(now, key=lambda one: (one.since, one.key)):
        usable = [one.subnet for one in reach(BOTH, peer)[0]]
        public = IPv4Network(peer.attributes.public_ip)
        if not usable or any(public.overlaps(net) for net, is_public in taken if not is_public):
            continue
        if public.overlaps(NET4):
            taken.append((public, True))
        for subnet in usable:
            if not any(subnet.overlaps(net) for net, _ in taken):
                taken.append((subnet, False))
                expected.add((peer.key, subnet))
    plan = Plan(BOTH, now)
    return {(one.key, one.subnet) for one in plan} == expected


def test_of_overlapping_leases_the_older_one_has_the_addresses():
    chance = random.Random(11)
    for _ in range(300):
        now = []
        for n in range(chance.randrange(1, 9)):
            length = chance.choice([22, 23, 24, 24, 24, 25])
            base = (10 << 24) + (244 << 16) + (chance.randrange(4, 12) << 8)
            public = chance.choice([f"192.0.2.{n + 2}", f"10.244.{chance.randrange(2, 12)}.7"])
            now.append(Lease(
                f"k{n}", Subnets(IPv4Network((base, length), strict=False)),
                Attributes(IPv4Address(public)), since=chance.randrange(4)))
        assert claims_agree(now)


def test_after_a_start_the_older_of_two_leases_with_one_mac_comes_first():
    """The first of two VXLAN peers with one MAC address keeps it (udptun/net/vxlan_peers.py)."""
    old, thief = (replace(lease(n, "vxlan", VXLAN), since=n) for n in (2, 3))
    for leases in ([old, thief], [thief, old]):
        assert [*Plan(VXLAN_ONLY, leases).paths("vxlan")] == [
            old.subnets.v4, thief.subnets.v4]


def test_a_change_with_many_rejected_leases_is_applied_in_seconds():
    """Each lease claims a subnet of the lease before and one of the lease after, so a change of one
    lease concerns all of them. Everyone who can write to the store can choose their number."""
    def peer(n, public):
        return Lease(f"k{n}", Subnets(
            IPv4Network((0x0A800000 + ((n + 1) // 2 << 4), 28)),
            IPv6Network((0xFD44 << 112 | 1 << 95 | n // 2 << 64, 64)),
        ), Attributes(IPv4Address(public), backend_data=embed(None, ADVERT)), since=n)

    local = replace(DUAL, networks=(IPv4Network("10.128.0.0/9"), NET6))
    leases = [peer(n, "192.0.2.2") for n in range(3000)]
    moved = [peer(n, "192.0.2.3" if n == 0 else "192.0.2.2") for n in range(3000)]
    plan = Plan(local, leases)
    began = time.process_time()
    plan.change([Change(leases[0], moved[0])])
    assert time.process_time() - began < 20
    fresh = Plan(local, moved)
    assert plan.paths("udp") == fresh.paths("udp")
    assert plan.unreachable.keys() == fresh.unreachable.keys()
    assert len(fresh.unreachable) > 1000


def test_overlap_agrees_with_ipaddress():
    chance = random.Random(1)
    for _ in range(2000):
        one, other = (
            ipaddress.ip_network((chance.getrandbits(6) << 26, chance.randrange(33)), strict=False)
            for _ in range(2)
        )
        assert _overlap(one, other) == one.overlaps(other)
