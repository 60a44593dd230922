"""The compiled worker against the reference forwarder, packet by packet, without a kernel TUN.

A SOCK_SEQPACKET pair stands in for the TUN (one message is one frame); UDP goes over loopback.
"""

import contextlib
import ipaddress
import os
import queue
import random
import select
import socket
import struct
import threading
import time
from pathlib import Path

import pytest

from tests import reference
from tests.wire.craft import NEEDS_CSUM, TCPV4, TCPV6, UDP_L4, Flow, ip4, ip6
from udptun import _core
from udptun.drops import DECAP, DIRECTIONS, ENCAP
from udptun.model import Endpoint, Route

NO_VNET = ("udp-gso", "udp-gro", "batch")  # what is left without tun-gso
ALL = ("tun-gso", "tun-uso", "udp-gso", "udp-gro", "tcp-merge", "udp-merge", "batch")
HERE = "127.0.0.1"
PEERS = ("127.0.0.2", "127.0.0.3")
STRANGER = "127.0.0.9"
TUN4, TUN6 = ipaddress.ip_address("10.244.1.0"), ipaddress.ip_address("fd00:1::")
UDP_SEGMENT, UDP_GRO = 103, 104


class Rig:
    """One worker between a stand-in TUN and loopback sockets, beside a reference forwarder."""

    def __init__(
        self, features=ALL, source_check="strict", mtu=None, gso_max_segs=64, udp6=False
    ):
        self.features = features
        self.closing = contextlib.ExitStack()
        self.tun, ours = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for end in (self.tun, ours):
            self.closing.enter_context(end)
            end.setblocking(False)
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 << 20)
        self.udp = self.bound(HERE)
        if "udp-gro" in features:
            self.udp.setsockopt(socket.IPPROTO_UDP, UDP_GRO, 1)
        self.outside = {a: self.bound(a) for a in (*PEERS, STRANGER)}
        ports = {a: self.outside[a].getsockname()[1] for a in PEERS}
        self.routes = [
            Route.make("10.244.2.0/24", PEERS[0], ports[PEERS[0]], mtu),
            Route.make("10.244.3.0/24", PEERS[1], ports[PEERS[1]], mtu),
            Route.make("10.244.3.128/25", PEERS[0], ports[PEERS[0]], mtu),
            Route.make("fd00:2::/64", PEERS[0], ports[PEERS[0]], mtu and 1280),
            Route.make("fd00:3::/64", PEERS[1], ports[PEERS[1]], mtu and 1280),
        ]
        self.notify = os.eventfd(0, os.EFD_NONBLOCK)
        self.closing.callback(os.close, self.notify)
        fd6 = -1
        if udp6:  # a second listener, which nobody uses
            sock6 = self.closing.enter_context(socket.socket(socket.AF_INET6, socket.SOCK_DGRAM))
            sock6.setblocking(False)
            sock6.bind(("::1", 0))
            fd6 = sock6.fileno()
        link_mtus = (1500, 1500 if udp6 else 0)
        self.core = _core.Core(source_check, 1, link_mtus, [TUN4.packed, TUN6.packed], self.notify)
        self.core.publish(_core.RouteTable.parse_text("\n".join(map(str, self.routes)).encode()))
        self.worker = _core.Worker(
            self.core, ours.fileno(), self.udp.fileno(), fd6, features, gso_max_segs
        )
        self.reference = reference.ReferenceForwarder(
            self.routes, own_addresses=[TUN4, TUN6], tun_addresses=[TUN4, TUN6],
            source_check=source_check,
        )

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.closing.close()

    def bound(self, address):
        sock = self.closing.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
        sock.bind((address, 0))
        return sock

    @property
    def vnet(self):
        return "tun-gso" in self.features

    def write(self, frame):
        """A frame as the kernel would hand it over; without tun-gso it has no vnet header."""
        self.tun.send(frame if self.vnet else frame[10:])

    def send(self, address, datagram):
        self.outside[address].sendto(datagram, self.udp.getsockname())

    def work(self):
        self.worker.run(1)

    def from_tun(self):
        """IP packets that the worker wrote, cut again where it merged."""
        packets = []
        with contextlib.suppress(BlockingIOError):
            while True:
                frame = self.tun.recv(1 << 17)
                packets += reference.cut(frame) if self.vnet else [frame]
        return packets

    def at(self, address):
        datagrams = []
        with contextlib.suppress(BlockingIOError):
            while True:
                datagrams.append(self.outside[address].recv(1 << 16))
        return datagrams

    def counts(self):
        return {
            direction: {name: row[name] for name in ("read", "generated", "delivered")}
            for direction, row in self.core.packets().items()
        }

    def reference_counts(self):
        return {
            direction: {
                "read": c.read, "generated": c.generated, "delivered": c.delivered,
            } for direction, c in self.reference.counts.items()
        }

    def drops(self):
        return {(reason, direction): n for reason, direction, n in self.core.drops() if n}

    def check_invariant(self):
        for direction in DIRECTIONS:
            row = self.core.packets()[direction]
            assert row["read"] + row["generated"] == (
                row["delivered"] + row["dropped"] + row["queued"]
            ), direction


