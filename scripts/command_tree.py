"""The commands of udptun with their options, for the man pages and the page of commands.

Reads the command line's own objects, so both pages have what ``--help`` has.
"""

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import click
import release

sys.path.insert(0, str(release.ROOT))
from udptun.cli import cli

DAEMONS = {"udptun forward", "udptun node", "udptun cni", "udptun ext"}  # run by other programs


@dataclass(frozen=True)
class Option:
    """One row of ``--help``. ``variables`` are those that can set the option."""

    names: str
    text: str
    variables: tuple[str, ...]


@dataclass(frozen=True)
class Command:
    """A command and its options. ``name`` is the whole one: ``udptun route add``."""

    name: str
    summary: str
    usage: str
    paragraphs: tuple[str, ...]
    options: tuple[Option, ...]

    @property
    def title(self) -> str:
        return self.name.replace(" ", "-")

    @property
    def section(self) -> int:
        """The section of the manual: 8 for daemons and what other programs start, else 1."""
        return 8 if " ".join(self.name.split()[:2]) in DAEMONS else 1


def commands() -> list[Command]:
    return list(_walk("udptun", cli, None))


def _walk(name: str, command: click.Command, parent: click.Context | None) -> Iterator[Command]:
    context = click.Context(command, parent=parent, info_name=name.rpartition(" ")[2],
                            auto_envvar_prefix="UDPTUN" if parent is None else None)
    usage = " ".join([name, *command.collect_usage_pieces(context)])
    help_text = (command.help or "").strip()
    yield Command(
        name, command.get_short_help_str(200).rstrip("."), usage,
        tuple(re.split(r"\n\s*\n", help_text)) if help_text else (),
        tuple(_options(command, context)),
    )
    if isinstance(command, click.Group):
        for child in command.list_commands(context):
            found = command.get_command(context, child)
            if found is not None and not found.hidden:
                yield from _walk(f"{name} {child}", found, context)


def _options(command: click.Command, context: click.Context) -> Iterator[Option]:
    for parameter in command.get_params(context):
        record = parameter.get_help_record(context)
        if record is None or isinstance(parameter, click.Argument):
            continue
        names, text = record[0], " ".join(record[1].split())
        variables = _variables(parameter, context)
        yield Option(names, re.sub(r"\s*\[env var: \w+\]", "", text), variables)


def _variables(parameter: click.Parameter, context: click.Context) -> tuple[str, ...]:
    if parameter.name == "help" or not isinstance(parameter, click.Option):
        return ()
    if parameter.is_eager and not parameter.expose_value:  # --version
        return ()
    given = parameter.envvar
    if given:
        return (given,) if isinstance(given, str) else tuple(given)
    if not parameter.allow_from_autoenv or context.auto_envvar_prefix is None:
        return ()
    return (f"{context.auto_envvar_prefix}_{(parameter.name or '').upper()}",)
