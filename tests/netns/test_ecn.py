"""Congestion marks and DSCP between two forwarders. A router on the path sets the marks."""

import json
import socket

import pytest

from tests.netns.netns_traffic import (
    assert_invariant,
    settled_packets,
    skip_without_programs,
    snmp,
    snmp6,
    transfer_tcp,
)
from tests.netns.test_takeover import take_over
from udptun.lab import Forwarder, OnePacket, node, pair, ping, wait_for
from udptun.lab.pair import Pair
from udptun.net.udp import keeps_marks, kernel_release

MIDDLE = 1500
EXPRESS = ("--accelerate", "auto")


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


# The router marks every n-th datagram to a forwarder, as an active queue management does if it has
# congestion: only if ECN says that the sender understands marks. `count` counts datagrams by field.
ROUTER = """
table inet congestion {{
    counter ip0 {{ }}
    counter ip1 {{ }}
    counter ip2 {{ }}
    counter ip3 {{ }}
    counter dscp {{ }}
    counter marked {{ }}
    chain forward {{
        type filter hook forward priority 0;
        udp dport != 8285 accept
        {ip} dscp 46 counter name dscp
        {ip} ecn not-ect counter name ip0
        {ip} ecn ect1 counter name ip1
        {ip} ecn ect0 counter name ip2
        {ip} ecn ce counter name ip3
        {match} numgen inc mod {n} 0 {ip} ecn set ce counter name marked
    }}
}}
"""


def mark(tunnel: Pair, outer: int, n: int, also_without_ecn: bool = False) -> None:
    """Let the router beside ``a`` mark every n-th datagram in both directions."""
    ip = "ip" if outer == 4 else "ip6"
    match = "" if also_without_ecn else f"{ip} ecn {{ ect0, ect1 }}"
    tunnel.link.routers[0].nft(ROUTER.format(ip=ip, n=n, match=match))


def counted(tunnel: Pair) -> dict[str, int]:
    text = tunnel.link.routers[0].run(["nft", "-j", "list", "counters"]).stdout
    found = [one["counter"] for one in json.loads(text)["nftables"] if "counter" in one]
    return {one["name"]: one["packets"] for one in found}


def udp_messages(host, outer):
    """Return how many UDP messages the programs of a host have received."""
    if outer == 6:
        return netstat(host, "Udp6InDatagrams")
    return snmp(host, "Udp")["InDatagrams"]


def netstat(host, name):
    """Return a counter of /proc/net/netstat, or of snmp6."""
    lines = host.run(["cat", "/proc/net/netstat"]).stdout.splitlines()
    found = {}
    for names, values in zip(lines[::2], lines[1::2], strict=True):
        found |= dict(zip(names.split()[1:], map(int, values.split()[1:]), strict=True))
    return (found | snmp6(host))[name]


def ecn_pair(lab, *, outer=4, words=("ecn", "ecn"), extra=(), **options):
    if extra[:2] == EXPRESS:
        skip_without_programs()
    tunnel = pair(lab, outer=outer, middle_mtu=MIDDLE, start=False, **options)
    for side, other, word in zip(tunnel.sides, tunnel.sides[::-1], words, strict=True):
        side.options["routes"] = [f"{route} {word}" for route in side.routes_to(other)]
        side.start(extra=extra)
        side.pod.sysctl("net.ipv4.tcp_ecn=1")
    if extra[:2] == EXPRESS:
        for side in tunnel.sides:
            wait_for(lambda s=side: s.forwarder.status()["accelerate"]["active"], "the kernel")
    return tunnel


def kernel_packets(side):
    return side.forwarder.status()["accelerate"]["packets"]


def marked(side):
    in_workers = sum(worker["ecn_marked"] for worker in side.forwarder.status()["workers"])
    return in_workers + kernel_packets(side)["receive_marked"]


@pytest.mark.parametrize(("path", "outer"), [
    ("auto", 4), slow("auto", 6), slow("off", 4), slow("off", 6), slow("express", 4),
    ("express", 6)])
def test_marks_of_the_path_reach_tcp(lab, outer, path):
    """The receiver counts marked packets, the sender is told of them, and nothing is lost."""
    if path == "express":
        tunnel = ecn_pair(lab, outer=outer, words=("express ecn",) * 2, extra=EXPRESS)
    else:
        tunnel = ecn_pair(lab, outer=outer, offload=path)
    a, b = tunnel.sides
    mark(tunnel, outer, 50)
    for address, in_ce in ((b.pod_v4, "InCEPkts"), (b.pod_v6, "Ip6InCEPkts")):
        delivered = netstat(a.pod, "TCPDeliveredCE")
        transfer_tcp(a.pod, b.pod, address)
        assert netstat(b.pod, in_ce) > 0
        assert netstat(a.pod, "TCPDeliveredCE") > delivered
    counts = counted(tunnel)
    assert counts["ip2"] > 0 and counts["ip1"] == counts["dscp"] == 0
    for side in tunnel.sides:
        assert marked(side) > 0
        in_kernel = kernel_packets(side)["receive_marked"]
        assert in_kernel > 0 if path == "express" else in_kernel == 0
        assert ("decap", "congestion") not in side.forwarder.drops()
        assert sum(w["ecn_unexpected"] for w in side.forwarder.status()["workers"]) == 0
        assert_invariant(side.forwarder)


