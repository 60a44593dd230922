"""Two overlays on the same hosts: each works as if the other one did not exist."""

from __future__ import annotations

import contextlib
import json
import signal
import time
from collections.abc import Iterator

import pytest

from tests.netns.cluster_traffic import SteadyPing, all_reach_all
from udptun.instance import Instance
from udptun.lab import Lab
from udptun.lab.cluster import Etcd, Member, etcd_obstacle, start_all

SHORT_SECONDS, LONG_SECONDS = 5, 600
MAX_LOST = 2  # pings: on a loaded machine the choice between VXLAN and UDP may change

pytestmark = pytest.mark.skipif(etcd_obstacle() is not None, reason=str(etcd_obstacle()))


class Overlay:
    """One network, and its node daemons with ``--backend auto`` on all hosts."""

    def __init__(self, etcd: Etcd, hosts, name: str, number: int) -> None:
        config = {"Network": f"10.{number}.0.0/16",
                  "Backend": {"Type": "auto", "VNI": number, "Port": 8000 + number}}
        etcd.put(f"/{name}/config", json.dumps(config))
        self.members = [
            Member(host, [f"--etcd-endpoints={etcd.url}", f"--etcd-prefix=/{name}"],
                   ("--ip-masq", "--iptables-resync=1"), instance=name, health_port=9000 + number)
            for host in hosts
        ]

    def start(self) -> None:
        start_all(self.members)


@pytest.fixture
def overlays(lab: Lab) -> Iterator[tuple[Overlay, Overlay]]:
    hosts = [lab.host("n1"), lab.host("n2")]
    store = lab.host("etcd")
    lab.segment(*hosts, store)
    etcd = Etcd(store)
    both = Overlay(etcd, hosts, "red", 44), Overlay(etcd, hosts, "blue", 45)
    for overlay in both:
        overlay.start()
    yield both
    for overlay in both:
        for member in overlay.members:
            if member.daemon.alive:
                member.stop()
            member.host.run(member.argv("--cleanup"), check=False)
    for name in ("red", "blue"):  # the directories of the locks
        with contextlib.suppress(OSError):
            Instance(name).run_dir.rmdir()


def things_of(member: Member) -> str:
    """Return all routes, rules, devices and addresses whose names have the member's instance."""
    listing = member.host.run(["sh", "-c", "ip -o link; ip -o addr; ip route; nft list ruleset"])
    return "\n".join(line for line in listing.stdout.splitlines() if member.instance in line)


def side_by_side(red: Overlay, blue: Overlay, seconds: float) -> None:
    """Reload, clean up and start the blue overlay again and again, under traffic of both."""
    a, b = red.members
    end, rounds = time.monotonic() + seconds, 0
    pings = SteadyPing(a.pod, b.pod_v4), SteadyPing(a.host, b.pod_v4)
    while rounds == 0 or time.monotonic() < end:
        for overlay in (red, blue):
            for member in overlay.members:
                member.daemon.signal(signal.SIGHUP)
            all_reach_all(overlay.members)
        one, other = blue.members
        one.remove_pod()
        one.clean_up()
        assert things_of(one) == ""
        assert a.ready()[0] and b.ready()[0]
        one.start()
        one.wait_ready()
        one.add_pod()
        all_reach_all(blue.members)
        assert other.daemon.alive
        rounds += 1
    for ping in pings:
        assert ping.lost() <= MAX_LOST * rounds
    for name in ("is in use by", "Traceback"):
        assert not any(name in member.daemon.text() for member in (*red.members, *blue.members))


def refuses_the_files_of_another(red: Overlay, blue: Overlay) -> None:
    member = blue.members[0]
    member.stop()
    taken = red.members[0].subnet_file
    refused = member.host.run(member.argv(f"--subnet-file={taken}"), check=False)
    assert refused.returncode == 1
    (error,) = [line for line in refused.stderr.splitlines() if line.startswith("udptun: error")]
    assert error == (
        f"udptun: error: the subnet file {taken} is in use by the instance red: "
        "give the instance blue another --subnet-file")
    refused = member.host.run(member.argv("--instance=red"), check=False)
    assert refused.returncode == 1
    assert "the instance red is already running" in refused.stderr
    assert red.members[0].ready()[0]


def test_two_overlays_on_the_same_hosts(overlays):
    """One instance is cleaned up and started again while the other runs; equal names are
    refused."""
    red, blue = overlays
    side_by_side(red, blue, SHORT_SECONDS)
    refuses_the_files_of_another(red, blue)


@pytest.mark.slow
@pytest.mark.timeout(LONG_SECONDS + 300)
def test_two_overlays_work_side_by_side_for_ten_minutes(overlays):
    side_by_side(*overlays, LONG_SECONDS)
