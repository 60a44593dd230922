"""Example reports of daemons, for tests of the modules that read reports."""

import time
from ipaddress import IPv4Address, IPv4Network

from udptun.leases.base import Attributes, Lease, SourceHealth, Subnets
from udptun.node.host.interface import Underlay
from udptun.node.status.report import ForwarderReport, HostReport, NodeReport, PeersReport


def starting() -> NodeReport:
    return NodeReport("etcd", SourceHealth())


def ready() -> NodeReport:
    """Return the report of a node without any problem."""
    address = IPv4Address("192.0.2.1")
    return NodeReport(
        "etcd",
        SourceHealth(
            connected=True, last_contact=time.monotonic() - 3, lease="held",
            lease_expires=time.time() + 40_000, errors_n=4, relists_n=2,
        ),
        waiting="",
        lease=Lease("10.5.1.0-24", Subnets(IPv4Network("10.5.1.0/24")), Attributes(address)),
        underlay=Underlay("eth0", 2, 1500, address, None, address, None),
        backend="auto",
        mtu=1450,
        subnet_env_error="",
        firewall_error="",
        host=HostReport(wrong={}),
        forwarder=ForwarderReport(
            connected=True, error="", synced=True, routes_n=7, starts_n=1, replaces_n=3
        ),
        peers=PeersReport(carried_n={"udp": 2, "vxlan": 5}),
        leases_n=8,
        route_changes_n={"udp": 9, "vxlan": 6},
        applied=time.monotonic() - 1,
        lag=0.25,
    )