def frames(rng):
    """A mix of what a TUN may hand over: good, odd and hostile."""
    version = rng.choice((4, 6))
    third = rng.choice((2, 2, 3, 3, 9))
    dst = f"10.244.{third}.{rng.choice((5, 200))}" if version == 4 else f"fd00:{third}::5"
    flow = Flow(
        version, src=ipaddress.ip_address("10.244.1.7" if version == 4 else "fd00:1::7").packed,
        dst=ipaddress.ip_address(dst).packed, sport=rng.randrange(1, 5),
        ttl=rng.choice((64, 64, 64, 2, 1, 0)), flags=rng.choice((0x4000, 0)),
        extensions=rng.choice(((), (), ((60, bytes(6)),))),
    )
    payload = rng.randbytes(rng.choice((0, 1, 100, 1400, 1432, 3000, 20000)))
    kind = rng.randrange(7)
    if kind == 0:
        return flow.tcp_super(payload or b"x", rng.choice((100, 536, 1400)))
    if kind == 1:
        return flow.udp_super(payload or b"x", rng.choice((536, 1200, 1400)))
    if kind == 2:
        return bytes(10) + flow.tcp(payload)
    if kind in (3, 4):
        return bytes(10) + flow.udp(payload)
    if kind == 5:
        return bytes(10) + rng.randbytes(rng.randrange(80))
    frame = bytearray(flow.tcp_super(payload or b"x", 1000))
    for _ in range(3):
        frame[rng.randrange(min(len(frame), 70))] = rng.randrange(256)
    return bytes(frame)


def without_id(packets):
    """A merge keeps one IPv4 id, which means nothing with DF (RFC 6864): blank it and its sum."""
    return [
        p[:4] + bytes(2) + p[6:10] + bytes(2) + p[12:] if p[0] >> 4 == 4 else p for p in packets
    ]


def by_flow(packets):
    """The packets of each flow in their order. Pure ACKs are left out: data may pass them."""
    flows = {}
    for packet in packets:
        ip_len, proto, key = (
            (20, packet[9], packet[12:24]) if packet[0] >> 4 == 4 else (40, packet[6], packet[8:44])
        )
        if proto == 17 or len(packet) > ip_len + 20:
            flows.setdefault((proto, key), []).append(packet)
    return flows


def icmp_kinds(packets):
    return [p for p in packets if p[9 if p[0] >> 4 == 4 else 6] in (1, 58)]


@pytest.mark.parametrize("without", [None, "tun-gso", "udp-gso", "batch"])
@pytest.mark.parametrize("mtu", [None, 600])
def test_encap_equals_reference(without, mtu):
    features = NO_VNET if without == "tun-gso" else [f for f in ALL if f != without]
    for seed in range(40):
        rng = random.Random(f"{seed}-{without}-{mtu}")
        with Rig(features, mtu=mtu) as rig:
            expected = {a: [] for a in PEERS}
            icmp = []
            for _ in range(12):
                frame = frames(rng)
                if not rig.vnet and frame[1]:
                    continue  # without vnet headers there are no super-packets
                if not rig.vnet:
                    frame = bytes(10) + frame[10:]  # nor checksums left to us
                if len(frame) == 10:
                    continue  # an empty message would be an end of file to a socket pair
                result = rig.reference.encap(frame)
                for endpoint, datagram in result.datagrams:
                    expected[str(endpoint.address)].append(datagram)
                icmp += result.icmp
                rig.write(frame)
            rig.work()
            for address in PEERS:
                assert rig.at(address) == expected[address]
            assert rig.from_tun() == icmp
            assert rig.counts() == rig.reference_counts()
            assert rig.drops() == {k: n for k, n in rig.reference.drops.items() if n}
            rig.check_invariant()


