"""TCP through a path with loss, duplicates and reordering: all bytes arrive unchanged."""

import json
import sys
from pathlib import Path

import pytest

from tests.netns.netns_traffic import assert_invariant, transfer_tcp
from udptun.lab import Forwarder, node
from udptun.lab.tunnels import NETWORK, NETWORK6, PORT

RELAY = Path(__file__).with_name("relay.py")


@pytest.mark.parametrize("offload", ["auto", "off"])
def test_tcp_over_a_bad_path(lab, offload):
    a, b, middle = lab.host("a"), lab.host("b"), lab.host("middle")
    lab.segment(a, b, middle)
    relay = middle.start(
        [sys.executable, str(RELAY), str(middle.v4), str(PORT), str(a.v4), str(b.v4), "1"]
    )
    relay.wait_for_output("ready")
    ends = []
    for host, here, there in ((a, node(1), node(2)), (b, node(2), node(1))):
        routes = [f"{subnet} via {middle.v4}" for subnet in (there.subnet, there.subnet6)]
        ends.append(Forwarder.start(
            host, addresses=[here.v4, here.v6], networks=[NETWORK, NETWORK6], routes=routes,
            offload=offload,
        ))
    transfer_tcp(a, b, node(2).v4, size=2 << 20)
    transfer_tcp(b, a, node(1).v6, size=2 << 20)
    assert relay.stop() == 0
    did = json.loads(relay.text().splitlines()[-1])
    assert min(did["lost"], did["doubled"], did["delayed"]) > 10, did
    for end in ends:
        assert_invariant(end)
