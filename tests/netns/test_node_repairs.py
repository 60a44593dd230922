"""Nodes repair what other programs change on the host, with each backend."""

from __future__ import annotations

import contextlib
import json
import time

import pytest

from tests.netns.cluster_traffic import all_reach_all
from udptun.lab import Lab, LabError, wait_for
from udptun.lab.cluster import Cluster, unreachable

# By act: the commands on the node; DEV is each device of the overlay that the backend has.
ACTS = {
    "route-del": "ip route del {route}",
    "route-flush": "ip route flush dev DEV",
    "addr-flush": "ip address flush dev DEV",
    "down": "ip link set DEV down",
    # The repair may be faster than the last command.
    "rename": "ip link set DEV down; ip link set DEV name other; ip link set other up || true",
    "mtu": "ip link set DEV mtu 1000",
    "deleted": "ip link del DEV",
    "rp_filter": "sysctl -qw net/ipv4/conf/all/rp_filter=1 net/ipv4/conf/DEV/rp_filter=1",
    "ip_forward": "sysctl -qw net.ipv4.ip_forward=0",
    "subnet-env": "rm {env}",
}
VXLAN_ACTS = {
    "neigh-flush": "ip neigh flush dev DEV nud permanent",
    "fdb-flush": "for mac in $(bridge fdb show dev DEV | cut -d' ' -f1); do"
                 " bridge fdb del $mac dev DEV; done",
    "mac": "ip link set DEV address 02:00:00:00:00:77",
}
DEVICES = {"udp": ["udptun0"], "vxlan": ["flannel.1"], "auto": ["udptun0", "flannel.1"]}
CASES = [
    (backend, device, name)
    for backend, devices in DEVICES.items() for device in devices
    for name, act in (ACTS | (VXLAN_ACTS if device == "flannel.1" else {})).items()
    if "DEV" in act or "route" in act or device == devices[-1]
]


@pytest.fixture(scope="module")
def cluster_of():
    """Return a function that returns two nodes with a backend.

    All acts of a backend have the same nodes: each act must leave the node as it was.
    """
    with contextlib.ExitStack() as closing:
        made = {}

        def cluster_of(backend):
            if backend not in made:
                cluster = Cluster(
                    closing.enter_context(Lab()), 2, options=[f"--backend={backend}"])
                cluster.start()
                all_reach_all(cluster.members)
                made[backend] = cluster
            return made[backend]

        yield cluster_of


def state(member, devices):
    """Return what the kernel has, without the values that change by themselves."""
    run = member.host.run
    shown = {}
    for device in devices:
        found = run(["ip", "-j", "-d", "address", "show", "dev", device], check=False).stdout
        for link in json.loads(found or "[]"):
            shown[device] = {
                "flags": sorted(link["flags"]), "mtu": link["mtu"],
                "mac": link.get("address"),
                "addresses": sorted(one["local"] for one in link["addr_info"]),
                "settings": run(["sysctl", "-n", *(f"net/ipv4/conf/{device}/{name}" for name in (
                    "rp_filter", "accept_local", "forwarding"))], check=False).stdout,
                "neighbours": sorted(
                    line for line in run(["ip", "neigh", "show", "dev", device]).stdout.splitlines()
                    if "PERMANENT" in line),
                "fdb": sorted(run(["bridge", "fdb", "show", "dev", device]).stdout.splitlines()),
            }
    shown["routes"] = sorted(
        line for line in run(["ip", "route", "show"]).stdout.splitlines()
        if any(device in line for device in devices))
    shown["forward"] = run(["sysctl", "-n", "net.ipv4.ip_forward"]).stdout
    shown["env"] = member.subnet_file.read_text() if member.subnet_file.exists() else ""
    return shown


@pytest.mark.parametrize(
    ("backend", "device", "name"),
    [pytest.param(*case, id="-".join(case), marks=[pytest.mark.slow] * (case[0] == "vxlan"))
     for case in CASES])
def test_an_act_is_repaired(cluster_of, backend, device, name):
    cluster, devices = cluster_of(backend), DEVICES[backend]
    node, other = cluster.members
    before, logged_n = state(node, devices), len(log_lines(node))
    route = f"{other.subnet} dev {device}" if device == "flannel.1" else "10.244.0.0/16 dev udptun0"
    command = (ACTS | VXLAN_ACTS)[name].replace("DEV", device).format(
        route=route, env=node.subnet_file)
    node.host.run(["sh", "-c", command])
    after = {}

    def repaired():
        after.clear()
        after.update(state(node, devices))
        return after == before

    try:
        wait_for(repaired, "the repair", 30)
    except LabError as exc:
        pytest.fail(f"{exc}: {after} instead of {before}")
    wait_for(lambda: not unreachable(cluster.members), "the pods to reach each other")
    wait_for(lambda: node.ready()[0], "the node to be ready")
    # 0: an equal repair is counted. 2: the entries were deleted one by one.
    assert len(log_lines(node)) - logged_n in (0, 1, 2)
    assert log_lines(node)


def log_lines(member):
    """Return the lines about repairs, of the daemon and of the forwarder."""
    log = member.folder / "state" / "forwarder.log"
    text = member.daemon.text() + (log.read_text() if log.exists() else "")
    return [line for line in text.splitlines()
            if "is repaired" in line or "wrote " in line]


def test_subnet_env_waits_for_the_kernel(lab):
    """The file appears when the TUN, its route and the rules are active. READY=1 follows."""
    cluster = Cluster(lab, 1)
    (node,) = cluster.members
    # A device with the TUN's name stops the forwarder from making it.
    node.host.ip("link add udptun0 type veth peer name far")
    node.start()
    wait_for(lambda: node.daemon.alive and "udptun0" in node.ready()[1], "the check of the TUN")
    time.sleep(1)
    assert not node.subnet_file.exists()
    assert "[-]host" in node.ready()[1]
    node.host.ip("link del udptun0")
    node.wait_ready()
    assert node.subnet_file.exists()
