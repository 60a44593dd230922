"""Run the checks one after another, each with a deadline.

Owns the deadlines and the order of the findings. A check that hangs is given up, and its thread is
left behind. Threading: main thread; each check runs in a thread of its own.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from ..errors import UdptunError
from .check import Check, Finding, Result, Skip, ok, skipped, warning
from .facts import Facts

ALL_SECONDS = 60.0
_ORDER = [*Result]


@dataclass(frozen=True, slots=True)
class Found:
    """A finding, and the check that found it."""

    check: Check
    finding: Finding


def run(
    facts: Facts, checks: Sequence[Check], progress: Callable[[str], None] = lambda _: None
) -> list[Found]:
    """Return the findings of all checks, the worst first. Each check has at least one."""
    deadline = time.monotonic() + ALL_SECONDS
    found: list[Found] = []
    for number, check in enumerate(checks, 1):
        progress(f"{number} of {len(checks)}: {check.name}")
        left = deadline - time.monotonic()
        findings: Iterable[Finding] = [skipped("no time is left")] if left <= 0 else \
            _look(facts, check, min(check.seconds, left))
        found += [Found(check, one) for one in findings]
    return sorted(found, key=lambda one: _ORDER.index(one.finding.result))


def _look(facts: Facts, check: Check, seconds: float) -> list[Finding]:
    findings: list[Finding] = []
    thread = threading.Thread(target=_collect, args=(facts, check, findings), daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        return [warning(f"this check did not end within {seconds:.0f} s",
                        remedy="see which program or file it waits for")]
    return findings or [ok("nothing found")]


def _collect(facts: Facts, check: Check, findings: list[Finding]) -> None:
    try:
        findings += check.look(facts)
    except Skip as exc:
        findings[:] = [skipped(str(exc))]
    except PermissionError as exc:
        lacks = "a capability is missing here" if facts.is_root else "run as root"
        findings[:] = [skipped(f"{exc}: {lacks}")]
    except (UdptunError, OSError) as exc:
        findings[:] = [skipped(f"cannot run: {exc}")]
    except Exception as exc:  # one check must not end the others
        findings[:] = [skipped(f"this check itself failed: {exc!r}")]
