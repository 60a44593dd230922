"""The order of the slots, and the reasons to reject a block."""

import pytest

from bench.blocks import MAX_DRIFT, MAX_STOLEN, rejection_reason, slot_order


def slot(name, value, stolen=0.0):
    values = {} if value is None else {"bits_per_second": value}
    return {"contender": name, "values": values, "stolen": stolen}


def test_second_half_of_a_mirrored_block_is_reversed():
    assert slot_order(["d", "v", "u"], True, 0) == ["d", "v", "u", "u", "v", "d"]


def test_every_other_block_of_single_slots_is_reversed():
    assert slot_order(["d", "v"], False, 0) == ["d", "v"]
    assert slot_order(["d", "v"], False, 1) == ["v", "d"]


def test_a_block_without_steal_time_and_with_small_drift_is_accepted():
    lines = [slot("d", 10.0), slot("u", 3.0), slot("u", 9.0), slot("d", 10.5)]
    assert rejection_reason(lines, "d", "bits_per_second") is None


@pytest.mark.parametrize("stolen", [MAX_STOLEN * 1.01, 0.5])
def test_steal_time_rejects_a_block(stolen):
    lines = [slot("d", 1.0), slot("u", 1.0, stolen)]
    assert "the hypervisor took" in rejection_reason(lines, "d", None)


def test_a_large_difference_between_the_slots_of_the_first_contender_rejects_a_block():
    lines = [slot("d", 10.0), slot("d", 10.0 * (1 + MAX_DRIFT) + 0.1)]
    assert "the two slots of d differ by" in rejection_reason(lines, "d", "bits_per_second")
    assert rejection_reason(lines, "d", None) is None


def test_a_block_without_any_figure_is_rejected():
    lines = [slot("d", None), slot("u", None)]
    assert rejection_reason(lines, "d", None) == "every figure was refused"


def test_a_refused_slot_does_not_reject_the_block():
    assert rejection_reason([slot("d", 10.0), slot("d", None)], "d", "bits_per_second") is None
