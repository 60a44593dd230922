"""PNG plots of a run, if matplotlib is installed (the `bench` extra).

Owns: the layout of the plots. Main thread only.
There is one plot per metric and value. If this plot has too many groups of bars, there is one plot
per variant instead. A bar is a median, and its whiskers are the 95 % interval. The axis names the
profile of each group and describes the profile.

Round trips also have one plot of their distributions, with one part per series: which share of the
requests (horizontal) was answered within which time (vertical).
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median

from .profiles import PROFILES
from .summary import Figures, Key, Quantiles, Run
from .units import UNITS

_PLOTTED = (
    "bits_per_second", "cpu_seconds_per_gb", "p50_ns", "p99_ns", "pps_at_half_percent",
    "pps_delivered",
)
_MAX_GROUPS = 8  # groups of bars in one plot
_COLOURS = {
    "direct": "#9aa0a6", "vxlan": "#5f6368", "udptun": "#1a73e8", "udptun --offload off": "#8ab4f8",
    "udptun --accelerate auto": "#f9ab00", "onepacket": "#d93025", "copylimit": "#188038",
}
_COLUMNS = 3  # parts of the plot of distributions, side by side
_TICKS = (0.5, 0.9, 0.99, 0.999)


def available() -> bool:
    return importlib.util.find_spec("matplotlib") is not None


def draw(run: Run, folder: Path) -> list[str]:
    """Draw the plots into ``folder``; return the file names of the plots."""
    if not available():
        return []
    made = []
    for metric in dict.fromkeys(key[0] for key, _ in run.figures):
        for value in _PLOTTED:
            for part, figures in _parts(run.of(metric, value)):
                parts = [metric, part, value] if part else [metric, value]
                name = "-".join(parts).replace("_", "-").replace(" ", "-") + ".png"
                _bars(figures, folder / name)
                made.append(name)
        series = {key: found for key, found in run.quantiles.items()
                  if key[0] == metric and any(found.values())}
        if series:
            name = f"{metric}-distribution.png"
            _distributions(series, folder / name)
            made.append(name)
    return made


def typical(slots: Sequence[Quantiles]) -> list[tuple[float, float]]:
    """Return the distribution of several slots: the median of each quantile over the slots."""
    times: dict[float, list[float]] = {}
    for slot in slots:
        for q, time in slot:
            times.setdefault(q, []).append(time)
    return [(q, median(found)) for q, found in sorted(times.items())]


def _distributions(
    series: Mapping[Key, Mapping[str, Sequence[Quantiles]]], path: Path
) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    columns = min(_COLUMNS, len(series))
    rows = math.ceil(len(series) / columns)
    figure, grid = plt.subplots(rows, columns, figsize=(4.2 * columns, 3.4 * rows), dpi=120,
                                squeeze=False, sharex=True, sharey=True)
    for axes in grid.flat[len(series):]:
        axes.set_visible(False)
    for axes, ((_, profile, variant), found) in zip(grid.flat, series.items(), strict=False):
        for name, slots in found.items():
            points = [(1 / (1 - q), time) for q, time in typical(slots) if q < 1]
            axes.plot([at for at, _ in points], [time / 1e3 for _, time in points],
                      label=name, color=_COLOURS.get(name), linewidth=1.5)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xticks([1 / (1 - q) for q in _TICKS], [f"{q * 100:g} %" for q in _TICKS])
        axes.minorticks_off()
        axes.set_title(f"{variant}, {profile}", fontsize="medium")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in grid[:, 0]:
        axes.set_ylabel("answered within, us")
    lines = {label: line for axes in grid.flat
             for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(lines.values(), lines.keys(), frameon=False, fontsize="small", ncols=4,
                  loc="lower center")
    figure.suptitle("round trips: time within which a share of the requests was answered",
                    fontsize="medium")
    figure.tight_layout(rect=(0, 0.1 if rows == 1 else 0.06, 1, 1))
    figure.savefig(path)
    plt.close(figure)


def _parts(series: list[Figures]) -> list[tuple[str, list[Figures]]]:
    """Return (variant, series) per plot: one plot per variant if one plot has too many groups."""
    variants = dict.fromkeys(figures.key[2] for figures in series)
    if len(series) <= _MAX_GROUPS or len(variants) == len(series):
        return [("", series)] if series else []
    return [(v, [figures for figures in series if figures.key[2] == v]) for v in variants]


def _label(figures: Figures) -> str:
    """Return three lines: the profile, the description of the profile, and the variant."""
    _, profile, variant = figures.key
    lines = [profile, PROFILES[profile].title.replace(", ", ",\n")] if profile in PROFILES else []
    return "\n".join([*lines, variant])


def _bars(series: list[Figures], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    unit = UNITS[series[0].value]
    names = list(dict.fromkeys(name for figures in series for name in figures.names()))
    width = 0.8 / len(names)
    figure, axes = plt.subplots(figsize=(max(6.0, 1.9 * len(series) + 2), 4), dpi=120)
    for i, name in enumerate(names):
        positions, heights, below, above = [], [], [], []
        for at, figures in enumerate(series):
            level = figures.level(name)
            if level is None:
                continue
            scaled = level.scaled(unit.factor)
            positions.append(at + (i - (len(names) - 1) / 2) * width)
            heights.append(scaled.median)
            below.append(scaled.median - scaled.low)
            above.append(scaled.high - scaled.median)
        axes.bar(
            positions, heights, width, yerr=(below, above), label=name, color=_COLOURS.get(name),
            error_kw={"elinewidth": 1, "capsize": 2},
        )
    axes.set_xticks(range(len(series)), [_label(figures) for figures in series], fontsize="small")
    better = "more" if unit.more_is_better else "less"
    axes.set_title(f"{unit.title}, {unit.unit} ({better} is better)", fontsize="medium")
    axes.set_ylim(bottom=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize="small")
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)
