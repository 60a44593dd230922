"""The hooks of devices, in the kernel's present state and with answers that are out of date."""

import contextlib
import os
import resource
import socket
import struct

import pytest

from tests.netns.netns_traffic import skip_without_programs
from tests.own_netns import in_own_netns, sh
from udptun.device import bpf
from udptun.net import hooks
from udptun.net.batch import RouteSocket
from udptun.net.hooks import Hook

# r0 = -1 (TC_ACT_UNSPEC); exit
NOTHING = struct.pack("<BBhi", 0xB7, 0, 0, -1) + struct.pack("<BBhi", 0x95, 0, 0, 0)


@pytest.fixture(scope="module", autouse=True)
def programs():
    """Skip the tests without programs."""
    skip_without_programs()


@contextlib.contextmanager
def a_program():
    fd = bpf.load_program(bpf.SCHED_CLS, NOTHING)
    try:
        yield fd
    finally:
        os.close(fd)


def at_ingress(kernel, device):
    return {one.name: one.program for one in hooks.filters(kernel, device, Hook.INGRESS)}


@in_own_netns
def test_a_new_filter_replaces_none_of_another_forwarder(monkeypatch):
    """Both forwarders have seen the hook empty, and choose the same handle."""
    sh("ip link add down0 type bridge", "tc qdisc add dev down0 clsact")
    device, real, outdated = socket.if_nametoindex("down0"), hooks.filters, [[], [], []]
    monkeypatch.setattr(
        hooks, "filters", lambda *args: outdated.pop() if outdated else real(*args))
    with RouteSocket() as kernel, a_program() as first, a_program() as second:
        present, outdated[:] = outdated[:], []
        hooks.attach(kernel, device, Hook.INGRESS, "udptun-receive-x0", first)
        outdated[:] = present
        hooks.attach(kernel, device, Hook.INGRESS, "udptun-receive-x1", second)
        assert at_ingress(kernel, device) == {
            "udptun-receive-x0": bpf.program_id(first), "udptun-receive-x1": bpf.program_id(second)}


@in_own_netns
def test_programs_of_others_stay_if_no_descriptor_is_left():
    sh("ip link add tun0 type bridge")
    device = socket.if_nametoindex("tun0")
    with RouteSocket() as kernel, a_program() as program:
        for tun in ("tun0", "gone0"):
            hooks.attach(
                kernel, device, Hook.INGRESS, hooks.filter_name("receive", tun), program)
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
        try:
            removed = hooks.remove(kernel, "other0")
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        assert removed == ["udptun-receive-gone0"]
        assert [*at_ingress(kernel, device)] == ["udptun-receive-tun0"]
