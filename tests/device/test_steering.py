"""Steering: each flow stays on one queue of a multi-queue TUN device."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import select
import socket
from ipaddress import ip_address, ip_network
from pathlib import Path

import pytest

from tests.own_netns import in_own_netns
from udptun.device import steering
from udptun.device.offload import OffloadRequest
from udptun.device.steering import attach_steering
from udptun.device.tun import Tun
from udptun.net.netlink import Netlink

OFF = OffloadRequest(frozenset())
QUEUES = 2
PEERS = {4: "10.244.2.9", 6: "fd00:2::9"}


@contextlib.contextmanager
def two_queues():
    with contextlib.closing(Tun.open("utE0", QUEUES, OFF)) as tun, Netlink() as netlink:
        asyncio.run(netlink.configure_tun(
            tun.name, 1400, [ip_address("10.244.1.0"), ip_address("fd00:1::")],
            [ip_network("10.244.0.0/16"), ip_network("fd00::/16")],
        ))
        yield tun


def read(tun):
    """Return (queue, packet) of the only queued packet."""
    ready = select.select(tun.fds, [], [], 10)[0]
    assert len(ready) == 1
    return tun.fds.index(ready[0]), os.read(ready[0], 2000)


def swapped(packet):
    """Return the packet of the other direction. UDP and IPv4 checksums stay valid."""
    at, size, ports = (12, 4, 20) if packet[0] >> 4 == 4 else (8, 16, 40)
    middle = packet[at + 2 * size : ports]
    return (packet[:at] + packet[at + size : at + 2 * size] + packet[at : at + size] + middle
            + packet[ports + 2 : ports + 4] + packet[ports : ports + 2] + packet[ports + 4 :])


def senders(version, n):
    family = socket.AF_INET if version == 4 else socket.AF_INET6
    for _ in range(n):
        with socket.socket(family, socket.SOCK_DGRAM) as sender:
            sender.connect((PEERS[version], 4000))
            yield sender


@in_own_netns
@pytest.mark.parametrize("version", [4, 6])
def test_a_flow_stays_on_its_queue(version):
    with two_queues() as tun:
        assert attach_steering(tun.fds[0]) is None
        used = set()
        for sender in senders(version, 64):
            sender.send(b"one")
            queue, packet = read(tun)
            used.add(queue)
            # Write the answer to the other queue: without the program the flow would move there.
            os.write(tun.fds[1 - queue], swapped(packet))
            assert sender.recv(9) == b"one"
            for _ in range(3):
                sender.send(b"two")
                assert read(tun)[0] == queue
        assert used == {0, 1}


@in_own_netns
def test_fragments_of_a_datagram_stay_together():
    with two_queues() as tun:
        assert attach_steering(tun.fds[0]) is None
        for sender in senders(4, 8):
            sender.setsockopt(socket.IPPROTO_IP, 10, 0)  # IP_PMTUDISC_DONT: allow fragmentation
            sender.send(bytes(4000))
            queue, _ = read(tun)
            assert [read(tun)[0] for _ in range(2)] == [queue] * 2


@in_own_netns
def test_refused_program_is_logged(monkeypatch, caplog):
    def refuse(*_):
        raise OSError(errno.EPERM, "")

    caplog.set_level("INFO")
    monkeypatch.setattr(steering.bpf, "load_program", refuse)
    with two_queues() as tun:
        assert attach_steering(tun.fds[0]) == "EPERM"
        assert "EPERM" in caplog.text


@in_own_netns
def test_descriptor_that_is_not_a_tun():
    with Path("/dev/null").open("rb") as other:
        assert attach_steering(other.fileno()) == "ENOTTY"
