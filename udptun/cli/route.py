"""``udptun route``: list and change the route table."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..errors import ControlError, FieldError
from .lazy import Failure
from .options import client, connection, echo_json, echo_table, no_headers, output

if TYPE_CHECKING:
    from ..model import Route

WORDS = "DST via IP [port P] [mtu M] [source-port P] [probe] [express] [ecn]"
ROUTE_LINE = re.compile(rb"^[^\S\n]*[^\s#]", re.MULTILINE)  # a line with more than a comment


@click.group()
def route() -> None:
    """List and change the routes of a running forwarder.

    The syntax of a route is like that of ip(8):
    10.244.2.0/24 via 192.0.2.2 [port 8285] [mtu 1400] [source-port any] [probe] [express]
    """


@route.command("list")
@output
@no_headers
@connection
@click.pass_context
def list_(ctx: click.Context, output: str, no_headers: bool) -> None:
    """List the routes."""
    if output == "json":
        for piece in client(ctx).routes_text():
            click.echo(piece, nl=False)
        return
    rows = (
        [route["dst"], route["via"], route["port"], route["mtu"],
         "yes" if route.get("probe") else "no", route.get("source_port")]
        for route in client(ctx).routes()["routes"]
    )
    echo_table(["DST", "VIA", "PORT", "MTU", "PROBE", "SOURCE-PORT"], rows, no_headers)


@route.command()
@click.argument("words", nargs=-1, required=True, metavar=WORDS)
@connection
@click.pass_context
def add(ctx: click.Context, words: tuple[str, ...]) -> None:
    """Add a route.

    Succeeds if the same route exists already. If there is a different route to the prefix, nothing
    changes and the exit code is 1.
    """
    try:
        client(ctx).add(_parse(words))
    except ControlError as exc:
        if exc.code != "route_exists":
            raise
        reason = str(exc).rstrip(".")
        raise Failure(f"{reason} (route_exists): use `udptun route replace` to change it") from exc


@route.command()
@click.argument("words", nargs=-1, required=True, metavar=WORDS)
@connection
@click.pass_context
def replace(ctx: click.Context, words: tuple[str, ...]) -> None:
    """Add a route, or replace the route to the same prefix."""
    client(ctx).put(_parse(words))


@route.command("del")
@click.argument("dst")
@connection
@click.pass_context
def delete(ctx: click.Context, dst: str) -> None:
    """Delete the route to DST. Succeeds also if there is no such route."""
    from ..model import parse_destination

    try:
        _check_length(dst)
        prefix = parse_destination("DST", dst)
    except FieldError as exc:
        raise click.UsageError(str(exc)) from exc
    client(ctx).delete(prefix)


@route.command(short_help="Replace all routes by those in FILE, in one step.")
@click.argument("file")
@click.option("--allow-empty", is_flag=True, help="Accept a FILE without routes.")
@output
@connection
@click.pass_context
def sync(ctx: click.Context, file: str, allow_empty: bool, output: str) -> None:
    """Replace all routes by those in FILE (- for standard input), in one step.

    FILE has one route per line: DST via IP [port P] [mtu M] [source-port P] [probe] [express]
    [ecn]. A # starts a comment. If a line is invalid, nothing changes. If there is no route in
    FILE, nothing changes either, because the program that should write the routes may have failed.
    """
    name = "standard input" if file == "-" else file
    try:
        body = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
    except OSError as exc:
        raise Failure(f"{name}: {exc.strerror}") from exc
    if not allow_empty and not ROUTE_LINE.search(body):
        raise Failure(f"{name}: there is no route in it, so all routes would be deleted: "
                      "use --allow-empty if this is intended")
    try:
        diff = client(ctx).replace_text(body)
    except ControlError as exc:
        raise Failure(f"{name}: {exc}") from exc
    if output == "json":
        echo_json(diff.to_json())
    else:
        click.echo(
            f"added {diff.added}, changed {diff.changed}, removed {diff.removed} "
            f"(generation {diff.generation})"
        )


def _parse(words: tuple[str, ...]) -> Route:
    from ..model import Route

    try:
        _check_length(words[0])
        return Route.from_words(words)
    except FieldError as exc:
        raise click.UsageError(str(exc)) from exc


def _check_length(dst: str) -> None:
    """Refuse an address that ends with 0: a person who types it usually means a prefix."""
    if "/" not in dst and dst.endswith((".0", "::")):
        usual, whole = (64, 128) if ":" in dst else (24, 32)
        raise FieldError("DST", dst, f"a prefix with its length, such as {dst}/{usual}, or"
                         f" {dst}/{whole} for one address")
