"""A path MTU below the MTU of both ends: learned and reported to the sender, or configured."""

import json

import pytest

from tests.netns.netns_traffic import assert_invariant, nft_counters, snmp, transfer_tcp
from udptun.lab import pair, ping, wait_for

MIDDLE = 1400
INNER = MIDDLE - 28
BIG = 1400  # of ping's payload: 1428 bytes of IPv4, 1448 of IPv6, more than INNER, less than 1472


@pytest.fixture
def narrow(lab):
    return pair(lab, middle_mtu=MIDDLE)


@pytest.mark.parametrize("where", ["host", "pod"])
@pytest.mark.parametrize("inner", [4, 6])
def test_the_sender_gets_the_path_mtu_by_icmp(narrow, where, inner):
    a, b = narrow.sides
    sender = getattr(a, where)
    target = {(4, "host"): b.v4, (6, "host"): b.v6, (4, "pod"): b.pod_v4, (6, "pod"): b.pod_v6}
    # The narrow link drops the first; the forwarder has learned the MTU when the next arrive.
    result = ping(sender, target[inner, where], count=4, size=BIG, df=True, wait=0.5)
    assert result.received == 0
    assert any(f"mtu={INNER}" in e.replace(" = ", "=") for e in result.errors), result
    told_by = a.v4 if inner == 4 else a.v6
    assert any(e.startswith(f"From {told_by}") for e in result.errors), result
    (peer,) = a.forwarder.status()["peers"]
    assert peer["path_mtu"] == MIDDLE
    drops = a.forwarder.drops()
    assert drops["encap", "too_big"] >= 1
    fits = INNER - (28 if inner == 4 else 48)
    assert ping(sender, target[inner, where], size=fits, df=True).received == 3
    assert_invariant(a.forwarder)


def test_tcp_works_over_a_smaller_path_mtu(narrow):
    a, b = narrow.sides
    transfer_tcp(a.host, b.host, b.v4)
    transfer_tcp(b.host, a.host, a.v6)
    transfer_tcp(a.pod, b.pod, b.pod_v4)
    transfer_tcp(b.pod, a.pod, a.pod_v6)


def test_ipv4_that_may_be_fragmented_is_fragmented_inside(narrow):
    a, b = narrow.sides
    for here, there in ((a, b), (b, a)):  # both learn the path
        ping(here.host, there.v4, count=2, size=BIG, df=True, wait=0.3)
    joined = snmp(b.pod, "Ip")["ReasmOKs"]
    with nft_counters(
        b.host, b.host.interfaces[0].name, outer="ip frag-off & 0x3fff != 0"
    ) as fragments:
        result = ping(a.pod, b.pod_v4, count=5, size=BIG, df=False)
        assert fragments.packets()["outer"] == 0
    assert result.received == 5, result
    assert snmp(b.pod, "Ip")["ReasmOKs"] - joined == 5
    packets = assert_invariant(a.forwarder)
    assert packets["encap"]["generated"] >= 5


def test_mtu_of_a_route_where_icmp_is_filtered(narrow):
    a, b = narrow.sides
    for router in narrow.link.routers:
        router.nft(
            "table inet silent {\n chain c {\n  type filter hook output priority 0;\n"
            "  icmp type destination-unreachable drop\n  icmpv6 type packet-too-big drop\n }\n}\n"
        )
    result = ping(a.pod, b.pod_v4, count=3, size=BIG, df=True, wait=0.3)
    assert (result.received, result.errors) == (0, ()), "the filter does not filter"
    for here, there in ((a, b), (b, a)):
        for subnet in (there.node.subnet, there.node.subnet6):
            here.forwarder.udptun(
                "route", "replace", str(subnet), "via", str(there.outer), "mtu", str(INNER)
            )
    result = ping(a.pod, b.pod_v4, count=2, size=BIG, df=True, wait=0.5)
    assert any(f"mtu = {INNER}" in e for e in result.errors), result
    transfer_tcp(a.pod, b.pod, b.pod_v4)
    transfer_tcp(a.host, b.host, b.v6)
    verdict = json.loads(a.forwarder.udptun("trace", str(b.pod_v4), "-o", "json").stdout)
    assert (verdict["verdict"], verdict["mtu"]) == ("forward", INNER)


def test_a_learned_mtu_is_an_event(narrow):
    a, b = narrow.sides
    reader = a.forwarder.start_udptun("events", "-w", "-o", "json")
    reader.wait_for_output("hello")
    ping(a.host, b.v4, count=2, size=BIG, df=True, wait=0.3)
    wait_for(lambda: "peer_mtu" in reader.text(), "the event")
    lines = [json.loads(line) for line in reader.text().splitlines() if "peer_mtu" in line]
    assert lines[0]["endpoint"] == f"{b.outer}:8285"
    assert lines[0]["path_mtu"] == MIDDLE
