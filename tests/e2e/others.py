"""Devices, rules and routes beside ours, with the names that other networks of pods use.

Owns what is created on two nodes: a VXLAN overlay between them as Calico makes it, and devices,
chains, tables and routing rules as kube-ovn, Calico and Cilium name theirs. Nothing else of these
programs runs. Main thread only.
"""

import re
from collections.abc import Sequence

from udptun.lab import LabError, wait_for

from .worker import Worker

_NAMES = "ovn0|OVN-|kube-ovn|genev|calico|cali0|cali-|cilium|CILIUM|lxc0| 2004|10\\.99\\."
_DEVICES = """
ip link add vxlan.calico type vxlan id 4096 dstport 4789 local {own} nolearning dev {device}
ip address add 10.99.{number}.0/32 dev vxlan.calico
ip link set vxlan.calico address 66:00:00:00:00:0{number} up
ip neigh add 10.99.{other}.0 lladdr 66:00:00:00:00:0{other} dev vxlan.calico nud permanent
bridge fdb append 66:00:00:00:00:0{other} dev vxlan.calico dst {peer}
ip route add 10.99.{other}.0/26 via 10.99.{other}.0 dev vxlan.calico onlink
ip link add cali01234567890 type veth peer name cali0-pod
ip link set cali01234567890 up
ip route add 10.99.{number}.9 dev cali01234567890
ip link add cilium_host type veth peer name cilium_net
ip link set cilium_host up
ip link set cilium_net up
ip address add 10.99.200.1/32 dev cilium_host
ip rule add pref 9 fwmark 0x200/0xf00 lookup 2004
ip route add local default dev lo table 2004
ip link add lxc0123456789ab type veth peer name lxc0-pod
ip link add ovn0 type veth peer name ovn0-int
ip address add 100.64.0.{number}/16 dev ovn0
ip link set ovn0 up
"""
_CHAINS = """
*nat
:cali-POSTROUTING - [0:0]
:CILIUM_POST_nat - [0:0]
:OVN-POSTROUTING - [0:0]
-A POSTROUTING -j cali-POSTROUTING
-A POSTROUTING -j CILIUM_POST_nat
-A POSTROUTING -j OVN-POSTROUTING
-A cali-POSTROUTING -s 10.99.0.0/16 ! -d 10.99.0.0/16 -j MASQUERADE
COMMIT
*filter
:cali-FORWARD - [0:0]
:CILIUM_FORWARD - [0:0]
-A FORWARD -j cali-FORWARD
-A FORWARD -j CILIUM_FORWARD
-A cali-FORWARD -i cali+ -j ACCEPT
-A CILIUM_FORWARD -o cilium_host -j ACCEPT
COMMIT
"""
_TABLE = """
table ip kube-ovn {
  chain postrouting {
    type nat hook postrouting priority srcnat; policy accept;
    ip saddr 100.64.0.0/16 oifname "ovn0" return
  }
}
"""
_LISTING = "ip -o link; ip -o address; ip route show table all; ip rule; ip neigh; "\
           "bridge fdb show; iptables-save; nft list table ip kube-ovn"


class Others:
    """What two nodes have beside udptun; ``create`` it once."""

    def __init__(self, workers: Sequence[Worker]) -> None:
        self._workers = workers[:2]
        self._before: dict[str, list[str]] = {}

    def create(self) -> None:
        one, two = self._workers
        for worker, number, peer, other in ((one, 1, two, 2), (two, 2, one, 1)):
            script = _DEVICES.format(
                own=worker.host.v4, peer=peer.host.v4, number=number, other=other,
                device=worker.host.interfaces[0].name)
            worker.host.run(["sh", "-ec", script])
            worker.host.run(["iptables-restore", "--noflush"], text=_CHAINS)
            worker.host.nft(_TABLE)
        self._before = {worker.name: _seen(worker) for worker in self._workers}

    def check(self) -> int:
        """Check that all is as it was, and that the other overlay carries packets.

        Return the number of things that were compared. Raises LabError.
        """
        for worker in self._workers:
            before, now = self._before[worker.name], _seen(worker)
            if before != now:
                lost = [line for line in before if line not in now]
                new = [line for line in now if line not in before]
                raise LabError(f"{worker.name}: another network's settings have changed: "
                               f"lost {lost}, new {new}")
        host = self._workers[0].host
        wait_for(lambda: host.run(["ping", "-c1", "-W2", "10.99.2.0"], check=False).returncode == 0,
                 "an answer through the other overlay")
        return sum(map(len, self._before.values()))


def _seen(worker: Worker) -> list[str]:
    """Return the lines of the node's settings that have one of our names, without counters."""
    text = worker.host.run(["sh", "-ec", _LISTING]).stdout
    lines = (re.sub(r"\[\d+:\d+\]|qlen \d+", "", line).strip() for line in text.splitlines())
    return sorted(line for line in lines if re.search(_NAMES, line))
