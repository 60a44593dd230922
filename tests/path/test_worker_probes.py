"""Probes in a worker: requests and replies, alone and in runs, and the requests that a core sends.

The worker is between a socket pair and loopback, as in test_worker.py, which also compares single
probes with the reference forwarder.
"""

import errno
import os
import random
import socket
import struct
import time

import pytest

from tests import reference
from tests.path.test_worker import ALL, LOCAL, OUTSIDER, PEERS, UDP_SEGMENT, Rig, probe_row
from tests.reference import Probe, build_probe
from tests.wire.craft import Flow, addr
from udptun import _core
from udptun.drops import DECAP, ENCAP
from udptun.model import NEVER_HEARD, PROBE_REPLY, PROBE_REQUEST, Route

RING = 512  # src_ext/path/worker.pxd, PROBE_RING
REQUESTS_MAX = 8  # src_ext/path/probe.pxd, in 0.1 s


def request(token=1, size=24):
    return build_probe(Probe(PROBE_REQUEST, token, NEVER_HEARD, size))


def reply(token=1, size=24, heard_ms=0):
    return build_probe(Probe(PROBE_REPLY, token, heard_ms, size))


def answered(rig, *tokens):
    """Send requests with these tokens, and the replies to them."""
    address, port = rig.outside[PEERS[0]].getsockname()
    for token in tokens:
        assert rig.core.send_probe(socket.inet_aton(address), port, token, 24, 0) == 0
        rig.send(PEERS[0], reply(token))
        rig.work()


def peer_row(rig, address=PEERS[0]):
    packed = socket.inet_aton(address)
    (row,) = [peer for peer in rig.core.peers() if peer.address == packed]
    return row


@pytest.mark.parametrize("features", [ALL, [f for f in ALL if f != "udp-gro"], ["batch"]])
@pytest.mark.parametrize("where", ["first", "middle", "last", "all"])
def test_probes_inside_a_run_of_datagrams(features, where):
    """UDP_SEGMENT sends a run, and UDP_GRO may join it again: each probe in it is found."""
    size = 500
    flow = Flow(src=addr("10.244.2.5"), dst=addr("10.244.1.9"))
    packets = [flow.udp(bytes([i]) * (size - 28), ident=i) for i in range(8)]
    probes = [request(token, size) for token in range(8)]
    parts = {
        "first": [probes[0], *packets], "last": [*packets, probes[0]],
        "middle": [*packets[:3], *probes[:2], *packets[3:5], probes[2], *packets[5:]],
        "all": probes,
    }[where]
    sent_probes = [part for part in parts if part in probes]
    sent_packets = [part for part in parts if part in packets]
    with Rig(features) as rig:
        rig.outside[PEERS[0]].setsockopt(socket.IPPROTO_UDP, UDP_SEGMENT, size)
        rig.send(PEERS[0], b"".join(parts))
        rig.work()
        assert rig.from_tun() == [reference.decrement_hop_limit(p) for p in sent_packets]
        assert rig.at(PEERS[0]) == [reply(token, size) for token in range(len(sent_probes))]
        assert rig.counts()[DECAP] == {
            "read": len(parts), "generated": 0, "delivered": len(sent_packets),
            "consumed": len(sent_probes),
        }
        row = peer_row(rig)
        assert (row.decap_packets, row.decap_bytes) == (
            len(sent_packets), sum(map(len, sent_packets))
        )
        rig.check_invariant()


def test_a_reply_has_the_requests_size_and_not_its_padding():
    with Rig() as rig:
        message = bytearray(request(9, 1400))
        message[24:] = os.urandom(1376)
        rig.send(PEERS[0], bytes(message))
        rig.work()
        assert rig.at(PEERS[0]) == [reply(9, 1400)]


@pytest.mark.parametrize("source_check", ["strict", "peer", "off"])
@pytest.mark.parametrize("sender, reason", [(OUTSIDER, "unknown_peer"), (PEERS[1], "bad_version")])
def test_an_unknown_sender_and_a_peer_without_probe_get_no_answer(
    sender, reason, source_check
):
    with Rig(source_check=source_check) as rig:
        rig.send(sender, request())
        rig.send(sender, reply())
        rig.work()
        assert rig.at(sender) == []
        assert rig.core.take_probes() == []
        assert rig.drops() == {(reason, DECAP): 2}
        rig.check_invariant()


