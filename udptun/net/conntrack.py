"""Delete entries of the kernel's table of connections (conntrack).

Owns the request to ctnetlink. Does not choose which entries are wrong. Threading: any thread, in
the network namespace of that thread. A call blocks only during the system call. Source:
linux/netfilter/nfnetlink.h, nfnetlink_conntrack.h.
"""

from __future__ import annotations

import errno
import logging
import socket
import struct
from collections.abc import Iterable
from dataclasses import dataclass

from ..model import IPAddress
from ..text import os_reason
from .batch import Request, RouteSocket, attribute

log = logging.getLogger(__name__)

NETLINK_NETFILTER = 12
DELETE = 1 << 8 | 2  # NFNL_SUBSYS_CTNETLINK, IPCTNL_MSG_CT_DELETE
NFGENMSG = struct.Struct("!BBH")  # IP version as address family, version of the protocol, 0
NLA_F_NESTED = 0x8000
CTA_TUPLE_ORIG = NLA_F_NESTED | 1
CTA_TUPLE_IP, CTA_TUPLE_PROTO = NLA_F_NESTED | 1, NLA_F_NESTED | 2
CTA_IP = {4: (1, 2), 6: (3, 4)}  # source, destination
CTA_PROTO_NUM, CTA_PROTO_SRC_PORT, CTA_PROTO_DST_PORT = 1, 2, 3
FAMILY = {4: socket.AF_INET, 6: socket.AF_INET6}


@dataclass(frozen=True, slots=True)
class UdpFlow:
    """The datagrams from one address and port to another, before any translation."""

    source: IPAddress
    source_port: int
    destination: IPAddress
    destination_port: int

    def reverse(self) -> UdpFlow:
        return UdpFlow(self.destination, self.destination_port, self.source, self.source_port)


def forget_flows(flows: Iterable[UdpFlow]) -> None:
    """Delete the entries of these flows. The next packet of a flow creates a new entry.

    Does not fail: a missing entry is no error, and other errors are only logged. A kernel may have
    no ctnetlink.
    """
    wanted = [*flows]
    try:
        with RouteSocket(NETLINK_NETFILTER) as kernel:
            refused = kernel.send([Request(DELETE, 0, _body(flow)) for flow in wanted])
    except OSError as error:
        log.debug("deleting conntrack entries: %s", os_reason(error))
        return
    for at, refusal in refused.items():
        if refusal.number != errno.ENOENT:
            log.debug("deleting the conntrack entry of %s: %s", wanted[at], refusal)
    if deleted := len(wanted) - len(refused):
        log.debug("deleted %d conntrack entries", deleted)


def _body(flow: UdpFlow) -> bytes:
    version = flow.source.version
    source, destination = CTA_IP[version]
    addresses = attribute(source, flow.source.packed) \
        + attribute(destination, flow.destination.packed)
    ports = attribute(CTA_PROTO_NUM, bytes([socket.IPPROTO_UDP])) \
        + attribute(CTA_PROTO_SRC_PORT, flow.source_port.to_bytes(2)) \
        + attribute(CTA_PROTO_DST_PORT, flow.destination_port.to_bytes(2))
    return NFGENMSG.pack(FAMILY[version], 0, 0) + attribute(
        CTA_TUPLE_ORIG, attribute(CTA_TUPLE_IP, addresses) + attribute(CTA_TUPLE_PROTO, ports))
