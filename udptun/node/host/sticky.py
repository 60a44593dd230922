"""Keeps the chosen underlay addresses for as long as they are on this host.

Owns: the time at which a chosen address disappeared, and the decision to choose another address.
``interface`` makes the choice. One asyncio loop.

The other nodes identify this node by its published address. So a new default route, for example of
a VPN, or an address that is missing for a moment must not change the choice.
"""

from __future__ import annotations

import time
from collections.abc import Collection

from ...model import IPAddress
from ...net.netlink import Netlink
from ...net.underlay import interfaces
from ..config import InterfaceOptions
from .interface import NoInterface, Underlay, choose


class UnderlayChoice:
    """grace_s  seconds to wait before another address is chosen"""

    def __init__(self, netlink: Netlink, grace_s: float) -> None:
        self._netlink = netlink
        self._grace_s = grace_s
        self._gone_since: float | None = None  # time.monotonic()

    async def choose(
        self, options: InterfaceOptions, versions: Collection[int], own: Collection[str],
        former: Collection[IPAddress],
    ) -> Underlay:
        """Return the underlay; see ``interface.choose``.

        Also raises NoInterface if a chosen address has been missing for less than ``grace_s``. The
        caller has to call again later.
        """
        wanted = [address for address in former if address.version in versions]
        local = {address for one in await interfaces(self._netlink) for address in one.addresses}
        gone = [address for address in wanted if address not in local]
        now = time.monotonic()
        if not gone:
            self._gone_since = None
        elif self._gone_since is None:
            self._gone_since = now
        if self._gone_since is not None and now - self._gone_since < self._grace_s:
            raise NoInterface(
                f"{' and '.join(map(str, gone))} is not on this host any more: if it does not come"
                f" back within {self._grace_s:g} s, another address is published")
        return await choose(
            self._netlink, options, 4 in versions, 6 in versions, own, former)
