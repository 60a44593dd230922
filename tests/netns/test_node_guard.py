"""Who may send as this node, and as the overlay: the rules against forged packets, on real packets.

A pod that is masqueraded, and a process of another user, try to send to a peer's forwarder.
"""

from __future__ import annotations

import asyncio
import json
import re
import signal
import socket
import sys
from dataclasses import replace
from ipaddress import ip_address, ip_network

import pytest

from tests.netns.cluster_traffic import all_reach_all
from tests.netns.hosts_file import two_nodes
from tests.netns.test_tunnel_sources import inner_packet
from udptun.instance import Instance
from udptun.lab import wait_for
from udptun.lab.cluster import PREFIX, Cluster, etcd_obstacle
from udptun.model import Endpoint, Mark
from udptun.node.host.firewall.guard import GuardRules
from udptun.node.host.firewall.keeper import Firewall
from udptun.node.host.firewall.rules import FirewallRules

PORT = 8285
MARK = Mark(0x1000, 0x1000)
NOBODY = 65534
# A program of another user: sends to ADDRESS PORT [MARK], and prints the error, if any.
SEND = """
import os, socket, sys
address, port, mark, uid = sys.argv[1], *map(int, sys.argv[2:])
family = socket.AF_INET6 if ":" in address else socket.AF_INET
with socket.socket(family, socket.SOCK_DGRAM) as out:
    if mark:
        out.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, mark)
    os.setuid(uid)
    try:
        out.sendto(b"forged", (address, port))
    except OSError as error:
        print(error.errno)
"""


class Ground:
    """pod -- node -- peer; the node masquerades what the pod sends. A docker-like network, which is
    not part of the overlay, is masqueraded too. Behind the node, there is another node."""

    def __init__(self, lab, version: int, tool: str) -> None:
        self.version, self.tool = version, tool
        self.node, self.peer = lab.host("node"), lab.host("peer")
        self.behind = lab.host("behind")
        lab.segment(self.node, self.peer)
        inner = lab.link(self.node, self.behind)
        self.node.forwarding()
        self.pod = self.node.pod("10.42.0.0/24", "fc00:0:0:0::/64")
        self.family = socket.AF_INET if version == 4 else socket.AF_INET6
        choose = (lambda host: host.v4) if version == 4 else (lambda host: host.v6)
        self.at = {name: choose(getattr(self, name)) for name in ("node", "peer", "behind")}
        for host, v4, v6 in ((self.behind, inner.a.v4.ip, inner.a.v6.ip),
                             (self.peer, self.node.v4, self.node.v6)):
            host.ip(f"route add default via {v4}", f"route add default via {v6}")
        self.want = FirewallRules(
            ip_network("10.42.0.0/16"), ip_network("10.42.0.0/24"),
            ip_network("fc00::/56"), ip_network("fc00:0:0:0::/64"), masquerade=True, forward=True,
        )
        self.rules = GuardRules(
            MARK, frozenset({Endpoint(self.at["peer"], PORT), Endpoint(self.at["behind"], PORT)}),
            self.node.interfaces[0].name, (self.want.network, self.want.network6),
            masquerade=True,
        )
        self.firewall = Firewall(self.want, mode=tool)
        self.firewall.guard = lambda: self.rules

    def sync(self) -> bool:
        with self.node.inside():
            return asyncio.run(self.firewall.sync())

    def sends(self, host, port=PORT, *, mark=0, uid=0) -> str | None:
        """Let a program send to the peer. Return the source of the datagram that arrives; None:
        none does."""
        with self.peer.socket(self.family, socket.SOCK_DGRAM) as to:
            to.bind((str(self.at["peer"]), port))
            to.settimeout(0.3)  # no event shows that a packet was dropped
            host.run([sys.executable, "-c", SEND, str(self.at["peer"]), str(port), str(mark),
                      str(uid)])
            try:
                return to.recvfrom(100)[1][0]
            except TimeoutError:
                return None

    def listed(self) -> str:
        if self.tool == "iptables":
            plain = "iptables" if self.version == 4 else "ip6tables"
            saved = self.node.run([f"{plain}-save", "-t", "mangle"]).stdout.splitlines()
            return "\n".join(line for line in saved if "GUARD" in line)
        family = "ip" if self.version == 4 else "ip6"
        text = self.node.run(["nft", "list", "table", family, "udptun-guard"], check=False).stdout
        return re.sub(r"packets \d+ bytes \d+", "", text)


