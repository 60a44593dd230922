"""Choose the interface that carries the overlay, by flannel's options in flannel's order.

Owns: the order of choice, and the error if nothing matches. ``net.underlay`` reads the host; the
daemon chooses again when the host changes. Asyncio, any loop.

The choice differs from flannel's in these cases:
- If an option selects an address of only one IP version, the other IP version gets the interface's
  best address.
- If ``--public-ip`` is not a local address (the node is behind a NAT), the default route selects
  the interface.
- The overlay's own devices are never chosen. They still exist after a restart, and a pattern may
  match their addresses.
- An IPv6 link-local address is never used, because a peer cannot send packets to it.
"""

from __future__ import annotations

import ipaddress
import logging
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field

from ...errors import DeviceError, UdptunError
from ...model import IPAddress, IPNetwork
from ...net.netlink import Netlink
from ...net.underlay import Interface, default_routes, interfaces, route_to
from ..config import InterfaceOptions, interface_pattern

log = logging.getLogger(__name__)

LOOPBACK = "lo"  # an address of this device can be published


class NoInterface(UdptunError):
    """No interface matches. The text names the options and the existing interfaces.

    A later attempt may succeed, because the host may change.
    """


@dataclass(frozen=True, slots=True)
class OuterFlow:
    """The datagrams of a backend, as a firewall sees them.

    port       the UDP port to which all nodes send them
    same_port  True: their source port is ``port`` too. Then the datagrams of both directions are
               one connection for connection tracking
    """

    port: int
    same_port: bool


@dataclass(frozen=True, slots=True)
class Underlay:
    """The interface that carries the overlay, and this node's addresses on it.

    mtu       the interface's MTU, in bytes
    address   the IPv4 address to bind to; None: IPv4 is not wanted
    address6  the IPv6 address to bind to; None: IPv6 is not wanted
    public    the IPv4 address to publish; None: IPv4 is not wanted, and --public-ip is not given
    public6   the IPv6 address to publish; None: IPv6 is not wanted, and --public-ipv6 is not given
    note      a doubt about the choice, as a sentence: the options would select something else now,
              or another machine seems to have the address to publish; "": none
    """

    name: str
    index: int
    mtu: int
    address: ipaddress.IPv4Address | None
    address6: ipaddress.IPv6Address | None
    public: ipaddress.IPv4Address | None
    public6: ipaddress.IPv6Address | None
    note: str = field(default="", compare=False)

    @property
    def bound(self) -> tuple[IPAddress, ...]:
        """The addresses of this host to which the overlay is bound."""
        return tuple(one for one in (self.address, self.address6) if one is not None)


@dataclass(frozen=True, slots=True)
class Needed:
    """An address that this host must reach without the overlay.

    what    names it, for messages
    length  prefix length of the route to it; a route of the overlay with the same or a longer
            prefix diverts the packets to this address
    """

    address: IPAddress
    what: str
    length: int

    def is_in(self, prefix: IPNetwork) -> bool:
        """Return whether a route of the overlay to ``prefix`` diverts packets to the address."""
        return self.address in prefix and prefix.prefixlen >= self.length


async def choose(
    netlink: Netlink, options: InterfaceOptions, want_v4: bool, want_v6: bool,
    own: Collection[str] = (), former: Collection[IPAddress] = (),
) -> Underlay:
    """Return the interface that carries the overlay, with an address of each wanted IP version.

    want_v4, want_v6  the wanted IP versions; at least one must be True
    own               the names of the overlay's own devices
    former            the addresses of the former choice. The interface that has the first of them
                      is chosen again, with these addresses, unless the options exclude it.
    Raises NoInterface. Raises DeviceError if the interfaces or routes cannot be read.
    """
    existing = tuple(one for one in await interfaces(netlink) if one.name not in own)
    choice = _Choice(netlink, options, want_v4, want_v6, existing)
    (interface, selected), note = await _keep_former(choice, former)
    address = choice.address(interface, selected, 4) if want_v4 else None
    address6 = choice.address(interface, selected, 6) if want_v6 else None
    note = note or await choice.elsewhere()
    if interface.loopback:  # its addresses are reached through another interface
        interface = await choice.egress()
    if interface.mtu == 0:
        raise choice.no_interface(f"{interface.name}: has no MTU")
    if not interface.up:
        log.warning("%s carries the overlay and is down", interface.name)
    assert not isinstance(address, ipaddress.IPv6Address)
    assert not isinstance(address6, ipaddress.IPv4Address)
    return Underlay(
        interface.name, interface.index, interface.mtu, address, address6,
        options.public_ip or address, options.public_ipv6 or address6, note,
    )


