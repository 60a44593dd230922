"""``udptun doctor`` on healthy nodes, and on nodes with one fault each.

Most faults are acts of ``tests/chaos``, the others are in ``faults.py``. Neither knows what doctor
looks at. A fault must be found by the check that concerns it, with evidence.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from random import Random

import pytest

from tests.chaos.acts import ACTS
from tests.chaos.acts.processes import send_signal
from tests.chaos.world import ClusterKind, World
from tests.netns.doctor_runs import ask, await_finding, await_healthy, doctor
from tests.netns.hosts_file import two_nodes
from tests.netns.test_tunnel_probes import probing
from udptun.doctor.checks import CHECKS
from udptun.lab import Lab, wait_for
from udptun.lab.cluster import Cluster, etcd_obstacle, start_all
from udptun.lab.tunnels import control_request

LONG = pytest.mark.timeout(1800)  # each act takes 10 to 30 s
needs_etcd = pytest.mark.skipif(etcd_obstacle() is not None, reason=str(etcd_obstacle()))

# Acts that last, by the mode of the cluster: the check that must find the act, and what its finding
# must contain.
LASTING = {
    "udp": {
        "route-other": ("routes", r"10\.244\.\d+\.0/25 via"),
        "route-blackhole": ("routes", r"blackhole 10\.244"),
        "policy-rule": ("routes", "No route to host"),
        "endpoint-in-tun": ("routes", "enter udptun0"),
        "default-route": ("interface", "vpn0"),
        "firewalld": ("firewall", "table inet firewalld"),
        "input-drop": ("firewall", r"to this node \(UDP 8285\).*table inet strict"),
        "output-drop": ("firewall", r"from this node \(UDP 8285\).*table inet strict"),
        "conntrack-full": ("conntrack", r"\d+ of \d+ entries"),
        "block-udp": ("peers", "answers pings, so UDP port 8285 is filtered"),
        "block-udp-one-way": ("peers", r"unreachable.*8285"),
        "block-udp-large": ("packet-size", r"largest packet that passes has \d+ bytes"),
        "block-node": ("peers", "answers pings, so UDP port 8285 is filtered"),
        "loss": ("loss", r"\d+% of the packets"),
        "underlay-down": ("underlay", "eth0, which carries the tunnel, is down"),
        "stop-daemon": ("node-daemon", "stopped by a signal.*state T.*kill -CONT"),
        "stop-forwarder": ("forwarder", "stopped by a signal.*state T.*kill -CONT"),
        "suspend": ("node-daemon", "stopped by a signal"),
        "clock-forward": ("clock", "set forward by 2 d"),
        "clock-back": ("clock", "set back by 2 d"),
        "store-stop": ("store", "etcd.*last answer"),
        "lease-garbage": ("store", "10.244.250.0-24"),
    },
    "vxlan": {
        "block-vxlan": ("peers", r"VXLAN.*answers pings, so the tunnel's UDP port is filtered"),
        "block-vxlan-large": ("packet-size", r"VXLAN.*largest packet that passes has \d+ bytes"),
        "ufw": ("firewall", r"UDP 8472.*ufw"),
        "input-drop": ("firewall", r"to this node \(UDP 8472\).*table inet strict"),
        "stop-daemon": ("node-daemon", "stopped by a signal"),
    },
    "auto": {
        "block-vxlan": ("preferred-path", "reached by UDP only: VXLAN"),
        "block-udp": ("other-path", "UDP, the second path to .* does not work"),
    },
}
# Acts that a running node repairs: so its programs are stopped or killed first.
UNATTENDED = {
    "link-down": ("host", "udptun0: it is down"),
    "addr-flush": ("host", r"udptun0: it has lost 10\.244"),
    "underlay-mtu": ("mtu", "udptun0 has MTU 1472, and eth0 has only 1300"),
    "link-mtu": ("host", "udptun0: its MTU is 1000"),
    "route-flush": ("host", r"udptun0: it has lost 10\.244\.0\.0/16"),
    "link-rename": ("host", "udptun0 does not exist"),
    "forwarding-off": ("forwarding", "net.ipv4.ip_forward is 0.*sysctl -w"),
    "rp-filter-tun": ("rp-filter", "udptun0.*rp_filter is 1.*sysctl -w"),
    "forward-drop": ("firewall", r"iptables \(nft\), table filter.*FORWARD"),
    "forward-drop-legacy": ("firewall", r"iptables \(legacy\), table filter.*FORWARD"),
    "nft-flush": ("firewall", "masquerade packets of pods are gone.*udptun-ipv4"),
    "leftover-chains": ("leftovers", "FLANNEL-"),
    "leftover-flannel": ("leftovers", r"flannel\.1 of a former flannel.*ip link delete"),
    "route-blackhole": ("routes", r"blackhole 10\.244"),
    "subnet-env-delete": ("subnet-env", "does not exist: no pod can be attached"),
    "run-delete": ("state-files", "run does not exist"),
}
# Faults of ``faults.py``, which are not acts of the chaos, by the mode of the cluster.
OTHERS = {
    "udp": {
        "other-subnet": ("subnet-env", r"subnet 10\.244\.99\.0/24.*lease"),
        "name-taken": ("device-names", "udptun0 is not a TUN.*veth"),
    },
    "vxlan": {"vni-taken": ("device-names", "vx9 has the VNI 1")},
}


@contextlib.contextmanager
def world_of(lab: Lab, mode: str):
    world = World(lab, ClusterKind(mode), 3)
    try:
        world.start()
        for member in world.members:
            await_healthy(member)
        yield world
    finally:
        world.close()


@needs_etcd
@pytest.mark.slow
@LONG
@pytest.mark.parametrize("mode", LASTING)
def test_each_lasting_act_is_found_by_name(lab, mode):
    missed = []
    with world_of(lab, mode) as world:
        for name, (check, pattern) in LASTING[mode].items():
            scene = ACTS[name].do(world, Random(f"doctor {name}"))
            try:
                await_finding(_observer(scene, world), check, pattern)
            except AssertionError as exc:
                missed.append(f"{name} ({scene.text}): {exc}")
            finally:
                scene.undo()
            for one in world.members:
                await_healthy(one)
    assert missed == []


def _observer(scene, world):
    """Return the node on which the act must be found."""
    if scene.touched:
        return scene.touched[0]
    first = scene.text.split()[0]
    return next((one for one in world.members if one.host.name == first), world.members[0])


@needs_etcd
@pytest.mark.slow
@LONG
def test_each_act_on_an_unattended_node_is_found_by_name(lab):
    """The daemon and the forwarder are stopped, so doctor must look itself."""
    missed = []
    with world_of(lab, "udp") as world:
        for name, (check, pattern) in UNATTENDED.items():
            pids = world.pids(*world.members)
            send_signal(pids, signal.SIGSTOP)
            undo = None
            try:
                scene = ACTS[name].do(world, Random(f"doctor {name}"))
                undo = scene.undo
                report = doctor(scene.touched[0])
                wanted = {check: pattern, "node-daemon": "state T", "forwarder": "state T"}
                missed += [f"{name} ({scene.text}): not /{text}/ of {one}: {report.problems}"
                           for one, text in wanted.items() if not report.says(one, text)]
            finally:
                if undo is not None:
                    undo()
                send_signal(pids, signal.SIGCONT)
            for one in world.members:
                await_healthy(one)
    assert missed == []


@needs_etcd
@pytest.mark.slow
@LONG
@pytest.mark.parametrize("mode", OTHERS)
def test_other_faults_are_found_by_name(lab, mode):
    with world_of(lab, mode) as world:
        member = world.members[0]
        for name, (check, pattern) in OTHERS[mode].items():
            pids = world.pids(member)
            send_signal(pids, signal.SIGSTOP)
            try:
                fault(member, name)
                report = doctor(member)
                assert report.says(check, pattern), f"{name}: {report.problems}"
            finally:
                for device in ("vx9", "far0"):
                    member.host.run(["ip", "link", "del", device], check=False)
                send_signal(pids, signal.SIGCONT)
            await_healthy(member)


def environment(member):
    return {"STATE_DIR": str(member.folder / "state"),
            "SUBNET_FILE": str(member.subnet_file), "ADDRESS": str(member.host.v4)}


def fault(member, name):
    member.host.run([sys.executable, "-m", "tests.netns.faults", name], env=environment(member))


@needs_etcd
@pytest.mark.slow
@LONG
def test_files_ports_and_dead_programs(lab):
    """Faults that need a mount namespace, or that the node must be dead for."""
    cluster = Cluster(lab, 2)
    cluster.start()
    node, _ = cluster.members
    await_healthy(node)
    faults = {
        "state-read-only": ("state-files", "read-only file system"),
        "state-full": ("state-files", "is full"),
        "tun-missing": ("tun-device", "is not the TUN device"),
    }
    for name, (check, pattern) in faults.items():
        inject = f'{sys.executable} -m tests.netns.faults {name} && exec "$@"'
        words = " ".join(f"{key}={value}" for key, value in environment(node).items())
        report = doctor(node, prefix=("unshare", "-m", "sh", "-c", f"export {words}; {inject}",
                                      "sh"))
        assert report.says(check, pattern), f"{name}: {report.problems}"
    await_healthy(node)

    other = cluster.etcd.host
    other.ip(f"address add {node.host.v4}/32 dev {other.interfaces[0].name}")
    assert doctor(node).says("underlay-address", r"another host has the address.*ARP")
    other.ip(f"address del {node.host.v4}/32 dev {other.interfaces[0].name}")
    await_healthy(node)

    node.daemon.kill()
    report = doctor(node)
    assert "does not run" in report.of("node-daemon")[0]
    assert not report.of("forwarder")
    pid = node.forwarder_pid()
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: doctor(node).of("forwarder"), "doctor to miss the forwarder")
    holder = node.host.start([sys.executable, "-m", "tests.netns.faults", "port-taken", "--hold"],
                             env=environment(node))
    wait_for(lambda: doctor(node).says("port", "another program has the UDP port 8285"),
             "doctor to find the port taken")
    holder.kill()
    assert "does not run" in doctor(node).of("forwarder")[0]


@needs_etcd
@pytest.mark.slow
@pytest.mark.parametrize("backend", ["udp", "vxlan", "auto"])
def test_a_healthy_cluster(lab, backend):
    cluster = Cluster(lab, 3, options=[f"--backend={backend}"], config={
        "Network": "10.244.0.0/16", "EnableIPv6": True, "IPv6Network": "fd00:10:244::/56",
        "Backend": {"Type": "udp" if backend == "udp" else "vxlan"}})
    for member in cluster.members:
        member.host.sysctl("net.ipv6.conf.all.forwarding=1")
    cluster.start()
    for member in cluster.members:
        await_healthy(member)


@pytest.mark.slow
def test_drops_and_full_buffers_of_a_forwarder_without_a_daemon(lab):
    """The packets come from a program that is no peer."""
    a, b = probing(lab).sides
    assert ask(a.host, a.forwarder.control).problems == []
    pid = control_request(a.forwarder.control, "GET", "/v1/status")[1]["pid"]

    def flood(burst):
        return b.host.start([sys.executable, "-c", "import socket, time\n"
                             "s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n"
                             "while True:\n"
                             f"    for _ in range({burst}):\n"
                             f"        s.sendto(b'E' * 1400, ('{a.outer}', 8285))\n"
                             "    time.sleep(0.02)\n"])

    sender = flood(1)
    wait_for(lambda: ask(a.host, a.forwarder.control).says("drops", "decap.*since the start"),
             "doctor to find the drops")
    sender.kill()
    os.kill(pid, signal.SIGSTOP)
    sender = flood(400)
    try:
        words = "--check", "buffers", "--check", "forwarder"
        wait_for(lambda: ask(a.host, a.forwarder.control, *words).says(
            "buffers", r"receive buffer.*\d+ within"), "doctor to find the full buffer")
        assert ask(a.host, a.forwarder.control, *words).says("forwarder", "state T")
    finally:
        os.kill(pid, signal.SIGCONT)
        sender.kill()


def test_a_pair_of_hosts_and_its_stopped_programs(lab):
    """Fast: nothing is found on a healthy pair; a stopped daemon and a stopped forwarder are."""
    members = two_nodes(lab)
    start_all(members)
    node, _ = members
    await_healthy(node)
    report = doctor(node)
    assert {one["check"] for one in report.findings} == {check.name for check in CHECKS}

    node.subnet_file.rename(node.subnet_file.with_suffix(".gone"))
    pids = [node.daemon.pid, node.forwarder_pid()]
    send_signal(pids, signal.SIGSTOP)
    try:
        node.subnet_file.unlink(missing_ok=True)
        began = time.monotonic()
        report = doctor(node)
        assert time.monotonic() < began + 60  # although both sockets hang
    finally:
        send_signal(pids, signal.SIGCONT)
    assert f"process {pids[0]} has the state T" in report.of("node-daemon")[0]
    assert f"process {pids[1]} has the state T" in report.of("forwarder")[0]
    assert report.of("subnet-env")
    await_healthy(node)
