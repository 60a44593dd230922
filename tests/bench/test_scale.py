"""The peers of the scaling benchmark: one tunnel receives the datagrams to all their addresses."""

import os

import pytest

from bench.contenders import find
from bench.load import stream
from bench.metrics import scale
from bench.tables import consecutive

N = 3


@pytest.mark.netns
@pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces need root")
def test_the_datagrams_to_all_peers_arrive(lab):
    path = find("udptun").set_up(lab)
    first = scale._TEST_PREFIX.network_address
    with scale.test_routes(path), scale.peers(path, N) as hops:
        path.set_routes(list(zip(consecutive(str(first), N), hops, strict=True)))
        sent, received = stream(
            path, seconds=0.5, rate=200, spread=N, address=first, listen="0.0.0.0"
        )
    assert sent["sent"] == received["received"] > 0