@pytest.mark.parametrize("source_check", ["strict", "peer", "off"])
@pytest.mark.parametrize("without", [None, "tun-gso", "udp-gro", "tcp-merge", "udp-merge", "batch"])
def test_decap_equals_reference(without, source_check):
    features = NO_VNET if without == "tun-gso" else [f for f in ALL if f != without]
    for seed in range(30):
        rng = random.Random(f"{seed}-{without}-{source_check}")
        with Rig(features, source_check) as rig:
            packets, icmp = [], []
            seq = 1000
            for number in range(40):
                source = rng.choice((2, 2, 2, 3, 1))
                version = rng.choice((4, 4, 6))
                host = rng.choice((0, 7))
                text = f"10.244.{source}.{host}" if version == 4 else f"fd00:{source}::"
                flow = Flow(
                    version, src=ipaddress.ip_address(text).packed,
                    dst=ipaddress.ip_address("10.244.1.9" if version == 4 else "fd00:1::9").packed,
                    sport=rng.randrange(2), ttl=rng.choice((64, 64, 64, 1)),
                )
                data = rng.randbytes(rng.choice((0, 1, 500, 500, 500, 1400)))
                made = rng.randrange(6)
                if made == 0:
                    datagram = rng.randbytes(rng.randrange(60))
                elif made == 1:
                    datagram = flow.udp(data)
                else:
                    datagram = flow.tcp(data, seq=seq, ident=number)
                    seq += len(data)
                if rng.random() < 0.05:
                    datagram += bytes(rng.randrange(9))
                sender = rng.choice((PEERS[0], PEERS[0], PEERS[1], STRANGER))
                result = rig.reference.decap(
                    Endpoint.parse(":".join(map(str, rig.outside[sender].getsockname()))), datagram
                )
                if result.packet is not None:
                    packets.append(result.packet)
                icmp += [d for _, d in result.icmp]
                rig.send(sender, datagram)
            rig.work()
            written, packets = without_id(rig.from_tun()), without_id(packets)
            assert sorted(written) == sorted(packets)
            assert by_flow(written) == by_flow(packets)
            if without == "tun-gso":
                assert written == packets
            assert sorted([d for a in PEERS for d in rig.at(a)]) == sorted(icmp)
            assert rig.counts() == rig.reference_counts()
            assert rig.drops() == {k: n for k, n in rig.reference.drops.items() if n}
            rig.check_invariant()


def test_a_refused_run_is_sent_again_one_by_one():
    """A kernel that refuses UDP_SEGMENT: nothing is lost, and it is not asked again."""
    with Rig(gso_max_segs=1000) as rig:
        flow = Flow(dst=ipaddress.ip_address("10.244.2.5").packed)
        sent = [flow.udp(bytes([i]) * 10) for i in range(250)]
        for packet in sent:
            rig.write(bytes(10) + packet)
        rig.work()
        expected = [reference.decrement_hop_limit(packet) for packet in sent]
        assert rig.at(PEERS[0]) == expected
        assert rig.worker.take_events() == ["udp-gso"]
        assert "udp-gso" not in rig.worker.in_use()
        rig.check_invariant()


def test_the_longest_frames_cut_smallest_fit_behind_a_full_queue():
    """The most that may wait at once: under a sanitizer, that the buffers hold it."""
    flow = Flow(dst=ipaddress.ip_address("10.244.2.5").packed)
    options = b"\x01" * 40
    whole = [flow.tcp_super(bytes(65000), 1000), flow.tcp_super(bytes(65000), 1200)]
    small = flow.tcp_super(bytes(range(256)) * 250, 63, options=options)  # 1016 segments
    with Rig() as rig:
        for frame in (*whole, *whole, small, small):
            expected = [reference.decrement_hop_limit(p) for p in reference.cut(frame)]
            rig.write(frame)
            if frame is small:
                rig.work()
                got = rig.at(PEERS[0])
                assert got[-len(expected):] == expected
        assert rig.drops() == {}
        rig.check_invariant()


