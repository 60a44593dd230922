"""Flannel's 20-byte control messages: the format, and messages on real sockets."""

import asyncio
import ctypes
import errno
import functools
import os
import socket
import stat
import struct
import sys
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path

import pytest
import uvloop
from hypothesis import given
from hypothesis import strategies as st

from tests.control.fakes import FakeForwarder
from udptun.control import flannel, sockets
from udptun.control.flannel import DelRoute, FlannelControl, SetRoute, Stop, parse_message
from udptun.errors import DeviceError, FieldError
from udptun.model import Route

SEQPACKET = socket.SOCK_SEQPACKET
NET, PEER = "10.244.2.0", "192.0.2.2"


class Command(ctypes.Structure):
    """The struct as a C compiler builds it, without the format string that is under test."""

    _fields_ = (
        ("cmd", ctypes.c_int),
        ("dest_net", ctypes.c_uint32),
        ("dest_net_len", ctypes.c_int),
        ("next_hop_ip", ctypes.c_uint32),
        ("next_hop_port", ctypes.c_short),
    )


def message(
    cmd: int, net: str = NET, net_len: int = 24, hop: str = PEER, port: int = 8285
) -> bytes:
    def network_order(address: str) -> int:
        return int.from_bytes(IPv4Address(address).packed, sys.byteorder)

    return bytes(Command(cmd, network_order(net), net_len, network_order(hop), port))


def route(net: str = f"{NET}/24", via: str = PEER, port: int = 8285) -> Route:
    return Route(IPv4Network(net), IPv4Address(via), port)


# The format


def test_the_three_commands() -> None:
    assert len(message(1)) == flannel.MESSAGE.size == 20
    assert parse_message(message(1)) == SetRoute(route())
    assert parse_message(message(2)) == DelRoute(IPv4Network(f"{NET}/24"))
    assert parse_message(message(3, net_len=77, port=0)) == Stop()


def test_host_bits_are_masked_and_the_port_is_unsigned() -> None:
    parsed = parse_message(message(1, net="10.244.2.77", net_len=24, port=65000))
    assert parsed == SetRoute(route(port=65000))
    assert parse_message(message(2, net="255.255.255.255", net_len=0)) == DelRoute(
        IPv4Network("0.0.0.0/0")
    )


def test_golden_message() -> None:
    """flannel sends these bytes on amd64: little-endian integers, addresses in network byte order.
    """
    if sys.byteorder != "little":
        pytest.skip("the golden bytes are those of a little-endian machine")
    golden = bytes.fromhex("01000000 0af40200 18000000 c0000202 5d20 0000")
    assert parse_message(golden) == SetRoute(route())


@pytest.mark.parametrize(
    ("data", "field"),
    [
        (b"", "length"),
        (message(1)[:19], "length"),
        (message(1) + b"\0", "length"),
        (message(0), "cmd"),
        (message(4), "cmd"),
        (message(-1), "cmd"),
        (message(1, net_len=33), "dest_net_len"),
        (message(2, net_len=-1), "dest_net_len"),
        (message(1, port=0), "next_hop_port"),
    ],
)
def test_error_of_an_invalid_message_names_the_field(data: bytes, field: str) -> None:
    with pytest.raises(FieldError) as caught:
        parse_message(data)
    assert caught.value.field == field


@given(st.binary(min_size=20, max_size=20) | st.binary(max_size=40))
def test_arbitrary_bytes_parse_or_are_refused(data: bytes) -> None:
    try:
        parsed = parse_message(data)
    except FieldError:
        return
    assert isinstance(parsed, SetRoute | DelRoute | Stop)


@given(st.integers(0, 2**32 - 1), st.integers(0, 32), st.integers(0, 2**32 - 1),
       st.integers(1, 65535))
def test_every_route_is_parsed_exactly(net: int, net_len: int, hop: int, port: int) -> None:
    data = struct.pack("=i4si4sHxx", 1, net.to_bytes(4, "big"), net_len, hop.to_bytes(4, "big"),
                       port)
    dst = IPv4Network((net, net_len), strict=False)
    assert parse_message(data) == SetRoute(Route(dst, IPv4Address(hop), port))


