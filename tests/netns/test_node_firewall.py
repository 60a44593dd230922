"""The effect of our rules on packets through a node, alone and with rules of other programs."""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
from dataclasses import replace
from ipaddress import ip_address, ip_network
from pathlib import Path

import pytest

from tests.netns.cluster_traffic import all_reach_all
from tests.netns.hosts_file import two_nodes
from udptun.lab import wait_for
from udptun.node.host.firewall.keeper import Firewall
from udptun.node.host.firewall.rules import FirewallRules

PORT = 9000


class Cluster:
    """world -- node -- peer, a pod behind the node, one address of another pod on the peer."""

    def __init__(self, lab, version):
        self.family = socket.AF_INET if version == 4 else socket.AF_INET6
        self.node, self.world, self.peer = (lab.host(name) for name in ("node", "world", "peer"))
        to_world, to_peer = lab.link(self.node, self.world).a, lab.link(self.node, self.peer).a
        self.pod = self.node.pod("10.42.0.0/24", "fc00:0:0:0::/64")
        self.peer.ip("address add 10.42.1.2/32 dev lo", "address add fc00:0:0:1::2/128 dev lo")
        self.node.ip(f"route add 10.42.1.0/24 via {self.peer.v4}",
                     f"route add fc00:0:0:1::/64 via {self.peer.v6}")
        # Both hosts have a route back to pods and nodes, with and without masquerading.
        for host, gateway in ((self.world, to_world), (self.peer, to_peer)):
            host.ip(f"route add default via {gateway.v4.ip}",
                    f"route add default via {gateway.v6.ip}")
        choose = (lambda end: end.v4.ip) if version == 4 else (lambda end: end.v6.ip)
        self.at = {
            "node": choose(to_world), "node to peer": choose(to_peer),
            "world": choose(self.world.interfaces[0]), "pod": choose(self.pod.interfaces[0]),
            "other pod": ip_address("10.42.1.2" if version == 4 else "fc00:0:0:1::2"),
        }
        self.host = {"node": self.node, "world": self.world, "pod": self.pod,
                     "other pod": self.peer}
        self.rules = FirewallRules(
            ip_network("10.42.0.0/16"), ip_network("10.42.0.0/24"),
            ip_network("fc00::/56"), ip_network("fc00:0:0:0::/64"), masquerade=True, forward=True,
        )

    def firewall(self):
        with self.node.inside():
            asyncio.run(Firewall(self.rules).sync())

    def source_seen(self, sender, receiver):
        """Send a datagram; return the name of the source address that ``receiver`` sees."""
        with contextlib.closing(self.host[receiver].socket(self.family, socket.SOCK_DGRAM)) as to, \
                contextlib.closing(self.host[sender].socket(self.family, socket.SOCK_DGRAM)) as out:
            to.settimeout(60)
            to.bind((str(self.at[receiver]), PORT))
            out.bind((str(self.at[sender]), 0))
            out.sendto(b"who am I?", (str(self.at[receiver]), PORT))
            seen = ip_address(to.recvfrom(100)[1][0])
        return next(name for name, address in self.at.items() if address == seen)


@pytest.fixture(params=[4, 6])
def cluster(lab, request):
    return Cluster(lab, request.param)


@pytest.mark.parametrize(("sender", "receiver", "without", "want"), [
    ("pod", "other pod", "pod", "pod"),  # my subnet to the cluster: return
    ("other pod", "pod", "other pod", "other pod"),  # the cluster to my subnet: return
    ("world", "pod", "world", "world"),  # from outside to my subnet: return
    ("pod", "world", "pod", "node"),  # the cluster to outside: masquerade
    ("node", "other pod", "node", "node to peer"),  # from outside to the cluster: masquerade
])
def test_which_packets_are_masqueraded(cluster, sender, receiver, without, want):
    assert cluster.source_seen(sender, receiver) == without
    cluster.firewall()
    assert cluster.source_seen(sender, receiver) == want


def test_packets_with_kube_proxys_mark_are_not_masqueraded_here(cluster):
    cluster.firewall()
    cluster.node.nft("""\
table inet proxy {
  chain prerouting {
    type filter hook prerouting priority mangle;
    meta mark set 0x4001
  }
}
""")
    assert cluster.source_seen("pod", "world") == "pod"