def readable(worker, wait=0.0):
    return bool(select.select([worker.fileno()], [], [], wait)[0])


def test_the_loop_learns_of_what_comes_while_the_worker_is_away():
    with Rig() as rig:
        flow = Flow(dst=ipaddress.ip_address("10.244.2.5").packed)
        back = Flow(src=ipaddress.ip_address("10.244.2.5").packed,
                    dst=ipaddress.ip_address("10.244.1.5").packed)
        for bring in (
            lambda: rig.write(bytes(10) + flow.udp(b"out")),
            lambda: rig.send(PEERS[0], back.udp(b"in")),
            rig.worker.wake,
        ):
            assert not readable(rig.worker)
            bring()
            assert readable(rig.worker, 5)
            rig.work()
            rig.worker.resume()
        assert not readable(rig.worker)
        assert len(rig.at(PEERS[0])) == len(rig.from_tun()) == 1


def test_a_tun_that_is_gone_is_told_once_and_keeps_nobody_awake():
    with Rig() as rig:
        rig.tun.close()
        assert readable(rig.worker, 5)
        rig.work()
        assert rig.worker.take_events() == ["tun_gone"]
        assert not readable(rig.worker)


def to_send(rig):
    """Feeds a worker with super-packets from its TUN."""
    flow = Flow(dst=ipaddress.ip_address("10.244.2.5").packed)
    frame = flow.tcp_super(bytes(64000), 1400)
    rig.tun.settimeout(0.1)

    def feed():
        with contextlib.suppress(TimeoutError):
            rig.tun.send(frame)

    return feed


def to_receive(rig):
    """Feeds a worker with runs of datagrams from a peer, and takes what it writes."""
    run = ip4(bytes(1380), socket.IPPROTO_RAW, "10.244.2.5", "10.244.1.9") * 40
    peer = rig.outside[PEERS[0]]
    peer.setsockopt(socket.IPPROTO_UDP, UDP_SEGMENT, len(run) // 40)
    peer.settimeout(0.1)
    here = rig.udp.getsockname()

    def feed():
        with contextlib.suppress(TimeoutError):
            peer.sendto(run, here)
        with contextlib.suppress(BlockingIOError):
            while True:
                rig.tun.recv(1 << 17)

    return feed


@contextlib.contextmanager
def busy(rig, allowed, load=to_send):
    """Its worker at full load, in a thread that may use these cores; yields the thread's id."""
    feed = load(rig)
    tids, over = queue.SimpleQueue(), threading.Event()

    def work():
        os.sched_setaffinity(0, allowed)
        tids.put(threading.get_native_id())
        rig.worker.run(1000)

    def feed_on():
        while not over.is_set():
            feed()

    threads = [threading.Thread(target=target) for target in (work, feed_on)]
    for thread in threads:
        thread.start()
    try:
        yield tids.get(timeout=10)
    finally:
        over.set()
        rig.worker.wake()
        for thread in threads:
            thread.join()


def affinity_becomes(tid, wanted):
    end = time.monotonic() + 20
    while not wanted(os.sched_getaffinity(tid)):
        assert time.monotonic() < end
        time.sleep(0.005)  # the core is the worker's


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="there is one core to run on")
def test_a_worker_that_is_busy_sending_keeps_its_core_and_roams_again():
    allowed = os.sched_getaffinity(0)
    with Rig() as rig:
        with busy(rig, allowed) as tid:
            affinity_becomes(tid, lambda cores: len(cores) == 1)
            affinity_becomes(tid, lambda cores: cores == allowed)
        rig.check_invariant()


def cpu_ticks(tid):
    """Of a thread of ours, user and system: fields 14 and 15 of proc_pid_stat(5)."""
    fields = Path(f"/proc/self/task/{tid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:13]))


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="there is one core to run on")
def test_a_worker_that_is_busy_receiving_goes_where_the_scheduler_puts_it():
    allowed = os.sched_getaffinity(0)
    with Rig() as rig:
        with busy(rig, allowed, to_receive) as tid:
            wanted = cpu_ticks(tid) + os.sysconf("SC_CLK_TCK")
            while cpu_ticks(tid) < wanted:
                assert os.sched_getaffinity(tid) == allowed
                time.sleep(0.005)  # the core is the worker's
        assert rig.counts()["decap"]["delivered"] > 1000
        rig.check_invariant()


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="there is one core to run on")
def test_an_affinity_that_somebody_else_sets_stays():
    allowed = os.sched_getaffinity(0)
    with Rig() as rig, busy(rig, allowed) as tid:
        affinity_becomes(tid, lambda cores: len(cores) == 1)
        other = min(allowed - os.sched_getaffinity(tid) or allowed)
        os.sched_setaffinity(tid, {other})
        before = rig.worker.counters()["turns"]
        affinity_becomes(tid, lambda _: rig.worker.counters()["turns"] > before + 1000)
        assert os.sched_getaffinity(tid) == {other}


