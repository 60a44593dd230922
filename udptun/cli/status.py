"""``udptun status``: the node, the forwarder, and every peer by name.

Owns the choice of what is shown, the table of peers and the formats. ``mesh`` combines the answers
of the node daemon and the forwarder; ``node_status`` and ``show`` format the blocks. Threading:
main thread.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import click

from ..spans import size, span
from .answers import ask
from .mesh import STATES, Row, find, find_behind, natural, spelled, why
from .node_status import age, node_block, problems
from .node_status import peer_block as node_peer_block
from .options import (
    client,
    connection,
    echo_fitting,
    echo_json,
    node_client,
    node_stopped,
    terminal_width,
    wrap,
)
from .samples import UNKNOWN, Pair, peer_rates
from .show import device_block, peer_block

if TYPE_CHECKING:
    from ..control.client import ControlClient

WATCH_SECONDS = 2.0
RATE_SECONDS = 0.5
GOOD = ("reachable", "unknown", "not probed")  # --check fails for all other states
INDENT = 4  # of the rest of a long line
CLEAR = "\x1b[H\x1b[2J"  # of a terminal: to the top left, and erase
# The columns of the table, and those that a narrow terminal does not show, the first one first.
COLUMNS = ("PEER", "STATE", "FOR", "PATH", "RTT", "LOSS", "OUT/S", "IN/S", "SENT", "RECEIVED",
           "MTU", "SEEN", "SUBNETS", "LAST ERROR", "REASON")
OMITTED = ("SUBNETS", "LAST ERROR", "MTU", "REASON", "SENT", "RECEIVED", "FOR", "SEEN")
SORT = ("name", "state", "rtt", "loss", "sent", "received", "seen")
DUMP = ("name", "state", "since", "path", "rtt_us", "loss", "largest_size", "path_mtu",
        "last_seen_seconds", "endpoint", "errors", "reason")

RATES = ("out_bytes_per_second", "in_bytes_per_second")  # of a peer, in JSON


@click.command()
@click.argument("wanted", metavar="[NODE]", required=False)
@click.option("--sort", type=click.Choice(SORT), default="name", show_default=True,
              help="Order of the peers. state: the worst first. Numbers: the largest first.")
@click.option("--state", "states", type=click.Choice(STATES), multiple=True,
              help="Show only the peers in this state; may be repeated.")
@click.option("--rates", is_flag=True,
              help="Count for half a second first, and show the bytes per second.")
@click.option("-w", "--watch", is_flag=True, help="Repeat every 2 seconds, until Ctrl-C.")
@click.option("--check", is_flag=True,
              help="Show only what is wrong; the exit code is 1 if there is something.")
@click.option("-o", "--output", type=click.Choice(["table", "json", "yaml", "dump"]),
              default="table", show_default=True,
              help="Output format. dump: one line per peer, separated by tabs.")
@connection
@click.pass_context
def status(
    ctx: click.Context, wanted: str | None, sort: str, states: tuple[str, ...], rates: bool,
    watch: bool, check: bool, output: str,
) -> None:
    """Show the node, the device, the peers and the packet counts.

    The command asks the node daemon and the forwarder, and shows the answers that it gets. NODE
    is the name, the subnet or the public address of a peer, or the address of a pod there. With
    NODE, the command shows only this peer, with all details. SENT, RECEIVED and the rates count UDP
    payload. They do not count packets that VXLAN carries.
    """
    before: Sample | None = None
    node, forwarder = node_client(ctx), client(ctx)
    try:
        if rates:
            before = Sample(node, forwarder, wanted, sort, states, None)
            time.sleep(RATE_SECONDS)
        while True:
            now = Sample(node, forwarder, wanted, sort, states, before)
            if watch and output == "table" and sys.stdout.isatty():
                click.echo(CLEAR, nl=False)
            if check:
                wrong = [*_problems(now)]
                for line in wrong:
                    click.echo(line)
                if not watch:
                    sys.exit(bool(wrong))
            else:
                _show(ctx, now, output, wanted)
            if not watch:
                return
            before = now
            time.sleep(WATCH_SECONDS)
    except KeyboardInterrupt:
        sys.exit(130)  # Ctrl-C is the normal end; shells use this exit code for it


class Sample:
    """What the node daemon and the forwarder answered at one time."""

    def __init__(
        self, node: ControlClient, forwarder: ControlClient, wanted: str | None, sort: str,
        states: tuple[str, ...], before: Sample | None,
    ) -> None:
        answers = ask(node, forwarder)
        self.node, self.found = answers.node, answers.forwarder
        self.at = time.monotonic()
        self.rows = self.all = answers.rows
        if wanted is not None:
            row = find(self.rows, wanted) or _behind(self.rows, wanted)
            if row is None:
                raise click.BadParameter(f"{wanted!r} is not a peer: see `udptun status`",
                                         param_hint="NODE")
            self.rows = [row]
        self.rows = sorted((row for row in self.rows if not states or row["state"] in states),
                           key=lambda row: _sort_key(row, sort))
        self.rates = {} if before is None else peer_rates(
            before.all, self.rows, self.at - before.at)


def _behind(rows: list[Row], wanted: str) -> Row | None:
    """Return the peer that has this address of a pod; None: there is none, or it is no address."""
    from ipaddress import ip_address

    try:
        return find_behind(rows, ip_address(spelled(wanted)))
    except ValueError:
        return None


def _sort_key(row: Row, sort: str) -> tuple[Any, ...]:
    if sort == "state":
        return STATES.index(row["state"]), natural(row["name"])
    number = {
        "rtt": row["rtt_us"], "loss": row["loss"], "seen": row["last_seen_seconds"],
        "sent": row["sent"] and row["sent"]["bytes"],
        "received": row["received"] and row["received"]["bytes"],
    }.get(sort)
    return math.inf if number is None else -number, natural(row["name"])


def _show(ctx: click.Context, now: Sample, output: str, wanted: str | None) -> None:
    if output in ("json", "yaml"):
        value = (now.found or {}) | ({} if now.node is None else {"node": now.node})
        value |= {"mesh": [row | dict(zip(RATES, _rounded(now, row), strict=True))
                           for row in now.rows]}
        if output == "json":
            echo_json(value)
        else:
            click.echo("\n".join(_yaml(value)))
    elif output == "dump":
        for row in now.rows:
            click.echo("\t".join(map(_cell, _dumped(now, row))))
    elif wanted is not None:
        click.echo("\n\n".join(map(_fitting, _details(now))))
    else:
        for block in _host(ctx, now):
            click.echo(f"{_fitting(block)}\n")
        _echo_peers(now)


def _dumped(now: Sample, row: Row) -> Iterator[object]:
    """Yield the values of a line of ``dump``. New ones are added at the end."""
    yield from (row[name] for name in DUMP)
    for side in ("sent", "received"):
        yield from (row[side] and row[side][unit] for unit in ("packets", "bytes"))
    yield ",".join(row["subnets"])
    yield row["last_error"] and row["last_error"]["errno"]
    yield from _rounded(now, row)


def _rounded(now: Sample, row: Row) -> list[int | None]:
    """Return the bytes per second to and from the peer."""
    return [None if rate is None else round(rate) for rate in now.rates.get(row["name"], UNKNOWN)]


def _host(ctx: click.Context, now: Sample) -> Iterator[str]:
    """Yield the blocks of the host: the node, then the forwarder."""
    stopped = now.node is None and node_stopped(ctx)
    if stopped:
        yield f"node: {stopped}"
    if now.node is not None:
        yield node_block(now.node)
    if now.found is not None:
        yield device_block(now.found)


def _fitting(block: str) -> str:
    """Wrap the lines that are wider than the terminal, and indent their continuations."""
    room = terminal_width()
    if room is None:
        return block
    return "\n".join(
        line if len(line) <= room else wrap(line, room, " " * (_indent(line) + INDENT))
        for line in block.splitlines())


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def _details(now: Sample) -> Iterator[str]:
    if not now.rows:
        return  # the peer is in another state than --state
    (row,) = now.rows
    for pair in [] if now.node is None else now.node["peers"]:
        if pair["key"] == row["name"]:
            yield node_peer_block(pair)
    for peer in [] if now.found is None else now.found["peers"]:
        if peer["endpoint"] in row["endpoints"]:
            yield peer_block(peer)
    if row["state"] in ("no path", "refused"):
        yield f"node peer: {row['name']}\n  state: {row['state']}: {row['reason']}"


def _echo_peers(now: Sample) -> None:
    hidden = len(now.all) - len(now.rows)
    if now.rows:
        cells = [dict(zip(COLUMNS, _cells(row, now.rates), strict=True)) for row in now.rows]
        shown = [name for name in COLUMNS
                 if any(row[name] is not None for row in cells) or name in COLUMNS[:2]]
        echo_fitting(shown, [[row[name] for name in shown] for row in cells], OMITTED,
                     terminal_width(), cut_last=shown[-1] == COLUMNS[-1])
    else:
        click.echo("no peers" if not hidden else "no peer in this state")
    if hidden:
        click.echo(f"{hidden} more {'peer' if hidden == 1 else 'peers'} in other states")


def _cells(row: Row, rates: Mapping[str, Pair]) -> list[Any]:
    out, into = rates.get(row["name"], UNKNOWN)
    error, sent, received = row["last_error"], row["sent"], row["received"]
    return [
        row["name"], row["state"], row["since"] and age(row["since"]), row["path"],
        None if row["rtt_us"] is None else f"{row['rtt_us'] / 1000:.2f} ms",
        None if row["loss"] is None else f"{row['loss']:.0%}",
        *(None if rate is None else f"{size(round(rate))}/s" for rate in (out, into)),
        *(side and size(side["bytes"]) for side in (sent, received)),
        row["largest_size"], _seen(row["last_seen_seconds"]), ", ".join(row["subnets"]) or None,
        error and f"{error['errno']} {_seen(error['seconds_ago'])} ago",
        why(row) or None,
    ]


def _seen(seconds: float | None) -> str | None:
    return None if seconds is None else span(seconds)


def _problems(now: Sample) -> Iterator[str]:
    """Yield a line for each thing that is wrong."""
    if now.node is not None:
        yield from problems(now.node)
    for row in now.rows:
        if row["state"] not in GOOD:
            yield f"{row['name']} is {row['state']}" + (
                f": {row['reason']}" if row["reason"] else "")


def _cell(value: object) -> str:
    """Format one value for ``dump``: no tabs, no line ends."""
    return "-" if value in (None, "") else " ".join(str(value).split())


def _yaml(value: Any, indent: str = "") -> Iterator[str]:
    """Yield the lines of a value of JSON as YAML. Strings are quoted as in JSON, which is YAML."""
    items = [(f"{json.dumps(key)}:", one) for key, one in value.items()] \
        if isinstance(value, dict) else [("-", one) for one in value]
    for head, one in items:
        if isinstance(one, dict | list) and one:
            yield f"{indent}{head}"
            yield from _yaml(one, f"{indent}  ")
        else:
            yield f"{indent}{head} {json.dumps(one)}"
