"""What a worker reports about datagrams that do not arrive: errors, refused senders, recursion.

A socket pair replaces the TUN; UDP uses loopback, as in test_worker.py.
"""

import errno
import ipaddress
import os
import socket
import struct
import time

import pytest

from tests import reference
from tests.own_netns import in_own_netns, sh
from tests.path.test_worker import ALL, OUTSIDER, PEERS, TUN4, TUN6, Rig, arrived
from tests.reference.packet import FRAGMENT
from tests.wire.craft import UDP, Flow, addr, ip4, ip6
from udptun import _core
from udptun.drops import DECAP, ENCAP
from udptun.forwarder import peer_errors
from udptun.model import Endpoint, PeerError, RefusedSender, Route

DEADLINE_SECONDS = 60
CLOSED_PORT = 9  # nothing listens there in a network namespace of its own


def work_until(rig, condition):
    end = time.monotonic() + DEADLINE_SECONDS
    while not condition():
        assert time.monotonic() < end
        rig.work()


def peer_at(rig, endpoint):
    address, port = ipaddress.ip_address(endpoint[0]).packed, endpoint[1]
    (row,) = [p for p in rig.core.peers() if (p.address, p.port) == (address, port)]
    return row


def publish(rig, *routes):
    rig.core.publish(_core.RouteTable.parse_text("\n".join(map(str, routes)).encode()))


# Errors of peers


@in_own_netns
def test_a_port_without_a_listener_is_the_last_error_of_this_peer_only():
    with Rig() as rig:
        rig.udp.setsockopt(socket.IPPROTO_IP, 11, 1)  # IP_RECVERR, as net/udp.py sets it
        before = time.monotonic_ns()
        publish(
            rig, Route.make("10.244.2.0/24", "127.0.0.5", CLOSED_PORT),
            Route.make("10.244.3.0/24", "127.0.0.5", CLOSED_PORT + 1),
        )
        rig.write(bytes(10) + Flow(dst=addr("10.244.2.5")).udp(b"x"))
        work_until(rig, lambda: peer_at(rig, ("127.0.0.5", CLOSED_PORT)).last_error)
        row = peer_at(rig, ("127.0.0.5", CLOSED_PORT))
        assert row.errors_n == 1
        assert row.last_error._replace(time_ns=0) == PeerError(
            errno.ECONNREFUSED, "icmp", 3, 3, addr("127.0.0.5"), 0
        )
        assert before <= row.last_error.time_ns <= time.monotonic_ns()
        other = peer_at(rig, ("127.0.0.5", CLOSED_PORT + 1))
        assert (other.errors_n, other.last_error) == (0, None)
        assert rig.core.peer_errors() == {"icmp": 1, "send": 0}
        rig.check_invariant()


@in_own_netns
def test_a_send_that_the_kernel_refuses_keeps_its_errno():
    # Policy rules before the table "local", which has all of 127.0.0.0/8.
    sh("ip rule add pref 10 lookup local", "ip rule del pref 0")
    refusals = {"unreachable": errno.ENETUNREACH, "prohibit": errno.EACCES,
                "blackhole": errno.EINVAL}
    with Rig() as rig:
        rig.udp.setsockopt(socket.IPPROTO_IP, 11, 1)
        for count, (action, error) in enumerate(refusals.items(), start=1):
            endpoint = (f"127.0.0.{20 + count}", 8285)
            sh(f"ip rule add pref 5 to {endpoint[0]} {action}")
            publish(rig, Route.make("10.244.2.0/24", *endpoint))
            rig.write(bytes(10) + Flow(dst=addr("10.244.2.5")).udp(b"x"))
            work_until(rig, lambda n=count: rig.drops().get(("send_error", ENCAP)) == n)
            last = peer_at(rig, endpoint).last_error
            assert (last.errno, last.origin, last.reporter) == (error, "send", b"")
            assert rig.core.peer_errors() == {"icmp": 0, "send": count}
        rig.check_invariant()