# Connections


class WatchedForwarder(FakeForwarder):
    """A fake forwarder with which a test can wait until the server has made N calls."""

    def __init__(self) -> None:
        super().__init__()
        self._called = asyncio.Condition()

    def _call(self, what: str) -> None:
        try:
            super()._call(what)
        finally:
            asyncio.get_running_loop().create_task(self._notify())

    async def _notify(self) -> None:
        async with self._called:
            self._called.notify_all()

    async def wait_for_calls(self, count: int) -> None:
        async with self._called, asyncio.timeout(60):
            await self._called.wait_for(lambda: len(self.calls) >= count)


@dataclass
class Listening:
    control: FlannelControl
    forwarder: WatchedForwarder
    path: Path


@asynccontextmanager
async def listening(tmp_path: Path) -> AsyncIterator[Listening]:
    forwarder = WatchedForwarder()
    control = FlannelControl(forwarder)
    path = tmp_path / "flannel.sock"
    try:
        await control.listen(path)
        yield Listening(control, forwarder, path)
    finally:
        await control.close()


def with_uvloop(test: Callable[..., Coroutine[None, None, None]]) -> Callable[..., None]:
    """Run a test on uvloop, because the forwarder uses uvloop."""

    @functools.wraps(test)
    def run(*args: object, **kwargs: object) -> None:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(test(*args, **kwargs))

    return run


def connect(path: Path) -> socket.socket:
    client = socket.socket(socket.AF_UNIX, SEQPACKET)
    client.connect(str(path))
    return client


@with_uvloop
async def test_socket_has_mode_0660_and_is_removed_at_close(tmp_path: Path) -> None:
    async with listening(tmp_path) as server:
        assert stat.S_IMODE(server.path.stat().st_mode) == 0o660
        with pytest.raises(DeviceError, match="is in use"):
            await FlannelControl(FakeForwarder()).listen(server.path)
        await server.control.close()
        assert not server.path.exists()


@with_uvloop
async def test_set_route_and_delete_route(tmp_path: Path) -> None:
    async with listening(tmp_path) as server:
        with connect(server.path) as client:
            client.send(message(1))
            client.send(message(1))
            client.send(message(1, hop="192.0.2.3"))
            client.send(message(2))
            client.send(message(2))
            await server.forwarder.wait_for_calls(5)
        assert server.forwarder.calls == [
            f"put {route()}", f"put {route()}", f"put {route(via='192.0.2.3')}",
            f"delete {NET}/24", f"delete {NET}/24",
        ]
        assert server.forwarder.table == {}


@with_uvloop
async def test_burst_is_applied_in_order(tmp_path: Path) -> None:
    async with listening(tmp_path) as server:
        with connect(server.path) as client:
            client.setblocking(False)
            hops = [f"192.0.{i // 250}.{i % 250 + 1}" for i in range(1000)]
            for hop in hops:
                await asyncio.get_running_loop().sock_sendall(client, message(1, hop=hop))
            await server.forwarder.wait_for_calls(1000)
        assert server.forwarder.calls == [f"put {route(via=hop)}" for hop in hops]


@with_uvloop
async def test_stop(tmp_path: Path) -> None:
    async with listening(tmp_path) as server:
        with connect(server.path) as client:
            client.send(message(3))
            async with asyncio.timeout(60):
                await server.forwarder.stopped.wait()


@with_uvloop
async def test_bad_messages_are_skipped_and_do_not_flood_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with listening(tmp_path) as server:
        with connect(server.path) as client:
            for _ in range(20):
                client.send(b"x")
                client.send(message(9))
            client.send(b"")  # an empty message does not end the connection
            client.send(b"x" * 5000)
            client.send(message(1))
            await server.forwarder.wait_for_calls(1)
        assert server.forwarder.calls == [f"put {route()}"]
        assert len(caplog.records) == 1
        assert "message ignored: length: 1 is not valid" in caplog.text


