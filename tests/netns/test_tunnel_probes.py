"""Probes between two forwarders: what each reports when the network between them fails."""

import contextlib
import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.netns.netns_traffic import ACCELERATED, UdpFlow, assert_invariant
from udptun.lab import Pair, pair, wait_for
from udptun.lab.pair import Side

LIMIT = 1200  # bytes of the outer packet
STEP = 8  # the search for the largest size ends when its bounds are this close


def probing(lab, **options: Any) -> Pair:
    """Return a pair that has found each other reachable, with the full size."""
    tunnel = pair(lab, start=False, **options)
    for side, other in (tunnel.sides, tunnel.sides[::-1]):
        side.options["routes"] = [f"{route} probe" for route in side.routes_to(other)]
        side.start(wait=False)
    for side in tunnel.sides:
        side.forwarder.wait_ready()
        await_path(side, state="reachable", full_size_passes=True)
    return tunnel


def path(side: Side) -> dict[str, Any] | None:
    """Return what the side reports about the path to its only peer; None: it does not probe it."""
    (peer,) = side.forwarder.get("/v1/peers")["peers"]
    found: dict[str, Any] | None = peer["probe"]
    return found


def await_path(side: Side, **wanted: Any) -> dict[str, Any]:
    def reported() -> dict[str, Any] | None:
        found = path(side)
        return found if found is not None and wanted.items() <= found.items() else None

    try:
        return wait_for(reported, f"{wanted} on {side.host.name}", 60)
    except Exception as e:
        raise AssertionError(f"{e}: {path(side)}") from None


@contextlib.contextmanager
def blocked(side: Side, rule: str) -> Iterator[None]:
    """Drop the incoming tunnel datagrams that match an nft expression."""
    side.host.nft(
        "table inet block {\n chain c {\n  type filter hook input priority -10;\n"
        f"  udp dport 8285 {rule} drop\n }}\n}}\n"
    )
    try:
        yield
    finally:
        side.host.nft("delete table inet block\n")


@contextlib.contextmanager
def traffic(tunnel: Pair) -> Iterator[None]:
    """Let the pair have traffic, so that the verdicts come within seconds."""
    ping = tunnel.a.host.start(["ping", "-i", "0.2", str(tunnel.b.v4)])
    try:
        yield
    finally:
        ping.stop()


def ask(side: Side, **body: Any) -> tuple[int, dict[str, Any]]:
    """Request one probe now. Return the HTTP status and the answer."""
    return side.forwarder.request("POST", "/v1/probe", json.dumps(body).encode())


def events(side: Side) -> list[dict[str, Any]]:
    lines = side.forwarder.udptun("events", "-o", "json").stdout.splitlines()
    found = [json.loads(line) for line in lines]
    return [event for event in found if event["type"].startswith("peer_")]


@pytest.mark.parametrize(("outer", "mode"), [(4, "strict"), (6, "peer"), (4, "off")])
def test_peers_answer_in_each_mode_and_probes_are_not_packets(lab, mode, outer):
    tunnel = probing(lab, outer=outer, source_check=mode)
    a, b = tunnel.sides
    for side in tunnel.sides:
        found = path(side)
        assert found["rtt_us"] > 0
        assert found["loss"] == 0
        assert found["largest_size"] == side.forwarder.status()["device"]["mtu"]
        assert found["reason"] == ""
    before = [side.forwarder.status()["peers"][0] for side in tunnel.sides]
    with UdpFlow(a.host, b.host, b.v4) as flow:
        flow.exchange([b"x" * 100] * 50)
    after = [side.forwarder.status()["peers"][0] for side in tunnel.sides]
    assert after[0]["encap"]["packets"] >= before[0]["encap"]["packets"] + 50
    assert after[1]["decap"]["bytes"] >= before[1]["decap"]["bytes"] + 50 * 128
    for side in tunnel.sides:
        packets = assert_invariant(side.forwarder)
        assert packets["decap"]["consumed"] >= 2
        assert not [key for key in side.forwarder.drops() if key[0] == "decap"]


