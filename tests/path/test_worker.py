"""The compiled worker compared with the reference forwarder, packet by packet.

A SOCK_SEQPACKET pair replaces the TUN (one message is one frame); UDP uses loopback.
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
from tests.wire.craft import NEEDS_CSUM, TCPV4, TCPV6, UDP_L4, Flow, ip4, ip6, unfinished
from udptun import _core
from udptun.drops import DECAP, DIRECTIONS, ENCAP
from udptun.model import PROBE_REQUEST, Endpoint, Route

NO_VNET = ("udp-gso", "udp-gro", "batch")  # the features that do not need tun-gso
ALL = ("tun-gso", "tun-uso", "udp-gso", "udp-gro", "tcp-merge", "udp-merge", "batch")
LOCAL = "127.0.0.1"
PEERS = ("127.0.0.2", "127.0.0.3")
OUTSIDER = "127.0.0.9"
TUN4, TUN6 = ipaddress.ip_address("10.244.1.0"), ipaddress.ip_address("fd00:1::")
UDP_SEGMENT, UDP_GRO = 103, 104
TUN_MTU = 1472


def arrived(sock):
    datagrams = []
    with contextlib.suppress(BlockingIOError):
        while True:
            datagrams.append(sock.recv(1 << 16))
    return datagrams


class Rig:
    """One worker between a socket pair (its TUN) and loopback sockets; a reference forwarder."""

    def __init__(
        self, features=ALL, source_check="strict", mtu=None, gso_max_segs=64, udp6=False,
        sockopts=(), own_subnets=None, ecn=False, dscp=0, all_express=False,
    ):
        self.features = features
        self.closing = contextlib.ExitStack()
        self.tun, worker_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for end in (self.tun, worker_end):
            self.closing.enter_context(end)
            end.setblocking(False)
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 << 20)
        self.udp = self.bound(LOCAL)
        for option in sockopts:  # the worker opens a sender with the same options
            self.udp.setsockopt(*option)
        if "udp-gro" in features:
            self.udp.setsockopt(socket.IPPROTO_UDP, UDP_GRO, 1)
        self.outside = {a: self.bound(a) for a in (*PEERS, OUTSIDER)}
        # The first peer sends from other ports, too: ports[0] is one from which it may send, and
        # the table does not name ports[1].
        self.ports = [self.bound(PEERS[0]) for _ in range(2)]
        admitted = self.ports[0].getsockname()[1]
        ports = {a: self.outside[a].getsockname()[1] for a in PEERS}
        self.routes = [
            Route.make("10.244.2.0/24", PEERS[0], ports[PEERS[0]], mtu, express=True, ecn=ecn),
            Route.make("10.244.3.0/24", PEERS[1], ports[PEERS[1]], mtu),
            Route.make("10.244.3.128/25", PEERS[0], ports[PEERS[0]], mtu, True),
            Route.make("10.244.4.0/24", PEERS[0], ports[PEERS[0]], mtu, False, admitted),
            Route.make("fd00:2::/64", PEERS[0], ports[PEERS[0]], mtu and 1280),
            Route.make("fd00:3::/64", PEERS[1], ports[PEERS[1]], mtu and 1280),
        ]
        self.notify = os.eventfd(0, os.EFD_NONBLOCK)
        self.closing.callback(os.close, self.notify)
        fd6 = -1
        if udp6:  # a second listener, without traffic
            sock6 = self.closing.enter_context(socket.socket(socket.AF_INET6, socket.SOCK_DGRAM))
            sock6.setblocking(False)
            sock6.bind(("::1", 0))
            self.udp6 = sock6
            fd6 = sock6.fileno()
        link_mtus = (1500, 1500 if udp6 else 0)
        self.core = _core.Core(source_check, 1, link_mtus, [TUN4.packed, TUN6.packed], self.notify,
                               own_subnets and [(net.network_address.packed, net.prefixlen)
                                                for net in own_subnets], dscp)
        self.core.publish(_core.RouteTable.parse_text("\n".join(map(str, self.routes)).encode()))
        self.worker = _core.Worker(
            self.core, worker_end.fileno(), self.udp.fileno(), fd6, features, gso_max_segs
        )
        self.reference = reference.ReferenceForwarder(
            self.routes, own_addresses=[TUN4, TUN6], tun_addresses=[TUN4, TUN6],
            source_check=source_check, own_subnets=own_subnets, tun_mtu=TUN_MTU, dscp=dscp,
            all_express=all_express,
        )
        self.core.set_tun_mtu(TUN_MTU)
        if all_express:
            self.core.expect_unfinished()

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
        """Write a frame as the kernel does; without tun-gso it has no vnet header."""
        self.tun.send(frame if self.vnet else frame[10:])

    def send(self, address, datagram, sender=None):
        (sender or self.outside[address]).sendto(datagram, self.udp.getsockname())

    def work(self):
        self.worker.run(1)

    def from_tun(self):
        """Return the IP packets that the worker wrote; merged ones are cut again."""
        packets = []
        with contextlib.suppress(BlockingIOError):
            while True:
                frame = self.tun.recv(1 << 17)
                packets += reference.cut(frame) if self.vnet else [frame]
        return packets

    def at(self, address):
        """Return the datagrams that arrived at an outside socket."""
        return arrived(self.outside[address])

    def at_all(self):
        return [one for sock in (*self.outside.values(), *self.ports) for one in arrived(sock)]

    def counts(self):
        return {
            direction: {
                name: row[name] for name in ("read", "generated", "delivered", "consumed")
            } for direction, row in self.core.packets().items()
        }

    def reference_counts(self):
        return {
            direction: {
                "read": c.read, "generated": c.generated, "delivered": c.delivered,
                "consumed": c.consumed,
            } for direction, c in self.reference.counts.items()
        }

    def drops(self):
        return {(reason, direction): n for reason, direction, n in self.core.drops() if n}

    def check_invariant(self):
        for direction in DIRECTIONS:
            row = self.core.packets()[direction]
            assert row["read"] + row["generated"] == (
                row["delivered"] + row["consumed"] + row["dropped"] + row["queued"]
            ), direction


def frames(rng):
    """Return one frame as a TUN may deliver it: valid, unusual or malformed."""
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


def probe_like(rng):
    """Return a probe, or bytes that are almost one."""
    size = rng.choice((24, 24, 60, 500, 1400))
    message = bytearray(reference.build_probe(
        reference.Probe(rng.choice((1, 2)), rng.getrandbits(64), rng.getrandbits(32), size)
    ))
    if rng.random() < 0.5:
        message[rng.choice((0, 4, 5, 6, 20, 21))] = rng.choice((0, 1, 2, 3, 0x45, 0x75))
        del message[rng.choice((size, size, 4, 23)):]
    return bytes(message)


def probe_row(record):
    """Return what the reference reports of a probe, too."""
    address = str(ipaddress.ip_address(record.address))
    return address, record.kind, record.token, record.heard_ms, record.size


def without_id(packets):
    """Zero the IPv4 id and header checksum: a merge keeps only the first id, which has no meaning
    with DF (RFC 6864)."""
    return [
        p[:4] + bytes(2) + p[6:10] + bytes(2) + p[12:] if p[0] >> 4 == 4 else p for p in packets
    ]


def by_flow(packets):
    """Return the packets of each flow in order, without pure ACKs, which data may overtake."""
    flows = {}
    for packet in packets:
        ip_len, proto, key = (
            (20, packet[9], packet[12:24]) if packet[0] >> 4 == 4 else (40, packet[6], packet[8:44])
        )
        if proto == 17 or len(packet) > ip_len + 20:
            flows.setdefault((proto, key), []).append(packet)
    return flows


def icmp_packets(packets):
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
                    frame = bytes(10) + frame[10:]  # nor incomplete checksums
                if len(frame) == 10:
                    continue  # a socket pair reports an empty message as end of file
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


OWN_SUBNETS = [ipaddress.ip_network(text) for text in ("10.244.1.0/25", "fd00:1::8/125")]


@pytest.mark.parametrize("source_check", ["strict", "peer", "off"])
@pytest.mark.parametrize("without", [None, "tun-gso", "udp-gro", "tcp-merge", "udp-merge", "batch"])
def test_decap_equals_reference(without, source_check):
    features = NO_VNET if without == "tun-gso" else [f for f in ALL if f != without]
    for seed in range(30):
        rng = random.Random(f"{seed}-{without}-{source_check}")
        with Rig(features, source_check, own_subnets=rng.choice((None, OWN_SUBNETS)),
                 all_express=rng.random() < 0.3) as rig:
            packets, icmp, probes = [], [], []
            seq = 1000
            for number in range(40):
                source = rng.choice((2, 2, 2, 3, 1, 4))
                to = rng.choice(("9", "9", "9", "200", "0"))
                version = rng.choice((4, 4, 6))
                host = rng.choice((0, 7))
                text = f"10.244.{source}.{host}" if version == 4 else f"fd00:{source}::"
                flow = Flow(
                    version, src=ipaddress.ip_address(text).packed,
                    dst=ipaddress.ip_address(
                        f"10.244.1.{to}" if version == 4 else f"fd00:1::{to}").packed,
                    sport=rng.randrange(2), ttl=rng.choice((64, 64, 64, 1)),
                )
                data = rng.randbytes(rng.choice((0, 1, 500, 500, 500, 1400, 9000)))
                made = rng.randrange(8)
                if made > 5:
                    datagram = probe_like(rng)
                elif made == 0:
                    datagram = rng.randbytes(rng.randrange(60))
                elif made == 1:
                    datagram = flow.udp(data)
                else:
                    datagram = flow.tcp(data, seq=seq, ident=number)
                    seq += len(data)
                if rng.random() < 0.05:
                    datagram += bytes(rng.randrange(9))
                if rng.random() < 0.2:
                    datagram = unfinished(datagram)
                sender = rng.choice((PEERS[0], PEERS[0], PEERS[1], OUTSIDER))
                from_ = rig.outside[sender]
                if sender == PEERS[0] and rng.random() < 0.3:
                    from_ = rng.choice(rig.ports)
                result = rig.reference.decap(
                    Endpoint.parse(":".join(map(str, from_.getsockname()))), datagram
                )
                packets += result.packets
                icmp += [d for _, d in result.icmp + result.replies]
                if result.probe is not None and result.probe.kind == PROBE_REQUEST:
                    probes.append((sender, *result.probe))
                rig.send(sender, datagram, from_)
            rig.work()
            written, packets = without_id(rig.from_tun()), without_id(packets)
            assert sorted(written) == sorted(packets)
            assert by_flow(written) == by_flow(packets)
            if without == "tun-gso":
                assert written == packets
            assert sorted(rig.at_all()) == sorted(icmp)
            assert [probe_row(record) for record in rig.core.take_probes()] == probes
            assert rig.counts() == rig.reference_counts()
            assert rig.drops() == {k: n for k, n in rig.reference.drops.items() if n}
            rig.check_invariant()


def test_datagrams_of_a_refused_run_are_sent_one_by_one():
    """The kernel refuses UDP_SEGMENT: no packet is lost, and the worker stops using it."""
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


def test_the_longest_frames_with_the_shortest_segments_fit_after_a_full_queue():
    """The largest possible queue: a sanitizer shows whether the buffers are large enough."""
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


def test_packets_and_wake_up_make_the_worker_readable():
    with Rig() as rig:
        flow = Flow(dst=ipaddress.ip_address("10.244.2.5").packed)
        back = Flow(src=ipaddress.ip_address("10.244.2.5").packed,
                    dst=ipaddress.ip_address("10.244.1.5").packed)
        for act in (
            lambda: rig.write(bytes(10) + flow.udp(b"out")),
            lambda: rig.send(PEERS[0], back.udp(b"in")),
            rig.worker.wake,
        ):
            assert not readable(rig.worker)
            act()
            assert readable(rig.worker, 5)
            rig.work()
            rig.worker.resume()
        assert not readable(rig.worker)
        assert len(rig.at(PEERS[0])) == len(rig.from_tun()) == 1


def test_a_tun_that_is_gone_is_reported_once_and_is_no_longer_polled():
    with Rig() as rig:
        rig.tun.close()
        assert readable(rig.worker, 5)
        rig.work()
        assert rig.worker.take_events() == ["tun_gone"]
        assert not readable(rig.worker)


def encap_load(rig):
    """Return a function that writes a super-packet to the worker's TUN."""
    flow = Flow(dst=ipaddress.ip_address("10.244.2.5").packed)
    frame = flow.tcp_super(bytes(64000), 1400)
    rig.tun.settimeout(0.1)

    def feed():
        with contextlib.suppress(TimeoutError):
            rig.tun.send(frame)

    return feed


