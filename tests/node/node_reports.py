"""Example reports of daemons, for tests of the modules that read reports."""

import time
from ipaddress import IPv4Address, IPv4Network

from udptun.leases.base import Attributes, Lease, SourceHealth, Subnets
from udptun.node.host.interface import Underlay
from udptun.node.status.report import (
    DeviceCount,
    ForwarderReport,
    HostReport,
    NodeReport,
    PairReport,
    PathMeasurement,
    PeersReport,
)

SUBNETS = [IPv4Network(f"10.5.{n}.0/24") for n in range(2, 5)]
DEVICES = [DeviceCount("vxlan", "flannel.1", "encap", 10, 1000, 1, 2),
           DeviceCount("udp", "udptun0", "decap", 20, 2000, 3, 4)]
# n2 and n3 answer, n4 does not
MEASURED = [PathMeasurement("n2", SUBNETS[0], "udp", "reachable", 0.001, 0.0),
            PathMeasurement("n2", SUBNETS[0], "vxlan", "reachable", 0.002, None),
            PathMeasurement("n3", SUBNETS[1], "udp", "reachable", 0.004, 0.25),
            PathMeasurement("n4", SUBNETS[2], "udp", "unreachable", None, 1.0)]
TRANSFERRED = {str(SUBNETS[0]): (1, 100, 2, 200), str(SUBNETS[1]): (5, 500, 6, 600)}


def with_peers() -> NodeReport:
    """Return the report of a node that measures three peers, see MEASURED."""
    report = ready()
    for subnet, one in zip(SUBNETS, (MEASURED[0], MEASURED[2], MEASURED[3]), strict=True):
        report.pairs[subnet] = PairReport(one.key, subnet, one.path, state=one.state)
    return report


def starting() -> NodeReport:
    return NodeReport("etcd", SourceHealth())


def ready() -> NodeReport:
    """Return the report of a node without any problem."""
    address = IPv4Address("192.0.2.1")
    return NodeReport(
        "etcd",
        SourceHealth(
            connected=True, last_contact=time.monotonic() - 3, lease="held",
            lease_expires=time.time() + 40_000, lease_renewed=time.time() - 60, errors_n=4,
            relists_n=2,
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
