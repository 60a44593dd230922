"""The privileges of real forwarders and daemons, and that everything still works with these.

``tests/test_privileges.py`` tests how they are given up.
"""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

import pytest

from udptun.lab import pair, ping, wait_for
from udptun.lab.cluster import Member, start_all
from udptun.lab.tunnels import Forwarder
from udptun.node.process.launch import FORWARD_FILE

NET_ADMIN, NET_RAW, NET_BIND_SERVICE, BPF = 1 << 12, 1 << 13, 1 << 10, 1 << 39
CONTAINER = ("nice", "-n", "-5", "setpriv", "--bounding-set=-all,+net_admin",
             "--inh-caps=-all", "--no-new-privs")


def privileges(pid: int) -> set[tuple[int, int, int, int]]:
    """Return (effective, permitted, ambient, no_new_privs) of the threads of a process."""
    found = set()
    for thread in Path(f"/proc/{pid}/task").iterdir():
        lines = (thread / "status").read_text().splitlines()
        fields = dict(line.split(":", 1) for line in lines)
        found.add((*(int(fields[f"Cap{name}"], 16) for name in ("Eff", "Prm", "Amb")),
                   int(fields["NoNewPrivs"])))
    return found


def bounding(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(dict(line.split(":", 1) for line in lines)["CapBnd"], 16)


def nice_values(pid: int) -> set[int]:
    """Return the nice values of the threads of a process."""
    stats = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/stat")]
    return {int(stat.rpartition(")")[2].split()[16]) for stat in stats}


def tun_index(host) -> str:
    shown = host.run(["ip", "-o", "link", "show", "udptun0"], check=False)
    return shown.stdout.split(":")[0]


def reaches(host, address) -> bool:
    return host.run(["ping", "-c1", "-W1", str(address)], check=False).returncode == 0


@pytest.mark.parametrize(("workers", "kept"), [(1, NET_ADMIN), (2, NET_ADMIN | BPF)])
def test_a_forwarder_keeps_what_it_needs_and_repairs_its_tun_with_it(lab, workers, kept):
    tunnel = pair(lab, workers=workers)
    a, b = tunnel.sides
    pid = a.forwarder.process.pid
    assert ping(a.host, b.v4).received == 3
    assert privileges(pid) == {(kept, kept, 0, 1)}
    assert bounding(pid) == kept  # for the forwarder that takes over after SIGUSR2
    before = tun_index(a.host)
    a.host.run(["ip", "link", "del", "udptun0"])
    wait_for(lambda: tun_index(a.host) not in ("", before), "the TUN to be made again")
    wait_for(lambda: reaches(a.host, b.v4), "an answer through the new TUN")
    assert "may move between TUN queues" not in a.forwarder.process.text()


def test_a_forwarder_in_a_container_needs_no_more_than_net_admin(lab):
    tunnel = pair(lab, start=False)
    a, b = tunnel.sides
    b.start()
    control, routes = lab.folder / "a.sock", lab.folder / "a.routes"
    routes.write_text("".join(f"{route}\n" for route in a.routes_to(b)))
    process = a.host.start([
        *CONTAINER, sys.executable, "-m", "udptun", "forward", "--listen", str(a.outer),
        "--address", str(a.v4), "--address", str(a.v6), "--network", "10.244.0.0/16",
        "--network", "fd44::/32", "--control", str(control), "--routes", str(routes),
    ])
    Forwarder(process, control, routes).wait_ready()
    assert privileges(process.pid) == {(NET_ADMIN, NET_ADMIN, 0, 1)}
    assert nice_values(process.pid) == {-5}
    assert ping(a.host, b.v4).received == 3
    assert ping(a.host, b.v6).received == 3
    a.host.run(["ip", "link", "del", "udptun0"])
    wait_for(lambda: reaches(a.host, b.v6), "an answer through the new TUN")


@pytest.mark.parametrize(
    "firewall", ["nftables", pytest.param("iptables", marks=pytest.mark.slow)])
def test_a_node_daemon_keeps_what_it_and_its_tools_need(lab, firewall):
    hosts = [lab.host(f"n{i}") for i in (1, 2)]
    lab.segment(*hosts)
    text = ['network = "10.244.0.0/16"', *(
        f'[[nodes]]\nname = "n{i}"\npublic = "{host.v4}"\nsubnets = "10.244.{i}.0/24"'
        for i, host in enumerate(hosts, 1)
    )]
    (lab.folder / "hosts.toml").write_text("\n".join(text) + "\n")
    members = [
        Member(host, [f"--hosts={lab.folder / 'hosts.toml'}"],
               (f"--node-name={host.name}", "--ip-masq", f"--firewall={firewall}"))
        for host in hosts
    ]
    start_all(members)
    one = members[0]
    use = NET_ADMIN | NET_RAW
    assert privileges(one.daemon.pid) == {(use, use | NET_BIND_SERVICE, 0, 1)}
    assert bounding(one.daemon.pid) == use | NET_BIND_SERVICE
    assert privileges(forwarder_of(one)) == {(NET_ADMIN, NET_ADMIN, 0, 1)}
    assert "10.244.0.0/16" in rules(one, firewall)
    one.host.run(["nft", "flush", "ruleset"])  # the rules of iptables-nft too
    wait_for(lambda: "10.244.0.0/16" in rules(one, firewall), "the rules to be added again")
    assert ping(one.host, "10.244.2.0").received == 3


def rules(member: Member, firewall: str) -> str:
    tool = ["iptables-save"] if firewall == "iptables" else ["nft", "list", "ruleset"]
    return member.host.run(tool).stdout


def forwarder_of(member: Member) -> int:
    """Return the process of the forwarder that the daemon has started."""
    file = str(member.control.with_name(FORWARD_FILE)).encode()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has ended
            if file in (process / "cmdline").read_bytes().split(b"\0"):
                return int(process.name)
    raise AssertionError(f"no process has {file!r} in its command line")
