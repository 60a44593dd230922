"""The express path: what passes in the kernel, what does not, and what it leaves behind."""

import asyncio
import contextlib
import ipaddress
import itertools
import json
import os
import random
import re
import shutil
import signal
import socket
import threading
import time
from dataclasses import replace

import pytest

from tests import reference
from tests.netns.cluster_traffic import SteadyPing
from tests.netns.netns_traffic import (
    assert_invariant,
    exchange_udp,
    settled,
    skip_without_programs,
    snmp,
    snmp6,
    transfer_tcp,
)
from tests.netns.test_node_hosts import Overlay, forwarder_of, standby_of
from tests.netns.test_takeover import SO_RCVBUFFORCE, Stream, copies_of, take_over
from tests.wire.craft import ICMP, TCP, Flow, ip4, ip6, unfinished
from udptun.lab import node, pair, ping, wait_for
from udptun.lab.cluster import Cluster, etcd_obstacle
from udptun.lab.tunnels import PORT, Forwarder
from udptun.model import Endpoint, Route
from udptun.takeover.channel import close_all
from udptun.takeover.kept import variable

SO_NO_CHECK, UDP_NO_CHECK6_TX = 11, 101
ON = ("--accelerate", "auto")


@pytest.fixture(scope="module", autouse=True)
def programs():
    """Skip the tests without programs."""
    skip_without_programs()


def express_pair(lab, *, outer=4, profile="P1", extra=(ON, ON), **options):
    """Return a pair whose routes have ``express``, and wait until its programs are attached."""
    tunnel = pair(lab, outer=outer, start=False, **options)
    tunnel.link.profile(profile)
    for side, other, more in zip(tunnel.sides, tunnel.sides[::-1], extra, strict=True):
        side.options["routes"] = [f"{route} express" for route in side.routes_to(other)]
        side.start(extra=more)
    for side, more in zip(tunnel.sides, extra, strict=True):
        if more:
            # Both: a peer is active before the kernel has the programs. The kernel drops packets
            # while they are attached.
            wait_for(lambda s=side: (now := accelerate(s))["active"] and now["receives"],
                     "the express path")
    # The kernel drops packets while programs are attached; these packets are not counted.
    first, second = tunnel.sides
    wait_for(lambda: ping(first.host, second.outer, count=10).received == 10, "the underlay")
    return tunnel


def accelerate(side):
    return side.forwarder.status()["accelerate"]


def kernel_packets(side):
    return accelerate(side)["packets"]


def too_big(host):
    """Return how many packets the host has not forwarded because they were too big."""
    return snmp(host, "Ip")["FragFails"] + snmp6(host)["Ip6InTooBigErrors"]


def filters(host):
    """Return the names of the BPF filters on all devices."""
    names = []
    for device in json.loads(host.run(["ip", "-j", "link"]).stdout):
        of_device = set()  # with an ingress qdisc, tc shows a filter at both hooks
        for hook in ("ingress", "egress"):
            text = host.run(["tc", "filter", "show", "dev", device["ifname"], hook], check=False)
            of_device |= {word for word in text.stdout.split() if word.startswith("udptun-")}
        names += sorted(of_device)
    return names


@pytest.mark.parametrize("outer", [4, 6])
def test_packets_pass_in_the_kernel(lab, outer):
    tunnel = express_pair(lab, outer=outer)
    a, b = tunnel.sides
    for host, addresses in ((a.host, (b.v4, b.v6)), (a.pod, (b.pod_v4, b.pod_v6))):
        for address in addresses:
            assert ping(host, address).received == 3
    for side in tunnel.sides:
        counted = kernel_packets(side)
        assert (counted["sent"], counted["received"]) == (12, 12)
    for address in (b.v4, b.v6):
        transfer_tcp(a.host, b.host, address)
    for address in (b.pod_v4, b.pod_v6):
        transfer_tcp(a.pod, b.pod, address)
    exchange_udp(a.pod, b.pod, b.pod_v4, 1400)
    exchange_udp(a.host, b.host, b.v6, 1380)
    for side in tunnel.sides:
        counted, packets = kernel_packets(side), assert_invariant(side.forwarder)
        assert counted["sent"] > 4 * (4 << 20) / 1500 * 0.9
        assert packets["encap"]["delivered"] >= counted["sent"]
        assert accelerate(side)["generation"] == accelerate(side)["kernel_generation"]
        passed = 'udptun_express_packets_total{direction="encap",state="passed"}'
        assert metric(side, passed) == counted["sent"]
        assert metric(side, "udptun_express_active") == metric(side, "udptun_express_peers") == 1
        shown = side.forwarder.udptun("status").stdout
        device = side.host.interfaces[0].name
        assert f"express path: active on {device}\n" in shown
        assert re.search(r"in the kernel: \d+ of \d+ sent packets \(\d+%\), \d+ of \d+ received",
                         shown)
    (sent,), (received,) = (side.forwarder.status()["peers"] for side in tunnel.sides)
    assert sent["encap"] == received["decap"]
    assert received["last_seen_seconds"] is not None
    assert a.forwarder.stop() == 0
    assert filters(a.host) == []
    assert "clsact" not in a.host.run(["tc", "qdisc", "show"]).stdout
    assert len(filters(b.host)) == 2


