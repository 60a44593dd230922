"""A failure of the daemon or of etcd does not disturb traffic between pods.

The tests kill the daemon's process group and its cgroup, as a service manager does; they kill etcd
and restart the daemon without it. The etcd outage is in `make test-all`.
"""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.netns.cluster_traffic import SteadyPing, SteadyTransfer
from udptun.lab import wait_for
from udptun.lab.cluster import Cluster, Member, etcd_obstacle

pytestmark = pytest.mark.skipif(etcd_obstacle() is not None, reason=str(etcd_obstacle()))

# UDPTUN_OUTAGE_SECONDS=60 makes the outage a minute long.
OUTAGE_SECONDS = float(os.environ.get("UDPTUN_OUTAGE_SECONDS", "5"))
STALL_SECONDS = 30.0  # a deadline: the connection goes on, on a busy machine too


def tun_of(member: Member) -> str:
    """Return the TUN's name and index: a new device of the same name would have another index."""
    return member.host.run(["ip", "-o", "link", "show", "udptun0"]).stdout.split(":")[0]


def end_process_group(member: Member) -> None:
    os.killpg(member.daemon.pid, signal.SIGKILL)
    member.daemon.wait()


@pytest.fixture
def cgroup() -> Iterator[Path]:
    """A cgroup of version 2, as systemd makes one for each unit."""
    for root in (Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/unified")):
        if (root / "cgroup.procs").exists():
            made = root / f"udptun-test-{os.getpid()}"
            break
    else:
        pytest.skip("no cgroup of version 2 here")
    try:
        made.mkdir()
    except OSError as exc:
        pytest.skip(f"no cgroup can be made: {exc.strerror}")
    try:
        if not (made / "cgroup.kill").exists():
            pytest.skip("this kernel cannot kill a cgroup (Linux 5.14)")
        yield made
    finally:
        wait_for(lambda: not (made / "cgroup.procs").read_text(), "the cgroup to be empty")
        made.rmdir()


def test_the_daemons_process_group_is_killed(lab):
    """The daemon started the forwarder, which goes on running."""
    cluster = Cluster(lab, 2)
    cluster.start()
    a, b = cluster.members
    forwarder, device = a.forwarder_pid(), tun_of(a)
    transfer = SteadyTransfer(a.pod, b.pod, b.pod_v4)
    steady = SteadyPing(b.pod, a.pod_v4)
    for _ in range(2):
        end_process_group(a)
        a.start()
        a.wait_ready()
    assert steady.lost() == 0
    assert transfer.finish() > 0
    assert (a.forwarder_pid(), tun_of(a)) == (forwarder, device)
    assert transfer.stall < STALL_SECONDS


def test_the_daemons_cgroup_is_killed(lab, cgroup):
    """As deployed: daemon and forwarder each have their own unit or container."""
    cluster = Cluster(lab, 2, external=True)
    cluster.start()
    a, b = cluster.members
    assert a.forwarder is not None
    (cgroup / "cgroup.procs").write_text(str(a.daemon.pid))
    for child in Path(f"/proc/{a.daemon.pid}/task/{a.daemon.pid}/children").read_text().split():
        (cgroup / "cgroup.procs").write_text(child)
    device = tun_of(a)
    transfer = SteadyTransfer(a.pod, b.pod, b.pod_v4)
    steady = SteadyPing(b.pod, a.pod_v4)
    (cgroup / "cgroup.kill").write_text("1")
    a.daemon.wait()
    a.start()
    a.wait_ready()
    assert steady.lost() == 0
    assert transfer.finish() > 0
    assert (a.forwarder_pid(), tun_of(a)) == (a.forwarder.pid, device)
    assert transfer.stall < STALL_SECONDS


@pytest.mark.slow
@pytest.mark.timeout(OUTAGE_SECONDS + 120)
def test_a_daemon_restarts_while_etcd_is_down(lab):
    cluster = Cluster(lab, 3)
    cluster.start()
    a, b, c = cluster.members
    subnet, device, routes = a.subnet, tun_of(a), a.routes()
    transfer = SteadyTransfer(a.pod, b.pod, b.pod_v4)
    steady = SteadyPing(c.pod, a.pod_v4)
    cluster.etcd.stop()
    until = time.monotonic() + OUTAGE_SECONDS
    a.daemon.kill()
    a.start()
    a.daemon.wait_for_output("etcd")  # it logs that etcd does not answer
    # During the outage nothing changes.
    while time.monotonic() < until:
        assert a.routes() == routes
        time.sleep(0.5)
    _, report = a.ready()
    assert "[!]store" in report
    assert a.subnet == subnet
    cluster.etcd.start()
    a.wait_ready()
    # Changes after the outage arrive.
    leaving = c.subnet
    assert steady.lost() == 0
    c.daemon.kill()  # first, because it would publish its lease again
    cluster.etcd.revoke(leaving)
    wait_for(lambda: not any(r.startswith(f"{leaving} ") for r in a.routes()), "the route to go")
    received = transfer.finish()
    assert (a.subnet, tun_of(a)) == (subnet, device)
    print(f"{received} bytes, longest stall {transfer.stall * 1000:.0f} ms")
    assert transfer.stall < STALL_SECONDS


def test_sigterm_leaves_the_packets_flowing(lab):
    """One SIGTERM is enough."""
    cluster = Cluster(lab, 2)
    cluster.start()
    a, b = cluster.members
    steady = SteadyPing(a.pod, b.pod_v4)
    device = tun_of(a)
    assert a.stop() == 0
    assert b.stop() == 0
    assert a.host.run(["ip", "route", "get", str(b.pod_v4)]).stdout.split()[2] == "udptun0"
    for member in (a, b):
        member.start()
        member.wait_ready()
    assert steady.lost() == 0
    assert tun_of(a) == device


def test_cleanup_removes_everything_that_was_created(lab):
    cluster = Cluster(lab, 2, options=["--ip-masq", "--backend=auto"])
    a = cluster.members[0]
    links = a.host.run(["ip", "-br", "link"]).stdout
    routes = a.host.run(["ip", "route"]).stdout
    a.start()
    a.wait_ready()
    assert a.host.run(["ip", "-br", "link"]).stdout != links
    assert "udptun" in a.host.run(["nft", "list", "tables"]).stdout
    a.clean_up()
    assert a.host.run(["ip", "-br", "link"]).stdout == links
    assert a.host.run(["ip", "route"]).stdout == routes
    assert a.host.run(["nft", "list", "tables"]).stdout == ""
    assert not a.subnet_file.exists()
    assert not a.control.exists()
