"""Whether a full conntrack table is found; `make chaos` fills a real one."""

import pytest

from udptun.node.host.conntrack import COUNT, shortage


@pytest.mark.parametrize(("count", "limit", "is_short"), [
    (0, 262144, False), (249036, 262144, False), (249037, 262144, True), (262144, 262144, True),
    (5, 0, False),  # no limit
])
def test_shortage(tmp_path, count, limit, is_short):
    files = tmp_path / "count", tmp_path / "max"
    for file, number in zip(files, (count, limit), strict=True):
        file.write_text(f"{number}\n")
    why = shortage(*files)
    assert bool(why) == is_short
    assert not why or f"{count} of {limit} entries" in why


def test_without_conntrack_in_the_kernel_the_check_passes(tmp_path):
    assert shortage(tmp_path / "none", tmp_path / "none") == ""


@pytest.mark.skipif(not COUNT.exists(), reason="this kernel has no connection tracking")
def test_the_real_table_can_be_read():
    assert isinstance(shortage(), str)
