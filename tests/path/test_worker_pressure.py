"""The worker when a socket is full: it waits, loses nothing it took, and counts it all.

A slow qdisc on loopback keeps datagrams to a peer in the socket's buffer until it is full.
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
    """A rig whose IPv4 socket is full after some twenty datagrams."""

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
def test_a_full_socket_is_waited_for_without_spinning():
    slow_loopback("1mbit")
    with FullRig(features=[f for f in ALL if f != "udp-gso"], udp6=True) as rig:
        rig.fill()
        before = rig.worker.counters()["turns"]
        for _ in range(20):
            rig.work()
        # a turn for each time the socket had room, not one for each time it was asked
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
def test_what_cannot_be_drained_is_counted():
    slow_loopback("100kbit")
    with FullRig(features=[f for f in ALL if f != "udp-gso"]) as rig:
        rig.fill()
        rig.worker.drain(0.0)
        assert rig.drops()["closed", ENCAP] > 0
        assert rig.core.packets()[ENCAP]["queued"] == 0
        rig.check_invariant()


@in_own_netns
def test_an_error_to_a_peer_that_was_served_already_is_sent_too():
    """A flush that one peer's full socket ended: the other peer's queue was emptied, and what
    comes for it before the next flush must not be forgotten."""
    slow_loopback("200kbit")
    with FullRig(features=[f for f in ALL if f != "udp-gso"]) as rig:
        rig.write(bytes(10) + Flow(dst=addr("10.244.3.5")).udp(b"first, to the other peer"))
        rig.fill(n=150, size=200)  # little enough that there is room for an answer
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
