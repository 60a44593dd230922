"""Peers of a VXLAN device: what one is, and how a set of them becomes the kernel's entries.

Owns the order in which entries come and go, and the rule that a peer which is not wholly in force
has no route, so that its packets take another way. Refuses to know the device and netlink's form.
Threading rule: as ``EntrySocket``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from ..device.fault import device_error
from ..errors import DeviceError, FieldError
from ..model import IPAddress, IPNetwork
from .batch import Refusal
from .vxlan_entries import Entries, EntrySocket, Prefix

K = TypeVar("K", bytes, Prefix)

MAC = re.compile("[0-9a-f]{2}(:[0-9a-f]{2}){5}", re.IGNORECASE | re.ASCII)


def parse_mac(field: str, value: str) -> bytes:
    """The bytes of one host's MAC, "aa:bb:cc:dd:ee:ff". FieldError."""
    mac = bytes.fromhex(value.replace(":", "")) if MAC.fullmatch(value) else b""
    if not any(mac) or mac[0] & 1:
        raise FieldError(field, value, "the MAC of one host, such as 5e:23:52:e4:f8:7b")
    return mac


@dataclass(frozen=True, slots=True)
class VxlanPeer:
    """A subnet behind a peer. FieldError: ``mac`` is not one host's.

    mac     of the peer's device, "aa:bb:cc:dd:ee:ff" (VtepMAC of its lease)
    direct  route straight to ``endpoint`` if it is on the link, encapsulate only if it is not
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
    """A peer that is not reached by this device, and why. No route to it is left there."""

    peer: VxlanPeer
    error: DeviceError | FieldError


def prefix_of(subnet: IPNetwork) -> Prefix:
    return subnet.network_address.packed, subnet.prefixlen


def without(have: Entries, subnets: Iterable[IPNetwork]) -> Entries:
    """The entries of all the other subnets."""
    prefixes = {prefix_of(subnet) for subnet in subnets}
    bases = {base for base, _ in prefixes}
    neighbours = {base: mac for base, mac in have.neighbours.items() if base not in bases}
    used = set(neighbours.values())  # a MAC stays as long as one subnet is behind it
    return Entries(
        neighbours,
        {mac: address for mac, address in have.forwarding.items() if mac in used},
        {prefix: hop for prefix, hop in have.routes.items() if prefix not in prefixes},
    )


class Application:
    """Bring the kernel from ``have`` to ``entries`` and the peers that are put.

    entries   at first what shall stay, at last what is in force
    failures  the peers that are not
    trust     what ``have`` holds is in the kernel: it need not be sent again
    """

    def __init__(
        self, socket: EntrySocket, have: Entries, entries: Entries, *, trust: bool
    ) -> None:
        self.entries = entries
        self.failures: list[PeerFailure] = []
        self._socket, self._have, self._trust = socket, have, trust

    def put(self, peers: Sequence[VxlanPeer], device: str, version: int) -> None:
        """Each after what it needs: else the kernel would ask the network who is there. OSError.

        version  of the device's underlay, and of the subnets it carries
        """
        fitting = [peer for peer in peers if self._fits(peer, device, version)]
        straight = [peer for peer in fitting if peer.direct]
        # The kernel itself knows what is on the link: it refuses a next hop that is not.
        refused = self._put_routes(straight, [peer.endpoint.packed for peer in straight])
        through = self._put_macs(
            [peer for peer in fitting if not peer.direct or peer in refused], device)
        refused = self._put_routes(
            through, [peer.subnet.network_address.packed for peer in through])
        for peer, refusal in refused.items():
            self._refused(peer, device, refusal)

    def clear(self) -> list[str]:
        """Take away what there was and shall be no more; sentences about what stays. OSError."""
        have, now = self._have, self.entries
        return self._socket.delete(Entries(
            _less(have.neighbours, now.neighbours), _less(have.forwarding, now.forwarding),
            _less(have.routes, now.routes),
        ))

    def _fits(self, peer: VxlanPeer, device: str, version: int) -> bool:
        for name, value in (("subnet", peer.subnet), ("endpoint", peer.endpoint)):
            if value.version != version:
                self.failures.append(PeerFailure(peer, FieldError(
                    name, str(value), f"IPv{version}, which {device} carries")))
                return False
        return True

    def _put_macs(self, peers: Iterable[VxlanPeer], device: str) -> list[VxlanPeer]:
        """Neighbours and forwarding entries; returns the peers that have both."""
        have, now = self._have, self.entries
        sound: list[tuple[VxlanPeer, bytes, bytes, bytes]] = []
        holders: dict[bytes, IPAddress] = {}
        for peer in peers:
            mac = parse_mac("VtepMAC", peer.mac)
            holder = holders.setdefault(mac, peer.endpoint)
            if holder == peer.endpoint:
                base = peer.subnet.network_address.packed
                sound.append((peer, base, mac, peer.endpoint.packed))
            else:
                self.failures.append(PeerFailure(peer, FieldError(
                    "VtepMAC", peer.mac, f"a MAC of its own ({holder} has it)")))
        neighbours = [item for item in sound
                      if not (self._trust and have.neighbours.get(item[1]) == item[2])]
        forwarding = [item for item in sound
                      if not (self._trust and have.forwarding.get(item[2]) == item[3])]
        refused: dict[VxlanPeer, Refusal] = {}
        for items, answers in (
            (neighbours, self._socket.put_neighbours([item[1:3] for item in neighbours])),
            (forwarding, self._socket.put_forwarding([item[2:4] for item in forwarding])),
        ):
            for item, refusal in zip(items, answers, strict=True):
                if refusal is not None:
                    refused[item[0]] = refusal
        for peer, base, mac, endpoint in sound:
            if peer in refused:
                self._refused(peer, device, refused[peer])
            else:
                now.neighbours[base] = mac
                now.forwarding[mac] = endpoint
        return [item[0] for item in sound if item[0] not in refused]

    def _put_routes(
        self, peers: Sequence[VxlanPeer], hops: Sequence[bytes]
    ) -> dict[VxlanPeer, Refusal]:
        have, now = self._have.routes, self.entries.routes
        wanted = [(peer, prefix_of(peer.subnet), hop)
                  for peer, hop in zip(peers, hops, strict=True)]
        fresh = [item for item in wanted
                 if not (self._trust and have.get(item[1]) == item[2])]
        answers = self._socket.put_routes([item[1:] for item in fresh], have)
        refused = {item[0]: refusal for item, refusal in zip(fresh, answers, strict=True)
                   if refusal is not None}
        now.update((prefix, hop) for peer, prefix, hop in wanted if peer not in refused)
        return refused

    def _refused(self, peer: VxlanPeer, device: str, refusal: Refusal) -> None:
        doing = f"reaching {peer} through {device}"
        self.failures.append(PeerFailure(peer, device_error(refusal.number, doing, refusal.said)))


def _less(have: dict[K, bytes], now: dict[K, bytes]) -> dict[K, bytes]:
    return {key: value for key, value in have.items() if key not in now}
