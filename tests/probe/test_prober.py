"""The verdicts over a simulated network: how fast they are, and how many probes they need."""

import errno
import itertools

import pytest

from tests.probe.simulation import FULL, Simulation, Two
from udptun.probe.prober import HINTS_PER_SECOND, IDLE_PER_SECOND, URGENT_PER_SECOND
from udptun.probe.sizes import RETRY_SECONDS, STEP
from udptun.probe.state import IDLE_BATCHES_PER_SECOND, REACHABLE, UNKNOWN, UNREACHABLE

SEEDS = range(5)


def started(keys=("a",), traffic=(), seed=1, **options):
    """Return a simulation whose peers have answered for a while."""
    net = Simulation(seed, **options)
    net.add(*keys)
    net.with_traffic = set(traffic)
    net.run(30 + seed * 0.37)  # another moment between two probes for each seed
    assert {net.state(key) for key in keys} == {REACHABLE}
    return net


def proof(net, key="a"):
    """Return the token of a request whose sender has received our last request."""
    return net.prober[key]._answered_half


def test_a_peer_that_answers_is_reachable_with_its_round_trip():
    net = started(round_trip=0.040)
    path = net.prober["a"]
    assert path.rtt == pytest.approx(0.040)
    assert path.loss == 0
    assert path.sizes.largest == FULL
    assert path.sizes.full_passes
    assert net.first("a", REACHABLE, 1000.0) < 1


def test_a_path_is_unknown_until_its_first_verdict():
    net = Simulation()
    net.passes = lambda key, size, now: False
    net.add("a")
    assert net.state("a") == UNKNOWN
    assert net.run(5).state("a") == UNREACHABLE


@pytest.mark.parametrize("seed", SEEDS)
def test_a_pair_with_traffic_gets_the_verdict_within_four_seconds(seed):
    net = started(traffic="a", seed=seed)
    net.passes = lambda key, size, now: False
    since = net.now
    net.run(10)
    assert net.first("a", UNREACHABLE, since) <= 4.0


@pytest.mark.parametrize("seed", SEEDS)
def test_an_idle_peer_gets_the_verdict_within_fifteen_seconds(seed):
    net = started(seed=seed)
    net.passes = lambda key, size, now: False
    since = net.now
    net.run(20)
    assert net.first("a", UNREACHABLE, since) <= 15.0


@pytest.mark.parametrize("seed", SEEDS)
def test_traffic_that_begins_after_an_hour_idle_gets_the_verdict_within_four_seconds(seed):
    net = started(seed=seed)
    net.run(3600)
    net.passes = lambda key, size, now: False
    since = net.now
    net.with_traffic = {"a"}
    net.run(5)
    assert net.first("a", UNREACHABLE, since) <= 4.0


@pytest.mark.parametrize("seed", SEEDS)
def test_large_packets_that_do_not_pass_are_noticed_within_five_seconds(seed):
    net = started(traffic="a", seed=seed)
    net.passes = lambda key, size, now: size <= 1000
    since = net.now
    net.run(10)
    assert net.first("a", REACHABLE, since, full=False) < 5.0
    assert net.first("a", UNREACHABLE, since) is None


@pytest.mark.parametrize("limit", [30, 100, 576, 1279, 1392, 1399])
@pytest.mark.parametrize("traffic", ["", "a"])
def test_the_largest_size_that_passes_is_found(limit, traffic):
    net = started(traffic=traffic)
    net.passes = lambda key, size, now: size <= limit
    net.run(600)
    assert limit - STEP < net.prober["a"].sizes.largest <= limit
    assert net.prober["a"].loss < 0.1
    since = net.now
    net.passes = lambda key, size, now: True
    net.run(120)
    assert net.prober["a"].sizes.largest == FULL
    assert net.first("a", REACHABLE, since, full=True) < (3 * RETRY_SECONDS if traffic else 120)


@pytest.mark.parametrize("seconds", range(4, 30, 2))
def test_a_limit_that_ends_during_the_search_is_forgotten_soon(seconds):
    net = started(traffic="a")
    net.passes = lambda key, size, now: size <= 1100
    net.run(seconds)
    since = net.now
    net.passes = lambda key, size, now: True
    net.run(30)
    assert net.prober["a"].sizes.full_passes
    assert net.first("a", REACHABLE, since, full=True) is None or \
        net.first("a", REACHABLE, since, full=True) <= 13


