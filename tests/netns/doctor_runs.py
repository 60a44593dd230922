"""Runs ``udptun doctor`` on a node, as an operator does."""

import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from udptun.lab import Host, wait_for
from udptun.lab.cluster import Member

# Results of these checks depend on the load of the machine that runs the tests, and on its disk.
OF_THE_MACHINE = {"cpu"}


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


def await_healthy(member: Member, seconds: float = 60.0) -> None:
    """Wait until doctor finds nothing on the node."""
    last: list[Report] = []

    def healthy() -> bool:
        last[:] = [doctor(member)]
        return not last[0].problems

    try:
        wait_for(healthy, f"doctor to find nothing on {member.host.name}", seconds)
    except Exception as exc:
        raise AssertionError(f"{exc}: {last[0].problems}") from None
