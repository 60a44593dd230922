"""``udptun peers`` and ``drops``, and the blocks of ``udptun status`` about the
forwarder."""

from __future__ import annotations

from typing import Any

import click

from ..spans import duration, size
from ..text import counted
from . import express
from .answers import ask_node
from .options import (
    client,
    connection,
    echo_fitting,
    echo_json,
    echo_table,
    no_headers,
    node_client,
    output,
    terminal_width,
)

OMITTED = ("LAST ANSWER", "SINCE")  # of ``udptun peers`` in a narrow terminal, the first one first


@click.command()
@output
@no_headers
@connection
@click.pass_context
def peers(ctx: click.Context, output: str, no_headers: bool) -> None:
    """Show for each peer whether it answers probes, and how fast.

    A peer is probed if one of its routes has the word `probe`. LARGEST is the largest packet, in
    bytes, that was answered. LOSS is the share of unanswered probes among the last 32. For peers
    that the forwarder does not probe, the values are those of the node daemon, if one runs.
    """
    found = client(ctx).peers()
    if output == "json":
        echo_json({"peers": found})
        return
    headers = ["ENDPOINT", "STATE", "SINCE", "RTT", "LOSS", "LAST ANSWER", "LARGEST", "REASON"]
    echoes = _echoes(ctx, found)
    echo_fitting(headers, [_peer_row(peer, echoes) for peer in found], OMITTED, terminal_width(),
                 no_headers, cut_last=True)


@click.command()
@output
@no_headers
@click.option("--all", "show_all", is_flag=True, help="Also show reasons with a count of 0.")
@click.option("--explain", is_flag=True, help="Explain all reasons; needs no forwarder.")
@click.option("--last", is_flag=True, help="Show the last dropped packets of each reason.")
@click.option("-w", "--watch", is_flag=True,
              help="Show the packets that are dropped from now on, until Ctrl-C.")
@connection
@click.pass_context
def drops(
    ctx: click.Context, output: str, no_headers: bool, show_all: bool, explain: bool, last: bool,
    watch: bool,
) -> None:
    """Show how many packets were dropped, and why.

    encap is the direction from the TUN to UDP, decap from UDP to the TUN. The JSON output has all
    reasons. With -w, it has one object per line and dropped packet.
    """
    if watch or last:
        from .dropped import show_last, watch_drops

        show = watch_drops if watch else show_last
        show(ctx, output, no_headers)
        return
    if explain:
        from .reasons import COLUMNS, rows

        if output == "json":
            echo_json({"reasons": [dict(zip(COLUMNS, row, strict=True)) for row in rows()]})
        else:
            echo_table([c.upper() for c in COLUMNS], rows(), no_headers)
        return
    found = client(ctx).drops()
    if output == "json":
        echo_json({"drops": found})
        return
    shown = [
        (drop["reason"], drop["direction"], drop["packets"])
        for drop in found
        if show_all or drop["packets"]
    ]
    echo_table(["REASON", "DIRECTION", "PACKETS"], shown, no_headers)
    for drop in found:
        for source in drop.get("sources", ()):
            click.echo(_refused_sender(drop["reason"], source))


def _refused_sender(reason: str, source: dict[str, Any]) -> str:
    return (
        f"{reason}: {counted(source['packets'], 'packet')} from {source['address']} "
        f"port {source['port']}, "
        f"the last one {duration(source['last_seen_seconds'])} ago"
    )


def device_block(found: dict[str, Any]) -> str:
    device, capabilities = found["device"], found["capabilities"]
    off = [f"{name} ({cause})" for name, cause in capabilities["off"].items()]
    lines = [
        ("version", f"{found['version']}, process {found['pid']}, "
                    f"up for {duration(found['uptime_seconds'])}"),
        ("addresses", _listed(device["addresses"])),
        ("networks", _listed(device["networks"])),
        ("listening", _listed(device["listen"])),
        ("mtu", device["mtu"]),
        ("routes", f"{found['route_count']} (generation {found['generation']})"),
        ("source check", found["source_check"]),
        ("workers", len(found["workers"])),
        ("offloads", _listed(capabilities["in_use"])),
    ]
    if off:
        lines.append(("off", _listed(off)))
    for direction in ("encap", "decap"):
        lines.append((f"packets {direction}", _packets(found["packets"][direction])))
    lines += express.lines(found)
    return _block("device", device["name"], lines)


