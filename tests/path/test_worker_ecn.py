"""The worker and the traffic class of its datagrams: DSCP, and congestion marks in both directions.

The sockets are those of test_worker.py: the kernel sets and reports the class of each datagram.
"""

import contextlib
import ipaddress
import random
import socket
import struct

import pytest

from tests import reference
from tests.own_netns import in_own_netns, sh
from tests.path.test_worker import ALL, NO_VNET, PEERS, TUN4, Rig, by_flow, without_id
from tests.wire.craft import Flow
from udptun.drops import DECAP
from udptun.model import Endpoint

IP_RECVTOS = 13
NOT_ECT, ECT1, ECT0, CE = range(4)
CLASSES = (0, ECT0, ECT1, CE, 0xB8, 0xB8 | ECT0)


def address(text):
    return ipaddress.ip_address(text).packed


def classes_at(sock):
    """Return the class and the payload of each datagram that arrived."""
    found = []
    with contextlib.suppress(BlockingIOError):
        while True:
            data, control, _, _ = sock.recvmsg(1 << 16, 64)
            (tos,) = [value[0] for level, kind, value in control
                      if (level, kind) == (socket.IPPROTO_IP, socket.IP_TOS)]
            found.append((tos, data))
    return found


def endpoint(sock):
    return Endpoint.parse(":".join(map(str, sock.getsockname())))


def out_flow(rng):
    """A flow to one of the two peers, of either version."""
    version = rng.choice((4, 6))
    third = rng.choice((2, 3))
    return Flow(
        version, src=address("10.244.1.7" if version == 4 else "fd00:1::7"),
        dst=address(f"10.244.{third}.5" if version == 4 else f"fd00:{third}::5"),
        tos=rng.choice(CLASSES))


@pytest.mark.parametrize("dscp", [0, 46, None])
@pytest.mark.parametrize("ecn", [False, True])
@pytest.mark.parametrize("without", [None, "tun-gso", "udp-gso", "batch"])
def test_the_class_of_datagrams(dscp, ecn, without):
    """Only the peer with `ecn` gets ECN fields. Order is kept, whatever the classes are."""
    features = NO_VNET if without == "tun-gso" else [f for f in ALL if f != without]
    default = (dscp or 0) << 2
    for seed in range(4):
        rng = random.Random(f"{seed}-{dscp}-{ecn}-{without}")
        with Rig(features, ecn=ecn, dscp=dscp,
                 sockopts=[(socket.IPPROTO_IP, socket.IP_TOS, default)]) as rig:
            expected = {peer: [] for peer in PEERS}
            for peer in PEERS:
                rig.outside[peer].setsockopt(socket.IPPROTO_IP, IP_RECVTOS, 1)
            for number in range(20):
                flow = out_flow(rng)
                if rig.vnet and rng.random() < 0.3:
                    frame = flow.tcp_super(bytes(9000), 1400)
                else:
                    data = number.to_bytes(2, "big") * rng.choice((3, 3, 600))
                    frame = bytes(10) + flow.udp(data)
                for to, datagram in rig.reference.encap(frame).datagrams:
                    expected[str(to.address)].append(
                        (rig.reference.outer_class(to, datagram), datagram))
                rig.write(frame)
            rig.work()
            for peer in PEERS:
                assert classes_at(rig.outside[peer]) == expected[peer]
            if not ecn:
                assert not any(tos & 3 for found in expected.values() for tos, _ in found)


