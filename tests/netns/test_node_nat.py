"""Two nodes behind one NAT, with one public address and different ports, and a node outside."""

from __future__ import annotations

import pytest

from tests.netns.cluster_traffic import all_reach_all
from udptun.lab import wait_for
from udptun.lab.cluster import Member

PORTS = {"n1": 8285, "n2": 8286, "n3": 8285}


class Site:
    """n1 and n2 -- gateway -- n3"""

    def __init__(self, lab, backend):
        self.n1, self.n2, self.gateway, self.n3 = (
            lab.host(name) for name in ("n1", "n2", "gateway", "n3"))
        inside = lab.segment(self.n1, self.n2, self.gateway)[2]
        self.outside, _ = lab.segment(self.gateway, self.n3)
        self.public = self.outside.v4.ip
        self.gateway.forwarding()
        for host in (self.n1, self.n2):
            host.ip(f"route add default via {inside.v4.ip}")
        self.gateway.nft(f"""\
table ip nat {{
  chain prerouting {{
    type nat hook prerouting priority dstnat;
    ip daddr {self.public} udp dport 8285 dnat to {self.n1.v4}:8285
    ip daddr {self.public} udp dport 8286 dnat to {self.n2.v4}:8286
  }}
  chain postrouting {{
    type nat hook postrouting priority srcnat;
    ip saddr {{ {self.n1.v4}, {self.n2.v4} }} udp sport {{ 8285, 8286 }} snat to {self.public}
  }}
}}
""")
        file = lab.folder / "hosts.toml"
        public = {"n1": self.public, "n2": self.public, "n3": self.n3.v4}
        file.write_text("network = '10.244.0.0/16'\n" + "".join(
            f'[[nodes]]\nname = "{name}"\npublic = "{public[name]}"\nport = {port}\n'
            f'subnets = "10.244.{i}.0/24"\n' for i, (name, port) in enumerate(PORTS.items(), 1)))
        self.members = [
            Member(host, [f"--hosts={file}"], (f"--node-name={host.name}", f"--backend={backend}"))
            for host in (self.n1, self.n2, self.n3)
        ]
        for member in self.members:
            member.start()
        for member in self.members:
            member.wait_ready()
            member.add_pod()


@pytest.mark.parametrize("backend", ["udp", pytest.param("auto", marks=pytest.mark.slow)])
def test_nodes_with_one_public_address_reach_each_other(lab, backend):
    site = Site(lab, backend)
    all_reach_all(site.members)
    # Most simple NATs do not send packets back to the network that they came from.
    site.gateway.nft(f"""\
table ip no_hairpin {{
  chain prerouting {{
    type filter hook prerouting priority raw;
    iifname != {site.outside.name} ip daddr {site.public} drop;
  }}
}}
""")
    a, b, c = site.members
    for member in (a, b):
        wait_for(lambda member=member: "(hairpin)" in member.ready()[1], "the reason")
        assert member.ready()[0]
    assert "(hairpin)" not in c.ready()[1]
