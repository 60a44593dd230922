"""What the micro benchmarks say at the end: each in the unit that people compare."""

from collections.abc import Callable

import pytest

Row = tuple[str, float, str]
_ROWS = pytest.StashKey[list[Row]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_ROWS] = []


@pytest.fixture
def ns_each(benchmark, request) -> Callable[[int], None]:
    """Call it with how many things one round did."""

    def say(n: int) -> None:
        if benchmark.stats:
            _say(benchmark, request, "ns each", benchmark.stats.stats.min / n * 1e9)

    return say


@pytest.fixture
def gb_per_second(benchmark, request) -> Callable[[int], None]:
    """Call it with how many bytes one round took."""

    def say(n: int) -> None:
        if benchmark.stats:
            _say(benchmark, request, "GB/s", n / benchmark.stats.stats.min / 1e9)

    return say


def _say(benchmark, request, unit: str, value: float) -> None:
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
