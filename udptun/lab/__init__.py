"""Hosts in network namespaces, for the demo, the tests and the benchmarks.

Owns: namespaces, the links between them, the processes in them, and the removal of all these. Does
not depend on how a packet is forwarded. The lab starts tunnels by their command line, as an
operator does. Synchronous. Call the lab only from the main thread of a program, because the kernel
kills a process of the lab when the thread that started the process ends.

    with Lab() as lab:
        a, b = lab.host("a"), lab.host("b")
        lab.link(a, b)
        a.run(["ping", "-c1", str(b.v4)])
"""

from .hosts import Host, Interface, Lab, LabError, Link, Process, Unavailable, wait_for
from .measure import Ping, Throughput, iperf3, ping
from .pair import Pair, Side, pair
from .tools import missing_tools
from .tunnels import Forwarder, Node, OnePacket, node, vxlan

__all__ = [
    "Forwarder",
    "Host",
    "Interface",
    "Lab",
    "LabError",
    "Link",
    "Node",
    "OnePacket",
    "Pair",
    "Ping",
    "Process",
    "Side",
    "Throughput",
    "Unavailable",
    "iperf3",
    "missing_tools",
    "node",
    "pair",
    "ping",
    "vxlan",
    "wait_for",
]
