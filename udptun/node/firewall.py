"""Masquerade and forward rules: flannel's, in nftables tables of our own.

Owns the tables ``ip udptun-ipv4`` and ``ip6 udptun-ipv6`` whole, and nothing else of the host's
rules. Refuses to know leases and interfaces. Asyncio, any loop; one call at a time.

The rules are put in by one transaction, are read back at each ``sync``, and are touched only when
they differ. An accept in our table cannot lift a drop in another: what the host's own firewall
refuses stays refused.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ..errors import UdptunError
from ..model import IPNetwork

log = logging.getLogger(__name__)

Json = dict[str, Any]


class FirewallError(UdptunError):
    """The rules could not be read or set; the sentence is nft's."""


@dataclass(frozen=True, slots=True)
class FirewallRules:
    """What is wanted. A family without a network has no rules.

    network     the overlay's, ``network6`` for IPv6
    subnet      this node's, ``subnet6`` for IPv6
    masquerade  --ip-masq
    forward     --iptables-forward-rules
    """

    network: ipaddress.IPv4Network | None = None
    subnet: ipaddress.IPv4Network | None = None
    network6: ipaddress.IPv6Network | None = None
    subnet6: ipaddress.IPv6Network | None = None
    masquerade: bool = False
    forward: bool = False


class Firewall:
    """Keeps the tables as ``want`` says. ``want`` may be set to something else at any time.

    error  why the last ``sync`` failed, in a sentence; "" when it did not
    """

    def __init__(self, want: FirewallRules, nft: str = "nft") -> None:
        self.want = want
        self.error = ""
        self._nft = nft

    async def sync(self) -> bool:
        """Put in place what is wanted. True if something had to be changed. FirewallError."""
        raise NotImplementedError

    async def keep(self, every_s: float) -> None:
        """``sync`` now and every so many seconds until cancelled; errors are logged, once each."""
        raise NotImplementedError

    async def remove(self) -> bool:
        """Take the tables out. True if there were any. FirewallError."""
        raise NotImplementedError
