"""The soak itself: each condition finds its fault. `make soak` runs the soak."""

import os
from types import SimpleNamespace

import pytest

from .counts import (
    GROWTH_KIB,
    Interval,
    NodeCounts,
    Series,
    grown,
    growth,
    unaccelerated,
    unbalanced,
    unexplained,
)

pytestmark = pytest.mark.unprivileged


def series(rss, fds) -> Series:
    return Series([float(10 * n) for n in range(len(rss))], list(rss), list(fds))


def test_memory_and_descriptors_that_grow_are_found():
    flat = [60_000 + n % 3 for n in range(60)]
    assert grown("x", series(flat, [20] * 60)) == []
    # The start does not count.
    assert grown("x", series([9_000] * 10 + flat[10:], [5] * 10 + [20] * 50)) == []
    leak = [60_000 + 4 * GROWTH_KIB * n / 60 for n in range(60)]
    assert "memory" in grown("x", series(leak, [20] * 60))[0]
    assert "descriptors" in grown("x", series(flat, [20 + n // 6 for n in range(60)]))[0]
    assert growth([1.0, 2.0]) == 0.0


def test_a_process_is_read():
    found = Series()
    found.add(os.getpid())
    found.add(2**22 + 1)  # there is no such process
    assert len(found.rss) == len(found.fds) == len(found.at) == 1
    assert found.rss[0] > 1000


def test_counters_that_do_not_add_up_are_found():
    n = {"read": 10, "generated": 1, "delivered": 7, "consumed": 1, "dropped": 2, "queued": 1}
    assert unbalanced({"encap": n}, {"encap": 2}) == []
    assert unbalanced({"encap": n | {"read": 11}}, {"encap": 2})
    assert unbalanced({"encap": n}, {"encap": 3})
    assert unbalanced({"encap": n}, {})


def test_a_loss_outside_of_all_intervals_is_found():
    kill = Interval("n2", 10.0, 12.0, "kill -9")
    lost = [(("n1", "n2"), 11.0), (("n2", "n3"), 10.0), (("n1", "n3"), 11.0), (("n1", "n2"), 12.5)]
    by_reason, rest = unexplained(lost, [kill])
    assert by_reason == {"kill -9": 2}
    assert rest == lost[2:]


@pytest.mark.parametrize(
    ("express", "sent", "received", "wrong"),
    [(True, 9, 9, 0), (True, 0, 9, 1), (True, 9, 0, 1), (False, 0, 0, 0), (False, 1, 0, 1)],
)
def test_an_express_path_that_moves_nothing_is_found(express, sent, received, wrong):
    node = NodeCounts(SimpleNamespace(host=SimpleNamespace(name="n2")), express)
    node.daemon.rss.append(9.0)
    first = {"active": True, "packets": {"sent": sent // 2, "received": received // 2}}
    for report in (first, {"active": False, "packets": {"sent": sent, "received": received}}):
        node._look_at_express(report)
    assert (node.active, node.idle) == (1, 1)
    assert (node.kernel["sent"], node.kernel["received"]) == (sent, received)
    node._look_at_express(first)  # of a new forwarder, which counts from 0
    assert node.kernel["sent"] == sent + sent // 2
    assert len(unaccelerated(node)) == wrong
