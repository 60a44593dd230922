"""Packets from the subnets of silent peers are noticed, once per call."""

from __future__ import annotations

import contextlib
import socket
import struct
from ipaddress import ip_network

import pytest

from tests.own_netns import in_own_netns, sh
from tests.wait import until
from udptun.node.paths.listen import SUBNETS_N, Listener

SUBNETS = {4: [ip_network("127.2.0.0/16"), ip_network("127.3.128.0/20")],
           6: [ip_network("fd00:0:0:2::/64"), ip_network("fd00:0:3::/56")]}
SOURCES = {4: ["127.2.9.9", "127.3.130.1"], 6: ["fd00:0:0:2::9", "fd00:0:3:12::1"]}
OTHERS = {4: ["127.4.0.1", "127.3.1.1"], 6: ["fd00:0:0:4::9", "fd00:0:3:112::1"]}
both = pytest.mark.parametrize("version", [4, 6])


@both
@in_own_netns
async def test_each_subnet_is_reported_once_per_call(version):
    if version == 6:
        sh(*(f"ip -6 addr add {address}/128 dev lo nodad"
             for address in (*SOURCES[6], *OTHERS[6])))
    seen = []
    listener = Listener(version, "lo", seen.append)
    listener.watch(SUBNETS[version])
    with socket.socket(socket.AF_INET6 if version == 6 else socket.AF_INET,
                       socket.SOCK_DGRAM) as target:
        target.bind(("::1" if version == 6 else "127.0.0.1", 0))

        def send(*sources):
            for source in sources:
                with socket.socket(target.family, socket.SOCK_DGRAM) as sender:
                    sender.bind((source, 0))
                    sender.sendto(b"x", target.getsockname())

        try:
            send(*OTHERS[version], SOURCES[version][0])
            await until(lambda: len(seen) == 1, "the first subnet")
            send(SOURCES[version][0], *OTHERS[version], SOURCES[version][1])
            await until(lambda: len(seen) == 2, "the second subnet")
            assert seen == SUBNETS[version]
            listener.watch(SUBNETS[version])
            send(*SOURCES[version])
            await until(lambda: len(seen) == 4, "both again")
            assert sorted(seen[2:]) == sorted(SUBNETS[version])
            listener.watch([])
            assert listener._socket is None
        finally:
            listener.close()


@in_own_netns
async def test_more_subnets_than_the_filter_holds_take_turns():
    many = [*ip_network("127.0.0.0/8").subnets(new_prefix=16)][: 3 * SUBNETS_N]
    listener = Listener(4, "lo", lambda _: None)
    seen = set()
    try:
        for _ in range(3):
            listener.watch(many)
            assert len(listener._watched) == SUBNETS_N
            seen |= {*listener._watched}
    finally:
        listener.close()
    assert seen == {*many}


def send_frame(device, source):
    """Send an IPv4 header from this source out of a device, to all link addresses."""
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as sender:
        sender.bind((device, 0))
        sender.send(bytes([255] * 6 + [2, 0, 0, 0, 0, 1, 8, 0]) + struct.pack(
            ">BBHHHBBH4s4s", 0x45, 0, 20, 0, 0, 64, 17, 0, socket.inet_aton(source), bytes(4)))


@in_own_netns
async def test_packets_of_other_devices_are_not_noticed():
    def create():
        sh("ip link add a0 type veth peer name a1", "ip link add b0 type veth peer name b1",
           *(f"ip link set {name} up" for name in ("a0", "a1", "b0", "b1")))

    subnet, seen, others = SUBNETS[4][0], [], []
    on_a, on_b = Listener(4, "a0", seen.append), Listener(4, "b0", others.append)
    with contextlib.closing(on_a), contextlib.closing(on_b):
        for n in (1, 2):
            create()
            on_a.watch([subnet])
            on_b.watch(SUBNETS[4])
            send_frame("a1", SOURCES[4][0])
            await until(lambda n=n: len(seen) == n, "the packet")
            send_frame("b1", SOURCES[4][1])  # wakes the other listener
            await until(lambda n=n: len(others) == n, "the packet on the other device")
            sh("ip link del a0", "ip link del b0")
            with pytest.raises(OSError, match=r"o interface|No such device"):
                on_a.watch([subnet])
        assert seen == [subnet] * 2
        assert others == [SUBNETS[4][1]] * 2
