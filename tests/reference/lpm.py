"""Longest prefix match by a linear scan of all routes.

The tests compare the compiled look-up with this one.

Owns: the specification of the result. Pure functions.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable

Network = ipaddress.IPv4Network | ipaddress.IPv6Network


def table_order(network: Network) -> tuple[int, bytes, int]:
    """Return the sort key of table order: a prefix comes before every prefix inside it."""
    return network.version, network.network_address.packed, network.prefixlen


class Lpm:
    """A look-up over prefixes such as ``10.244.2.0/24``, sorted into table order."""

    def __init__(self, prefixes: Iterable[str]) -> None:
        self.networks: list[Network] = sorted(map(ipaddress.ip_network, prefixes), key=table_order)

    def lookup(self, addr: bytes) -> int:
        """Return 1 + index of the longest prefix that covers ``addr`` (4 or 16 bytes).

        Return 0 if no prefix does.
        """
        address = ipaddress.ip_address(addr)
        best, best_len = 0, -1
        for i, network in enumerate(self.networks):
            if address in network and network.prefixlen > best_len:
                best, best_len = i + 1, network.prefixlen
        return best