@pytest.mark.parametrize(("profile", "outer"), [("P1", 4), ("P3", 6)])
def test_a_peer_without_programs_finishes_the_checksums(lab, profile, outer):
    """Its route still says that the peer may send from its kernel, for example after a restart."""
    tunnel = express_pair(lab, profile=profile, outer=outer, extra=(ON, ()))
    a, b = tunnel.sides
    for address in (b.pod_v4, b.pod_v6):
        assert ping(a.pod, address).received == 3
        transfer_tcp(a.pod, b.pod, address, size=1 << 18)
    # A super-packet arrives whole at b: it is cut, so no packet is too big for the way to the pod.
    assert too_big(b.host) == 0
    assert kernel_packets(a)["sent"] >= 6
    assert kernel_packets(b)["received"] == 0
    assert accelerate(b)["reason"] == "--accelerate off"
    for side in tunnel.sides:
        assert_invariant(side.forwarder)


def mtu_of(host):
    return int(host.run(["cat", "/sys/class/net/udptun0/mtu"]).stdout)


def set_mtu(tunnel, link_mtu):
    for end in (tunnel.link.a, tunnel.link.b):
        end.set_mtu(link_mtu)
    for side in tunnel.sides:
        wait_for(lambda host=side.host: mtu_of(host) == link_mtu - 28, "the MTU")


def test_super_packets_are_cut_for_the_present_mtu(lab):
    """The receiver has no programs, and the MTU has become smaller since it was started."""
    tunnel = express_pair(lab, extra=(ON, ()))
    a, b = tunnel.sides
    set_mtu(tunnel, 9000)
    b.forwarder.stop()
    b.start()
    set_mtu(tunnel, 1500)
    transfer_tcp(a.pod, b.pod, b.pod_v4, size=1 << 18)
    assert kernel_packets(a)["sent"] > 0
    assert too_big(b.host) == 0
    for side in tunnel.sides:
        assert_invariant(side.forwarder)


def test_the_kernel_sends_from_the_new_address_after_a_move(lab):
    """The host has both addresses. No packet may leave from the former one after the answer."""
    tunnel = express_pair(lab)
    a, b = tunnel.sides
    end = tunnel.link.a
    old, new = end.v4.ip, end.v4.network[7]
    a.host.ip(f"address add {new}/{end.v4.network.prefixlen} dev {end.name}")
    wait_for(lambda: ping(a.pod, b.pod_v4).received == 3, "answers")
    for route in b.routes_to(a):
        b.forwarder.udptun("route", "replace", route.split()[0], "via", str(new), "express")
    wait_for(lambda: accelerate(b)["active"], "the routes to the new address")
    body = json.dumps({"listen": [f"{new}:{PORT}"]}).encode()
    status, answer = a.forwarder.request("PUT", "/v1/device", body)
    assert status == 200, answer
    for address in (b.pod_v4, b.pod_v6):
        assert ping(a.pod, address).received == 3
    assert ("decap", "unknown_peer") not in b.forwarder.drops()
    wait_for(lambda: accelerate(a)["active"] and accelerate(a)["receives"], "the express path")
    before = kernel_packets(a)
    assert ping(a.pod, b.pod_v4).received == 3
    after = kernel_packets(a)
    assert after["sent"] - before["sent"] == after["received"] - before["received"] == 3
    assert str(old) not in json.dumps(a.forwarder.status()["device"])


def test_nothing_is_sent_from_the_kernel_to_a_peer_without_express(lab):
    tunnel = pair(lab, extra=ON)
    a, b = tunnel.sides
    transfer_tcp(a.pod, b.pod, b.pod_v4, size=1 << 18)
    for side in tunnel.sides:
        assert not accelerate(side)["active"]
        assert accelerate(side)["reason"] == "no peer can receive in the kernel"
        assert accelerate(side)["receives"]
        assert sorted(filters(side.host)) == ["udptun-receive-udptun0", "udptun-send-udptun0"]
        assert side.forwarder.status()["peers"][0]["express"]["reason"]
        shown = side.forwarder.udptun("status").stdout
        assert "express path: off: no peer can receive in the kernel\n" in shown
        assert re.search(r"left to workers: .*\d+ send_no_route", shown)
        assert metric(side, "udptun_express_active") == 0
        assert metric(side, "udptun_express_receives") == 1
        left = metric(side, 'udptun_express_left_total{direction="encap",reason="no_route"}')
        assert left == kernel_packets(side)["send_no_route"] > 0
        (peer,) = side.forwarder.status()["peers"]
        assert "express path: off: its route has no `express`\n" in side.forwarder.udptun(
            "status", peer["endpoint"]).stdout
    assert kernel_packets(a)["send_no_route"] > (1 << 18) / 1472  # packets, not super-packets
    a.forwarder.udptun("route", "replace", str(b.node.subnet), "via", str(b.outer), "express")
    wait_for(lambda: accelerate(a)["active"], "the express path")
    assert ping(a.pod, b.pod_v4).received == 3
    assert kernel_packets(a)["sent"] == 3
    a.forwarder.udptun("route", "del", str(b.node.subnet))  # at once, also in the kernel
    assert ping(a.pod, b.pod_v4, count=1, wait=0.2).received == 0
    assert kernel_packets(a)["sent"] == 3


def answers_over_tcp(tunnel, size, n):
    """Ask n times over one connection for an answer of this size."""
    a, b = tunnel.sides
    with b.pod.socket(socket.AF_INET, socket.SOCK_STREAM) as listener, \
            a.pod.socket(socket.AF_INET, socket.SOCK_STREAM) as client:
        listener.bind((str(b.pod_v4), 0))
        listener.listen(1)
        client.connect(listener.getsockname())
        server, _ = listener.accept()
        with server:
            for end in (client, server):
                end.settimeout(30)
            for _ in range(n):
                client.send(b"?")
                assert server.recv(1) == b"?"
                server.sendall(bytes(size))
                assert len(client.recv(size, socket.MSG_WAITALL)) == size


