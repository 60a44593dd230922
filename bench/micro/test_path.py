"""A worker's whole path: CPU ns per packet. A socket pair replaces the TUN, loopback the network.

The result is the CPU time of the thread, including the kernel's work for loopback. CPU time does
not include waiting, so other load on the machine disturbs the result less. Needs only the compiled
core.
"""

import time

import pytest

from bench.micro import packets
from bench.micro.loopback import LoopbackWorker
from tests import reference
from tests.wire.craft import Flow, addr
from udptun.model import CaptureFilter

SHAPES = {"tcp 44 x 1420": ("tcp", 44, 1420), "udp 44 x 1420": ("udp", 44, 1420)}
# what is recorded while a capture is on
CAPTURES = {
    "no capture": None, "no packet matches": CaptureFilter(ports=(1,)),
    "96 bytes each": CaptureFilter(snaplen=96), "whole packets": CaptureFilter(),
}
SINGLE = 200  # packets per round
MANY = 1000  # packets per round, to many peers
SCATTER = 2654435761  # a prime
FRAMES = 4  # frames per round; their data is the working set of a busy tunnel

pytestmark = pytest.mark.benchmark(timer=time.thread_time)


@pytest.fixture
def path():
    with LoopbackWorker() as made:
        yield made


@pytest.mark.parametrize("shape", SHAPES)
def test_out(benchmark, ns_each, path, shape):
    benchmark.group = "TUN to UDP"
    run = packets.run(*SHAPES[shape])
    [frame] = reference.merge(run)
    arrived = []

    def offer():
        arrived.append(path.received(path.peer))
        for _ in range(FRAMES):
            path.send_frame(frame)

    benchmark.pedantic(path.work, setup=offer, rounds=200, warmup_rounds=5)
    assert set(arrived[1:]) == {FRAMES * sum(map(len, run))}
    ns_each(FRAMES * len(run))


@pytest.mark.parametrize("shape", SHAPES)
def test_in(benchmark, ns_each, path, shape):
    benchmark.group = "UDP to TUN"
    run = packets.run(*SHAPES[shape])
    payload = FRAMES * SHAPES[shape][1] * SHAPES[shape][2]
    arrived = []

    def offer():
        arrived.append(path.received(path.tun))
        for _ in range(FRAMES):
            path.send_run(run)

    benchmark.pedantic(path.work, setup=offer, rounds=200, warmup_rounds=5)
    # The worker merges the packets again: all of the payload arrives, but fewer headers arrive.
    assert all(payload < n < FRAMES * sum(map(len, run)) for n in arrived[1:])
    ns_each(FRAMES * len(run))


@pytest.mark.parametrize("peers", [1, 100])
def test_out_to_many_peers(benchmark, ns_each, peers):
    """Small packets, one to each peer in turn, in a scattered order."""
    benchmark.group = "TUN to UDP, udp 1000 x 64, to many peers"
    with LoopbackWorker(peers) as path:
        each = [bytes(10) + Flow(dst=addr(f"10.64.{k}.5")).udp(bytes(64)) for k in range(peers)]
        frames = [each[i * SCATTER % peers] for i in range(MANY)]
        arrived = []

        def offer():
            arrived.append(path.received(path.peer))
            for frame in frames:
                path.send_frame(frame)

        benchmark.pedantic(path.work, setup=offer, rounds=100, warmup_rounds=5)
    assert set(arrived[1:]) == {MANY * (len(each[0]) - 10)}
    ns_each(MANY)


@pytest.fixture
def capture(path, request):
    wanted = CAPTURES[request.param]
    return None if wanted is None else path.core.start_capture(wanted)


@pytest.mark.parametrize("capture", CAPTURES, indirect=True)
@pytest.mark.parametrize("shape", ["tcp 44 x 1420", "udp 200 x 64"])
def test_out_while_capturing(benchmark, ns_each, path, shape, capture):
    """Super-packets, or single small packets. The records are taken between the rounds."""
    benchmark.group = f"TUN to UDP, {shape}, capturing"
    if shape.startswith("tcp"):
        [frame] = reference.merge(packets.run("tcp", 44, 1420))
        frames, each = [frame] * FRAMES, FRAMES * 44
    else:
        frames, each = [bytes(10) + one for one in packets.run("udp", SINGLE, 64)], SINGLE

    def offer():
        path.received(path.peer)
        if capture is not None:
            capture.take()
        for frame in frames:
            path.send_frame(frame)

    benchmark.pedantic(path.work, setup=offer, rounds=200, warmup_rounds=5)
    assert capture is None or capture.counts()[1] == 0  # none was lost
    ns_each(each)


@pytest.mark.parametrize("capture", CAPTURES, indirect=True)
def test_in_while_capturing(benchmark, ns_each, path, capture):
    benchmark.group = "UDP to TUN, tcp 44 x 1420, capturing"
    run = packets.run("tcp", 44, 1420)

    def offer():
        path.received(path.tun)
        if capture is not None:
            capture.take()
        for _ in range(FRAMES):
            path.send_run(run)

    benchmark.pedantic(path.work, setup=offer, rounds=200, warmup_rounds=5)
    assert capture is None or capture.counts()[1] == 0
    ns_each(FRAMES * len(run))
