"""The messages to systemd, on the same kind of socket as systemd's."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket

import pytest

from udptun.notify import Notifier


@pytest.fixture(params=["path", "abstract"])
def systemd(request, tmp_path):
    """Return a socket like systemd's, and the value of NOTIFY_SOCKET for this socket."""
    name = str(tmp_path / "notify") if request.param == "path" else f"@udptun-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.settimeout(60)
        sock.bind("\0" + name[1:] if name[0] == "@" else name)
        yield sock, name


def test_each_message(systemd):
    sock, name = systemd
    notifier = Notifier.from_environment({"NOTIFY_SOCKET": name})
    notifier.ready("10.42.0.0/24, 3 peers")
    notifier.status("two\nlines are one")
    notifier.status("")
    notifier.watchdog()
    notifier.stopping("going")
    notifier.ready()
    assert [sock.recv(4096).decode() for _ in range(6)] == [
        "READY=1\nSTATUS=10.42.0.0/24, 3 peers", "STATUS=two lines are one", "STATUS=",
        "WATCHDOG=1",
        "STOPPING=1\nSTATUS=going", "READY=1",
    ]


def test_reloading_sends_the_monotonic_time(systemd):
    sock, name = systemd
    Notifier(name).reloading()
    first, second = sock.recv(4096).decode().split("\n")
    assert first == "RELOADING=1"
    assert second.startswith("MONOTONIC_USEC=")
    assert second.removeprefix("MONOTONIC_USEC=").isdigit()


def test_child_processes_do_not_inherit_notify_variables(systemd):
    environ = {"NOTIFY_SOCKET": systemd[1], "WATCHDOG_USEC": "1000000",
               "WATCHDOG_PID": str(os.getpid()), "HOME": "/root"}
    assert Notifier.from_environment(environ).watchdog_s == 1
    assert environ == {"HOME": "/root"}


@pytest.mark.parametrize(("environ", "want"), [
    ({"WATCHDOG_USEC": "30000000"}, 30),
    ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "1"}, None),  # the PID of another process
    ({}, None),
    ({"WATCHDOG_USEC": "soon"}, None),
    ({"WATCHDOG_USEC": "0"}, None),
    ({"WATCHDOG_USEC": "30000000", "NOTIFY_SOCKET": ""}, None),
])
def test_the_watchdogs_interval(environ, want):
    assert Notifier.from_environment({"NOTIFY_SOCKET": "/x", **environ}).watchdog_s == want


async def test_the_watchdog_is_fed_while_we_are_alive(systemd):
    """The watchdog is notified twice per interval. If the daemon hangs, the watchdog is not
    notified, so systemd ends the daemon."""
    sock, name = systemd
    sock.setblocking(False)
    loop = asyncio.get_running_loop()
    alive = True
    asked = 0

    async def is_alive():
        nonlocal asked
        asked += 1
        return alive

    task = asyncio.create_task(Notifier(name, watchdog_s=0.02).feed(is_alive))
    for _ in range(3):
        async with asyncio.timeout(60):
            assert await loop.sock_recv(sock, 4096) == b"WATCHDOG=1"
    with contextlib.suppress(BlockingIOError):
        while True:
            sock.recv(4096)
    alive, asked = False, 0
    async with asyncio.timeout(60):
        while asked < 3:
            await asyncio.sleep(0.001)
    with pytest.raises(BlockingIOError):
        sock.recv(4096)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_without_systemd_no_notification_is_sent(caplog):
    notifier = Notifier.from_environment({})
    notifier.ready()
    notifier.reloading()
    notifier.stopping()
    await notifier.feed(None)
    assert not caplog.records


def test_descriptors_are_kept_by_name(systemd):
    sock, name = systemd
    read, write = os.pipe()
    try:
        Notifier(name).keep({"tun-0": read})
        assert sock.recv(4096) == b"FDSTOREREMOVE=1\nFDNAME=tun-0"
        text, [copy], _, _ = socket.recv_fds(sock, 4096, 1)
        assert text.decode().split("\n")[:2] == ["FDSTORE=1", "FDNAME=tun-0"]
        os.write(write, b"x")
        assert os.read(copy, 1) == b"x"
        os.close(copy)
    finally:
        os.close(read)
        os.close(write)


def test_a_missing_socket_is_logged_once(tmp_path, caplog):
    notifier = Notifier(str(tmp_path / "gone"))
    notifier.ready()
    notifier.watchdog()
    (record,) = caplog.records
    assert "No such file" in record.getMessage()


def test_a_hanging_systemd_does_not_block_the_daemon(systemd, caplog, monkeypatch):
    monkeypatch.setattr("udptun.notify.SEND_TIMEOUT_S", 0.01)
    notifier = Notifier(systemd[1])
    for _ in range(10_000):  # no process reads, so the queue fills up
        notifier.watchdog()
        if caplog.records:
            break
    assert "timed out" in caplog.text
