"""A run in words: Markdown for a file, and a plain table for the terminal.

Owns: the wording and the layout. Pure: from a summary to text. Every figure is a median with its
95 % bootstrap interval; every comparison is a ratio within blocks.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence

from . import blocks, proof
from .floors import Verdict, verdicts
from .stats import Estimate
from .summary import Figures, Run
from .units import UNITS, number, spread

REFERENCES = ("vxlan", "onepacket", "copylimit")

_PROFILES = {
    "P1": "super-packets (GSO) pass the wire whole",
    "P2": "the sender's kernel cuts them in software, the receiver's GRO joins them again",
    "P3": "cut in software, no GRO at the receiver",
}

_METHOD = f"""\
Each contender has two hosts of its own (network namespaces, joined by a veth of MTU 1500) on this
one machine, all of them set up at once and idle but for the one that is measured; its inner MTU is
the largest that fits. Slots are interleaved in blocks (D V U O O U V D), a ratio is taken within a
block, and what is printed is the median over the blocks with a 95 % bootstrap interval. "Noise" is
the median distance of two slots of the same contender within a block: differences below it say
nothing. A block is rejected when more than {blocks.STOLEN_MOST:.0%} of the CPU time was stolen by
the host of this machine, or when its first contender was more than {blocks.ANCHOR_DRIFT_MOST:.0%}
from itself; it stays in the record. CPU time is the whole system's (/proc/stat), iperf3's own
included. Where the machine is less than 95 % busy, wake-ups are measured rather than work.
Generators: iperf3 for TCP, bench/udpload.c for round trips, packet rates and gaps."""


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return lines + ["| " + " | ".join(row) + " |" for row in rows]


def markdown(run: Run, plots: Sequence[str] = ()) -> str:
    """The report."""
    day = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(run.began))
    lines = [
        "# Benchmarks of udptun", "",
        f"`{run.command}`, {day}, {run.seconds / 60:.0f} minutes, {run.ended}.", "",
    ]
    lines += floors_table(verdicts(run))
    for metric in dict.fromkeys(key[0] for key, _ in run.figures):
        lines += _metric(run, metric)
    if plots:
        pictures = [f"![{name.removesuffix('.png')}]({name})" for name in plots]
        lines += ["## Plots", "", *pictures, ""]
    lines += ["## Machine", "", *table(("", ""), run.machine.items()), ""]
    lines += ["## Contenders", "", *_contenders(run), ""]
    lines += ["## Profiles", "", *table(
        ("profile", "", "offloads of the veths"),
        [(p, _PROFILES[p], text) for p, text in run.offloads.items()],
    ), ""]
    lines += ["## Method", "", _METHOD, "", "Proof:", "", *_proof(), ""]
    lines += _left_out(run)
    return "\n".join(lines)


def floors_table(found: Sequence[Verdict], heading: str = "## Floors and aims") -> list[str]:
    """Nothing when no row was measured."""
    if all(verdict.measured is None for verdict in found):
        return []
    words = {True: "yes", False: "**no**", None: "not measured"}
    rows = []
    for verdict in found:
        floor = verdict.floor
        sign = ">=" if floor.at_least else "<="
        rows.append((
            floor.row, _with_unit(verdict.measured, floor.unit),
            f"{sign} {number(floor.floor)}", f"{sign} {number(floor.aim)}",
            words[verdict.holds], words[verdict.reached],
        ))
    header = ("udptun", "measured (95 % interval)", "floor", "aim", "floor holds", "aim reached")
    return [heading, "", *table(header, rows), ""]


def _with_unit(estimate: Estimate | None, unit: str) -> str:
    if estimate is None:
        return "-"
    return f"{spread(estimate)}{'' if unit == 'x' else ' ' + unit}, n={estimate.n}"


def _metric(run: Run, metric: str) -> list[str]:
    lines = [f"## {metric}", ""]
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
    rows = []
    for name in names:
        busy = run.busy.get(figures.key, {}).get(name)
        rows.append((
            name, spread(figures.level(name), unit.factor),
            *("1" if name == other else spread(figures.ratio(name, other)) for other in references),
            "-" if busy is None else f"{busy:.0%}",
        ))
    noise = figures.noise()
    title = ", ".join(word for word in (profile.strip("-"), variant) if word)
    caption = f"{len(figures.blocks)} blocks"
    if noise:
        caption += f", noise {noise.median:.1%}"
    header = ("contender", unit.unit, *(f"vs {name}" for name in references), "machine busy")
    return [f"**{title}**: {caption}", "", *table(header, rows), ""]


def _contenders(run: Run) -> list[str]:
    rows = []
    for name, line in run.contenders.items():
        said = {k: v for k, v in line.items() if k in ("title", "in_use", "off", "workers") and v}
        details = "; ".join(
            f"{key.replace('_', ' ')}: {', '.join(value) if isinstance(value, list) else value}"
            for key, value in said.items()
        )
        rows.append((name, str(line["inner_mtu"]), f"`{line['carries']}`", details))
    return table(("contender", "inner MTU", "on the wire", ""), rows)


def _proof() -> list[str]:
    """The claims, where they are implemented."""
    text = (proof.__doc__ or "").partition("What is claimed, ")[2]
    return ["What is claimed, " + text.strip()]


def _left_out(run: Run) -> list[str]:
    lines = ["## Left out", ""]
    for (metric, profile, variant), block, reason in run.rejected:
        lines.append(f"- {metric} {profile} {variant}, block {block} rejected: {reason}")
    for (metric, profile, variant), block, name, reason in run.refused:
        first = reason.splitlines()[0] if reason else ""
        lines.append(f"- {metric} {profile} {variant}, block {block}, {name} refused: {first}")
    lines += [f"- {note}" for note in run.notes]
    if len(lines) == 2:
        lines.append("Nothing: no block was rejected, no figure refused.")
    return [*lines, ""]


def terminal(run: Run) -> str:
    """The same for a person at a terminal: one line a contender and series, without Markdown."""
    if not run.figures:
        return "no block was finished: nothing to compare"
    rows: list[tuple[str, ...]] = []
    names = {name for figures in run.figures.values() for name in figures.names()}
    references = [name for name in REFERENCES[:2] if name in names]
    for (key, value), figures in run.figures.items():
        unit = UNITS[value]
        title = " ".join(word for word in key if word not in ("", "-"))
        for name in figures.names():
            rows.append((
                title, unit.title, name, f"{spread(figures.level(name), unit.factor)} {unit.unit}",
                *("1" if name == other else spread(figures.ratio(name, other))
                  for other in references),
            ))
    header = ("", "", "contender", "median (95 %)", *(f"vs {name}" for name in references))
    lines = _columns(header, rows, merged=2)
    shown = [v for v in verdicts(run) if v.measured]
    if shown:
        words = {True: "holds", False: "MISSED", None: "-"}
        lines += ["", *_columns(("floor", "measured", "limit", ""), [
            (v.floor.row, _with_unit(v.measured, v.floor.unit), number(v.floor.floor),
             words[v.holds]) for v in shown
        ], merged=0)]
    if run.rejected or run.refused:
        lines += ["", f"left out: {len(run.rejected)} blocks rejected, "
                      f"{len(run.refused)} figures refused; the report has the reasons"]
    return "\n".join(lines)


def _columns(
    header: Sequence[str], rows: Sequence[Sequence[str]], merged: int
) -> list[str]:
    """Aligned; of the first ``merged`` columns, what repeats from the line above is left blank."""
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