async def _keep_former(choice: _Choice, former: Collection[IPAddress]) -> tuple[_Found, str]:
    """Return the choice, and a note if the former choice is kept; else ""."""
    kept = choice.former(former)
    if kept is None:
        return await choice.make(), ""
    try:
        fresh = await choice.make()
    except NoInterface as error:
        return kept, f"the former choice is kept, although there is {error}"
    if fresh[0] == kept[0]:
        return kept, ""
    why = f"the options would select {fresh[0].name} now"
    if choice.by_default_route:
        why = f"the default route goes through {fresh[0].name} now"
    return kept, f"{why}; the node stays at its published address on {kept[0].name}"


# An interface, and the addresses of this interface that an option has selected.
_Found = tuple[Interface, tuple[IPAddress, ...]]


@dataclass(frozen=True, slots=True)
class _Choice:
    """The data and the steps of one call of ``choose``."""

    netlink: Netlink
    options: InterfaceOptions
    want_v4: bool
    want_v6: bool
    existing: Sequence[Interface]

    @property
    def versions(self) -> tuple[int, ...]:
        return (4,) * self.want_v4 + (6,) * self.want_v6

    @property
    def by_default_route(self) -> bool:
        options = self.options
        return not (options.names or options.regexes or options.can_reach or self._by_public_ip())

    def former(self, addresses: Collection[IPAddress]) -> _Found | None:
        """Return the interface and the addresses of the former choice, if the options allow it."""
        selected = tuple(one for one in addresses if one.version in self.versions)
        found = self._by_address(selected[0]) if selected else None
        if found is None or not self._allowed(found[0], selected[0]):
            return None
        interface = found[0]
        return interface, tuple(one for one in selected if one in interface.addresses)

    def _allowed(self, interface: Interface, address: IPAddress) -> bool:
        options = self.options
        if options.names or options.regexes:
            return bool({interface.name, str(address)} & {*options.names}) or any(
                interface_pattern(regex).search(text) for regex in options.regexes
                for text in (interface.name, str(address))) or options.can_reach is not None
        if options.can_reach is None and (public := self._by_public_ip()) is not None:
            return public == (interface, (address,))
        return True

    async def elsewhere(self) -> str:
        """Return a sentence if an address to publish is directly on a link, but not on this host.

        An address behind a NAT is not on a link of this host. So another machine has the address,
        and both use the same entry of the store: one may be a copy of the other.
        """
        by_index = {one.index: one for one in self.existing if not one.loopback}
        for public in (self.options.public_ip, self.options.public_ipv6):
            if public is None or public.version not in self.versions or self._by_address(public):
                continue
            try:
                route = await route_to(self.netlink, public)
            except DeviceError:
                continue
            if route.gateway is None and route.index in by_index:
                return (f"the address to publish, {public}, is on the link of"
                        f" {by_index[route.index].name}, but not on this host: another machine may"
                        " use the same name or configuration")
        return ""

    async def egress(self) -> Interface:
        """Return the interface that carries packets whose source is an address of the loopback."""
        try:
            interface, _ = await self._by_default_route()
        except NoInterface:
            interface = None
        if interface is None or interface.loopback:
            raise self.no_interface(
                "an address of the loopback device needs a default route through another interface")
        return interface

    async def make(self) -> _Found:
        options = self.options
        if not (options.names or options.regexes or options.can_reach):
            return self._by_public_ip() or await self._by_default_route()
        tried: list[str] = []
        for name in options.names:
            if found := self._by_name(name):
                return found
            tried.append(f"--iface={name}")
        for regex in options.regexes:
            if found := self._by_regex(interface_pattern(regex)):
                return found
            tried.append(f"--iface-regex={regex}")
        if options.can_reach is not None:
            return await self._by_route(options.can_reach, tried)
        raise self.no_interface(f"{', '.join(tried)}: none matches")

    def address(
        self, interface: Interface, selected: Iterable[IPAddress], version: int
    ) -> IPAddress:
        """Return the selected address of the IP version.

        If no address of this IP version is selected, return the interface's best address.
        """
        for address in (*selected, *_usable(interface)):
            if address.version == version:
                return address
        only = ", only a link-local one" if any(
            address.version == version for address in interface.addresses) else ""
        raise self.no_interface(
            f"{interface.name}: has no IPv{version} address that other nodes can reach{only}")

    def no_interface(self, why: str) -> NoInterface:
        existing = ", ".join(
            f"{one.name} ({', '.join(map(str, one.addresses)) or 'no address'})"
            for one in self.existing
        )
        return NoInterface(f"no interface for the overlay: {why}; there are {existing or 'none'}")

    # -- one method per option --------------------------------------------------------------------

    def _by_name(self, name: str) -> _Found | None:
        try:
            address = ipaddress.ip_address(name)
        except ValueError:
            return next(((one, ()) for one in self.existing if one.name == name), None)
        return self._by_address(address)

    def _by_address(self, address: IPAddress) -> _Found | None:
        return next(((one, (address,)) for one in self.existing if address in one.addresses), None)

    def _by_regex(self, regex: re.Pattern[str]) -> _Found | None:
        """Return the first interface with matching addresses, one of each wanted IP version.

        If there is none, return the first interface with a matching name.
        """
        for one in self.existing:
            matches = [address for address in _usable(one) if regex.search(str(address))]
            if {address.version for address in matches} >= set(self.versions):
                return one, tuple(matches)
        return next(((one, ()) for one in self.existing if regex.search(one.name)), None)

    async def _by_route(self, address: IPAddress, tried: Sequence[str]) -> _Found:
        looked_for = ", ".join((*tried, f"--iface-can-reach={address}"))
        if found := self._by_address(address):  # the route to our own address is through lo
            return found
        try:
            route = await route_to(self.netlink, address)
        except DeviceError as error:
            raise self.no_interface(f"{looked_for}: {error}") from None
        selected = () if route.source is None else (route.source,)
        for one in self.existing:
            if one.index == route.index:
                return one, selected
        raise self.no_interface(
            f"{looked_for}: the route to {address} goes through a device of the overlay itself")

    def _by_public_ip(self) -> _Found | None:
        public = self.options.public_ip if self.want_v4 else self.options.public_ipv6
        return None if public is None else self._by_address(public)

    async def _by_default_route(self) -> _Found:
        by_index = {one.index: one for one in self.existing}
        chosen: list[Interface] = []
        for version in self.versions:
            routes = await default_routes(self.netlink, version)
            found = next((by_index[index] for index in routes if index in by_index), None)
            if found is None:
                raise self.no_interface(
                    f"there is no IPv{version} default route, and none of --iface, --iface-regex,"
                    " --iface-can-reach and a local --public-ip selects an interface")
            chosen.append(found)
        if chosen[0] != chosen[-1]:
            raise self.no_interface(
                f"the IPv4 default route goes through {chosen[0].name}, the IPv6 one through"
                f" {chosen[-1].name}: --iface must select one")
        return chosen[0], ()


def _usable(interface: Interface) -> tuple[IPAddress, ...]:
    """Return the interface's addresses that another host can reach."""
    return tuple(
        address for address in interface.addresses
        if not address.is_loopback and not (address.version == 6 and address.is_link_local)
    )
