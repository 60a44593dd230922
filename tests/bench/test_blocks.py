"""The order of the slots, and what spoils a block."""

import pytest

from bench.blocks import ANCHOR_DRIFT_MOST, STOLEN_MOST, order, spoiled


def slot(name, value, stolen=0.0):
    values = {} if value is None else {"bits_per_second": value}
    return {"contender": name, "values": values, "stolen": stolen}


def test_a_block_is_a_palindrome():
    assert order(["d", "v", "u"], True, 0) == ["d", "v", "u", "u", "v", "d"]


def test_single_slots_go_back_and_forth():
    assert order(["d", "v"], False, 0) == ["d", "v"]
    assert order(["d", "v"], False, 1) == ["v", "d"]


def test_a_quiet_block_is_accepted():
    lines = [slot("d", 10.0), slot("u", 3.0), slot("u", 9.0), slot("d", 10.5)]
    assert spoiled(lines, "d", "bits_per_second") is None


@pytest.mark.parametrize("stolen", [STOLEN_MOST * 1.01, 0.5])
def test_stolen_time_spoils_it(stolen):
    assert "stolen" in spoiled([slot("d", 1.0), slot("u", 1.0, stolen)], "d", None)


def test_an_anchor_far_from_itself_spoils_it():
    lines = [slot("d", 10.0), slot("d", 10.0 * (1 + ANCHOR_DRIFT_MOST) + 0.1)]
    assert "from itself" in spoiled(lines, "d", "bits_per_second")
    assert spoiled(lines, "d", None) is None


def test_a_block_without_any_figure_is_none():
    assert spoiled([slot("d", None), slot("u", None)], "d", None) == "every figure was refused"


def test_a_refused_slot_is_no_reason():
    assert spoiled([slot("d", 10.0), slot("d", None)], "d", "bits_per_second") is None
