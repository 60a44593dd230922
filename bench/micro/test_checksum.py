"""Checksum: GB/s of each implementation that this CPU supports, by length.

The time includes the call from Python. For short lengths, the call takes most of the time. Needs
only the compiled core.
"""

import pytest

from tests import reference
from tests.steps import checksum_implementations

LENGTHS = (40, 64, 576, 1460, 65536)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("name", checksum_implementations())
def test_checksum(benchmark, gb_per_second, name, length):
    benchmark.group = f"checksum of {length} bytes"
    data = bytes(range(256)) * (length // 256 + 1)
    data = data[:length]
    fn = checksum_implementations()[name]
    assert benchmark(fn, data, 0) == reference.checksum(data)
    gb_per_second(length)
