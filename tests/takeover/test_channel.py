"""The descriptors that arrive with the messages of a take-over: none stays open unused."""

import os
import socket
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from udptun.takeover.channel import Channel, close_all
from udptun.takeover.message import (
    Descriptors,
    Done,
    Hello,
    Ready,
    Refused,
    State,
    Stopped,
    TakeOverError,
    encode,
)


@contextmanager
def channel():
    """Yield a channel and the socket at its other end."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    made = Channel(ours)
    try:
        yield made, theirs
    finally:
        made.close()
        theirs.close()


MARK = "udptun-test-channel"  # names the files that are sent, so that they are known by it


def send(sock, message, fds_n=0):
    """Send a message with descriptors, which stay open only at the receiver."""
    fds = [os.memfd_create(MARK) for _ in range(fds_n)]
    data = message if isinstance(message, bytes) else encode(message)
    socket.send_fds(sock, [data], fds)
    for fd in fds:
        os.close(fd)


def received_n():
    """Count the open descriptors that were sent. Other threads open and close theirs meanwhile."""
    return sum(MARK in target for target in links())


def links():
    for entry in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):
            yield str(entry.readlink())


@pytest.mark.parametrize(("message", "expected"), [
    (Hello(), 0), (Done(), 0), (State(), 1), (Stopped(), 1), (Ready(), 3),
    (Descriptors(["a", "b", "c"]), 3)], ids=lambda one: getattr(one, "kind", None))
async def test_only_the_expected_descriptors_are_received(message, expected):
    with channel() as (ours, theirs):
        send(theirs, message, 3)
        received, fds = await ours.receive(type(message))
        assert (received, len(fds)) == (message, expected)
        assert received_n() == expected
        close_all({str(fd): fd for fd in fds})
        assert received_n() == 0


@pytest.mark.parametrize("message", [
    Refused("no"), Done(), b"{}", b'{"type": "hello", "pid": "x"}', b"[" * 9000],
    ids=["refused", "another message", "no type", "a wrong value", "too deep"])
async def test_a_refused_message_leaves_no_descriptor(message):
    with channel() as (ours, theirs):
        send(theirs, message, 3)
        with pytest.raises(TakeOverError):
            await ours.receive(Hello)
        assert received_n() == 0


async def test_an_unknown_message_leaves_no_descriptor():
    with channel() as (ours, theirs):
        send(theirs, b'{"type": "of a later version"}', 3)
        send(theirs, Hello())
        await ours.receive(Hello)
        assert received_n() == 0


@pytest.mark.parametrize("message", [State(), Stopped()])
async def test_a_message_without_its_descriptor_is_refused(message):
    with channel() as (ours, theirs):
        send(theirs, message)
        with pytest.raises(TakeOverError, match=f"{message.kind} carries no descriptor"):
            await ours.receive(type(message))


@pytest.mark.parametrize(("names", "fds_n"), [(["a"], 3), (["a", "b"], 1), (["a", "a"], 2)])
async def test_descriptors_without_a_name_of_their_own_are_refused(names, fds_n):
    with channel() as (ours, theirs):
        send(theirs, Descriptors(["a", "b"], more=True), 2)
        send(theirs, Descriptors(names), fds_n)
        with pytest.raises(TakeOverError):
            await ours.receive_descriptors()
        assert received_n() == 0