def test_a_limit_that_falls_and_rises_is_followed():
    net = started(traffic="a")
    for limit in (1200, 600, 900):
        net.passes = lambda key, size, now, limit=limit: size <= limit
        net.run(1300)
        assert limit - STEP < net.prober["a"].sizes.largest <= limit


def test_an_outage_after_the_first_answer_sets_no_limit():
    """The peer starts later than the first probe, answers a small one, and is cut off."""
    simulation = Simulation()
    simulation.passes = lambda key, size, now: 1000.4 < now < 1000.8
    simulation.add("a", data_proves=True)
    simulation.with_traffic.add("a")
    simulation.run(6)
    path = simulation.prober["a"]
    assert path.state == UNREACHABLE and path.last_answer is not None
    assert path.sizes.full_passes is not False
    simulation.prober.data_received("a", simulation.now)
    simulation.run(6)
    assert path.sizes.full_passes is not False


def test_an_outage_does_not_change_the_measured_sizes():
    net = started(traffic="a")
    net.passes = lambda key, size, now: False
    net.run(60)
    since = net.now
    net.passes = lambda key, size, now: True
    net.run(15)
    assert net.first("a", REACHABLE, since) <= 13
    assert net.prober["a"].sizes.largest == FULL
    assert all(full for _, _, state, full in net.verdicts if state == REACHABLE)


def test_random_loss_of_five_percent_changes_no_verdict():
    net = started(traffic="a")
    net.passes = lambda key, size, now: net.prober._rng.random() > 0.05
    since = net.now
    net.run(600)
    assert net.first("a", UNREACHABLE, since) is None
    assert 0 < net.prober["a"].loss < 0.3


def test_a_long_round_trip_is_not_an_outage():
    net = started(traffic="a", round_trip=1.8)
    net.run(300)
    assert net.state("a") == REACHABLE
    assert net.first("a", UNREACHABLE, 1030.0) is None


def test_one_dead_peer_does_not_affect_another():
    net = started(("a", "b"), traffic="ab")
    before = len(net.sent_since(net.now - 20, "b"))
    net.passes = lambda key, size, now: key == "b"
    since = net.now
    net.run(20)
    assert net.state("b") == REACHABLE
    assert abs(len(net.sent_since(since, "b")) - before) <= 3


def test_an_unreachable_peer_is_probed_as_an_idle_one_also_with_traffic():
    net = started(traffic="a")
    net.passes = lambda key, size, now: False
    net.run(60)
    since = net.now
    net.run(100)
    assert 8 <= len(net.sent_since(since)) <= 14


@pytest.mark.parametrize("traffic", ["", "a"])
def test_a_request_of_an_unreachable_peer_shows_that_it_is_back(traffic):
    net = started(traffic=traffic)
    net.passes = lambda key, size, now: False
    net.run(40)
    assert net.state("a") == UNREACHABLE
    net.passes = lambda key, size, now: True
    net.run(max(0.0, net.sent[-1][0] + 2.0 - net.now))
    net.prober.heard("a", net.now, 1)
    since = net.now
    net.run(1)
    assert net.first("a", REACHABLE, since) < 0.1

    # Such requests may be forged. So many of them cause at most one probe per second.
    net.passes = lambda key, size, now: False
    net.run(40)
    since = net.now
    for _ in range(100):
        net.prober.heard("a", net.now, 1)
        net.run(0.1)
    assert len(net.sent_since(since)) <= 11


def test_idle_peers_are_probed_at_different_times():
    keys = range(500)
    net = started(keys)
    since = net.now
    net.run(10)
    per_second = [len([1 for at, *_ in net.sent if at - since >= s and at - since < s + 1])
                  for s in range(10)]
    assert max(per_second) <= 100
    assert min(per_second) >= 20


def test_the_probes_to_idle_peers_are_sent_in_few_batches():
    net = started(range(500))
    since = net.now
    net.run(10)
    rows = net.sent_since(since)
    assert len(rows) >= 300
    assert len({at for at, *_ in rows}) <= 10 * IDLE_BATCHES_PER_SECOND + 1


@pytest.mark.parametrize("dead", [False, True])
def test_the_budget_bounds_the_probes_to_five_thousand_peers(dead):
    net = Simulation()
    keys = range(5000)
    net.add(*keys)
    net.run(120)
    assert {net.state(key) for key in keys} == {REACHABLE}
    since = net.now
    if dead:
        net.passes = lambda key, size, now: False
    net.run(150)
    rate = len(net.sent_since(since)) / 150
    if dead:
        assert rate <= IDLE_PER_SECOND + URGENT_PER_SECOND
        assert {net.state(key) for key in keys} == {UNREACHABLE}
    else:
        assert 80 <= rate <= IDLE_PER_SECOND
        assert len({key for _, key, _ in net.sent_since(since)}) == 5000


