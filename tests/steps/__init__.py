"""The compiled steps of the data path for tests and micro benchmarks: one Python function per step.

The functions have the same names and signatures as those of ``tests.reference``.
``tests/steps/build.py`` compiles them. The wheel does not contain them.
"""

from ._steps import (
    Lpm,
    build_probe,
    check_packet,
    checksum,
    checksum_implementations,
    cut,
    decrement_hop_limit,
    finish_checksum,
    fragment,
    icmp_allow_run,
    icmp_error,
    merge,
    parse_probe,
    take_ecn,
)

__all__ = [
    "Lpm",
    "build_probe",
    "check_packet",
    "checksum",
    "checksum_implementations",
    "cut",
    "decrement_hop_limit",
    "finish_checksum",
    "fragment",
    "icmp_allow_run",
    "icmp_error",
    "merge",
    "parse_probe",
    "take_ecn",
]
