"""Route look-up in the compiled table: ns per look-up, by kind of address and size of the table.

One round is 65,536 look-ups. The sum of their results must equal the sum of the results of single
look-ups. Needs only the compiled core.
"""

from functools import cache

import pytest

from bench import tables
from tests.steps import Lpm

SIZES = (10, 100, 1000, 10_000, 100_000, 1_000_000)


@cache
def table(n, family):
    return Lpm(tables.text(n, family))


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("kind", ["hit", "miss", "random"])
def test_lookup(benchmark, ns_each, kind, n, family):
    benchmark.group = f"look-up, {kind}, IPv{family}"
    lpm, blob = table(n, family), tables.addresses(kind, n, family)
    size = tables.WIDTHS[family] // 8
    expected = sum(lpm.lookup(blob[i : i + size]) for i in range(0, len(blob), size))
    if kind != "random":  # random addresses may hit or miss
        assert (expected == 0) == (kind == "miss")
    assert benchmark(lpm.bench, blob, family, 1) == expected
    benchmark.extra_info["table_bytes"] = lpm.sizeof()
    ns_each(tables.ADDRESSES)
