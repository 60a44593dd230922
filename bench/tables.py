"""Route tables and addresses to look up in them, the same on every run.

Owns: what a table of N routes looks like here, for the micro benchmarks and the look-up metric.
Pure.
"""

from __future__ import annotations

import random
from functools import cache

WIDTHS = {4: 32, 6: 128}
# Lengths as in a cluster and beyond: mostly pod subnets, some shorter and longer.
_LENGTHS = {
    4: (16, 20, 22, 24, 24, 24, 24, 26, 28, 32),
    6: (32, 40, 48, 56, 64, 64, 64, 64, 96, 128),
}
# A corner of the address space, so that misses outside it can be had: 10.0.0.0/8, fd00::/8.
_CORNER = {4: (10, 8), 6: (0xFD, 8)}
ADDRESSES = 1 << 16  # 256 KiB or 1 MiB of them: more than L1 has


@cache
def prefixes(n: int, family: int) -> tuple[tuple[int, int], ...]:
    """(network, length), n different ones."""
    rng = random.Random(n * family)
    width = WIDTHS[family]
    value, fixed = _CORNER[family]
    found: dict[tuple[int, int], None] = {}
    while len(found) < n:
        length = rng.choice(_LENGTHS[family])
        if family == 4 and n > 100_000:
            length = max(length, 24)  # there are not enough short ones
        number = value << (width - fixed) | rng.getrandbits(width - fixed)
        found[number >> (width - length) << (width - length), length] = None
    return tuple(found)


def text(n: int, family: int) -> bytes:
    """As a route file."""
    via = "192.0.2.1" if family == 4 else "2001:db8::1"
    rows = (f"{address(net, family)}/{length} via {via}\n" for net, length in prefixes(n, family))
    return "".join(rows).encode()


def address(number: int, family: int) -> str:
    if family == 4:
        return ".".join(str(byte) for byte in number.to_bytes(4, "big"))
    return ":".join(f"{number >> shift & 0xFFFF:x}" for shift in range(112, -16, -16))


def addresses(kind: str, n: int, family: int) -> bytes:
    """ADDRESSES of them, in network order. hit: in routes; miss: in none; random: in the corner."""
    rng = random.Random(f"{kind} {n} {family}")
    width = WIDTHS[family]
    value, fixed = _CORNER[family]
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
