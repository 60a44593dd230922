"""Route tables: seconds to parse a file or JSON, to build the look-up, to activate a snapshot.

Needs only the compiled core.
"""

import contextlib
import json
import os

import pytest

from bench import tables
from tests.steps import Lpm
from udptun import _core

SIZES = (1000, 10_000, 100_000)


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("n", [*SIZES, 1_000_000])
def test_build(benchmark, n, family):
    benchmark.group = f"build the look-up, IPv{family}"
    lpm = Lpm(tables.text(n, family))
    benchmark.pedantic(lpm.build, rounds=5 if n <= 100_000 else 2)
    network, _ = tables.prefixes(n, family)[0]
    assert lpm.lookup(network.to_bytes(tables.WIDTHS[family] // 8, "big"))


@pytest.mark.parametrize("n", SIZES)
def test_parse_text(benchmark, n):
    benchmark.group = "parse a route file"
    assert len(benchmark(_core.RouteTable.parse_text, tables.text(n, 4))) == n


@pytest.mark.parametrize("n", SIZES)
def test_parse_json(benchmark, n):
    benchmark.group = "parse JSON routes"
    rows = [
        {"dst": f"{tables.address(network, 4)}/{length}", "via": "192.0.2.1"}
        for network, length in tables.prefixes(n, 4)
    ]
    body = json.dumps({"routes": rows}).encode()
    assert len(benchmark(_core.RouteTable.parse_json, body)) == n


@pytest.mark.parametrize("n", SIZES)
def test_publish(benchmark, n):
    """Build and activate a new snapshot in a core that has no running workers."""
    benchmark.group = "build and swap"
    table = _core.RouteTable.parse_text(tables.text(n, 4))
    with contextlib.ExitStack() as closing:
        notify = os.eventfd(0, os.EFD_NONBLOCK)
        closing.callback(os.close, notify)
        core = _core.Core("strict", 1, (1500, 0), [bytes((10, 244, 1, 0))], notify)

        def publish():
            core.publish(table)
            core.collect()

        benchmark.pedantic(publish, rounds=5)
        network, _ = tables.prefixes(n, 4)[0]
        assert core.trace(network.to_bytes(4, "big")) is not None
