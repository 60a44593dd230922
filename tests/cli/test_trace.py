"""``udptun trace``: real routes, TUN and VXLAN entries of the kernel, and a fake forwarder."""

from __future__ import annotations

import json
import os
from pathlib import Path

from click.testing import CliRunner

from tests.control.fakes import Served
from tests.own_netns import in_own_netns, sh
from udptun.cli import cli


def host() -> None:
    """Create the underlay, the forwarder's TUN, and a VXLAN device with one peer."""
    sh("ip link add eth0 type veth peer name wire", "ip link set eth0 up", "ip link set wire up",
       "ip addr add 192.0.2.1/24 dev eth0", "ip route add default via 192.0.2.254",
       "ip tuntap add udptun0 mode tun", "ip link set udptun0 mtu 1472 up",
       "ip addr add 10.244.1.0/32 dev udptun0", "ip route add 10.244.0.0/16 dev udptun0",
       "ip route add unreachable 198.51.100.0/24")


def vxlan() -> None:
    sh("ip link add flannel.1 type vxlan id 1 dstport 8472 local 192.0.2.1 dev eth0 nolearning",
       "ip link set flannel.1 mtu 1450 up", "ip addr add 10.244.1.0/32 dev flannel.1",
       "ip route add 10.244.3.0/24 via 10.244.3.0 dev flannel.1 onlink")


def trace(address: str, path: Path, code: int = 0) -> dict[str, str]:
    """Return the lines of the output by their names."""
    result = CliRunner().invoke(cli, ["trace", address, "--socket", str(path)])
    assert result.exit_code == code, result.output
    lines = result.output.splitlines() if code == 0 else [f"error: {result.output}"]
    return {name: text.strip() for name, _, text in (line.partition(":") for line in lines)}


def trace_json(address: str, path: Path) -> dict[str, object]:
    result = CliRunner().invoke(cli, ["trace", address, "-o", "json", "--socket", str(path)])
    found: dict[str, object] = json.loads(result.stdout)
    return found


@in_own_netns
def test_the_forwarder_decides_on_packets_that_the_kernel_gives_to_its_tun(served: Served) -> None:
    host()
    arguments = ["route", "add", "10.244.2.0/24", "via", "192.0.2.2", "mtu", "1400"]
    CliRunner().invoke(cli, [*arguments, "--socket", str(served.path)])
    assert trace("10.244.2.9", served.path) == {
        "address": "10.244.2.9", "kernel": "udptun0", "path": "UDP, through the forwarder",
        "verdict": "forward", "route": "10.244.2.0/24 via 192.0.2.2 port 8285 mtu 1400",
        "peer": "192.0.2.2:8285", "mtu": "1472",
    }
    lost = trace("10.244.9.9", served.path)
    assert (lost["verdict"], lost["route"]) == ("drop (no_route)", "-")
    found = trace_json("10.244.2.9", served.path)
    assert found["path"] == "udp" and found["verdict"] == "forward"
    assert found["kernel"] == {
        "error": None, "device": "udptun0", "gateway": None, "source": "10.244.1.0", "mtu": 1472,
        "vxlan": None,
    }


@in_own_netns
def test_a_more_specific_route_takes_the_packet_from_the_forwarder(served: Served) -> None:
    host()
    arguments = ["route", "add", "10.244.2.0/24", "via", "192.0.2.2"]
    CliRunner().invoke(cli, [*arguments, "--socket", str(served.path)])
    sh("ip route add 10.244.2.0/24 via 192.0.2.7")
    assert trace("10.244.2.9", served.path) == {
        "address": "10.244.2.9", "kernel": "eth0 via 192.0.2.7",
        "path": "another device: neither the forwarder nor VXLAN",
        "note": "the forwarder has a route, but the kernel does not use udptun0",
    }


@in_own_netns
def test_other_answers_of_the_kernel(served: Served) -> None:
    host()
    assert trace("192.0.2.1", served.path)["path"] == "an address of this host"
    assert trace("203.0.113.9", served.path)["kernel"] == "eth0 via 192.0.2.254"
    unreachable = trace("198.51.100.9", served.path)
    assert unreachable["kernel"] == os.strerror(113)
    assert unreachable["path"] == "none: the kernel sends nothing"
    assert trace_json("2001:db8::1", served.path)["path"] == "none"


@in_own_netns
def test_a_packet_by_vxlan_has_the_peer_of_the_kernels_entries(
    served: Served, tmp_path: Path
) -> None:
    host()
    vxlan()
    mac = "02:00:00:00:00:03"
    for path in (served.path, tmp_path / "no-forwarder"):
        assert trace("10.244.3.9", path)["peer"] == \
            "unknown: flannel.1 has no neighbour entry for this next hop"
    sh(f"ip neigh add 10.244.3.0 lladdr {mac} dev flannel.1 nud permanent")
    assert trace("10.244.3.9", served.path)["peer"] == \
        f"unknown: flannel.1 has no FDB entry for {mac}"
    sh(f"bridge fdb add {mac} dst 192.0.2.3 dev flannel.1 self permanent")
    for path in (served.path, tmp_path / "no-forwarder"):
        assert trace("10.244.3.9", path) == {
            "address": "10.244.3.9", "kernel": "flannel.1 via 10.244.3.0",
            "path": "VXLAN, by the kernel", "peer": f"192.0.2.3 (VNI 1, MAC {mac})", "mtu": "1450",
        }
    assert trace_json("10.244.3.9", served.path)["kernel"] == {
        "error": None, "device": "flannel.1", "gateway": "10.244.3.0", "source": "10.244.1.0",
        "mtu": 1450, "vxlan": {"vni": 1, "mac": mac, "remote": "192.0.2.3"},
    }


@in_own_netns
def test_without_a_forwarder_and_without_vxlan_it_fails(tmp_path: Path) -> None:
    host()
    assert "no forwarder answers" in trace("10.244.2.9", tmp_path / "absent", 1)["error"]
