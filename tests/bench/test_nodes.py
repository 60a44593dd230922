"""``bench nodes``: its leases are valid, and one small run gives plausible figures."""

import ipaddress
import json

import pytest

from bench import nodes, responder
from udptun.control.protocol import NODE
from udptun.lab import Lab, wait_for
from udptun.lab.cluster import etcd_obstacle
from udptun.lab.tunnels import control_request
from udptun.leases.etcd.schema import read_key, read_value


@pytest.mark.parametrize("backend", nodes.BACKENDS)
def test_leases_are_valid_and_differ(backend):
    seen = set()
    for n in (0, 1, 255, 256, 65_535, nodes.MAX_NODES - 1):
        for moved in (0, 1):
            key, value = nodes.lease(n, backend, moved)
            assert read_key(key.rpartition("/")[2]).v4 == nodes.subnet(n)
            attributes = read_value(value.encode())
            assert attributes.public_ip in nodes.UNDERLAY
            seen.add((key, attributes.public_ip))
    assert len(seen) == 12
    assert len({address for _, address in seen}) == 12


def test_subnets_are_in_the_network():
    last = nodes.subnet(nodes.MAX_NODES)
    assert last.subnet_of(nodes.NETWORK)
    assert isinstance(last, ipaddress.IPv4Network)


def states(simulation):
    """Return the states of all paths to each peer; the responder answers on each."""
    status, answer = control_request(simulation._node.control.with_name("node.sock"), "GET", NODE)
    assert status == 200
    return [state for peer in answer["peers"]
            for state in {path["state"] for path in peer["paths"].values()}]


def test_the_responder_answers_only_requests():
    request = b"utp1\x01\x02\0\0" + bytes(range(16))
    reply = b"utp1\x02\x02\0\0" + bytes(range(8)) + bytes(4) + bytes(range(12, 16))
    assert responder.answer(request) == reply
    assert responder.answer(reply) is None
    assert responder.answer(b"") is None
    inside = b"".join((bytes(8), b"target", b"source", b"\x08\0", bytes(12), b"addr", b"ADDR",
                       b"\0\1", b"\0\2", b"\0\0", b"\xff\xff"))
    swapped = b"".join((bytes(8), b"source", b"target", b"\x08\0", bytes(12), b"ADDR", b"addr",
                        b"\0\2", b"\0\1", b"\0\0", b"\0\0"))
    assert responder.answer(inside + request, len(inside)) == swapped + reply


@pytest.mark.slow
@pytest.mark.netns
@pytest.mark.skipif(etcd_obstacle() is not None, reason=str(etcd_obstacle()))
@pytest.mark.parametrize("backend", nodes.BACKENDS)
def test_a_small_run(backend, tmp_path):
    said = []
    with Lab() as lab:
        simulation = nodes.Simulation(lab, 20, backend, said.append)
        cost = simulation.measure(5, 1.0, 5.0)
        wait_for(lambda: states(simulation) == ["reachable"] * 20, "all peers to answer")
    assert cost.nodes == 20
    assert min(cost.start_s, cost.daemon_bytes, cost.change_p50_s, cost.start_store_bytes) > 0
    assert said
    assert "| nodes | 20 |" in nodes.table([cost])
    json.dumps(nodes.asdict(cost))