def test_pairs_with_traffic_are_bounded_too_and_idle_ones_still_get_their_share():
    net = Simulation()
    net.add(*range(1500))
    net.run(30)
    net.with_traffic = set(range(1000))
    net.run(10)
    since = net.now
    net.run(30)
    rows = net.sent_since(since)
    active = [key for _, key, _ in rows if key < 1000]
    assert len(active) / 30 <= URGENT_PER_SECOND * 1.05
    assert set(active) == set(range(1000))
    assert {key for _, key, _ in rows if key >= 1000} == set(range(1000, 1500))


def test_idle_standby_paths_are_probed_less_often_if_there_are_many():
    net = Simulation()
    net.add(*range(1000))
    for key in range(500):
        net.prober.set_standby(key, True)
    net.run(100)
    rows = net.sent_since(1020.0)
    standby = sum(key < 500 for _, key, _ in rows)
    assert 0.15 < standby / (len(rows) - standby) < 0.35
    since = net.now
    net.passes = lambda key, size, now: key != 7  # from now on, this path carries the packets
    net.prober.set_standby(7, False)
    net.run(20)
    assert net.first(7, UNREACHABLE, since) <= 15.0


def test_a_standby_path_with_traffic_or_behind_a_nat_is_probed_as_often_as_others():
    net = Simulation()
    net.add(*range(1000))
    net.add("nat", max_interval=20.0)
    for key in (*range(1000), "nat"):
        net.prober.set_standby(key, True)
    net.run(60)
    since = net.now
    net.with_traffic = {3}
    net.passes = lambda key, size, now: key != 3
    net.run(60)
    assert net.first(3, UNREACHABLE, since) <= 5.0
    assert len(net.sent_since(since, "nat")) >= 2


def test_a_nat_hears_of_us_at_most_every_twenty_seconds():
    net = Simulation()
    net.add(*range(2500))
    net.add("nat", max_interval=20.0)
    net.run(150)
    times = [at for at, *_ in net.sent_since(1060.0, "nat")]
    gaps = [b - a for a, b in itertools.pairwise(times)]
    assert max(gaps) <= 24.5


def test_received_data_prove_a_peer_that_need_not_answer():
    net = Simulation()
    net.passes = lambda key, size, now: False
    net.add("stock", data_proves=True)
    net.add("udptun")
    for _ in range(60):
        net.run(1)
        for key in ("stock", "udptun"):
            net.prober.data_received(key, net.now)
    assert net.state("stock") == REACHABLE
    assert net.state("udptun") == UNREACHABLE
    net.run(20)
    assert net.state("stock") == UNREACHABLE


def test_one_direction_only_is_unreachable_and_the_reason_says_which():
    net = started(traffic="a")
    net.passes = lambda key, size, now: False
    for second in range(12):
        net.run(1)
        net.prober.heard("a", net.now, proof(net), heard_seconds=second + 1.0)
    assert net.state("a") == UNREACHABLE
    reason = net.prober["a"].reason(net.now)
    assert "packets from the peer arrive, but it has received no probe for" in reason
    assert net.prober["a"].directions() == (True, False)


def test_a_silent_outage_does_not_claim_that_packets_arrive():
    net = started(traffic="a")
    net.passes = lambda key, size, now: False
    assert net.prober["a"].directions() == (True, True)
    net.run(10)
    assert "arrive" not in net.prober["a"].reason(net.now)
    assert net.prober["a"].directions() == (False, None)  # the peer cannot report what it receives


def test_a_refused_send_counts_as_lost_and_keeps_its_error():
    net = started(traffic="a")
    since = net.now
    while net.state("a") != UNREACHABLE and net.now < since + 10:
        net.now = max(net.now, net.prober.next_at())
        for request in net.prober.run():
            net.prober.send_failed(request, errno.ENETUNREACH)
    assert net.now - since <= 4
    assert "Network is unreachable" in net.prober["a"].reason(net.now)


def test_a_full_socket_buffer_does_not_change_the_path_state():
    net = started(traffic="a")
    since = net.now
    while net.now < since + 20:
        net.now = max(net.now, net.prober.next_at())
        for request in net.prober.run():
            net.prober.send_failed(request, errno.ENOBUFS)
    assert net.state("a") == REACHABLE


