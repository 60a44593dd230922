"""The second demonstration: a cluster whose leases are in etcd, while nodes come and go.

Owns: the story and its wording. Refuses to know: how a cluster is made and how it works. Run it as
``python -m udptun.lab.demo_etcd``.
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
from .demo import Voice, perform
from .hosts import Lab, LabError, Process, wait_for

_STEADY_SECONDS = 3


def run(out: TextIO | None = None) -> int:
    """Show it; the exit code: 0 when every pod reached every other, and no ping was lost."""
    return perform("make demo-etcd", _show, out, etcd_obstacle())


def _show(lab: Lab, voice: Voice) -> bool:
    voice.title("udptun demo: nodes that find each other in etcd")
    voice.say()
    cluster = Cluster(lab, 4)
    *first, late = cluster.members
    voice.step("etcd", cluster.etcd.url)
    voice.step(f"{PREFIX}/config", str(NETWORK_CONFIG).replace("'", '"'))
    for member in first:
        member.start()
    for member in first:
        _tell_arrival(voice, member)
    good = _all_to_all(voice, first)

    voice.say()
    voice.title(f"  {_name(late)} joins")
    late.start()
    _tell_arrival(voice, late)
    began = time.monotonic()
    for member in first:
        wait_for(partial(_has_route, member, late), f"a route to {late.subnet}")
    waited = (time.monotonic() - began) * 1000
    voice.step("the others have its route", f"{waited:.0f} ms after it was ready")
    good &= _all_to_all(voice, cluster.members)

    voice.say()
    leaving, rest = first[1], [first[0], first[2], late]
    voice.title(f"  {_name(leaving)} leaves")
    subnet = leaving.subnet
    leaving.clean_up()
    voice.step("udptun node --cleanup", "TUN, routes, rules and subnet.env are gone")
    cluster.etcd.revoke(subnet)
    began = time.monotonic()
    for member in rest:
        wait_for(partial(_has_no_route, member, subnet), "the route to go")
    waited = (time.monotonic() - began) * 1000
    voice.step("its lease ends", f"no route to {subnet} any more, {waited:.0f} ms later")
    good &= _all_to_all(voice, rest)

    voice.say()
    voice.title("  etcd is killed, and a node daemon too")
    a, b = rest[0], rest[1]
    steady = a.pod.start(["ping", "-n", "-i", "0.05", str(b.pod_v4)])
    steady.wait_for_output("bytes from")
    cluster.etcd.stop()
    voice.step("etcd", "killed")
    a.daemon.kill()
    voice.step(f"node daemon of {_name(a)}", "killed; the forwarder lives on")
    a.start()
    _count_down(voice, "pod to pod meanwhile", _STEADY_SECONDS)
    cluster.etcd.start()
    a.wait_ready()
    voice.step("both again", f"{_name(a)} has its subnet {a.subnet} as before")
    sent, lost = _count(steady)
    voice.step("pod to pod meanwhile", f"{sent - lost} of {sent} pings came back", good=not lost)
    return good and not lost


def _name(member: Member) -> str:
    return f"node {member.host.name}"


def _tell_arrival(voice: Voice, member: Member) -> None:
    voice.progress(_name(member), "...")
    member.wait_ready()
    member.add_pod()
    voice.step(_name(member), f"{member.host.v4} has {member.subnet}, pod {member.pod_v4}")


def _has_no_route(member: Member, subnet: IPv4Network) -> bool:
    return not any(route.startswith(f"{subnet} ") for route in member.routes())


def _has_route(member: Member, peer: Member) -> bool:
    return f"{peer.subnet} via {peer.host.v4}" in member.routes()


def _all_to_all(voice: Voice, members: Sequence[Member]) -> bool:
    what = "ping, all pods to all others"
    pairs = len(members) * (len(members) - 1)
    missing: list[str] = []

    def everybody() -> bool:
        missing[:] = unreachable(members)
        return not missing

    try:
        wait_for(everybody, "all pods to reach all others")
    except LabError:
        voice.step(what, f"{pairs - len(missing)} of {pairs}; not {', '.join(missing)}", good=False)
        return False
    voice.step(what, f"{pairs} of {pairs} came back")
    return True


def _count_down(voice: Voice, what: str, seconds: int) -> None:
    for second in range(seconds):
        voice.progress(what, f"{second} of {seconds} s")
        time.sleep(1)


def _count(steady: Process) -> tuple[int, int]:
    """(sent, lost), but for the one that is under way."""
    steady.signal(signal.SIGINT)
    steady.wait()
    answered = [int(n) for n in re.findall(r"icmp_seq=(\d+) ttl=", steady.text())]
    return max(answered), max(answered) - len(set(answered))


if __name__ == "__main__":
    sys.exit(run())
