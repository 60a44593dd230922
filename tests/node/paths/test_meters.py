"""The classes that measure the path to a peer (BoundMeter: probes, EchoMeter: ICMP echoes), with a
real kernel, on the loopback device."""

from __future__ import annotations

import contextlib
import errno
import logging
import socket
import time
from ipaddress import ip_address, ip_network
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.own_netns import in_own_netns, sh
from tests.path.test_worker_pressure import FullRig, slow_loopback
from tests.wait import until
from udptun.net.icmp import Echoes
from udptun.node.backends.base import ProbeDevice
from udptun.node.paths import meters as meters_module
from udptun.node.paths.bound import BoundMeter
from udptun.node.paths.choice import Health
from udptun.node.paths.echo import EchoMeter
from udptun.node.paths.meters import Meters
from udptun.probe.message import HEADER_SIZE, REQUEST, UDP_PATH, VXLAN_PATH, Probe
from udptun.probe.state import REACHABLE, UNKNOWN, UNREACHABLE

MTU, PORT = 1450, 8285
A = {4: ip_address("127.1.0.0"), 6: ip_address("fd00:0:0:1::")}
B = {4: ip_network("127.2.0.0/16"), 6: ip_network("fd00:0:0:2::/64")}
both = pytest.mark.parametrize("version", [4, 6])


def prepare(version):
    if version == 6:
        sh(*(f"ip -6 addr add fd00:0:0:{n}::/128 dev lo nodad" for n in (1, 2)))


def device(address, name="lo"):
    return ProbeDevice(name, 1, address, VXLAN_PATH)


@contextlib.contextmanager
def bound(address, port=PORT, name="lo"):
    changes = []
    meter = BoundMeter(device(address, name), port, changes.extend)
    meter.check()
    try:
        yield meter, changes
    finally:
        meter.close()


@both
@in_own_netns
async def test_two_bound_meters_measure_each_other(version):
    prepare(version)
    own = ip_network((A[version], B[version].prefixlen), strict=False)
    with bound(A[version]) as (a, changes), bound(B[version].network_address, 9000) as (b, _):
        assert (a.error, b.error) == ("", "")
        b.add(own, PORT, MTU)
        a.add(B[version], 9000, MTU)
        for meter, subnet in ((a, B[version]), (b, own)):
            await until(lambda m=meter, s=subnet: m.state(s).state == REACHABLE, "an answer")
            await until(lambda m=meter, s=subnet: m.state(s).sizes.full_passes, "the full size")
            assert meter.state(subnet).rtt < 1
        assert changes[0] == B[version]
        assert a.sent_at(B[version]) > 0


@in_own_netns
async def test_a_peer_that_does_not_answer_is_unreachable():
    sh("sysctl -qw net.ipv4.icmp_echo_ignore_all=1")
    with bound(A[4]) as (meter, changes):
        meter.add(B[4], 9000, MTU)
        meter.traffic([B[4]])
        await until(lambda: meter.state(B[4]).state == UNREACHABLE, "the verdict")
        assert changes == [B[4]]
        meter.remove(B[4])
        assert meter.state(B[4]) is None


@both
@in_own_netns
async def test_a_peer_whose_daemon_has_ended_is_reachable(version, caplog):
    """Its kernel still carries packets, and answers echoes."""
    prepare(version)
    own = ip_network((A[version], B[version].prefixlen), strict=False)
    with bound(A[version]) as (a, changes):
        with bound(B[version].network_address, 9000) as (b, _):
            b.add(own, PORT, MTU)
            a.add(B[version], 9000, MTU)
            await until(lambda: a.state(B[version]).state == REACHABLE, "an answer")
        ended = time.monotonic()
        a.traffic([B[version]])
        changes.clear()
        await until(lambda: "answers echoes, but no probes" in caplog.text, "the log line")
        assert changes == []  # the path was never called unreachable
        assert a.state(B[version]).last_answer > ended
        with bound(B[version].network_address, 9000) as (b, _), \
                caplog.at_level(logging.INFO, "udptun"):
            b.add(own, PORT, MTU)
            await until(lambda: "answers probes again" in caplog.text, "the next log line")