def test_a_size_that_our_kernel_refuses_is_a_limit_and_not_an_outage():
    net = Simulation()
    net.add("a")
    while net.now < 2000:
        net.now = max(net.now, net.prober.next_at())
        for request in net.prober.run():
            if request.size > 1200:
                net.prober.send_failed(request, errno.EMSGSIZE)
            else:
                net.prober.answered("a", request.token, request.size, net.now)
    assert net.state("a") == REACHABLE
    assert 1200 - STEP < net.prober["a"].sizes.largest <= 1200


def test_an_answer_with_another_token_or_size_is_refused():
    net = Simulation()
    net.passes = lambda key, size, now: False
    net.add("a")
    net.run(0.1)
    request = net.prober.request("a", 100)
    assert not net.prober.answered("a", request.token ^ 1, 100, net.now)
    assert not net.prober.answered("b", request.token, 100, net.now)
    assert net.prober["a"].waits_for(request.token)
    assert net.prober.answered("a", request.token, 100, net.now)
    assert not net.prober.answered("a", request.token, 100, net.now)  # a copy of the answer
    request = net.prober.request("a", 100)
    assert not net.prober.answered("a", request.token, 101, net.now)


def test_a_late_answer_proves_the_path():
    net = started(traffic="a")
    net.passes = lambda key, size, now: False
    since, net.sent = net.now, []
    request = net.prober.request("a", 24)
    net.run(2.0)
    assert net.prober.answered("a", request.token, 24, net.now)
    assert net.prober["a"]._missed_n == 0
    assert net.now - since == pytest.approx(2.0)


def test_a_removed_path_is_forgotten():
    net = started(("a", "b"))
    net.prober.remove("a")
    since = net.now
    net.run(30)
    assert net.sent_since(since, "a") == []
    assert "a" not in net.prober
    net.add("a")
    assert net.state("a") == UNKNOWN


def test_a_path_that_is_added_again_keeps_its_state_and_a_new_size_is_measured():
    net = started()
    net.prober.add("a", FULL)
    assert net.state("a") == REACHABLE
    assert net.prober["a"].sizes.full_passes
    net.prober.add("a", FULL + 100)
    assert net.prober["a"].sizes.full_passes is None
    net.full += 100
    net.run(60)
    assert net.prober["a"].sizes.largest == FULL + 100


def test_an_idle_pair_shares_its_probes():
    net = Two().run(100)
    before = len(net.sent)
    net.run(1000)
    by = [sum(sender == node for _, sender in net.sent[before:]) for node in range(2)]
    assert 80 <= sum(by) <= 160  # each side alone would send 100
    assert min(by) >= 20
    assert net.states() == [REACHABLE, REACHABLE]


@pytest.mark.parametrize("every", [0.1, 0.4, 1.0, 6.0, 9.0])
@pytest.mark.parametrize("answers", [True, False])
@pytest.mark.parametrize("claim", [0.0, "true"])
def test_forged_requests_do_not_delay_the_verdict(every, answers, claim):
    """Forged claims can be true: the sender has seen when we answered its last request."""
    net = started()
    since = net.now
    net.passes = lambda key, size, now: answers
    while net.now < since + (60 if answers else 15):
        net.run(every)
        token = net.prober._rng.getrandbits(64)
        net.prober.heard("a", net.now, token, every if claim == "true" else claim)
    if answers:
        assert len(net.sent_since(since)) >= 5
    else:
        assert net.state("a") == UNREACHABLE


def test_forged_requests_cause_no_probe():
    net = started()
    since = net.now
    quiet = started()
    quiet.run(60)
    while net.now < since + 60:
        net.run(0.3)
        net.prober.heard("a", net.now, net.prober._jitter.getrandbits(64), 100.0)
        net.prober.heard("a", net.now, net.prober._jitter.getrandbits(64), None)
    assert len(net.sent_since(since)) <= len(quiet.sent_since(since)) + 2


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("deaf", [(0,), (1,), (0, 1)])
def test_both_sides_of_an_idle_pair_get_the_verdict_within_fifteen_seconds(seed, deaf):
    """Also if only one direction fails, and the packets of the other side still arrive."""
    net = Two(seed).run(100 + seed)
    net.passes = lambda sender, now: sender not in deaf
    since = net.now
    net.run(25)
    assert net.states() == [UNREACHABLE, UNREACHABLE]
    assert max(prober["other"].since for prober in net.probers) - since <= 15.0
    net.passes = lambda sender, now: True
    net.run(15)
    assert net.states() == [REACHABLE, REACHABLE]


