"""The pages of the documentation site that are generated from code.

``PAGES`` has them with their place on the site. ``render`` returns a page as Markdown.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import command_tree
import yaml
from command_tree import Command
from release import ROOT


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


def api_page() -> str:
    """Return the control API as tables: one for each request, one for each object."""
    document = yaml.safe_load((ROOT / "docs" / "openapi.yaml").read_text())
    lines = [
        "# Requests and answers", "",
        "All requests of the [control API](control.md), from `docs/openapi.yaml` "
        "([download](files/docs/openapi.yaml)). A later version may add fields.", "",
        "| request | | answer |", "|---|---|---|",
    ]
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            if method in ("get", "put", "post", "delete"):
                request = f"`{method.upper()} {path}`"
                lines.append(f"| {request} | {operation['summary']} | {_answer(operation)} |")
    for name, schema in document["components"]["schemas"].items():
        if "properties" in schema:
            lines += ["", f"## {name}", "", "| field | type | |", "|---|---|---|"]
            lines += [
                f"| `{field}` | {_type(one)}{'' if field in schema['required'] else ', optional'} "
                f"| {cell(escaped(one.get('description', '')))} |"
                for field, one in schema["properties"].items()
            ]
    return "\n".join(lines) + "\n"


def _answer(operation: dict[str, Any]) -> str:
    answer = next(iter(operation["responses"].values()))
    if answer.get("$ref", "").endswith("/Changed"):
        return _link("RouteDiff")
    return _type(next(iter(answer["content"].values()))["schema"])


def _type(schema: dict[str, Any]) -> str:
    """Return the type of a field in words."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return name.lower() if name in ("Address", "Prefix", "Endpoint", "Time") else _link(name)
    if "oneOf" in schema:
        return " or ".join(map(_type, schema["oneOf"]))
    if "const" in schema or "enum" in schema:
        values = schema.get("enum", [schema.get("const")])
        return ", ".join(f"`{str(value).lower()}`" for value in values)
    kind = schema.get("type", "any")
    if kind == "array":
        return f"list of {_type(schema['items'])}"
    if kind == "object" and "properties" in schema:
        fields = (f"`{name}`: {_type(one)}" for name, one in schema["properties"].items())
        return ", ".join(fields)
    return " or ".join(kind) if isinstance(kind, list) else str(kind)


def _link(name: str) -> str:
    return f"[{name}](#{name.lower()})"


PAGES = (
    Page("commands", "Commands", "every command and option", "Reference", commands_page),
    Page("requests", "Requests and answers", "the control API, field by field", "Reference",
         api_page),
)
