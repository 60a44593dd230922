"""Choose the interface that carries the overlay: flannel's options, in flannel's order.

Owns the order of choice and what is said when nothing fits. Refuses to read the host itself
(``net/underlay.py``) and to follow it as it changes: the daemon asks again. Asyncio, any loop.

Differs from flannel in this: where an option settles one family's address only, the other one is
the interface's best; a ``--public-ip`` that is not local (behind a NAT) leaves the choice to the
default route; the overlay's own devices are never chosen; an IPv6 link-local address is never
taken, since a peer cannot send to it.
"""

from __future__ import annotations

import errno
import ipaddress
import re
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from ..errors import DeviceError, FieldError, UdptunError
from ..model import IPAddress
from ..net.netlink import Netlink
from ..net.underlay import Interface, default_routes, interfaces, route_to


class NoInterface(UdptunError):
    """No interface fits: says what was looked for and what there is. The host may change."""


@dataclass(frozen=True, slots=True)
class InterfaceOptions:
    """flannel's options of these names. A pattern that cannot be compiled is a FieldError.

    iface        names or addresses, tried in order
    iface_regex  patterns, tried in order, each on addresses first and then on names; unanchored
    can_reach    the interface that the kernel would use towards this address
    public_ip    published in place of the interface's own
    """

    iface: tuple[str, ...] = ()
    iface_regex: tuple[str, ...] = ()
    can_reach: IPAddress | None = None
    public_ip: ipaddress.IPv4Address | None = None
    public_ipv6: ipaddress.IPv6Address | None = None

    def __post_init__(self) -> None:
        for pattern in self.iface_regex:
            try:
                re.compile(pattern)
            except re.error as error:
                raise FieldError("iface-regex", pattern, f"a pattern ({error})") from None


@dataclass(frozen=True, slots=True)
class Underlay:
    """The interface that carries the overlay, and this node's addresses on it.

    mtu       of the interface, bytes
    address   to bind to, address6 for IPv6; None for a family that is not wanted
    public    to publish, public6 for IPv6; None for a family neither wanted nor given
    """

    name: str
    index: int
    mtu: int
    address: ipaddress.IPv4Address | None
    address6: ipaddress.IPv6Address | None
    public: ipaddress.IPv4Address | None
    public6: ipaddress.IPv6Address | None


async def choose(
    netlink: Netlink, options: InterfaceOptions, want_v4: bool, want_v6: bool,
    own: Collection[str] = (),
) -> Underlay:
    """The interface that carries the overlay.

    own  names of devices of the overlay itself, which are never chosen
    NoInterface, DeviceError.
    """
    raise NotImplementedError