@pytest.fixture(params=[
    pytest.param((version, tool), id=f"IPv{version}-{tool}", marks=marks)
    for version, tool, marks in (
        (4, "nftables", ()), (6, "nftables", pytest.mark.slow),
        (4, "iptables", pytest.mark.slow), (6, "iptables", ()),
    )])
def ground(lab, request):
    return Ground(lab, *request.param)


def test_only_the_forwarder_sends_to_the_forwarders_of_peers(ground):
    node = str(ground.at["node"])
    everything = {
        "pod": (ground.pod, {}), "another user": (ground.node, {"uid": NOBODY}),
        "root": (ground.node, {}), "forwarder": (ground.node, {"mark": MARK.value}),
        "a wider mark": (ground.node, {"mark": MARK.value | 0x4}),
        "another mark": (ground.node, {"mark": 0x4}),
    }

    def arrived():
        return {name for name, (host, how) in everything.items()
                if ground.sends(host, **how) == node}

    ground.rules, rules = GuardRules(), ground.rules
    ground.sync()
    assert arrived() == {*everything}  # without the rules, each of them is taken for this node
    ground.rules = rules
    assert ground.sync()
    assert arrived() == {"forwarder", "a wider mark"}
    assert ground.sends(ground.behind) == str(ground.at["behind"])  # the forwarder of another node
    assert ground.sends(ground.pod, PORT + 1) == node  # other ports are not concerned
    assert not ground.sync()  # the second look changes nothing
    ground.rules = replace(rules, endpoints=frozenset({Endpoint(ground.at["peer"], PORT + 1)}))
    assert ground.sync()
    assert ground.sends(ground.pod) == node and ground.sends(ground.pod, PORT + 1) is None
    with ground.node.inside():
        assert asyncio.run(ground.firewall.remove())
        assert not asyncio.run(ground.firewall.remove())
    assert ground.listed() == ""
    assert arrived() == {*everything} - {"pod"}  # which is not masqueraded any more


def test_rules_that_another_program_changes_are_restored(ground):
    ground.sync()
    ours = ground.listed()
    assert ours
    plain = "iptables" if ground.version == 4 else "ip6tables"
    family = "ip" if ground.version == 4 else "ip6"
    for command in (
        [f"{plain} -t mangle -F UDPTUN-GUARD-OUT", f"{plain} -t mangle -F UDPTUN-GUARD-IN",
         f"{plain} -t mangle -D POSTROUTING -j UDPTUN-GUARD-OUT"]
        if ground.tool == "iptables" else
        [f"nft delete table {family} udptun-guard", f"nft flush chain {family} udptun-guard out",
         f"nft add rule {family} udptun-guard in accept"]
    ):
        ground.node.run(command.split())
        assert ground.sync(), command
        assert ground.listed() == ours, command
        assert ground.sends(ground.pod) is None
        assert not ground.sync()
    # A new daemon finds the rules, and waits until it knows what it wants.
    ground.firewall = Firewall(ground.want, mode=ground.tool)
    assert not ground.sync()
    assert ground.listed() == ours


def forged(ground, source: str, to: str, masquerade=True):
    """Let the peer send a packet with a forged source over the underlay. Return whether the node
    receives it."""
    source, to = ip_address(source), ip_address(to)
    ground.rules = replace(ground.rules, masquerade=masquerade)
    ground.sync()
    packet = inner_packet(source, to, b"forged")
    receiver = ground.node
    if to != ground.at["node"]:
        receiver = ground.pod
    with receiver.socket(ground.family, socket.SOCK_DGRAM) as got:
        got.bind((str(to), 4242))
        got.settimeout(0.3)
        kind = socket.IPPROTO_RAW
        with ground.peer.socket(ground.family, socket.SOCK_RAW, kind) as out:
            out.sendto(packet, (str(to), 0))
        try:
            return got.recv(100) == b"forged"
        except TimeoutError:
            return False


