"""Captures of a worker: what is recorded, and what happens if nobody takes the records."""

import ipaddress
import random

import pytest

from tests import reference
from tests.path.test_worker import ALL, OUTSIDER, PEERS, Rig, frames, probe_like
from tests.reference.capture import IN, OUT, wants
from tests.wire.craft import Flow, addr
from udptun.drops import DECAP, ENCAP
from udptun.model import CaptureFilter

AT_ONCE = 4  # captures at the same time
DIRECTION = {ENCAP: OUT, DECAP: IN}


def taken(capture):
    return list(reference.parse_records(capture.take()))


def send_both_ways(rig, rng, n):
    """Let the worker handle n frames of all kinds, and n datagrams of all kinds."""
    for _ in range(n):
        frame = frames(rng)
        if len(frame) > 10:
            rig.write(frame)
        source, version = rng.choice((2, 2, 3, 1, 9)), rng.choice((4, 6))
        flow = Flow(
            version, ttl=rng.choice((64, 64, 1)),
            src=addr(f"10.244.{source}.5" if version == 4 else f"fd00:{source}::5"),
            dst=addr("10.244.1.7" if version == 4 else "fd00:1::7"), sport=rng.randrange(1, 5),
            extensions=rng.choice(((), ((44, bytes(6)),), ((44, b"\0\x08" + bytes(4)),),
                                   ((0, bytes(6)), (51, bytes(6)))) if version == 6 else ((),)),
        )
        datagram = rng.choice((
            flow.udp(rng.randbytes(rng.choice((0, 9, 500)))), flow.tcp(rng.randbytes(20)),
            rng.randbytes(rng.randrange(60)), probe_like(rng),
        ))
        rig.send(None, datagram, rig.outside[rng.choice((*PEERS, OUTSIDER))])
        rig.work()


def test_each_packet_is_recorded_once_with_the_reason_of_its_drop():
    with Rig(ALL) as rig:
        capture = rig.core.start_capture(CaptureFilter())
        send_both_ways(rig, random.Random(1), 150)
        records = taken(capture)
        rows = rig.core.packets()
        counted = {(reason, DIRECTION[direction]): n
                   for (reason, direction), n in rig.drops().items()}
        rig.check_invariant()
        assert sum(r.generated for r in records) == rig.worker.counters()["icmp_sent"] > 0
    assert counted.keys() >= {("no_route", OUT), ("unknown_peer", IN), ("ttl_exceeded", IN)}
    dropped = {}
    for record in records:
        if record.reason:
            key = record.reason, record.direction
            dropped[key] = dropped.get(key, 0) + record.packets
    assert dropped == counted
    for direction, number in DIRECTION.items():
        once = [r for r in records if r.direction == number]
        assert sum(r.packets for r in once if not r.generated) == (
            rows[direction]["read"] - rows[direction]["consumed"])
        assert [r.time_ns for r in once] == sorted(r.time_ns for r in once)
    assert all(r.length == len(r.data) and not r.lost for r in records)
    assert capture.counts() == (len(records), 0)


def test_a_packet_is_recorded_as_it_is_at_the_tun():
    flow = Flow(src=addr("10.244.1.7"), dst=addr("10.244.2.5"))
    back = Flow(src=addr("10.244.2.5"), dst=addr("10.244.1.7"))
    with Rig(ALL) as rig:
        capture = rig.core.start_capture(CaptureFilter())
        port = rig.outside[PEERS[0]].getsockname()[1]
        rig.write(bytes(10) + flow.udp(b"out"))
        rig.work()
        rig.send(PEERS[0], back.udp(b"in") + b"padding")
        rig.work()
        [written] = rig.from_tun()
        out, into = taken(capture)
    assert (out.data, out.direction, out.packets, out.segment) == (flow.udp(b"out"), OUT, 1, 0)
    assert (into.data, into.direction) == (written, IN)
    for record in (out, into):
        assert (record.address, record.port, record.reason) == (addr(PEERS[0]), port, "")


@pytest.mark.parametrize("kind", ["tcp", "udp"])
@pytest.mark.parametrize("third", [2, 9])
def test_a_super_packet_is_recorded_once(kind, third):
    flow = Flow(src=addr("10.244.1.7"), dst=addr(f"10.244.{third}.5"))
    frame = getattr(flow, f"{kind}_super")(bytes(4500), 1000)
    with Rig(ALL) as rig:
        capture = rig.core.start_capture(CaptureFilter(direction="out"))
        rig.write(frame)
        rig.work()
        [record] = taken(capture)
    assert (record.packets, record.segment, record.length) == (5, 1000, len(frame) - 10)
    assert record.reason == ("no_route" if third == 9 else "")
    checksum = {"tcp": 36, "udp": 26}[kind]  # the super-packet has none: the device makes it
    assert record.data[:checksum] == frame[10 : 10 + checksum]
    assert record.data[checksum + 2 :] == frame[10 + checksum + 2 :]


