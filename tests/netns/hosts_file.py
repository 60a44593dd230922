"""Nodes on one segment that share a hosts file."""

from udptun.lab import Lab
from udptun.lab.cluster import Member


def two_nodes(lab: Lab, *options: str) -> list[Member]:
    """Return two nodes, n1 and n2. Their daemons are not started yet."""
    hosts = [lab.host(name) for name in ("n1", "n2")]
    lab.segment(*hosts)
    file = lab.folder / "hosts.toml"
    file.write_text("network = '10.244.0.0/16'\n" + "".join(
        f'[[nodes]]\nname = "{host.name}"\npublic = "{host.v4}"\nsubnets = "10.244.{i}.0/24"\n'
        for i, host in enumerate(hosts, 1)))
    return [Member(host, [f"--hosts={file}"], (f"--node-name={host.name}", *options))
            for host in hosts]
