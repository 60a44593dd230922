"""The parsers of /proc/stat and of ethtool's output, and the route tables of the benchmarks."""

import ipaddress

import pytest

from bench import system, tables
from tests import reference


def test_cpu_time_of_the_whole_system():
    text = "cpu  100 10 200 1000 50 5 35 7 9 9\ncpu0 1 2 3 4 5 6 7 8 9 10\n"
    found = system.parse_stat(text, hertz=100)
    assert found == system.CpuTime(busy=3.5, idle=10.5, stolen=0.07)
    assert found.total == pytest.approx(14.07)
    assert (found - system.CpuTime(1.5, 10.0, 0.0)).busy == pytest.approx(2.0)


def test_offloads_are_put_on_one_line():
    text = (
        "Features for eth0:\ntcp-segmentation-offload: off\n\ttx-tcp-segmentation: off\n"
        "generic-segmentation-offload: on\ngeneric-receive-offload: off [fixed]\n"
        "tx-udp-segmentation: on\n"
    )
    assert system.offloads(text) == "tso off gso on gro off tx-udp-segmentation on"


@pytest.mark.parametrize("family", [4, 6])
def test_tables_have_the_routes_and_addresses_requested(family):
    n = 50
    size = tables.WIDTHS[family] // 8
    lines = tables.text(n, family).decode().splitlines()
    networks = [ipaddress.ip_network(line.split()[0]) for line in lines]
    assert len(set(networks)) == n
    table = reference.Lpm(map(str, networks))
    for kind in ("hit", "miss"):
        blob = tables.addresses(kind, n, family)
        assert len(blob) == tables.ADDRESSES * size
        for i in range(0, 200 * size, size):
            assert bool(table.lookup(blob[i : i + size])) == (kind == "hit")


def test_tables_are_the_same_every_time():
    tables.prefixes.cache_clear()
    first = tables.text(100, 4), tables.addresses("random", 100, 4)
    tables.prefixes.cache_clear()
    assert (tables.text(100, 4), tables.addresses("random", 100, 4)) == first
