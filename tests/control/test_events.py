"""The event hub: every reader gets all events. If it loses events, it gets the number of them."""

from __future__ import annotations

import asyncio

import pytest

from udptun.control import events
from udptun.control.events import EventHub
from udptun.control.protocol import RECENT_EVENTS


async def test_reader_gets_the_events_after_its_subscription():
    hub = EventHub()
    hub.emit("error", message="before")
    with hub.subscribe() as one, hub.subscribe() as other:
        hub.emit("error", message="first")
        hub.emit("error", message="second")
        assert [event["message"] for event in await one.take()] == ["first", "second"]
        assert (await anext(other))["message"] == "first"
        assert hub.readers_n == 2
        hub.emit("error", message="third")
        assert [event["message"] for event in await other.take()] == ["second", "third"]
    assert hub.readers_n == 0
    assert next(event["message"] for event in hub.recent) == "before"


async def test_recent_events_are_bounded():
    hub = EventHub()
    for number in range(RECENT_EVENTS + 5):
        hub.emit("error", message=number)
    assert [event["message"] for event in hub.recent] == [*range(5, RECENT_EVENTS + 5)]


@pytest.mark.parametrize("batches", [True, False])
async def test_full_queue_loses_the_oldest_events_and_reports_it_once(monkeypatch, batches):
    monkeypatch.setattr(events, "QUEUE_N", 3)
    hub = EventHub()
    with hub.subscribe() as reader:
        for number in range(5):
            hub.emit("error", message=number)
        got = await reader.take() if batches else [await anext(reader) for _ in range(4)]
        assert got[0]["lost"] == 2
        assert [event["message"] for event in got[1:]] == [2, 3, 4]
        hub.emit("error", message=5)
        assert (await anext(reader))["message"] == 5


@pytest.mark.parametrize("batches", [True, False])
async def test_close_ends_readers_after_their_last_event(batches):
    hub = EventHub()
    with hub.subscribe() as reader:
        hub.emit("error", message="last")
        hub.close()
        if batches:
            assert len(await reader.take()) == 1
            assert await reader.take() == []
        else:
            assert [event["message"] async for event in reader] == ["last"]
        waiting = hub.subscribe()
        with waiting as late:
            task = asyncio.create_task(late.take())
            await asyncio.sleep(0)
            hub.close()
            assert await task == []
