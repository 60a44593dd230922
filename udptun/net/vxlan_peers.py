"""Translate the peers of a VXLAN device into kernel entries, and apply them.

Owns the order in which entries are added and removed, and this rule: a peer has a route through the
device only if its neighbour and FDB entries are active. Without such a route, packets to the peer
can take another path. A peer that is not ``routed`` has the two entries and no route: a socket that
is bound to the device still reaches the peer. Does not depend on the settings of the device or on
netlink's message format. Threading: same as ``EntrySocket``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from ipaddress import ip_address

from ..device.fault import device_error
from ..errors import DeviceError, FieldError
from ..model import IPAddress, IPNetwork
from .batch import Refusal
from .vxlan_entries import ON_LINK, Entries, EntrySocket, Prefix

MAC = re.compile("[0-9a-f]{2}(:[0-9a-f]{2}){5}", re.IGNORECASE | re.ASCII)


def parse_mac(field: str, value: str) -> bytes:
    """Return the bytes of a unicast MAC address "aa:bb:cc:dd:ee:ff". Raises FieldError."""
    mac = bytes.fromhex(value.replace(":", "")) if MAC.fullmatch(value) else b""
    if not any(mac) or mac[0] & 1:
        raise FieldError(field, value, "a unicast MAC address, such as 5e:23:52:e4:f8:7b")
    return mac


@dataclass(frozen=True, slots=True)
class VxlanPeer:
    """A peer and its subnet. Raises FieldError if ``mac`` is not a unicast MAC address.

    mac     MAC address of the peer's device, "aa:bb:cc:dd:ee:ff" (VtepMAC of its lease)
    direct  if ``endpoint`` is on the link, route the subnet via it without encapsulation
    routed  True: the subnet has a route; False: only the neighbour and FDB entries exist
    """

    subnet: IPNetwork
    mac: str
    endpoint: IPAddress
    direct: bool = False
    routed: bool = True

    def __post_init__(self) -> None:
        parse_mac("VtepMAC", self.mac)

    def __str__(self) -> str:
        return f"{self.subnet} at {self.endpoint}"


@dataclass(frozen=True, slots=True)
class PeerFailure:
    """A peer that could not be set up, and the error. The peer has no route through the device."""

    peer: VxlanPeer
    error: DeviceError | FieldError


def take(entries: Entries, subnets: Iterable[IPNetwork]) -> Entries:
    """Remove the entries of these subnets from ``entries``. Return the removed entries.

    Exception: an FDB entry is returned but not removed, because other subnets may use its MAC.
    """
    taken = Entries()
    for subnet in subnets:
        base = subnet.network_address.packed
        for prefix in ((base, subnet.prefixlen), (base, subnet.max_prefixlen)):
            if (hop := entries.routes.pop(prefix, None)) is not None:
                taken.routes[prefix] = hop
        if (mac := entries.neighbours.pop(base, None)) is not None:
            taken.neighbours[base] = mac
            if (address := entries.forwarding.get(mac)) is not None:
                taken.forwarding[mac] = address
    return taken


def unrouted(entries: Entries, peers: Iterable[VxlanPeer]) -> list[IPNetwork]:
    """Return the subnets of the peers that have their neighbour and FDB entries, but no route."""
    found = []
    for peer in peers:
        base, mac = peer.subnet.network_address.packed, parse_mac("VtepMAC", peer.mac)
        if entries.neighbours.get(base) == mac and \
                entries.forwarding.get(mac) == peer.endpoint.packed and \
                (base, peer.subnet.prefixlen) not in entries.routes:
            found.append(peer.subnet)
    return found


@dataclass(eq=False, slots=True)
class _Row:
    """A peer as bytes of netlink messages."""

    peer: VxlanPeer
    prefix: Prefix
    mac: bytes
    endpoint: bytes


class EntryUpdate:
    """One update of a device's entries: ``put`` adds peers, ``clear`` removes unused entries.

    now             entries that the device shall have; ``put`` adds each entry that the kernel
                    accepted
    former          entries that the device may have; ``clear`` removes those that are not in
                    ``now``
    skip_unchanged  True: do not send entries that are in ``former``, because ``former`` has just
                    been read from the kernel. False: send all, because ``former`` may be outdated
    failures        peers that are not active
    """

    def __init__(
        self, socket: EntrySocket, now: Entries, former: Entries, *, skip_unchanged: bool
    ) -> None:
        self.now = now
        self.failures: list[PeerFailure] = []
        self._socket, self._former, self._skip_unchanged = socket, former, skip_unchanged

    def put(self, peers: Iterable[VxlanPeer], device: str, version: int) -> None:
        """Add the entries of ``peers``. Raises OSError.

        The neighbour entry is added before the route: without the entry, the kernel would send
        solicitations for packets on the route.

        version  IP version of the device's underlay, and of the subnets that the device carries
        """
        rows = [
            _Row(peer, (peer.subnet.network_address.packed, peer.subnet.prefixlen),
                 parse_mac("VtepMAC", peer.mac), peer.endpoint.packed)
            for peer in peers if self._fits(peer, device, version)
        ]
        # Try the direct route first: the kernel refuses it if the endpoint is not on the link.
        direct = [row for row in rows if row.peer.direct and row.peer.routed]
        off_link = self._put_routes((row, row.prefix, row.endpoint) for row in direct)
        on_link = {row for row in direct if row not in off_link}
        through = self._with_unique_macs([row for row in rows if row not in on_link])
        refused = self._put_macs(through)
        through = [row for row in through if row.peer.routed]
        if version == 6:
            refused |= self._put_routes(
                (row, (row.prefix[0], 128), ON_LINK) for row in through if row not in refused)
        refused |= self._put_routes(
            (row, row.prefix, row.prefix[0]) for row in through if row not in refused)
        for row, refusal in refused.items():
            doing = f"reaching {row.peer} through {device}"
            error = device_error(refusal.number, doing, refusal.message)
            self.failures.append(PeerFailure(row.peer, error))
            self._withdraw(row)

    def clear(self) -> list[str]:
        """Remove the entries in ``former`` that are not used any more.

        Returns one error message for each entry that the kernel did not delete. Raises OSError.
        """
        now, former = self.now, self._former
        used = set(now.neighbours.values())
        unused = {mac: address for mac, address in former.forwarding.items() if mac not in used}
        for mac in unused:
            now.forwarding.pop(mac, None)
        return self._socket.delete(Entries(
            {base: mac for base, mac in former.neighbours.items() if base not in now.neighbours},
            unused,
            {prefix: hop for prefix, hop in former.routes.items() if prefix not in now.routes},
        ))

    def _fits(self, peer: VxlanPeer, device: str, version: int) -> bool:
        for name, value in (("subnet", peer.subnet), ("endpoint", peer.endpoint)):
            if value.version != version:
                expected = f"IPv{version}, because {device} carries only IPv{version}"
                self.failures.append(PeerFailure(peer, FieldError(name, str(value), expected)))
                return False
        return True

    def _with_unique_macs(self, rows: Sequence[_Row]) -> list[_Row]:
        """Return rows in which each MAC has one endpoint, as the FDB requires.

        If several endpoints have the same MAC, the first endpoint keeps it. The others become
        failures. Otherwise a peer could get the packets to another peer, by a lease with its MAC.
        """
        holders: dict[bytes, _Row] = {}
        held, unique = self._held(row.mac for row in rows), []
        for row in rows:
            if held.get(row.mac, row.endpoint) != row.endpoint:
                other = f"at {ip_address(held[row.mac])}"
            elif (holder := holders.setdefault(row.mac, row)).endpoint != row.endpoint:
                other = str(holder.peer)
            else:
                unique.append(row)
                continue
            expected = f"a unique MAC address (the peer {other} has the same one)"
            self.failures.append(PeerFailure(
                row.peer, FieldError("VtepMAC", row.peer.mac, expected)))
        return unique

    def _held(self, macs: Iterable[bytes]) -> dict[bytes, bytes]:
        """Return the endpoints of those MACs that peers outside of this update have."""
        present = self.now.forwarding
        found = {mac: present[mac] for mac in macs if mac in present}
        used = set(self.now.neighbours.values()) if found else set()
        return {mac: endpoint for mac, endpoint in found.items() if mac in used}

    def _put_macs(self, rows: Sequence[_Row]) -> dict[_Row, Refusal]:
        now, former = self.now, self._former
        new = rows, rows
        if self._skip_unchanged:
            new = ([row for row in rows if former.neighbours.get(row.prefix[0]) != row.mac],
                   [row for row in rows if former.forwarding.get(row.mac) != row.endpoint])
        refused = _by_row(new[0], self._socket.put_neighbours(
            [(row.prefix[0], row.mac) for row in new[0]]))
        refused |= _by_row(new[1], self._socket.put_forwarding(
            [(row.mac, row.endpoint) for row in new[1]]))
        for row in rows:
            if row not in refused:
                now.neighbours[row.prefix[0]] = row.mac
                now.forwarding[row.mac] = row.endpoint
        return refused

    def _withdraw(self, row: _Row) -> None:
        """Move the active entries of a failed peer to ``former``. ``clear`` then removes them."""
        now, former = self.now, self._former
        base = row.prefix[0]
        now.neighbours.pop(base, None)
        former.neighbours[base] = row.mac
        former.forwarding[row.mac] = row.endpoint
        if (hop := now.routes.pop((base, 128), None)) is not None:
            former.routes[base, 128] = hop

    def _put_routes(self, routes: Iterable[tuple[_Row, Prefix, bytes]]) -> dict[_Row, Refusal]:
        former, wanted = self._former.routes, list(routes)
        new = wanted
        if self._skip_unchanged:
            new = [item for item in wanted if former.get(item[1]) != item[2]]
        refused = _by_row([row for row, _, _ in new], self._socket.put_routes(
            [(prefix, hop) for _, prefix, hop in new], former))
        self.now.routes.update(
            (prefix, hop) for row, prefix, hop in wanted if row not in refused)
        return refused


def _by_row(rows: Sequence[_Row], answers: Sequence[Refusal | None]) -> dict[_Row, Refusal]:
    return {row: answer for row, answer in zip(rows, answers, strict=True) if answer is not None}
