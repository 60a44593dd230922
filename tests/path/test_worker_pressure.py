"""Back-pressure: a worker with a full socket waits, loses no packet that it read, and counts all.

A slow qdisc on loopback keeps datagrams in the socket's buffer until the buffer is full.
"""

import socket
import time

from tests.own_netns import in_own_netns, sh
from tests.path.test_worker import ALL, PEERS, Rig
from tests.wire.craft import Flow, addr
from udptun.drops import ENCAP


def slow_loopback(rate):
    sh(f"tc qdisc replace dev lo root tbf rate {rate} burst 3000 limit 10000000")


class FullRig(Rig):
    """A rig whose IPv4 socket is full after about twenty datagrams."""

    def __init__(self, **options):
        super().__init__(**options)
        self.udp.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 32768)

    def fill(self, n=60, size=1200):
        flow = Flow(dst=addr("10.244.2.5"))
        for _ in range(n):
            self.write(bytes(10) + flow.udp(bytes(size)))
        self.work()
        assert self.core.packets()[ENCAP]["queued"] > 0


@in_own_netns
def test_the_worker_waits_for_a_full_socket_without_spinning():
    slow_loopback("1mbit")
    with FullRig(features=[f for f in ALL if f != "udp-gso"], udp6=True) as rig:
        rig.fill()
        before = rig.worker.counters()["turns"]
        for _ in range(20):
            rig.work()
        # one turn each time the socket becomes writable, not a busy loop
        assert rig.worker.counters()["turns"] - before < 200
        rig.check_invariant()


@in_own_netns
def test_draining_waits_for_a_full_socket():
    slow_loopback("4mbit")
    with FullRig(features=[f for f in ALL if f != "udp-gso"]) as rig:
        rig.fill()
        rig.worker.drain(10.0)
        packets = rig.core.packets()[ENCAP]
        assert packets["read"] == packets["delivered"] == 60
        rig.check_invariant()


@in_own_netns
def test_datagrams_left_after_draining_are_counted():
    slow_loopback("100kbit")
    with FullRig(features=[f for f in ALL if f != "udp-gso"]) as rig:
        rig.fill()
        rig.worker.drain(0.0)
        assert rig.drops()["closed", ENCAP] > 0
        assert rig.core.packets()[ENCAP]["queued"] == 0
        rig.check_invariant()


@in_own_netns
def test_an_icmp_error_to_a_peer_whose_queue_was_sent_already_is_sent():
    """A full socket ends a flush after the other peer's queue is sent. A datagram queued for that
    peer before the next flush must be sent too."""
    slow_loopback("200kbit")
    with FullRig(features=[f for f in ALL if f != "udp-gso"]) as rig:
        rig.write(bytes(10) + Flow(dst=addr("10.244.3.5")).udp(b"first, to the other peer"))
        rig.fill(n=150, size=200)  # leaves room in the queue for a reply
        expiring = Flow(src=addr("10.244.3.7"), dst=addr("10.244.1.7"), ttl=1).udp(b"x")
        for _ in range(3):
            rig.send(PEERS[1], expiring)
        end = time.monotonic() + 20
        while rig.core.packets()[ENCAP]["queued"] and time.monotonic() < end:
            rig.work()
        packets = rig.core.packets()[ENCAP]
        assert packets["generated"] == 3
        assert packets["delivered"] == packets["read"] + 3
        rig.check_invariant()


@in_own_netns
def test_a_frame_of_many_segments_waits_as_well():
    slow_loopback("8mbit")
    with FullRig() as rig:
        flow = Flow(dst=addr("10.244.2.5"))
        for _ in range(100):
            rig.write(flow.udp_super(bytes(120 * 20), 20))
        end = time.monotonic() + 20
        rig.work()
        while rig.core.packets()[ENCAP]["delivered"] < 12000 and time.monotonic() < end:
            rig.work()
        assert rig.drops() == {}
        assert rig.core.packets()[ENCAP]["delivered"] == 12000
        rig.check_invariant()
