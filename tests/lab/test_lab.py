"""The lab: its hosts and links work, and it removes everything that it created."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes import DEFAULT_SIGNALS, alive
from udptun.lab import Lab, LabError, Unavailable, iperf3, ping, vxlan, wait_for

NETNS = Path("/run/netns")


def names(pid: int) -> list[str]:
    return [p.name for p in NETNS.glob(f"ut{pid}-*")]


def test_links_segments_and_pods_reach_each_other(lab):
    a, b = lab.host("a"), lab.host("b")
    lab.link(a, b)
    hosts = [lab.host(name) for name in "cde"]
    lab.segment(*hosts)
    c, _, e = hosts
    pod = c.pod("10.1.1.0/24", "fd01::/64")
    e.ip(f"route add 10.1.1.0/24 via {c.v4}", f"route add fd01::/64 via {c.v6}")
    for host, address in (
        (a, b.v4), (a, b.v6), (c, e.v4), (c, e.v6), (e, "10.1.1.2"), (e, "fd01::2"),
    ):
        assert ping(host, address).received == 3, f"{host.name} -> {address}"
    assert ping(pod, e.v4).received == 3


def test_a_smaller_middle_mtu_causes_icmp_errors(lab):
    a, b = lab.host("a"), lab.host("b")
    link = lab.link(a, b, middle_mtu=1300)
    assert any("mtu = 1300" in e for e in ping(a, b.v4, size=1400, df=True).errors)
    assert any("mtu=1300" in e for e in ping(b, a.v6, size=1400).errors)
    link.set_middle_mtu(1500)
    fresh = ping(b, a.v4, size=1400, df=True)
    assert fresh.received == 3


def test_each_profile_sets_all_its_offloads(lab):
    a, b = lab.host("a"), lab.host("b")
    link = lab.link(a, b)
    as_made = a.run(["ethtool", "-k", "eth0"]).stdout
    for profile, gso, gro in (("P2", "off", "on"), ("P3", "off", "off"), ("P1", "on", "off")):
        link.profile(profile)
        features = a.run(["ethtool", "-k", "eth0"]).stdout
        assert f"generic-segmentation-offload: {gso}" in features
        assert f"tcp-segmentation-offload: {gso}" in features
        assert f"generic-receive-offload: {gro}" in features
    assert features == as_made


def test_profile_p4_turns_only_tunnel_segmentation_off(lab):
    a, b = lab.host("a"), lab.host("b")
    link = lab.link(a, b)
    for profile, tunnel, gro in (("P4", "off", "on"), ("P1", "on", "off")):
        link.profile(profile)
        features = a.run(["ethtool", "-k", "eth0"]).stdout
        assert f"tx-udp_tnl-segmentation: {tunnel}" in features
        assert f"tx-udp_tnl-csum-segmentation: {tunnel}" in features
        assert f"generic-receive-offload: {gro}" in features
        for name in ("tcp-segmentation-offload", "generic-segmentation-offload",
                     "tx-udp-segmentation"):
            assert f"{name}: on" in features


def test_iperf3_returns_numbers_or_raises_its_error(lab):
    a, b = lab.host("a"), lab.host("b")
    lab.link(a, b)
    assert iperf3(b, a, b.v4, seconds=1).bits_per_second > 1e6
    udp = iperf3(b, a, b.v4, seconds=1, udp_bits_per_second=8e6, length=100)
    assert udp.lost_percent is not None
    b.ip("link set eth0 down")
    with pytest.raises(LabError, match="iperf3"):
        iperf3(b, a, b.v4, seconds=1)


def test_vxlan_works_or_raises_the_reason(lab):
    a, b = lab.host("a"), lab.host("b")
    lab.link(a, b)
    try:
        here, there = vxlan(a, b)
    except Unavailable as e:
        pytest.skip(str(e))
    assert here != there
    assert ping(a, there).received == 3


def test_an_exception_removes_everything():
    with pytest.raises(RuntimeError), Lab() as lab:
        process = lab.host("a").start(["sleep", "1000"])
        prefix, folder = lab.prefix, lab.folder
        raise RuntimeError
    assert not [p for p in NETNS.iterdir() if p.name.startswith(prefix)]
    assert not folder.exists()
    assert not Path(f"/proc/{process.pid}").exists()


# Creates a lab with a process in it, prints their names, and waits for a signal.
VICTIM = """
import signal
from udptun.lab import Lab
with Lab() as lab:
    process = lab.host("a").start(["sleep", "1000"])
    print(process.pid, lab.folder, flush=True)
    signal.pause()
"""


def start_victim(*prefix: str) -> tuple[subprocess.Popen, int, Path]:
    victim = subprocess.Popen(
        [*DEFAULT_SIGNALS, *prefix, sys.executable, "-c", VICTIM], stdout=subprocess.PIPE,
        text=True, stderr=subprocess.DEVNULL, start_new_session=True,
    )
    pid, folder = victim.stdout.readline().split()
    return victim, int(pid), Path(folder)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_removes_everything(number):
    victim, pid, folder = start_victim()
    with victim:
        assert names(victim.pid)
        victim.send_signal(number)
        assert victim.wait(60) != 0
    assert not names(victim.pid)
    assert not folder.exists()
    assert not Path(f"/proc/{pid}").exists()


def test_sigint_ends_a_lab_in_the_background_of_a_shell():
    """A shell lets background processes ignore SIGINT."""
    victim, _, folder = start_victim("sh", "-c", "trap '' INT; exec \"$@\"", "sh")
    with victim:
        victim.send_signal(signal.SIGINT)
        assert victim.wait(60) != 0
    assert not names(victim.pid)
    assert not folder.exists()


def test_the_next_lab_removes_namespaces_of_a_killed_lab():
    victim, pid, folder = start_victim()
    with victim:
        victim.kill()
        victim.wait()
    wait_for(lambda: not alive(pid), "its process to die with it")
    assert names(victim.pid)
    assert folder.exists()
    with Lab() as other:
        assert not names(victim.pid)
        assert not folder.exists()
        assert other.folder.exists()


def test_two_labs_at_once_are_separate():
    with Lab() as one, Lab() as two:
        one.host("a")
        two.host("a")
        assert len(names(os.getpid())) >= 2
        one.close()
        assert two.host("b").run(["true"]).returncode == 0
