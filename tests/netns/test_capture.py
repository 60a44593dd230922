"""Captures of running forwarders, read by tcpdump, and by tshark if it is installed."""

import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.netns.netns_traffic import assert_invariant, transfer_tcp
from tests.netns.test_takeover import take_over
from udptun.cli.captured import Counts, records
from udptun.control.client import ControlClient
from udptun.lab import Lab, Pair, node, pair, ping, wait_for

AT_ONCE = 4
WIRESHARK = pytest.mark.skipif(
    not (shutil.which("tshark") and shutil.which("capinfos")), reason="tshark is not installed")


@pytest.fixture(scope="module")
def tunnel() -> Iterator[Pair]:
    with Lab() as lab:
        yield pair(lab)


def udptun_capture(side, *words, **options):
    """Start ``udptun capture``. The control socket is a file, so the namespace does not matter."""
    argv = [sys.executable, "-m", "udptun", "capture", "--socket", str(side.forwarder.control)]
    return subprocess.Popen([*argv, *map(str, words)], stderr=subprocess.PIPE, text=True, **options)


def end(process, number=signal.SIGINT):
    """End a capture. Return its exit code and messages."""
    process.send_signal(number)
    _, messages = process.communicate(timeout=60)
    return process.returncode, messages


def wait_until_begun(path: Path, process) -> None:
    """The file gets its first block when the forwarder has turned the capture on."""
    wait_for(lambda: process.poll() is not None or (path.exists() and path.stat().st_size),
             "the begin of the capture")
    assert process.poll() is None, process.stderr.read()


@contextmanager
def captured(side, path: Path, *words):
    process = udptun_capture(side, "-w", path, *words)
    try:
        wait_until_begun(path, process)
        yield process
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


def lines_of(path: Path) -> list[str]:
    done = subprocess.run(["tcpdump", "-nr", str(path)], capture_output=True, text=True,
                          check=False)
    return done.stdout.splitlines()


def fields_of(path: Path, *names: str) -> list[list[str]]:
    arguments = [word for name in names for word in ("-e", name)]
    done = subprocess.run(["tshark", "-r", str(path), "-T", "fields", *arguments],
                          capture_output=True, text=True, check=True)
    return [line.split("\t") for line in done.stdout.splitlines()]


def send(side, target, port, payloads, ttl=64):
    with side.host.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.setsockopt(socket.IPPROTO_IP, socket.IP_TTL, ttl)
        for payload in payloads:
            sock.sendto(payload, (str(target), port))


def test_tcpdump_reads_what_was_sent_in_order(tunnel):
    a, b = tunnel.sides
    sizes = list(range(1, 1401, 100))
    paths = {side: tunnel.lab.folder / f"order-{side.host.name}.pcapng" for side in tunnel.sides}
    n = len(sizes)
    with captured(a, paths[a], "--port", 4001, "--direction", "out", "--count", n) as out, \
            captured(b, paths[b], "--port", 4001, "--host", a.v4, "--count", n) as into:
        send(a, b.v4, 4002, [b"another port"])
        send(a, b.v4, 4001, [bytes(size) for size in sizes])
        for process in (out, into):
            _, messages = process.communicate(timeout=60)
            assert (process.returncode, messages) == (0, f"{n} packets captured\n")
    for path in paths.values():
        lines = lines_of(path)
        assert all(f"IP {a.v4}." in line and f"> {b.v4}.4001: UDP" in line for line in lines)
        assert [int(line.split()[-1]) for line in lines] == sizes


@WIRESHARK
def test_wireshark_reads_sizes_times_directions_and_comments(tunnel):
    a, b = tunnel.sides
    path = tunnel.lab.folder / "ping.pcapng"
    before = time.time()
    with captured(a, path, "--protocol", "icmp", "--count", 8) as process:
        assert ping(a.host, b.v4, count=2, size=1000).received == 2
        assert ping(a.host, b.v6, count=2).received == 2
        assert process.wait(60) == 0
    rows = fields_of(path, "frame.len", "frame.packet_flags_direction", "frame.comment",
                     "frame.time_epoch")
    assert [row[0] for row in rows] == ["1028"] * 4 + ["104"] * 4
    assert [row[1] for row in rows] == ["0x00000002", "0x00000001"] * 4
    assert {row[2] for row in rows} == {f"peer {b.outer}:8285"}
    times = [float(row[3]) for row in rows]
    assert before - 1 < times[0] <= times[-1] < time.time() + 1
    done = subprocess.run(["capinfos", str(path)], capture_output=True, text=True, check=True)
    for text in ("Raw IP", "nanoseconds", "Strict time order:   True", "udptun0",
                 "Number of packets:   8"):
        assert text in done.stdout