@with_uvloop
async def test_suppressed_warnings_are_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with listening(tmp_path) as server:
        with connect(server.path) as client:
            for _ in range(3):
                client.send(b"x")
            client.send(message(1))
            await server.forwarder.wait_for_calls(1)
            server.control._quiet_until = 0.0
            client.send(b"x")
            client.send(message(1))
            await server.forwarder.wait_for_calls(2)
        assert [("and 2 more" in r.message) for r in caplog.records] == [False, True]


@with_uvloop
async def test_errors_do_not_end_the_connection(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with listening(tmp_path) as server:
        with connect(server.path) as client:
            server.forwarder.fail_with = FieldError("via", PEER, "an IPv6 address")
            client.send(message(1))
            await server.forwarder.wait_for_calls(1)
            server.forwarder.fail_with = ZeroDivisionError()
            client.send(message(1))
            await server.forwarder.wait_for_calls(2)
            server.forwarder.fail_with = None
            client.send(message(1))
            await server.forwarder.wait_for_calls(3)
        assert server.forwarder.table == {route().dst: route()}
        assert "expected an IPv6 address" in caplog.text
        assert "ZeroDivisionError" in caplog.text


@with_uvloop
async def test_several_connections(tmp_path: Path) -> None:
    async with listening(tmp_path) as server:
        with connect(server.path) as first, connect(server.path) as second:
            first.send(message(1))
            await server.forwarder.wait_for_calls(1)
            first.close()
            second.send(message(2))
            await server.forwarder.wait_for_calls(2)
        with connect(server.path) as third:
            third.send(message(1))
            await server.forwarder.wait_for_calls(3)


@with_uvloop
async def test_client_outside_the_group_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with listening(tmp_path) as server:
        monkeypatch.setattr(sockets.UnixListener, "may_connect", lambda self, peer: False)
        with connect(server.path) as client:
            client.setblocking(False)
            async with asyncio.timeout(60):
                assert await asyncio.get_running_loop().sock_recv(client, 1) == b""
        assert server.forwarder.calls == []


@with_uvloop
async def test_inherited_descriptor(tmp_path: Path) -> None:
    """flanneld starts its proxy with one end of a socket pair. Messages may already be queued."""
    async with listening(tmp_path) as server:
        ours, theirs = socket.socketpair(socket.AF_UNIX, SEQPACKET)
        ours.send(message(1))
        fd = theirs.detach()
        os.set_inheritable(fd, True)
        server.control.adopt(fd)
        ours.send(message(2))
        await server.forwarder.wait_for_calls(2)
        assert not os.get_inheritable(fd)
        ours.close()  # the same happens when flanneld ends; the forwarder must continue
        (serving,) = (t for t in server.control._tasks if t.get_coro().__name__ == "_serve")
        async with asyncio.timeout(60):
            await serving
        assert not server.forwarder.stopped.is_set()


@pytest.mark.parametrize(
    ("family", "kind"),
    [(socket.AF_UNIX, socket.SOCK_STREAM), (socket.AF_INET, socket.SOCK_DGRAM)],
)
@with_uvloop
async def test_descriptor_of_another_socket_type_is_refused_and_not_closed(
    tmp_path: Path, family: int, kind: int
) -> None:
    async with listening(tmp_path) as server:
        with socket.socket(family, kind) as other:
            with pytest.raises(DeviceError, match="is not a Unix SOCK_SEQPACKET socket") as caught:
                server.control.adopt(other.fileno())
            assert caught.value.errno == errno.EPROTOTYPE
            assert other.getsockname() is not None


@with_uvloop
async def test_descriptor_that_is_not_a_socket_is_refused(tmp_path: Path) -> None:
    async with listening(tmp_path) as server:
        read_end, write_end = os.pipe()
        os.close(write_end)
        try:
            with pytest.raises(DeviceError, match=f"flannel control fd {read_end}"):
                server.control.adopt(read_end)
        finally:
            os.close(read_end)
        with pytest.raises(DeviceError, match="Bad file descriptor"):
            server.control.adopt(read_end)
