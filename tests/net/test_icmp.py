"""The raw socket for echoes, with real ICMP messages on loopback."""

import socket
import struct

import pytest

from tests import reference
from tests.own_netns import in_own_netns
from udptun.net.icmp import ECHO_REPLY, Echoes, open_raw

LOOPBACK = {4: "127.0.0.1", 6: "::1"}


def reply_with(version, identifier, token=7):
    head = struct.pack(">BBHHHQ", ECHO_REPLY[version], 0, 0, identifier, 1, token)
    total = 0xFFFF - reference.checksum(head) if version == 4 else 0  # IPv6: the kernel's work
    return head[:2] + total.to_bytes(2) + head[4:] + bytes(100)


@in_own_netns
@pytest.mark.parametrize("version", [4, 6])
def test_the_kernel_drops_replies_to_other_programs_and_forged_ones(version):
    echoes = Echoes(version)
    kind, protocol = (socket.AF_INET, socket.IPPROTO_ICMP) if version == 4 else \
        (socket.AF_INET6, socket.IPPROTO_ICMPV6)
    with open_raw(version, echoes.identifier) as ours, \
            socket.socket(kind, socket.SOCK_RAW, protocol) as forger:
        ours.settimeout(60)
        for identifier in (echoes.identifier ^ 1, echoes.identifier ^ 0x8000):
            forger.sendto(reply_with(version, identifier), (LOOPBACK[version], 0))
        forger.sendto(reply_with(version, echoes.identifier, 8), (LOOPBACK[version], 0))
        assert echoes.reply(ours.recv(2000)) == (8, 100 + 8)


@in_own_netns
@pytest.mark.parametrize("version", [4, 6])
def test_the_kernels_reply_arrives(version):
    echoes = Echoes(version)
    with open_raw(version, echoes.identifier) as ours:
        ours.settimeout(60)
        ours.sendto(echoes.request(9, 64), (LOOPBACK[version], 0))
        assert echoes.reply(ours.recv(2000)) == (9, 64)
