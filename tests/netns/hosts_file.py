"""Nodes on one segment that share a hosts file."""

from collections.abc import Sequence

from udptun.lab import Host, Lab
from udptun.lab.cluster import Member


def write(lab: Lab, hosts: Sequence[Host], *head: str) -> str:
    """Write a hosts file, which begins with these lines. Return the daemon's option for it."""
    file = lab.folder / "hosts.toml"
    file.write_text("\n".join(["network = '10.244.0.0/16'", *head]) + "\n" + "".join(
        f'[[nodes]]\nname = "{host.name}"\npublic = "{host.v4}"\nsubnets = "10.244.{i}.0/24"\n'
        for i, host in enumerate(hosts, 1)))
    return f"--hosts={file}"


def two_nodes(lab: Lab, *options: str, head: Sequence[str] = ()) -> list[Member]:
    """Return two nodes, n1 and n2. Their daemons are not started yet."""
    hosts = [lab.host(name) for name in ("n1", "n2")]
    lab.segment(*hosts)
    option = write(lab, hosts, *head)
    return [Member(host, [option], (f"--node-name={host.name}", *options)) for host in hosts]
