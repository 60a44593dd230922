"""The compiled steps of the data path, one Python function each, for tests and micro benchmarks.

The functions have the names and signatures of ``tests.reference``. ``tests/steps/build.py``
compiles them. The wheel does not contain them.
"""

from ._steps import (
    Lpm,
    check_packet,
    checksum,
    checksum_implementations,
    cut,
    decrement_hop_limit,
    fragment,
    icmp_allow_run,
    icmp_error,
    merge,
)

__all__ = [
    "Lpm",
    "check_packet",
    "checksum",
    "checksum_implementations",
    "cut",
    "decrement_hop_limit",
    "fragment",
    "icmp_allow_run",
    "icmp_error",
    "merge",
]