@in_own_netns
def test_a_probe_that_the_kernel_refuses_keeps_its_errno():
    sh("ip rule add pref 10 lookup local", "ip rule del pref 0",
       "ip rule add pref 5 to 127.0.0.21 prohibit")
    with Rig() as rig:
        publish(rig, Route.make("10.244.2.0/24", "127.0.0.21", probe=True))
        assert rig.core.send_probe(addr("127.0.0.21"), 8285, 1, 24, 0) == errno.EACCES
        row = peer_at(rig, ("127.0.0.21", 8285))
        assert (row.last_error.errno, row.last_error.origin) == (errno.EACCES, "send")
        assert (row.errors_n, rig.core.peer_errors()) == (1, {"icmp": 0, "send": 1})
        assert rig.core.send_probe(addr("127.0.0.21"), 9, 1, 24, 0) == errno.EACCES
        assert peer_at(rig, ("127.0.0.21", 8285)).errors_n == 1  # another port is no peer
        rig.check_invariant()


HERE = Endpoint.parse("192.0.2.7:8285")
HERE6 = Endpoint.parse("[2001:db8::7]:8285")


@pytest.mark.parametrize(
    ("error", "endpoint", "text"),
    [
        (PeerError(errno.ECONNREFUSED, "icmp", 3, 3, addr("192.0.2.7"), 1), HERE,
         "connection refused: nothing listens on 192.0.2.7:8285 "
         "(ICMP port unreachable from 192.0.2.7)"),
        (PeerError(errno.EHOSTUNREACH, "icmp", 3, 1, addr("192.0.2.1"), 1), HERE,
         "no route to host: 192.0.2.7 does not answer on its link "
         "(ICMP host unreachable from 192.0.2.1)"),
        (PeerError(errno.EACCES, "icmp6", 1, 1, addr("2001:db8::1"), 1), HERE6,
         "permission denied: a filter rejects datagrams to [2001:db8::7]:8285 "
         "(ICMP administratively prohibited from 2001:db8::1)"),
        (PeerError(errno.EHOSTUNREACH, "icmp", 11, 0, addr("192.0.2.1"), 1), HERE,
         "no route to host: the path to 192.0.2.7 is a loop, or too long "
         "(ICMP time exceeded from 192.0.2.1)"),
        (PeerError(errno.EPROTO, "icmp", 12, 0, b"", 1), HERE,
         "protocol error (ICMP type 12, code 0)"),
        (PeerError(errno.EPERM, "send", 0, 0, b"", 1), HERE,
         "operation not permitted: a filter on this host rejects datagrams to 192.0.2.7:8285 "
         "(the kernel refused the datagram)"),
    ],
)
def test_the_sentence_names_the_change_and_the_program(error, endpoint, text):
    assert peer_errors.describe(error, endpoint) == text
    made = peer_errors.to_json(error, endpoint)
    assert (made["errno"], made["text"]) == (errno.errorcode[error.errno], text)
    assert peer_errors.to_json(None, endpoint) is None


# Forged errors


def forge(rig, outer, kind, code, mtu, quote=b""):
    """Return (socket, message, target) of an ICMP error about a datagram of the rig to its peer."""
    here, there = (rig.udp, rig.outside[PEERS[0]]) if outer == 4 else (rig.udp6, rig.peer6)
    (source, sport), (target, dport) = here.getsockname()[:2], there.getsockname()[:2]
    udp = struct.pack("!HHHH", sport, dport, 1480, 0) + quote
    if outer == 4:
        ip = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 1500, 1, 0x4000, 64, 17, 0, addr(source),
                         addr(target))
        raw = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)
        message = struct.pack("!BBHHH", kind, code, 0, 0, mtu) + ip + udp
        total = 0xFFFF - reference.checksum(message)
        message = message[:2] + total.to_bytes(2, "big") + message[4:]
    else:
        ip = struct.pack("!IHBB16s16s", 0x60000000, 1480, 17, 64, addr(source), addr(target))
        raw = socket.socket(socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_ICMPV6)
        # the kernel computes the checksum
        message = struct.pack("!BBHI", kind, code, 0, mtu) + ip + udp
    return rig.closing.enter_context(raw), message, (source, 0)


