"""How often our lease is written over that of another machine."""

import pytest

from udptun.leases import contest as module
from udptun.leases.base import SourceHealth
from udptun.leases.contest import FIRST_DELAY_SECONDS, QUIET_SECONDS, Contest


@pytest.fixture
def clock(monkeypatch):
    """Return a list whose only item is the time."""
    now = [1000.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


def test_the_delays_grow_and_end(clock):
    health = SourceHealth()
    contest = Contest(health)
    assert contest.may_write(1, "B writes") and contest.delay == 0
    assert health.contested == "B writes"
    delays = []
    for version in range(2, 12):
        assert not contest.may_write(version, "B writes")
        delays.append(contest.delay)
        clock[0] += contest.delay - 0.1
        assert not contest.may_write(version, "B writes")  # the same write, seen again
        clock[0] += 0.2
        assert contest.may_write(version, "B writes")
    assert delays[:3] == pytest.approx([FIRST_DELAY_SECONDS * n for n in (1, 2, 4)])
    assert max(delays) == pytest.approx(QUIET_SECONDS)


def test_a_contest_may_last_for_any_number_of_writes(clock):
    contest = Contest(SourceHealth())
    for version in range(3000):
        contest.may_write(version, "B writes")
    assert contest.delay == pytest.approx(QUIET_SECONDS)


def test_a_contest_ends_when_the_other_machine_is_quiet(clock):
    health = SourceHealth()
    contest = Contest(health)
    contest.may_write(1, "B writes")
    clock[0] += QUIET_SECONDS
    contest.end_if_quiet()
    assert health.contested
    clock[0] += QUIET_SECONDS + 1
    contest.end_if_quiet()
    assert not health.contested
    assert contest.may_write(2, "B writes")
