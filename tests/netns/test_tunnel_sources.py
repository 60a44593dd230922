"""The source check in each mode, and random datagrams.

A third host on the segment is not a peer. The tests build the datagrams byte by byte.
"""

import json
import random
import socket
import struct
from ipaddress import ip_address

import pytest

from tests.netns.netns_traffic import assert_invariant, nft_counters
from tests.reference import checksum
from udptun.lab import Forwarder, node, wait_for
from udptun.lab.tunnels import NETWORK, NETWORK6

PORT = 8285
TARGET_PORT = 4242


def inner_packet(source, target, payload: bytes, ttl: int = 64) -> bytes:
    """Build a UDP packet over IPv4 or IPv6 with correct checksums (RFC 791, 8200, 768)."""
    udp = struct.pack("!HHHH", TARGET_PORT, TARGET_PORT, 8 + len(payload), 0) + payload
    pseudo = source.packed + target.packed + struct.pack("!II", len(udp), socket.IPPROTO_UDP)
    udp = udp[:6] + _complement(pseudo + udp) + udp[8:]
    if source.version == 6:
        head = struct.pack("!IHBB", 6 << 28, len(udp), socket.IPPROTO_UDP, ttl)
        return head + source.packed + target.packed + udp
    head = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(udp), 1, 0, ttl, socket.IPPROTO_UDP, 0)
    head += source.packed + target.packed
    return head[:10] + _complement(head) + head[12:] + udp


def _complement(data: bytes) -> bytes:
    return struct.pack("!H", ~checksum(data) & 0xFFFF or 0xFFFF)


class Ground:
    """Node 1 with its forwarder; node 2 without one, so that a test can send from its address; a
    host that is not a peer ("outsider"). Node 3 has a route but no host: its subnet belongs to
    another peer."""

    def __init__(self, lab, **options) -> None:
        self.target, self.peer = lab.host("target"), lab.host("peer")
        self.outsider = lab.host("outsider")
        lab.segment(self.target, self.peer, self.outsider)
        absent = self.outsider.v4 + 100
        self.at = node(1)
        self.forwarder = Forwarder.start(
            self.target, addresses=[self.at.v4, self.at.v6], networks=[NETWORK, NETWORK6],
            routes=[
                f"{node(2).subnet} via {self.peer.v4}", f"{node(2).subnet6} via {self.peer.v4}",
                f"{node(3).subnet} via {absent}", f"{node(3).subnet6} via {absent}",
            ],
            **options,
        )
        self.received = {}
        for family, address in ((4, self.at.v4), (6, self.at.v6)):
            kind = socket.AF_INET6 if family == 6 else socket.AF_INET
            receiver = self.target.socket(kind, socket.SOCK_DGRAM)
            receiver.bind((str(address), TARGET_PORT))
            receiver.setblocking(False)
            self.received[family] = receiver

    def inject(self, host, packets, port: int = PORT) -> None:
        with host.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            sender.bind((str(host.v4), port))
            for packet in packets:
                sender.sendto(packet, (str(self.target.v4), PORT))

    def read(self) -> int:
        return self.forwarder.status()["packets"]["decap"]["read"]

    def arrived(self, family: int) -> list[bytes]:
        got = []
        while True:
            try:
                got.append(self.received[family].recv(2048))
            except BlockingIOError:
                return got


# (sender, inner source address) -> drop reason in each mode, None for delivery. Other programs of
# the peer's host, and its masqueraded pods, send from other ports than the peer.
MATRIX = {
    ("outsider", "peer's"): ("unknown_peer", "unknown_peer", None),
    ("outsider", "nobody's"): ("unknown_peer", "unknown_peer", None),
    ("outsider", "own"): ("unknown_peer", "unknown_peer", "own_source"),
    ("peer", "peer's"): (None, None, None),
    ("peer", "another peer's"): ("source_not_routed", None, None),
    ("peer", "nobody's"): ("source_not_routed", None, None),
    ("peer", "own"): ("own_source", "own_source", "own_source"),
    ("peer", "the peer's outer"): (None, None, None),
    ("peer's other port", "peer's"): ("source_port", None, None),
    ("peer's other port", "the peer's outer"): ("source_port", None, None),
    ("peer's other port", "own"): ("source_port", "own_source", "own_source"),
}


@pytest.mark.parametrize("offload", ["auto", "off"])
@pytest.mark.parametrize("mode", ["strict", "peer", "off"])
def test_who_may_send(lab, mode, offload):
    ground = Ground(lab, source_check=mode, offload=offload)
    for family in (4, 6):
        name = f"v{family}"
        sources = {
            "peer's": getattr(node(2), name) + 1, "another peer's": getattr(node(3), name) + 1,
            "nobody's": getattr(node(9), name) + 1, "own": getattr(ground.at, name),
            "the peer's outer": ground.peer.v4,
        }
        for (who, whose), reasons in MATRIX.items():
            source = sources[whose]
            if source.version != family:
                continue
            reason = reasons[["strict", "peer", "off"].index(mode)]
            payload = f"{who} as {whose}".encode()
            packet = inner_packet(source, getattr(ground.at, name), payload)
            before, already = ground.forwarder.drops(), ground.read()
            host, _, other = who.partition("'s other ")
            ground.inject(getattr(ground, host), [packet], PORT + 1 if other else PORT)
            wait_for(lambda already=already: ground.read() == already + 1, "the packet to be read")
            after = ground.forwarder.drops()
            changes = {
                (way, why): n - before.get((way, why), 0) for (way, why), n in after.items()
                if way == "decap" and n != before.get((way, why), 0)
            }
            context = f"IPv{family}: {who} with {whose} address"
            if reason is None:
                assert (changes, context) == ({}, context)
                assert (ground.arrived(family), context) == ([payload], context)
            else:
                assert (changes, context) == ({("decap", reason): 1}, context)
                assert (ground.arrived(family), context) == ([], context)
    assert_invariant(ground.forwarder)
    shown = json.loads(ground.forwarder.udptun("drops", "-o", "json").stdout)["drops"]
    shown_drops = {(d["direction"], d["reason"]): d["packets"] for d in shown if d["packets"]}
    assert shown_drops == ground.forwarder.drops()


