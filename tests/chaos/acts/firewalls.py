"""Acts of firewalls: rule sets as packages load them, flushed tables, a full conntrack table."""

import sys
from pathlib import Path
from random import Random

from udptun.lab.cluster import Member

from ..world import World
from .act import ALL, Act, Scene, isolates, pick

RULES = Path(__file__).parent.parent / "rules"
FLUSH = ("iptables -P INPUT ACCEPT; iptables -P FORWARD ACCEPT; iptables -P OUTPUT ACCEPT; "
         "for t in filter nat mangle; do iptables -t $t -F; iptables -t $t -X; done")


def _flush(world: World, rng: Random) -> Scene:
    member = pick(world, rng)
    member.host.run(["nft", "flush", "ruleset"])
    return Scene(f"{member.host.name}: nft flush ruleset", [member], must_log=True)


def _policy(binary: str):
    def do(world: World, rng: Random) -> Scene:
        member = pick(world, rng)
        member.host.run([binary, "-P", "FORWARD", "DROP"])
        return Scene(f"{member.host.name}: {binary} -P FORWARD DROP", [member], must_log=True,
                     undo=lambda: member.host.run([binary, "-P", "FORWARD", "ACCEPT"]))

    return do


def _iptables_rules(file: str, text: str, drops_input: bool = False):
    """Return an act that loads a rule set of iptables-save's format, as the package does.

    drops_input  the rules drop what arrives, except answers. UDP works, because both nodes use one
                 port for everything; VXLAN does not, because it answers from other ports
    """

    def do(world: World, rng: Random) -> Scene:
        member = pick(world, rng)
        member.host.run(["iptables-restore", "--noflush"], text=(RULES / file).read_text())

        def undo() -> None:
            _flush_iptables(member)

        cut = isolates(world, member) if drops_input and world.mode == "vxlan" else set()
        return Scene(f"{member.host.name}: {text}", [member], cut, undo, must_log=True)

    return do


def _flush_iptables(member: Member) -> None:
    member.host.run(["sh", "-c", FLUSH])


def _firewalld(world: World, rng: Random) -> Scene:
    """firewalld rejects forwarded packets in its own table. No accept rule of ours can change that.
    """
    member = pick(world, rng)
    member.host.nft((RULES / "firewalld.nft").read_text())
    return Scene(f"{member.host.name}: firewalld starts, without our devices in a zone", [member],
                 isolates(world, member),
                 lambda: member.host.nft("delete table inet firewalld\n"),
                 says="firewalld")


def _drop_input(world: World, rng: Random) -> Scene:
    """The host's own firewall drops the tunnel's datagrams."""
    member = pick(world, rng)
    member.host.nft("table inet strict {\nchain input {\n"
                    "type filter hook input priority 10; policy accept;\n"
                    "udp dport { 8285, 8472 } drop\n}\n}\n")
    return Scene(f"{member.host.name}: an nftables table drops UDP 8285 and 8472 on input",
                 [member], isolates(world, member),
                 lambda: member.host.nft("delete table inet strict\n"),
                 says=r"node \(UDP (8285|8472)\) are dropped by nftables, table inet strict")


def _drop_output(world: World, rng: Random) -> Scene:
    member = pick(world, rng)
    member.host.nft("table inet strict {\nchain output {\n"
                    "type filter hook output priority 10; policy accept;\n"
                    "udp dport { 8285, 8472 } drop\n}\n}\n")
    return Scene(f"{member.host.name}: an nftables table drops UDP 8285 and 8472 on output",
                 [member], isolates(world, member),
                 lambda: member.host.nft("delete table inet strict\n"),
                 says=r"node \(UDP (8285|8472)\) are dropped by nftables, table inet strict")


def _conntrack_full(world: World, rng: Random) -> Scene:
    """A scan or a busy service fills the table: the kernel drops the packets of new flows."""
    member = pick(world, rng)
    program = [sys.executable, "-m", "tests.chaos.conntrack"]
    member.host.run([*program, "fill"])
    return Scene(f"{member.host.name}: the conntrack table is full", [member],
                 isolates(world, member), lambda: member.host.run([*program, "flush"]),
                 says=r"\[!\]conntrack")


def _flannel_chains(world: World, rng: Random) -> Scene:
    """A former flanneld with another subnet has left its chain, which masquerades pod traffic."""
    member = pick(world, rng)
    member.host.run(["iptables-restore", "--noflush"], text=(RULES / "flannel.rules").read_text())
    return Scene(f"{member.host.name}: the iptables chains of a former flanneld", [member],
                 undo=lambda: _flush_iptables(member), must_log=True)


ACTS = [
    Act("nft-flush", "all nftables rules are flushed", _flush),
    Act("forward-drop", "the FORWARD policy of iptables is DROP", _policy("iptables")),
    Act("forward-drop-legacy", "the FORWARD policy of iptables-legacy is DROP",
        _policy("iptables-legacy")),
    Act("forward6-drop", "the FORWARD policy of ip6tables is DROP", _policy("ip6tables"), ALL,
        ipv6=True),
    Act("docker", "Docker's rule set is loaded",
        _iptables_rules("docker.rules", "Docker starts")),
    Act("ufw", "ufw's rule set is loaded",
        _iptables_rules("ufw.rules", "ufw is enabled", drops_input=True)),
    Act("firewalld", "firewalld's rule set is loaded", _firewalld),
    Act("input-drop", "a firewall drops the tunnel's datagrams on input", _drop_input),
    Act("output-drop", "a firewall drops the tunnel's datagrams on output", _drop_output),
    Act("conntrack-full", "the conntrack table is full: the kernel drops new flows",
        _conntrack_full),
    Act("leftover-chains", "iptables chains of a former flanneld", _flannel_chains),
]