class Rig6(Rig):
    """A rig with a peer at an IPv6 address, for 10.244.7.0/24. Errors are queued, as net/udp.py
    lets the kernel do."""

    def __init__(self, features=ALL):
        super().__init__(features, udp6=True)
        self.udp.setsockopt(socket.IPPROTO_IP, 11, 1)
        self.udp6.setsockopt(socket.IPPROTO_IPV6, 25, 1)
        self.peer6 = self.closing.enter_context(socket.socket(socket.AF_INET6, socket.SOCK_DGRAM))
        self.peer6.setblocking(False)
        self.peer6.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
        self.peer6.bind(("::1", 0))
        publish(self, *self.routes, Route.make("10.244.7.0/24", *self.peer6.getsockname()[:2]))


FLOODS = {4: [(3, 3, 0), (3, 4, 552), (3, 1, 0), (11, 0, 0)], 6: [(1, 4, 0), (1, 3, 0), (3, 0, 0)]}


FILL = 400  # more errors than fit into the receive buffer of the test, which are 85 to 170
FEW = 70  # more than the 64 that a worker reads


@in_own_netns
@pytest.mark.parametrize("outer", [4, 6])
def test_a_flood_of_errors_does_not_cause_packet_loss(outer):
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # loopback then keeps the order
    inner = {4: "10.244.2.5", 6: "10.244.7.5"}[outer]
    queues_errors = {4: (socket.IPPROTO_IP, 11), 6: (socket.IPPROTO_IPV6, 25)}[outer]
    with Rig6() as rig:
        peer, ours = (rig.outside[PEERS[0]], rig.udp) if outer == 4 else (rig.peer6, rig.udp6)
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        forged = [forge(rig, outer, *each) for each in FLOODS[outer]]
        rounds, delivered = {True: 0, False: 0}, 0
        while min(rounds.values()) < 3:
            listening = bool(ours.getsockopt(*queues_errors))
            rounds[listening] += 1
            assert rounds[True] - rounds[False] < 2, "the kernel still queues errors"
            for i in range(FEW if listening else FILL):
                raw, message, target = forged[i % len(forged)]
                raw.sendto(message, target)
            for _ in range(20):
                rig.write(bytes(10) + Flow(dst=addr(inner)).udp(b"x" * 100))
                peer.sendto(Flow(src=addr(inner), dst=addr("10.244.1.9")).udp(b"y"),
                            ours.getsockname())
            sent = 20 * sum(rounds.values())
            work_until(rig, lambda n=sent: rig.counts()[ENCAP]["read"] == n)
            work_until(rig, lambda n=sent: rig.counts()[DECAP]["read"] == n)
            delivered += len(arrived(peer))
            assert (delivered, rig.drops()) == (sent, {})
        assert rig.worker.counters()["icmp_floods"] == rounds[True]
        assert rig.counts()[DECAP]["delivered"] == sent
        rig.check_invariant()


@in_own_netns
def test_a_send_that_fails_twice_because_of_others_is_tried_again():
    """More errors than a worker reads arrive after it has last received. The kernel reports one of
    them as the result of a send, and another one, which it then has removed from the queue, as the
    result of the next send."""
    with Rig6([name for name in ALL if name != "batch"]) as rig:  # a flush for each frame
        closed = ("::1", CLOSED_PORT)
        publish(rig, *rig.routes, Route.make("10.244.7.0/24", *rig.peer6.getsockname()[:2]),
                Route.make("fd00:8::/64", *closed))
        # A fragmenting socket sends to the closed port: its own sends do not report the errors.
        rig.core.set_path_mtu(addr(closed[0]), closed[1], 1300, 0)
        for _ in range(100):
            rig.write(bytes(10) + Flow(
                version=6, src=addr("fd00:1::9"), dst=addr("fd00:8::5")).udp(b"x"))
        rig.write(bytes(10) + Flow(dst=addr("10.244.7.5")).udp(b"y"))
        work_until(rig, lambda: rig.counts()[ENCAP]["read"] == 101)
        assert rig.worker.counters()["icmp_floods"] == 1
        assert rig.drops() == {}
        assert len(arrived(rig.peer6)) == 1
        rig.check_invariant()


