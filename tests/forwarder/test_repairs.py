"""The forwarder repairs its TUN device after another program changed or deleted the device."""

import asyncio
import contextlib
import logging
import os
import socket

import pytest

from tests.forwarder.test_forwarder import config
from tests.own_netns import in_own_netns, ip_json, sh
from tests.wait import until
from udptun import Forwarder, Route
from udptun.device import tun
from udptun.device.offload import OffloadRequest
from udptun.errors import DeviceError
from udptun.model import parse_address, parse_prefix
from udptun.net.netlink import Netlink
from udptun.repairs import Repairs

PEER = "192.0.2.2"
OWN = ("10.244.1.0", "fd00:1::")
NETWORKS = ("10.244.0.0/16", "fd00::/16")

ACTS = {
    "route del": ["ip route del 10.244.0.0/16"],
    "route flush": ["ip route flush dev udptun0", "ip -6 route flush dev udptun0"],
    "address flush": ["ip address flush dev udptun0"],
    "down": ["ip link set udptun0 down"],
    "down and up": ["ip link set udptun0 down", "ip link set udptun0 up"],
    "rename": ["ip link set udptun0 down", "ip link set udptun0 name other",
               "ip link set other up"],
    "mtu": ["ip link set udptun0 mtu 900"],
    "rp_filter": ["sysctl -qw net.ipv4.conf.udptun0.rp_filter=1"],
    "no IPv6": ["sysctl -qw net.ipv6.conf.udptun0.disable_ipv6=1"],
    "deleted": ["ip link del udptun0"],
}


def both_families(**changes):
    return config(
        addresses=tuple(parse_address("address", own) for own in OWN),
        networks=tuple(parse_prefix("network", net) for net in NETWORKS), mtu=1400, **changes,
    )


def as_it_should_be():
    """Return the output of ip(8) for the device, without the values that change by themselves."""
    (link,) = ip_json("address show dev udptun0") or [{}]
    return {
        "flags": set(link["flags"]), "mtu": link["mtu"], "txqlen": link["txqlen"],
        "addresses": {(one["local"], one["prefixlen"]) for one in link["addr_info"]},
        "routes": {one["dst"] for version in (4, 6)
                   for one in ip_json(f"-{version} route show dev udptun0 table main")
                   if one["protocol"] != "kernel"},
        "settings": [sh(f"sysctl -n net.ipv4.conf.udptun0.{name}").strip()
                     for name in ("rp_filter", "accept_local")],
    }


def state():
    try:
        return as_it_should_be()
    except (AssertionError, KeyError):
        return None


@contextlib.contextmanager
def peer_socket():
    """Yield a socket at the peer's endpoint, which receives what the forwarder sends."""
    sh(f"ip address add {PEER}/32 dev lo")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as at_peer:
        at_peer.bind((PEER, 8285))
        at_peer.settimeout(60)
        yield at_peer