def test_answers_of_a_few_segments_stay_in_the_kernel(lab):
    """On a link that segments, only bulk moves to the workers."""
    tunnel = express_pair(lab, profile="P2")
    a, b = tunnel.sides
    answers_over_tcp(tunnel, 4096, 20)
    counted = kernel_packets(b)
    assert counted["send_flow"] == 0
    assert counted["sent"] >= 20 * 3
    transfer_tcp(b.pod, a.pod, a.pod_v4)
    assert kernel_packets(b)["send_flow"] > 1000  # packets, not super-packets


def test_a_flow_that_changes_its_path_keeps_its_order(lab):
    """A flood moves to the workers. When the flow has been idle, it passes in the kernel again."""
    tunnel = express_pair(lab, profile="P2")
    a, b = tunnel.sides
    numbers, ended = [], threading.Event()
    with b.pod.socket(socket.AF_INET, socket.SOCK_DGRAM) as receiver, \
            a.pod.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        receiver.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 1 << 24)
        receiver.bind((str(b.pod_v4), 0))
        receiver.settimeout(0.2)
        sender.connect(receiver.getsockname())
        count = itertools.count()

        def receive():
            while not ended.is_set():
                with contextlib.suppress(TimeoutError):
                    numbers.append(int.from_bytes(receiver.recv(64), "big"))

        def send(n, pause=0.0):
            for _ in range(n):
                sender.send(next(count).to_bytes(8, "big"))
                time.sleep(pause)

        thread = threading.Thread(target=receive)
        thread.start()
        try:
            for _ in range(3):
                before = kernel_packets(a)
                send(100, 0.001)
                now = kernel_packets(a)
                assert now["sent"] - before["sent"] >= 100
                assert now["send_flow"] == before["send_flow"]

                def flood(start=now["send_flow"]):
                    for _ in range(2000):
                        sender.send(next(count).to_bytes(8, "big"))
                    return kernel_packets(a)["send_flow"] > start + 5000

                wait_for(flood, "the flow to move to the workers")
                before = kernel_packets(a)
                send(100, 0.001)
                assert kernel_packets(a)["send_flow"] - before["send_flow"] == 100
                time.sleep(1.1)  # so long must it be idle
        finally:
            ended.set()
            thread.join()
    assert len(numbers) > 300
    assert numbers == sorted(set(numbers))


def test_a_flow_stays_with_the_workers_when_its_peer_becomes_active(lab):
    """What waits at a worker would arrive after what the kernel sends."""
    tunnel = express_pair(lab)
    a, b = tunnel.sides
    policy = ["src", str(a.outer), "dst", str(b.outer), "proto", "udp", "dir", "out"]
    a.host.run(["ip", "xfrm", "policy", "add", *policy, "action", "allow"])
    wait_for(lambda: not accelerate(a)["active"], "the express path to end")
    with Stream(a.pod, b.pod, b.pod_v4) as stream:
        wait_for(lambda: kernel_packets(a)["send_peer"] > 100, "the stream")
        sent = kernel_packets(a)["sent"]
        a.host.run(["ip", "xfrm", "policy", "flush"])
        wait_for(lambda: accelerate(a)["active"], "the express path")
        flow = kernel_packets(a)["send_flow"]
        wait_for(lambda: kernel_packets(a)["send_flow"] > flow + 100, "the stream")
        assert kernel_packets(a)["sent"] == sent
    stream.assert_complete()


def test_flows_of_the_workers_pass_in_the_kernel_if_the_forwarder_stands_still(lab):
    """Nobody reads the TUN, as after a kill while another process holds the TUN."""
    tunnel = express_pair(lab, profile="P2")
    a, b = tunnel.sides
    transfer_tcp(a.pod, b.pod, b.pod_v4)
    before = kernel_packets(a)
    assert before["send_flow"] > 0
    a.forwarder.process.signal(signal.SIGSTOP)
    try:
        answers_over_tcp(tunnel, 4096, 10)
        transfer_one_way(a.pod, b.pod, b.pod_v4, 4 << 20)
    finally:
        a.forwarder.process.signal(signal.SIGCONT)
    wait_for(lambda: kernel_packets(a)["sent"] - before["sent"] > 2000, "the counters")
    transfer_tcp(a.pod, b.pod, b.pod_v4)
    assert_invariant(a.forwarder)


def transfer_one_way(client, server, address, size):
    with server.socket(socket.AF_INET, socket.SOCK_STREAM) as listener, \
            client.socket(socket.AF_INET, socket.SOCK_STREAM) as calling:
        listener.bind((str(address), 0))
        listener.listen(1)
        calling.settimeout(60)
        calling.connect(listener.getsockname())
        accepted, _ = listener.accept()
        with accepted:
            accepted.settimeout(60)
            thread = threading.Thread(target=calling.sendall, args=(bytes(size),))
            thread.start()
            left = size
            while left:
                left -= len(accepted.recv(1 << 16))
            thread.join()


def test_without_the_tun_datagrams_reach_another_program(lab):
    """A killed forwarder has left its program. A flanneld that listens now gets the datagrams."""
    tunnel = express_pair(lab)
    a, b = tunnel.sides
    assert ping(b.pod, a.pod_v4).received == 3
    a.forwarder.process.kill()
    wait_for(lambda: not json.loads(a.host.run(
        ["ip", "-j", "link", "show", "udptun0"], check=False).stdout or "[]"), "no TUN")
    assert filters(a.host) == ["udptun-receive-udptun0"]
    with a.host.socket(socket.AF_INET, socket.SOCK_DGRAM) as flanneld:
        flanneld.bind((str(a.outer), PORT))
        flanneld.settimeout(30)
        sent = kernel_packets(b)["sent"]
        assert ping(b.pod, a.pod_v4, count=1, wait=0.1).received == 0
        assert kernel_packets(b)["sent"] == sent + 1
        assert flanneld.recv(2000)[16:20] == a.pod_v4.packed