@in_own_netns
def test_after_a_flood_errors_are_kept_again():
    with Rig6() as rig:
        raw, message, target = forge(rig, 4, 3, 3, 0)
        for _ in range(200):
            raw.sendto(message, target)
        work_until(rig, lambda: rig.worker.counters()["icmp_floods"])
        endpoint = rig.outside[PEERS[0]].getsockname()
        kept = peer_at(rig, endpoint).errors_n
        assert kept <= 64

        def hears():
            raw.sendto(message, target)
            rig.worker.look()
            return peer_at(rig, endpoint).errors_n > kept

        work_until(rig, hears)


@in_own_netns
def test_a_flood_ends_when_the_worker_gets_other_sockets():
    """The new sockets report errors, and a flood there is stopped, too."""
    with Rig6() as rig:
        raw, message, target = forge(rig, 4, 3, 3, 0)
        for floods in (1, 2):
            for _ in range(200):
                raw.sendto(message, target)
            work_until(rig, lambda n=floods: rig.worker.counters()["icmp_floods"] == n)
            assert rig.udp.getsockopt(socket.IPPROTO_IP, 11) == 0
            rig.worker.hand_over(-1)
            rig.work()
            rig.worker.drain_send_queue(1)
            rig.worker.rebind(rig.udp.fileno(), rig.udp6.fileno())
            rig.worker.resume()
            assert rig.udp.getsockopt(socket.IPPROTO_IP, 11) == 1
            assert rig.udp6.getsockopt(socket.IPPROTO_IPV6, 25) == 1


@in_own_netns
def test_a_forged_path_mtu_is_only_a_hint():
    with Rig6() as rig:
        endpoint = rig.outside[PEERS[0]].getsockname()
        packed = addr(endpoint[0]), endpoint[1]
        header = ip4(bytes(40), 6, "10.244.1.9", "10.244.2.5")
        for quote in (b"", b"12345678", header, b"utp1" + bytes(60)):
            raw, message, target = forge(rig, 4, 3, 4, 552, quote)
            raw.sendto(message, target)
            hints = []
            work_until(rig, lambda to=hints: to.extend(rig.core.take_mtu_hints()) or to)
            assert hints == [(*packed, False, 552)]
        elsewhere = ip4(bytes(40), 6, "10.244.1.9", "10.244.3.5")
        for quote in (elsewhere, ip4(bytes(40), 6, "10.244.1.9", "192.0.2.1")):
            raw, message, target = forge(rig, 4, 3, 4, 552, quote)
            raw.sendto(message, target)
        raw, message, target = forge(rig, 4, 3, 3, 0)  # arrives after them
        raw.sendto(message, target)
        work_until(rig, lambda: peer_at(rig, endpoint).errors_n)
        assert rig.core.take_mtu_hints() == []
        assert peer_at(rig, endpoint).path_mtu == 1500
        route = sh(f"ip route get {endpoint[0]} from 127.0.0.1")
        assert "mtu" not in route


@in_own_netns
def test_the_mtu_of_the_device_is_applied_at_once():
    with Rig() as rig:
        sh("ip link set lo mtu 1000")
        endpoint = rig.outside[PEERS[0]].getsockname()
        rig.write(bytes(10) + Flow(dst=addr("10.244.2.5")).udp(bytes(1200)))
        work_until(rig, lambda: peer_at(rig, endpoint).path_mtu == 1000)
        assert rig.core.take_mtu_hints() == [(addr(endpoint[0]), endpoint[1], True, 1000)]
        assert rig.drops() == {("too_big", ENCAP): 1}
        rig.core.set_path_mtu(addr(endpoint[0]), endpoint[1], 0xFFFF, 0)
        assert peer_at(rig, endpoint).path_mtu == 1500  # of the link
        assert rig.core.path_mtu_changes() == []
        rig.check_invariant()


