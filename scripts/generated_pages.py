"""The pages of the documentation site that are generated from code.

``PAGES`` has them with their place on the site. ``render`` returns a page as Markdown.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import command_tree
from command_tree import Command


@dataclass(frozen=True)
class Page:
    """``part`` is the heading of docs/index.md below which the page is listed."""

    name: str
    title: str
    text: str
    part: str
    render: Callable[[], str]


def commands_page() -> str:
    found = command_tree.commands()
    lines = [
        "# Commands", "",
        "All commands with their options. The text is that of `--help`. A variable in the last "
        "column sets the option; the command line takes precedence.", "",
        "| command | |", "|---|---|",
        *(f"| [`{one.name.removeprefix('udptun ')}`](#{one.title}) | {escaped(one.summary)} |"
          for one in found), "",
    ]
    for one in found:
        lines += [f"## {one.name}", "", *command_lines(one), ""]
    return "\n".join(lines)


def command_lines(command: Command) -> Iterator[str]:
    yield f"```\n{command.usage}\n```\n"
    for part in command.paragraphs:
        if part.startswith("\b"):  # click's mark: keep the lines
            body = part.split("\n", 1)[-1]
            yield f"```\n{body}\n```\n"
        else:
            yield escaped(" ".join(part.split())) + "\n"
    yield "| option | | variables |"
    yield "|---|---|---|"
    for option in command.options:
        variables = ", ".join(f"`{name}`" for name in option.variables)
        yield f"| `{cell(option.names)}` | {cell(escaped(option.text))} | {variables} |"


def escaped(text: str) -> str:
    """Escape what Markdown would interpret, except code spans."""
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(
        part if number % 2 else re.sub(r"([*_<>\[\]\\])", r"\\\1", part)
        for number, part in enumerate(parts))


def cell(text: str) -> str:
    return text.replace("|", "\\|")


PAGES = (
    Page("commands", "Commands", "every command and option", "Reference", commands_page),
)