def own_addresses(host):
    found = json.loads(host.run(["ip", "-j", "address"]).stdout)
    return [ipaddress.ip_address(one["local"]) for link in found for one in link["addr_info"]]


def no_checksum_socket(host, address, port):
    family = socket.AF_INET6 if address.version == 6 else socket.AF_INET
    sock = host.socket(family, socket.SOCK_DGRAM)
    if address.version == 6:
        sock.setsockopt(socket.IPPROTO_UDP, UDP_NO_CHECK6_TX, 1)
    else:
        sock.setsockopt(socket.SOL_SOCKET, SO_NO_CHECK, 1)
    sock.bind((str(address), port))
    return sock


def hostile_packet(rng):
    """A packet from a peer: usual, or wrong in one or several ways."""
    version = rng.choice((4, 4, 6))
    source, to = rng.choice((2, 2, 2, 2, 3, 1)), rng.choice((1, 1, 1, 9))
    host = rng.choice((7, 7, 0))
    flow = Flow(
        version,
        src=ipaddress.ip_address(
            f"10.244.{source}.{host}" if version == 4 else f"fd44:0:{source}::{host + 15}").packed,
        dst=ipaddress.ip_address(f"10.244.{to}.9" if version == 4 else f"fd44:0:{to}::9").packed,
        ttl=rng.choice((64, 64, 64, 2, 1, 0)),
        flags=rng.choice((0x4000, 0x4000, 0, 0x2000, 0x0003)),
        ip_options=rng.choice((b"", b"", b"", b"\x01\x01\x01\x01")) if version == 4 else b"",
        extensions=rng.choice(((), (), ((60, bytes(6)),))) if version == 6 else (),
    )
    data = rng.randbytes(rng.choice((0, 1, 500, 1300)))
    packet = rng.choice((flow.udp, flow.tcp, lambda one: flow.ip(b"\x08\0\0\0" + one, ICMP)))(data)
    kind = rng.randrange(10)
    if kind == 0:
        packet += bytes(rng.randrange(1, 9))
    elif kind == 1:
        packet = packet[: rng.randrange(len(packet))]
    elif kind == 2:
        at = rng.randrange(min(len(packet), 44))
        packet = packet[:at] + rng.randbytes(1) + packet[at + 1 :]
    elif kind == 3:
        packet = unfinished(packet)
    elif kind == 4:
        make, short = (ip4, "total_len") if version == 4 else (ip6, "payload_len")
        packet = make(data, TCP, flow.source, flow.destination,
                      **{short: rng.choice((0, 19, 20, len(data) + 1, 65535))})
    return packet


@pytest.mark.parametrize(("outer", "source_check", "admit"), [
    (4, "strict", "own"), (6, "strict", "any"), (4, "peer", "own"), (4, "off", "any"),
])
def test_the_kernel_admits_no_packet_that_user_space_refuses(lab, outer, source_check, admit):
    """Datagrams with checksum 0 from a peer's address, from its port and from another one. All
    counters are those of the reference forwarder, on whichever path a packet has passed."""
    tunnel = pair(lab, outer=outer, start=False)
    a, b = tunnel.sides
    routes = [f"{route} express" for route in a.routes_to(b)]
    routes += [f"{node(3).subnet} via {b.outer + 50} express",
               f"{node(3).subnet6} via {b.outer + 50} express"]
    subnets = [a.node.subnet, a.node.subnet6]
    # An address of this host in a subnet of the peer: no packet may come from it.
    a.host.ip(f"address add {b.v4}/32 dev lo", f"address add {b.v6}/128 dev lo")
    a.start(routes=routes, source_check=source_check, extra=[
        *ON, "--admit", admit, *(word for net in subnets for word in ("--subnet", str(net)))])
    wait_for(lambda: accelerate(a)["active"], "the express path")
    expected = reference.ReferenceForwarder(
        [Route.from_words(route.split()) for route in routes],
        own_addresses=own_addresses(a.host), tun_addresses=[a.v4, a.v6],
        source_check=source_check, own_subnets=subnets if admit == "own" else None)
    before = settled(a.forwarder)[0]["decap"]
    rng = random.Random(f"{outer} {source_check} {admit}")
    with no_checksum_socket(b.host, b.outer, PORT) as right, \
            no_checksum_socket(b.host, b.outer, 9999) as wrong:
        for _ in range(400):
            sock = rng.choice((right, right, right, wrong))
            packet = hostile_packet(rng)
            expected.decap(Endpoint(b.outer, sock.getsockname()[1]), packet)
            sock.sendto(packet, (str(a.outer), PORT))
    packets, drops = settled(a.forwarder)
    wanted = {reason: n for (reason, where), n in expected.drops.items() if where == "decap" and n}
    assert {reason: n for (where, reason), n in drops.items() if where == "decap"} == wanted
    counts = expected.counts["decap"]
    assert packets["decap"]["read"] - before["read"] == 400
    # Packets that this host cannot forward cause ICMP errors, which are generated and delivered.
    delivered = packets["decap"]["delivered"] - packets["decap"]["generated"]
    assert delivered - before["delivered"] + before["generated"] == counts.delivered
    counted = kernel_packets(a)
    assert 10 < counted["received"] <= counts.delivered
    assert counted["receive_source"] > 10
    assert counted["receive_other"] > 10
    assert counted["receive_hop_limit"] > 0
    assert (counted["receive_destination"] > 0) == (admit == "own")
    assert_invariant(a.forwarder)