@pytest.mark.parametrize("outer", [4, slow(6)])
def test_no_mark_is_lost_by_udp_gro(lab, outer):
    """The router marks single datagrams. The receiver's kernel joins the others, and not these."""
    if not keeps_marks(kernel_release()):
        pytest.skip("UDP_GRO of this kernel joins datagrams with different marks")
    tunnel = ecn_pair(lab, outer=outer)
    tunnel.link.profile("P2")
    for end in tunnel.link.wires[1:-1]:
        end.offloads({"gro": "off"})
    mark(tunnel, outer, 10)
    transfer_tcp(tunnel.a.pod, tunnel.b.pod, tunnel.b.pod_v4)
    for side in tunnel.sides:
        settled_packets(side.forwarder)
    marks = counted(tunnel)["marked"]
    assert marks > 100
    assert sum(marked(side) for side in tunnel.sides) == marks
    # The kernel counts a joined message once.
    messages = sum(udp_messages(side.host, outer) for side in tunnel.sides)
    received = sum(side.forwarder.status()["packets"]["decap"]["read"] for side in tunnel.sides)
    assert 0 < messages < received


@pytest.mark.parametrize("outer", [4, slow(6)])
def test_a_peer_without_ecn_gets_no_field(lab, outer):
    """Only b's route to a has the word. So the router can mark only datagrams of b."""
    tunnel = ecn_pair(lab, outer=outer, words=("", "ecn"))
    a, b = tunnel.sides
    mark(tunnel, outer, 20)
    transfer_tcp(a.pod, b.pod, b.pod_v4)
    assert marked(b) == 0 == netstat(b.pod, "InCEPkts")
    assert marked(a) > 0 and netstat(a.pod, "InCEPkts") > 0


def test_a_stock_peer_loses_no_mark(lab, onepacket):
    """It ignores the outer header. So it must get none of the packet's field."""
    at_a, at_b = node(1), node(2)
    a, b = lab.host("a"), lab.host("b")
    link = lab.link(a, b, middle_mtu=MIDDLE)
    pods = a.pod(str(at_a.subnet)), b.pod(str(at_b.subnet))
    for pod in pods:
        pod.sysctl("net.ipv4.tcp_ecn=1")
    forwarder = Forwarder.start(a, addresses=[at_a.v4], routes=[f"{at_b.subnet} via {b.v4}"])
    OnePacket.start(b, onepacket, address=at_b.v4, routes=[f"{at_a.subnet}={a.v4}:8285"])
    tunnel = Pair(lab, link, None, None)
    mark(tunnel, 4, 1)
    transfer_tcp(*pods, at_b.subnet[2], size=1 << 20)
    counts = counted(tunnel)
    assert counts["ip0"] > 0 and counts["ip1"] == counts["ip2"] == counts["ip3"] == 0
    for pod in pods:
        assert netstat(pod, "InECT0Pkts") > 0  # the connection uses ECN
        assert netstat(pod, "InCEPkts") == 0
    assert_invariant(forwarder)


@pytest.mark.parametrize(("express", "outer"), [
    (False, 6), slow(False, 4), slow(True, 4), slow(True, 6)])
def test_a_mark_that_the_sender_cannot_see_is_a_loss(lab, outer, express):
    """A faulty router marks datagrams whose sender does not use ECN."""
    words, extra = (("express ecn",) * 2, EXPRESS) if express else (("ecn",) * 2, ())
    tunnel = ecn_pair(lab, outer=outer, words=words, extra=extra)
    a, b = tunnel.sides
    assert ping(a.pod, b.pod_v4).received == 3
    mark(tunnel, outer, 1, also_without_ecn=True)
    for address in (b.pod_v4, b.pod_v6):
        assert ping(a.pod, address, count=2, wait=0.2).received == 0
    assert b.forwarder.drops()["decap", "congestion"] >= 4
    assert (kernel_packets(b)["receive_ecn"] >= 4) == express
    assert_invariant(b.forwarder)


@pytest.mark.parametrize(("dscp", "seen", "express", "outer"), [
    ("inherit", True, False, 4), *(
        slow(dscp, seen, express, outer) for dscp, seen, express in (
            ("46", True, False), ("46", True, True), ("inherit", True, True), ("0", False, False))
        for outer in (4, 6))])
def test_the_dscp_of_datagrams(lab, dscp, seen, express, outer):
    extra = (*(EXPRESS if express else ()), "--dscp", dscp)
    tunnel = ecn_pair(lab, outer=outer, words=("express" * express,) * 2, extra=extra)
    a, b = tunnel.sides
    assert a.forwarder.status()["dscp"] == dscp
    mark(tunnel, outer, 1)
    with a.pod.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender, \
            b.pod.socket(socket.AF_INET, socket.SOCK_DGRAM) as receiver:
        receiver.bind((str(b.pod_v4), 0))
        receiver.settimeout(30)
        receiver.setsockopt(socket.IPPROTO_IP, 13, 1)  # IP_RECVTOS
        sender.setsockopt(socket.IPPROTO_IP, socket.IP_TOS, 46 << 2)
        sender.sendto(b"expedited", receiver.getsockname())
        _, control, _, _ = receiver.recvmsg(64, 64)
    assert control == [(socket.IPPROTO_IP, socket.IP_TOS, bytes([46 << 2]))]
    assert (counted(tunnel)["dscp"] > 0) == seen
    assert (kernel_packets(a)["sent"] > 0) == express
    assert counted(tunnel)["ip0"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("outer", [4, 6])
def test_a_forwarder_that_takes_over_uses_its_own_dscp(lab, outer):
    tunnel = ecn_pair(lab, outer=outer, words=("", ""))
    a, b = tunnel.sides
    mark(tunnel, outer, 1)
    assert ping(a.pod, b.pod_v4).received == 3
    assert counted(tunnel)["dscp"] == 0
    take_over(a, extra=["--take-over", "--dscp", "46"])
    assert ping(a.pod, b.pod_v4).received == 3
    assert counted(tunnel)["dscp"] >= 3