# -- rules of other programs ----------------------------------------------------------------------

RULESETS = Path(__file__).parent / "rulesets"


class Guarded(Cluster):
    """A cluster whose node has the rules of another program."""

    def __init__(self, lab, version):
        super().__init__(lab, version)
        self.version = version
        self.overlay_device = self.node.interfaces[1].name
        other = {"network6": None, "subnet6": None} if version == 4 else \
            {"network": None, "subnet": None}
        self.rules = replace(self.rules, devices=frozenset({self.overlay_device}), **other)
        self.plain = "iptables" if version == 4 else "ip6tables"

    def load(self, ruleset, variant="nft"):
        if ruleset.endswith(".nft"):
            self.node.nft((RULESETS / ruleset).read_text())
            return
        if ruleset == "ufw.rules" and self.version == 6:
            ruleset = "ufw6.rules"
        loaded = self.node.run([f"{self.plain}-{variant}-restore"], check=False,
                               text=(RULESETS / ruleset).read_text())
        if loaded.returncode:
            pytest.skip(f"this kernel has no {variant} tables: {loaded.stderr}")

    def saved(self, variant):
        return self.node.run([f"{self.plain}-{variant}-save", "-t", "filter"]).stdout

    def own_chain(self, variant):
        return [line for line in self.saved(variant).splitlines() if "UDPTUN" in line]

    def sync(self, mode="auto", nft="nft"):
        """Let a firewall work once; return what it found."""
        with self.node.inside():
            firewall = Firewall(self.rules, mode=mode, nft=nft)
            asyncio.run(firewall.sync())
        return firewall.dropped

    def remove(self, nft="nft"):
        with self.node.inside():
            return asyncio.run(Firewall(FirewallRules(), nft=nft).remove())

    def passes(self, sender, receiver, wait=30):
        """Return whether the first datagram of a flow passes from pod to pod."""
        with self.host[receiver].socket(self.family, socket.SOCK_DGRAM) as to, \
                self.host[sender].socket(self.family, socket.SOCK_DGRAM) as out:
            to.settimeout(wait)
            to.bind((str(self.at[receiver]), PORT))
            out.bind((str(self.at[sender]), 0))
            out.sendto(b"", (str(self.at[receiver]), PORT))
            try:
                to.recv(1)
            except TimeoutError:
                return False
        return True

    def all_pass(self):
        return self.passes("pod", "other pod") and self.passes("other pod", "pod")

    def is_cut(self):
        """Return whether no packet passes. No event shows that a packet was dropped."""
        return not self.passes("pod", "other pod", 0.2) and not self.passes("other pod", "pod", 0.2)


@pytest.fixture
def guarded(lab):
    return Guarded(lab, 4)


@pytest.fixture
def guarded6(lab):
    return Guarded(lab, 6)


FILTERS = ["docker-27.rules", "docker-28.rules", "ufw.rules", "reject.rules"]


def lifts(guarded, ruleset, variant):
    guarded.load(ruleset, variant)
    assert guarded.is_cut()
    before = guarded.saved(variant)
    assert guarded.sync() == ()
    assert guarded.all_pass()
    ours = guarded.own_chain(variant)
    assert guarded.sync() == ()
    assert guarded.own_chain(variant) == ours  # the second look changes nothing
    assert guarded.remove()
    assert comparable(guarded.saved(variant)) == comparable(before)
    assert guarded.is_cut()


@pytest.mark.parametrize("variant", ["nft", "legacy"])
def test_iptables_rules_that_drop_are_lifted(guarded, variant):
    for ruleset in FILTERS:
        lifts(guarded, ruleset, variant)


@pytest.mark.parametrize("variant", ["nft", "legacy"])
def test_ip6tables_rules_that_drop_are_lifted(guarded6, variant):
    for ruleset in ("docker-28.rules", "ufw.rules"):
        lifts(guarded6, ruleset, variant)


def comparable(saved):
    """Return the rules without comments and packet counters."""
    lines = [line for line in saved.splitlines() if not line.startswith("#")]
    return [re.sub(r"\[\d+:\d+\]", "", line) for line in lines]


def test_both_variants_drop(guarded):
    guarded.load("docker-28.rules", "legacy")
    guarded.load("ufw.rules")
    assert guarded.sync() == ()
    assert guarded.all_pass()


