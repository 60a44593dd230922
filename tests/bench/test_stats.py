"""Medians, ratios within blocks, intervals, noise."""

import pytest

from bench import stats


@pytest.mark.parametrize(
    ("values", "q", "want"),
    [([5], 0.5, 5), ([1, 2], 0.5, 1.5), ([3, 1, 2], 0, 1), ([3, 1, 2], 1, 3),
     ([0, 10], 0.25, 2.5), (range(101), 0.99, 99)],
)
def test_quantile(values, q, want):
    assert stats.quantile(list(values), q) == pytest.approx(want)


def test_equal_values_have_an_interval_of_zero_width():
    assert stats.estimate([2.0] * 5) == stats.Estimate(2.0, 2.0, 2.0, 5)


def test_an_estimate_of_one_value_has_n_1():
    assert stats.estimate([7.0]) == stats.Estimate(7.0, 7.0, 7.0, 1)


def test_estimate_of_no_values_is_none():
    assert stats.estimate([]) is None


def test_an_interval_holds_the_median_and_lies_within_the_values():
    values = [1.0, 2.0, 3.0, 4.0, 100.0]
    found = stats.estimate(values)
    assert found.median == 3.0
    assert min(values) <= found.low < found.median < found.high <= max(values)


def test_the_same_values_give_the_same_interval():
    values = [3.1, 2.7, 3.3, 2.9, 3.0, 3.6]
    assert stats.estimate(values) == stats.estimate(values)


def test_more_blocks_narrow_the_interval():
    few, many = stats.estimate([1.0, 2.0, 3.0, 4.0]), stats.estimate([1.0, 2.0, 3.0, 4.0] * 20)
    assert many.high - many.low < few.high - few.low


def test_a_steady_drift_cancels_within_a_block():
    """A block has four slots in the order d, u, u, d. In these slots, d would have the values 10,
    12, 14, 16: a drift of 2 per slot. u always has half the value that d would have."""
    block = {"d": [10.0, 16.0], "u": [12.0 / 2, 14.0 / 2]}
    assert stats.ratios([block], "u", "d") == [0.5]


def test_ratios_are_within_blocks_and_not_across():
    blocks = [{"a": [10.0], "b": [5.0]}, {"a": [100.0], "b": [50.0]}]
    assert stats.ratios(blocks, "b", "a") == [0.5, 0.5]


def test_a_block_without_one_of_the_two_gives_no_ratio():
    blocks = [{"a": [10.0], "b": []}, {"a": [10.0]}, {"a": [4.0], "b": [2.0]}]
    assert stats.ratios(blocks, "b", "a") == [0.5]
    assert stats.levels(blocks, "b") == [2.0]


def test_noise_is_the_difference_of_two_slots_of_one_contender():
    blocks = [{"a": [10.0, 11.0], "b": [10.0, 9.0], "c": [5.0]}]
    assert stats.noise(blocks).median == pytest.approx(0.1)
    assert stats.noise([{"a": [1.0]}]) is None


def test_drift():
    assert stats.drift([4.0, 5.0]) == pytest.approx(0.25)
    assert stats.drift([4.0]) == 0.0
    assert stats.drift([]) == 0.0
