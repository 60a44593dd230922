"""Read and change, in bulk, the kernel's entries for the peers of a VXLAN device.

Owns three kinds of entries: permanent neighbours, FDB entries and routes. Entries that do not
belong to peers stay unchanged. Keys and values are bytes as in netlink messages. Thousands of
entries can then be compared and sent without an object for each. ``vxlan_peers`` translates peers
into entries. Threading: same as ``RouteSocket``.
"""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Iterable
from dataclasses import dataclass, field

from ..model import IPNetwork
from .batch import Refusal, Request, RouteSocket, attributes

# linux/netlink.h, linux/rtnetlink.h
NLM_F_REPLACE, NLM_F_EXCL, NLM_F_CREATE = 0x100, 0x200, 0x400
PUT = NLM_F_CREATE | NLM_F_REPLACE
RTM_NEWROUTE, RTM_DELROUTE, RTM_GETROUTE = 24, 25, 26
RTM_NEWNEIGH, RTM_DELNEIGH, RTM_GETNEIGH = 28, 29, 30
RTA_DST, RTA_OIF, RTA_GATEWAY, RTA_PRIORITY = 1, 4, 5, 6
RT_TABLE_MAIN, RTN_UNICAST, RTNH_F_ONLINK = 254, 1, 4
RT_SCOPE_UNIVERSE = 0
RT_SCOPE_NOWHERE = 255  # in a request to delete a route, this value matches any scope
RTPROT_KERNEL = 2
RTPROT_UDPTUN = 85  # marks our routes; no other program is known to use it
# linux/neighbour.h
NDA_DST, NDA_LLADDR, NDA_IFINDEX = 1, 2, 8
NUD_PERMANENT, NTF_SELF = 0x80, 0x02
FAMILY = {4: socket.AF_INET, 6: socket.AF_INET6}
AF_BRIDGE = 7
# The metric that the kernel sets if a request has none. A route with another metric is not ours.
METRIC = {4: 0, 6: 1024}

NDMSG = struct.Struct("=B3xiHBB")  # family, interface, state, flags, type
RTMSG = struct.Struct("=8BI")  # family, dst_len, src_len, TOS, table, protocol, scope, type; flags
NUMBER = struct.Struct("=I")
NUMBER_ATTRIBUTE = struct.Struct("=HHI")
# A whole request body, by IP version: one of the headers above, followed by attributes.
NEIGHBOUR = {version: struct.Struct(f"{NDMSG.format}HH{size}sHH6s2x")
             for version, size in ((4, 4), (6, 16))}
MAC_ONLY = struct.Struct(f"{NDMSG.format}HH6s2x")
ROUTE = {version: struct.Struct(f"{RTMSG.format}HH{size}sHH{size}sHHI")
         for version, size in ((4, 4), (6, 16))}
LINK_ROUTE = struct.Struct(f"{RTMSG.format}HH16sHHI")
ON_LINK = b""  # value for a route without a next hop

Prefix = tuple[bytes, int]  # network address, length in bits


@dataclass(frozen=True, slots=True)
class Entries:
    """Entries of one device. All addresses and MACs are in network order.

    neighbours  address in the overlay -> MAC
    forwarding  MAC -> address on the underlay
    routes      prefix -> next hop. There are three kinds of routes:
                - Next hop is the base address of the prefix: a route through the device.
                - Next hop is the endpoint of a peer: a direct route, which does not use the device.
                - ON_LINK: a /128 route through the device to the base address of an IPv6 subnet.
                  If another route covers the base address, the kernel accepts the address as a
                  next hop only while this route exists.
    """

    neighbours: dict[bytes, bytes] = field(default_factory=dict)
    forwarding: dict[bytes, bytes] = field(default_factory=dict)
    routes: dict[Prefix, bytes] = field(default_factory=dict)

    def copy(self) -> Entries:
        return Entries(self.neighbours.copy(), self.forwarding.copy(), self.routes.copy())


