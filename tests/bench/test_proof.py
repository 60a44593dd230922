"""What the counters say, and when a figure is refused."""

import json

import pytest

from bench.proof import Count, judge, parse

GOOD = Count(whole=100, whole_bytes=140_000, frames=100, frames_bytes=141_400)
SUPERS = Count(supers=3, supers_bytes=180_000, frames=130, frames_bytes=182_000)
NOTHING = Count()


def test_parse_and_subtract():
    counters = [
        {"metainfo": {"version": "1"}},
        {"counter": {"name": "whole", "packets": 7, "bytes": 900}},
        {"counter": {"name": "supers", "packets": 2, "bytes": 60000}},
        {"counter": {"name": "fragments", "packets": 1, "bytes": 20}},
    ]
    device = [{"stats64": {"rx": {"packets": 11, "bytes": 61000}, "tx": {}}}]
    found = parse(json.dumps({"nftables": counters}), json.dumps(device))
    assert found == Count(7, 900, 2, 60000, 1, 11, 61000)
    assert found - Count(5, 800, 1, 30000, 1, 10, 1000) == Count(2, 100, 1, 30000, 0, 1, 60000)
    assert found.bytes == 60900


@pytest.mark.parametrize("profile", ["P1", "P2", "P3"])
def test_bytes_that_crossed_whole_are_proved(profile):
    assert judge(profile, (139_000, 0), (GOOD, NOTHING)) is None
    assert judge(profile, (0, 139_000), (NOTHING, GOOD)) is None


def test_supers_are_proof_where_they_may_cross_or_are_joined_again():
    assert judge("P1", (170_000, 0), (SUPERS, NOTHING)) is None
    assert judge("P2", (170_000, 0), (SUPERS, NOTHING)) is None


@pytest.mark.parametrize(
    ("profile", "received", "counted", "words"),
    [
        ("P1", (140_001, 0), (GOOD, NOTHING), "140001 bytes were received at b, 140000 crossed"),
        ("P1", (0, 1), (GOOD, NOTHING), "received at a, 0 crossed"),
        ("P1", (1, 0), (Count(1, 1500, fragments=2), NOTHING), "2 IP fragments came in at b"),
        ("P3", (170_000, 0), (SUPERS, NOTHING), "3 packets at b were larger than the MTU"),
        ("P2", (1, 0), (Count(1, 1500, frames=1, frames_bytes=1515), NOTHING), "mean frame at b"),
    ],
)
def test_what_is_refused(profile, received, counted, words):
    assert words in judge(profile, received, counted)
