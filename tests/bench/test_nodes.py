"""``bench nodes``: its leases are valid, and one small run gives plausible figures."""

import ipaddress
import json

import pytest

from bench import nodes
from udptun.lab import Lab
from udptun.lab.cluster import etcd_obstacle
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


@pytest.mark.slow
@pytest.mark.netns
@pytest.mark.skipif(etcd_obstacle() is not None, reason=str(etcd_obstacle()))
@pytest.mark.parametrize("backend", nodes.BACKENDS)
def test_a_small_run(backend, tmp_path):
    said = []
    with Lab() as lab:
        cost = nodes.Simulation(lab, 20, backend, said.append).measure(5, 1.0, 5.0)
    assert cost.nodes == 20
    assert min(cost.start_s, cost.daemon_bytes, cost.change_p50_s, cost.start_store_bytes) > 0
    assert said
    assert "| nodes | 20 |" in nodes.table([cost])
    json.dumps(nodes.asdict(cost))