@in_own_netns
def test_ipv6_packets_of_1280_bytes_leave_in_fragments():
    with Rig() as rig:
        sh("ip link set lo mtu 1000")
        endpoint = rig.outside[PEERS[0]].getsockname()
        rig.core.set_path_mtu(addr(endpoint[0]), endpoint[1], 1000, 0)
        flow = Flow(version=6, src=addr("fd00:1::9"), dst=addr("fd00:2::5"))
        packet = flow.udp(bytes(1280 - 48))
        rig.write(bytes(10) + packet)
        rig.write(flow.tcp_super(bytes(3600), 1200))
        rig.write(bytes(10) + Flow(dst=addr("10.244.2.5")).udp(bytes(800)))
        got = []
        work_until(rig, lambda: got.extend(rig.at(PEERS[0])) or len(got) == 5)
        assert sum(len(datagram) > 1000 - 28 for datagram in got) == 4
        assert rig.drops() == {}
        rig.write(bytes(10) + flow.udp(bytes(1281 - 48)))
        work_until(rig, lambda: rig.drops() == {("too_big", ENCAP): 1})
        rig.check_invariant()


# Refused senders


def test_unknown_senders_are_named():
    flow = Flow(src=addr("10.244.2.5"), dst=addr("10.244.1.9"))
    with Rig() as rig:
        senders = [rig.bound(f"127.0.1.{i}") for i in range(1, 11)]
        for sender in senders:
            sender.sendto(flow.udp(b"x"), rig.udp.getsockname())
            rig.work()
        for _ in range(2):
            rig.send(OUTSIDER, flow.udp(b"x"))
            rig.work()
        found = rig.core.refused_senders()
        assert len(found) == 8  # the two that were silent for the longest time are gone
        newest = found[0]
        assert (newest.address, newest.packets) == (addr(OUTSIDER), 2)
        assert newest.port == rig.outside[OUTSIDER].getsockname()[1]
        assert [s.address for s in found[1:]] == [addr(f"127.0.1.{i}") for i in range(10, 3, -1)]
        assert all(s.packets == 1 for s in found[1:])
        assert rig.drops() == {("unknown_peer", DECAP): 12}


# The last dropped packets


def test_the_last_dropped_packets_have_their_sender_and_first_bytes():
    flow = Flow(src=addr("10.244.2.5"), dst=addr("10.244.1.9"))
    with Rig() as rig:
        for n in range(20):
            rig.send(OUTSIDER, flow.udp(bytes(n)))
            rig.work()
        found = rig.core.last_dropped()
        assert found.keys() == {("unknown_peer", DECAP)}
        last = found["unknown_peer", DECAP]
        assert [one.number for one in last] == list(range(5, 21))
        assert [one.length for one in last] == [28 + n for n in range(4, 20)]
        port = rig.outside[OUTSIDER].getsockname()[1]
        assert {(one.address, one.port, one.packets) for one in last} == {(addr(OUTSIDER), port, 1)}
        assert last[-1].head == flow.udp(bytes(19))[:64]
        assert sorted(one.time_ns for one in last) == [one.time_ns for one in last]


def test_dropped_packets_to_peers_have_the_peer():
    with Rig() as rig:
        rig.write(bytes(10) + Flow(dst=addr("10.99.0.1")).udp(b"x" * 100))  # no route
        endpoint = rig.outside[PEERS[0]].getsockname()
        rig.core.set_path_mtu(addr(endpoint[0]), endpoint[1], 1000, 0)
        packets = Flow(dst=addr("10.244.2.5")).tcp_super(bytes(3600), 1200)
        rig.write(packets)
        rig.write(bytes(4))  # shorter than the vnet header
        rig.work()
        found = {reason: last for (reason, _), last in rig.core.last_dropped().items()}
        assert found.keys() == {"no_route", "too_big", "short_packet"}
        (no_route,), (too_big,), (short,) = (
            found[reason] for reason in ("no_route", "too_big", "short_packet"))
        assert (no_route.address, no_route.length, len(no_route.head)) == (b"", 128, 64)
        assert (too_big.address, too_big.port) == (addr(endpoint[0]), endpoint[1])
        assert (too_big.packets, too_big.length) == (3, len(packets) - 10)
        assert short.head == bytes(4)


