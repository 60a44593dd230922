"""The etcd client without an etcd: what happens to a watch when another request fails."""

import asyncio
import contextlib

import pytest

from udptun.leases.base import StoreDown
from udptun.leases.etcd import client as module
from udptun.leases.etcd import messages
from udptun.leases.etcd.client import Client
from udptun.leases.etcd.config import EtcdConfig


@pytest.mark.unprivileged
@pytest.mark.parametrize("turns", range(1, 6))
async def test_a_watch_ends_if_its_channel_is_closed_while_it_is_requested(turns, monkeypatch):
    """In an outage, a failed request closes the channel that all requests share."""
    monkeypatch.setattr(module, "WATCH_RESPONSE_S", 0.5)
    client = Client(EtcdConfig(("http://127.0.0.1:1",)), lambda: None)  # nothing listens there

    async def watch():
        create = messages.WatchCreateRequest(key=b"a")
        async with contextlib.aclosing(client.watch(create)) as responses:
            await anext(responses)

    task = asyncio.create_task(watch())
    for _ in range(turns):
        await asyncio.sleep(0)
    await client.aclose()
    async with asyncio.timeout(30):
        with pytest.raises(StoreDown):
            await task
