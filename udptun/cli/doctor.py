"""``udptun doctor``: look for everything that is known to break a tunnel.

Owns the output. The checks are in ``udptun.doctor``. Threading: main thread.
"""

from __future__ import annotations

import sys
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..text import counted
from .mesh import mesh
from .options import (
    connection,
    control_path,
    echo_json,
    instance_of,
    output,
    terminal_width,
)

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

    from ..doctor.facts import Facts
    from ..doctor.run import Found

EXIT_FOUND = 1
PROGRESS_AFTER_SECONDS = 2.0
INDENT = " " * 10
MIN_WIDTH = 40

path_option = click.Path(path_type=Path)


def complete_check(
    ctx: click.Context, param: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    from click.shell_completion import CompletionItem

    from ..doctor.checks import CHECKS

    return [CompletionItem(one.name, help=one.looks_at)
            for one in CHECKS if one.name.startswith(incomplete)]


def files_of_node(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options that name the daemon's files, for a daemon that does not answer."""
    for option in (
        click.option("--state-dir", type=path_option, metavar="DIR",
                     help="The daemon's --state-dir, if it does not answer."),
        click.option("--subnet-file", type=path_option, metavar="FILE",
                     help="The daemon's --subnet-file, if it does not answer."),
    ):
        command = option(command)
    return command


@click.command()
@click.option("-v", "--verbose", is_flag=True,
              help="Also show the checks that found nothing, and those that could not run.")
@click.option("--check", "names", metavar="NAME", multiple=True,
              shell_complete=complete_check, help="Run only this check; may be repeated.")
@files_of_node
@output
@connection
@click.pass_context
def doctor(
    ctx: click.Context, verbose: bool, names: tuple[str, ...], state_dir: Path | None,
    subnet_file: Path | None, output: str,
) -> None:
    """Look for everything that is known to break a tunnel, and show what to do.

    The command asks the kernel, the node daemon and the forwarder. It changes nothing, and also
    works if the daemon or the forwarder does not run. Without root, some checks cannot run.

    The exit code is 0 if nothing was found, 1 if something was found, 2 if an argument is wrong.
    """
    from ..doctor.checks import CHECKS
    from ..doctor.run import run

    wanted = CHECKS
    if names:
        known = {check.name: check for check in CHECKS}
        for name in names:
            if name not in known:
                raise click.BadParameter(f"{name!r} is not one of {', '.join(known)}",
                                         param_hint="--check")
        wanted = tuple(known[name] for name in names)
    facts = facts_of(ctx, state_dir, subnet_file)
    with Progress() as progress:
        progress.now("asking the node daemon and the forwarder")
        facts.gather()
        found = run(facts, wanted, progress.now)
    if output == "json":
        echo_json(to_json(found))
    else:
        _show(found, len(wanted), verbose)
    sys.exit(EXIT_FOUND if problems(found) else 0)


def facts_of(ctx: click.Context, state_dir: Path | None, subnet_file: Path | None) -> Facts:
    from ..doctor.facts import Facts

    return Facts(instance_of(ctx), Path(control_path(ctx)), mesh, state_dir, subnet_file)


def problems(found: list[Found]) -> list[Found]:
    return [one for one in found if one.finding.is_bad]


def to_json(found: list[Found]) -> dict[str, object]:
    return {
        "found": len(problems(found)),
        "checks": len({one.check.name for one in found}),
        "findings": [
            {"check": one.check.name, "result": one.finding.result, "text": one.finding.text,
             "evidence": one.finding.evidence or None, "remedy": one.finding.remedy or None,
             "looks_at": one.check.looks_at, "page": f"docs/{one.check.page}"}
            for one in found],
    }


def _show(found: list[Found], checks_n: int, verbose: bool) -> None:
    width = terminal_width()
    for one in found if verbose else problems(found):
        for line in _lines(one, width):
            click.echo(line)
    unable = len({one.check.name for one in found if one.finding.result == "skipped"})
    bad = problems(found)
    count = f"{counted(len(bad), 'problem')} found" if bad else "nothing found"
    verb = "does" if unable == 1 else "do"
    not_looked = f"; {unable} {verb} not apply or could not run, see -v" \
        if unable and not verbose else ""
    click.echo(f"{counted(checks_n, 'check')}, {count}{not_looked}")


def _lines(one: Found, width: int | None) -> list[str]:
    """Return the finding as lines of at most ``width`` columns. None (no terminal): as one line."""
    finding = one.finding
    head = f"{finding.result.upper():<8}  {one.check.name}: {finding.text}"
    more = [
        *([f"measured: {finding.evidence}"] if finding.evidence else []),
        *([_remedy(finding.remedy)] if finding.remedy else []),
        *([f"see docs/{one.check.page}"] if finding.is_bad else [])]
    if width is None:
        return ["; ".join(part.rstrip(".") for part in (head, *more))]
    room = max(width, MIN_WIDTH)
    lines = textwrap.wrap(head, room, subsequent_indent=INDENT, break_on_hyphens=False)
    for text in more:
        lines += textwrap.wrap(text, room, initial_indent=INDENT, subsequent_indent=INDENT + "  ",
                               break_on_hyphens=False)
    return lines


def _remedy(text: str) -> str:
    return text if text.startswith("run: ") else f"remedy: {text}"


class Progress:
    """Shows on a terminal, on stderr, what the command waits for, if it takes long."""

    def __init__(self) -> None:
        self._shown, self._text, self._began = "", "", time.monotonic()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Progress:
        if sys.stderr.isatty():
            self._thread.start()
        return self

    def now(self, text: str) -> None:
        self._text = text

    def _run(self) -> None:
        while not self._over.wait(0.2):
            text = self._text
            if text != self._shown and time.monotonic() > self._began + PROGRESS_AFTER_SECONDS:
                self._shown = text
                click.echo(f"\r\x1b[K{text} ...", nl=False, err=True)

    def __exit__(self, *_: object) -> None:
        self._over.set()
        if self._thread.ident is not None:
            self._thread.join()
        if self._shown:
            click.echo("\r\x1b[K", nl=False, err=True)
