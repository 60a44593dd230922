"""Options that several commands share, and how values and results are put.

Refuses to know any single command. Imports nothing that a client command could do without.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from ..control.protocol import DEFAULT_SOCKET
from ..errors import FieldError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from ..control.client import ControlClient
    from ..model import Endpoint

    _ParamType = click.ParamType[Any]
else:
    _ParamType = click.ParamType  # no generic before click 8.2

__all__ = ["DEFAULT_SOCKET", "LISTEN", "Parsed", "client", "echo_json", "echo_table",
           "named_socket", "no_headers", "output", "socket"]

Decorated = TypeVar("Decorated", bound="Callable[..., Any]")

output = click.option(
    "-o", "--output", type=click.Choice(["table", "json"]), default="table", show_default=True,
    help="How to print.",
)
no_headers = click.option("--no-headers", is_flag=True, help="Leave out the table's first line.")


def socket(command: Decorated) -> Decorated:
    """``--socket`` after the command's name, where people look for it."""
    option = click.option(
        "--socket", "socket", metavar="PATH", expose_value=False, callback=_remember_socket,
        help="Where the forwarder answers.  [env var: UDPTUN_SOCKET]",
    )
    return option(command)


def _remember_socket(ctx: click.Context, param: click.Parameter, value: str | None) -> None:
    if value is not None:
        ctx.find_root().params["socket"] = value


def named_socket(ctx: click.Context) -> Path | None:
    """Return the socket that --socket or UDPTUN_SOCKET names; None: neither is given."""
    root = ctx.find_root()
    path = root.params["socket"]
    if root.get_parameter_source("socket") is click.core.ParameterSource.DEFAULT \
            and path == DEFAULT_SOCKET:
        return None
    return Path(path)


def client(ctx: click.Context) -> ControlClient:
    """A client for the socket that was named, closed at the end of the command."""
    from ..control.client import ControlClient

    return ctx.with_resource(ControlClient(ctx.find_root().params["socket"]))


class Parsed(_ParamType):
    """A value checked by one of the model's parsers, which raise FieldError."""

    def __init__(self, name: str, parse: Callable[[str], object]) -> None:
        self.name = name
        self._parse = parse

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> object:
        if not isinstance(value, str):
            return value
        try:
            return self._parse(value)
        except FieldError as exc:
            part = "" if exc.value == value else f", not {exc.value!r}"
            self.fail(f"{value!r} is not valid: expected {exc.expected}{part}", param, ctx)


def _listen(text: str) -> Endpoint:
    from ..model import Endpoint

    return Endpoint.parse(text, "--listen")


LISTEN = Parsed("address[:port]", _listen)


def echo_json(value: object) -> None:
    click.echo(json.dumps(value, indent=2))


def echo_table(
    headers: Sequence[str], rows: Iterable[Sequence[object]], hide_headers: bool = False
) -> None:
    """Columns as wide as they need, two blanks apart; numbers to the right, None as ``-``."""
    body = list(rows)
    numeric = [
        bool(body) and all(isinstance(row[i], int | None) for row in body)
        for i in range(len(headers))
    ]
    lines = [["-" if cell is None else str(cell) for cell in row] for row in body]
    if not hide_headers:
        lines.insert(0, list(headers))
    widths = [max((len(line[i]) for line in lines), default=0) for i in range(len(headers))]
    for line in lines:
        cells = [
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(line, widths, numeric, strict=True)
        ]
        click.echo("  ".join(cells).rstrip())
