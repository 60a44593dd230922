"""``udptun drops --last`` and ``-w``: which packets were dropped, and who sent them.

Owns the table of dropped packets. The forwarder keeps only the last packets of each reason, so with
``-w`` packets are missing if many are dropped within POLL_SECONDS. Threading: main thread.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Mapping
from typing import Any

import click

from ..flows import flow_text
from ..text import printable
from .answers import ask_node
from .mesh import find, host_of, mesh
from .options import client, echo_fitting, echo_json, node_client, terminal_width, wrap

POLL_SECONDS = 0.5
HEADERS = ("TIME", "REASON", "DIRECTION", "PACKETS", "BYTES", "PEER OR SENDER", "PACKET")
OMITTED = ("PACKETS", "BYTES", "DIRECTION")  # in a narrow terminal, the first one first
# Widths of the columns with -w, where the later rows are not known yet.
WIDTHS = (12, 19, 9, 7, 5, 21)
WIDE = 130  # columns of a terminal in which such a row fits

Packet = dict[str, Any]


def show_last(ctx: click.Context, output: str, no_headers: bool) -> None:
    found = client(ctx).drops()
    if output == "json":
        echo_json({"drops": found})
        return
    names = names_of(ctx)
    rows = [_row(packet, names) for packet in _packets(found)]
    echo_fitting(HEADERS, rows, OMITTED, terminal_width(), no_headers)


def watch_drops(ctx: click.Context, output: str, no_headers: bool) -> None:
    connected, names = client(ctx), names_of(ctx)
    try:
        seen = _ids(_packets(connected.drops()))
        if output != "json" and not no_headers:
            click.echo(_line(HEADERS, terminal_width()))
        while True:
            time.sleep(POLL_SECONDS)
            packets = _packets(connected.drops())
            for packet in packets:
                if _id(packet) in seen:
                    continue
                click.echo(json.dumps(packet) if output == "json" else
                           _line(_row(packet, names), terminal_width()))
            seen = _ids(packets)
    except KeyboardInterrupt:
        sys.exit(130)  # Ctrl-C is the normal end; shells use this exit code for it


def _packets(drops: Iterable[Mapping[str, Any]]) -> list[Packet]:
    """Return the dropped packets of all reasons, the oldest first."""
    found = [{"reason": drop["reason"], "direction": drop["direction"], **packet}
             for drop in drops for packet in drop.get("last", ())]
    return sorted(found, key=lambda packet: str(packet["time"]))


def _ids(packets: Iterable[Packet]) -> set[tuple[str, ...]]:
    return set(map(_id, packets))


def _id(packet: Packet) -> tuple[str, ...]:
    return packet["reason"], packet["direction"], packet["id"], packet["time"]


def names_of(ctx: click.Context) -> list[Packet]:
    """Return the peers that have a name; none if no node daemon answers."""
    return mesh(ask_node(node_client(ctx)), [])


def _row(packet: Packet, names: list[Packet]) -> list[object]:
    return [
        packet["time"][11:23], packet["reason"], packet["direction"], packet["packets"],
        packet["length"], named(packet["endpoint"], names), flow_text(packet)]


def named(endpoint: str | None, names: list[Packet]) -> str | None:
    """Return the endpoint, with the name of its node if it has one."""
    if endpoint is None:
        return None
    row = find(names, endpoint) or find(names, host_of(endpoint))
    return f"{endpoint} ({printable(row['name'])})" if row is not None else endpoint


def _line(cells: Iterable[object], room: int | None) -> str:
    """Return a line with aligned columns. In a terminal of less than WIDE columns, OMITTED are left
    out, the columns are not aligned, and a line that is too long is continued on the next one."""
    texts = ["-" if cell is None else str(cell) for cell in cells]
    if room is None or room >= WIDE:
        *head, last = texts
        return "  ".join([*(cell.ljust(n) for cell, n in zip(head, WIDTHS, strict=True)), last])
    kept = (text for text, name in zip(texts, HEADERS, strict=True) if name not in OMITTED)
    return wrap(" ".join(kept), room, " " * (WIDTHS[0] + 1))