@WIRESHARK
def test_a_super_packet_says_how_many_packets_it_is(tunnel):
    a, b = tunnel.sides
    path = tunnel.lab.folder / "super.pcapng"
    with captured(a, path, "--protocol", "tcp", "--direction", "out") as process:
        transfer_tcp(a.host, b.host, b.v4, size=1 << 20)
        wait_for(lambda: any(" Flags [F" in line for line in lines_of(path)), "the last packet")
        assert end(process)[0] == 0
    supers = [(int(length), comment) for length, comment in fields_of(
        path, "frame.len", "frame.comment") if "super-packet" in comment]
    assert supers
    for length, comment in supers:
        words = comment.split("super-packet of ")[1].split()
        packets, size = int(words[0]), int(words[2])
        assert (length - 52 + size - 1) // size == packets


def test_each_drop_has_its_reason(tunnel):
    a, b = tunnel.sides
    path = tunnel.lab.folder / "drops.pcapng"
    expected = {"no_route", "ttl_exceeded", "too_big", "source_port", "bad_version",
                "short_packet", "bad_header_len"}
    a.forwarder.udptun("route", "add", "10.244.88.0/24", "via", str(b.outer), "mtu", "600")
    packet = bytes.fromhex("4500001c0000400040110000") + node(99).v4.packed + a.v4.packed + bytes(8)
    with captured(a, path, "--dropped") as process:
        send(a, node(77).v4, 9, [b"no route"])
        send(a, b.v4, 9, [b"ttl"], ttl=1)
        with a.host.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.setsockopt(socket.IPPROTO_IP, 10, 2)  # IP_MTU_DISCOVER, DO
            sock.sendto(bytes(1000), ("10.244.88.1", 9))
        for payload in (packet, b"\x20 no IP packet", b"E", bytes((0x41,)) + packet[1:]):
            with b.host.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
                sock.sendto(payload, (str(a.outer), 8285))
        wait_for(lambda: all(f"dropped: {reason}".encode() in path.read_bytes()
                             for reason in expected), "all reasons")
        assert end(process)[0] == 0
    assert len(lines_of(path)) >= len(expected)
    assert_invariant(a.forwarder)
    a.forwarder.udptun("route", "del", "10.244.88.0/24")
    if shutil.which("tshark"):
        counted = Counter(row[0].split(";")[0] for row in fields_of(path, "frame.comment"))
        assert counted.keys() >= {f"dropped: {reason}" for reason in expected}


def test_a_killed_reader_leaves_nothing_on(tunnel):
    a = tunnel.a
    paths = [tunnel.lab.folder / f"killed-{i}.pcapng" for i in range(AT_ONCE)]
    processes = [udptun_capture(a, "-w", path) for path in paths]
    for path, process in zip(paths, processes, strict=True):
        wait_until_begun(path, process)
    refused = udptun_capture(a, "--text", "--seconds", 1)
    assert "too many captures run already" in refused.communicate(timeout=60)[1]
    assert refused.returncode == 1
    for process in processes:
        process.kill()
        process.communicate()

    def all_are_free() -> bool:
        again = [udptun_capture(a, "--text", "--seconds", 1) for _ in range(AT_ONCE)]
        return all("captured" in one.communicate(timeout=60)[1] for one in again)

    wait_for(all_are_free, "the end of the captures")


def test_a_reader_that_stops_reading_holds_nothing_up(tunnel):
    a, b = tunnel.sides
    with ControlClient(str(a.forwarder.control)) as client, client.capture({}) as (head, pieces):
        for n in range(3):
            with captured(a, tunnel.lab.folder / f"beside-{n}.pcapng", "--dropped"):
                transfer_tcp(a.host, b.host, b.v4, size=8 << 20)
        for side in tunnel.sides:
            assert_invariant(side.forwarder)
        batches = records(head, pieces)
        counts = next(one for batch in batches for one in batch if isinstance(one, Counts))
        assert counts.lost > 0


def test_a_take_over_ends_a_capture_with_a_message(tunnel):
    a, b = tunnel.sides
    path = tunnel.lab.folder / "take-over.pcapng"
    with captured(a, path) as process:
        assert ping(a.host, b.v4, count=3).received == 3
        take_over(a)
        _, messages = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "the capture has ended: the forwarder stops, or another one takes over" in messages
    assert sum("echo request" in line for line in lines_of(path)) == 3
    after = tunnel.lab.folder / "after.pcapng"
    with captured(a, after, "--count", 2) as process:
        assert ping(a.host, b.v4, count=1).received == 1
        assert process.wait(60) == 0
    assert len(lines_of(after)) == 2