@pytest.mark.parametrize("outer", [4, 6])
def test_a_receiver_finishes_checksums_before_it_knows_that_the_peer_sends_so(lab, outer):
    """The peer has seen that we receive in the kernel; its own lease is not here yet."""
    tunnel = pair(lab, outer=outer, start=False)
    a, b = tunnel.sides
    a.start(extra=ON, routes=[f"{route} express" for route in a.routes_to(b)])
    b.start(extra=ON)
    wait_for(lambda: accelerate(a)["active"], "the express path")
    for address in (b.pod_v4, b.pod_v6):
        transfer_tcp(a.pod, b.pod, address, size=1 << 18)
    exchange_udp(a.pod, b.pod, b.pod_v4, 1400)
    assert kernel_packets(a)["sent"] > 50
    assert kernel_packets(b)["received"] == 0
    assert kernel_packets(b)["receive_source"] > 50


def test_other_programs_stay_and_turn_it_off(lab):
    tunnel = express_pair(lab)
    a, b = tunnel.sides
    device = a.host.interfaces[0].name
    a.host.run(["tc", "filter", "add", "dev", device, "ingress", "pref", "7", "protocol", "ip",
                "u32", "match", "ip", "protocol", "99", "0xff", "flowid", "1:1"])
    wait_for(lambda: not accelerate(a)["active"], "the express path to end")
    reason = a.forwarder.status()["peers"][0]["express"]["reason"]
    assert reason == f"a u32 filter is at the ingress of {device}"
    assert accelerate(a)["reason"] == reason
    assert accelerate(a)["receives"] is False
    wait_for(lambda: filters(a.host) == [], "the programs to be removed")
    before = kernel_packets(a)
    assert ping(a.pod, b.pod_v4).received == 3
    assert kernel_packets(a)["sent"] == before["sent"]
    shown = a.host.run(["tc", "filter", "show", "dev", device, "ingress"]).stdout
    assert "u32" in shown
    a.host.run(["tc", "filter", "del", "dev", device, "ingress", "pref", "7"])
    wait_for(lambda: accelerate(a)["active"], "the express path")
    a.host.run(["tc", "filter", "add", "dev", "udptun0", "egress", "pref", "7", "protocol", "ip",
                "u32", "match", "ip", "protocol", "99", "0xff", "flowid", "1:1"])
    wait_for(lambda: not accelerate(a)["active"], "the express path to end")
    assert "u32 filter is at the egress of udptun0" in accelerate(a)["reason"]
    assert a.forwarder.stop() == 0


def test_packets_that_need_ipsec_are_left_to_the_workers(lab):
    tunnel = express_pair(lab)
    a, b = tunnel.sides
    a.host.run(["ip", "xfrm", "policy", "add", "src", str(a.outer), "dst", str(b.outer),
                "proto", "udp", "dir", "out", "action", "block"])
    wait_for(lambda: not accelerate(a)["active"], "the express path to end")
    (peer,) = a.forwarder.status()["peers"]
    assert peer["express"] == {"active": False, "reason": "an IPsec policy applies"}
    before = kernel_packets(b)
    ping(a.pod, b.pod_v4, count=2, wait=0.2)
    assert kernel_packets(b)["received"] == before["received"]
    a.host.run(["ip", "xfrm", "policy", "flush"])
    wait_for(lambda: accelerate(a)["active"], "the express path")
    assert ping(a.pod, b.pod_v4).received == 3


def test_known_routes_keep_working_when_the_forwarder_is_killed(lab):
    tunnel = express_pair(lab)
    a, b = tunnel.sides
    assert ping(a.pod, b.pod_v4).received == 3
    kept = asyncio.run(copies_of(a))
    try:
        with Stream(a.pod, b.pod, b.pod_v4) as stream:
            wait_for(lambda: stream.sent > 100, "the stream")
            a.forwarder.process.kill()
            wait_for(lambda: stream.sent > 1100, "1000 datagrams without a forwarder")
            for address in (b.pod_v4, b.pod_v6):
                assert ping(a.pod, address, count=20).received == 20
            a.start(pass_fds=tuple(kept.values()), env=variable(kept), extra=ON)
            wait_for(lambda: accelerate(a)["active"], "the express path")
        stream.assert_complete()
    finally:
        close_all(kept)
    assert len(filters(a.host)) == 2
    a.forwarder.process.kill()  # the TUN goes too, and the next one has another index
    a.start(extra=ON)
    wait_for(lambda: accelerate(a)["active"], "the express path")
    assert ping(a.pod, b.pod_v4).received == 3
    assert kernel_packets(a)["sent"] >= 3
    a.forwarder.process.kill()
    a.start(extra=())  # off: it removes what the killed forwarder has left
    wait_for(lambda: filters(a.host) == [], "the filters to be removed")
    transfer_tcp(a.pod, b.pod, b.pod_v4, size=1 << 16)


