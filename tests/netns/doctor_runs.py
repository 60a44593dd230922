"""Runs ``udptun doctor`` on a node, as an operator does."""

import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from udptun.lab import Host, LabError, wait_for
from udptun.lab.cluster import Member

# Results of these checks depend on the load of the machine that runs the tests, and on its disk.
OF_THE_MACHINE = {"cpu"}
HEALTHY_SECONDS = 60.0
FINDING_SECONDS = 40.0  # a peer counts as unreachable within 15 s


@dataclass
class Report:
    """exit_code and the findings of one run; ``problems`` are those that an operator sees."""

    exit_code: int
    findings: list[dict]

    @property
    def problems(self) -> list[dict]:
        return [one for one in self.findings if one["result"] in ("failed", "warning")
                and one["check"] not in OF_THE_MACHINE]

    def of(self, check: str) -> list[str]:
        """Return each problem of a check: text, evidence and remedy."""
        return [f"{one['text']} | {one['evidence']} | {one['remedy']}"
                for one in self.problems if one["check"] == check]

    def says(self, check: str, pattern: str) -> bool:
        """Return whether a problem of the check matches."""
        return any(re.search(pattern, text, re.DOTALL) for text in self.of(check))


def doctor(member: Member, *words: str, prefix: tuple[str, ...] = ()) -> Report:
    return ask(member.host, member.control, f"--state-dir={member.folder / 'state'}",
               f"--subnet-file={member.subnet_file}", *words, prefix=prefix)


def ask(host: Host, control: Path, *words: str, prefix: tuple[str, ...] = ()) -> Report:
    done = host.run([*prefix, sys.executable, "-m", "udptun", "doctor", "-o", "json", *words],
                    check=False, env={"UDPTUN_SOCKET": str(control)})
    assert done.returncode in (0, 1), done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert done.returncode == (1 if found["found"] else 0)
    for one in found["findings"]:
        assert "this check itself failed" not in one["text"], one
    return Report(done.returncode, found["findings"])


def await_healthy(member: Member) -> None:
    """Wait until doctor finds nothing on the node."""
    _await(member, lambda report: not report.problems,
           f"doctor to find nothing on {member.host.name}", HEALTHY_SECONDS)


def await_finding(member: Member, check: str, pattern: str) -> None:
    """Wait until the check has a finding with this text."""
    _await(member, lambda report: report.says(check, pattern), f"{check} to find /{pattern}/",
           FINDING_SECONDS)


def _await(
    member: Member, is_right: Callable[[Report], bool], what: str, seconds: float
) -> None:
    last: list[Report] = []

    def look() -> bool:
        last[:] = [doctor(member)]
        return is_right(last[0])

    try:
        wait_for(look, what, seconds)
    except LabError as exc:
        raise AssertionError(f"{exc}: {last[0].problems}") from None
