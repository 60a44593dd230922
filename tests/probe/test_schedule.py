import math
import random

from udptun.probe.schedule import PER_SECOND, Budget, Schedule


def test_keys_come_in_the_order_of_their_times():
    schedule = Schedule()
    for key, at in (("late", 3.0), ("early", 1.0), ("never", 9.0)):
        schedule.set(key, at)
    assert list(schedule.take(3.0)) == ["early", "late"]
    assert list(schedule.take(3.0)) == []
    assert schedule.next_at() == 9.0


def test_a_new_time_replaces_the_former_one():
    schedule = Schedule()
    schedule.set("a", 1.0)
    schedule.set("a", 5.0)
    assert list(schedule.take(4.0)) == []
    schedule.set("a", 2.0)
    assert list(schedule.take(4.0)) == ["a"]
    assert schedule.next_at() is None


def test_whether_a_key_may_be_due_before_a_time():
    schedule = Schedule()
    assert schedule.is_empty_before(9.0)
    schedule.set("a", 2.0)
    assert schedule.is_empty_before(2.0)
    assert not schedule.is_empty_before(2.5)


def test_a_removed_key_does_not_come():
    schedule = Schedule()
    schedule.set("a", 1.0)
    schedule.remove("a")
    schedule.remove("unknown")
    assert list(schedule.take(2.0)) == []


def rounded(at):
    return math.ceil(at * PER_SECOND) / PER_SECOND


def test_a_time_is_rounded_up():
    schedule = Schedule()
    schedule.set("a", 1.001)
    assert list(schedule.take(1.001)) == []
    assert 1.001 <= schedule.next_at() <= 1.001 + 1 / PER_SECOND
    assert list(schedule.take(schedule.next_at())) == ["a"]


def test_a_caller_that_stops_early_loses_no_key():
    schedule = Schedule()
    for key in "abc":
        schedule.set(key, 1.0)
    first = next(schedule.take(2.0))
    assert sorted([first, *schedule.take(2.0)]) == ["a", "b", "c"]


def test_a_time_in_the_past_that_is_set_meanwhile_is_taken():
    schedule = Schedule()
    schedule.set("a", 2.0)
    taken = []
    for key in schedule.take(3.0):
        taken.append(key)
        if key == "a":
            schedule.set("b", 1.0)
            schedule.set("c", 4.0)
    assert taken == ["a", "b"]
    assert schedule.next_at() == 4.0


def test_many_changes_agree_with_a_plain_table_and_do_not_grow_the_lists():
    rng = random.Random(3)
    schedule, plain, now = Schedule(), {}, 0.0
    for _ in range(20_000):
        key = rng.randrange(50)
        if rng.random() < 0.1:
            schedule.remove(key)
            plain.pop(key, None)
        else:
            at = now + rng.random() * 10
            schedule.set(key, at)
            plain[key] = rounded(at)
        if rng.random() < 0.2:
            now += rng.random()
            taken = list(schedule.take(now))
            assert sorted(taken) == sorted(key for key in plain if plain[key] <= now)
            assert taken == sorted(taken, key=plain.get)
            for each in taken:
                del plain[each]
        assert schedule.next_at() == min(plain.values(), default=None)
        assert sum(map(len, schedule._due.values())) == schedule._entries_n <= 2 * 50 + 65
        assert sorted(schedule._times) == sorted(schedule._due)


def test_a_budget_gives_its_rate_and_no_more_than_its_burst_at_once():
    budget = Budget(10.0, 5.0, 0.0)
    assert [budget.take(0.0) for _ in range(6)] == [True] * 5 + [False]
    assert budget.ready_at(0.0) == 0.1
    assert budget.take(0.11)
    assert not budget.take(0.12)
    assert [budget.take(100.0) for _ in range(6)] == [True] * 5 + [False]


def test_a_request_over_the_burst_needs_a_full_bucket():
    budget = Budget(1.0, 2.0, 0.0)
    assert budget.take(0.0, 3)
    assert not budget.take(2.0, 3)
    assert budget.ready_at(2.0, 3) == 3.0
    assert budget.take(3.0, 3)
