"""Hosts in network namespaces: one maker of them for the demo, the tests and the benchmarks.

Owns: namespaces, the links between them, the processes started in them, and the removal of all
that. Refuses to know: how a packet is forwarded; it starts tunnels as any operator would, from
their command line. Synchronous, for one thread: call it from the main thread of a program, because
the processes it starts are bound to die with the thread that started them.

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
