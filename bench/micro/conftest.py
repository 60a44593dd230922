"""Print the result of each micro benchmark in a comparable unit: ns per item, or GB/s.

Items and bytes are those of one round.
"""

from collections.abc import Callable

import pytest

Row = tuple[str, float, str]
_ROWS = pytest.StashKey[list[Row]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_ROWS] = []


@pytest.fixture
def ns_each(benchmark, request) -> Callable[[int], None]:
    """Return a function that reports the time per item; call it with the number of items."""

    def report(n: int) -> None:
        if benchmark.stats:
            _report(benchmark, request, "ns each", benchmark.stats.stats.min / n * 1e9)

    return report


@pytest.fixture
def gb_per_second(benchmark, request) -> Callable[[int], None]:
    """Return a function that reports the throughput; call it with the number of bytes."""

    def report(n: int) -> None:
        if benchmark.stats:
            _report(benchmark, request, "GB/s", n / benchmark.stats.stats.min / 1e9)

    return report


def _report(benchmark, request, unit: str, value: float) -> None:
    benchmark.extra_info[unit] = value
    request.config.stash[_ROWS].append((request.node.name, value, unit))


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    rows = config.stash[_ROWS]
    if rows:
        terminalreporter.section("the best rounds")
        width = max(len(name) for name, _, _ in rows)
        for name, value, unit in rows:
            terminalreporter.line(f"{name:<{width}}  {value:10.2f} {unit}")