def test_an_echo_is_as_large_as_a_probe():
    echo = Echoes(4).request(7, MTU - 28)
    assert len(echo) + 20 == MTU  # with the header of IPv4


@in_own_netns
async def test_a_request_is_answered_once_if_its_sender_is_a_known_peer():
    with bound(A[4]) as (meter, _), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as peer, \
            socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as outsider:
        peer.bind(("127.2.0.0", 9000))
        outsider.bind(("127.2.0.0", 9001))
        meter.add(B[4], 9000, MTU)

        def request(path=VXLAN_PATH, size=HEADER_SIZE, kind=REQUEST, token=7):
            return Probe(kind, path, token, 0, size).encode()

        to = (str(A[4]), PORT)
        peer.sendto(b"no probe", to)
        peer.sendto(request(path=UDP_PATH), to)  # sent on another path
        peer.sendto(request()[:-1], to)
        peer.sendto(request(kind=2), to)  # a reply without a request
        outsider.sendto(request(), to)
        peer.sendto(request(size=1000, token=8), to)
        peer.setblocking(False)
        answers = []

        def received():
            with contextlib.suppress(BlockingIOError):
                answers.append(peer.recv(2000))
            replies = [one for one in answers if one[4] == 2]
            return len(replies) == 1 and len(replies[0]) == 1000 and replies[0][15] == 8

        await until(received, "one reply")
        with pytest.raises(BlockingIOError):
            outsider.setblocking(False)
            outsider.recv(2000)


@in_own_netns
async def test_a_message_of_an_unknown_sender_is_not_parsed(monkeypatch):
    parsed = []
    monkeypatch.setattr("udptun.node.paths.bound.decode", parsed.append)
    with bound(A[4]) as (meter, _), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as peer, \
            socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as outsider:
        peer.bind(("127.2.0.0", 9000))
        outsider.bind(("127.2.0.0", 9001))
        meter.add(B[4], 9000, MTU)
        outsider.sendto(b"of an unknown sender", (str(A[4]), PORT))
        peer.sendto(b"of the peer", (str(A[4]), PORT))
        await until(lambda: parsed, "the peer's message")
        assert parsed == [b"of the peer"]


@in_own_netns
async def test_a_meter_without_its_device_reports_this_and_recovers():
    with bound(A[4], name="gone0") as (meter, _):
        meter.add(B[4], 9000, MTU)
        meter.traffic([B[4]])
        assert "gone0" in meter.error
        await until(lambda: meter.state(B[4]).state == UNREACHABLE, "the verdict")
        assert "No such device" in meter.state(B[4]).reason(0.0)
        meter.move(device(A[4]), PORT)
        meter.check()
        assert meter.error == ""
        with bound(B[4].network_address, 9000) as (other, _):
            other.add(ip_network("127.1.0.0/16"), PORT, MTU)
            await until(lambda: meter.state(B[4]).state == REACHABLE, "an answer")


@in_own_netns
async def test_a_forwarder_with_the_same_port_opens_own_sockets_for_slow_peers():
    slow_loopback("100kbit")
    with FullRig() as rig, bound(A[4], rig.udp.getsockname()[1]) as (meter, _):
        assert meter.error == ""
        for dst in ("10.244.3.5", "10.244.2.5"):
            rig.fill(dst=dst)
            rig.work()
        assert rig.own_sockets() > 0
        assert rig.worker.take_events() == []


def health(meter):
    pair = SimpleNamespace(subnet=B[4], meters=(meter,), endpoints=(None,))
    return Meters(Path("unused"), lambda _: None).health(pair, 0)[0]