DAMAGE = (
    "-F FORWARD", "-F", "-D FORWARD -j UDPTUN-FORWARD", "-F UDPTUN-FORWARD",
    "-I FORWARD -j DROP", "-I UDPTUN-FORWARD -j DROP", "-A FORWARD -j UDPTUN-FORWARD",
)


def test_accept_rules_are_restored(guarded):
    for act in DAMAGE:
        guarded.load("docker-28.rules")
        guarded.sync()
        ours = guarded.own_chain("nft")
        guarded.node.run([f"{guarded.plain}-nft", "-w", *act.split()])
        assert guarded.sync() == (), act
        assert guarded.all_pass(), act
        assert guarded.own_chain("nft") == ours, act


def test_accept_rules_are_removed_when_no_rule_drops_any_more(guarded):
    guarded.load("docker-28.rules")
    guarded.sync()
    assert guarded.own_chain("nft")
    guarded.node.run([f"{guarded.plain}-nft", "-w", "-P", "FORWARD", "ACCEPT"])
    guarded.sync()
    assert not guarded.own_chain("nft")
    assert guarded.all_pass()


def test_a_network_policy_before_the_drop_stays_effective(guarded):
    guarded.load("docker-28.rules")
    guarded.node.run([f"{guarded.plain}-nft", "-w", "-I", "FORWARD", "-d",
                      str(guarded.at["other pod"]), "-j", "REJECT"])
    assert guarded.sync() == ()  # the rule is for one pod, not for the network
    assert guarded.passes("other pod", "pod")
    assert not guarded.passes("pod", "other pod", 0.2)


def test_no_rule_is_added_if_the_rules_accept_the_packets(guarded):
    guarded.node.run([f"{guarded.plain}-nft-restore"], text="""\
*filter
:FORWARD ACCEPT [0:0]
:OTHER - [0:0]
-A FORWARD -m conntrack --ctstate INVALID -j DROP
-A FORWARD -i lo -j DROP
-A FORWARD -p tcp -m tcp --dport 23 -j DROP
-A FORWARD ! -i docker0 -o docker0 -j DROP
-A FORWARD -j OTHER
-A OTHER -j RETURN
COMMIT
""")
    assert guarded.sync() == ()
    assert not guarded.own_chain("nft")
    assert guarded.all_pass()


@pytest.mark.parametrize("version", [4, 6])
def test_firewalld_is_not_lifted_but_named(lab, version):
    guarded = Guarded(lab, version)
    guarded.load("firewalld.nft")
    assert guarded.is_cut()
    out, back = guarded.sync()
    assert guarded.is_cut()
    assert (out.cuts, back.cuts) == (True, False)
    kind = f"IPv{guarded.version} packets"
    why = "are dropped by nftables, table inet firewalld, chain filter_FWD_public: reject"
    assert out.text == f"{kind} from this node's pods to other nodes {why}"
    assert back.text == f"{kind} from other nodes to this node's pods {why}"
    network = guarded.rules.network if guarded.version == 4 else guarded.rules.network6
    assert f"--zone=trusted --add-source={network}" in out.remedy


def test_firewalld_with_the_network_in_the_zone_trusted(guarded):
    guarded.load("firewalld-trusted.nft")
    # This rule set trusts another network than the one of these tests.
    assert len(guarded.sync()) == 2
    text = (RULESETS / "firewalld-trusted.nft").read_text().replace("10.244.", "10.42.")
    guarded.node.nft(f"flush ruleset\n{text}")
    assert guarded.sync() == ()
    assert guarded.all_pass()


CHAINS = (
    ("type filter hook forward priority 100; policy drop;", True),
    ("type filter hook forward priority -10; policy accept; reject;", True),
    ("type filter hook prerouting priority 0; policy accept; meta nfproto ipv4 drop;"
     " meta nfproto ipv6 ip6 saddr fc00::/16 drop;", True),
    ("type filter hook forward priority 0; policy accept; ct state new drop;", True),
    ("type filter hook forward priority 0; policy accept;"
     " ct state vmap { established : accept, new : drop };", True),
    ("type filter hook forward priority 0; policy accept; oifname != lo goto other;", True),
    ("type filter hook forward priority 0; policy accept; ct state invalid drop;"
     " iifname lo drop; tcp dport 23 drop; ct status dnat drop; jump empty;", False),
    ("type filter hook input priority 0; policy drop; meta l4proto { icmp, icmpv6 } accept;",
     False),
)