def send_through(at_peer, payload):
    """Send one packet into the TUN; return once the peer has it in a datagram."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as pod:
        pod.sendto(payload, ("10.244.2.9", 9))
    while payload not in at_peer.recv(2000):
        pass


@in_own_netns
@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("act", ACTS.values(), ids=ACTS)
async def test_an_act_is_repaired(act, workers):
    with peer_socket() as at_peer:
        async with Forwarder(both_families(workers=workers)) as forwarder:
            await forwarder.put_route(Route.make("10.244.2.0/24", PEER))
            before = as_it_should_be()
            assert {own for own, _ in before["addresses"]} == set(OWN)
            assert before["routes"] == set(NETWORKS)
            await asyncio.to_thread(send_through, at_peer, b"before")
            with forwarder.subscribe() as events:
                sh(*act)
                async with asyncio.timeout(60):
                    event = await anext(events)
                assert event["type"] == "repaired", event
                await until(lambda: state() == before, "the repair")
                await asyncio.to_thread(send_through, at_peer, b"after")


@in_own_netns
async def test_what_changes_without_a_notification_is_found_by_a_check():
    """SIGHUP calls ``check_host``."""
    async with Forwarder(both_families()) as forwarder:
        with forwarder.subscribe() as events:
            sh("sysctl -qw net.ipv4.conf.udptun0.accept_local=0")
            forwarder.check_host()
            async with asyncio.timeout(60):
                assert (await anext(events))["message"] == \
                    "udptun0 is repaired: its accept_local is 0"


@in_own_netns
async def test_a_route_of_another_program_is_reported_once():
    async with Forwarder(config()) as forwarder:
        with forwarder.subscribe() as events:
            sh("ip route replace 10.244.0.0/16 dev lo")
            assert "the host routes it through lo" in (await anext(events))["message"]
            # link messages without a new loss do not repeat the report
            sh("ip link set udptun0 txqueuelen 99", "ip link set udptun0 txqueuelen 98")
            await forwarder.put_route(Route.make("10.244.2.0/24", "192.0.2.2"))
            assert (await anext(events))["type"] == "route_added"
            assert (await anext(events))["type"] == "routes_replaced"
            sh("ip route del 10.244.0.0/16 dev lo")
            async with asyncio.timeout(60):
                assert (await anext(events))["type"] == "repaired"


@in_own_netns
async def test_a_name_that_another_device_took_is_reported():
    async with Forwarder(config()) as forwarder:
        with forwarder.subscribe() as events:
            sh("ip link del udptun0", "ip link add udptun0 type veth peer name other")
            async with asyncio.timeout(60):
                event = await anext(events)
            assert event["type"] == "error"
            assert "udptun0" in event["message"]
            sh("ip link del udptun0")
            async with asyncio.timeout(60):
                assert (await anext(events))["type"] == "repaired"


@in_own_netns
async def test_a_repair_fight_is_bounded_and_logged_in_one_line(caplog, monkeypatch):
    caplog.set_level(logging.WARNING)
    made, done = [], Repairs.done
    monkeypatch.setattr(Repairs, "done", lambda self, what: (made.append(what), done(self, what)))
    async with Forwarder(config()) as forwarder:
        with forwarder.subscribe() as events:
            for repairs in range(1, 5):
                sh("ip route del 10.244.0.0/16")
                await until(lambda n=repairs: len(made) == n, "the repair")
            assert forwarder._setup._repairs.pause() > 0
            assert (await anext(events))["type"] == "repaired"
    assert len([one for one in caplog.messages if "is repaired" in one]) == 1


def undo_repairs(monkeypatch, times):
    """Delete the route again right after each of the next repairs, as another program may do."""
    configure = Netlink.configure_tun
    left = [times]

    async def configure_and_undo(self, *args, **kwargs):
        await configure(self, *args, **kwargs)
        if left[0]:
            left[0] -= 1
            sh("ip route del 10.244.0.0/16")

    monkeypatch.setattr(Netlink, "configure_tun", configure_and_undo)


@in_own_netns
@pytest.mark.parametrize(("times", "expected"), [
    (1, ["repaired"]), (2, ["repaired"]), (3, ["error", "repaired"]), (4, ["error", "repaired"])])
async def test_a_repair_that_is_undone_at_once_is_made_again(monkeypatch, times, expected):
    async with Forwarder(config()) as forwarder:
        undo_repairs(monkeypatch, times)
        with forwarder.subscribe() as events:
            sh("ip route del 10.244.0.0/16")
            async with asyncio.timeout(60):
                seen = [await anext(events) for _ in expected]
            assert [event["type"] for event in seen] == expected
            assert "10.244.0.0/16" in seen[0]["message"]


@in_own_netns
async def test_a_queue_that_another_process_has_added_stops_the_start(monkeypatch):
    """A user can add a queue between the creation of the device and the setting of its owner."""
    attach, foreign = tun._attach, []

    def attach_two(fd, name, flags, first):
        real_name = attach(fd, name, flags, first)
        if first:
            foreign.append(tun._open_device())
            attach(foreign[0], name, flags, False)
        return real_name

    monkeypatch.setattr(tun, "_attach", attach_two)
    forwarder = Forwarder(config(workers=2, offload=OffloadRequest.parse("off")))
    try:
        with pytest.raises(DeviceError, match="udptun0 has 3 queues instead of 2"):
            await forwarder.start()
    finally:
        for fd in foreign:
            os.close(fd)
