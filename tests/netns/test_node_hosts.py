"""Three machines with one hosts file form an overlay; daemons and forwarders end and restart."""

from __future__ import annotations

import http.client
import os
import signal
from pathlib import Path

import pytest

from tests.netns.cluster_traffic import SteadyPing, all_reach_all
from tests.processes import alive
from udptun.lab import Lab, LabError, ping, wait_for
from udptun.lab.cluster import Member, start_all


class Overlay:
    """Nodes on one segment, which share one hosts file."""

    def __init__(self, lab: Lab, *options: str, external: bool = False, v6: bool = False) -> None:
        hosts = [lab.host(f"n{i}") for i in (1, 2, 3)]
        lab.segment(*hosts)
        self.v6 = v6
        self.file = lab.folder / "hosts.toml"
        self.members = [
            Member(host, [f"--hosts={self.file}"], (f"--node-name={host.name}", *options), external)
            for host in hosts
        ]
        self.write()

    def write(self, *more: str, **changed: str) -> None:
        """Write the hosts file; ``n2="..."`` replaces the lines of that node."""
        networks = ["10.244.0.0/16", *(["fd44::/32"] if self.v6 else [])]
        text = [f"network = {networks}", *more]
        for i, member in enumerate(self.members, 1):
            subnets = [f"10.244.{i}.0/24", *([f"fd44:0:{i}::/64"] if self.v6 else [])]
            text += [f'[[nodes]]\nname = "n{i}"', changed.get(
                f"n{i}", f'public = "{member.host.v4}"\nsubnets = {subnets}')]
        fresh = self.file.with_suffix(".new")
        fresh.write_text("\n".join(text) + "\n")
        fresh.replace(self.file)

    def start(self) -> None:
        start_all(self.members)


@pytest.fixture
def overlay(lab):
    made = Overlay(lab)
    made.start()
    return made


def tun_of(member: Member) -> str:
    """Return the index of the node's TUN, which the kernel does not use again."""
    return member.host.run(["ip", "-o", "link", "show", "udptun0"]).stdout.split(":")[0]


def kill_group(member: Member) -> None:
    """Kill the daemon and all processes of its group."""
    os.killpg(member.daemon.pid, signal.SIGKILL)
    member.daemon.wait()


def test_three_machines_and_one_file_are_an_overlay(overlay):
    all_reach_all(overlay.members)
    a, b, _ = overlay.members
    assert ping(a.host, b.pod_v4).received == 3  # a host, too
    assert a.env["FLANNEL_SUBNET"] == "10.244.1.1/24"
    assert a.env["FLANNEL_MTU"] == "1472"
    assert a.routes() == {f"10.244.{i}.0/24 via {m.host.v4}"
                          for i, m in enumerate(overlay.members, 1) if m is not a}


def test_a_daemons_end_does_not_disturb_packets(overlay):
    """After SIGKILL to its group and SIGTERM it restarts; no packet and no device is lost."""
    a, b, _ = overlay.members
    before = (tun_of(a), a.forwarder_pid(), a.ask("/v1/routes"))
    steady = SteadyPing(a.pod, b.pod_v4)
    for end in (kill_group, Member.stop):
        end(a)
        assert (tun_of(a), a.forwarder_pid()) == before[:2]
        a.start()
        a.wait_ready()
    assert (tun_of(a), a.forwarder_pid(), a.ask("/v1/routes")) == before
    assert steady.lost() == 0


def forwarder_of(member: Member) -> int | None:
    """Return the process of the forwarder; None: no forwarder answers."""
    try:
        return member.forwarder_pid()
    except (OSError, LabError):
        return None


