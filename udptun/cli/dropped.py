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

from .answers import ask_node
from .mesh import find, host_of, mesh
from .options import client, echo_fitting, echo_json, node_client, terminal_width

POLL_SECONDS = 0.5
HEADERS = ("TIME", "REASON", "DIRECTION", "PACKETS", "BYTES", "PEER OR SENDER", "PACKET")
OMITTED = ("PACKETS", "BYTES", "DIRECTION")  # in a narrow terminal, the first one first
# Widths of the columns with -w, where the later rows are not known yet.
WIDTHS = (12, 19, 9, 7, 5, 21)

Packet = dict[str, Any]


def show_last(ctx: click.Context, output: str, no_headers: bool) -> None:
    found = client(ctx).drops()
    if output == "json":
        echo_json({"drops": found})
        return
    names = _names(ctx)
    rows = [_row(packet, names) for packet in _packets(found)]
    echo_fitting(HEADERS, rows, OMITTED, terminal_width(), no_headers)


def watch_drops(ctx: click.Context, output: str, no_headers: bool) -> None:
    connected, names = client(ctx), _names(ctx)
    if output != "json" and not no_headers:
        click.echo(_line(HEADERS))
    try:
        seen = _ids(_packets(connected.drops()))
        while True:
            time.sleep(POLL_SECONDS)
            packets = _packets(connected.drops())
            for packet in packets:
                if _id(packet) in seen:
                    continue
                click.echo(json.dumps(packet) if output == "json" else _line(_row(packet, names)))
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


def _names(ctx: click.Context) -> list[Packet]:
    """Return the peers that have a name; none if no node daemon answers."""
    return mesh(ask_node(node_client(ctx)), [])


def _row(packet: Packet, names: list[Packet]) -> list[object]:
    return [
        packet["time"][11:23], packet["reason"], packet["direction"], packet["packets"],
        packet["length"], _sender(packet, names), _inner(packet)]


def _sender(packet: Packet, names: list[Packet]) -> str | None:
    """Return the endpoint, with the name of its node if it has one."""
    if packet["endpoint"] is None:
        return None
    row = find(names, packet["endpoint"]) or find(names, host_of(packet["endpoint"]))
    return f"{packet['endpoint']} ({row['name']})" if row is not None else packet["endpoint"]


def _inner(packet: Packet) -> str:
    if packet["src"] is None:
        return "no IP packet"
    src, dst = (
        str(packet[side]) if packet[f"{side}_port"] is None else
        f"[{packet[side]}]:{packet[f'{side}_port']}" if ":" in packet[side] else
        f"{packet[side]}:{packet[f'{side}_port']}" for side in ("src", "dst"))
    return f"{packet['protocol']} {src} > {dst}"


def _line(cells: Iterable[object]) -> str:
    *head, last = ("-" if cell is None else str(cell) for cell in cells)
    return "  ".join([*(cell.ljust(n) for cell, n in zip(head, WIDTHS, strict=True)), last])
