"""The search for the highest rate, with simulated tunnels."""

import pytest

from bench.metrics.pps import MIN_PPS, Search, Trial


class Tunnel:
    """A tunnel that carries ``capacity`` packets per second.

    disturbances  which trials (1 = the first) lose 10 % of the packets
    """

    def __init__(self, capacity, sender_max=500_000.0, disturbances=()):
        self.capacity, self.sender_max = capacity, sender_max
        self.disturbances, self.rates = set(disturbances), []

    def __call__(self, rate):
        self.rates.append(rate)
        offered = min(rate, self.sender_max) if rate else self.sender_max
        loss = max(0.0, 1 - self.capacity / offered)
        if len(self.rates) in self.disturbances:
            loss = max(loss, 0.1)
        return Trial(offered, loss, full=not rate)


@pytest.mark.parametrize("capacity", [1500.0, 40_000.0, 117_000.0, 499_000.0])
def test_finds_the_highest_rate_without_loss_within_5_percent(capacity):
    assert Search(Tunnel(capacity)).highest(0.0) == pytest.approx(capacity, rel=0.05)


def test_the_loss_limit_of_half_a_percent_allows_a_higher_rate():
    search = Search(Tunnel(100_000.0))
    without, half = search.highest(0.0), search.highest(0.005)
    assert without <= half <= 100_000 / 0.995


def test_a_tunnel_faster_than_the_sender_gets_the_senders_rate():
    tunnel = Tunnel(1e9)
    assert Search(tunnel).highest(0.0) == tunnel.sender_max
    assert tunnel.rates == [0]


def test_one_disturbance_does_not_end_the_search():
    tunnel = Tunnel(100_000.0, disturbances=[3])
    assert Search(tunnel).highest(0.0) == pytest.approx(100_000, rel=0.05)


def test_a_tunnel_that_always_loses_gets_rate_0():
    assert Search(Tunnel(MIN_PPS / 10)).highest(0.0) == 0.0


def test_a_second_loss_limit_reuses_earlier_trials():
    tunnel = Tunnel(100_000.0)
    search = Search(tunnel)
    search.highest(0.0)
    before = len(tunnel.rates)
    search.highest(0.005)
    assert len(tunnel.rates) - before < before