def test_a_take_over_loses_no_packet(lab):
    tunnel = express_pair(lab)
    a, b = tunnel.sides
    with Stream(a.pod, b.pod, b.pod_v4) as stream:
        wait_for(lambda: stream.sent > 100, "the stream")
        take_over(a, extra=[*ON, "--take-over"])
        wait_for(lambda: accelerate(a)["active"], "the express path")
        take_over(b, extra=[*ON, "--take-over"])
        wait_for(lambda: accelerate(b)["active"], "the express path")
        before = kernel_packets(a)["sent"]
        take_over(a, extra=[*ON, "--take-over"])
        wait_for(lambda: accelerate(a)["active"], "the express path")
    stream.assert_complete()
    sent, received = settled(a.forwarder)[0], settled(b.forwarder)[0]
    assert sent["encap"]["delivered"] == received["decap"]["read"]
    assert 0 < before <= kernel_packets(a)["sent"] <= sent["encap"]["delivered"]
    [peer], [other] = (side.forwarder.status()["peers"] for side in tunnel.sides)
    assert peer["encap"] == other["decap"]
    for side in tunnel.sides:
        assert len(filters(side.host)) == 2
        assert_invariant(side.forwarder)


def test_a_smaller_mtu_of_the_underlay_applies(lab):
    tunnel = express_pair(lab)
    a, b = tunnel.sides
    for end in (tunnel.link.a, tunnel.link.b):
        end.set_mtu(1400)

    def refused():
        return any("1372" in error for error in
                   ping(a.pod, b.pod_v4, count=1, size=1400, df=True, wait=0.3).errors)

    wait_for(refused, "an ICMP error with the new MTU")
    time.sleep(1.1)  # so long must the flow be idle if the programs have refused one of its packets
    before = kernel_packets(a)["sent"]
    assert ping(a.pod, b.pod_v4, size=1372 - 28, df=True).received == 3
    assert kernel_packets(a)["sent"] - before == 3
    # Fragments, by the workers. The reply may be the first packet that is too large for b's path.
    wait_for(lambda: ping(a.pod, b.pod_v4, count=1, size=1400, df=False).received, "an answer")


@pytest.mark.parametrize("extra", [ON, ()])
def test_a_forwarder_with_another_tun_removes_what_a_killed_one_left(lab, extra):
    """The TUN of a program that is left is gone."""
    tunnel = express_pair(lab)
    a, b = tunnel.sides
    assert ping(a.pod, b.pod_v4).received == 3
    a.forwarder.process.kill()
    a.start(tun="udptun1", extra=extra)
    wait_for(lambda: len(filters(a.host)) == 2 * bool(extra) and
             not any("udptun0" in name for name in filters(a.host)), "the filters of udptun1")
    for address in (b.pod_v4, b.pod_v6):
        # The kernel drops packets while the hook is added to a device.
        wait_for(lambda to=address: ping(a.pod, to, count=1).received, "an answer")
        assert ping(a.pod, address).received == 3
    transfer_tcp(b.pod, a.pod, a.pod_v4, size=1 << 16)
    assert a.forwarder.stop() == 0
    assert filters(a.host) == []


def test_a_forwarder_on_another_interface_removes_what_a_killed_one_left(lab):
    tunnel = express_pair(lab)
    a = tunnel.a
    a.forwarder.process.kill()
    a.host.ip("link add other type veth peer name far", "address add 198.18.9.1/24 dev other",
              "link set far up", "link set other up")
    a.start(tun="udptun1", listen=["198.18.9.1"], routes=["10.244.2.0/24 via 198.18.9.2 express"],
            extra=ON)
    wait_for(lambda: accelerate(a)["active"], "the express path")
    wait_for(lambda: sorted(filters(a.host)) == ["udptun-receive-udptun1", "udptun-send-udptun1"],
             "the filters of udptun1")
    assert a.forwarder.stop() == 0
    assert filters(a.host) == []
    assert "clsact" not in a.host.run(["tc", "qdisc", "show"]).stdout


def qdiscs(host, device):
    found = json.loads(host.run(["tc", "-j", "qdisc", "show", "dev", device]).stdout)
    return [one["kind"] for one in found if one["kind"] in ("clsact", "ingress")]


def test_our_qdisc_is_known_after_our_filter_was_away(lab):
    """The address of the underlay goes and returns. Then the forwarder is killed."""
    tunnel = express_pair(lab)
    a, b = tunnel.sides
    device, address = a.host.interfaces[0].name, f"{a.outer}/24"
    a.host.ip(f"address del {address} dev {device}")
    wait_for(lambda: filters(a.host) == [], "no filter")
    assert qdiscs(a.host, device) == ["clsact"]
    a.host.ip(f"address add {address} dev {device}")
    wait_for(lambda: len(filters(a.host)) == 2, "the filters")
    assert ping(a.pod, b.pod_v4).received
    a.forwarder.process.kill()
    a.forwarder.process.wait()
    a.start()  # without the express path
    wait_for(lambda: qdiscs(a.host, device) == [], "no qdisc")


@pytest.mark.parametrize("kind", ["clsact", "ingress"])
def test_a_qdisc_that_is_not_ours_stays(lab, kind):
    """With an ingress qdisc, the device has the one hook that the path needs there."""
    tunnel = pair(lab, start=False)
    a, b = tunnel.sides
    device = a.host.interfaces[0].name
    a.host.run(["tc", "qdisc", "add", "dev", device, kind])
    for side, other in ((a, b), (b, a)):
        side.start(extra=ON, routes=[f"{route} express" for route in side.routes_to(other)])
    for side in tunnel.sides:
        wait_for(lambda s=side: (now := accelerate(s))["active"] and now["receives"], "the path")
    assert ping(a.pod, b.pod_v4).received == 3
    assert kernel_packets(a)["received"] == 3
    assert a.forwarder.stop() == 0
    assert (filters(a.host), qdiscs(a.host, device)) == ([], [kind])
    # The second forwarder removes what the first one leaves.
    for extra, filters_n in ((ON, 2), ((), 0)):
        a.start(extra=extra)
        wait_for(lambda n=filters_n: len(filters(a.host)) == n, "the filters")
        a.forwarder.process.kill()
        a.forwarder.process.wait()
    assert qdiscs(a.host, device) == [kind]