def test_a_refused_merge_is_written_again_one_by_one():
    with Rig() as rig:
        # a merged write is longer than this buffer takes, each packet alone is not
        rig.tun.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        flow = Flow(src=ipaddress.ip_address("10.244.2.5").packed,
                    dst=ipaddress.ip_address("10.244.1.5").packed)
        sent = [flow.tcp(b"x" * 1000, seq=1000 * i, ident=i) for i in range(20)]
        for packet in sent:
            rig.send(PEERS[0], packet)
        rig.work()
        assert rig.from_tun() == [reference.decrement_hop_limit(packet) for packet in sent]
        rig.check_invariant()


def test_arbitrary_bytes_both_ways_keep_the_invariant():
    rng = random.Random(7)
    with Rig(source_check="off") as rig:
        for _ in range(300):
            for _ in range(10):
                rig.send(STRANGER, rng.randbytes(rng.randrange(200)))
                rig.write(rng.randbytes(rng.randrange(10, 200)))
            rig.work()
            rig.check_invariant()
            rig.tun.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                while True:
                    rig.tun.recv(1 << 17)
        assert rig.core.packets()[ENCAP]["read"] >= 3000
        assert rig.core.packets()[DECAP]["read"] >= 3000


@pytest.mark.parametrize("version, kind", [(4, TCPV4), (6, TCPV6), (4, UDP_L4)])
def test_lying_super_packets_are_counted_drops(version, kind):
    body = struct.pack("!HHIIBBHHH", 1, 2, 3, 4, 0xF0, 0x10, 0, 0, 0)
    proto = 17 if kind == UDP_L4 else 6
    packet = ip4(body, proto) if version == 4 else ip6(body, proto)
    with Rig() as rig:
        for gso_size in (0, 1, 65535):
            for start in (0, 20, 65535):
                rig.write(struct.pack("=BBHHHH", NEEDS_CSUM, kind, 0, gso_size, start, 6) + packet)
        rig.work()
        rig.check_invariant()
        assert rig.core.packets()[ENCAP]["read"] >= 9


def test_icmp_is_rate_limited_and_counted():
    with Rig() as rig:
        flow = Flow(dst=ipaddress.ip_address("10.9.9.9").packed)
        for _ in range(200):
            rig.write(bytes(10) + flow.udp(b"hello"))
        rig.work()
        counters = rig.worker.counters()
        assert counters["icmp_sent"] + counters["icmp_suppressed"] == 200
        assert 50 <= counters["icmp_sent"] < 200
        assert len(icmp_kinds(rig.from_tun())) == counters["icmp_sent"]
        rig.check_invariant()


def test_routes_may_change_while_packets_are_read():
    """Peers and snapshots come and go between turns; `make sanitize` watches the memory."""
    with Rig() as rig:
        flow = Flow(dst=ipaddress.ip_address("10.244.2.5").packed)
        for i in range(300):
            route = Route.make("10.244.2.0/24", PEERS[i % 2], 1024 + i % 7)
            table = _core.RouteTable.parse_text(str(route).encode())
            rig.write(bytes(10) + flow.udp(b"x"))
            rig.core.publish(table)
            rig.work()
        rig.check_invariant()
        assert len(rig.core.peers()) == 1


def test_a_next_hop_without_listener_is_refused():
    with Rig() as rig:
        table = _core.RouteTable.parse_text(b"10.0.0.0/8 via 2001:db8::1")
        with pytest.raises(ValueError, match=r"via: '2001:db8::1' is not valid: expected an IPv4"):
            rig.core.publish(table)
        assert len(rig.core.peers()) == 2  # what was in force still is