def test_a_change_of_the_class_ends_a_run():
    """Datagrams of equal size with the same class are one message, others are not."""
    with Rig(ecn=True, sockopts=[(socket.IPPROTO_IP, socket.IP_TOS, 0)]) as rig:
        rig.outside[PEERS[0]].setsockopt(socket.IPPROTO_IP, IP_RECVTOS, 1)
        rig.outside[PEERS[0]].setsockopt(socket.IPPROTO_UDP, 104, 1)  # UDP_GRO
        packets = [
            Flow(dst=address("10.244.2.5"), tos=tos).udp(bytes(100))
            for tos in (ECT0, ECT0, ECT0, NOT_ECT, NOT_ECT, CE, ECT0)]
        for packet in packets:
            rig.write(bytes(10) + packet)
        rig.work()
        assert [(tos, len(data) // len(packets[0])) for tos, data in
                classes_at(rig.outside[PEERS[0]])] == [(ECT0, 3), (0, 2), (CE, 1), (ECT0, 1)]


@pytest.mark.parametrize("without", [None, "tun-gso", "udp-gro", "tcp-merge", "batch"])
def test_congestion_marks_reach_the_packets(without):
    features = NO_VNET if without == "tun-gso" else [f for f in ALL if f != without]
    for seed in range(6):
        rng = random.Random(f"{seed}-{without}")
        with Rig(features, sockopts=[(socket.IPPROTO_IP, IP_RECVTOS, 1)]) as rig:
            packets, seq = [], 1000
            peer = rig.outside[PEERS[0]]
            for number in range(40):
                outer = rng.choice((0, ECT0, ECT0, CE, ECT1))
                inner = rng.choice((0, ECT0, ECT0, ECT0, ECT1, CE))
                flow = Flow(src=address("10.244.2.7"), dst=address("10.244.1.9"), tos=inner,
                            ttl=rng.choice((64, 64, 64, 1)))
                datagram = flow.tcp(bytes(500), seq=seq, ident=number)
                seq += 500
                result = rig.reference.decap(endpoint(peer), datagram, outer)
                packets += result.packets
                peer.setsockopt(socket.IPPROTO_IP, socket.IP_TOS, 0xB8 | outer)
                rig.send(PEERS[0], datagram)
            rig.work()
            written, packets = without_id(rig.from_tun()), without_id(packets)
            assert by_flow(written) == by_flow(packets)
            assert rig.drops() == {k: n for k, n in rig.reference.drops.items() if n}
            assert rig.counts() == rig.reference_counts()
            counters = rig.worker.counters()
            assert counters["ecn_marked"] == rig.reference.marked > 0
            assert counters["ecn_unexpected"] == rig.reference.unexpected > 0
            rig.check_invariant()


def test_a_marked_run_marks_each_of_its_packets():
    """A run that the kernel has joined has one class. A merge ends where the marks begin."""
    with Rig(sockopts=[(socket.IPPROTO_IP, IP_RECVTOS, 1)]) as rig:
        flow = Flow(src=address("10.244.2.7"), dst=TUN4.packed, tos=ECT0)
        packets = [flow.tcp(bytes(1000), seq=1000 * i, ident=i) for i in range(12)]
        peer = rig.outside[PEERS[0]]
        for tos, run in ((ECT0, packets[:4]), (CE, packets[4:8]), (ECT0, packets[8:])):
            peer.setsockopt(socket.IPPROTO_IP, socket.IP_TOS, tos)
            peer.sendmsg([b"".join(run)], [
                (socket.IPPROTO_UDP, 103, struct.pack("H", len(packets[0])))],
                0, rig.udp.getsockname())
        rig.work()
        frames = []
        with contextlib.suppress(BlockingIOError):
            while True:
                frames.append(rig.tun.recv(1 << 17))
        assert [frame[11] for frame in frames] == [ECT0, CE, ECT0]
        assert [len(reference.cut(frame)) for frame in frames] == [4, 4, 4]
        assert rig.worker.counters()["ecn_marked"] == 4


def test_a_sender_without_ecn_sees_a_loss():
    with Rig(sockopts=[(socket.IPPROTO_IP, IP_RECVTOS, 1)]) as rig:
        flow = Flow(src=address("10.244.2.7"), dst=TUN4.packed)
        rig.outside[PEERS[0]].setsockopt(socket.IPPROTO_IP, socket.IP_TOS, CE)
        rig.send(PEERS[0], flow.udp(b"data"))
        rig.work()
        assert rig.from_tun() == []
        assert rig.drops() == {("congestion", DECAP): 1}
        assert rig.worker.counters()["ecn_marked"] == 0


def test_probes_have_no_congestion_mark():
    """A marked probe is answered, and its answer has the class of the socket."""
    options = [(socket.IPPROTO_IP, IP_RECVTOS, 1), (socket.IPPROTO_IP, socket.IP_TOS, 46 << 2)]
    with Rig(dscp=46, ecn=True, sockopts=options) as rig:
        peer = rig.outside[PEERS[0]]
        peer.setsockopt(socket.IPPROTO_IP, IP_RECVTOS, 1)
        peer.setsockopt(socket.IPPROTO_IP, socket.IP_TOS, CE)
        rig.send(PEERS[0], reference.build_probe(reference.Probe(1, 7, 0, 60)))
        rig.work()
        assert [tos for tos, _ in classes_at(peer)] == [46 << 2]


@in_own_netns
def test_the_socket_for_fragments_follows_the_options_of_the_socket():
    """It is open when the options change."""
    with Rig(dscp=46) as rig:
        sh("ip link set lo mtu 1000")
        peer = rig.outside[PEERS[0]]
        peer.setsockopt(socket.IPPROTO_IP, IP_RECVTOS, 1)
        rig.core.set_path_mtu(address(PEERS[0]), peer.getsockname()[1], 1000, 0)
        flow = Flow(version=6, src=address("fd00:1::9"), dst=address("fd00:2::5"))
        for tos in (0, 46 << 2, 10 << 2):
            rig.udp.setsockopt(socket.IPPROTO_IP, socket.IP_TOS, tos)
            rig.worker.renew_options()
            rig.work()
            rig.write(bytes(10) + flow.udp(bytes(1280 - 48)))
            rig.work()
            assert [got for got, _ in classes_at(peer)] == [tos]


def test_the_sender_follows_the_options_of_the_socket():
    """After a take-over, the new forwarder sets its own DSCP on the sockets that it has taken."""
    with Rig(dscp=46) as rig:
        peer = rig.outside[PEERS[0]]
        peer.setsockopt(socket.IPPROTO_IP, IP_RECVTOS, 1)
        rig.udp.setsockopt(socket.IPPROTO_IP, socket.IP_TOS, 46 << 2)
        rig.worker.renew_options()
        rig.write(bytes(10) + Flow(dst=address("10.244.2.5")).udp(b"data"))
        rig.work()
        assert [tos for tos, _ in classes_at(peer)] == [46 << 2]
