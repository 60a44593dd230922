"""The parser of the counters on the wire, and the reasons to refuse a figure."""

import json

import pytest

from bench.proof import WireCount, parse, refusal_reason

GOOD = WireCount(packets=3, bytes=140_000, frames=100, frames_bytes=144_000)
NOTHING = WireCount()
LARGE = WireCount(1, 1500, frames=1, frames_bytes=1515)


def test_parse_and_subtract():
    counters = [
        {"metainfo": {"version": "1"}},
        {"counter": {"name": "carried", "packets": 7, "bytes": 900}},
        {"counter": {"name": "fragments", "packets": 1, "bytes": 20}},
    ]
    device = [{"stats64": {"rx": {"packets": 11, "bytes": 61000}, "tx": {}}}]
    found = parse(json.dumps({"nftables": counters}), json.dumps(device))
    assert found == WireCount(7, 900 - 7 * 14, 1, 11, 61000)
    assert found - WireCount(5, 800, 1, 10, 1000) == WireCount(2, 2, 0, 1, 60000)


@pytest.mark.parametrize("profile", ["P1", "P2", "P3", "P4"])
def test_counters_that_match_the_received_bytes_are_accepted(profile):
    assert refusal_reason(profile, (139_000, 0), (GOOD, NOTHING)) is None
    assert refusal_reason(profile, (0, 139_000), (NOTHING, GOOD)) is None


@pytest.mark.parametrize("profile", ["P1", "P4"])
def test_large_frames_are_accepted_where_super_packets_cross_the_wire(profile):
    counted = WireCount(1, 64_000, 0, 1, 64_014), NOTHING
    assert refusal_reason(profile, (60_000, 0), counted) is None


@pytest.mark.parametrize(
    ("profile", "received", "counted", "text"),
    [
        ("P1", (140_001, 0), (GOOD, NOTHING),
         "140001 bytes were received at b, only 140000 crossed"),
        ("P1", (0, 1), (GOOD, NOTHING), "received at a, only 0 crossed"),
        ("P1", (1, 0), (WireCount(1, 1500, fragments=2), NOTHING), "2 IP fragments were sent to b"),
        ("P2", (1, 0), (LARGE, NOTHING), "packet size on the wire to b was 1501 bytes"),
        ("P3", (0, 1), (NOTHING, LARGE), "packet size on the wire to a was 1501 bytes"),
    ],
)
def test_a_figure_without_proof_is_refused(profile, received, counted, text):
    assert text in refusal_reason(profile, received, counted)
