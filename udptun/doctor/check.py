"""What a check is, and what it can find.

A check looks at one part of the host and returns findings. It changes nothing. It raises ``Skip``
if it cannot run: for example without root, or because the part does not exist on this host. A
finding contains only what was measured or read.

Owns the types. Imports no check. Pure: any thread.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from ..text import printable

if TYPE_CHECKING:
    from .facts import Facts

TEXT_LIMIT = 600  # characters of a text; a store or a peer may have chosen parts of it
DEADLINE_SECONDS = 8.0


class Result(StrEnum):
    """The result of a check, the worst first."""

    FAILED = "failed"
    WARNING = "warning"
    SKIPPED = "skipped"
    OK = "ok"


class Skip(Exception):
    """The check cannot run; the text is the reason."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One result.

    text      what is wrong, as one sentence; of an ``ok``, what was found
    evidence  what was measured or read
    remedy    what an operator can do; if it begins with "run: ", a command
    """

    result: Result
    text: str
    evidence: str = ""
    remedy: str = ""

    @property
    def is_bad(self) -> bool:
        return self.result in (Result.FAILED, Result.WARNING)


@dataclass(frozen=True, slots=True)
class Check:
    """One check.

    looks_at  what it looks at, for the documentation
    page      the page and the anchor in docs/ that explain more
    seconds   it is given up after this time
    """

    name: str
    looks_at: str
    page: str
    look: Callable[[Facts], Iterable[Finding]]
    seconds: float = DEADLINE_SECONDS


def check(
    name: str, looks_at: str, page: str, seconds: float = DEADLINE_SECONDS
) -> Callable[[Callable[[Facts], Iterable[Finding]]], Check]:
    """Make a check from a function."""
    def make(look: Callable[[Facts], Iterable[Finding]]) -> Check:
        return Check(name, looks_at, page, look, seconds)

    return make


def failed(text: str, evidence: str = "", remedy: str = "") -> Finding:
    return _finding(Result.FAILED, text, evidence, remedy)


def warning(text: str, evidence: str = "", remedy: str = "") -> Finding:
    return _finding(Result.WARNING, text, evidence, remedy)


def ok(text: str) -> Finding:
    return _finding(Result.OK, text)


def skipped(text: str) -> Finding:
    return _finding(Result.SKIPPED, text)


def _finding(result: Result, text: str, evidence: str = "", remedy: str = "") -> Finding:
    return Finding(result, *(printable(part, TEXT_LIMIT) for part in (text, evidence, remedy)))