# Reports of a smaller path MTU


@pytest.mark.parametrize("size", [24, 524, 1000, 1399])
@pytest.mark.parametrize("traffic", ["", "a"])
def test_a_forged_report_causes_one_probe_and_does_not_change_the_path_mtu(size, traffic):
    net = started(traffic=traffic)
    since = net.now
    for _ in range(20):
        net.prober.hint("a", size)
        net.run(0.05)
    assert net.prober["a"].sizes.limit is None
    assert [row for row in net.verdicts if row[0] >= since] == []
    rows = net.sent_since(since)
    assert {FULL, size} <= {sent for _, _, sent in rows}
    assert len(rows) <= 3 * (1 + bool(traffic))  # the full size, the reported one, a small one


@pytest.mark.parametrize("limit", [524, 1000, 1372, 1399])
def test_a_true_report_sets_the_limit_within_a_second(limit):
    net = started(traffic="a")
    net.passes = lambda key, size, now: size <= limit
    since = net.now
    net.prober.hint("a", limit)
    while net.prober["a"].sizes.limit is None:
        net.run(0.05)
    assert net.now - since <= 1.0
    assert net.prober["a"].sizes.limit == limit
    net.run(3)
    assert limit - STEP < net.prober["a"].sizes.limit <= limit


def test_a_report_that_is_too_small_is_soon_corrected():
    """The path has a limit, and a forged report gives a smaller limit."""
    net = started(traffic="a")
    net.passes = lambda key, size, now: size <= 1372
    net.prober.hint("a", 524)
    net.run(5)
    assert net.prober["a"].sizes.limit == 1372


@pytest.mark.parametrize("seed", SEEDS)
def test_a_limit_that_nobody_reports_is_found_within_six_seconds(seed):
    net = started(traffic="a", seed=seed)
    net.passes = lambda key, size, now: size <= 1372
    since = net.now
    while net.prober["a"].sizes.limit is None:
        net.run(0.05)
    assert net.now - since <= 6
    assert net.prober["a"].sizes.limit == 1372  # the first limit that is set is the final one


@pytest.mark.parametrize(("low", "high"), [(1000, FULL), (1000, 1100), (524, 1372)])
def test_a_limit_rises_within_seconds(low, high):
    net = started(traffic="a")
    net.passes = lambda key, size, now: size <= low
    net.run(20)
    net.passes = lambda key, size, now: size <= high
    net.run(RETRY_SECONDS + 5)
    limit = net.prober["a"].sizes.limit
    assert limit is None if high == FULL else high - STEP < limit <= high


def test_reports_about_many_peers_cause_few_probes():
    net = started(range(500))
    since, before = net.now, len(net.sent)
    while net.now < since + 5:
        for key in range(500):
            net.prober.hint(key, 524)
        net.run(0.1)
    idle = 5 * 500 / 10
    assert len(net.sent) - before <= idle * 1.3 + 3 * HINTS_PER_SECOND * 6


@pytest.mark.parametrize("busy", [[0], range(40)], ids=["traffic", "traffic of all"])
def test_forged_reports_about_others_do_not_delay_a_true_one(busy):
    """Forged reports about other peers use up the budget, before and after the true report."""
    net = started(range(200), traffic=busy)
    forged = busy[1:] or range(1, 200)
    since = net.now
    for turn in range(100):
        for key in forged:
            net.prober.hint(key, 524)
        if turn == 30:
            since = net.now
            net.passes = lambda key, size, now: key != 0 or size <= 1000
            net.prober.hint(0, 1000)  # only once: then the sender of the data waits for an answer
        net.run(0.1)
        if net.prober[0].sizes.limit:
            break
    assert turn >= 30
    assert net.now - since <= 2.0


def test_a_report_during_an_outage_is_ignored():
    net = started(traffic="a")
    net.passes = lambda key, size, now: False
    net.run(10)
    net.prober.hint("a", 524)
    net.passes = lambda key, size, now: True
    net.run(20)
    assert net.prober["a"].sizes.limit is None
    assert net.prober["a"].sizes.full_passes


def test_heavy_loss_sets_no_limit_for_long():
    net = started(traffic="a")
    net.passes = lambda key, size, now: net.prober._rng.random() > 0.3
    net.run(300)
    net.passes = lambda key, size, now: True
    net.run(RETRY_SECONDS + 2)
    assert net.prober["a"].sizes.limit is None
