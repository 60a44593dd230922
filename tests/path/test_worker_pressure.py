"""Full socket buffers: what the worker does, and that a slow peer harms no other peer.

A slow qdisc on loopback keeps datagrams in the socket's buffer until the buffer is full.
"""

import contextlib
import errno
import ipaddress
import itertools
import os
import resource
import socket
import threading
import time

import pytest

from tests.own_netns import in_own_netns, run_program, sh
from tests.path.test_worker import ALL, PEERS, Rig
from tests.reference import Probe, build_probe
from tests.wire.craft import Flow, addr
from udptun import _core
from udptun.device.offload import OffloadRequest
from udptun.drops import DECAP, ENCAP
from udptun.model import NEVER_HEARD, PROBE_REQUEST, Endpoint, Route
from udptun.net.udp import open_udp

NO_GSO = tuple(f for f in ALL if f != "udp-gso")
OWN_SOCKETS = 64  # src_ext/path/worker.pxd
DEADLINE_SECONDS = 60


def slow_loopback(rate):
    sh(f"tc qdisc replace dev lo root tbf rate {rate} burst 3000 limit 10000000")


def slow_addresses(network, rate="100kbit"):
    """Make loopback slow for destinations in this network, and leave it fast for all others."""
    done = run_program("tc qdisc add dev lo root handle 1: htb default 10")
    if done.returncode != 0:
        pytest.skip(f"this kernel cannot shape traffic by class: {done.stderr.strip()}")
    sh("tc class add dev lo parent 1: classid 1:10 htb rate 10gbit quantum 60000",
       f"tc class add dev lo parent 1: classid 1:20 htb rate {rate} burst 3000 quantum 60000",
       "tc qdisc add dev lo parent 1:20 pfifo limit 100000",
       f"tc filter add dev lo parent 1: protocol ip u32 match ip dst {network} flowid 1:20")


class PeersRig(Rig):
    def add_peers(self, network, n):
        """Add peers to the table, one address of the network each. Return their inner addresses."""
        self.outer = [f"{network}.{1 + k}" for k in range(n)]
        more = [Route.make(f"10.245.{k}.0/24", a, 9, None) for k, a in enumerate(self.outer)]
        text = "\n".join(map(str, [*self.routes, *more]))
        self.core.publish(_core.RouteTable.parse_text(text.encode()))
        return [f"10.245.{k}.5" for k in range(n)]


class FullRig(PeersRig):
    """A rig whose IPv4 socket is full after about thirty datagrams."""

    def __init__(self, sockopts=(), **options):
        small = (socket.SOL_SOCKET, socket.SO_SNDBUF, 32768)
        super().__init__(sockopts=(small, *sockopts), **options)

    def fill(self, n=60, size=1200, dst="10.244.2.5"):
        flow = Flow(dst=addr(dst))
        for _ in range(n):
            self.write(bytes(10) + flow.udp(bytes(size)))

    def own_sockets(self):
        return self.worker.counters()["own_sockets"]

    def encap(self):
        return self.core.packets()[ENCAP]


def work_until(rig, condition):
    end = time.monotonic() + DEADLINE_SECONDS
    while not condition():
        assert time.monotonic() < end, "timeout"
        rig.work()


