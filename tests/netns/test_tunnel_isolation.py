"""Datagrams that the kernel holds for slow or dead peers do not harm the traffic of other peers.

A datagram uses memory of the socket that sent it while it waits in the kernel for the link address
of a dead neighbour, or in a qdisc. With one socket for all peers, such datagrams fill the buffer,
and no datagram to any peer is sent.
"""

import socket
import struct
import time

import pytest

from tests.netns.netns_traffic import SO_RCVBUFFORCE, UDP_SEGMENT, assert_invariant
from udptun.lab import Forwarder, LabError, node
from udptun.lab.tunnels import NETWORK, NETWORK6

SECONDS = 4  # the kernel holds datagrams for a dead neighbour for three seconds
PACE = 0.002
SEGMENT = 1200
FLOOD = bytes(16 * SEGMENT)
DEAD = 45
STEP_SECONDS = 0.1
SO_TIMESTAMPNS = 35
STAMP = struct.Struct("=d")
TIMESPEC = struct.Struct("=qq")


class PacedFlow:
    """Datagrams at a steady pace from one host to another. The kernel records the arrival times.

    It records them by the wall clock, which a virtual machine may set at any moment: then the
    the delays have no meaning.
    """

    def __init__(self, source, target, address):
        family = socket.AF_INET6 if address.version == 6 else socket.AF_INET
        self._receiver = target.socket(family, socket.SOCK_DGRAM)
        self._receiver.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 1 << 22)
        self._receiver.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)
        self._receiver.bind((str(address), 0))
        self._sender = source.socket(family, socket.SOCK_DGRAM)
        self._sender.connect(self._receiver.getsockname()[:2])
        self._receiver.settimeout(5)
        self.sent = self.received = 0
        self.longest = 0.0  # the longest delay, in seconds
        self._clock = _wall_clock()

    def send(self):
        self._sender.send(STAMP.pack(time.time()))
        self.sent += 1

    def finish(self):
        """Receive what arrived, and wait for the last datagram."""
        self.send()
        last = 0.0
        try:
            while self.received < self.sent:
                data, ancillary, _, _ = self._receiver.recvmsg(64, 64)
                seconds, ns = TIMESPEC.unpack(ancillary[0][2])
                last = STAMP.unpack(data)[0]
                self.longest = max(self.longest, seconds + ns / 1e9 - last)
                self.received += 1
        except TimeoutError:
            pass
        if abs(step := _wall_clock() - self._clock) > STEP_SECONDS:
            pytest.skip(f"the machine's wall clock was set by {step:+.3f} s during the test")
        return self


def _wall_clock():
    """Return the time of the wall clock when the monotonic clock is 0."""
    return time.time() - time.monotonic()


class Flood:
    """Super-packets to many addresses, faster than the paths to these addresses can carry them."""

    def __init__(self, source, addresses):
        family = socket.AF_INET6 if addresses[0].version == 6 else socket.AF_INET
        self._sender = source.socket(family, socket.SOCK_DGRAM)
        self._sender.setsockopt(socket.IPPROTO_UDP, UDP_SEGMENT, SEGMENT)
        self._sender.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 22)
        self._sender.setblocking(False)
        self._addresses = addresses
        self._next = 0

    def send(self, n):
        for _ in range(n):
            address = self._addresses[self._next % len(self._addresses)]
            self._sender.sendto(FLOOD, (str(address), 9))
            self._next += 1


def start_pair(a, b, outer, more_routes):
    """Start forwarders on a (node 1) and b (node 2). a also has the routes ``more_routes``."""
    ends = []
    for host, here, other, there in ((a, node(1), b, node(2)), (b, node(2), a, node(1))):
        via = other.v4 if outer == 4 else other.v6
        routes = [f"{subnet} via {via}" for subnet in (there.subnet, there.subnet6)]
        ends.append(Forwarder.start(
            host, listen=[host.v4 if outer == 4 else host.v6], addresses=[here.v4, here.v6],
            networks=[NETWORK, NETWORK6], routes=routes + (more_routes if host is a else []),
        ))
    return ends


def flood_beside(flow, flood, per_step):
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        flood.send(per_step)
        flow.send()
        time.sleep(PACE)
    return flow.finish()


def assert_unharmed(flow):
    said = f"{flow.received} of {flow.sent} arrived, longest delay {flow.longest:.3f} s"
    assert flow.sent > 100, said
    assert flow.received >= 0.99 * flow.sent, said
    assert flow.longest < 1.0, said


@pytest.mark.parametrize("outer", [4, 6])
def test_dead_neighbours_do_not_harm_a_healthy_peer(lab, outer):
    a, b = lab.host("a"), lab.host("b")
    end, _ = lab.segment(a, b)
    net = (end.v4 if outer == 4 else end.v6).network
    dead = [node(100 + n) for n in range(DEAD)]
    ends = start_pair(
        a, b, outer, [f"{peer.subnet} via {net[100 + n]}" for n, peer in enumerate(dead)]
    )
    flow = PacedFlow(a, b, node(2).v4)
    flood_beside(flow, Flood(a, [peer.v4 for peer in dead]), 4)
    assert_unharmed(flow)
    assert_invariant(ends[0])


def test_a_slow_peer_does_not_harm_a_fast_one(lab):
    a, b, slow = lab.host("a"), lab.host("b"), lab.host("slow")
    lab.segment(a, b, slow)
    try:
        for line in (
            "qdisc add dev eth0 root handle 1: htb default 10",
            "class add dev eth0 parent 1: classid 1:10 htb rate 10gbit quantum 60000",
            "class add dev eth0 parent 1: classid 1:20 htb rate 20mbit quantum 60000",
            "qdisc add dev eth0 parent 1:20 pfifo limit 10000",
            "filter add dev eth0 parent 1: protocol ip u32 "
            f"match ip dst {slow.v4}/32 flowid 1:20",
        ):
            a.run(["tc", *line.split()])
    except LabError as error:
        pytest.skip(f"this kernel cannot shape traffic by class: {error}")
    ends = start_pair(a, b, 4, [f"{node(3).subnet} via {slow.v4}"])
    flow = PacedFlow(a, b, node(2).v4)
    flood_beside(flow, Flood(a, [node(3).v4]), 2)
    assert_unharmed(flow)
    assert ends[0].drops()["encap", "slow_peer"] > 0
    assert_invariant(ends[0])
