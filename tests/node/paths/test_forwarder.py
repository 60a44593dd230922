"""The copy of what the forwarder has measured: read, changed by events, asked, and lost."""

from __future__ import annotations

import asyncio
import time

import pytest

from tests.control.fakes import LoopThread, Served, thread  # noqa: F401
from tests.wait import until
from udptun.node.paths import forwarder as module
from udptun.node.paths import meters as meters_module
from udptun.node.paths.forwarder import ForwarderView
from udptun.node.paths.meters import Meters

ENDPOINT = "192.0.2.2:8285"


@pytest.fixture
def path(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "GONE_SECONDS", 0.2)
    monkeypatch.setattr(module, "RECONNECT_SECONDS", 0.05)
    return tmp_path / "udptun.sock"


async def test_the_view_follows_the_forwarder(path, thread):  # noqa: F811
    changes = []
    view = ForwarderView(path, changes.append)
    try:
        await until(lambda: view.gone, "the forwarder to be missed")
        assert view.probe(ENDPOINT) == {}
        with Served(thread, path) as served:
            await until(lambda: view.probe(ENDPOINT), "the first read")
            assert not view.gone
            assert view.probe(ENDPOINT)["state"] == "reachable"
            assert changes[-1] is None
            served.events({
                "time": "2026-01-31T08:00:00.000+00:00", "type": "peer_unreachable",
                "endpoint": ENDPOINT, "path": "udp", "reason": "no answer", "rtt_us": 5,
                "largest_size": 1000, "full_size_passes": False})
            await until(lambda: view.probe(ENDPOINT)["state"] == "unreachable", "the event")
            found = view.probe(ENDPOINT)
            assert (found["reason"], found["full_size_passes"]) == ("no answer", False)
            assert changes[-1] == (ENDPOINT,)
            served.events({
                "time": "x", "type": "peer_size", "endpoint": ENDPOINT, "reason": "",
                "largest_size": 1400, "full_size_passes": True})
            await until(lambda: view.probe(ENDPOINT)["full_size_passes"], "the event")
            assert view.probe(ENDPOINT)["state"] == "unreachable"
            await view.refresh()
            assert view.probe(ENDPOINT)["state"] == "reachable"
            assert changes[-1] == [ENDPOINT]
            await view.refresh()
            assert changes[-1] == []
        await until(lambda: view.gone, "the end to be noticed")
        assert view.probe(ENDPOINT) == {}
        with Served(thread, path):  # a forwarder that was started again
            await until(lambda: not view.gone and view.probe(ENDPOINT), "the next one")
    finally:
        view.close()
    await asyncio.to_thread(view._thread.join, 20)
    assert not view._thread.is_alive()


async def test_asking(path, thread):  # noqa: F811
    view = ForwarderView(path, lambda _: None)
    try:
        assert await view.ask(ENDPOINT) is None  # no forwarder
        with Served(thread, path):
            assert await view.ask(ENDPOINT, 1000) is True
            assert await view.ask("192.0.2.99:8285") is None  # not a peer that is probed
    finally:
        view.close()


async def test_the_forwarder_is_told_which_paths_are_standby(path, thread):  # noqa: F811
    view = ForwarderView(path, lambda _: None)
    many = {f"192.0.{i // 250}.{i % 250}:8285" for i in range(1200)}
    try:
        await view.set_standby(frozenset(many))  # no forwarder
        with Served(thread, path) as served:
            await until(lambda: view.probe(ENDPOINT), "the first read")
            assert served.forwarder.standby == dict.fromkeys(many, True)
            await view.set_standby(frozenset(many - {ENDPOINT}) | {"192.0.9.9:8285"})
            assert served.forwarder.standby[ENDPOINT] is False
            assert served.forwarder.standby["192.0.9.9:8285"] is True
            served.forwarder.standby.clear()
            await view.repeat_standby()
            assert len(served.forwarder.standby) == 1200
    finally:
        view.close()


async def test_old_measurements_are_read_again_for_the_status(path, thread, monkeypatch):  # noqa: F811
    meters = Meters(path, lambda _: None)
    await meters.freshen()  # the forwarder measures nothing
    meters._follow_forwarder()
    view = meters._forwarder
    try:
        with Served(thread, path) as served:
            await until(lambda: view.probe(ENDPOINT), "the first read")
            served.forwarder.more_peers = [{
                "endpoint": "192.0.2.9:8285", "probe": None,
                "last_error": {"text": "host unreachable", "seconds_ago": 1.0}}]
            await meters.freshen()
            assert view.error("192.0.2.9:8285", 0.0) == ""  # the first read is not old
            monkeypatch.setattr(meters_module, "FRESH_SECONDS", 0.0)
            await meters.freshen()
            assert view.error("192.0.2.9:8285", 0.0) == "host unreachable"
        await meters.freshen()  # no forwarder
    finally:
        view.close()


async def test_the_errors_of_peers_that_the_forwarder_does_not_probe(path, thread):  # noqa: F811
    view = ForwarderView(path, lambda _: None)
    began = time.monotonic()
    try:
        with Served(thread, path) as served:
            served.forwarder.more_peers = [{
                "endpoint": "192.0.2.9:8285", "probe": None,
                "last_error": {"text": "host unreachable", "seconds_ago": 1.0}}]
            await view.refresh()
            assert view.error("192.0.2.9:8285", began - 60) == "host unreachable"
            assert view.error("192.0.2.9:8285", time.monotonic()) == ""  # older than this
            assert view.error("192.0.2.7:8285", 0.0) == ""
            assert view.error(ENDPOINT, 0.0) == ""  # part of what the forwarder reports
    finally:
        view.close()
