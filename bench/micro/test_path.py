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

SHAPES = {"tcp 44 x 1420": ("tcp", 44, 1420), "udp 44 x 1420": ("udp", 44, 1420)}
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
