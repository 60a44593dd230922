"""Shared by all tests: hypothesis' settings, network namespaces, the report of what was not tested.

Hypothesis has no deadline, because no test asserts a time. It takes the same examples on every run,
so a failure is reproducible. ``UDPTUN_EXAMPLES=N`` takes N new examples on each run.

Tests between hosts (``tests/chaos``, ``tests/lab``, ``tests/netns``) need root and are skipped
without it. The end of each run lists every reason for which something was not tested.

``make test`` runs all tests except those marked ``slow``; ``make test-all`` runs those too.
"""

import os
import signal
import subprocess
from collections import Counter
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from udptun.lab import Lab, missing_tools
from udptun.lab.tools import PACKAGES, install_command

TESTS = Path(__file__).parent
ROOT = TESTS.parent
# The folders of tests between hosts in network namespaces.
HOSTS = (TESTS / "chaos", TESTS / "docs", TESTS / "lab", TESTS / "netns")

_slow: set[str] = set()  # the slow tests that this run leaves out

_MORE = os.environ.get("UDPTUN_EXAMPLES")
settings.register_profile(
    "udptun",
    deadline=None,
    derandomize=_MORE is None,
    max_examples=int(_MORE) if _MORE else 100,
    print_blob=True,
)
settings.load_profile("udptun")


def _obstacle() -> str | None:
    """Return why this process cannot create network namespaces; None if it can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if missing := missing_tools(PACKAGES):
        return f"network namespaces need tools ({install_command(missing)})"
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    obstacle = _obstacle()
    for item in items:
        if item.path.parent in HOSTS and not item.get_closest_marker("unprivileged"):
            item.add_marker(pytest.mark.netns)
            if obstacle:
                item.add_marker(pytest.mark.skip(reason=obstacle))


def pytest_deselected(items: list[pytest.Item]) -> None:
    slow = [item.nodeid for item in items if item.get_closest_marker("slow")]
    _slow.update(slow)
    if (worker := getattr(items[0].config, "workeroutput", None)) is not None:
        worker["slow"] = slow  # for the process that writes the report


@pytest.hookimpl(optionalhook=True)  # a hook of xdist
def pytest_testnodedown(node: Any, error: object) -> None:
    _slow.update(getattr(node, "workeroutput", {}).get("slow", ()))


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter,
) -> Generator[None, None, None]:
    """Print last, below the failures: what was not tested, and why."""
    yield
    reasons: dict[str, list[str]] = {}
    for report in terminalreporter.stats.get("skipped", []):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        reasons.setdefault(reason.removeprefix("Skipped: "), []).append(report.nodeid)
    if _slow:
        reasons["slow: `make test-all` runs them"] = sorted(_slow)
    if not reasons:
        return
    terminalreporter.section("NOT TESTED", sep="!", red=True, bold=True)
    for reason, tests in sorted(reasons.items(), key=lambda entry: -len(entry[1])):
        files = Counter(test.partition("::")[0] for test in tests)
        terminalreporter.line(f"{len(tests)} x {reason}", red=True, bold=True)
        terminalreporter.line("".join(f"    {n:4d} in {file}\n" for file, n in files.items()))


def pytest_configure() -> None:
    # SIGTERM has the effect of Ctrl-C: pytest stops, and every lab is removed.
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, signal.default_int_handler)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> object:
    """Add the output of the programs in the lab to the report of a failed test."""
    report = yield
    labs = [v for v in getattr(item, "funcargs", {}).values() if isinstance(v, Lab)]
    labs += [v.lab for v in getattr(item, "funcargs", {}).values() if hasattr(v, "lab")]
    if report.failed:
        for lab in dict.fromkeys(labs):
            for host in lab.hosts:
                for process in host.processes:
                    if text := process.text()[-2000:].strip():
                        report.sections.append((str(process), text))
    return report


@pytest.fixture
def lab():
    with Lab() as lab:
        yield lab


@pytest.fixture(scope="session")
def onepacket() -> Path:
    subprocess.run(["make", "-s", "bench/onepacket"], cwd=ROOT, check=True)
    return ROOT / "bench" / "onepacket"