def test_the_route_decides_whether_its_peer_is_probed():
    with Rig() as rig:
        port = rig.outside[PEERS[0]].getsockname()[1]
        plain, probed = "10.244.2.0/24", f"10.244.4.0/24 via {PEERS[0]} port {port} probe"
        for routes, is_probed in (
            (f"{plain} via {PEERS[0]} port {port}", False),
            (f"{plain} via {PEERS[0]} port {port}\n{probed}", True),
            (f"{plain} via {PEERS[0]} port {port}", False),
            (f"{plain} via {PEERS[0]} port {port} probe", True),
        ):
            rig.core.publish(_core.RouteTable.parse_text(routes.encode()))
            assert [peer.probe for peer in rig.core.peers()] == [is_probed]
            rig.send(PEERS[0], request())
            rig.work()
            assert rig.at(PEERS[0]) == ([reply()] if is_probed else [])
        rig.check_invariant()


def test_a_worker_wakes_the_control_side_for_each_probe_only_if_asked_to():
    with Rig() as rig:
        for wake in (False, True, False):
            rig.core.wake_on_probe(wake)
            rig.send(PEERS[0], request(1, 24))
            rig.work()
            assert ("probe" in rig.worker.take_events()) == wake
            assert len(rig.core.take_probes()) == 1
        answered(rig, *range(1, RING // 4 + 1))
        assert "probe" in rig.worker.take_events()  # before the space is used up


def test_a_request_of_the_core_is_answered_by_another_core():
    with Rig() as rig:
        rig.core.wake_on_probe(True)
        sent_ns = time.monotonic_ns()
        port = rig.outside[PEERS[0]].getsockname()[1]
        packed = socket.inet_aton(PEERS[0])
        for token, size in ((1, 24), (2**64 - 1, 1472)):
            assert rig.core.send_probe(packed, port, token, size, 77) == 0
            message, sender = rig.outside[PEERS[0]].recvfrom(1 << 16)
            assert sender == rig.udp.getsockname()
            assert message == build_probe(Probe(PROBE_REQUEST, token, 77, size))
            rig.send(PEERS[0], reply(token, size, 5))
            rig.work()
            assert "probe" in rig.worker.take_events()
            (record,) = rig.core.take_probes()
            assert probe_row(record) == (PEERS[0], PROBE_REPLY, token, 5, size)
            assert record.port == port
            assert sent_ns < record.received_ns <= time.monotonic_ns()
        assert rig.counts() == {
            ENCAP: {"read": 0, "generated": 2, "delivered": 2, "consumed": 0},
            DECAP: {"read": 2, "generated": 0, "delivered": 0, "consumed": 2},
        }
        assert peer_row(rig).encap_packets == 0
        rig.check_invariant()


def test_a_request_that_the_kernel_refuses_is_counted():
    with Rig() as rig:
        packed = socket.inet_aton(PEERS[0])
        assert rig.core.send_probe(packed, 0, 1, 24, 0) == errno.EINVAL  # udp(7): no port 0
        assert rig.core.send_probe(packed, 9, 1, 65507, 0) in (0, errno.EMSGSIZE)
        assert rig.core.send_probe(bytes(15) + b"\1", 9, 1, 24, 0) == errno.EAFNOSUPPORT
        assert rig.drops()["send_error", ENCAP] == 1
        rig.check_invariant()
        for address, size in ((b"12345", 24), (packed, 23), (packed, 65508)):
            with pytest.raises(ValueError, match="bytes"):
                rig.core.send_probe(address, 9, 1, size, 0)


def test_probes_that_are_not_taken_are_counted_as_lost():
    extra = 10
    with Rig() as rig:
        answered(rig, *range(1, RING + extra + 1))
        assert [record.token for record in rig.core.take_probes()] == list(range(1, RING + 1))
        assert rig.worker.counters()["probes_lost"] == extra
        assert rig.counts()[DECAP]["consumed"] == RING + extra
        answered(rig, 7)
        assert [record.token for record in rig.core.take_probes()] == [7]
        rig.check_invariant()


def test_a_reply_is_recorded_only_if_it_answers_a_request_and_only_once():
    with Rig() as rig:
        for token in range(RING + 10):  # forged: 0 is no token of a request
            rig.send(PEERS[0], reply(token))
            rig.work()
        answered(rig, 1, 2**64 - 1)
        rig.send(PEERS[0], reply(1))
        rig.work()
        assert [record.token for record in rig.core.take_probes()] == [1, 2**64 - 1]
        assert rig.worker.counters()["probes_lost"] == RING + 11
        rig.check_invariant()


def test_the_latest_requests_can_be_answered():
    n = 1024  # in two seconds and more at the highest rate of udptun/probe/prober.py
    rng = random.Random(5)
    tokens = [rng.getrandbits(64) for _ in range(n)]
    with Rig() as rig:
        address, port = rig.outside[PEERS[0]].getsockname()
        for token in tokens:
            rig.core.send_probe(socket.inet_aton(address), port, token, 24, 0)
        found = []
        for token in tokens:
            rig.send(PEERS[0], reply(token))
            rig.work()
            found += [record.token for record in rig.core.take_probes()]
        assert found == tokens


def test_the_requests_of_one_peer_get_few_records_but_all_get_an_answer():
    n = 10 * REQUESTS_MAX
    with Rig() as rig:
        began = time.monotonic()
        for token in range(n):
            rig.send(PEERS[0], request(token))
            rig.work()
        windows = int((time.monotonic() - began) / 0.1) + 1
        recorded = len(rig.core.take_probes())
        assert REQUESTS_MAX <= recorded <= min(n, REQUESTS_MAX * windows)
        assert rig.worker.counters()["probes_lost"] == n - recorded
        assert rig.at(PEERS[0]) == [reply(token) for token in range(n)]
        rig.check_invariant()


def test_requests_of_many_peers_leave_half_of_the_space_to_replies():
    senders = [f"127.0.1.{n}" for n in range(1, 41)]
    with Rig() as rig:
        routes = [Route.make(f"10.245.{n}.0/24", a, 9, None, True, "any")
                  for n, a in enumerate(senders)]
        rig.core.publish(_core.RouteTable.parse_text(
            "\n".join(map(str, [*rig.routes, *routes])).encode()))
        for address in senders:
            rig.outside[address] = rig.bound(address)
            for token in range(REQUESTS_MAX):
                rig.send(address, request(token))
            rig.work()
        answered(rig, *range(1, RING // 2 + 1))
        kinds = [record.kind for record in rig.core.take_probes()]
        assert kinds == [PROBE_REQUEST] * (RING // 2) + [PROBE_REPLY] * (RING // 2)
        rig.check_invariant()


@pytest.mark.parametrize(
    "source_check, reason", [("strict", "source_port"), ("peer", "unknown_peer")])
def test_a_probe_from_port_0_is_dropped(source_check, reason):
    try:
        raw = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_UDP)
    except PermissionError:
        pytest.skip("a raw socket needs CAP_NET_RAW")
    with raw, Rig(source_check=source_check) as rig:
        raw.bind((PEERS[0], 0))
        for message in (request(), reply()):
            header = struct.pack("!4H", 0, rig.udp.getsockname()[1], 8 + len(message), 0)
            raw.sendto(header + message, (LOCAL, 0))
        rig.work()
        assert rig.drops() == {(reason, DECAP): 2}
        assert rig.core.take_probes() == []
        assert peer_row(rig).last_error is None
        rig.check_invariant()


def test_only_accepted_datagrams_update_last_seen():
    inner = {"src": addr("10.244.2.5"), "dst": addr("10.244.1.9")}
    accepted = [Flow(**inner).udp(b"x"), request(), reply(), b""]
    refused = [
        b"\x45", b"utp1", request()[:-1], bytes(40),
        Flow(src=addr("10.244.3.5"), dst=addr("10.244.1.9")).udp(b"x"),  # the other peer's source
    ]
    for datagrams, alive in ((refused, False), (accepted, True)):
        for datagram in datagrams:
            with Rig() as rig:
                rig.send(PEERS[0], datagram)
                rig.work()
                row = peer_row(rig)
                assert (row.last_rx_ns != 0, row.last_seen is not None) == (alive, alive), datagram


def test_hostile_probes_keep_the_invariant():
    rng = random.Random(3)
    with Rig() as rig:
        for _ in range(100):
            for _ in range(10):
                message = bytearray(request(rng.getrandbits(64), rng.randrange(24, 1500)))
                for _ in range(rng.randrange(4)):
                    message[rng.randrange(24)] = rng.randrange(256)
                del message[rng.choice((len(message), rng.randrange(len(message)))):]
                rig.send(rng.choice((PEERS[0], PEERS[1], OUTSIDER)), bytes(message))
            rig.work()
            rig.check_invariant()
            rig.core.take_probes()
            for address in rig.outside:
                assert all(answer[4] == PROBE_REPLY for answer in rig.at(address))
