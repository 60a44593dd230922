"""Keeps the chosen underlay addresses for as long as they are on this host.

Owns: the time since an address of the former choice is gone, and the decision to take another one.
``interface`` makes the choice. One asyncio loop.

A published address is this node's identity for the other nodes. A new default route, for example
of a VPN, or an address that is gone for a moment must not change it.
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
    """grace_s  seconds to wait before another address is taken"""

    def __init__(self, netlink: Netlink, grace_s: float) -> None:
        self._netlink = netlink
        self._grace_s = grace_s
        self._gone_since: float | None = None  # time.monotonic()

    async def choose(
        self, options: InterfaceOptions, versions: Collection[int], own: Collection[str],
        former: Collection[IPAddress],
    ) -> Underlay:
        """Return the underlay; see ``interface.choose``.

        Raises NoInterface also if an address of the former choice is gone and the time to wait for
        it is not over. So the caller has to call again.
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
                f"{' and '.join(map(str, gone))} is not on this host any more: another address is"
                f" published if it does not come back within {self._grace_s:g} s")
        return await choose(
            self._netlink, options, 4 in versions, 6 in versions, own, former)
