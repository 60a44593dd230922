"""The search for the longest gap in a record of arrivals."""

from array import array

from bench.metrics.gap import arrivals, longest_gap

MS = 1_000_000


def steady(n, delays=(), pauses=()):
    """Return the arrivals of ``n`` packets, one per ms.

    delays  {sequence number: ns}: the tunnel delays this packet
    pauses  {sequence number: ns}: the sender pauses before this packet
    """
    delays, pauses = dict(delays), dict(pauses)
    found, clock = [], 0
    for i in range(n):
        clock += MS + pauses.get(i, 0)
        found.append((i, clock, clock + 100 + delays.get(i, 0)))
    return found


def test_the_file_of_udpload_is_parsed():
    assert arrivals(array("q", [0, 10, 20, 1, 30, 45]).tobytes()) == [(0, 10, 20), (1, 30, 45)]


def test_a_steady_stream_has_no_gap():
    assert longest_gap(steady(10), 0, 100 * MS) == 0


def test_a_stall_of_the_tunnel_is_a_gap():
    assert longest_gap(steady(10, delays={5: 3 * MS}), 0, 100 * MS) == 3 * MS


def test_a_pause_of_the_sender_is_not_a_gap():
    assert longest_gap(steady(10, pauses={5: 3 * MS}), 0, 100 * MS) == 0


def test_a_stall_before_the_window_does_not_count():
    assert longest_gap(steady(20, delays={2: 500}), 10 * MS, 15 * MS) == 0


def test_a_stall_counts_if_it_ends_after_the_window():
    recorded = steady(20, delays={i: (12 - i) * MS for i in range(8, 12)})
    assert longest_gap(recorded, 8 * MS, 9 * MS) == 4 * MS


def test_a_lost_packet_is_not_a_gap():
    recorded = [row for row in steady(10) if row[0] != 5]
    assert longest_gap(recorded, 0, 100 * MS) == 0


def test_an_empty_window_gives_a_negative_gap():
    assert longest_gap([], 0, MS) < 0
