"""``make demo-etcd``: a cluster with its leases in etcd. Nodes join and leave, and etcd is killed.

Owns: the steps and their text. Does not depend on how a cluster is created or how it works. Main
thread only, like the whole lab. The command is ``python -m udptun.lab.demo_etcd``.
"""

from __future__ import annotations

import re
import signal
import sys
import time
from collections.abc import Sequence
from functools import partial
from ipaddress import IPv4Network
from typing import TextIO

from .cluster import NETWORK_CONFIG, PREFIX, Cluster, Member, etcd_obstacle, unreachable
from .demo import Screen, perform
from .hosts import Lab, LabError, Process, wait_for

_STEADY_SECONDS = 3


def run(out: TextIO | None = None) -> int:
    """Run the demo. Return the exit code.

    The exit code is 0 if all pods reached each other and no ping was lost.
    """
    return perform("make demo-etcd", _show, out, etcd_obstacle())


def _show(lab: Lab, screen: Screen) -> bool:
    screen.title("udptun demo: nodes that find each other in etcd")
    screen.say()
    cluster = Cluster(lab, 4)
    *first, late = cluster.members
    screen.step("etcd", cluster.etcd.url)
    screen.step(f"{PREFIX}/config", str(NETWORK_CONFIG).replace("'", '"'))
    for member in first:
        member.start()
    for member in first:
        _show_node(screen, member)
    good = _all_to_all(screen, first)

    screen.say()
    screen.title(f"  {_name(late)} joins")
    late.start()
    _show_node(screen, late)
    began = time.monotonic()
    for member in first:
        wait_for(partial(_has_route, member, late), f"a route to {late.subnet}")
    waited = (time.monotonic() - began) * 1000
    screen.step("other nodes have its route", f"{waited:.0f} ms after it was ready")
    good &= _all_to_all(screen, cluster.members)

    screen.say()
    leaving, rest = first[1], [first[0], first[2], late]
    screen.title(f"  {_name(leaving)} leaves")
    subnet = leaving.subnet
    leaving.clean_up()
    screen.step("udptun node --cleanup", "TUN, routes, rules and subnet.env are gone")
    cluster.etcd.revoke(subnet)
    began = time.monotonic()
    for member in rest:
        wait_for(partial(_has_no_route, member, subnet), "the route to go")
    waited = (time.monotonic() - began) * 1000
    screen.step("its lease is deleted", f"no route to {subnet} any more, {waited:.0f} ms later")
    good &= _all_to_all(screen, rest)

    screen.say()
    screen.title("  etcd is killed, and a node daemon too")
    a, b = rest[0], rest[1]
    steady = a.pod.start(["ping", "-n", "-i", "0.05", str(b.pod_v4)])
    steady.wait_for_output("bytes from")
    cluster.etcd.stop()
    screen.step("etcd", "killed")
    a.daemon.kill()
    screen.step(f"node daemon of {_name(a)}", "killed; the forwarder continues")
    a.start()
    _count_down(screen, "pings during the outage", _STEADY_SECONDS)
    cluster.etcd.start()
    a.wait_ready()
    screen.step("both restarted", f"{_name(a)} has the same subnet, {a.subnet}")
    sent, lost = _count(steady)
    result = f"{sent - lost} of {sent} pings came back"
    screen.step("pings during the outage", result, good=not lost)
    return good and not lost


def _name(member: Member) -> str:
    return f"node {member.host.name}"


def _show_node(screen: Screen, member: Member) -> None:
    screen.progress(_name(member), "...")
    member.wait_ready()
    member.add_pod()
    screen.step(_name(member), f"{member.host.v4} has {member.subnet}, pod {member.pod_v4}")


def _has_no_route(member: Member, subnet: IPv4Network) -> bool:
    return not any(route.startswith(f"{subnet} ") for route in member.routes())


def _has_route(member: Member, peer: Member) -> bool:
    return f"{peer.subnet} via {peer.host.v4}" in member.routes()


def _all_to_all(screen: Screen, members: Sequence[Member]) -> bool:
    what = "ping, all pods to all others"
    pairs = len(members) * (len(members) - 1)
    missing: list[str] = []

    def reached() -> bool:
        missing[:] = unreachable(members)
        return not missing

    try:
        wait_for(reached, "all pods to reach all others")
    except LabError:
        reached_n = pairs - len(missing)
        screen.step(what, f"{reached_n} of {pairs}; not {', '.join(missing)}", good=False)
        return False
    screen.step(what, f"{pairs} of {pairs} came back")
    return True


def _count_down(screen: Screen, what: str, seconds: int) -> None:
    for second in range(seconds):
        screen.progress(what, f"{second} of {seconds} s")
        time.sleep(1)


def _count(steady: Process) -> tuple[int, int]:
    """Stop a running ping. Return the numbers of sent and of lost pings.

    Pings after the last answered ping are not counted, because they may not be answered yet.
    """
    steady.signal(signal.SIGINT)
    steady.wait()
    answered = [int(n) for n in re.findall(r"icmp_seq=(\d+) ttl=", steady.text())]
    return max(answered), max(answered) - len(set(answered))


if __name__ == "__main__":
    sys.exit(run())
