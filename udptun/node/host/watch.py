"""Find out when something on this host has changed that concerns the overlay.

Owns: which of the kernel's notifications are a reason to compare the host with its desired state,
and which can change the route to a peer. Does not compare anything itself. ``concern`` and the
callbacks run on the daemon's loop.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

from ...model import IPNetwork
from ...net.changes import Change, Kind
from ...net.lookup import device_index
from ...net.netlink import Netlink


@dataclass(frozen=True, slots=True)
class _Scope:
    """What concerns the overlay.

    devices   the interface indexes of the overlay's devices and of the underlay
    complete  all of these devices exist; otherwise any changed link may be one of them
    networks  the overlay's networks
    own       this node's subnets: routes to single pods in them do not concern us
    """

    devices: frozenset[int] = frozenset()
    complete: bool = False
    networks: tuple[IPNetwork, ...] = ()
    own: tuple[IPNetwork, ...] = ()

    def has(self, change: Change) -> bool:
        if change.kind is Kind.LINK:
            return change.device in self.devices or not self.complete
        if change.kind is Kind.SETTING:
            return change.device == 0 or change.device in self.devices
        if change.kind is Kind.ROUTE:
            return change.device in self.devices or change.prefix is None or \
                self._has_route(*change.prefix)
        if change.kind in (Kind.NEIGHBOUR, Kind.ADDRESS):
            return change.device in self.devices
        return True

    def _has_route(self, base: bytes, length: int) -> bool:
        if length == 0:  # the default route may select the underlay
            return True
        return any(_overlap(net, base, length) for net in self.networks) and \
            not any(_overlap(net, base, length) and length > net.prefixlen for net in self.own)


# A change of these kinds can change the route that packets to a peer take.
_ROUTING = frozenset({Kind.ROUTE, Kind.RULE, Kind.ADDRESS, Kind.ANY})


class HostWatch:
    """Calls ``on_change`` after changes that concern the overlay, and then ``on_routing`` if they
    can change the route to a peer."""

    def __init__(
        self, netlink: Netlink, on_change: Callable[[], None], on_routing: Callable[[], None]
    ) -> None:
        self._netlink = netlink
        self._on_change = on_change
        self._on_routing = on_routing
        self._scope = _Scope()

    def start(self) -> None:
        loop = asyncio.get_running_loop()

        def on_changes(changes: frozenset[Change]) -> None:  # in the netlink thread
            kinds = {change.kind for change in changes if self._scope.has(change)}
            with contextlib.suppress(RuntimeError):  # the loop is closed
                if kinds:
                    loop.call_soon_threadsafe(self._on_change)
                if kinds & _ROUTING:
                    loop.call_soon_threadsafe(self._on_routing)

        self._netlink.watch_changes(on_changes)

    def concern(
        self, devices: Collection[str], underlay: int, networks: Iterable[IPNetwork],
        own: Iterable[IPNetwork],
    ) -> None:
        """Set what concerns the overlay.

        devices   the names of the overlay's devices that should exist
        underlay  the interface index of the underlay
        """
        indexes = [device_index(name) for name in devices]
        self._scope = _Scope(
            frozenset({underlay, *indexes} - {0}), all(indexes), tuple(networks), tuple(own))


def _overlap(network: IPNetwork, base: bytes, length: int) -> bool:
    if len(base) * 8 != network.max_prefixlen:
        return False
    shift = network.max_prefixlen - min(network.prefixlen, length)
    return (int(network.network_address) ^ int.from_bytes(base)) >> shift == 0