def test_sources_in_the_overlay_do_not_arrive_on_the_underlay(ground):
    for host in (ground.node, ground.pod):
        host.sysctl("net.ipv4.conf.all.rp_filter=0", "net.ipv4.conf.eth0.rp_filter=0")
    ground.node.ip(f"route add 10.42.1.0/24 via {ground.peer.v4}",
                   f"route add fc00:0:0:1::/64 via {ground.peer.v6}")
    pod = str(ground.pod.v4 if ground.version == 4 else ground.pod.v6)
    other = "10.42.1.2" if ground.version == 4 else "fc00:0:0:1::2"
    outside = "203.0.113.5" if ground.version == 4 else "2001:db8:ffff::5"
    node = str(ground.at["node"])
    rules, ground.rules = ground.rules, replace(ground.rules, interface="")
    assert forged(ground, other, pod) and forged(ground, other, node)
    ground.rules = rules
    assert not forged(ground, other, pod)
    assert not forged(ground, other, node)
    assert forged(ground, outside, node)
    # Without masquerading, pods of other nodes reach this node's address with their own.
    assert not forged(ground, other, pod, masquerade=False)
    assert forged(ground, other, node, masquerade=False)
    # A node that routes without encapsulation.
    direct = ip_network("10.42.1.0/24" if ground.version == 4 else "fc00:0:0:1::/64")
    ground.rules = replace(ground.rules, direct=frozenset({direct}))
    assert forged(ground, other, pod)
    third = "10.42.2.2" if ground.version == 4 else "fc00:0:0:2::2"
    assert not forged(ground, third, pod)


def test_many_peers_come_and_go(lab):
    """Changes of the set are sent alone; a set that lost its elements is filled again."""
    ground = Ground(lab, 4, "nftables")
    network = ip_network("172.16.0.0/14")
    many = [Endpoint(network[n], PORT) for n in range(1, 5001)]
    ground.rules = replace(ground.rules, endpoints=frozenset(many))
    assert ground.sync()
    assert not ground.sync()
    peer = Endpoint(ground.at["peer"], PORT)
    ground.rules = replace(ground.rules, endpoints=frozenset([*many[10:], peer]))
    assert ground.sync()
    listed = json.loads(ground.node.run(
        ["nft", "-j", "list", "set", "ip", "udptun-guard", "peers"]).stdout)
    found = {tuple(one["concat"]) for item in listed["nftables"] if "set" in item
             for one in item["set"]["elem"]}
    assert found == {(str(one.address), one.port) for one in [*many[10:], peer]}
    assert ground.sends(ground.pod) is None


# -- the daemon -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("firewall", "accelerate"), [
    ("auto", "off"), pytest.param("iptables", "off", marks=pytest.mark.slow), ("auto", "auto"),
])
def test_a_node_guards_its_peers(lab, firewall, accelerate):
    """A pod and a user of one node cannot speak as another pod of this node, also after a restart
    of the daemon, and everything is removed with --cleanup. Datagrams of the express path meet no
    rule, and the kernel does not track them."""
    members = two_nodes(lab, "--ip-masq", f"--firewall={firewall}", f"--accelerate={accelerate}",
                        head=["express = true"])
    for member in members:
        member.start()
    for member in members:
        member.wait_ready()
        member.add_pod()
    a, b = members
    pods = {member: ip_address(member.pod_v4) for member in members}

    def drops():
        return {one["reason"]: one["packets"] for one in b.ask("/v1/drops")["drops"]}

    def forge(host, uid=0):
        """Send as the pod of a to the pod of b. Return whether the host let it pass."""
        packet = inner_packet(pods[a], pods[b], b"x").hex()
        script = SEND.replace('b"forged"', f'bytes.fromhex("{packet}")')
        done = host.run([sys.executable, "-c", script, str(b.host.v4), str(PORT), "0", str(uid)])
        return not done.stdout

    def guarded():
        command = ["iptables-save", "-t", "mangle"] if firewall == "iptables" else \
            ["nft", "list", "table", "ip", "udptun-guard"]
        return a.host.run(command, check=False).stdout

    wait_for(lambda: f"{b.host.v4}" in guarded(), "the rules")
    if accelerate == "auto":
        wait_for(lambda: all(one.ask("/v1/status")["accelerate"]["active"] for one in members),
                 "the express path")
    all_reach_all(members)
    before = drops()
    assert not forge(a.host, NOBODY)
    forge(a.pod)
    all_reach_all(members)  # sent after the pod's packet, on the same path
    after = drops()
    assert after["source_port"] == before["source_port"]
    # The receiver does not rely on the sender's rules. The daemon, which would restore them at
    # once, stands still meanwhile.
    a.daemon.signal(signal.SIGSTOP)
    a.host.run(["nft", "flush", "ruleset"])
    assert forge(a.host, NOBODY)
    a.daemon.signal(signal.SIGCONT)
    wait_for(lambda: drops()["source_port"] == before["source_port"] + 1, "the drop at the peer")
    wait_for(lambda: f"{b.host.v4}" in guarded(), "the rules to be restored")
    all_reach_all(members)
    assert "error" not in a.ready()[1]
    a.stop()
    assert not forge(a.host, NOBODY)  # the rules stay
    a.start()
    a.wait_ready()
    assert not forge(a.host, NOBODY)
    all_reach_all(members)
    a.stop()
    a.clean_up()
    assert "GUARD" not in guarded() and "guard" not in guarded()
    assert "clsact" not in a.host.run(["tc", "qdisc", "show"]).stdout


