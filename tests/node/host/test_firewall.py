"""The rules in the real kernel, as nft shows them; tests/netns tests their effect on packets."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import logging
import subprocess
from ipaddress import ip_address, ip_network
from types import SimpleNamespace

import pytest

from tests.own_netns import in_own_netns, sh
from tests.wait import until
from udptun.node.host.firewall import rules as rules_module
from udptun.node.host.firewall.keeper import Firewall
from udptun.node.host.firewall.rules import FirewallError, FirewallRules
from udptun.node.host.host import tunnel_flows
from udptun.node.host.interface import OuterFlow

RULES = FirewallRules(
    ip_network("10.42.0.0/16"), ip_network("10.42.1.0/24"),
    ip_network("fc00::/48"), ip_network("fc00:0:0:1::/64"), masquerade=True, forward=True,
)
ACTIVE = """\
table ip udptun-ipv4 {
	chain postrtg {
		type nat hook postrouting priority srcnat; policy accept;
		meta mark & 0x00004000 == 0x00004000 return
		ip saddr 10.42.1.0/24 ip daddr 10.42.0.0/16 return
		ip saddr 10.42.0.0/16 ip daddr 10.42.1.0/24 return
		ip saddr != 10.42.0.0/16 ip daddr 10.42.1.0/24 return
		ip saddr 10.42.0.0/16 ip daddr != 224.0.0.0/4 masquerade fully-random
		ip saddr != 10.42.0.0/16 ip daddr 10.42.0.0/16 masquerade fully-random
	}

	chain forward {
		type filter hook forward priority filter; policy accept;
		ip saddr 10.42.0.0/16 accept
		ip daddr 10.42.0.0/16 accept
	}
}
table ip6 udptun-ipv6 {
	chain postrtg {
		type nat hook postrouting priority srcnat; policy accept;
		meta mark & 0x00004000 == 0x00004000 return
		ip6 saddr fc00:0:0:1::/64 ip6 daddr fc00::/48 return
		ip6 saddr fc00::/48 ip6 daddr fc00:0:0:1::/64 return
		ip6 saddr != fc00::/48 ip6 daddr fc00:0:0:1::/64 return
		ip6 saddr fc00::/48 ip6 daddr != ff00::/8 masquerade fully-random
		ip6 saddr != fc00::/48 ip6 daddr fc00::/48 masquerade fully-random
	}

	chain forward {
		type filter hook forward priority filter; policy accept;
		ip6 saddr fc00::/48 accept
		ip6 daddr fc00::/48 accept
	}
}
"""


def ruleset(handles=False):
    """Return all tables, sorted, because nft lists a replaced table last."""
    text = sh("nft -a list ruleset" if handles else "nft list ruleset")
    return "".join(sorted(f"table {table}" for table in text.split("table ")[1:]))


def chains():
    """Return each chain as "family table chain"."""
    listed = json.loads(sh("nft -j list chains"))["nftables"]
    return {" ".join(item["chain"][key] for key in ("family", "table", "name"))
            for item in listed if "chain" in item}


@in_own_netns
async def test_flannels_rules_in_flannels_order():
    assert await Firewall(RULES).sync()
    assert ruleset() == ACTIVE


@in_own_netns
async def test_active_rules_are_not_touched():
    """Neither the next ``sync`` nor a restarted daemon replaces the active rules."""
    firewall = Firewall(RULES)
    await firewall.sync()
    before = ruleset(handles=True)
    assert not await firewall.sync()
    assert not await Firewall(RULES).sync()
    assert ruleset(handles=True) == before


@in_own_netns
@pytest.mark.parametrize("damage", [
    "delete table ip udptun-ipv4",
    "flush table ip6 udptun-ipv6",
    "delete table ip udptun-ipv4; delete table ip6 udptun-ipv6",
    "delete chain ip udptun-ipv4 forward",
    "flush chain ip udptun-ipv4 postrtg",
    "insert rule ip udptun-ipv4 postrtg ip saddr 10.42.0.0/16 accept",
    "add rule ip6 udptun-ipv6 forward drop",
    "add chain ip udptun-ipv4 forward { policy drop; }",
    "add set ip udptun-ipv4 strange { type ipv4_addr; }",
    "add table ip udptun-ipv4 { flags dormant; }",
    # the same rules in another order
    "flush chain ip udptun-ipv4 forward; add rule ip udptun-ipv4 forward ip daddr 10.42.0.0/16"
    " accept; add rule ip udptun-ipv4 forward ip saddr 10.42.0.0/16 accept",
])
async def test_changed_rules_are_restored(damage):
    firewall = Firewall(RULES)
    await firewall.sync()
    sh(f"nft {damage}")
    assert ruleset() != ACTIVE
    assert await firewall.sync()
    assert ruleset() == ACTIVE


@in_own_netns
async def test_each_repair_is_logged_for_every_caller(caplog):
    """The daemon also checks the rules when something else on the host has changed."""
    caplog.set_level(logging.INFO)
    firewall = Firewall(RULES)
    assert await firewall.sync()
    assert not await firewall.sync()
    sh("nft flush ruleset")
    assert await firewall.sync()
    assert caplog.text.count("firewall rules applied") == 2


@in_own_netns
async def test_the_hosts_own_rules_are_not_changed():
    sh("nft add table ip nat", "nft add table inet filter",
       "nft add chain inet filter forward { type filter hook forward priority 0; }",
       "nft add rule inet filter forward ip saddr 203.0.113.0/24 drop",
       "nft add table ip flannel-ipv4")
    before = ruleset(handles=True)
    firewall = Firewall(RULES)
    await firewall.sync()
    sh("nft flush table ip udptun-ipv4")
    await firewall.sync()
    await firewall.remove()
    assert ruleset(handles=True) == before


@in_own_netns
async def test_other_wanted_rules_replace_the_rules():
    firewall = Firewall(RULES)
    await firewall.sync()
    firewall.want = dataclasses.replace(RULES, subnet=ip_network("10.42.9.0/24"))
    assert await firewall.sync()
    assert ruleset() == ACTIVE.replace("10.42.1.0", "10.42.9.0")
    both = {"ip udptun-ipv4 ", "ip6 udptun-ipv6 "}
    for want, left in (
        ({"masquerade": False}, {table + "forward" for table in both}),
        ({"forward": False}, {table + "postrtg" for table in both}),
        ({"network6": None, "subnet6": None}, {"ip udptun-ipv4 postrtg", "ip udptun-ipv4 forward"}),
        ({"network": None, "subnet": None}, {"ip6 udptun-ipv6 postrtg", "ip6 udptun-ipv6 forward"}),
        # The node has no lease yet, so there is no subnet to masquerade.
        ({"subnet": None, "subnet6": None}, {table + "forward" for table in both}),
        ({"masquerade": False, "forward": False}, set()),
    ):
        firewall.want = dataclasses.replace(RULES, **want)
        assert await firewall.sync()
        assert not await firewall.sync()
        assert chains() == left
    assert ruleset() == ""  # there is no empty table either


@in_own_netns
async def test_a_subnet_of_one_address():
    """nft prints a prefix of full length without the prefix length."""
    firewall = Firewall(dataclasses.replace(RULES, subnet=ip_network("10.42.1.7/32")))
    assert await firewall.sync()
    assert "ip saddr 10.42.1.7 ip daddr 10.42.0.0/16 return" in ruleset()
    assert not await Firewall(firewall.want).sync()


@in_own_netns
async def test_remove():
    """A process that has not created the rules can remove them too, as with --cleanup."""
    await Firewall(RULES).sync()
    firewall = Firewall(FirewallRules())
    assert await firewall.remove()
    assert ruleset() == ""
    assert not await firewall.remove()
    kept = Firewall(RULES)
    await kept.remove()
    assert not await kept.sync()  # the next sync does not create them again
    assert ruleset() == ""


@in_own_netns
async def test_concurrent_syncs_apply_the_rules_once():
    """``keep`` and a new lease may call ``sync`` at the same time."""
    firewall = Firewall(RULES)
    assert sorted(await asyncio.gather(firewall.sync(), firewall.sync())) == [False, True]


def program(tmp_path, text):
    """Create an executable that replaces nft."""
    path = tmp_path / "nft"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


@in_own_netns
async def test_another_output_format_of_nft_is_not_a_change(tmp_path):
    """Later releases print flags as a list. The rules are the same, so they are not replaced."""
    nft = program(tmp_path, """nft "$@" | sed 's/"fully-random"/["fully-random"]/g'""")
    firewall = Firewall(RULES, nft=nft)
    assert await firewall.sync()
    before = ruleset(handles=True)
    assert not await firewall.sync()
    assert ruleset(handles=True) == before
    sh("nft flush chain ip udptun-ipv4 postrtg")
    assert await firewall.sync()
    assert ruleset() == ACTIVE


@in_own_netns
@pytest.mark.parametrize(("text", "words"), [
    ("echo Operation not permitted >&2; exit 1", ["list table ip udptun-ipv4",
                                                  "Operation not permitted"]),
    ("exit 3", ["exit code 3"]),
    ("echo what", ["its output is not the expected JSON"]),
    ("exec sleep 60", ["no answer within 0.05 s"]),
])
async def test_nft_fails(tmp_path, monkeypatch, text, words):
    if "sleep" in text:
        monkeypatch.setattr(rules_module, "TOOL_TIMEOUT_S", 0.05)
    firewall = Firewall(RULES, nft=program(tmp_path, text))
    with pytest.raises(FirewallError) as caught:
        await firewall.sync()
    for word in words:
        assert word in str(caught.value)
    assert firewall.error == str(caught.value)


@in_own_netns
@pytest.mark.parametrize(("mode", "words"), [
    (None, "does not run: No such file or directory (ENOENT) (Debian has it in the "
     "package nftables)"),
    (0o644, "does not run: Permission denied"),
])
async def test_nft_is_missing(tmp_path, mode, words):
    path = tmp_path / "nft"
    if mode is not None:
        path.write_text("")
        path.chmod(mode)
    firewall = Firewall(RULES, mode="nftables", nft=str(path))
    with pytest.raises(FirewallError, match="does not run") as caught:
        await firewall.sync()
    assert words in str(caught.value)


@in_own_netns
async def test_nft_is_not_needed_without_rules(tmp_path):
    firewall = Firewall(FirewallRules(), nft=str(tmp_path / "nft"))
    assert not await firewall.sync()
    assert not await firewall.remove()


@in_own_netns
@pytest.mark.parametrize("broken", ["udptun-ipv4", "udptun-ipv6"])
async def test_an_error_of_one_family_does_not_stop_the_other(tmp_path, broken):
    firewall = Firewall(RULES, nft=program(tmp_path, f"""\