def peer_block(peer: dict[str, Any]) -> str:
    encap, decap, probe = peer["encap"], peer["decap"], peer.get("probe")
    seen = peer["last_seen_seconds"]
    lines: list[tuple[str, object]] = [
        ("subnets", _listed(peer["subnets"])),
        ("last seen", "never" if seen is None else f"{duration(seen)} ago"),
        ("transfer", f"{size(decap['bytes'])} received, {size(encap['bytes'])} sent"),
        ("packets", f"{decap['packets']} received, {encap['packets']} sent"),
        ("path mtu", _path_mtu(peer)),
        (express.LABEL, express.of_peer(peer)),
        *_last_error(peer),
    ]
    if probe is not None:
        state, since, rtt, loss, answer, largest, reason = _probe_cells(probe)
        lines.append(("state", f"{state} since {since}" + (f": {reason}" if reason else "")))
        lines.append(("probes", f"round trip {rtt or 'unknown'}, loss {loss or 'unknown'}, "
                                f"last answer {answer or 'never'}, "
                                f"largest packet {largest or 'unknown'}"))
    return _block("peer", peer["endpoint"], lines)


def _path_mtu(peer: dict[str, Any]) -> str:
    source, seconds = peer["path_mtu_source"], peer["path_mtu_seconds"]
    if source == "probe":
        return f"{peer['path_mtu']} (measured)"
    if seconds is None:
        return f"{peer['path_mtu']} (of the interface, not measured)"
    who = "an ICMP error" if source == "icmp" else "the kernel"
    return f"{peer['path_mtu']} (reported by {who}, used for {seconds:.0f} s more)"


def _echoes(ctx: click.Context, peers: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return what the node daemon has measured by echo requests, by subnet, if it is needed."""
    if all(peer.get("probe") is not None for peer in peers):
        return {}
    node = ask_node(node_client(ctx))
    return {} if node is None else {
        peer["subnet"]: path for peer in node["peers"]
        if (path := peer["paths"].get("udp")) is not None and "endpoint" not in path}


def _peer_row(peer: dict[str, Any], echoes: dict[str, dict[str, Any]]) -> list[object]:
    probe, reason = peer.get("probe"), None
    if probe is None:
        probe = next((echoes[net] for net in peer["subnets"] if net in echoes), None)
        reason = "measured with echo requests"
    if probe is None:
        return [peer["endpoint"], "not probed", *[None] * 6]
    *cells, why = _probe_cells(probe)
    return [peer["endpoint"], *cells, "; ".join(filter(None, (why, reason))) or None]


def _probe_cells(probe: dict[str, Any]) -> list[Any]:
    """Return state, since, round trip, loss, last answer, largest packet and reason."""
    rtt, loss, largest = probe["rtt_us"], probe["loss"], probe["largest_size"]
    if largest is not None and probe["full_size_passes"] is False:
        largest = f"{largest} (limited)"
    return [
        probe["state"], _clock(probe["since"]), None if rtt is None else f"{rtt / 1000:.2f} ms",
        None if loss is None else f"{loss:.0%}", _clock(probe["last_answer"]), largest,
        probe["reason"] or None,
    ]


def _clock(iso: str | None) -> str | None:
    """Shorten a time to seconds."""
    return None if iso is None else f"{iso[:19]}Z"


def _last_error(peer: dict[str, Any]) -> list[tuple[str, object]]:
    error = peer["last_error"]
    if error is None:
        return []
    return [("last error", f"{error['text']}, {duration(error['seconds_ago'])} ago")]


def _block(kind: str, name: str, lines: list[tuple[str, object]]) -> str:
    return "\n".join([f"{kind}: {name}", *(f"  {label}: {value}" for label, value in lines)])


def _listed(values: list[str]) -> str:
    return ", ".join(values) or "(none)"


def _packets(side: dict[str, int]) -> str:
    """The order is that of read + generated = delivered + consumed + dropped + queued."""
    names = ("read", "generated", "delivered", "consumed", "dropped", "queued")
    return ", ".join(f"{side[name]} {name}" for name in names if side[name]) or "none"