@pytest.mark.parametrize("version", [4, 6])
def test_chains_of_others_are_evaluated_as_the_kernel_does(lab, version):
    guarded = Guarded(lab, version)
    for chain, cut in CHAINS:
        guarded.node.nft(f"""\
flush ruleset
table inet others {{
  chain other {{ drop; }}
  chain empty {{ counter; return; }}
  chain base {{ {chain} }}
}}
""")
        found = guarded.sync()
        if not cut:
            assert found == (), chain
            assert guarded.all_pass(), chain
            continue
        assert all("table inet others, chain " in one.text for one in found), chain
        assert found[0].cuts, chain
        assert guarded.is_cut(), chain


def test_a_condition_that_cannot_be_evaluated_is_reported(guarded):
    guarded.node.nft("""\
table inet others {
  chain base { type filter hook forward priority 0; policy drop; meta mark 7 accept; }
}
""")
    out, _ = guarded.sync()
    assert not out.cuts
    assert "chain base: policy drop, unless a rule with a condition" in out.text


def test_mode_nftables_changes_no_other_table(guarded):
    guarded.load("docker-28.rules")
    before = guarded.saved("nft")
    out, *_ = guarded.sync("nftables")
    assert comparable(guarded.saved("nft")) == comparable(before)
    assert f"{guarded.plain} (nft), table filter, chain FORWARD: policy drop" in out.text
    assert "--firewall auto" in out.remedy


def test_mode_iptables_does_all_of_it_without_nftables(guarded):
    guarded.sync()  # an earlier daemon
    guarded.load("docker-28.rules")
    assert guarded.sync("iptables") == ()
    assert "udptun" not in guarded.node.run(["nft", "list", "tables"]).stdout
    assert guarded.all_pass()
    assert guarded.source_seen("pod", "world") == "node"
    assert guarded.source_seen("node", "other pod") == "node to peer"
    assert guarded.source_seen("pod", "other pod") == "pod"
    assert guarded.source_seen("other pod", "pod") == "other pod"
    guarded.sync("auto")  # back again: the rules in the table nat go
    assert "UDPTUN" not in guarded.node.run([f"{guarded.plain}-nft-save", "-t", "nat"]).stdout
    assert guarded.source_seen("pod", "world") == "node"
    guarded.sync("iptables")
    assert guarded.remove()
    assert not guarded.own_chain("nft")
    assert "UDPTUN" not in guarded.node.run([f"{guarded.plain}-nft-save", "-t", "nat"]).stdout


def test_auto_without_nft_does_all_of_it_with_iptables(guarded):
    for variant in ("nft", "legacy"):
        guarded.load("docker-28.rules", variant)
    assert guarded.sync(nft="/nonexistent") == ()
    assert guarded.all_pass()
    assert guarded.source_seen("pod", "world") == "node"
    assert guarded.remove(nft="/nonexistent")
    assert not guarded.own_chain("nft") and not guarded.own_chain("legacy")
    assert guarded.is_cut()


# -- the daemon -----------------------------------------------------------------------------------


def test_two_nodes_with_another_programs_rules(lab):
    """Docker is started under running nodes; then firewalld instead of it."""
    members = two_nodes(lab, "--iptables-resync=1")
    for member in members:
        member.start()
    for member in members:
        member.wait_ready()
        member.add_pod()
    all_reach_all(members)
    a, b = members
    a.host.run(["iptables-restore"], text=(RULESETS / "docker-28.rules").read_text())
    all_reach_all(members)
    assert "[+]firewall" in a.ready()[1]
    a.host.nft("flush ruleset\n" + (RULESETS / "firewalld.nft").read_text())
    wait_for(lambda: "[-]firewall" in a.ready()[1], "the drop to be reported")
    ready, text = a.ready()
    assert not ready
    assert "table inet firewalld, chain filter_FWD_public: reject" in text
    assert b.ready()[0]
    a.host.nft("flush ruleset")
    all_reach_all(members)
    wait_for(lambda: a.ready()[0], "the node to be ready again")
    assert "no longer: IPv4 packets from this node's pods" in a.daemon.text()
