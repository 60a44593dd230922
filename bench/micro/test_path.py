"""The whole path of a worker between a stand-in for the TUN and loopback: CPU time a packet.

The thread's own CPU time, the kernel's part on loopback included: waiting does not count, so a
machine with other work to do disturbs it less.
"""

import time

import pytest

from bench.micro import packets
from bench.micro.path import Path
from tests import reference

SHAPES = {"tcp 44 x 1420": ("tcp", 44, 1420), "udp 44 x 1420": ("udp", 44, 1420)}
FRAMES = 4  # a round: their working set is that of a busy tunnel

pytestmark = pytest.mark.benchmark(timer=time.thread_time)


@pytest.fixture
def path():
    with Path() as made:
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
    # merged anew: fewer headers than were sent, all of the payload
    assert all(payload < n < FRAMES * sum(map(len, run)) for n in arrived[1:])
    ns_each(FRAMES * len(run))