def test_an_ingress_qdisc_of_the_tun_turns_it_off(lab):
    """It has no hook for what leaves through the TUN. The kernel would put the program that sends
    at the other hook."""
    tunnel = express_pair(lab)
    a = tunnel.a
    batch = "qdisc del dev udptun0 clsact\nqdisc add dev udptun0 ingress\n"
    # The forwarder may add its qdisc again in between.
    wait_for(lambda: a.host.run(["tc", "-batch", "-"], text=batch, check=False).returncode == 0,
             "the other qdisc")
    wait_for(lambda: not accelerate(a)["active"], "the express path to end")
    assert "an ingress qdisc, which has no hook for sent packets" in accelerate(a)["reason"]
    assert a.forwarder.stop() == 0
    assert filters(a.host) == []


@pytest.mark.skipif(etcd_obstacle() is not None, reason=str(etcd_obstacle()))
def test_cleanup_removes_what_a_killed_forwarder_left(lab):
    """Also if the TUN has another name now."""
    cluster = Cluster(lab, 2, options=["--backend=udp", "--accelerate=auto"])
    cluster.start()
    a, _ = cluster.members
    device = a.host.interfaces[0].name
    wait_for(lambda: len(filters(a.host)) == 2, "the programs")
    a.daemon.signal(signal.SIGKILL)
    os.kill(a.forwarder_pid(), signal.SIGKILL)
    wait_for(lambda: filters(a.host) == ["udptun-receive-udptun0"], "the end of the TUN")
    assert qdiscs(a.host, device) == ["clsact"]
    a.host.run(a.argv("--cleanup", "--tun=udptun9"))
    assert filters(a.host) == []
    assert qdiscs(a.host, device) == []
    a.clean_up()


def test_the_programs_of_another_forwarder_stay(lab):
    tunnel = express_pair(lab)
    a, b = tunnel.sides
    a.host.ip("address add 198.51.100.1/32 dev lo")
    other = Forwarder.start(
        replace(a.host, name="a2"), listen=["198.51.100.1"], networks=["10.99.0.0/16"],
        tun="udptun9", routes=[f"10.99.1.0/24 via {b.outer} express"],
        extra=(*ON, "--instance", "other"))
    wait_for(lambda: len(filters(a.host)) == 4, "the programs of both")
    # The kernel may drop packets while the other forwarder starts.
    wait_for(lambda: ping(a.pod, b.pod_v4, count=1, wait=0.2).received, "an answer")
    before = kernel_packets(a)["received"]
    assert ping(a.pod, b.pod_v4).received == 3
    assert other.stop() == 0
    assert len(filters(a.host)) == 2
    assert kernel_packets(a)["received"] - before == 3


def test_a_datagram_on_another_interface_is_left_to_the_kernel(lab):
    """The kernel drops it if rp_filter is strict: its sender is reached through another one."""
    tunnel = pair(lab, start=False)
    a, b = tunnel.sides
    c = lab.host("c")
    c.sysctl("net.ipv4.conf.all.arp_announce=2")  # do not ask with the forged address
    link = lab.link(a.host, c)
    c.ip(f"address add {b.outer}/32 dev lo", f"route add {a.outer} via {link.a.v4.ip}")
    a.start(extra=ON, routes=[f"{b.node.subnet} via {b.outer} express",
                              f"{node(3).subnet} via {link.b.v4.ip} express"])
    wait_for(lambda: len(filters(a.host)) == 3, "the programs on both interfaces")
    a.host.sysctl("net.ipv4.conf.all.rp_filter=1")
    packet = Flow(4, src=b.pod_v4.packed, dst=a.pod_v4.packed).udp(b"data")
    for host, accepted in ((b.host, 20), (c, 0)):
        before, read = kernel_packets(a), settled(a.forwarder)[0]["decap"]["read"]
        with no_checksum_socket(host, b.outer, PORT) as sock:
            for _ in range(20):
                sock.sendto(packet, (str(a.outer), PORT))

        def seen(name, before=before):
            return kernel_packets(a)[name] - before[name]

        wait_for(lambda: seen("received") + seen("receive_source") == 20, "the datagrams")
        assert seen("received") == accepted
        assert settled(a.forwarder)[0]["decap"]["read"] - read == accepted


def test_the_counters_of_a_peer_go_on_when_its_route_changes(lab):
    tunnel = express_pair(lab)
    a, b = tunnel.sides
    assert ping(a.pod, b.pod_v4, count=5).received == 5
    for n, more in ((5, []), (8, ["express"])):
        assert a.forwarder.status()["peers"][0]["encap"]["packets"] == n
        for subnet in (b.node.subnet, b.node.subnet6):
            a.forwarder.udptun("route", "replace", str(subnet), "via", str(b.outer), *more)
        wait_for(lambda on=bool(more): a.forwarder.status()["peers"][0]["express"]["active"] == on,
                 "the change")
        assert ping(a.pod, b.pod_v4).received == 3
    assert a.forwarder.status()["peers"][0]["encap"]["packets"] == 11
    assert kernel_packets(a)["sent"] == 8


