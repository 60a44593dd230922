"""Packets from the subnets of silent peers are noticed, once per call."""

from __future__ import annotations

import socket
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
    listener = Listener(version, seen.append)
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
    listener = Listener(4, lambda _: None)
    seen = set()
    try:
        for _ in range(3):
            listener.watch(many)
            assert len(listener._watched) == SUBNETS_N
            seen |= {*listener._watched}
    finally:
        listener.close()
    assert seen == {*many}