def some_filter(rng, rig):
    """Return a filter of a few random parts."""
    parts = {
        "direction": lambda: rng.choice(("in", "out")), "dropped": lambda: True,
        "peers": lambda: tuple(
            (ipaddress.ip_address(a), rng.choice((0, 0, rig.outside[a].getsockname()[1], 9)))
            for a in rng.sample((*PEERS, OUTSIDER), 2)),
        "networks": lambda: tuple(map(ipaddress.ip_network, rng.sample(
            ("10.244.2.0/24", "10.244.3.0/25", "fd00:2::/64", "fd00::/16", "0.0.0.0/0"), 2))),
        "hosts": lambda: tuple(map(ipaddress.ip_address, rng.sample(
            ("10.244.1.7", "10.244.2.5", "fd00:1::7", "fd00:2::5"), rng.choice((1, 2))))),
        "ports": lambda: tuple(rng.choices((1, 2, 3, 4, 80), k=rng.choice((1, 1, 2)))),
        "protocols": lambda: rng.choice(((6,), (17,), (1, 58), (44,), (51,))),
    }
    chosen = rng.sample(sorted(parts), rng.choice((1, 1, 2, 3)))
    return CaptureFilter(**{name: parts[name]() for name in chosen})


def test_filters_equal_the_reference():
    matched = 0
    for seed in range(25):
        rng = random.Random(seed)
        with Rig(ALL, rng.choice(("strict", "off"))) as rig:
            everything = rig.core.start_capture(CaptureFilter())
            chosen = [some_filter(rng, rig) for _ in range(AT_ONCE - 1)]
            captures = [rig.core.start_capture(one) for one in chosen]
            send_both_ways(rig, rng, 25)
            records = [record._replace(time_ns=0) for record in taken(everything)]
            for wanted, capture in zip(chosen, captures, strict=True):
                expected = [record for record in records if wants(wanted, record)]
                assert [r._replace(time_ns=0) for r in taken(capture)] == expected, wanted
                matched += len(expected)
    assert matched > 500


def test_records_have_the_format_of_the_reference():
    with Rig(ALL) as rig:
        capture = rig.core.start_capture(CaptureFilter(snaplen=77))
        send_both_ways(rig, random.Random(5), 30)
        block = capture.take()
    records = [*reference.parse_records(block)]
    assert b"".join(map(reference.build_record, records)) == block
    assert max(len(record.data) for record in records) == 77
    assert max(record.length for record in records) > 77


def test_records_that_nobody_takes_are_counted_and_nothing_waits():
    flow = Flow(dst=addr("10.244.2.5"))
    with Rig(ALL) as rig:
        capture = rig.core.start_capture(CaptureFilter())
        small = rig.core.start_capture(CaptureFilter(snaplen=20))
        found = []
        for n in (90, 20, 120):
            for _ in range(n):
                rig.write(flow.tcp_super(bytes(60000), 1400))
                rig.work()
                rig.at(PEERS[0])
            matched, lost = capture.counts()
            found += taken(capture)
            assert matched == len(found) + lost
        rig.write(flow.tcp_super(bytes(60000), 1400))
        rig.work()
        found += taken(capture)
        assert capture.counts() == (231, sum(record.lost for record in found))
        assert len(found) + sum(record.lost for record in found) == 231
        assert len(found) < 231
        assert all(r.data[12:20] == found[0].data[12:20] and len(r.data) == 60040 for r in found)
        assert small.counts() == (231, 0)
        assert rig.core.packets()[ENCAP]["delivered"] == 231 * 43
        rig.check_invariant()


def test_one_of_several_packets_is_recorded():
    with Rig(ALL) as rig:
        capture = rig.core.start_capture(CaptureFilter(sample=10, direction="out"))
        for n in range(35):
            rig.write(bytes(10) + Flow(dst=addr("10.244.2.5"), sport=n + 1).udp(b"x"))
            rig.work()
        ports = [int.from_bytes(record.data[20:22], "big") for record in taken(capture)]
        assert capture.counts() == (35, 0)
    assert ports == [1, 11, 21, 31]


def test_few_captures_run_at_once_and_an_ended_one_makes_room():
    with Rig(ALL) as rig:
        captures = [rig.core.start_capture(CaptureFilter()) for _ in range(AT_ONCE)]
        assert rig.core.start_capture(CaptureFilter()) is None
        captures[2].close()
        rig.core.collect()
        later = rig.core.start_capture(CaptureFilter())
        rig.write(bytes(10) + Flow(dst=addr("10.244.2.5")).udp(b"x"))
        rig.work()
        assert [len(taken(one)) for one in (*captures, later)] == [1, 1, 0, 1, 1]
        del captures, later  # an object that is gone ends its capture
        assert rig.core.start_capture(CaptureFilter()) is not None


def test_a_filter_with_too_many_values_is_refused():
    with Rig(ALL) as rig:
        for _ in range(AT_ONCE + 1):  # a refused one takes no place
            with pytest.raises(ValueError, match="more than 2 ports"):
                rig.core.start_capture(CaptureFilter(ports=(1, 2, 3)))
        assert rig.core.start_capture(CaptureFilter()) is not None