def test_what_a_leaving_peer_got_since_the_last_read_is_counted(lab):
    tunnel = express_pair(lab)
    a, b = tunnel.sides
    assert kernel_packets(a)["sent"] == 0  # this reads the counters
    assert ping(a.pod, b.pod_v4, count=5).received == 5
    for subnet in (b.node.subnet, b.node.subnet6):
        a.forwarder.udptun("route", "del", str(subnet))
    wait_for(lambda: sum_of_bytes(a) == 5 * 84, f"5 packets in the sums, {sum_of_bytes(a)}")


def metric(side, name):
    text = side.host.run(["curl", "-s", "--unix-socket", str(side.forwarder.control),
                          "http://x/metrics"]).stdout
    (line,) = (one for one in text.splitlines() if one.startswith(f"{name} "))
    return float(line.split()[-1])


def sum_of_bytes(side):
    return metric(side, 'udptun_bytes_total{direction="encap"}')


@pytest.mark.skipif(not shutil.which("tcpdump"), reason="tcpdump is missing")
def test_capture_says_how_to_see_packets_that_pass_in_the_kernel(lab):
    tunnel = express_pair(lab)
    a, b = tunnel.sides
    done = a.forwarder.udptun("capture", "--text", "--seconds", "1")
    said, command, captured = done.stderr.splitlines()
    assert "not captured" in said
    assert captured == "0 packets captured"
    tcpdump = a.host.start([*command.split(), "-l", "-c", "6"], name="tcpdump")
    wait_for(lambda: "listening on" in tcpdump.text(), "tcpdump")
    assert ping(a.pod, b.pod_v4).received == 3
    assert tcpdump.wait() == 0
    assert kernel_packets(a)["sent"] == 3


@pytest.mark.skipif(etcd_obstacle() is not None, reason=str(etcd_obstacle()))
def test_a_node_advertises_what_its_kernel_does(lab):
    """Nothing is lost while the lease and the programs disagree."""
    cluster = Cluster(lab, 2, options=["--backend=udp", "--accelerate=auto"])
    cluster.start()
    one, other = cluster.members

    def advertises(member):
        lease = cluster.etcd.leases()[str(member.subnet).replace("/", "-")]
        return "express" in lease["BackendData"]["udptun"]["features"]

    def state(member):
        return member.ask("/v1/status")["accelerate"]

    for member in cluster.members:
        wait_for(lambda member=member: advertises(member), "the feature in the lease")
        wait_for(lambda member=member: state(member)["active"], "the express path")
    device = one.host.interfaces[0].name
    foreign = ["dev", device, "ingress", "pref", "7", "protocol", "ip"]
    with Stream(other.pod, one.pod, one.pod_v4) as stream:
        wait_for(lambda: stream.sent > 100, "the stream")
        one.daemon.signal(signal.SIGSTOP)  # so that it does not ask its forwarder yet
        one.host.run(["tc", "filter", "add", *foreign, "u32", "match", "ip", "protocol", "99",
                      "0xff", "flowid", "1:1"])
        wait_for(lambda: not state(one)["receives"], "the programs to be removed")
        sent = state(other)["packets"]["sent"]
        transfer_tcp(other.pod, one.pod, one.pod_v4, size=1 << 18)
        assert state(other)["packets"]["sent"] > sent  # it does not know it yet
        one.daemon.signal(signal.SIGCONT)
        wait_for(lambda: not advertises(one), "the lease to follow")
        wait_for(lambda: not state(other)["active"], "the routes of the peer to follow")
        one.stop()
        one.start()
        one.wait_ready()
        wait_for(lambda: not advertises(one), "the forwarder's answer")
        one.host.run(["tc", "filter", "del", *foreign])
        wait_for(lambda: advertises(one) and state(other)["active"], "the express path")
    assert set(range(stream.sent)) == set(stream.numbers)
    one.stop()
    one.start()  # it advertises what its last lease says, until the forwarder has answered
    one.wait_ready()
    wait_for(lambda: advertises(one) and state(other)["active"], "the express path")


def test_a_forwarder_that_stands_in_lets_the_programs_carry_known_routes(lab):
    """As in a DaemonSet: the daemon may load no programs, and neither may the process that stands
    in for a killed forwarder."""
    overlay = Overlay(lab, "--forwarder-standby", "--accelerate=auto", external=True)
    overlay.write("express = true")
    a, b, c = overlay.members
    for member in overlay.members:
        member.start_forwarder("--take-over", "--linger")
    overlay.start()

    def state(member):
        return member.ask("/v1/status")["accelerate"]

    for member in overlay.members:
        wait_for(lambda one=member: state(one)["active"], "the express path")
    standby = wait_for(lambda: standby_of(a), "a standby process")
    device = a.host.interfaces[0].name
    steady = SteadyPing(a.pod, b.pod_v4)
    a.forwarder.kill()
    wait_for(lambda: forwarder_of(a) == standby and a.ready()[0], "the standby process")
    assert "CAP_BPF" in state(a)["reason"]
    assert len(filters(a.host)) == 2
    transfer_tcp(a.pod, b.pod, b.pod_v4)
    assert steady.lost() == 0
    overlay.write("express = true", n3=f'public = "{c.host.v4}"\nsubnets = "10.244.9.0/24"')
    wait_for(lambda: filters(a.host) == [], "the programs to be removed with their old table")
    assert qdiscs(a.host, device) == []
    transfer_tcp(a.pod, b.pod, b.pod_v4)
    a.start_forwarder("--take-over", "--linger")
    wait_for(lambda: forwarder_of(a) == a.forwarder.pid and state(a)["active"], "the forwarder")
    assert len(filters(a.host)) == 2
    transfer_tcp(a.pod, b.pod, b.pod_v4)
