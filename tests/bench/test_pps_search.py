"""The search for the highest rate, against made-up tunnels."""

import pytest

from bench.metrics.pps import LEAST_PPS, Search, Trial


class Tunnel:
    """Carries ``capacity`` packets a second; the sender manages ``most``."""

    def __init__(self, capacity, most=500_000.0, hiccups=()):
        self.capacity, self.most, self.hiccups = capacity, most, set(hiccups)
        self.asked = []

    def __call__(self, rate):
        self.asked.append(rate)
        offered = min(rate, self.most) if rate else self.most
        loss = max(0.0, 1 - self.capacity / offered)
        if len(self.asked) in self.hiccups:
            loss = max(loss, 0.1)
        return Trial(offered, loss, full=not rate)


@pytest.mark.parametrize("capacity", [1500.0, 40_000.0, 117_000.0, 499_000.0])
def test_finds_the_rate_without_loss_to_5_percent(capacity):
    assert Search(Tunnel(capacity)).highest(0.0) == pytest.approx(capacity, rel=0.05)


def test_a_little_loss_allows_a_little_more():
    search = Search(Tunnel(100_000.0))
    without, half = search.highest(0.0), search.highest(0.005)
    assert without <= half <= 100_000 / 0.995


def test_a_tunnel_faster_than_the_sender_has_the_senders_rate():
    tunnel = Tunnel(1e9)
    assert Search(tunnel).highest(0.0) == tunnel.most
    assert tunnel.asked == [0]


def test_one_hiccup_does_not_end_the_search():
    tunnel = Tunnel(100_000.0, hiccups=[3])
    assert Search(tunnel).highest(0.0) == pytest.approx(100_000, rel=0.05)


def test_a_tunnel_that_always_loses_has_no_rate():
    assert Search(Tunnel(LEAST_PPS / 10)).highest(0.0) == 0.0


def test_trials_are_shared_by_the_thresholds():
    tunnel = Tunnel(100_000.0)
    search = Search(tunnel)
    search.highest(0.0)
    before = len(tunnel.asked)
    search.highest(0.005)
    assert len(tunnel.asked) - before < before
