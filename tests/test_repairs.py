"""The pauses and the log lines of repeated repairs, with a clock of the test."""

from udptun.repairs import CALM_SECONDS, LAST_PAUSE, SUMMARY_SECONDS, Repairs


def test_pauses_grow_to_a_limit_and_end_when_it_is_calm():
    now = [100.0]
    repairs = Repairs(lambda _: None, lambda: now[0])
    pauses = []
    for _ in range(9):
        pauses.append(repairs.pause())
        now[0] += pauses[-1]
        assert repairs.pause() == 0
        repairs.begin("the route")
    assert pauses == [0, 0, 0.5, 1, 2, 4, 8, LAST_PAUSE, LAST_PAUSE]
    now[0] += LAST_PAUSE
    repairs.begin("the address")  # another repair is not a repetition
    assert repairs.pause() == 0
    now[0] += CALM_SECONDS
    repairs.begin("the route")
    assert repairs.pause() == 0


def test_equal_repairs_are_one_line_with_a_count():
    now, said = [0.0], []
    repairs = Repairs(said.append, lambda: now[0])
    for _ in range(5):
        repairs.done("the route is repaired")
    repairs.done("the address is repaired")
    repairs.summarise()
    assert said == ["the route is repaired", "the address is repaired"]
    now[0] += SUMMARY_SECONDS
    repairs.summarise()
    assert said[2:] == [
        "the route is repaired (4 more times in 60 s: probably another program undoes this repair)"]
    now[0] += SUMMARY_SECONDS
    repairs.summarise()
    repairs.done("the route is repaired")
    assert said[3:] == ["the route is repaired"]