def decap_load(rig):
    """Return a function that sends a run to the worker and reads the frames that it wrote."""
    run = ip4(bytes(1380), socket.IPPROTO_RAW, "10.244.2.5", "10.244.1.9") * 40
    peer = rig.outside[PEERS[0]]
    peer.setsockopt(socket.IPPROTO_UDP, UDP_SEGMENT, len(run) // 40)
    peer.settimeout(0.1)
    local = rig.udp.getsockname()

    def feed():
        with contextlib.suppress(TimeoutError):
            peer.sendto(run, local)
        with contextlib.suppress(BlockingIOError):
            while True:
                rig.tun.recv(1 << 17)

    return feed


@contextlib.contextmanager
def busy(rig, allowed, load=encap_load):
    """Run the rig's worker at full load in a thread with this affinity; yield the thread's id."""
    feed = load(rig)
    tids, over = queue.SimpleQueue(), threading.Event()

    def work():
        os.sched_setaffinity(0, allowed)
        tids.put(threading.get_native_id())
        while not over.is_set():  # run returns when the feeding thread gets no CPU time
            rig.worker.run(1000)

    def feed_on():
        while not over.is_set():
            feed()

    threads = [threading.Thread(target=target) for target in (work, feed_on)]
    for thread in threads:
        thread.start()
    try:
        yield tids.get(timeout=60)
    finally:
        over.set()
        rig.worker.wake()
        for thread in threads:
            thread.join()


def wait_for_affinity(tid, wanted):
    end = time.monotonic() + 60
    while not wanted(os.sched_getaffinity(tid)):
        assert time.monotonic() < end
        time.sleep(0.005)  # leave the core to the worker


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
def test_a_worker_that_is_busy_sending_is_pinned_and_unpinned():
    allowed = os.sched_getaffinity(0)
    with Rig() as rig:
        with busy(rig, allowed) as tid:
            wait_for_affinity(tid, lambda cores: len(cores) == 1)
            wait_for_affinity(tid, lambda cores: cores == allowed)
        rig.check_invariant()


def cpu_ticks(tid):
    """Return a thread's user and system time: fields 14 and 15 of proc_pid_stat(5)."""
    fields = Path(f"/proc/self/task/{tid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:13]))


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
def test_a_worker_that_is_busy_receiving_is_not_pinned():
    allowed = os.sched_getaffinity(0)
    with Rig() as rig:
        with busy(rig, allowed, decap_load) as tid:
            end = time.monotonic() + 240  # with a sanitizer, on busy cores
            wanted = cpu_ticks(tid) + os.sysconf("SC_CLK_TCK")
            while cpu_ticks(tid) < wanted:
                assert time.monotonic() < end
                assert os.sched_getaffinity(tid) == allowed
                time.sleep(0.005)  # leave the core to the worker
        assert rig.counts()["decap"]["delivered"] > 1000
        rig.check_invariant()


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
def test_an_affinity_that_is_set_while_pinned_is_kept():
    allowed = os.sched_getaffinity(0)
    with Rig() as rig, busy(rig, allowed) as tid:
        wait_for_affinity(tid, lambda cores: len(cores) == 1)
        other = min(allowed - os.sched_getaffinity(tid) or allowed)
        os.sched_setaffinity(tid, {other})
        before = rig.worker.counters()["turns"]
        wait_for_affinity(tid, lambda _: rig.worker.counters()["turns"] > before + 1000)
        assert os.sched_getaffinity(tid) == {other}


@pytest.mark.parametrize("version", [4, 6])
def test_the_bytes_of_a_super_packet_are_those_of_its_segments(version):
    """The kernel of the peer has counted the headers of each segment."""
    src, dst = ("10.244.2.5", "10.244.1.9") if version == 4 else ("fd00:2::5", "fd00:1::9")
    flow = Flow(version, src=ipaddress.ip_address(src).packed,
                dst=ipaddress.ip_address(dst).packed)
    with Rig() as rig:
        rig.send(PEERS[0], unfinished(flow.tcp(bytes(20000))))
        rig.send(PEERS[0], flow.udp(b"x"))
        rig.work()
        packets = rig.from_tun()
        assert len(packets) > 10
        [row] = [row for row in rig.core.peers()
                 if row.address == ipaddress.ip_address(PEERS[0]).packed and row.decap_packets]
        assert row.decap_packets == len(packets)
        assert row.decap_bytes == sum(map(len, packets))


def test_packets_of_a_refused_merge_are_written_one_by_one():
    with Rig() as rig:
        # this buffer is too small for a merged frame, and large enough for each packet
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
                rig.send(OUTSIDER, rng.randbytes(rng.randrange(200)))
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
def test_contradictory_super_packets_are_counted_drops(version, kind):
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
        assert len(icmp_packets(rig.from_tun())) == counters["icmp_sent"]
        rig.check_invariant()


def test_routes_may_change_while_packets_are_read():
    """Peers and snapshots change between turns; `make sanitize` checks the memory accesses."""
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
        assert len(rig.core.peers()) == 2  # the previous table stays active
