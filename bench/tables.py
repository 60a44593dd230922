"""Route tables, and addresses to look up in these tables. Both are the same in every run.

Owns: the contents of a table of N routes, for the micro benchmarks, the instruction counts and the
look-up metric. The functions have no side effects.
"""

from __future__ import annotations

import ipaddress
import random
from functools import cache

WIDTHS = {4: 32, 6: 128}
# Prefix lengths as in a cluster: most are pod subnets, some are shorter and some are longer.
_LENGTHS = {
    4: (16, 20, 22, 24, 24, 24, 24, 26, 28, 32),
    6: (32, 40, 48, 56, 64, 64, 64, 64, 96, 128),
}
# All routes are in 10.0.0.0/8 or fd00::/8, so every address outside these prefixes is a miss.
_AREA = {4: (10, 8), 6: (0xFD, 8)}
ADDRESSES = 1 << 16  # 256 KiB (IPv4) or 1 MiB (IPv6): more than the L1 cache


@cache
def prefixes(n: int, family: int) -> tuple[tuple[int, int], ...]:
    """Return ``n`` different prefixes as (network, length)."""
    rng = random.Random(n * family)
    width = WIDTHS[family]
    value, fixed = _AREA[family]
    found: dict[tuple[int, int], None] = {}
    while len(found) < n:
        length = rng.choice(_LENGTHS[family])
        if family == 4 and n > 100_000:
            length = max(length, 24)  # there are too few different prefixes that are shorter
        number = value << (width - fixed) | rng.getrandbits(width - fixed)
        found[number >> (width - length) << (width - length), length] = None
    return tuple(found)


def consecutive(first: str, n: int) -> list[str]:
    """Return ``n`` consecutive IPv4 /30 prefixes, beginning at address ``first``."""
    start = int(ipaddress.IPv4Address(first))
    return [f"{address(start + 4 * i, 4)}/30" for i in range(n)]


def text(n: int, family: int) -> bytes:
    """Return the table as a route file."""
    via = "192.0.2.1" if family == 4 else "2001:db8::1"
    rows = (f"{address(net, family)}/{length} via {via}\n" for net, length in prefixes(n, family))
    return "".join(rows).encode()


def address(number: int, family: int) -> str:
    """Return the text form of an address."""
    if family == 4:
        return ".".join(str(byte) for byte in number.to_bytes(4, "big"))
    return ":".join(f"{number >> shift & 0xFFFF:x}" for shift in range(112, -16, -16))


def addresses(kind: str, n: int, family: int) -> bytes:
    """Return ADDRESSES addresses in network byte order.

    hit     each address has a route
    miss    no address has a route
    random  the addresses are random in 10.0.0.0/8 or fd00::/8, with or without a route
    """
    rng = random.Random(f"{kind} {n} {family}")
    width = WIDTHS[family]
    value, fixed = _AREA[family]
    if kind == "hit":
        table = prefixes(n, family)
        numbers = [
            network | rng.getrandbits(width) & ((1 << (width - length)) - 1)
            for network, length in rng.choices(table, k=ADDRESSES)
        ]
    else:
        top = value if kind == "random" else value ^ 1
        numbers = [
            top << (width - fixed) | rng.getrandbits(width - fixed) for _ in range(ADDRESSES)
        ]
    return b"".join(number.to_bytes(width // 8, "big") for number in numbers)
