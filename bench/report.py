"""The report of a run: Markdown for a file, and a plain table for the terminal.

Owns: the text and the layout. Pure: the input is a summary, the output is text. Every figure is a
median with its 95 % bootstrap interval. Every comparison is a ratio within blocks.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence

from . import blocks, proof, stats
from .goals import Verdict, verdicts
from .profiles import PROFILES
from .stats import Estimate
from .summary import Figures, Run
from .units import UNITS, number, spread

REFERENCES = ("vxlan", "onepacket", "copylimit")

# For each metric: the measured quantity, and the meaning of the variants.
_METRICS = {
    "tcp": "iperf3 between hosts a and b. *N there*: N streams from a to b; *N back*: from b to a; "
    "*N both*: N streams in each direction at the same time. *busy*: with an endless loop on each "
    "CPU core.",
    "rtt": "64-byte requests from a, answered by b. *udp* or *tcp*: the protocol of two programs; "
    "*ping*: ICMP, which the kernel of b answers. *idle*: each request is sent when the previous "
    "reply has arrived. *bulk*: 2000 requests per second while one TCP stream runs from a to b. "
    "The TCP throughput is the one of this stream. Pings are sent every 2 ms.",
    "pps": "UDP datagrams from a to b, each sent as its own packet. *N bytes*: UDP payload.",
    "gap": "20,000 datagrams per second from a to b while all routes of host a's forwarder are "
    "replaced. *N routes*: number of routes replaced.",
    "isolation": "1000 datagrams per second from a to b while a also sends much more to other "
    "peers. *N dead*: N peers whose link address does not exist. *N Mbit/s*: one peer behind a "
    "traffic class of this rate. *quiet*: before a sends to the other peers.",
    "memory": "Resident memory of a forwarder while it forwards one TCP stream. *N routes*: the "
    "size of its table.",
    "start": "Time from the start of the `udptun forward` process to the arrival of the first "
    "packet.",
    "lookup": "Route look-up in the core, without forwarding. *v4, v6*: address family; *random*: "
    "random addresses; *hit*: only addresses with a route; *N*: number of routes.",
    "kill": "Packets that are lost after the forwarder of host a is killed. 10,000 datagrams per "
    "second from a to b; no other forwarder starts.",
    "scale": "64-byte UDP datagrams from a to b, consecutive ones to different addresses. *N "
    "routes*: N routes with one next hop. *N peers*: N routes with N next hops.",
}

_METHOD = f"""\
Each contender has its own two hosts, a and b: network namespaces on this machine, joined by a veth
pair of MTU 1500. All contenders are set up at the same time; all except the measured one are idle.
The inner MTU is the largest that fits. A slot is one measurement of one contender. Slots are
interleaved in blocks, usually with two slots per contender and the second half in reverse order:
direct, vxlan, udptun, udptun, vxlan, direct. Ratios are computed within a block. Each figure is the
median over the blocks with its 95 % bootstrap interval. Contenders that no goal needs are in fewer
blocks, which their row says. "Noise" is the median difference between
two slots of one contender in a block; a smaller difference between contenders is not significant.
A block is rejected if the hypervisor took more than {blocks.MAX_STOLEN:.0%} of the CPU time, or if
the two slots of its first contender differ by more than {blocks.MAX_DRIFT:.0%}; a rejected block
stays in the record. CPU time is that of the whole system (/proc/stat), including iperf3. If the
machine is less than 95 % busy, wake-up latency limits the rate more than CPU time. Load generators:
iperf3 for TCP, bench/udpload.c for round trips, packet rates and gaps, ping(8) for pings."""


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Return the lines of a Markdown table."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return lines + ["| " + " | ".join(row) + " |" for row in rows]


def markdown(run: Run, plots: Sequence[str] = ()) -> str:
    """Return the report."""
    day = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(run.began))
    parts = f" in {run.parts} parts" if run.parts > 1 else ""
    lines = [
        "# Benchmarks of udptun", "",
        f"`{run.command}`, {day}, {run.seconds / 60:.0f} minutes{parts}, "
        f"{run.ended}.", "",
    ]
    lines += ["## Profiles", "", *_profiles(run), ""]
    lines += goals_table(verdicts(run))
    for metric in dict.fromkeys(key[0] for key, _ in run.figures):
        lines += _metric(run, metric)
    if plots:
        pictures = [f"![{name.removesuffix('.png')}]({name})" for name in plots]
        lines += ["## Plots", "", *pictures, ""]
    lines += ["## Machine", "", *table(("", ""), run.machine.items()), ""]
    lines += ["## Contenders", "", *_contenders(run), ""]
    lines += ["## Method", "", _METHOD, "", "### Proof", "", *_proof(), ""]
    lines += _left_out(run)
    return "\n".join(lines)


def _profiles(run: Run) -> list[str]:
    intro = (
        "A profile defines what the wire, a veth pair between the hosts, does with super-packets: "
        "TCP or UDP data of up to 64 KB that the kernel handles as one packet."
    )
    rows = [
        (name, PROFILES[name].text, text) for name, text in run.offloads.items() if name in PROFILES
    ]
    if not rows:
        return ["No metric of this run used a veth pair between two hosts."]
    return [intro, "", *table(("profile", "meaning", "offloads of the veth (ethtool)"), rows)]


def goals_table(found: Sequence[Verdict]) -> list[str]:
    """Return the lines of the goals section; no lines if the run measured no goal."""
    if all(verdict.measured is None for verdict in found):
        return []
    texts = {True: "yes", False: "**no**", None: "not measured"}
    rows = []
    for verdict in found:
        goal = verdict.goal
        sign = ">=" if goal.at_least else "<="
        rows.append((
            goal.row, goal.subject, goal.compared, _with_unit(verdict.measured, goal.unit),
            f"{sign} {number(goal.required)}", f"{sign} {number(goal.target)}",
            texts[verdict.meets_required], texts[verdict.meets_target],
        ))
    header = ("figure", "contender", "ratio to", "measured (95 % interval)", "required", "target",
              "required value met", "target met")
    return ["## Goals", "", _count(found), "", *table(header, rows), ""]


def _count(found: Sequence[Verdict]) -> str:
    """Return how many goals are met, missed and not measured."""
    parts = []
    for what, answers in (
        ("required values", [one.meets_required for one in found]),
        ("targets", [one.meets_target for one in found]),
    ):
        yes, no, unknown = (answers.count(answer) for answer in (True, False, None))
        parts.append(
            f"Of {len(found)} {what}, {yes} are met, {no} are missed, {unknown} are not measured.")
    return " ".join(parts)


def _with_unit(estimate: Estimate | None, unit: str) -> str:
    if estimate is None:
        return "-"
    return f"{spread(estimate)}{'' if unit == 'x' else ' ' + unit}, n={estimate.n}"


def _metric(run: Run, metric: str) -> list[str]:
    lines = [f"## {metric}", "", *([_METRICS[metric], ""] if metric in _METRICS else [])]
    for value in dict.fromkeys(v for key, v in run.figures if key[0] == metric):
        unit = UNITS[value]
        better = "more" if unit.more_is_better else "less"
        lines += [f"### {unit.title}, {unit.unit} ({better} is better)", ""]
        for figures in run.of(metric, value):
            lines += _figures(run, figures)
    return lines


def _figures(run: Run, figures: Figures) -> list[str]:
    _, profile, variant = figures.key
    unit, names = UNITS[figures.value], figures.names()
    references = [name for name in REFERENCES if name in names]
    busy, in_kernel = run.busy.get(figures.key, {}), run.in_kernel.get(figures.key, {})
    rows = []
    for name in names:
        rows.append((
            name, spread(figures.level(name), unit.factor),
            *("1" if name == other else spread(figures.ratio(name, other)) for other in references),
            _percent(busy.get(name)), *([_percent(in_kernel.get(name))] if in_kernel else []),
        ))
    noise = figures.noise()
    if profile in PROFILES:
        profile = f"{profile} ({PROFILES[profile].title})"
    title = ", ".join(part for part in (profile.strip("-"), variant) if part)
    blocks_of = {name: len(stats.levels(figures.blocks, name)) for name in names}
    most = max(blocks_of.values())
    caption = f"{most} blocks"
    if fewer := [f"{n} of {name}" for name, n in blocks_of.items() if n < most]:
        caption += f" ({', '.join(fewer)})"
    if noise:
        caption += f", noise {noise.median:.1%}"
    header = ("contender", unit.unit, *(f"vs {name}" for name in references), "machine busy",
              *(["sent by the express path"] if in_kernel else []))
    return [f"**{title}**: {caption}", "", *table(header, rows), ""]


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.0%}"


def _contenders(run: Run) -> list[str]:
    rows = []
    for name, line in run.contenders.items():
        details = "; ".join(
            f"{key.replace('_', ' ')}: {_detail(line[key])}"
            for key in ("title", "in_use", "off", "workers") if line.get(key)
        )
        rows.append((name, str(line["inner_mtu"]), f"`{line['carries']}`", details))
    return table(("contender", "inner MTU", "packets on the wire (nft)", "details"), rows)


def _detail(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} ({reason})" for key, reason in value.items())
    return ", ".join(value) if isinstance(value, list) else str(value)


def _proof() -> list[str]:
    """Return the rules of the proof, from the docstring of ``bench.proof``."""
    begin = "What is proved "
    return [begin + (proof.__doc__ or "").partition(begin)[2].strip()]


def _left_out(run: Run) -> list[str]:
    lines = ["## Left out", ""]
    for (metric, profile, variant), block, reason in run.rejected:
        lines.append(f"- {metric} {profile} {variant}, block {block} rejected: {reason}")
    for (metric, profile, variant), block, name, reason in run.refused:
        first = reason.splitlines()[0] if reason else ""
        lines.append(f"- {metric} {profile} {variant}, block {block}, {name} refused: {first}")
    lines += [f"- {note}" for note in run.notes]
    if len(lines) == 2:
        lines.append("Nothing: no block was rejected, and no figure was refused.")
    return [*lines, ""]


def terminal(run: Run) -> str:
    """Return the figures for a terminal: one line per contender and series, no Markdown."""
    if not run.figures:
        return "no block was accepted: there is nothing to compare"
    rows: list[tuple[str, ...]] = []
    names = {name for figures in run.figures.values() for name in figures.names()}
    references = [name for name in REFERENCES[:2] if name in names]
    for (key, value), figures in run.figures.items():
        unit = UNITS[value]
        title = " ".join(part for part in key if part not in ("", "-"))
        for name in figures.names():
            rows.append((
                title, unit.title, name, f"{spread(figures.level(name), unit.factor)} {unit.unit}",
                *("1" if name == other else spread(figures.ratio(name, other))
                  for other in references),
            ))
    header = ("", "", "contender", "median (95 %)", *(f"vs {name}" for name in references))
    lines = _columns(header, rows, merged=2)
    used = dict.fromkeys(key[1] for key, _ in run.figures if key[1] in PROFILES)
    lines += ["", *(f"{name}: {PROFILES[name].text}" for name in used)] if used else []
    shown = [v for v in verdicts(run) if v.measured]
    if shown:
        texts = {True: "met", False: "MISSED", None: "-"}
        lines += ["", *_columns(("goal", "contender", "ratio to", "measured", "required", ""), [
            (v.goal.row, v.goal.subject, v.goal.compared, _with_unit(v.measured, v.goal.unit),
             number(v.goal.required), texts[v.meets_required]) for v in shown
        ], merged=1)]
    if run.rejected or run.refused:
        lines += ["", f"left out: {len(run.rejected)} blocks rejected, "
                      f"{len(run.refused)} figures refused; the report gives the reasons"]
    return "\n".join(lines)


def _columns(
    header: Sequence[str], rows: Sequence[Sequence[str]], merged: int
) -> list[str]:
    """Align the columns. In the first ``merged`` columns, blank a cell equal to the cell above."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines, before = [], list(header)
    for row in [header, *rows]:
        cells = list(row)
        for i in range(merged):
            if list(row[: i + 1]) == before[: i + 1] and row is not header:
                cells[i] = ""
        lines.append("  ".join(f"{w:<{n}}" for w, n in zip(cells, widths, strict=True)).rstrip())
        before = list(row)
    return lines