@pytest.mark.skipif(ACCELERATED, reason="nftables does not see packets of the express path")
def test_one_direction_that_fails_is_reported_by_both_and_named(lab):
    tunnel = probing(lab)
    a, b = tunnel.sides
    with traffic(tunnel):
        with blocked(b, f"ip saddr {a.outer}"):
            for side in tunnel.sides:
                await_path(side, state="unreachable")
            wait_for(
                lambda: "arrive, but it has received no probe" in path(a)["reason"],
                "a to report that only its packets are lost", 60,
            )
            assert "arrive" not in path(b)["reason"]
            table = a.forwarder.udptun("peers").stdout
            assert "unreachable" in table
            assert "probes in a row were not answered" in table
        for side in tunnel.sides:
            await_path(side, state="reachable")
    seen = [event["type"] for event in events(a)]
    assert seen[-2:] == ["peer_unreachable", "peer_reachable"]
    assert {event["endpoint"] for event in events(a)} == {f"{b.outer}:8285"}
    for side in tunnel.sides:
        assert_invariant(side.forwarder)


def test_large_packets_that_are_lost_are_reported(lab):
    tunnel = probing(lab)
    a, b = tunnel.sides
    with traffic(tunnel):
        with blocked(b, f"meta length > {LIMIT}"):
            await_path(a, state="reachable", full_size_passes=False)
            assert "(limited)" in a.forwarder.udptun("peers").stdout
        ask(a, endpoint=f"{b.outer}:8285", size=1472)  # do not wait for the next try of this size
        assert path(a)["full_size_passes"]
        assert path(a)["largest_size"] == 1472
    assert [event["type"] for event in events(a)][-2:] == ["peer_size", "peer_size"]


@pytest.mark.slow
def test_the_largest_size_that_passes_is_found(lab):
    tunnel = probing(lab)
    a, b = tunnel.sides
    with traffic(tunnel):
        with blocked(b, f"meta length > {LIMIT}"):
            await_path(a, state="reachable", full_size_passes=False)
            wait_for(
                lambda: LIMIT - 28 - STEP < path(a)["largest_size"] <= LIMIT - 28,
                "the largest size", 90,
            )
        await_path(a, full_size_passes=True)
    assert "peer_unreachable" not in {event["type"] for event in events(a)}


def test_a_peer_that_restarts_is_unreachable_in_between(lab):
    tunnel = probing(lab)
    a, b = tunnel.sides
    with traffic(tunnel):
        b.forwarder.stop()
        await_path(a, state="unreachable")
        assert ask(a, endpoint=f"{b.outer}:8285")[1]["answered"] is False
        b.start()
        await_path(a, state="reachable")
    await_path(b, state="reachable")


def test_one_probe_on_request(lab):
    tunnel = probing(lab)
    a, b = tunnel.sides
    endpoint = f"{b.outer}:8285"
    status, answer = ask(a, endpoint=endpoint)
    assert (status, answer["answered"], answer["size"]) == (200, True, 24)
    assert answer["rtt_us"] > 0
    assert ask(a, endpoint=endpoint, size=1472)[1]["answered"]
    assert ask(a, endpoint=endpoint, size=1473)[1].items() >= {
        "answered": False, "rtt_us": None, "size": 1473, "error": "Message too long",
    }.items()
    with blocked(b, f"ip saddr {a.outer}"):
        assert ask(a, endpoint=endpoint)[1].items() >= {
            "answered": False, "rtt_us": None, "size": 24, "error": "no answer within 1 s",
        }.items()
    for body in ({"endpoint": "192.0.2.99"}, {"endpoint": endpoint, "size": 23},
                 {"endpoint": endpoint, "size": 65508}, {"endpoint": f"{b.outer}:9"}):
        status, answer = ask(a, **body)
        assert (status, answer["error"]["code"]) == (400, "bad_request")


def test_a_route_that_loses_probe_ends_the_probes(lab):
    tunnel = probing(lab)
    a, b = tunnel.sides
    for route in a.routes_to(b):
        a.forwarder.udptun("route", "replace", *route.split())
    wait_for(lambda: path(a) is None, "the probes to end")
    sent = a.forwarder.get("/v1/status")["packets"]["encap"]["generated"]
    with traffic(tunnel):
        await_path(b, state="unreachable")  # a does not answer either
    assert a.forwarder.get("/v1/status")["packets"]["encap"]["generated"] == sent
    for route in a.routes_to(b):
        a.forwarder.udptun("route", "replace", *route.split(), "probe")
    for side in tunnel.sides:
        await_path(side, state="reachable")
