"""Dumps read as bytes: framing, errors, and a table that changes meanwhile."""

from __future__ import annotations

import errno
import socket
import struct

import pytest
from own_netns import in_own_netns, ip_json, sh

from udptun.net import dump as dump_module
from udptun.net.dump import NLM_F_DUMP_INTR, NLMSG, NLMSG_DONE, NLMSG_ERROR, attributes, dump

RTM_NEWROUTE, RTM_GETROUTE = 24, 26
ALL = bytes([socket.AF_INET]).ljust(12, b"\0")


@in_own_netns
def test_every_route_is_there():
    sh("ip tuntap add t0 mode tun", "ip link set t0 up",
       *(f"ip route add 10.1.{n}.0/24 dev t0" for n in range(200)))
    routes = ip_json("-4 route show table all")
    messages = dump(RTM_GETROUTE, ALL)
    assert len(messages) == len(routes) > 200
    assert {bytes(attributes(message[12:])[1]) for message in messages} >= \
        {bytes([10, 1, n, 0]) for n in range(200)}


@in_own_netns
def test_the_kernels_error():
    with pytest.raises(OSError, match="Invalid argument") as caught:
        dump(RTM_GETROUTE, bytes([socket.AF_INET, 24]).ljust(12, b"\0"))  # no filter by length
    assert caught.value.errno == errno.EINVAL


class Kernel(socket.socket):
    """In the place of the netlink socket: answers each request with the next of ``answers``."""

    answers: list[list[bytes]] = []  # noqa: RUF012

    def __init__(self, *_):
        super().__init__(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.waiting = []

    def setsockopt(self, *_):
        raise OSError(errno.ENOPROTOOPT, "an old kernel")

    def bind(self, _):
        pass

    def send(self, request):
        self.waiting = self.answers.pop(0)
        return len(request)

    def recv(self, _):
        return self.waiting.pop(0)


def message(kind, body, flags=0):
    return NLMSG.pack(NLMSG.size + len(body), kind, flags, 1, 0) + body + bytes(-len(body) % 4)


DONE, WHOLE = message(NLMSG_DONE, struct.pack("=i", 0)), message(RTM_NEWROUTE, b"whole")
HALF = message(RTM_NEWROUTE, b"half", NLM_F_DUMP_INTR)


@pytest.mark.parametrize("interrupted", [
    [HALF + DONE], [HALF, DONE], [HALF, WHOLE + DONE],
    [message(NLMSG_DONE, struct.pack("=i", 0), NLM_F_DUMP_INTR)],
])
def test_a_table_that_changed_is_read_again(monkeypatch, interrupted):
    monkeypatch.setattr(dump_module.socket, "socket", Kernel)
    Kernel.answers = [[*interrupted], [WHOLE + WHOLE, DONE]]
    assert [bytes(body) for body in dump(RTM_GETROUTE, ALL)] == [b"whole", b"whole"]


def test_a_table_that_never_rests(monkeypatch):
    monkeypatch.setattr(dump_module.socket, "socket", Kernel)
    Kernel.answers = [[HALF + DONE] for _ in range(99)]
    with pytest.raises(OSError, match="the table changed each time") as caught:
        dump(RTM_GETROUTE, ALL)
    assert caught.value.errno == errno.EINTR


@pytest.mark.parametrize("kind", [NLMSG_ERROR, NLMSG_DONE])
def test_an_error_at_the_end(monkeypatch, kind):
    monkeypatch.setattr(dump_module.socket, "socket", Kernel)
    Kernel.answers = [[WHOLE, message(kind, struct.pack("=i", -errno.ENOBUFS))]]
    with pytest.raises(OSError) as caught:
        dump(RTM_GETROUTE, ALL)
    assert caught.value.errno == errno.ENOBUFS


def test_attributes_are_aligned():
    data = struct.pack("=HH1s3xHHI", 5, 1, b"a", 8, 0x8000 | 2, 7)
    assert {kind: bytes(value) for kind, value in attributes(memoryview(data)).items()} == \
        {1: b"a", 2: struct.pack("=I", 7)}
