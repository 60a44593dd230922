"""Read the IPsec policies of this network namespace.

Owns the request and the layout of the answers. Threading: any thread, in the network namespace of
that thread. Source: linux/xfrm.h.
"""

from __future__ import annotations

import errno
import ipaddress
import socket
import struct
from collections.abc import Iterable
from dataclasses import dataclass

from ..model import IPAddress, IPNetwork
from .batch import RouteSocket

NETLINK_XFRM = 6
XFRM_MSG_GETPOLICY = 21
POLICY_ID = bytes(64)  # struct xfrm_userpolicy_id
# struct xfrm_selector: addresses, ports with masks, family, prefix lengths, protocol
SELECTOR = struct.Struct("=16s16s8xHBBB3x8x")
DIRECTION_AT = 160  # in struct xfrm_userpolicy_info
IN, OUT = 0, 1
POLICY_GROUP = 1 << 3  # XFRMNLGRP_POLICY


@dataclass(frozen=True, slots=True)
class Policy:
    """A policy for packets in one direction. ``peers`` has the addresses of the other end."""

    peers: IPNetwork
    own: IPNetwork
    protocol: int  # 0: any

    def covers(self, own: IPAddress, peer: IPAddress) -> bool:
        """Return whether the policy applies to UDP packets between these addresses."""
        return (self.protocol in (0, socket.IPPROTO_UDP) and peer.version == self.peers.version
                and peer in self.peers and own in self.own)


def policies() -> list[Policy]:
    """Return the policies for sent and for received packets. Raises OSError."""
    try:
        with RouteSocket(NETLINK_XFRM) as kernel:
            answers = kernel.dump(XFRM_MSG_GETPOLICY, POLICY_ID)
    except OSError as error:
        if error.errno in (errno.EPROTONOSUPPORT, errno.ECONNREFUSED):  # a kernel without IPsec
            return []
        raise
    return list(_policies(answers))


def watch() -> socket.socket | None:
    """Return a non-blocking socket that gets a message at each change of a policy. None: the kernel
    has no IPsec."""
    try:
        sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC
                             | socket.SOCK_NONBLOCK, NETLINK_XFRM)
    except OSError:
        return None
    sock.bind((0, POLICY_GROUP))
    return sock


def _policies(answers: Iterable[memoryview]) -> Iterable[Policy]:
    for answer in answers:
        to, source, family, to_len, source_len, protocol = SELECTOR.unpack_from(answer)
        direction = answer[DIRECTION_AT]
        if direction not in (IN, OUT):
            continue
        prefixes = _prefix(family, to, to_len), _prefix(family, source, source_len)
        peers, own = prefixes if direction == OUT else prefixes[::-1]
        yield Policy(peers, own, protocol)


def _prefix(family: int, address: bytes, length: int) -> IPNetwork:
    packed = address if family == socket.AF_INET6 else address[:4]
    return ipaddress.ip_network((packed, length), strict=False)
