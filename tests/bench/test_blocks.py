"""The order of the slots, and the reasons to reject a block."""

import pytest

from bench.blocks import (
    MAX_DRIFT,
    MAX_STOLEN,
    Job,
    Series,
    SlotResult,
    duration,
    progress,
    rejection_reason,
    slot_order,
)


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


SERIES = Series("tcp", "P1", "1 there")


def recorded(block, *contenders, rejected=None, ended=True, variant="1 there"):
    key = {"metric": "tcp", "profile": "P1", "variant": variant, "block": block}
    lines = [{"kind": "slot", "contender": name, **key} for name in contenders]
    return lines + [{"kind": "block", "rejected": rejected, **key}] * ended


@pytest.mark.parametrize(
    ("lines", "accepted", "number"),
    [
        ([], 0, 0),
        ([{"kind": "note", "text": "x"}, *recorded(0, "d", "u"), *recorded(1, "d", "u")], 2, 2),
        (recorded(0, "d", "u", rejected="2 % stolen"), 0, 1),
        (recorded(4, "d", ended=False), 0, 5),
        (recorded(0, "d", "u", "slow"), 0, 1),
        (recorded(0, "d", "u", variant="4 there"), 0, 0),
    ],
    ids=["nothing", "two", "rejected", "interrupted", "other contenders", "other series"],
)
def test_what_a_record_has_is_not_measured_again(lines, accepted, number):
    """The number of an interrupted block is not used again: its slots stay in the record."""
    assert progress(lines, SERIES, ["d", "u"]) == (accepted, number)


def test_the_expected_duration():
    """Of each profile, only the contenders that it has."""
    def nothing(_path):
        return SlotResult({})

    one = Job(SERIES, ("direct", "copylimit"), nothing, 5, 2.0)
    other = Job(Series("tcp", "P2", "1 there"), ("direct", "copylimit"), nothing, 5, 2.0, False)
    assert one.seconds() == pytest.approx(5 * 4 * 2, rel=0.2)
    assert other.seconds() == pytest.approx(5 * 1 * 2, rel=0.2)
    assert one.seconds(recorded(0, "direct", "copylimit")) == pytest.approx(one.seconds() * 4 / 5)
    assert duration([one, other]) == pytest.approx(one.seconds() + other.seconds(), rel=0.2)
