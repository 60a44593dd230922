"""A node works with the restrictions of its units: system calls, capabilities, read-only files.

systemd does not run here; ``tests/confined.py`` applies the units' settings.
"""

from __future__ import annotations

import ctypes.util
import shutil
import sys
from pathlib import Path

import pytest

from tests import confined
from tests.netns.netns_traffic import skip_without_programs
from udptun.lab import pair, ping, wait_for
from udptun.lab.cluster import Cluster, Member, etcd_obstacle, unreachable
from udptun.lab.tunnels import Forwarder

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"

DROP_IN = DEPLOY / "bpf.conf"

pytestmark = [
    pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd-analyze"),
    pytest.mark.skipif(ctypes.util.find_library("seccomp") is None, reason="no libseccomp"),
]


def wrapper(host, *units: Path) -> list[str]:
    return [sys.executable, "-m", "tests.confined", ":".join(map(str, units)),
            str(host.lab.folder)]


class Confined(Member):
    """A node whose two processes have the restrictions of the units."""

    def argv(self, *more: str) -> list[str]:
        return [*wrapper(self.host, DEPLOY / "udptun-node.service"), *super().argv(*more)]

    def start_forwarder(self) -> None:
        waiting = ["--wait-for", str(self.control.with_name("forward.json"))]
        command = [sys.executable, "-m", "udptun", "forward", *waiting]
        unit = DEPLOY / "udptun-node-forwarder.service"
        self.forwarder = self.host.start([*wrapper(self.host, unit), *command], name="forwarder")


def seccomp_mode(pid: int) -> str:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return dict(line.split(":", 1) for line in lines)["Seccomp"].strip()


@pytest.mark.parametrize("restriction", ["clone3", "io_uring_setup", "ptrace"])
def test_the_filter_refuses(restriction):
    calls = confined.allowed_calls(
        confined.settings(DEPLOY / "udptun-node.service")["SystemCallFilter"])
    assert (restriction in calls) == (restriction == "clone3")


@pytest.mark.parametrize("unit", ["udptun-forwarder", "udptun-node-forwarder"])
@pytest.mark.parametrize("with_drop_in", [True, False])
def test_the_drop_in_allows_the_express_path(lab, unit, with_drop_in):
    skip_without_programs()
    tunnel = pair(lab, start=False)
    a, b = tunnel.sides
    b.start(extra=("--accelerate", "auto"),
            routes=[f"{route} express" for route in b.routes_to(a)])
    control, routes = lab.folder / "a.sock", lab.folder / "a.routes"
    routes.write_text("".join(f"{route} express\n" for route in a.routes_to(b)))
    units = [DEPLOY / f"{unit}.service", *([DROP_IN] if with_drop_in else [])]
    process = a.host.start([
        *wrapper(a.host, *units), sys.executable, "-m", "udptun", "forward", "--listen",
        str(a.outer), "--address", str(a.v4), "--network", "10.244.0.0/16", "--control",
        str(control), "--routes", str(routes), "--accelerate", "auto"])
    forwarder = Forwarder(process, control, routes)
    forwarder.wait_ready()
    state = forwarder.status()["accelerate"]
    if with_drop_in:
        wait_for(lambda: forwarder.status()["accelerate"]["active"], "the express path")
    else:
        assert state["reason"] == ("this process may not load programs: it needs CAP_BPF and the "
                                   "system call bpf (EPERM)")
    assert ping(a.pod, b.pod_v4).received == 3
    sent = forwarder.status()["accelerate"]["packets"]["sent"]
    assert sent == (3 if with_drop_in else 0)
    assert forwarder.stop() == 0
    assert "clsact" not in a.host.run(["tc", "qdisc", "show"]).stdout


@pytest.mark.slow
@pytest.mark.skipif(etcd_obstacle() is not None, reason=str(etcd_obstacle()))
def test_a_node_works_in_its_units(lab):
    cluster = Cluster(lab, 2, options=["--backend=auto", "--ip-masq", "--firewall=iptables"])
    cluster.members = [Confined(m.host, m.store, m.options, external=True)
                       for m in cluster.members]
    cluster.start()
    assert unreachable(cluster.members) == []
    one = cluster.members[0]
    assert seccomp_mode(one.daemon.pid) == seccomp_mode(one.forwarder.pid) == "2"
    assert "10.244.0.0/16" in one.host.run(["iptables-save"]).stdout
    # Repairs after the start
    one.host.run(["ip", "link", "del", "udptun0"])
    one.host.run(["ip", "link", "del", "flannel.1"])
    for device in ("udptun0", "flannel.1"):
        wait_for(lambda device=device: one.host.run(
            ["ip", "route", "show", "dev", device], check=False).stdout, f"routes of {device}")
    wait_for(lambda: unreachable(cluster.members) == [], "an answer on the new devices")
    for process in (one.daemon, one.forwarder):
        assert "Operation not permitted" not in process.text()
