"""The end of a take-over, at the side of the new forwarder."""

from __future__ import annotations

import asyncio
import socket

import pytest

from udptun.files import FileLock
from udptun.forwarder.taking import Taking
from udptun.takeover.channel import Channel
from udptun.takeover.document import StateDocument
from udptun.takeover.message import Done, Refused, State, TakeOverError


@pytest.fixture
def ends(tmp_path):
    """Return a take-over, a lock of it, and the channel of the other forwarder."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for one in (ours, theirs):
        one.setblocking(False)
    taking = Taking(Channel(ours), {}, State(), StateDocument())
    lock = FileLock.take(tmp_path / "lock")
    lock.owns_file = False
    taking._files["lock"] = lock
    other = Channel(theirs)
    yield taking, lock, other
    taking.close()
    other.close()
    lock.release()


async def test_a_confirmed_take_over(ends):
    taking, lock, other = ends
    done = asyncio.create_task(taking.done())
    assert (await other.receive(Done))[0].taken == ["lock"]
    other.close()
    await done
    assert lock.owns_file


async def test_the_other_forwarder_has_died(ends):
    taking, lock, other = ends
    other.close()
    await taking.done()
    assert lock.owns_file


@pytest.mark.parametrize("sent_too_late", [False, True])
async def test_the_other_forwarder_has_not_waited(ends, sent_too_late):
    """It reads no confirmation any more, so the kernel reports a reset connection."""
    taking, lock, other = ends
    if sent_too_late:
        await taking._channel.send(Done())
    await other.send(Refused("no confirmation"))
    other.close()
    with pytest.raises(TakeOverError, match="the running forwarder continues: no confirmation"):
        await taking.done()
    assert not lock.owns_file
