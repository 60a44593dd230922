"""The rule that chooses a path: a table of cases, and properties of all sequences."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from udptun.node.paths.choice import (
    FIRST_HOLD_SECONDS,
    LAST_HOLD_SECONDS,
    TRUST_SECONDS,
    Choice,
    Health,
    Measured,
    decide,
    next_decision_time,
)

LOST, SMALL, GOOD = Health
OTHER, PREFERRED = 0, 1
NOW = 1000.0


def measured(*healths, since=NOW):
    """Return the paths; "none" is a path that does not exist."""
    return [None if health == "none" else Measured(health, since, "why") for health in healths]


@pytest.mark.parametrize(("carrying", "other", "preferred", "then"), [
    # the preferred path carries
    (PREFERRED, GOOD, GOOD, PREFERRED),
    (PREFERRED, GOOD, LOST, OTHER),
    (PREFERRED, GOOD, SMALL, OTHER),
    (PREFERRED, SMALL, LOST, OTHER),
    (PREFERRED, SMALL, SMALL, PREFERRED),
    (PREFERRED, LOST, LOST, PREFERRED),
    (PREFERRED, LOST, SMALL, PREFERRED),
    (PREFERRED, None, LOST, PREFERRED),  # nothing shows that the other path is better
    (PREFERRED, GOOD, None, PREFERRED),
    (PREFERRED, "none", LOST, PREFERRED),
    # the other path carries, and the preferred one has just become what it is
    (OTHER, GOOD, GOOD, OTHER),
    (OTHER, GOOD, LOST, OTHER),
    (OTHER, LOST, GOOD, PREFERRED),
    (OTHER, LOST, SMALL, PREFERRED),
    (OTHER, SMALL, GOOD, PREFERRED),
    (OTHER, SMALL, SMALL, OTHER),
    (OTHER, LOST, LOST, OTHER),
    (OTHER, LOST, None, OTHER),
    (OTHER, None, GOOD, OTHER),
    # the carrying path does not exist any more
    (OTHER, "none", LOST, PREFERRED),
    (PREFERRED, LOST, "none", OTHER),
])
def test_the_next_choice(carrying, other, preferred, then):
    choice = decide(Choice(carrying, 0.0), measured(other, preferred), NOW)
    assert choice.at == then
    assert (choice.since == NOW) == (then != carrying)


@pytest.mark.parametrize("other", [GOOD, None])
def test_the_preferred_path_returns_after_the_hold(other):
    choice = Choice(OTHER, 0.0, hold=20.0)
    paths = measured(other, GOOD)
    assert next_decision_time(choice, paths) == NOW + 20
    assert decide(choice, paths, NOW + 19.9) is choice
    back = decide(choice, paths, NOW + 20)
    assert (back.at, back.why, next_decision_time(back, paths)) == (PREFERRED, "", None)


@pytest.mark.parametrize("health", [LOST, SMALL, None])
def test_the_preferred_path_does_not_return_by_time_alone(health):
    choice = Choice(OTHER, 0.0)
    paths = measured(GOOD, health)
    assert next_decision_time(choice, paths) is None
    assert decide(choice, paths, NOW + 10_000) is choice


def test_the_hold_doubles_up_to_a_limit_and_is_forgotten():
    choice, now, holds = Choice(PREFERRED, 0.0), NOW, []
    for _ in range(9):
        choice = decide(choice, measured(GOOD, LOST, since=now), now)
        assert (choice.at, choice.why) == (OTHER, "why")
        holds.append(choice.hold)
        now += choice.hold
        choice = decide(choice, measured(GOOD, GOOD, since=now - choice.hold), now)
        assert choice.at == PREFERRED
        now += 1
    assert holds[:4] == [FIRST_HOLD_SECONDS * factor for factor in (1, 2, 4, 8)]
    assert holds[-1] == LAST_HOLD_SECONDS
    later = now + TRUST_SECONDS
    choice = decide(choice, measured(GOOD, LOST, since=later), later)
    assert choice.hold == FIRST_HOLD_SECONDS


healths = st.sampled_from([None, *Health])


@given(st.lists(st.tuples(st.floats(0.01, 900), healths, healths), max_size=60))
def test_no_sequence_stays_on_a_worse_path_or_returns_too_often(steps):
    choice, now = Choice(PREFERRED, 0.0), 0.0
    paths = measured(None, None, since=now)
    returns = []
    for passed, *now_are in steps:
        now += passed
        paths = [path if path.health is health else Measured(health, now, "why")
                 for path, health in zip(paths, now_are, strict=True)]
        before, choice = choice, decide(choice, paths, now)
        assert decide(choice, paths, now) is choice  # a decision is final for the same facts
        known = [path.health for path in paths if path.health is not None]
        if paths[choice.at].health is not None:
            assert paths[choice.at].health == max(known)
        if choice.at == PREFERRED and before.at == OTHER and paths[OTHER].health is GOOD:
            returns.append(now)
            assert now - paths[PREFERRED].since >= before.hold
            assert now - before.since >= FIRST_HOLD_SECONDS
    for first, second in pairwise(returns):
        assert second - first >= FIRST_HOLD_SECONDS