def test_what_a_peer_may_reach(lab):
    """With --admit own: this node's subnets and its address in the overlay, and nothing else."""
    ground = Ground(lab, extra=[
        "--admit", "own", "--subnet", str(node(1).subnet), "--subnet", str(node(1).subnet6)])
    source = node(2).v4 + 1
    own = [ground.at.v4, ground.at.v6]
    foreign = [ground.target.v4, ip_address("127.0.0.1"), ip_address("224.0.0.1"),
               ip_address("255.255.255.255"), node(2).v4, ip_address("ff02::1"), node(2).v6]
    for to in (*own, *foreign):
        packet = inner_packet(source if to.version == 4 else node(2).v6 + 1, to, b"hello")
        already = ground.read()
        ground.inject(ground.peer, [packet])
        wait_for(lambda already=already: ground.read() == already + 1, "the packet to be read")
    assert ground.forwarder.drops() == {("decap", "destination_not_own"): len(foreign)}
    assert [ground.arrived(version) for version in (4, 6)] == [[b"hello"]] * 2
    status = ground.forwarder.status()
    assert status["admit"] == "own"
    assert status["device"]["subnets"] == [str(node(1).subnet), str(node(1).subnet6)]
    assert_invariant(ground.forwarder)


def test_all_datagrams_have_the_mark(lab):
    """Packets and probes; tests/path tests the own sockets."""
    ground = Ground(lab, extra=["--mark", "0x1000/0xf000"])
    assert ground.forwarder.status()["mark"] == "0x1000/0xf000"
    ground.target.nft(
        "table inet watch {\n counter marked {}\n counter plain {}\n chain c {\n"
        " type filter hook postrouting priority 0;\n"
        f" udp sport {PORT} meta mark 0x1000 counter name marked\n"
        f" udp sport {PORT} meta mark != 0x1000 counter name plain\n }}\n}}\n")

    def counted(name: str) -> int:
        listed = json.loads(ground.target.run(
            ["nft", "-j", "list", "counter", "inet", "watch", name]).stdout)
        return listed["nftables"][-1]["counter"]["packets"]

    ground.forwarder.udptun("route", "add", *f"10.244.5.0/24 via {ground.peer.v4} probe".split())
    wait_for(lambda: counted("marked") > 0, "a probe")
    probes = counted("marked")
    with ground.target.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        for _ in range(200):
            sender.sendto(b"x", (str(node(2).v4 + 1), TARGET_PORT))
    wait_for(lambda: ground.forwarder.status()["packets"]["encap"]["delivered"] >= 200,
             "the packets to be sent")
    assert counted("marked") > probes
    assert counted("plain") == 0


def rubbish(count: int):
    """Yield random bytes, half of them with the version and lengths of an IP packet."""
    rng = random.Random(8285)
    for n in range(count):
        data = bytearray(rng.randbytes(rng.choice([0, 1, 19, 20, 39, 40, rng.randrange(1473)])))
        if len(data) > 20 and n % 2:
            data[0] = rng.choice([0x45, 0x46, 0x4F, 0x44, 0x60])
            if n % 4 == 1:
                data[2:4] = struct.pack("!H", len(data))
                data[4:6] = struct.pack("!H", len(data) - 40 if len(data) >= 40 else 0)
            data[6:10] = bytes([rng.choice([0, 0x20, 0x40]), 0, 64, rng.choice([1, 6, 17, 44])])
        yield bytes(data)


@pytest.mark.parametrize("offload", ["auto", "off"])
def test_random_datagrams_are_counted_as_drops(lab, offload):
    ground = Ground(lab, source_check="off", offload=offload)
    count = 4000
    packets = list(rubbish(count))
    with nft_counters(ground.target, "eth0", came=f"udp dport {PORT}") as wire:
        already = ground.read()
        for i in range(0, count, 100):
            ground.inject(ground.outsider, packets[i : i + 100])
            wait_for(lambda n=already + i + 100: ground.read() >= n, "the burst to be read")
        came = wire.packets()["came"]
    assert came == count
    assert ground.read() - already == came
    drops = ground.forwarder.drops()
    for reason in ("short_packet", "bad_version", "bad_header_len", "bad_total_len"):
        assert drops.get(("decap", reason), 0) > 0, drops
    assert_invariant(ground.forwarder)
    good = inner_packet(node(2).v4 + 1, ground.at.v4, b"still here")
    ground.arrived(4)
    ground.inject(ground.peer, [good])
    wait_for(lambda: b"still here" in ground.arrived(4), "a good packet to come through")
    assert ground.forwarder.process.alive
    assert "Traceback" not in ground.forwarder.process.text()