case "$*" in *{broken}) echo "Error: out of order" >&2; exit 1;; esac
exec nft "$@"
"""))
    with pytest.raises(FirewallError, match=f"{broken}: Error: out of order$"):
        await firewall.sync()
    assert len(chains()) == 2
    assert not any(broken in chain for chain in chains())


@contextlib.asynccontextmanager
async def keeping(firewall):
    task = asyncio.create_task(firewall.keep(0.01))
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


@in_own_netns
async def test_rules_are_restored():
    async with keeping(Firewall(RULES)):
        await until(lambda: ruleset() == ACTIVE)
        sh("nft delete table ip udptun-ipv4")
        await until(lambda: ruleset() == ACTIVE)
    assert ruleset() == ACTIVE  # the rules stay when the daemon ends


@in_own_netns
async def test_an_error_is_logged_once_and_cleared(tmp_path, caplog):
    asked = tmp_path / "asked"
    nft = program(tmp_path, f"""\
echo >> {asked}
case "$*" in *udptun-ipv4)
  if [ -e {tmp_path}/broken ]; then echo "Error: out of order" >&2; exit 1; fi
esac
exec nft "$@"
""")
    (tmp_path / "broken").touch()
    firewall = Firewall(RULES, nft=nft)
    async with keeping(firewall):
        await until(lambda: "out of order" in firewall.error)
        before = len(asked.read_text())
        await until(lambda: len(asked.read_text()) > before + 4)  # and again, twice
        (tmp_path / "broken").unlink()
        await until(lambda: not firewall.error)
    assert ruleset() == ACTIVE
    errors = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert len(errors) == 1


# -- the tunnel's own datagrams -------------------------------------------------------------------

NFT = {  # hook, policy, rule, and the ports whose datagrams to this node are dropped
    "both ports": ("input", "accept", "udp dport { 8285, 8472 } drop", {8285, 8472}),
    "a range": ("input", "accept", "udp dport 8000-8300 drop", {8285}),
    "policy": ("input", "drop", "", {8285, 8472}),
    "known connections": ("input", "drop", "ct state established,related accept", {8472}),
    "one port is open": ("input", "drop", "udp dport 8472 accept", {8285}),
    "TCP is open": ("input", "drop", "tcp dport { 8285, 8472 } accept", {8285, 8472}),
    "other device": ("input", "accept", "iifname lo drop", set()),
    "unknown condition": ("input", "drop", "meta mark 7 accept", set()),
    "prerouting": ("prerouting", "accept", "meta l4proto udp th dport 8285 drop", {8285}),
    "one sender": ("input", "accept", "udp dport 8285 ip saddr 10.9.0.1 drop", set()),
}
IPTABLES = {
    "-P INPUT DROP": {8285, 8472},
    "-A INPUT -p udp -m udp --dport 8285 -j DROP": {8285},
    "-A INPUT -p udp -m multiport --dports 53,8400:8500 -j REJECT": {8472},
    "-A INPUT -p tcp -m tcp --dport 8285 -j DROP": set(),
    "-A INPUT ! -i lo -m conntrack --ctstate NEW -j DROP": {8472},
}


OUTER = (OuterFlow(8285, same_port=True), OuterFlow(8472, same_port=False))


async def dropped_ports():
    firewall = Firewall(RULES)
    underlay = SimpleNamespace(name="eth0", bound=(ip_address("192.0.2.1"),))
    firewall.tunnel = tuple(tunnel_flows(underlay, OUTER))
    await firewall.sync()
    assert not any(one.cuts for one in firewall.dropped)
    return {port for port in (8285, 8472) for one in firewall.dropped
            if f"to this node (UDP {port}) are dropped by" in one.text
            and one.remedy == f"a rule of this chain has to accept UDP port {port}"}


@pytest.mark.parametrize("name", NFT)
def test_rules_that_drop_the_datagrams_of_the_tunnel_are_named(name):
    @in_own_netns
    async def body():
        hook, policy, rule, ports = NFT[name]
        table = f"table inet s {{\nchain c {{\ntype filter hook {hook} priority 0; " \
            f"policy {policy};\n{rule}\n}}\n}}\n"
        subprocess.run(["nft", "-f", "-"], input=table, text=True, check=True)
        assert await dropped_ports() == ports

    body()


@pytest.mark.parametrize("rule", IPTABLES)
def test_iptables_rules_that_drop_the_datagrams_of_the_tunnel_are_named(rule):
    @in_own_netns
    async def body():
        sh(f"iptables {rule}")
        assert await dropped_ports() == IPTABLES[rule]

    body()


@in_own_netns
async def test_a_rule_that_drops_outgoing_datagrams_is_named():
    sh("iptables -A OUTPUT -p udp --dport 8472 -j DROP")
    firewall = Firewall(RULES)
    underlay = SimpleNamespace(name="eth0", bound=(ip_address("192.0.2.1"),))
    firewall.tunnel = tuple(tunnel_flows(underlay, OUTER))
    await firewall.sync()
    [found] = firewall.dropped
    assert "IPv4 datagrams of the tunnel from this node (UDP 8472) are dropped by iptables" in \
        found.text
