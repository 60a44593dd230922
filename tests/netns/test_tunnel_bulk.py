"""Bulk data arrives unchanged in every profile of the wire and with any offload off."""

import socket

import pytest

from tests.netns.netns_traffic import assert_invariant, exchange_udp, transfer_tcp
from udptun.device.offload import FEATURES, OffloadRequest
from udptun.lab import LabError, pair

# Single features are turned off on the path that exercises them most.
CASES = [
    *((profile, offload) for profile in ("P1", "P2", "P3") for offload in ("auto", "off")),
    *(("P1", f"auto,-{feature}") for feature in FEATURES),
]


@pytest.mark.parametrize(("profile", "offload"), CASES)
def test_bytes_arrive_unchanged(lab, profile, offload):
    tunnel = pair(lab, offload=offload)
    for side in tunnel.sides:
        in_use = set(side.forwarder.status()["capabilities"]["in_use"])
        assert in_use <= OffloadRequest.parse(offload).features
        if offload == "auto":
            assert in_use, "nothing is in use: this kernel cannot be what is tested"
    move_everything(tunnel, profile)


@pytest.mark.parametrize("offload", ["auto", "off"])
def test_bytes_arrive_unchanged_over_ipv6(lab, offload):
    move_everything(pair(lab, outer=6, offload=offload), "P1", mtu=1452)


@pytest.mark.parametrize("workers", [2])
def test_bytes_arrive_unchanged_with_more_workers(lab, workers):
    move_everything(pair(lab, workers=workers), "P1")


@pytest.mark.parametrize("offload", ["auto", "off"])
def test_bytes_arrive_unchanged_behind_extension_headers(lab, offload):
    """Linux passes TCP super-packets with extension headers to the TUN. If the forwarder dropped
    one, it would drop every retransmission too, and the connection would stall.

    Between nodes only: a pod's kernel may keep segments that it sized without the options. The
    node's kernel always refuses them (too big for the TUN), so they never reach a tunnel."""
    a, b = pair(lab, offload=offload).sides
    pad = bytes.fromhex("0000 0104 0000 0000")  # next header (the kernel's), 8 bytes; PadN
    options = (socket.IPV6_HOPOPTS, pad), (socket.IPV6_DSTOPTS, pad)
    for sticky in (options[:1], options[1:], options):
        transfer_tcp(a.host, b.host, b.v6, sticky=sticky)
    for side in (a, b):
        packets = assert_invariant(side.forwarder)
        assert side.forwarder.drops().keys() <= {("encap", "no_route")}, packets


def test_each_end_has_its_own_offloads(lab):
    tunnel = pair(lab, start=False)
    tunnel.a.start(offload="off")
    tunnel.b.start()
    move_everything(tunnel, "P2")


def test_the_status_names_the_offloads_that_are_off(lab):
    forwarder = pair(lab, offload="auto,-udp-merge").a.forwarder
    shown = forwarder.udptun("status").stdout
    assert "udp-merge (asked)" in shown
    assert "udp-merge" not in forwarder.status()["capabilities"]["in_use"]


def test_a_tunnel_inside_the_tunnel(lab):
    """A VXLAN between two addresses of the overlay, with the advice of docs/troubleshoot.md."""
    a, b = pair(lab, offload="auto,-udp-merge").sides
    for n, (side, other) in enumerate(((a, b), (b, a)), 1):
        try:
            side.host.ip(f"link add inner0 mtu 1400 type vxlan id 7 dstport 4790 local {side.v4} "
                         f"remote {other.v4}")
        except LabError as exc:
            pytest.skip(f"this kernel cannot make VXLAN devices: {exc}")
        side.host.ip(f"address add 10.9.0.{n}/24 dev inner0", "link set inner0 up")
    transfer_tcp(a.host, b.host, "10.9.0.2")
    transfer_tcp(b.host, a.host, "10.9.0.1")


def move_everything(tunnel, profile, mtu=1472):
    a, b = tunnel.sides
    tunnel.link.profile(profile)
    # From a socket on the node, and forwarded for a pod: the kernel fills in the headers of
    # super-packets differently.
    transfer_tcp(a.host, b.host, b.v4)
    transfer_tcp(a.host, b.host, b.v6)
    transfer_tcp(a.pod, b.pod, b.pod_v4)
    transfer_tcp(b.pod, a.pod, a.pod_v6)
    exchange_udp(a.host, b.host, b.v4, mtu - 28)
    exchange_udp(a.pod, b.pod, b.pod_v6, mtu - 48)
    for side in tunnel.sides:
        packets = assert_invariant(side.forwarder)
        assert side.forwarder.drops().keys() <= {("encap", "no_route")}, packets
