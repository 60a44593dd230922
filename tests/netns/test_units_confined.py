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
from udptun.lab import wait_for
from udptun.lab.cluster import Cluster, Member, etcd_obstacle, unreachable

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"

pytestmark = [
    pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd-analyze"),
    pytest.mark.skipif(ctypes.util.find_library("seccomp") is None, reason="no libseccomp"),
    pytest.mark.skipif(etcd_obstacle() is not None, reason=str(etcd_obstacle())),
]


class Confined(Member):
    """A node whose two processes have the restrictions of the units."""

    def argv(self, *more: str) -> list[str]:
        return [*self._wrapper("udptun-node"), *super().argv(*more)]

    def start_forwarder(self) -> None:
        waiting = ["--wait-for", str(self.control.with_name("forward.json"))]
        command = [sys.executable, "-m", "udptun", "forward", *waiting]
        self.forwarder = self.host.start(
            [*self._wrapper("udptun-node-forwarder"), *command], name="forwarder")

    def _wrapper(self, unit: str) -> list[str]:
        return [sys.executable, "-m", "tests.confined", str(DEPLOY / f"{unit}.service"),
                str(self.host.lab.folder)]


def seccomp_mode(pid: int) -> str:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return dict(line.split(":", 1) for line in lines)["Seccomp"].strip()


@pytest.mark.parametrize("restriction", ["clone3", "io_uring_setup", "ptrace"])
def test_the_filter_refuses(restriction):
    calls = confined.allowed_calls(
        confined.settings(DEPLOY / "udptun-node.service")["SystemCallFilter"])
    assert (restriction in calls) == (restriction == "clone3")


@pytest.mark.slow
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
