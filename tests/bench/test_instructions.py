"""Reading callgrind's file, and the comparison that CI holds."""

import pytest

from bench import instructions


def test_the_total_is_read():
    assert instructions.parse("version: 1\nevents: Ir\nsummary: 4242\nfn=x\ntotals: 4242\n") == 4242


@pytest.mark.parametrize("text", ["", "summary: 0\n"])
def test_nothing_collected_is_an_error(text):
    with pytest.raises(ValueError, match="collected nothing"):
        instructions.parse(text)


def test_only_what_grew_beyond_the_tolerance_is_named():
    before = {"a": 1000, "b": 1000, "c": 1000}
    now = {"a": 1019, "b": 1021, "c": 500, "new": 9}
    [line] = instructions.compared(now, before)
    assert line.startswith("b: 1021 instructions, +2.1%")


@pytest.mark.parametrize("step", instructions.STEPS)
def test_every_step_can_be_replayed(step):
    instructions.replay(step)
