"""A click group that imports its commands when they are called, and turns errors into exit codes.

Owns the imports on demand. Turns an error of udptun into a line on stderr and an exit code: 1 if
the command failed, 2 if its arguments are wrong.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import IO, TYPE_CHECKING, Any

import click

from ..errors import UdptunError

if TYPE_CHECKING:
    from collections.abc import Mapping


class Failure(click.ClickException):
    """The command failed: one line on stderr, exit code 1."""

    def show(self, file: IO[Any] | None = None) -> None:
        if not _logged(self.message):
            click.echo(f"udptun: error: {self.message}", file=file, err=file is None)


class Misuse(click.UsageError):
    """Options contradict each other. A command whose log has started raises it. Exit code 2."""

    def show(self, file: IO[Any] | None = None) -> None:
        if not _logged(self.format_message()):
            super().show(file)


def _logged(message: str) -> bool:
    """Log the last line of a daemon whose log is JSON. Return False if there is no such log."""
    logs = sys.modules.get(f"{__package__}.logs")
    if logs is None or not logs.is_json():
        return False
    logs.log.critical("%s", message)
    return True


def failure_of(exc: UdptunError | OSError) -> Failure:
    text = exc.strerror if isinstance(exc, UdptunError) and isinstance(exc, OSError) else None
    return Failure(text or str(exc))


class LazyGroup(click.Group):
    """A group of commands that are imported when they are called.

    commands_at  name -> (``.module:attribute`` in this package, one line of help)
    """

    def __init__(
        self, *args: Any, commands_at: Mapping[str, tuple[str, str]], **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self._at = commands_at

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self._at)  # in the order of the mapping, not alphabetical

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self._at:
            return None
        module, _, attribute = self._at[cmd_name][0].partition(":")
        command: click.Command = getattr(import_module(module, __package__), attribute)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, help_line) for name, (_, help_line) in self._at.items()])

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except UdptunError as exc:
            raise failure_of(exc) from exc