@contextlib.contextmanager
def no_more_descriptors():
    """Let this process open no file."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.dup(0)
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


# One peer


@in_own_netns
def test_the_worker_waits_for_a_single_peer_only_for_a_short_time():
    slow_loopback("100kbit")
    with FullRig(features=NO_GSO, udp6=True) as rig:
        rig.fill(n=200)
        before = rig.worker.counters()["turns"]
        rig.work()
        assert rig.encap()["queued"] == 0
        assert rig.drops().keys() == {("slow_peer", ENCAP)}
        assert rig.own_sockets() == 1
        # While it waits, it makes a turn a millisecond, and does not spin.
        assert rig.worker.counters()["turns"] - before < 200
        rig.check_invariant()


@in_own_netns
def test_draining_waits_for_a_full_socket():
    slow_loopback("4mbit")
    with FullRig(features=NO_GSO) as rig:
        rig.fill(n=200)
        rig.worker.drain(DEADLINE_SECONDS)
        assert rig.encap()["read"] == rig.encap()["delivered"] == 200
        rig.check_invariant()


@in_own_netns
def test_datagrams_left_after_draining_are_counted():
    slow_loopback("8kbit")
    with FullRig(features=NO_GSO) as rig:
        rig.fill(n=200)
        rig.worker.drain(0.2)
        assert rig.drops()["closed", ENCAP] > 0
        assert rig.encap()["queued"] == 0
        rig.check_invariant()


@in_own_netns
def test_an_icmp_error_to_a_peer_whose_queue_was_sent_already_is_sent():
    """While a flush waits for a full socket, the other peer's queue is sent. A datagram queued for
    that peer before the next flush must be sent too."""
    slow_addresses(f"{PEERS[0]}/32", "400kbit")
    with FullRig(features=NO_GSO) as rig:
        rig.write(bytes(10) + Flow(dst=addr("10.244.3.5")).udp(b"first, to the other peer"))
        rig.fill(n=250, size=200)
        expiring = Flow(src=addr("10.244.3.7"), dst=addr("10.244.1.7"), ttl=1).udp(b"x")
        over = threading.Event()

        def keep_sending():
            while not over.wait(0.01):
                rig.send(PEERS[1], expiring)

        sender = threading.Thread(target=keep_sending)
        sender.start()
        rig.worker.drain(DEADLINE_SECONDS)
        over.set()
        sender.join()
        packets = rig.encap()
        assert packets["generated"] > 3
        assert packets["delivered"] == packets["read"] + packets["generated"]
        rig.check_invariant()


@in_own_netns
def test_no_probe_is_lost_when_a_socket_is_full():
    """Otherwise healthy peers would count as unreachable while datagrams are held for others."""
    slow_addresses(f"{PEERS[1]}/32", "20kbit")
    with FullRig() as rig:
        rig.fill(n=200, dst="10.244.3.5")
        rig.work()
        assert rig.own_sockets() == 1  # the shared sender is full
        fast = rig.outside[PEERS[0]].getsockname()
        for token in range(5):
            rig.send(PEERS[0], build_probe(Probe(PROBE_REQUEST, token, NEVER_HEARD, 24)))
            packed = socket.inet_aton(fast[0])
            assert rig.core.send_probe(packed, fast[1], token, 1400, NEVER_HEARD) == 0
        work_until(rig, lambda: rig.counts()[DECAP]["consumed"] == 5)
        assert sorted(map(len, rig.at(PEERS[0]))) == [24] * 5 + [1400] * 5
        rig.check_invariant()


@in_own_netns
def test_a_spare_socket_that_cannot_be_opened_is_tried_again_once_a_second():
    slow_addresses(f"{PEERS[1]}/32", "4kbit")
    with FullRig() as rig:
        rig.fill(n=200, dst="10.244.3.5")
        rig.work()
        packed, port = socket.inet_aton(PEERS[0]), rig.outside[PEERS[0]].getsockname()[1]

        def send_request():
            return rig.core.send_probe(packed, port, 1, 24, NEVER_HEARD)

        def send_reply():
            rig.at(PEERS[0])  # what arrived before
            rig.send(PEERS[0], build_probe(Probe(PROBE_REQUEST, 1, NEVER_HEARD, 24)))
            before = rig.counts()[ENCAP]["generated"]
            work_until(rig, lambda: rig.counts()[ENCAP]["generated"] > before)
            return 0 if rig.at(PEERS[0]) else errno.EAGAIN

        for send in (send_request, send_reply):
            with no_more_descriptors():
                begun = time.monotonic()
                assert send() == errno.EAGAIN
            again = send()
            assert again == errno.EAGAIN or time.monotonic() > begun + 1
            work_until(rig, lambda send=send: send() == 0)
        rig.check_invariant()


@in_own_netns
def test_frames_of_many_segments_wait_as_well():
    slow_loopback("8mbit")
    with FullRig() as rig:
        flow = Flow(dst=addr("10.244.2.5"))
        for _ in range(100):
            rig.write(flow.udp_super(bytes(120 * 20), 20))
        rig.worker.drain(DEADLINE_SECONDS)
        assert rig.drops() == {}
        assert rig.encap()["delivered"] == 12000
        rig.check_invariant()


# Several peers


@in_own_netns
@pytest.mark.parametrize("features", [ALL, NO_GSO])
def test_a_full_socket_does_not_hold_up_another_peer(features):
    slow_addresses(f"{PEERS[0]}/32")
    with FullRig(features=features) as rig:
        flow = Flow(dst=addr("10.244.3.5"))
        for n in range(20):
            rig.fill(n=40)
            rig.write(bytes(10) + flow.udp(b"%d" % n))
            rig.work()
            assert len(rig.at(PEERS[1])) == 1
            assert rig.encap()["queued"] == 0
        assert rig.drops().keys() == {("slow_peer", ENCAP)}
        rig.check_invariant()


@in_own_netns
def test_an_own_socket_sends_like_the_shared_sender_and_does_not_receive():
    slow_addresses("127.9.0.0/16")
    options = [(socket.IPPROTO_IP, socket.IP_TOS, 0x28), (socket.SOL_SOCKET, socket.SO_MARK, 7)]
    with FullRig(sockopts=options) as rig:
        slow, = rig.add_peers("127.9.0", 1)
        rig.outside[PEERS[1]].setsockopt(socket.IPPROTO_IP, socket.IP_RECVTOS, 1)
        rig.write(bytes(10) + Flow(dst=addr("10.244.3.5")).udp(b"by the shared socket"))
        rig.work()
        while rig.own_sockets() < 2:
            rig.fill(dst=slow)
            rig.write(bytes(10) + Flow(dst=addr("10.244.3.5")).udp(b"x"))
            rig.work()
        seen = set()
        with contextlib.suppress(BlockingIOError):
            while True:
                _, ancillary, _, source = rig.outside[PEERS[1]].recvmsg(2000, 64)
                seen.add((source, ancillary[0][2]))
        assert seen == {(rig.udp.getsockname(), b"\x28")}
        inner = Flow(src=addr("10.244.3.5"), dst=addr("10.244.1.7"))
        for sender in (PEERS[1], PEERS[0]):
            for _ in range(50):
                rig.send(sender, inner.udp(b"to the shared socket"))
        rig.work()
        assert len(rig.from_tun()) + rig.drops()["source_not_routed", "decap"] == 100


@in_own_netns
def test_an_own_socket_is_closed_when_it_is_no_longer_needed():
    slow_addresses("127.9.0.0/16", "1mbit")
    with FullRig() as rig:
        slow, = rig.add_peers("127.9.0", 1)
        rig.write(bytes(10) + Flow(dst=addr("10.244.3.5")).udp(b"another peer"))
        rig.fill(dst=slow, n=200)
        rig.work()
        assert rig.own_sockets() > 0

        def closed():
            rig.worker.look()
            return rig.own_sockets() == 0

        work_until(rig, closed)
        before = rig.encap()["delivered"]
        rig.fill(dst=slow, n=1)
        rig.work()
        assert rig.encap()["delivered"] == before + 1


@in_own_netns
def test_the_peer_of_an_own_socket_may_leave_and_return():
    slow_addresses("127.9.0.0/16")
    with FullRig() as rig:
        for _ in range(3):
            peers = rig.add_peers("127.9.0", 3)
            for dst in (*peers, "10.244.3.5"):
                rig.fill(dst=dst)
                rig.work()
            assert rig.own_sockets() > 0
            rig.core.publish(_core.RouteTable.parse_text(
                "\n".join(map(str, rig.routes)).encode()))
            rig.core.collect()
            rig.work()
        assert rig.encap()["queued"] == 0
        rig.check_invariant()


@in_own_netns
def test_a_new_peer_in_the_memory_of_a_freed_one_does_not_get_its_own_socket():
    """The socket is of IPv4, and the new peers have IPv6 endpoints."""
    slow_addresses("127.9.0.0/16", "8kbit")
    sh("ip -6 route add local fd99::/64 dev lo")
    with FullRig(udp6=True) as rig:
        rig.add_peers("127.8.0", 100)  # the allocator keeps the first that are freed for itself
        slow, = rig.add_peers("127.9.0", 1)
        rig.worker.look()
        rig.core.collect()
        while rig.own_sockets() == 0:
            rig.fill(dst="10.244.3.5")
            rig.fill(dst=slow)
            rig.work()
        routes = [Route.make(f"fd00:{n:x}::/64", f"fd99::{n:x}", 9) for n in range(0x100, 0x200)]
        for table in ([], routes):
            rig.core.publish(_core.RouteTable.parse_text("\n".join(map(str, table)).encode()))
            rig.worker.look()
            rig.core.collect()
        for n in range(0x100, 0x200):
            rig.write(bytes(10) + Flow(6, src=addr("fd00:1::7"), dst=addr(f"fd00:{n:x}::5")).udp())
        rig.work()
        assert rig.own_sockets() > 0
        assert [peer.last_error for peer in rig.core.peers() if peer.errors_n] == []
        assert sum(peer.encap_packets for peer in rig.core.peers()) == len(routes)


@in_own_netns
def test_more_slow_peers_than_own_sockets_do_not_harm_a_healthy_peer():
    slow_addresses("127.9.0.0/16", "1mbit")
    with FullRig() as rig:
        peers = rig.add_peers("127.9.0", OWN_SOCKETS + 20)
        flow = Flow(dst=addr("10.244.3.5"))
        some = itertools.cycle(peers)
        for n in range(40):
            for dst in itertools.islice(some, 25):  # in one flush
                rig.fill(dst=dst, n=8)
            rig.write(bytes(10) + flow.udp(b"%d" % n))
            rig.work()
            assert len(rig.at(PEERS[1])) == 1, n
        counters = rig.worker.counters()
        assert counters["own_sockets"] == OWN_SOCKETS
        assert counters["own_sockets_given"] > OWN_SOCKETS
        assert rig.encap()["queued"] == 0
        rig.check_invariant()


@in_own_netns
def test_a_second_forwarder_with_the_same_port_does_not_prevent_own_sockets():
    slow_loopback("100kbit")
    with FullRig() as rig:
        listen = Endpoint(ipaddress.ip_address("127.0.0.77"), rig.udp.getsockname()[1])
        other = open_udp(listen, OffloadRequest.parse("off"), reuse_port=False)
        other.let_join()
        with contextlib.closing(other):
            for dst in ("10.244.3.5", "10.244.2.5"):
                rig.fill(dst=dst)
                rig.work()
        assert rig.own_sockets() > 0
        assert rig.worker.take_events() == []


@in_own_netns
def test_a_program_with_the_same_port_at_another_address_does_not_prevent_own_sockets():
    """Every user can open such a socket."""
    slow_loopback("100kbit")
    with FullRig() as rig, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
        other.bind(("127.0.0.77", rig.udp.getsockname()[1]))
        for dst in ("10.244.3.5", "10.244.2.5"):
            rig.fill(dst=dst)
            rig.work()
        assert rig.own_sockets() > 0
        assert rig.worker.take_events() == []
        rig.check_invariant()


@in_own_netns
def test_a_program_with_the_same_port_at_another_ipv6_address_does_not_prevent_own_sockets():
    with Rig(udp6=True) as rig, socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as other:
        sh("ip link set lo mtu 1300", "ip address add 2001:db8::7/128 dev lo nodad")
        other.bind(("2001:db8::7", rig.udp6.getsockname()[1]))
        for option, value in ((23, 3), (62, 1)):  # as net/udp.py sets them: never fragment
            rig.udp6.setsockopt(socket.IPPROTO_IPV6, option, value)
        peer = rig.closing.enter_context(socket.socket(socket.AF_INET6, socket.SOCK_DGRAM))
        peer.bind(("::1", 0))
        peer.settimeout(DEADLINE_SECONDS)
        route = Route.make("fd00:9::/64", *peer.getsockname()[:2])
        rig.core.publish(_core.RouteTable.parse_text(str(route).encode()))
        # The datagrams to this peer leave from the fragmenting socket.
        rig.core.set_path_mtu(addr("::1"), peer.getsockname()[1], 1300, 0)
        flow = Flow(version=6, src=addr("fd00:1::9"), dst=addr("fd00:9::5"))
        packet = flow.udp(bytes(1280 - 48))
        rig.write(bytes(10) + packet)
        rig.work()
        assert rig.drops() == {}
        received, sender = peer.recvfrom(2000)
        assert len(received) == len(packet)
        assert sender[:2] == rig.udp6.getsockname()[:2]
        back = Flow(version=6, src=addr("fd00:9::5"), dst=addr("fd00:1::9")).udp(b"y")
        for _ in range(9):
            peer.sendto(back, rig.udp6.getsockname()[:2])
        work_until(rig, lambda: len(rig.from_tun()) or rig.core.packets()[DECAP]["read"] == 9)
        assert rig.core.packets()[DECAP]["delivered"] == 9
        rig.check_invariant()


@in_own_netns
def test_without_an_own_socket_the_worker_drops_and_reports_the_cause():
    slow_loopback("100kbit")
    with FullRig() as rig, no_more_descriptors():
        for _, dst in itertools.product(range(5), ("10.244.2.5", "10.244.3.5")):
            rig.fill(dst=dst)
            rig.work()
        assert rig.worker.take_events() == ["own_socket"]
        assert rig.worker.own_socket_error() == errno.EMFILE
        assert rig.own_sockets() == 0
        assert rig.encap()["queued"] == 0
        assert rig.drops().keys() == {("slow_peer", ENCAP)}
        rig.check_invariant()


@in_own_netns
def test_more_peers_than_own_sockets_wait_in_one_queue():
    """The own sockets are emptied and given to the next peers before the flush ends."""
    slow_addresses(f"{PEERS[0]}/32")
    with FullRig() as rig:
        rig.fill(n=200)
        rig.work()
        assert rig.own_sockets() == 1  # the shared sender is full
        peers = rig.add_peers("127.9.0", 3 * OWN_SOCKETS)
        outside = []
        with contextlib.ExitStack() as closing:
            for address in rig.outer:
                sock = closing.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
                sock.setblocking(False)
                sock.bind((address, 9))
                outside.append(sock)
            for peer in peers:
                rig.fill(n=1, dst=peer)
            rig.work()
            assert [len(sock.recv(2000)) for sock in outside] == [1228] * len(peers)
        assert rig.own_sockets() == OWN_SOCKETS
        assert rig.drops().keys() <= {("slow_peer", ENCAP)}
        rig.check_invariant()


@in_own_netns
def test_the_datagrams_to_many_peers_leave_in_runs():
    """Four frames each to 50 peers, in turn, are 50 messages: one sendmmsg."""
    with PeersRig() as rig:
        peers = rig.add_peers("127.9.0", 50)
        before = rig.worker.counters()["syscalls"]["send"]
        for n in range(200):
            rig.write(bytes(10) + Flow(dst=addr(peers[n % 50])).udp(b"x"))
        rig.work()
        assert rig.worker.counters()["syscalls"]["send"] - before == 1
        assert rig.core.packets()[ENCAP]["delivered"] == 200
        rig.check_invariant()
