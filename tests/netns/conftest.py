"""Tests between hosts in network namespaces. They need root; without it they skip, loudly."""

import os
import signal
import subprocess
from collections.abc import Generator
from pathlib import Path

import pytest

from udptun.lab import Lab, missing_tools
from udptun.lab.tools import PACKAGES, install_command

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
_SKIPPED = pytest.StashKey[str]()


def _obstacle() -> str | None:
    if os.geteuid() != 0:
        return "not root"
    if missing := missing_tools(PACKAGES):
        return f"tools are missing ({install_command(missing)})"
    return None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    ours = [item for item in items if HERE in item.path.parents]
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
