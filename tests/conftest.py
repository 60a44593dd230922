"""What all tests share: how hypothesis runs, hosts in network namespaces, what was not tested.

Hypothesis has no deadline, since no test asserts a time, and takes the same examples on every run,
so that a red suite is red again. ``UDPTUN_EXAMPLES=N`` looks further, with new examples each time.

Tests between hosts (``tests/lab``, ``tests/netns``) need root; without it they skip, and the end of
the run says so.
"""

import os
import signal
import subprocess
from collections.abc import Generator
from pathlib import Path

import pytest
from hypothesis import settings

from udptun.lab import Lab, missing_tools
from udptun.lab.tools import PACKAGES, install_command

TESTS = Path(__file__).parent
ROOT = TESTS.parent
HOSTS = (TESTS / "lab", TESTS / "netns")  # tests between hosts in network namespaces
_SKIPPED = pytest.StashKey[str]()

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
    if os.geteuid() != 0:
        return "not root"
    if missing := missing_tools(PACKAGES):
        return f"tools are missing ({install_command(missing)})"
    return None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    ours = [item for item in items if item.path.parent in HOSTS]
    obstacle = _obstacle()
    for item in ours:
        item.add_marker(pytest.mark.netns)
        if obstacle:
            item.add_marker(pytest.mark.skip(reason=f"network namespaces: {obstacle}"))
    if obstacle and ours:
        config.stash[_SKIPPED] = f"{len(ours)} tests in network namespaces were SKIPPED: {obstacle}"


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> Generator[None, None, None]:
    yield  # last, below the long list of skipped tests
    if message := config.stash.get(_SKIPPED, None):
        terminalreporter.section("NOT TESTED: the tunnel itself", sep="!", red=True, bold=True)
        terminalreporter.line(message, red=True, bold=True)


def pytest_configure() -> None:
    # As on Ctrl-C: pytest stops and every lab is removed.
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, signal.default_int_handler)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> object:
    """What the programs in the lab said goes into the report of a test that failed."""
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