def standby_of(member: Member) -> int:
    """Return the process that waits to become the node's forwarder; 0: there is none."""
    for task in Path(f"/proc/{member.daemon.pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            try:
                arguments = Path(f"/proc/{child}/cmdline").read_bytes()
            except FileNotFoundError:  # it has ended since
                continue
            if b"--standby" in arguments and int(child) != member.forwarder_pid():
                return int(child)
    return 0


def test_a_new_pod_takes_over_from_the_old_one(lab):
    """As with maxSurge: the new containers start while the old ones run. The old processes stay,
    because the kubelet would start ended ones again, and end after the new ones."""
    overlay = Overlay(lab, "--take-over", external=True)
    a, b, _ = overlay.members
    a.start_forwarder("--take-over", "--linger")
    overlay.start()
    tun = tun_of(a)
    steady = SteadyPing(a.pod, b.pod_v4)
    pods = [(a.daemon, a.forwarder)]
    for _ in range(2):
        a.start_forwarder("--take-over", "--linger")
        a.start()
        pods.append((a.daemon, a.forwarder))
        old_daemon, old_forwarder = pods[-2]
        wait_for(lambda old=old_forwarder: "has taken over" in old.text(), "the new forwarder")
        wait_for(lambda old=old_daemon: "another daemon has taken over" in old.text(),
                 "the new daemon")
        wait_for(lambda: a.ready()[0] and a.ask("/v1/status")["pid"] == a.forwarder.pid,
                 "the new pod")
        assert tun_of(a) == tun
        assert all(process.alive for pod in pods for process in pod)
    assert steady.lost() == 0
    all_reach_all(overlay.members)
    first, second, third = pods
    for process in first:
        process.signal(signal.SIGTERM)
        assert process.wait() == 0
    for process in third:  # the second pod's containers end, and would be started again
        process.kill()
    for process in second:
        assert process.wait() == 0


def test_an_old_daemon_that_does_not_hand_over_is_named(overlay):
    """As an earlier version, whose socket has no such request."""
    a, *_ = overlay.members
    a.daemon.signal(signal.SIGSTOP)
    try:
        new = a.host.start(a.argv("--take-over"), name="node")
        assert new.wait() == 1
        assert "the running daemon does not answer" in new.text()
    finally:
        a.daemon.signal(signal.SIGCONT)


def test_a_forwarder_that_is_killed_comes_back_with_its_routes(overlay):
    """The standby process continues, with the same TUN. Afterwards there is another one, which ends
    with the daemon."""
    a, *_ = overlay.members
    killed, routes, tun = a.forwarder_pid(), a.routes(), tun_of(a)
    standby = wait_for(lambda: standby_of(a), "a standby process")
    os.kill(killed, signal.SIGKILL)

    wait_for(lambda: forwarder_of(a) not in (None, killed) and a.routes() == routes,
             "another forwarder with the routes")
    assert (a.forwarder_pid(), tun_of(a)) == (standby, tun)
    all_reach_all(overlay.members)
    another = wait_for(lambda: standby_of(a), "another standby process")
    a.daemon.signal(signal.SIGTERM)
    assert a.daemon.wait() == 0
    wait_for(lambda: not alive(another), "the end of the standby process")
    assert alive(standby)


def test_a_standby_process_stands_in_until_an_external_forwarder_takes_over(lab):
    """As in a DaemonSet: kubelet needs seconds to restart a container."""
    overlay = Overlay(lab, "--forwarder-standby", external=True)
    a, *_ = overlay.members
    a.start_forwarder("--take-over", "--linger")
    overlay.start()
    tun = tun_of(a)
    standby = wait_for(lambda: standby_of(a), "a standby process")
    a.forwarder.kill()
    wait_for(lambda: forwarder_of(a) == standby and a.ready()[0], "the standby process")
    all_reach_all(overlay.members)
    a.start_forwarder("--take-over", "--linger")
    wait_for(lambda: forwarder_of(a) == a.forwarder.pid and a.ready()[0], "the forwarder")
    wait_for(lambda: not alive(standby), "the end of the standby process")
    assert tun_of(a) == tun
    all_reach_all(overlay.members)
    assert wait_for(lambda: standby_of(a), "another standby process") != standby


def test_a_forwarder_that_is_gone_with_its_daemon_is_started_by_the_next(overlay):
    """As after a reboot, except that the devices still exist."""
    a, *_ = overlay.members
    os.kill(a.forwarder_pid(), signal.SIGKILL)
    kill_group(a)
    a.start()
    a.wait_ready()
    all_reach_all(overlay.members)


def listens_on(member):
    """Return where a member's forwarder listens; [] while the daemon replaces the forwarder."""
    try:
        return member.ask("/v1/status")["device"]["listen"]
    except (OSError, http.client.HTTPException):
        return []


def test_an_edited_file_is_applied_and_an_invalid_one_refused_with_its_line(overlay):
    a, b, c = overlay.members
    overlay.write(n3=f'public = "{c.host.v4}"\nsubnets = "10.244.3.0/24"\nport = 8300')
    wait_for(lambda: any(route["port"] == 8300 for route in a.ask("/v1/routes")["routes"]),
             "the peer's new port")
    wait_for(lambda: listens_on(c) == [f"{c.host.v4}:8300"], "its own forwarder to listen there")
    all_reach_all(overlay.members)
    routes = a.routes()
    overlay.write(n2='public = "192.0.2.300"\nsubnets = "10.244.2.0/24"')
    a.daemon.wait_for_output("line ")
    assert "192.0.2.300" in a.daemon.text()
    assert "[!]store" in a.ready()[1]
    assert a.routes() == routes
    # A daemon that starts now uses the last good file.
    kill_group(b)
    b.start()
    b.wait_ready()
    all_reach_all(overlay.members)
    overlay.write()
    wait_for(lambda: "[+]store" in a.ready()[1], "the good file to be taken")


def test_a_removed_node_is_unreachable(overlay):
    a, _, c = overlay.members
    text = overlay.file.read_text()
    overlay.file.write_text(text[: text.rindex("[[nodes]]")])
    wait_for(lambda: f"10.244.3.0/24 via {c.host.v4}" not in a.routes(), "its route to go")
    # The node itself keeps its lease, because no other node has it.
    wait_for(lambda: "[!]lease" in c.ready()[1], "it to report that")
    assert c.forwarder_pid()


def test_an_external_forwarder_reads_the_file_and_is_adopted(lab):
    overlay = Overlay(lab, external=True)
    overlay.start()
    all_reach_all(overlay.members)
    a, *_ = overlay.members
    assert a.forwarder is not None
    assert a.forwarder_pid() == a.forwarder.pid
    kill_group(a)
    a.start()
    a.wait_ready()
    assert a.forwarder.alive
    all_reach_all(overlay.members)


def test_both_families_over_an_ipv4_underlay(lab):
    overlay = Overlay(lab, v6=True)
    overlay.start()
    a, b, _ = overlay.members
    assert str(b.pod_v6) == "fd44:0:2::2"
    assert ping(a.pod, "fd44:0:2::2").received == 3
    assert ping(a.host, "fd44:0:2::2").received == 3
    assert "FLANNEL_IPV6_SUBNET" in a.env


def test_cleanup_leaves_a_host_as_it_was(lab):
    overlay = Overlay(lab, "--ip-masq")
    a, *_ = overlay.members

    def state() -> str:
        return a.host.run(["sh", "-c", "ip -o link; ip -o addr; ip route; nft list ruleset"]).stdout

    before = state()
    a.start()
    a.wait_ready()
    assert state() != before
    pid = a.forwarder_pid()
    refused = a.host.run(a.argv("--cleanup"), check=False)
    assert refused.returncode == 1
    assert "already running" in refused.stderr
    a.clean_up()
    assert state() == before
    assert not alive(pid)
    assert [path for path in a.folder.rglob("*") if path.is_file()] == []


def test_an_underlay_that_is_too_small_for_ipv6_carries_it_in_fragments(lab):
    overlay = Overlay(lab, v6=True)
    small, *others = overlay.members
    small.host.interfaces[0].set_mtu(1280)
    for member in overlay.members:
        member.start()
    for member in overlay.members:
        member.wait_ready()
        # the lab gives each pod an IPv6 address, which needs an MTU of 1280
        member.pod = member.host.pod(str(member.subnet), mtu=1280, name=f"pod-{member.host.name}")
    all_reach_all(overlay.members)
    assert "[+]mtu: inner packets have up to 1280" in small.ready()[1]
    assert small.env["FLANNEL_MTU"] == "1280"
    assert "FLANNEL_IPV6_SUBNET" in small.env
    assert all("[+]mtu: inner packets have up to 1472" in other.ready()[1] for other in others)
    assert small.daemon.text().count("started a forwarder") == 1
    small.host.interfaces[0].set_mtu(1500)
    small.daemon.signal(signal.SIGHUP)
    wait_for(lambda: "up to 1472" in small.ready()[1], "the larger MTU")
    wait_for(lambda: small.env["FLANNEL_MTU"] == "1472", "the larger MTU in subnet.env")
    all_reach_all(overlay.members)
    small.host.interfaces[0].set_mtu(1280)
    small.daemon.signal(signal.SIGHUP)
    wait_for(lambda: "up to 1280" in small.ready()[1], "the smaller MTU")
    all_reach_all(overlay.members)
    for other in others:
        other.host.interfaces[0].set_mtu(1280)
        other.daemon.signal(signal.SIGHUP)
        wait_for(lambda other=other: "up to 1280" in other.ready()[1], "the smaller MTU")
    all_reach_all(overlay.members)
    largest = 1280 - 48  # ping's payload
    assert ping(others[0].host, "fd44:0:1::", count=2, size=largest).received == 2


@pytest.mark.slow
def test_a_wrong_public_address_in_the_file_is_named_with_its_error(lab):
    overlay = Overlay(lab)
    a, b, _ = overlay.members
    overlay.write(n2='public = "198.18.1.77"\nsubnets = ["10.244.2.0/24"]')
    for member in overlay.members:
        member.start()
    why = "no route to host: 198.18.1.77 does not answer on its link (ICMP host unreachable from"
    wait_for(lambda: why in a.ready()[1], "the error in the check", 60)
    assert "the address to publish, 198.18.1.77, is on the link of eth0, but not on this host" in \
        b.ready()[1]