def test_the_names_contain_the_instance():
    assert Instance().guard_table == "udptun-guard"
    assert Instance("blue").guard_table == "blue-guard"
    assert Instance("blue").guard_chain("out") == "BLUE-GUARD-OUT"
    assert len(Instance("abcdefgh").guard_chain("out")) < 29  # XT_EXTENSION_MAXNAMELEN


@pytest.mark.slow
@pytest.mark.skipif(etcd_obstacle() is not None, reason=str(etcd_obstacle()))
def test_only_nodes_on_the_link_send_without_encapsulation(lab):
    """With DirectRouting, a node behind a router still encapsulates. So nobody may send plain
    packets with a source in its subnet."""
    cluster = Cluster(lab, 2, config={
        "Network": "10.244.0.0/16", "Backend": {"Type": "vxlan", "DirectRouting": True}},
        options=["--backend=vxlan", "--ip-masq"])
    a, b = cluster.members
    stranger = cluster.etcd.host
    for member in cluster.members:
        member.host.ip(f"route add default via {stranger.v4}")
        member.host.sysctl("net.ipv4.conf.all.rp_filter=0", "net.ipv4.conf.eth0.rp_filter=0")
    cluster.start()
    all_reach_all(cluster.members)
    lease = cluster.etcd.leases()[str(b.subnet).replace("/", "-")]
    far, near = ip_network("10.244.250.0/24"), ip_network("10.244.251.0/24")
    for number, (subnet, at) in enumerate((
            (far, "203.0.113.9"), (near, a.host.interfaces[0].v4.network[99]))):
        lease |= {"PublicIP": str(at)}
        lease["BackendData"]["VtepMAC"] = f"02:00:00:00:00:0{number}"
        cluster.etcd.put(f"{PREFIX}/subnets/{subnet.network_address}-24", json.dumps(lease))

    def direct() -> str:
        return a.host.run(["nft", "list", "set", "ip", "udptun-guard", "direct"],
                          check=False).stdout

    wait_for(lambda: str(near) in direct() and str(far) not in direct(), "the rules")
    a.pod.sysctl("net.ipv4.conf.all.rp_filter=0", "net.ipv4.conf.eth0.rp_filter=0")
    stranger.ip(f"route add {a.subnet} via {a.host.v4}")
    with a.pod.socket(socket.AF_INET, socket.SOCK_DGRAM) as got, stranger.socket(
            socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW) as out:
        got.bind((str(a.pod_v4), 4242))
        got.settimeout(10)
        for source in (far[2], b.pod_v4):
            out.sendto(inner_packet(source, ip_address(a.pod_v4), str(source).encode()),
                       (str(a.pod_v4), 0))
        assert got.recv(100) == str(b.pod_v4).encode()  # the first one is dropped