class EntrySocket:
    """Reads and changes the entries of one device.

    version  IP version of the device's underlay, and of the packets that the device carries
    network  network of the overlay. A direct route is ours if it has our protocol number and is
             within this network. None: a direct route is ours if it has our protocol number
    """

    def __init__(
        self, netlink: RouteSocket, index: int, version: int, network: IPNetwork | None = None
    ) -> None:
        self._netlink, self._index, self._version = netlink, index, version
        self._network = network

    def read(self) -> Entries:
        """Return the present entries. Raises OSError."""
        found = Entries()
        for address, mac in self._neighbours(FAMILY[self._version]):
            found.neighbours[address] = mac
        for address, mac in self._neighbours(AF_BRIDGE):
            if any(mac) and not mac[0] & 1:  # a unicast MAC
                found.forwarding[mac] = address
        for prefix, next_hop, index, protocol in self._routes():
            if self._is_ours(prefix, next_hop, index, protocol):
                found.routes[prefix] = next_hop
        return found

    def _is_ours(self, prefix: Prefix, next_hop: bytes, index: int, protocol: int) -> bool:
        if index == self._index:
            return protocol == RTPROT_UDPTUN or next_hop != ON_LINK
        return protocol == RTPROT_UDPTUN and self._in_network(prefix)

    def _in_network(self, prefix: Prefix) -> bool:
        if self._network is None:
            return True
        base, length = prefix
        shift = self._network.max_prefixlen - self._network.prefixlen
        same = (int.from_bytes(base) ^ int(self._network.network_address)) >> shift == 0
        return same and length >= self._network.prefixlen

    def put_neighbours(self, items: Iterable[tuple[bytes, bytes]]) -> list[Refusal | None]:
        """Set each (address, MAC). Replace an existing entry of the address. Raises OSError."""
        return self._send([self._neighbour(*item) for item in items])

    def put_forwarding(self, items: Iterable[tuple[bytes, bytes]]) -> list[Refusal | None]:
        """Set each (MAC, address on the underlay). Replace an existing entry of the MAC.

        Raises OSError.
        """
        return self._send([self._forwarding(*item) for item in items])

    def put_routes(
        self, items: Iterable[tuple[Prefix, bytes]], ours: dict[Prefix, bytes]
    ) -> list[Refusal | None]:
        """Set each (prefix, next hop). Replace any other route to the prefix. Raises OSError.

        Exception: a route that the kernel itself has added is not replaced. Such a route means that
        this host is directly connected to the network of the prefix.

        ours  our present routes, which are replaced without this check
        """
        wanted = list(items)
        refused = self._send([
            self._route(prefix, hop, NLM_F_REPLACE if prefix in ours else NLM_F_EXCL)
            for prefix, hop in wanted
        ])
        taken = [at for at, refusal in enumerate(refused)
                 if refusal is not None and refusal.number == errno.EEXIST]
        if taken:
            kernel_routes = {prefix: index for prefix, _, index, protocol in self._routes()
                             if protocol == RTPROT_KERNEL}
            for at in taken:
                if (holder := kernel_routes.get(wanted[at][0])) is not None:
                    refused[at] = Refusal(
                        errno.EEXIST,
                        f"this host is directly connected to the subnet on {_name(holder)}")
            again = [at for at in taken if wanted[at][0] not in kernel_routes]
            results = self._send([self._route(*wanted[at], NLM_F_REPLACE) for at in again])
            for at, result in zip(again, results, strict=True):
                refused[at] = result
        return refused

    def delete(self, entries: Entries) -> list[str]:
        """Remove these entries, the routes first.

        Returns one error message for each entry that the kernel did not delete. Raises OSError.
        """
        requests = [
            *(self._route(prefix, hop, None) for prefix, hop in entries.routes.items()),
            *(self._neighbour(address, mac, RTM_DELNEIGH)
              for address, mac in entries.neighbours.items()),
            *(self._delete_forwarding(mac) for mac in entries.forwarding),
        ]
        names = [
            *(f"the route to {_text(prefix[0])}/{prefix[1]}" for prefix in entries.routes),
            *(f"the neighbour {_text(address)}" for address in entries.neighbours),
            *(f"the FDB entry {mac.hex(':')}" for mac in entries.forwarding),
        ]
        return [
            f"removing {name}: {refusal}"
            for name, refusal in zip(names, self._send(requests), strict=True)
            if refusal is not None and refusal.number not in (errno.ENOENT, errno.ESRCH)
        ]

    # -- requests ---------------------------------------------------------------------------------

    def _send(self, requests: list[Request]) -> list[Refusal | None]:
        refused = self._netlink.send(requests)
        return [refused.get(at) for at in range(len(requests))]

    def _neighbour(self, address: bytes, mac: bytes, kind: int = RTM_NEWNEIGH) -> Request:
        return Request(kind, PUT if kind == RTM_NEWNEIGH else 0, NEIGHBOUR[self._version].pack(
            FAMILY[self._version], self._index, NUD_PERMANENT, 0, RTN_UNICAST,
            4 + len(address), NDA_DST, address, 4 + 6, NDA_LLADDR, mac,
        ))

    def _forwarding(self, mac: bytes, address: bytes) -> Request:
        return Request(RTM_NEWNEIGH, PUT, NEIGHBOUR[self._version].pack(
            AF_BRIDGE, self._index, NUD_PERMANENT, NTF_SELF, 0,
            4 + len(address), NDA_DST, address, 4 + 6, NDA_LLADDR, mac,
        ))

    def _delete_forwarding(self, mac: bytes) -> Request:
        """Build a request that deletes the FDB entry of this MAC, for any address of the entry."""
        return Request(RTM_DELNEIGH, 0, MAC_ONLY.pack(
            AF_BRIDGE, self._index, NUD_PERMANENT, NTF_SELF, 0, 4 + 6, NDA_LLADDR, mac))

    def _route(self, prefix: Prefix, next_hop: bytes, mode: int | None) -> Request:
        """Build a request for one route.

        mode  NLM_F_REPLACE or NLM_F_EXCL: add the route; None: delete the route
        """
        base, length = prefix
        size = len(base)
        through = next_hop == base
        kind, flags, protocol, scope = (RTM_DELROUTE, 0, 0, RT_SCOPE_NOWHERE) if mode is None \
            else (RTM_NEWROUTE, NLM_F_CREATE | mode, RTPROT_UDPTUN, RT_SCOPE_UNIVERSE)
        head = (FAMILY[self._version], length, 0, 0, RT_TABLE_MAIN, protocol, scope, RTN_UNICAST)
        if next_hop == ON_LINK:
            return Request(kind, flags, LINK_ROUTE.pack(
                *head, 0, 4 + size, RTA_DST, base, 8, RTA_OIF, self._index))
        return Request(kind, flags, ROUTE[self._version].pack(
            *head, RTNH_F_ONLINK if through else 0,
            4 + size, RTA_DST, base, 4 + size, RTA_GATEWAY, next_hop,
            8, RTA_OIF, self._index if through else 0,
        ))

    # -- dumps ------------------------------------------------------------------------------------

    def _neighbours(self, family: int) -> Iterable[tuple[bytes, bytes]]:
        """Yield (address, MAC) of each permanent neighbour or FDB entry of the device."""
        request = NDMSG.pack(family, 0, 0, 0, 0) + NUMBER_ATTRIBUTE.pack(
            8, NDA_IFINDEX, self._index)
        for body in self._netlink.dump(RTM_GETNEIGH, request):
            _, index, state, _, _ = NDMSG.unpack_from(body)
            if index == self._index and state & NUD_PERMANENT:
                found = attributes(body, NDMSG.size)
                if NDA_DST in found and NDA_LLADDR in found:
                    yield bytes(found[NDA_DST]), bytes(found[NDA_LLADDR])

    def _routes(self) -> Iterable[tuple[Prefix, bytes, int, int]]:
        """Yield the prefix, next hop, interface and protocol of routes in the main table.

        Routes that cannot be ours are skipped. Our routes are unicast, have TOS 0 and our metric,
        and are never default routes.
        """
        request = RTMSG.pack(FAMILY[self._version], 0, 0, 0, RT_TABLE_MAIN, 0, 0, 0, 0)
        for body in self._netlink.dump(RTM_GETROUTE, request):
            _, length, _, tos, table, protocol, _, kind, _ = RTMSG.unpack_from(body)
            if table == RT_TABLE_MAIN and kind == RTN_UNICAST and tos == 0 and length > 0:
                found = attributes(body, RTMSG.size)
                if _number(found.get(RTA_PRIORITY)) in (0, METRIC[self._version]):
                    prefix = bytes(found[RTA_DST]), length
                    next_hop = bytes(found.get(RTA_GATEWAY, ON_LINK))
                    yield prefix, next_hop, _number(found.get(RTA_OIF)), protocol


def _number(value: memoryview | None) -> int:
    return 0 if value is None else int(NUMBER.unpack(value)[0])


def _name(index: int) -> str:
    try:
        return socket.if_indextoname(index)
    except OSError:
        return "an interface that is gone"


def _text(address: bytes) -> str:
    return socket.inet_ntop(socket.AF_INET if len(address) == 4 else socket.AF_INET6, address)
