"""Peers of a VXLAN device, and their translation into the kernel's entries.

Owns: the order in which entries are added and removed, and the rule that a peer has a route only if
all its entries are active, so that its packets take another path otherwise. Does not know the
device or netlink's format. Threading rule: as ``EntrySocket``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..device.fault import device_error
from ..errors import DeviceError, FieldError
from ..model import IPAddress, IPNetwork
from .batch import Refusal
from .vxlan_entries import ON_LINK, Entries, EntrySocket, Prefix

MAC = re.compile("[0-9a-f]{2}(:[0-9a-f]{2}){5}", re.IGNORECASE | re.ASCII)


def parse_mac(field: str, value: str) -> bytes:
    """Return the bytes of one host's MAC, "aa:bb:cc:dd:ee:ff". FieldError."""
    mac = bytes.fromhex(value.replace(":", "")) if MAC.fullmatch(value) else b""
    if not any(mac) or mac[0] & 1:
        raise FieldError(field, value, "the MAC of one host, such as 5e:23:52:e4:f8:7b")
    return mac


@dataclass(frozen=True, slots=True)
class VxlanPeer:
    """A subnet of a peer. FieldError: ``mac`` is not that of one host.

    mac     of the peer's device, "aa:bb:cc:dd:ee:ff" (VtepMAC of its lease)
    direct  route straight to ``endpoint`` if it is on the link; encapsulate only if it is not
    """

    subnet: IPNetwork
    mac: str
    endpoint: IPAddress
    direct: bool = False

    def __post_init__(self) -> None:
        parse_mac("VtepMAC", self.mac)

    def __str__(self) -> str:
        return f"{self.subnet} at {self.endpoint}"


@dataclass(frozen=True, slots=True)
class PeerFailure:
    """A peer that this device does not reach, and why. It has no route through the device."""

    peer: VxlanPeer
    error: DeviceError | FieldError


def take(entries: Entries, subnets: Iterable[IPNetwork]) -> Entries:
    """Remove the entries of these subnets from ``entries``, and return them. The FDB entry of a MAC
    is returned and also stays: other subnets may use the MAC."""
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


@dataclass(eq=False, slots=True)
class _Row:
    """A peer as bytes for the kernel."""

    peer: VxlanPeer
    prefix: Prefix
    mac: bytes
    endpoint: bytes


class Application:
    """Add peers, and remove entries that are no longer used.

    now       the entries that stay; ``put`` adds those that are active
    former    the entries to remove unless ``put`` needs them again
    trust     the kernel is known to have ``former``: do not send these entries again
    failures  the peers that are not active
    """

    def __init__(self, socket: EntrySocket, now: Entries, former: Entries, *, trust: bool) -> None:
        self.now = now
        self.failures: list[PeerFailure] = []
        self._socket, self._former, self._trust = socket, former, trust

    def put(self, peers: Iterable[VxlanPeer], device: str, version: int) -> None:
        """Add each entry after those that it needs: a route without a neighbour entry would make
        the kernel send solicitations. OSError.

        version  IP version of the device's underlay, and of the subnets it carries
        """
        rows = [
            _Row(peer, (peer.subnet.network_address.packed, peer.subnet.prefixlen),
                 parse_mac("VtepMAC", peer.mac), peer.endpoint.packed)
            for peer in peers if self._fits(peer, device, version)
        ]
        # The kernel knows what is on the link: it refuses a next hop that is not.
        off_link = self._put_routes(
            (row, row.prefix, row.endpoint) for row in rows if row.peer.direct)
        through = self._with_unique_macs(
            [row for row in rows if not row.peer.direct or row in off_link])
        refused = self._put_macs(through)
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
        """Remove former entries that are not used. Return a sentence for each that the kernel kept.
        OSError."""
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
                expected = f"of IPv{version}, which {device} carries"
                self.failures.append(PeerFailure(peer, FieldError(name, str(value), expected)))
                return False
        return True

    def _with_unique_macs(self, rows: Iterable[_Row]) -> list[_Row]:
        """Return the rows whose MAC no other endpoint has: the FDB has one endpoint per MAC."""
        holders: dict[bytes, _Row] = {}
        unique = []
        for row in rows:
            holder = holders.setdefault(row.mac, row)
            if holder.endpoint == row.endpoint:
                unique.append(row)
            else:
                expected = f"a MAC that no other peer has ({holder.peer} has it)"
                self.failures.append(PeerFailure(
                    row.peer, FieldError("VtepMAC", row.peer.mac, expected)))
        return unique

    def _put_macs(self, rows: Sequence[_Row]) -> dict[_Row, Refusal]:
        now, former = self.now, self._former
        new = rows, rows
        if self._trust:
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
        """Let ``clear`` remove the active entries of a peer that has failed."""
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
        if self._trust:
            new = [item for item in wanted if former.get(item[1]) != item[2]]
        refused = _by_row([row for row, _, _ in new], self._socket.put_routes(
            [(prefix, hop) for _, prefix, hop in new], former))
        self.now.routes.update(
            (prefix, hop) for row, prefix, hop in wanted if row not in refused)
        return refused


def _by_row(rows: Sequence[_Row], answers: Sequence[Refusal | None]) -> dict[_Row, Refusal]:
    return {row: answer for row, answer in zip(rows, answers, strict=True) if answer is not None}
