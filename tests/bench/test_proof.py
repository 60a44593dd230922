"""What the counters say, and when a figure is refused."""

import json

import pytest

from bench.proof import Count, judge, parse

GOOD = Count(packets=3, bytes=140_000, frames=100, frames_bytes=144_000)
NOTHING = Count()


def test_parse_and_subtract():
    counters = [
        {"metainfo": {"version": "1"}},
        {"counter": {"name": "carried", "packets": 7, "bytes": 900}},
        {"counter": {"name": "fragments", "packets": 1, "bytes": 20}},
    ]
    device = [{"stats64": {"rx": {"packets": 11, "bytes": 61000}, "tx": {}}}]
    found = parse(json.dumps({"nftables": counters}), json.dumps(device))
    assert found == Count(7, 900 - 7 * 14, 1, 11, 61000)
    assert found - Count(5, 800, 1, 10, 1000) == Count(2, 2, 0, 1, 60000)


@pytest.mark.parametrize("profile", ["P1", "P2", "P3"])
def test_bytes_that_crossed_are_proved(profile):
    assert judge(profile, (139_000, 0), (GOOD, NOTHING)) is None
    assert judge(profile, (0, 139_000), (NOTHING, GOOD)) is None


def test_large_frames_are_no_objection_where_super_packets_cross():
    assert judge("P1", (60_000, 0), (Count(1, 64_000, 0, 1, 64_014), NOTHING)) is None


@pytest.mark.parametrize(
    ("profile", "received", "counted", "words"),
    [
        ("P1", (140_001, 0), (GOOD, NOTHING), "140001 bytes were received at b, 140000 crossed"),
        ("P1", (0, 1), (GOOD, NOTHING), "received at a, 0 crossed"),
        ("P1", (1, 0), (Count(1, 1500, fragments=2), NOTHING), "2 IP fragments went to b"),
        ("P2", (1, 0), (Count(1, 1500, frames=1, frames_bytes=1515), NOTHING), "mean frame at b"),
        ("P3", (0, 1), (NOTHING, Count(1, 1500, frames=1, frames_bytes=1515)), "mean frame at a"),
    ],
)
def test_what_is_refused(profile, received, counted, words):
    assert words in judge(profile, received, counted)
