"""Three workers in threads while the control side changes the table and reads everything.

`make sanitize` runs this test under ThreadSanitizer, which also reports a race without an effect.
"""

import contextlib
import ipaddress
import itertools
import os
import socket
import threading
import time

from tests import reference
from tests.own_netns import in_own_netns
from tests.path.test_worker import ALL, TUN4, TUN6
from tests.wire.craft import Flow, addr
from udptun import _core
from udptun.model import CaptureFilter, Route

WORKERS = 3
CHANGES = 300
DEADLINE_SECONDS = 60
IP_RECVERR = 11
CAPTURES = (
    CaptureFilter(), CaptureFilter(dropped=True), CaptureFilter(protocols=(6,), snaplen=100),
    CaptureFilter(ports=(80,), sample=7),
)
PEER, OTHER, OUTSIDER = "127.0.0.2", "127.0.0.3", "127.0.0.9"


class Threads:
    """Three workers, each with a socket pair as its TUN and a socket on loopback."""

    def __init__(self):
        self.notify = os.eventfd(0, os.EFD_NONBLOCK)
        packed = [TUN4.packed, TUN6.packed, addr("127.0.0.1")]
        self.core = _core.Core("strict", WORKERS, (1500, 0), packed, self.notify)
        self.pairs = [socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
                      for _ in range(WORKERS)]
        self.udp = [socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(WORKERS)]
        self.outside = {a: socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
                        for a in (PEER, OUTSIDER)}
        for sock in self.udp:
            sock.bind(("127.0.0.1", 0))
            sock.setsockopt(socket.IPPROTO_IP, IP_RECVERR, 1)
        for address, sock in self.outside.items():
            sock.bind((address, 0))
        self.closing = contextlib.ExitStack()
        self.closing.callback(os.close, self.notify)
        for sock in (*self.udp, *self.outside.values(), *itertools.chain(*self.pairs)):
            self.closing.enter_context(sock)
            sock.setblocking(False)
        self.port = self.outside[PEER].getsockname()[1]
        self.publish(0)
        self.workers = [
            _core.Worker(self.core, pair[1].fileno(), udp.fileno(), -1, ALL)
            for pair, udp in zip(self.pairs, self.udp, strict=True)
        ]
        self.stopping = False
        self.captures, self.captured = [None], 0

    def publish(self, i):
        """Activate one of several tables. All have the peer that exists. The peers at the address
        where nothing listens differ, so their links change."""
        ports = [1 + (i * 7 + k) % 40 for k in range(i % 12)]
        routes = [
            Route.make("10.244.2.0/24", PEER, self.port, 1000 + i % 200, i % 2 == 0),
            Route.make("127.0.0.0/8", PEER, self.port),  # recursion
            Route.make("10.244.3.0/24", OTHER, 9),
            *(Route.make(f"10.244.{100 + port}.0/24", OTHER, port) for port in sorted(set(ports))),
        ]
        text = "\n".join(map(str, routes)).encode()
        self.core.publish(_core.RouteTable.parse_text(text))

    def work(self, worker):
        while not self.stopping:
            worker.run(1)

    def load(self, i):
        """Write frames to one TUN and send datagrams to its socket until the workers stop."""
        tun, to = self.pairs[i][0], self.udp[i].getsockname()
        out = [
            bytes(10) + Flow(dst=addr("10.244.2.5")).udp(bytes(100)),
            bytes(10) + Flow(dst=addr("10.244.3.5")).udp(bytes(100)),  # ECONNREFUSED comes back
            Flow(dst=addr("10.244.2.6")).tcp_super(bytes(9000), 900),
            bytes(10) + Flow(src=addr("127.0.0.1"), dst=addr(OTHER), dport=9).udp(bytes(20)),
            bytes(10) + Flow(dst=addr("10.244.9.9")).udp(bytes(20)),
        ]
        inside = Flow(src=addr("10.244.2.5"), dst=addr("10.244.1.7")).udp(bytes(100))
        probe = reference.build_probe(reference.Probe(1, i + 1, 0, 60))
        turn = 0
        while not self.stopping:
            turn += 1
            try:
                tun.send(out[turn % len(out)])
                self.outside[PEER].sendto((inside, probe)[turn % 2], to)
                self.outside[OUTSIDER].sendto(inside, to)
                while True:
                    tun.recv(1 << 16)
            except BlockingIOError:
                if turn % 64 == 0:
                    time.sleep(0.001)  # let the workers run on one core

    def capture(self, i):
        """Start, read and end captures: some end before the workers have seen that they began."""
        if i % 3 == 0 and len(self.captures) < 5:
            self.captures.append(self.core.start_capture(CAPTURES[i % len(CAPTURES)]))
        for one in filter(None, self.captures):
            self.captured += len(one.take())
            matched, lost = one.counts()
            assert matched >= lost
        if i % 2 and self.captures and (one := self.captures.pop(0)) is not None:
            one.close()

    def read_all(self):
        core = self.core
        for read in (core.packets, core.drops, core.peer_errors, core.take_traffic, core.collect,
                     core.path_mtu_changes, core.take_mtu_hints, core.needs_icmp6):
            read()
        core.set_path_mtu(addr(PEER), self.port, 1400, 1200)
        for worker in self.workers:
            for read in (worker.counters, worker.take_events, worker.in_use):
                read()
        core.last_dropped()
        return core.take_probes(), core.refused_senders(), [p for p in core.peers() if p.errors_n]


def exercise(rig):
    threads = [threading.Thread(target=rig.work, args=(w,)) for w in rig.workers]
    threads += [threading.Thread(target=rig.load, args=(i,)) for i in range(WORKERS)]
    for thread in threads:
        thread.start()
    seen = {"probes": False, "refused senders": False, "errors": False}
    end = time.monotonic() + DEADLINE_SECONDS
    changes = 0
    try:
        while changes < CHANGES or not all(seen.values()):
            assert time.monotonic() < end, (changes, seen, rig.core.packets())
            rig.publish(changes)
            rig.capture(changes)
            changes += 1
            for name, found in zip(seen, rig.read_all(), strict=True):
                seen[name] |= bool(found)
    finally:
        rig.stopping = True
        for worker in rig.workers:
            worker.wake()
        for thread in threads:
            thread.join()
    for worker in rig.workers:
        worker.resume()
        worker.drain(1)
    for direction, row in rig.core.packets().items():
        assert row["delivered"] > 0, direction
        assert row["read"] + row["generated"] == (
            row["delivered"] + row["consumed"] + row["dropped"] + row["queued"]
        ), direction
    assert rig.captured > 0
    drops = {reason for reason, _, n in rig.core.drops() if n}
    assert {"recursion", "unknown_peer", "no_route"} <= drops
    assert {ipaddress.ip_address(s.address) for s in rig.core.refused_senders()} == {
        ipaddress.ip_address(OUTSIDER)
    }


@in_own_netns
def test_three_workers_while_the_table_changes():
    rig = Threads()
    with rig.closing:
        exercise(rig)
