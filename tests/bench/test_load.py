"""What the output of the load generators means; the busy loops; the plot of distributions."""

import os
from types import SimpleNamespace

import pytest

from bench import load, plots
from udptun.lab import LabError

PING = """\
PING 10.244.2.0 (10.244.2.0) 64(92) bytes of data.
72 bytes from 10.244.2.0: icmp_seq=1 ttl=64 time=0.040 ms
72 bytes from 10.244.2.0: icmp_seq=2 ttl=64 time=1.20 ms
72 bytes from 10.244.2.0: icmp_seq=3 ttl=64 time=0.060 ms

--- 10.244.2.0 ping statistics ---
4 packets transmitted, 3 received, 25% packet loss, time 6ms
rtt min/avg/max/mdev = 0.040/0.433/1.200/0.542 ms
"""
IPERF = """\
Server listening on 5301 (test #1)
[ ID] Interval           Transfer     Bitrate
[  5]   0.00-0.20   sec  24.0 MBytes  1000000 Kbits/sec
[  5]   0.20-0.40   sec  96.0 MBytes  4000000 Kbits/sec
[  5]   0.40-0.60   sec   144 MBytes  6000000 Kbits/sec
"""


def test_pings_give_quantiles_in_ns():
    found = load.ping_result(PING)
    assert (found["sent"], found["received"]) == (4, 3)
    assert found["p50_ns"] == pytest.approx(60_000)
    assert found["quantiles_ns"][0] == [0, pytest.approx(40_000)]
    assert found["quantiles_ns"][-1] == [1, pytest.approx(1_200_000)]


def test_pings_without_a_reply_have_no_quantiles():
    text = "2 packets transmitted, 0 received, 100% packet loss, time 2ms"
    assert load.ping_result(text) == {"sent": 2, "received": 0, "quantiles_ns": []}
    with pytest.raises(LabError, match="Network is unreachable"):
        load.ping_result("ping: connect: Network is unreachable")


def test_the_rate_of_a_bulk_stream_is_that_since_the_mark():
    server = SimpleNamespace(text=lambda: IPERF.rpartition("[")[0])
    stream = load.Bulk(server)
    stream.mark()
    with pytest.raises(LabError, match="no interval"):
        stream.rate()
    server.text = lambda: IPERF
    assert stream.rate() == pytest.approx(6e9)
    assert load.Bulk(server).rate() == pytest.approx(11e9 / 3)


def test_the_quantiles_of_udpload_and_of_ping_are_the_same():
    """The plot of the distributions has both."""
    text = (load.program("udpload").with_suffix(".c")).read_text()
    shown = text.partition("shown[] = {")[2].partition("}")[0]
    assert [float(word) for word in shown.replace(",", " ").split()] == list(load._QUANTILES)


def test_a_typical_distribution_has_the_median_of_each_quantile():
    slots = [[[0.5, 10], [0.99, 90]], [[0.5, 12], [0.99, 20]], [[0.5, 50], [0.99, 30]]]
    assert plots.typical(slots) == [(0.5, 12), (0.99, 30)]


def test_there_is_one_busy_loop_on_each_core():
    started = []

    class Loop:
        alive = True

        def kill(self):
            self.alive = False

    def start(argv, name):
        started.append((argv, Loop()))
        return started[-1][1]

    with load.busy(SimpleNamespace(a=SimpleNamespace(start=start))):
        assert [int(argv[2]) for argv, _ in started] == sorted(os.sched_getaffinity(0))
        assert all(loop.alive for _, loop in started)
    assert not any(loop.alive for _, loop in started)