def test_a_flood_costs_at_most_16_records_per_turn():
    with Rig() as rig:
        for n in range(40):
            rig.send(OUTSIDER, Flow(src=addr("10.244.2.5")).udp(bytes(n)))
        rig.work()
        last = rig.core.last_dropped()["unknown_peer", DECAP]
        turns = {one.time_ns for one in last}
        assert rig.drops() == {("unknown_peer", DECAP): 40}
        assert last[-1].number <= 16 * len(turns) + 16


def test_a_peer_and_the_sender_of_a_malformed_datagram_are_not_listed():
    with Rig() as rig:
        rig.send(PEERS[0], Flow(src=addr("10.244.9.5"), dst=addr("10.244.1.9")).udp(b"x"))
        rig.send(OUTSIDER, b"\x45")
        rig.work()
        assert rig.core.refused_senders() == []


def test_a_sender_with_the_wrong_port_is_named_and_is_not_the_peer():
    with Rig() as rig:
        packet = Flow(src=addr("10.244.2.5"), dst=addr("10.244.1.9")).udp(b"x")
        for _ in range(2):
            rig.send(PEERS[0], packet, rig.ports[1])
        rig.send(PEERS[0], b"", rig.ports[1])  # a keepalive
        rig.work()
        assert rig.drops() == {("source_port", DECAP): 2, ("short_packet", DECAP): 1}
        (found,) = rig.core.refused_senders()
        assert found._replace(last_ns=0) == RefusedSender(
            addr(PEERS[0]), rig.ports[1].getsockname()[1], 2, 0, "source_port")
        row = peer_at(rig, rig.outside[PEERS[0]].getsockname())
        assert (row.decap_packets, row.decap_bytes, row.last_seen) == (0, 0, None)
        rig.check_invariant()


def test_a_table_change_changes_the_ports_from_which_a_peer_may_send():
    """Also for a peer of the table before, which keeps its object and its counters."""
    with Rig() as rig:
        packet = Flow(src=addr("10.244.2.5"), dst=addr("10.244.1.9")).udp(b"x")
        there = rig.outside[PEERS[0]].getsockname()
        other = rig.ports[1].getsockname()[1]
        dropped = 0
        for ports, admitted in (
            ("any", True), (None, False), (other, True), (f"{other}-65535", True),
            (f"1-{other - 1}", False), (None, False),
        ):
            publish(rig, Route.make("10.244.2.0/24", *there, source_port=ports))
            rig.send(PEERS[0], packet, rig.ports[1])
            rig.work()
            dropped += not admitted
            assert len(rig.from_tun()) == admitted, ports
            assert rig.drops().get(("source_port", DECAP), 0) == dropped, ports
        assert peer_at(rig, there).decap_packets == 3


def test_two_peers_at_one_address_are_told_apart_by_their_ports():
    """As for two nodes behind one NAT: neither may send as the other one."""
    with Rig() as rig:
        first, second = (sock.getsockname() for sock in rig.ports)
        publish(rig, Route.make("10.244.2.0/24", *first), Route.make("10.244.3.0/24", *second))
        for sender, subnet in ((0, 2), (1, 3), (0, 3), (1, 2)):
            packet = Flow(src=addr(f"10.244.{subnet}.5"), dst=addr("10.244.1.9")).udp(b"x")
            rig.send(PEERS[0], packet, rig.ports[sender])
        rig.work()
        assert len(rig.from_tun()) == 2
        assert rig.drops() == {("source_not_routed", DECAP): 2}


# Recursion


def routed_into_the_tunnel():
    """Routes that cover the endpoints of two peers."""
    return [
        Route.make("10.244.2.0/24", "10.250.0.2"), Route.make("10.250.0.0/16", "127.0.0.2"),
        Route.make("fd00:2::/64", "127.0.0.3"), Route.make("10.244.9.0/24", "127.0.0.3"),
    ]


