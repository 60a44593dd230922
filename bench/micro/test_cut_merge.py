"""Cutting super-packets and merging packets: ns per packet.

The time includes a copy of the input and the creation of one Python object per output packet. The
data path does neither, so compare the times only with other times of this benchmark. Needs only the
compiled core.
"""

import pytest

from bench.micro import packets
from tests import reference
from tests.steps import cut, merge

SHAPES = {"tcp 44 x 1420": ("tcp", 44, 1420), "udp 44 x 1420": ("udp", 44, 1420),
          "udp 64 x 64": ("udp", 64, 64), "tcp 2 x 1420": ("tcp", 2, 1420)}


@pytest.mark.parametrize("shape", SHAPES)
def test_merge(benchmark, ns_each, shape):
    benchmark.group = "merge"
    run = packets.run(*SHAPES[shape])
    frames = benchmark(merge, run)
    assert frames == reference.merge(run)
    assert len(frames) == 1
    ns_each(len(run))


@pytest.mark.parametrize("shape", SHAPES)
def test_cut(benchmark, ns_each, shape):
    benchmark.group = "cut"
    run = packets.run(*SHAPES[shape])
    [frame] = merge(run)
    assert benchmark(cut, frame) == run
    ns_each(len(run))


@pytest.mark.parametrize("shape", ["tcp 44 x 1420"])
def test_packets_apart(benchmark, ns_each, shape):
    """Packets that cannot be merged: every second packet of the flow is missing."""
    benchmark.group = "merge, packets not consecutive"
    run = packets.run(*SHAPES[shape])[::2]
    frames = benchmark(merge, run)
    assert len(frames) == len(run)
    ns_each(len(run))