@in_own_netns
async def test_if_the_port_is_in_use_the_state_of_the_paths_is_unknown():
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other, \
            bound(A[4]) as (meter, changes), bound(B[4].network_address, 9000) as (peer, _):
        other.bind((str(A[4]), PORT + 1))
        peer.add(ip_network("127.1.0.0/16"), PORT, MTU)
        meter.add(B[4], 9000, MTU)
        await until(lambda: health(meter) == Health.GOOD, "an answer")
        changes.clear()
        meter.move(device(A[4]), PORT + 1)
        meter.check()
        assert "Address already in use" in meter.error
        assert meter._timer is None  # no probe is sent
        assert health(meter) is None
        assert changes == [B[4]]
        other.close()
        meter.check()
        assert meter.error == ""
        assert health(meter) == Health.GOOD
        assert changes == [B[4], B[4]]


@in_own_netns
async def test_a_meter_does_not_share_its_port_with_another_meter():
    with bound(A[4]), bound(A[4]) as (other, _):
        assert "Address already in use" in other.error


@both
@in_own_netns
async def test_the_kernel_of_a_peer_answers_echoes(version):
    prepare(version)
    meter = EchoMeter(version, lambda _: None)
    meter.check()
    try:
        assert meter.error == ""
        meter.add(B[version], MTU)
        await until(lambda: meter.state(B[version]).sizes.full_passes, "an answer")
        assert meter.state(B[version]).state == REACHABLE
        assert meter.state(B[version]).sizes.largest == MTU - (28 if version == 4 else 48)
    finally:
        meter.close()


@in_own_netns
async def test_a_peer_that_drops_echoes_is_reachable_while_its_data_arrive():
    sh("sysctl -qw net.ipv4.icmp_echo_ignore_all=1")
    meter = EchoMeter(4, lambda _: None)
    meter.check()
    try:
        meter.add(B[4], MTU)
        meter.traffic([B[4]])
        await until(lambda: meter.state(B[4]).state == UNREACHABLE, "the verdict")
        meter.data_received(B[4])
        assert meter.state(B[4]).state == REACHABLE
    finally:
        meter.close()


@in_own_netns
async def test_without_cap_net_raw_the_state_is_unknown(monkeypatch):
    def refuse(*_):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    meter = EchoMeter(4, lambda _: None)
    monkeypatch.setattr(meter, "_open", refuse)
    meter.check()
    meter.add(B[4], MTU)
    meter.traffic([B[4]])
    assert meter._timer is None  # no probe is sent
    assert meter.state(B[4]).state == UNKNOWN
    assert "Operation not permitted" in meter.error


async def test_own_probes_do_not_count_as_traffic_if_the_kernel_answers_late(monkeypatch, tmp_path):
    clock, busy = [1000.0], []
    monkeypatch.setattr(meters_module, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    used_at = 999.0

    class Probed:
        traffic = staticmethod(busy.extend)

        def sent_at(self, _):
            return 999.0

    class Backend:
        name = "vxlan"

        async def send_ages(self, within, probes_n):
            age = clock[0] - used_at
            clock[0] += 5.0  # the answer is delayed on its way
            return {B[4]: age} if age <= within else {}

    meters = Meters(tmp_path / "udptun.sock", lambda _: None)
    pairs = {B[4]: SimpleNamespace(meters=(Probed(),))}
    await meters.follow_traffic(pairs, 0, Backend())
    assert busy == []
    used_at = clock[0] - 1.0
    await meters.follow_traffic(pairs, 0, Backend())
    assert busy == [B[4]]
    busy.clear()
    await meters.follow_traffic(pairs, 0, Backend())
    assert busy == []  # each packet is found once


@in_own_netns
async def test_a_meter_that_cannot_measure_any_more_sends_no_probe():
    with bound(A[4]) as (meter, _), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
        other.bind((str(A[4]), PORT + 1))
        meter.add(B[4], 9000, MTU)
        meter.move(device(A[4]), PORT + 1)
        meter.traffic([B[4]])  # a probe is due: without a socket, it fails
        assert meter._timer is not None
        meter.check()
        assert "Address already in use" in meter.error
        assert meter._timer is None