def own_packets():
    """(packet, whether it is one of our datagrams): from us and from others, to the endpoint
    10.250.0.2:8285 and to others."""
    ours, pod = str(TUN4), "10.244.1.77"

    def udp(dport, payload=b"x" * 40):
        return (8285).to_bytes(2, "big") + dport.to_bytes(2, "big") + bytes(4) + payload

    yield ip4(udp(8285), UDP, ours, "10.250.0.2"), True
    yield ip4((99).to_bytes(2, "big") + udp(8285)[2:], UDP, ours, "10.250.0.2"), True  # masqueraded
    yield ip4(udp(8285), UDP, ours, "10.250.0.2", flags=0x2000), True  # the first fragment
    yield ip4(bytes(40), UDP, ours, "10.250.0.2", flags=0x2003), True  # a later fragment
    yield ip4(udp(8286), UDP, ours, "10.250.0.2"), False
    yield ip4(udp(8285), UDP, ours, "10.250.0.3"), False
    yield ip4(udp(8285), UDP, pod, "10.250.0.2"), False
    yield ip4(bytes(40), UDP, pod, "10.250.0.2", flags=0x2003), False
    yield ip4(udp(8285), 6, ours, "10.250.0.2"), False
    yield ip4(bytes(40), 1, ours, "10.250.0.2"), False
    yield ip4(udp(8285)[:3], UDP, ours, "10.250.0.2"), False


def test_our_own_datagrams_from_the_tun_are_dropped():
    routes = routed_into_the_tunnel()
    with Rig() as rig:
        publish(rig, *routes)
        twin = reference.ReferenceForwarder(routes, own_addresses=[TUN4, TUN6])
        expected = 0
        for packet, is_ours in own_packets():
            expected += is_ours
            twin.encap(bytes(10) + packet)
            assert twin.drops["recursion", ENCAP] == expected, packet.hex()
            rig.write(bytes(10) + packet)
            rig.work()
            assert rig.drops().get(("recursion", ENCAP), 0) == expected, packet.hex()
        rig.check_invariant()


def test_our_own_super_packet_is_dropped_as_its_segments():
    with Rig() as rig:
        publish(rig, *routed_into_the_tunnel())
        flow = Flow(src=TUN4.packed, dst=addr("10.250.0.2"), sport=8285, dport=8285)
        rig.write(flow.udp_super(bytes(4000), 1000))
        rig.work()
        assert rig.drops() == {("recursion", ENCAP): 4}
        rig.check_invariant()


@pytest.mark.parametrize("fragment", [None, 0, 3])
@pytest.mark.parametrize(("ours", "port"), [(True, 8285), (True, 8286), (False, 8285)])
def test_our_own_datagrams_over_ipv6_are_dropped(ours, port, fragment):
    endpoint = "fd00:9::2"
    routes = [Route.make("fd00:2::/64", endpoint), Route.make("fd00:9::/64", "127.0.0.2")]
    payload = (99).to_bytes(2, "big") + port.to_bytes(2, "big") + bytes(60)
    source = str(TUN6) if ours else "fd00:1::77"
    if fragment is None:
        packet = ip6(payload, UDP, source, endpoint)
    else:
        header = bytes([UDP, 0]) + (fragment << 3 | 1).to_bytes(2, "big") + bytes(4)
        packet = ip6(header + payload, FRAGMENT, source, endpoint)
    with Rig(udp6=True) as rig:
        publish(rig, *routes)
        twin = reference.ReferenceForwarder(routes, own_addresses=[TUN4, TUN6])
        twin.encap(bytes(10) + packet)
        rig.write(bytes(10) + packet)
        rig.work()
        dropped = ours and (port == 8285 or fragment == 3)
        assert rig.drops().get(("recursion", ENCAP), 0) == dropped
        assert twin.drops["recursion", ENCAP] == dropped
        rig.check_invariant()


def test_without_a_route_that_covers_an_endpoint_nothing_is_dropped():
    with Rig() as rig:
        publish(rig, Route.make("10.244.2.0/24", "127.0.0.2"))
        payload = (8285).to_bytes(2, "big") * 2 + bytes(60)
        rig.write(bytes(10) + ip4(payload, UDP, str(TUN4), "10.244.2.5"))
        rig.work()
        assert rig.drops() == {}
